"""Bad input is refused with the value, the limit and the cure, never turned into text."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import PROMPTS, VOCAB, llama
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor, SynthIDTextWatermarkLogitsProcessor

import specdec
from specdec import DraftTree, Law, Sampling
from specdec.drafters import Drafter, ModelDrafter, NgramDrafter
from specdec.rules import (
    BlockVerification,
    Decision,
    LevelVerification,
    Rule,
    SiblingRejection,
    TraversalVerification,
    TypicalAcceptance,
)
from specdec.target import Target
from specdec.testing import TabularTarget
from specdec.trees import Chain, Dynamic, Static, Widths

torch.set_num_threads(1)

ARGUMENTS = {
    "empty prompt": ([torch.tensor([], dtype=torch.int64)], {}, "give at least one token"),
    "no prompts": ([], {}, "at least one prompt"),
    "too long": (torch.ones(200, dtype=torch.int64), {}, "max_new_tokens to at most 56"),
    "token out of range": (torch.tensor([1, VOCAB]), {}, "ids 0 to 49"),
    "negative token": (torch.tensor([-1]), {}, "ids 0 to 49"),
    "batched tensor": (torch.ones(2, 3, dtype=torch.int64), {}, "one per prompt"),
    "float tokens": (torch.ones(3), {}, "integers"),
    "list of ids": ([1, 2, 3], {}, "1-D tensors"),
    "encoding": ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, {}, "token ids alone"),
    "text without tokenizer": ("hello", {}, "pass tokenizer"),
    "zero budget": (PROMPTS, {"max_new_tokens": 0}, "must be >= 1"),
    "negative budget": (PROMPTS, {"max_new_tokens": -3}, "must be >= 1"),
    "fractional budget": (PROMPTS, {"max_new_tokens": 3.0}, "must be an integer"),
    "fractional seed": (PROMPTS, {"seed": 1.5}, "must be an integer"),
    "stop token out of range": (PROMPTS, {"stop_tokens": (99,)}, "ids 0 to 49"),
    "stop text": (PROMPTS, {"stop_tokens": ["."]}, "must be an integer"),
    "stop word": (PROMPTS, {"stop_tokens": "end"}, "stop_tokens='end': must be an integer"),
    "stop number": (PROMPTS, {"stop_tokens": 2.5}, "must be an integer"),
    "stop table": (PROMPTS, {"stop_tokens": torch.ones(2, 2)}, "must be an integer"),
    "unknown trace": (PROMPTS, {"trace": "all"}, "'summary'"),
    "model as drafter": (PROMPTS, {"drafter": llama(1)}, r"ModelDrafter\(model\)"),
    "drafter class": (PROMPTS, {"drafter": NgramDrafter}, r"an instance, NgramDrafter\(...\)"),
    "rule class": (PROMPTS, {"rule": SiblingRejection}, r"an instance, SiblingRejection\(...\)"),
    "config as sampling": (PROMPTS, {"sampling": GenerationConfig()}, "from_generation_config"),
    "number as sampling": (PROMPTS, {"sampling": 0.8}, "pass a specdec Sampling"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case):
    prompts, options, cure = ARGUMENTS[case]
    with pytest.raises(ValueError, match=cure):
        specdec.generate(llama(), prompts, **options)


def test_numbers_of_other_libraries_are_numbers():
    options = {"sampling": Sampling(1.0), "max_new_tokens": torch.tensor(4), "seed": torch.tensor(3)}
    expected = specdec.generate(llama(), PROMPTS[0], sampling=Sampling(1.0), max_new_tokens=4, seed=3).tokens
    assert torch.equal(specdec.generate(llama(), PROMPTS[0], **options).tokens[0], expected[0])


CONSTRUCTORS = {
    "cold": (lambda: Sampling(-1.0), "at least 1e-06, or 0"),
    "colder than float32": (lambda: Sampling(1e-40), "at least 1e-06, or 0"),
    "no temperature": (lambda: Sampling(float("nan")), "must be finite"),
    "top_k": (lambda: Sampling(1.0, top_k=0), "must be >= 1"),
    "top_p": (lambda: Sampling(1.0, top_p=0.0), "must be in"),
    "min_p": (lambda: Sampling(1.0, min_p=2.0), "must be in"),
    "one processor": (lambda: Sampling(processors=RepetitionPenaltyLogitsProcessor(1.2)), "a sequence of them"),
    "stateful processor": (
        lambda: Sampling(processors=[SynthIDTextWatermarkLogitsProcessor(2, [1, 2], 16, 1, 16, "cpu")]),
        "keeps state",
    ),
    "empty tree": (lambda: Widths([]), "at least one level"),
    "no children": (lambda: Widths([2, 0]), "at least one child"),
    "law of nothing": (lambda: Widths([2], Law.PADDING), "absent nodes"),
    "empty chain": (lambda: Chain(0), "drafter=None"),
    "threshold of one": (lambda: Dynamic(threshold=1.0), "below 1"),
    "one node": (lambda: Dynamic(nodes=1), "nodes >= 2"),
    "no n-gram": (lambda: NgramDrafter(max_ngram=0), "must be >= 1"),
    "widths for a tree": (lambda: ModelDrafter(llama(), [4, 2]), "pass a tree policy"),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors(case):
    make, cure = CONSTRUCTORS[case]
    with pytest.raises(ValueError, match=cure):
        make()


@pytest.mark.parametrize(
    ("options", "cure"),
    [({"num_beams": 3}, "beam search"), ({"max_time": 1.0}, "no time limit"), ({"guidance_scale": 1.5}, "keeps state"),
     ({"stop_strings": ["x"]}, "stop strings")],
    ids=lambda o: "-".join(o) if isinstance(o, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("whose", ["given", "the model's own"])
def test_generation_configs(options, cure, whose):
    model = llama()
    config = GenerationConfig(eos_token_id=7, pad_token_id=0, **(options if whose == "given" else {}))
    if whose != "given":
        for name, value in options.items():
            setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=cure):
        specdec.generate(model, PROMPTS, sampling=Sampling.from_generation_config(config), max_new_tokens=4)


def test_pairs_that_cannot_work():
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        specdec.generate(llama().train(), PROMPTS)
    draft, target = llama(1), specdec.ModelTarget(llama())
    drafter = ModelDrafter(draft)
    draft.bfloat16()
    target.model.train()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        specdec.generate(target, PROMPTS)
    with pytest.raises(ValueError, match="moved or cast"):
        specdec.generate(llama(), PROMPTS, drafter)
    with pytest.raises(ValueError, match="vocabulary has 40 tokens"):
        specdec.generate(llama(), PROMPTS, ModelDrafter(llama(vocab_size=40)), max_new_tokens=8)
    with pytest.raises(ValueError, match="draft model reads at most 20 tokens"):
        specdec.generate(llama(), PROMPTS, ModelDrafter(llama(max_position_embeddings=20)), max_new_tokens=9)
    with pytest.raises(ValueError, match="cannot have 4 different children"):
        pair = [llama(seed, vocab_size=3, eos_token_id=None) for seed in (0, 1)]
        specdec.generate(pair[0], torch.tensor([1]), ModelDrafter(pair[1], Widths((4,))), max_new_tokens=8)
    with pytest.raises(ValueError, match="PreTrainedModel"):
        specdec.generate(torch.nn.Linear(2, 2), PROMPTS)


def spoilt(model, value):
    model.get_output_embeddings().weight.data[:] = value
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_p=0.9), Sampling(1.0, 5, 0.9, 0.1)], ids=str
)
@pytest.mark.parametrize("drafter", [None, ModelDrafter(llama(1), Chain(2))], ids=str)
def test_logits_that_are_no_law(value, sampling, drafter):
    with pytest.raises(ValueError, match=r"target's logits are NaN.*\[0, 1, 2, 3\].*Check the model's weights"):
        specdec.generate(spoilt(llama(), value), PROMPTS, drafter, sampling=sampling, max_new_tokens=8)


def test_one_logit_that_is_nan_names_its_prompt():
    """Under nucleus sampling too, where its token might be taken for one that is cut off."""
    model = llama()

    def spoil(module, inputs, logits):
        logits = logits.clone()
        logits[1:2, :, 7] = torch.nan
        return logits

    model.get_output_embeddings().register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"target's logits are NaN.*\[1\].*Check the model's weights"):
        specdec.generate(model, PROMPTS, sampling=Sampling(1.0, top_p=0.9), max_new_tokens=8)


def test_draft_laws_that_are_no_laws():
    drafter = ModelDrafter(spoilt(llama(1), torch.nan), Chain(3))
    with pytest.raises(ValueError, match="comes from the draft model's weights"):
        specdec.generate(llama(), PROMPTS, drafter, sampling=Sampling(1.0), max_new_tokens=8)


class Edited(Drafter):
    """A drafter whose trees are changed by `edit(tree)` before the loop sees them."""

    def __init__(self, edit, length=3):
        self.inner, self.edit = ModelDrafter(llama(1), Chain(length)), edit

    def spec(self, sampling):
        return self.inner.spec(sampling)

    def start(self, target, context):
        self.inner.start(target, context)

    def propose(self, context, coins):
        return self.edit(self.inner.propose(context, coins))

    def patched(self):
        return self.inner.patched()


def unlikely(tree):
    tree.draft_probs[0, 1, tree.tokens[0, 2]] = 0
    return tree


def with_token(tree, token, node=2):
    tokens = tree.tokens.clone()
    tokens[0, node] = token
    return replace(tree, tokens=tokens)


TREES = {
    "no laws": (lambda t: DraftTree(t.tokens, t.topology, t.laws), "draft_probs must be there"),
    "other root": (lambda t: replace(t, tokens=(t.tokens + 1) % VOCAB), r"prompt\(s\) \[0, 1, 2, 3\].*node 0"),
    "impossible token": (unlikely, r"prompt\(s\) \[0\].*positive at the drawn tokens"),
    "negative token": (lambda t: with_token(t, -1), r"prompt\(s\) \[0\].*below context.vocab"),
    "token past the vocabulary": (lambda t: with_token(t, VOCAB), r"prompt\(s\) \[0\].*below context.vocab"),
    "short law": (
        lambda t: replace(t, draft_probs=t.draft_probs[..., :9]),
        r"draft_probs is \[4, 3, 9\], not \[4, 3, 50\]",
    ),
    "fewer laws than nodes": (lambda t: replace(t, laws=t.laws[:, :2]), r"laws is \[4, 2\], not \[4, 4\]"),
}


@pytest.mark.parametrize("case", TREES)
def test_trees_that_are_none(case):
    edit, cure = TREES[case]
    with pytest.raises(ValueError, match=cure):
        specdec.generate(llama(), PROMPTS, Edited(edit), sampling=Sampling(1.0), max_new_tokens=8)


RULES = [SiblingRejection(), BlockVerification(), TraversalVerification(), LevelVerification(), TypicalAcceptance()]


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafted_tokens_outside_the_vocabulary_are_told_before_they_are_looked_up(token, rule, temperature):
    points = Edited(lambda tree: with_token(tree, token, 1))
    points.inner.tree = Static([-1, 0, 1])
    for target in (llama(), TabularTarget(VOCAB)):
        with pytest.raises(ValueError, match=r"prompt\(s\) \[0\].*below context.vocab"):
            sampling, prompt = Sampling(temperature), PROMPTS[0]
            specdec.generate(target, prompt, points, rule=rule, sampling=sampling, max_new_tokens=8, trace="laws")


def test_absent_nodes_may_hold_any_token():
    def absent(tree):
        return replace(with_token(tree, -1, 3), laws=torch.tensor([[0, 0, 0, Law.PADDING]], dtype=torch.uint8))

    expected = specdec.generate(llama(), PROMPTS[0], max_new_tokens=3).tokens[0]
    out = specdec.generate(
        llama(), PROMPTS[0], Edited(lambda t: absent(t) if t.tokens.shape[1] == 4 else t), max_new_tokens=8
    )
    assert torch.equal(out.tokens[0][:3], expected)


STOPS = [10, (10,), {10}, range(10, 11), torch.tensor(10), torch.tensor([10]), np.array([10]), np.int32(10), iter([10])]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: f"{type(stop).__name__} {getattr(stop, 'shape', '')}")
def test_stop_tokens_are_integers_in_any_container(stop):
    text = specdec.generate(llama(), PROMPTS[0], max_new_tokens=12, stop_tokens=()).tokens[0].tolist()
    assert 10 in text[:-1]
    out = specdec.generate(llama(), PROMPTS[0], max_new_tokens=12, stop_tokens=stop)
    assert out.tokens[0].tolist() == text[: text.index(10) + 1]


def test_trees_that_are_larger_than_promised():
    drafter = Edited(lambda tree: tree)
    drafter.spec = Edited(None, length=2).spec
    drafter.propose = lambda context, coins: drafter.inner.propose(replace(context, max_depth=3), coins)
    with pytest.raises(ValueError, match=r"nodes 4, at most 3.*depth 3, at most 2"):
        specdec.generate(llama(), PROMPTS, drafter, max_new_tokens=8)


class Says(Rule):
    """Returns a fixed answer."""

    lossless = True

    def __init__(self, answer):
        self.answer = answer

    def decide(self, tree, target_law, coins):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "cure"),
    [(([0], 5), r"return a Decision"), (Decision([], 5), "starts at the root"), (Decision([1], 5), "starts at the root"),
     (Decision([0, 2], 5), "from child to child"), (Decision([0, 99], 5), "child to child"), (Decision([0], 50), "ids 0 to 49"),
     (Decision([0], -1), "ids 0 to 49")],
    ids=str,
)  # fmt: skip
def test_decisions_that_are_none(answer, cure):
    with pytest.raises((ValueError, TypeError), match=cure):
        specdec.generate(llama(), PROMPTS, ModelDrafter(llama(1), Chain(3)), rule=Says(answer), max_new_tokens=8)


class Uniform(Target):
    vocab = 4

    def start(self, context, capacity, hidden):
        pass

    def score(self, tree, context):
        return torch.zeros(*tree.tokens.shape, 4)

    def commit(self, acceptance):
        pass


class Short(Uniform):
    def score(self, tree, context):
        return super().score(tree, context)[..., :3]


def test_targets():
    assert len(specdec.generate(Uniform(), torch.tensor([1]), sampling=Sampling(1.0), max_new_tokens=5).tokens[0]) == 5
    with pytest.raises(ValueError, match=r"not \[batch, node, vocab\] = \[1, 1, 4\]"):
        specdec.generate(Short(), torch.tensor([1]), max_new_tokens=5)
