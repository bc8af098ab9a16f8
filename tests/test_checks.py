"""Every setting that is of the wrong type or out of range is a ValueError with its name, its value, the limit and the cure."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import PROMPTS, llama

import specdec
from specdec import Coins, Graphs, Law, ModelTarget, Sampling, TreeSpec, prediction, theory
from specdec.checks import brief
from specdec.drafters import (
    Fallback,
    LayerSkipDrafter,
    MedusaDrafter,
    MedusaHeads,
    ModelDrafter,
    NgramDrafter,
    Paused,
    SuffixDrafter,
)
from specdec.rules import LenientRejection, LevelVerification, SiblingRejection, TypicalAcceptance
from specdec.testing import (
    Table,
    TabularDrafter,
    TabularTarget,
    assert_drafter,
    assert_lossless,
    audit,
    exact_law,
    target_law,
)
from specdec.theory import CostCurve, Costs
from specdec.trace import Trace, replay
from specdec.training import distillation, self_distillation, skip_search, states
from specdec.training.features import TargetTexts
from specdec.trees import Chain, Dynamic, Static, Widths

torch.set_num_threads(1)

MODEL, TABLE = llama().requires_grad_(False), TabularTarget(3)
HEADS = MedusaHeads(1, 1, 32).double()
DRAFTER = TabularDrafter(Table(3, 1), Chain(2))
CURVE = CostCurve((1, 2, 40), (1.0, 1.1, 2.0))
COSTS = Costs(CURVE)
LAWS = torch.full((1, 6, 4), 0.25).log()
TOKENS, TEXT = torch.zeros(1, 6, dtype=torch.int64), torch.arange(30)
KNOWN = TargetTexts.read(MODEL, HEADS, TEXT[None])
generate = partial(specdec.generate, MODEL, PROMPTS[0])
even = lambda text: [0.5, 0.5]  # noqa: E731 - the law of a fair coin

# name in the message: (call with the value in its place, the least that is right)
COUNTS = {
    "generate: max_new_tokens": (lambda v: generate(max_new_tokens=v), 1),
    "stream: max_new_tokens": (lambda v: next(iter(specdec.stream(MODEL, PROMPTS, max_new_tokens=v))), 1),
    "Sampling: top_k": (lambda v: Sampling(1.0, top_k=v), 1),
    "Coins: batch": (lambda v: Coins(0, v, 2), 1),
    "Coins: nodes": (lambda v: Coins(0, 1, v), 1),
    "TreeSpec: TreeSpec.nodes": (lambda v: TreeSpec(frozenset({Law.POINT}), v, 1, 1), 1),
    "TreeSpec: TreeSpec.depth": (lambda v: TreeSpec(frozenset({Law.POINT}), 2, v, 1), 0),
    "TreeSpec: TreeSpec.width": (lambda v: TreeSpec(frozenset({Law.POINT}), 2, 1, v), 0),
    "Chain: length": (Chain, 1),
    "Widths: widths[1]": (lambda v: Widths([2, v]), 1),
    "Dynamic: nodes": (Dynamic, 2),
    "Dynamic: depth": (lambda v: Dynamic(9, v), 1),
    "Dynamic: width": (lambda v: Dynamic(9, 2, v), 1),
    "NgramDrafter: length": (NgramDrafter, 1),
    "NgramDrafter: max_ngram": (lambda v: NgramDrafter(2, v), 1),
    "NgramDrafter: branches": (lambda v: NgramDrafter(2, 2, v), 1),
    "SuffixDrafter: nodes": (SuffixDrafter, 2),
    "SuffixDrafter: depth": (lambda v: SuffixDrafter(9, v), 1),
    "SuffixDrafter: width": (lambda v: SuffixDrafter(9, 3, v), 1),
    "SuffixDrafter: corpus[0][1]": (lambda v: SuffixDrafter(corpus=[[1, v]]), 0),
    "SuffixDrafter: remembered": (lambda v: SuffixDrafter(shared=True, remembered=v), 1),
    "MedusaHeads: heads": (lambda v: MedusaHeads(v, 1, 4), 1),
    "MedusaHeads: blocks": (lambda v: MedusaHeads(1, v, 4), 1),
    "MedusaHeads: hidden": (lambda v: MedusaHeads(1, 1, v), 1),
    "LevelVerification: rounds": (LevelVerification, 1),
    "Table: vocab": (Table, 1),
    "Table: seed": (lambda v: Table(3, v), 0),
    "exact_law: max_new_tokens": (lambda v: exact_law(TABLE, [0], max_new_tokens=v), 1),
    "target_law: max_new_tokens": (lambda v: target_law(TABLE, [0], max_new_tokens=v), 1),
    "target_law: prompt[0]": (lambda v: target_law(TABLE, [v]), 0),
    "assert_lossless: vocab": (lambda v: assert_lossless(SiblingRejection(), vocab=v), 2),
    "assert_lossless: max_new_tokens": (lambda v: assert_lossless(SiblingRejection(), max_new_tokens=v), 1),
    "assert_drafter: horizon": (lambda v: assert_drafter(DRAFTER, TABLE, [[0], [1, 2]], horizon=v), 1),
    "audit: max_tokens": (lambda v: audit(lambda seed: [], even, max_tokens=v), 1),
    "audit: seed": (lambda v: audit(lambda seed: [], even, seed=v), 0),
    "one_step_ceiling: count": (lambda v: theory.one_step_ceiling(even(()), Law.IID, even(()), count=v), 0),
    "CostCurve: nodes[0]": (lambda v: CostCurve([v], [1.0]), 1),
    "measure_costs: context": (lambda v: theory.measure_costs(MODEL, context=v), 0),
    "measure_costs: batch": (lambda v: theory.measure_costs(MODEL, batch=v), 1),
    "measure_costs: repeats": (lambda v: theory.measure_costs(MODEL, repeats=v), 1),
    "measure_costs: nodes[0]": (lambda v: theory.measure_costs(MODEL, nodes=[v]), 1),
    "chain_optimum: depth": (lambda v: theory.chain_optimum(even, even, v), 0),
    "best_tree: nodes": (lambda v: theory.best_tree([[0.5]], COSTS, v), 1),
    "longest_tree: nodes": (lambda v: theory.longest_tree([[0.5]], v), 1),
    "prediction.texts: count": (lambda v: prediction.texts(MODEL, ModelDrafter(MODEL), PROMPTS[0], v), 1),
    "expected_tau: depth": (lambda v: distillation.expected_tau(LAWS, LAWS, TOKENS, v), 1),
    "Comparison: depth": (lambda v: states.Comparison(HEADS, MODEL, KNOWN, v), 1),
    "Comparison: anchors": (lambda v: states.Comparison(HEADS, MODEL, KNOWN, 1, v), 1),
    "prediction.read_along: depth": (lambda v: prediction.read_along(MODEL, MedusaDrafter(HEADS), TEXT, 2, Sampling(), v), 1),
    "continuations: batch": (lambda v: next(self_distillation.continuations(MODEL, PROMPTS, batch=v)), 1),
    "Rehearsal: depth": (lambda v: skip_search.Rehearsal(MODEL, [TEXT], v, Sampling(1.0)), 1),
    "search: most": (lambda v: next(skip_search.search(lambda s: s, [1, 2], 1, v)), 0),
    "measure_layer_costs: nodes": (lambda v: skip_search.measure_layer_costs(MODEL, v, 2), 1),
}  # fmt: skip
NO_COUNTS = [
    2.5,
    3.0,
    True,
    "3",
    None,
    math.nan,
    [2],
    1j,
    np.float64(2),
    np.True_,
    torch.tensor(True),
    torch.tensor([2]),
]
MAY_BE_NONE = {"Comparison: anchors", "Sampling: top_k"}
MAY_BE_SEVERAL = {"generate: max_new_tokens", "stream: max_new_tokens"}  # one per prompt


@pytest.mark.parametrize("case", COUNTS)
def test_what_is_no_count_is_refused(case):
    call, least = COUNTS[case]
    name = case.partition(": ")[2]
    for value in NO_COUNTS:
        if (value is None and case in MAY_BE_NONE) or (np.ndim(value) and case in MAY_BE_SEVERAL):
            continue
        with pytest.raises(ValueError) as refused:
            call(value)
        assert f"{name}={brief(value)}: must be an integer" in str(refused.value)
        assert "such as" in str(refused.value)
    for value, limit in ((least - 1, f"must be >= {least}"), (10**40, "must be <= ")):
        with pytest.raises(ValueError) as refused:
            call(value)
        assert f"{name}={brief(value)}: {limit}" in str(refused.value)


@pytest.mark.parametrize(
    "number", [np.int32(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int8)], ids=repr
)
def test_integers_of_other_libraries_are_counts(number):
    assert Chain(number) == Chain(3)
    assert Widths([number, 2]).widths == (3, 2)
    assert Widths(np.array([3, 2])).widths == Widths(torch.tensor([3, 2])).widths == (3, 2)
    assert repr(NgramDrafter(number)) == repr(NgramDrafter(3))
    assert Sampling(1.0, top_k=number) == Sampling(1.0, top_k=3)
    assert Static([-1, 0, 0, 0, number]).parents == (-1, 0, 0, 0, 3)
    assert Coins(number, 1, 2).row(0).pick(0, np.ones(1000)) == Coins(3, 1, 2).row(0).pick(0, np.ones(1000))


SEEDS = {
    "generate": lambda v: generate(sampling=Sampling(1.0), max_new_tokens=2, seed=v),
    "Coins": lambda v: Coins(v, 1, 2),
    "custom_generate": lambda v: specdec.custom_generate(seed=v),
    "continuations": lambda v: next(self_distillation.continuations(MODEL, PROMPTS, new_tokens=2, seed=v)),
    "search": lambda v: next(skip_search.search(lambda s: s, [1, 2], 1, 2, seed=v)),
}


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_has_64_bits(name):
    for seed in (10**40, 2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"seed=.*must be (<=|>=) -?\d{19,20}"):
            SEEDS[name](seed)
    for seed in (1.5, True, "0"):
        with pytest.raises(ValueError, match=f"seed={seed!r}: must be an integer"):
            SEEDS[name](seed)
    for seed in (2**64 - 1, -(2**63)) if name != "continuations" else (2**63, -1):
        SEEDS[name](seed)


# name in the message: (call with the value in its place, values out of range, the limit)
NUMBERS = {
    "Sampling: temperature": (Sampling, [-1.0, 1e-40, 1e39], "finite and at least 1e-06, or 0"),
    "Sampling: top_p": (lambda v: Sampling(1.0, top_p=v), [0.0, 1.5], "(0, 1]"),
    "Sampling: min_p": (lambda v: Sampling(1.0, min_p=v), [-0.1, 1.5], "[0, 1]"),
    "Dynamic: threshold": (lambda v: Dynamic(threshold=v), [-0.1, 1.0], "[0, 1)"),
    "SuffixDrafter: threshold": (lambda v: SuffixDrafter(threshold=v), [0.0, 1.5], "(0, 1]"),
    "LenientRejection: lenience": (LenientRejection, [0.0, 1.5], "(0, 1]"),
    "TypicalAcceptance: epsilon": (TypicalAcceptance, [-0.1, 1.5], "[0, 1]"),
    "TypicalAcceptance: alpha": (lambda v: TypicalAcceptance(0.1, v), [-0.1, 1.5], "[0, 1]"),
    "assert_drafter: tolerance": (lambda v: assert_drafter(DRAFTER, TABLE, [[0], [1]], tolerance=v), [-1.0], "[0, 1]"),
    "audit: alpha": (lambda v: audit(lambda seed: [], even, alpha=v), [0.0, 1.0], "(0, 1)"),
    "CostCurve: seconds[0]": (lambda v: CostCurve([1], [v]), [-1.0], "[0, inf)"),
    "predicted_speed_up: acceptance_length": (lambda v: theory.predicted_speed_up(v, [-1, 0], COSTS), [-1.0], "[0, inf)"),
    "chain_speed_ups: rates[0]": (lambda v: theory.chain_speed_ups([v], COSTS), [-0.1, 1.5], "[0, 1]"),
    "best_tree: acceptance[0][0]": (lambda v: theory.best_tree([[v]], COSTS), [-0.1, 1.5], "[0, 1]"),
    "expected_length: acceptance[0][0]": (lambda v: theory.expected_length([-1, 0], [[v]]), [-0.1, 1.5], "[0, 1]"),
}  # fmt: skip
NO_NUMBERS = ["1", True, [0.5], 1j, torch.tensor(True), torch.tensor([0.5]), math.nan, math.inf, -math.inf, 10**400]


@pytest.mark.parametrize("case", NUMBERS)
def test_what_is_no_number_in_range_is_refused(case):
    call, outside, limit = NUMBERS[case]
    for value in [*NO_NUMBERS, *outside]:
        with pytest.raises(ValueError) as refused:
            call(value)
        assert f"{case.partition(': ')[2]}={brief(value)}: " in str(refused.value)
        assert limit in str(refused.value)


def test_numbers_of_other_libraries_are_python_floats_afterwards():
    for number in (np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)):
        sampling = Sampling(number, top_p=number)
        assert sampling == Sampling(0.5, top_p=0.5)
        assert type(sampling.temperature) is float
        assert Dynamic(threshold=number) == Dynamic(threshold=0.5)


SEQUENCES = {
    "Widths: widths": Widths,
    "Static: parents": Static,
    "LayerSkipDrafter: skip": LayerSkipDrafter,
    "Sampling: processors": lambda v: Sampling(processors=v),
    "SuffixDrafter: corpus": lambda v: SuffixDrafter(corpus=v),
    "SuffixDrafter: corpus[0]": lambda v: SuffixDrafter(corpus=[v]),
    "exact_law: prompt": lambda v: exact_law(TABLE, v),
    "assert_lossless: drafters": lambda v: assert_lossless(SiblingRejection(), drafters=v),
    "assert_drafter: prompts": lambda v: assert_drafter(DRAFTER, TABLE, v),
    "assert_drafter: samplings": lambda v: assert_drafter(DRAFTER, TABLE, [[0], [1]], samplings=v),
    "CostCurve: nodes": lambda v: CostCurve(v, [1.0]),
    "CostCurve: seconds": lambda v: CostCurve([1], v),
    "Costs.step: parents": COSTS.step,
    "expected_length: parents": lambda v: theory.expected_length(v, [[0.5]]),
    "expected_length: acceptance": lambda v: theory.expected_length([-1, 0], v),
    "chain_speed_ups: rates": lambda v: theory.chain_speed_ups(v, COSTS),
    "acceptance_length: texts": lambda v: prediction.acceptance_length(v, Chain(1)),
    "search: layers": lambda v: next(skip_search.search(lambda s: s, v, 1, 2)),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_what_is_no_sequence_is_refused(case):
    for value in (3, 2.5, "ab", b"ab", {1: 2}, torch.tensor(2)):
        with pytest.raises(ValueError, match=r"must be a sequence of \w+") as refused:
            SEQUENCES[case](value)
        shown = value.item() if isinstance(value, torch.Tensor) else value
        assert f"{case.partition(': ')[2]}={brief(shown)}: " in str(refused.value)


PARENTS = {"Static": Static, "step": COSTS.step, "expected_length": lambda v: theory.expected_length(v, [[0.5, 0.5]])}


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize("parents", [[], [0], [-1, 1], [-1, -1], [0, 0], [-1, 0.0], [-1, True]], ids=str)
def test_parents_that_are_no_tree_are_refused(name, parents):
    with pytest.raises(
        ValueError, match=r"parents.*=.*must be -1 and then, for each node, the index of an earlier one"
    ):
        PARENTS[name](parents)


# (call with the value in its place, part of the cure)
KINDS = {
    "shared": (lambda v: SuffixDrafter(shared=v), "must be True or False"),
    "drafter": (generate, "specdec Drafter"),
    "rule": (lambda v: generate(rule=v), "specdec Rule"),
    "sampling": (lambda v: generate(sampling=v), "specdec Sampling"),
    "resume": (lambda v: generate(resume=v), "keep=True"),
    "keep": (lambda v: generate(keep=v), "True or False"),
    "engine": (lambda v: generate(engine=v), "'eager', 'graph', 'compile'"),
    "tokenizer": (lambda v: generate(tokenizer=v), "AutoTokenizer"),
    "target": (lambda v: specdec.generate(v, PROMPTS), "AutoModelForCausalLM"),
    "prompts": (lambda v: specdec.generate(MODEL, v), "token ids or text"),
    "model of a target": (ModelTarget, "AutoModelForCausalLM"),
    "model of a drafter": (ModelDrafter, "AutoModelForCausalLM"),
    "tree": (lambda v: ModelDrafter(MODEL, v), "Chain(4)"),
    "tokenizer of a drafter": (lambda v: ModelDrafter(MODEL, tokenizer=v), "AutoTokenizer"),
    "network of a drafter": (MedusaDrafter, "MedusaHeads"),
    "first": (lambda v: Fallback(v, DRAFTER), "specdec Drafter"),
    "second": (lambda v: Fallback(DRAFTER, v), "specdec Drafter"),
    "paused": (Paused, "specdec Drafter"),
    "seconds": (lambda v: Paused(DRAFTER, seconds=v), "CostCurve"),
    "law": (lambda v: Widths([2], v), "Law.IID"),
    "law of a static tree": (lambda v: Static([-1, 0], v), "Law.IID"),
    "law of a ceiling": (lambda v: theory.one_step_ceiling([1.0], v, [1.0]), "Law.IID"),
    "laws": (lambda v: TreeSpec(v, 2, 1, 1), "set of the laws"),
    "config": (Sampling.from_generation_config, "GenerationConfig"),
    "compile": (lambda v: Graphs(compile=v), "True or False"),
    "capture": (lambda v: Graphs(capture=v), "function"),
    "drafter of custom_generate": (specdec.custom_generate, "specdec Drafter"),
    "rule of custom_generate": (lambda v: specdec.custom_generate(rule=v), "specdec Rule"),
    "drafter of exact_law": (lambda v: exact_law(TABLE, [0], v), "specdec Drafter"),
    "sampling of exact_law": (lambda v: exact_law(TABLE, [0], sampling=v), "specdec Sampling"),
    "merge": (lambda v: exact_law(TABLE, [0], merge=v), "True or False"),
    "target of target_law": (lambda v: target_law(v, [0]), "TabularTarget"),
    "rule of assert_lossless": (assert_lossless, "specdec Rule"),
    "generate": (lambda v: audit(v, even), "a seed"),
    "log_probs": (lambda v: audit(even, v), "model_log_probs"),
    "verify": (Costs, "CostCurve"),
    "target of measure_costs": (theory.measure_costs, "transformers model"),
    "costs of a speed-up": (lambda v: theory.chain_speed_ups([0.5], v), "measure_costs"),
    "trace": (specdec.trace.positional_acceptance, "specdec Trace"),
    "drafter of texts": (lambda v: prediction.texts(MODEL, v, PROMPTS[0]), "ModelDrafter(draft)"),
    "block": (lambda v: distillation.expected_tau(LAWS, LAWS, TOKENS, 2, v), "True or False"),
    "sampling of a rehearsal": (lambda v: skip_search.Rehearsal(MODEL, [TEXT], 2, v), "specdec Sampling"),
    "replayed": (lambda v: replay(v, SiblingRejection()), "specdec Trace"),
    "rule of a replay": (lambda v: replay(Trace(), v), "specdec Rule"),
    "dtype of the demo pair": (specdec.demo.load, "smollm2.load()"),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_is_of_another_kind_is_refused(case):
    call, cure = KINDS[case]
    for value in (2.5, object(), 10**40 + 1):
        with pytest.raises(ValueError) as refused:
            call(value)
        assert brief(value) in str(refused.value)
        assert cure in str(refused.value)


def test_a_misspelt_override_of_a_generation_config_is_told_with_the_field_that_was_meant():
    config = MODEL.generation_config
    with pytest.raises(ValueError, match=r"temperatur=0.5: .* did you mean 'temperature'\?"):
        Sampling.from_generation_config(config, temperatur=0.5)
    assert Sampling.from_generation_config(config, temperature=0.5).generation_config.temperature == 0.5
