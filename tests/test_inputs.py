"""Bad input is refused with the value, the limit and the cure, never turned into text."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_drafters import Edited
from tiny_models import PROMPTS, VOCAB, llama
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import specdec
from specdec import DraftTree, Law, Sampling
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.models.target import Scores, Target, TargetRun
from specdec.rules import (
    BlockVerification,
    Decision,
    LevelVerification,
    Rule,
    SiblingRejection,
    TraversalVerification,
    TypicalAcceptance,
)
from specdec.testing import TabularTarget, assert_lossless
from specdec.trees import Chain, Dynamic, Static, Widths

torch.set_num_threads(1)


class Decodes:
    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(map(str, tokens))


class Ids(Decodes):
    """Text that consists of token ids."""

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}


ARGUMENTS = {
    "empty prompt": ([torch.tensor([], dtype=torch.int64)], {}, "give at least one token"),
    "no prompts": ([], {}, "at least one prompt"),
    "too long": (torch.ones(200, dtype=torch.int64), {}, "max_new_tokens to at most 56"),
    "full": (torch.ones(256, dtype=torch.int64), {}, "shorten the prompt to at most 255 tokens"),
    "token out of range": (torch.tensor([1, VOCAB]), {}, "ids 0 to 49"),
    "negative token": (torch.tensor([-1]), {}, "ids 0 to 49"),
    "batched tensor": (torch.ones(2, 3, dtype=torch.int64), {}, "one per prompt"),
    "float tokens": (torch.ones(3), {}, "integers"),
    "numbers that are no ids": ([1.0, 2.0], {}, "prompt 0 is a float; pass 1-D tensors"),
    "bools": ([True, False], {}, r"prompt 0\[0\]=True: must be an integer"),
    "ids and text": ([1, "two"], {}, "prompt 0 is a int; pass 1-D tensors"),
    "nested floats": ([[1, 2.5]], {}, r"prompt 0\[1\]=2.5: must be an integer.*without padding"),
    "nested twice": ([[[1, 2]]], {}, r"prompt 0\[0\]=\[1, 2\]: must be an integer.*one per prompt"),
    "huge ids": ([[1, 2**70]], {}, r"prompt 0\[1\]=1180591620717411303424: must be"),
    "ids out of range": ([[1, VOCAB]], {}, "ids 0 to 49"),
    "one empty prompt of several": ([[1], []], {}, "prompt 1 is empty"),
    "array of rows": (np.ones((2, 3), dtype=np.int64), {}, "one per prompt"),
    "array of floats": (np.ones(3), {}, "integers"),
    "array of bools": (np.ones(3, dtype=bool), {}, "integers"),
    "array of text": (np.array(["a"]), {}, "prompt 0 is a ndarray; pass 1-D tensors"),
    "complex tokens": (torch.ones(3, dtype=torch.complex64), {}, "integers"),
    "scalar": (torch.tensor(3), {}, r"shape \[\]; pass 1-D tensors"),
    "bytes": (b"ab", {}, "prompts is a bytes; pass token ids or text"),
    "set": ({1, 2}, {}, "prompts is a set; pass token ids or text"),
    "no prompt at all": (None, {}, "prompts is a NoneType; pass token ids or text"),
    "message outside of a chat": (
        [[1], {"role": "user", "content": "hello"}],
        {},
        r"prompt 1 is a dict; of chat.*list",
    ),
    "BatchEncoding": (BatchEncoding({"input_ids": [[1, 2]]}), {}, "token ids alone"),
    "empty text": ("", {"tokenizer": Ids()}, "prompt 0 is empty"),
    "text and a tokenizer that reads none": ("12", {"tokenizer": Decodes()}, "a Decodes reads none; pass tokenizer"),
    "bool budget": (PROMPTS, {"max_new_tokens": True}, "max_new_tokens=True: must be an integer"),
    "bool stop token": (PROMPTS, {"stop_tokens": True}, "stop_tokens=True: must be an integer"),
    "name of a tokenizer": (
        PROMPTS,
        {"tokenizer": "gpt2"},
        r"tokenizer is a str; .*from_pretrained\(name\). Got 'gpt2'",
    ),
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
    "equal samples": (PROMPTS, {"num_samples": 2}, r"equal texts; pass sampling=specdec.Sampling\(temperature=1.0\)"),
    "no samples": (PROMPTS, {"num_samples": 0}, "must be >= 1; it is how many texts to write for each prompt"),
    "index below 0": (PROMPTS, {"first_index": -1}, "must be >= 0; it is how many prompts come before these"),
    "a prompt of a part": ([[1], []], {"first_index": 7}, "prompt 8 is empty"),
    "number as flag": (PROMPTS, {"logprobs": 2}, "logprobs=2: must be True or False"),
    "config as sampling": (PROMPTS, {"sampling": GenerationConfig()}, "from_generation_config"),
    "number as sampling": (PROMPTS, {"sampling": 0.8}, "pass a specdec Sampling"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case):
    prompts, options, cure = ARGUMENTS[case]
    with pytest.raises(ValueError, match=cure):
        specdec.generate(llama(), prompts, **options)


IDS = [[5, 6, 7], [8, 9]]
ONE = {
    "list": IDS[0],
    "tuple": tuple(IDS[0]),
    "range": range(5, 8),
    "array": np.array(IDS[0], dtype=np.uint16),
    "tensor of int32": torch.tensor(IDS[0], dtype=torch.int32),
    "generator": (token for token in IDS[0]),
    "NumPy's integers": [np.int64(token) for token in IDS[0]],
}
SEVERAL = {
    "lists": IDS,
    "tuple of tuples": tuple(map(tuple, IDS)),
    "arrays": list(map(np.array, IDS)),
    "generator of lists": (ids for ids in IDS),
    "a list and a tensor": [IDS[0], torch.tensor(IDS[1])],
    "text": [" ".join(map(str, ids)) for ids in IDS],
}


@pytest.mark.parametrize("form", [*ONE, *SEVERAL])
def test_a_prompt_may_be_ids_in_any_sequence(form):
    ids, prompts = ([IDS[0]], ONE[form]) if form in ONE else (IDS, SEVERAL[form])
    options = {"max_new_tokens": 6, "tokenizer": Ids()}
    expected = specdec.generate(llama(), [torch.tensor(one) for one in ids], **options).tokens
    found = specdec.generate(llama(), prompts, **options).tokens
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


ELSEWHERE = {
    "temperature": (0.8, r"temperature=0.8: pass sampling=specdec.Sampling\(temperature=0.8\)"),
    "top_k": (5, r"pass sampling=specdec.Sampling\(temperature=1.0, top_k=5\)"),
    "top_p": (0.9, r"pass sampling=specdec.Sampling\(temperature=1.0, top_p=0.9\)"),
    "processors": ([], r"pass sampling=specdec.Sampling\(processors=\[\]\)"),
    "do_sample": (True, r"Sampling\(temperature=1.0\) to sample, Sampling\(\) for greedy"),
    "repetition_penalty": (1.2, r"from_generation_config\(GenerationConfig\(repetition_penalty=1.2\)\)"),
    "generation_config": (GenerationConfig(), r"from_generation_config\(config\)"),
    "max_length": (30, "pass max_new_tokens, which does not count the prompt"),
    "max_tokens": (3, "did you mean 'max_new_tokens'?"),
    "max_new_token": (3, "max_new_token=3: did you mean 'max_new_tokens'?"),
    "num_beams": (4, "num_beams=4: only greedy decoding and sampling"),
    "eos_token_id": (7, "pass stop_tokens"),
    "attention_mask": (None, "without padding"),
    "assistant_model": (None, r"ModelDrafter\(assistant_model\)"),
    "streamer": (None, "specdec.stream"),
    "sed": (3, r"did you mean 'seed'\?$"),
    "n": (3, "n=3: pass num_samples"),
    "output_scores": (True, "pass logprobs=True, or call model.generate"),
    "price_per_hour": (2.5, "pass it to Generation.summary"),
    "coins": (1, "coins=1: there are target, prompts, drafter, rule, sampling, max_new_tokens"),  # of the loop alone
    "nonsense": (3, "nonsense=3: there are target, prompts, drafter, rule, sampling, max_new_tokens"),
}


@pytest.mark.parametrize(
    "call", [specdec.generate, lambda *a, **k: list(specdec.stream(*a, **k))], ids=["generate", "stream"]
)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_argument_that_belongs_elsewhere_is_told_where(name, call):
    value, cure = ELSEWHERE[name]
    with pytest.raises(ValueError, match=f"no such argument: .*{cure}"):
        call(llama(), PROMPTS, max_new_tokens=3, **{name: value})


def test_every_argument_that_belongs_elsewhere_is_told_at_once():
    with pytest.raises(ValueError, match=r"temperature=0.8: .*; max_lenght=3: .*"):
        specdec.generate(llama(), PROMPTS, temperature=0.8, max_lenght=3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"custom_generate has no argument 'temperature'.*model.generate\(..., temperature"
    ):
        specdec.custom_generate(temperature=0.8)  # type: ignore[arg-type]


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
    "class of a processor": (lambda: Sampling(processors=[LogitsProcessor]), r"instance, LogitsProcessor\("),
    "config that is none": (lambda: Sampling(generation_config=5), "pass a transformers GenerationConfig"),  # type: ignore[arg-type]
    "greedy top_k": (lambda: Sampling(top_k=5), "top_k=5 at temperature=0.*temperature=1.0 to sample"),
    "greedy top_p": (lambda: Sampling(0.0, top_p=0.5), "top_p=0.5 at temperature=0"),
    "greedy min_p": (lambda: Sampling(0.0, min_p=0.1), "min_p=0.1 at temperature=0"),
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
    [({"num_beams": 3}, "beam search"), ({"max_time": 1.0}, "no time limit"), ({"stop_strings": ["x"]}, "stop strings")],
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
    with pytest.raises(ValueError, match="target is a Linear; pass a transformers model, as from AutoModelForCausalLM"):
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


def unlikely(tree):
    tree.draft_probs[0, 1, tree.tokens[0, 2]] = 0
    return tree


def with_token(tree, token, node=2):
    tokens = tree.tokens.clone()
    tokens[0, node] = token
    return replace(tree, tokens=tokens)


MODEL = ModelDrafter(llama(1), Chain(3))
TREES = {
    "no laws": (lambda t: DraftTree(t.tokens, t.topology, t.laws), "draft_probs must be there"),
    "other root": (lambda t: replace(t, tokens=(t.tokens + 1) % VOCAB), r"text\(s\) \[0, 1, 2, 3\].*node 0"),
    "impossible token": (unlikely, r"text\(s\) \[0\].*positive at the drawn tokens"),
    "negative token": (lambda t: with_token(t, -1), r"text\(s\) \[0\].*below batch.vocab"),
    "token past the vocabulary": (lambda t: with_token(t, VOCAB), r"text\(s\) \[0\].*below batch.vocab"),
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
        specdec.generate(llama(), PROMPTS, Edited(MODEL, edit), sampling=Sampling(1.0), max_new_tokens=8)


RULES = [SiblingRejection(), BlockVerification(), TraversalVerification(), LevelVerification(), TypicalAcceptance()]


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafted_tokens_outside_the_vocabulary_are_told_before_they_are_looked_up(token, rule, temperature):
    points = Edited(ModelDrafter(llama(1), Static([-1, 0, 1])), lambda tree: with_token(tree, token, 1))
    for target in (llama(), TabularTarget(VOCAB)):
        with pytest.raises(ValueError, match=r"text\(s\) \[0\].*below batch.vocab"):
            sampling, prompt = Sampling(temperature), PROMPTS[0]
            specdec.generate(target, prompt, points, rule=rule, sampling=sampling, max_new_tokens=8, trace="laws")


def test_absent_nodes_may_hold_any_token():
    def absent(tree):
        return replace(with_token(tree, -1, 3), laws=torch.tensor([[0, 0, 0, Law.PADDING]], dtype=torch.uint8))

    expected = specdec.generate(llama(), PROMPTS[0], max_new_tokens=3).tokens[0]
    out = specdec.generate(
        llama(), PROMPTS[0], Edited(MODEL, lambda t: absent(t) if t.tokens.shape[1] == 4 else t), max_new_tokens=8
    )
    assert torch.equal(out.tokens[0][:3], expected)


STOPS = [10, (10,), {10}, range(10, 11), torch.tensor(10), torch.tensor([10]), np.array([10]), np.int32(10), iter([10])]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: f"{type(stop).__name__} {getattr(stop, 'shape', '')}")
def test_stop_tokens_are_integers_in_any_container(stop):
    text = specdec.generate(llama(), PROMPTS[0], max_new_tokens=12, stop_tokens=()).tokens[0].tolist()
    assert 10 in text[:-1]
    out = specdec.generate(llama(), PROMPTS[0], max_new_tokens=12, stop_tokens=stop)
    assert out.tokens[0].tolist() == text[: text.index(10) + 1]


def test_runs_over_another_batch():
    class Stale(NgramDrafter):
        def start(self, target, batch, last=None):
            return last or super().start(target, batch)

    model, drafter = llama(), Stale()
    last = specdec.generate(model, PROMPTS, drafter, max_new_tokens=2, keep=True)
    with pytest.raises(ValueError, match=r"what Stale.start returned is a run over another batch; return `last` only"):
        specdec.generate(model, PROMPTS, drafter, max_new_tokens=8, resume=last)


def test_trees_that_are_larger_than_promised():
    class Modest(ModelDrafter):
        def spec(self, sampling):
            return Chain(2).spec(sampling)

        def start(self, target, batch, last=None):
            run = super().start(target, batch)
            run.propose = lambda coins: DraftTree(
                batch.root[:, None].expand(-1, 4), batch.chain(4), torch.zeros(len(batch), 4, dtype=torch.uint8)
            )
            return run

    drafter = Modest(llama(1), Chain(3))
    with pytest.raises(ValueError, match=r"nodes 4, at most 3.*depth 3, at most 2"):
        specdec.generate(llama(), PROMPTS, drafter, max_new_tokens=8)


class Says(Rule):
    """Returns a fixed answer."""

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


def test_certificates_of_rules_that_do_not_claim_one():
    with pytest.raises(AssertionError, match="Says does not claim to be lossless"):
        assert_lossless(Says(Decision([0], 1)))


class Uniform(Target):
    vocab = 4

    def start(self, batch, states=(), last=None):
        return UniformRun(self, batch)


class UniformRun(TargetRun):
    def score(self, tree):
        return Scores(torch.zeros(*tree.tokens.shape, 4))


class Short(Uniform):
    def start(self, batch, states=(), last=None):
        return ShortRun(self, batch)


class ShortRun(UniformRun):
    def score(self, tree):
        return Scores(super().score(tree).logits[..., :3])


def test_targets():
    assert len(specdec.generate(Uniform(), torch.tensor([1]), sampling=Sampling(1.0), max_new_tokens=5).tokens[0]) == 5
    with pytest.raises(ValueError, match=r"not \[batch, node, vocab\] = \[1, 1, 4\]"):
        specdec.generate(Short(), torch.tensor([1]), max_new_tokens=5)


class Begins(NgramDrafter):
    def start(self, target, batch, last=None):
        return batch


def test_what_begins_no_run():
    with pytest.raises(ValueError, match=r"what Begins.start returned is a Batch; pass a specdec DraftRun"):
        specdec.generate(llama(), PROMPTS, Begins(), max_new_tokens=8)
