"""Runs that begin in the caches of the last one: the same text, and only what is new is read."""

from functools import partial

import pytest
import torch
from captured import DRAFT, DRAFTERS, SAMPLINGS
from test_vocabulary import Foreign, permuted, words
from tiny_models import GATE, llama

import specdec
from specdec import ModelTarget
from specdec.drafters import ModelDrafter
from specdec.models.cache import TreeCache
from specdec.models.target import CachedModel
from specdec.testing import Tape
from specdec.trees import Chain

torch.set_num_threads(1)
OPTIONS = {"max_new_tokens": 8, "stop_tokens": (7,), "seed": 3}
PROMPTS = [torch.arange(1, 6), torch.tensor([9]), torch.arange(30, 42)]
SAID = [torch.tensor([11, 12, 13]), torch.tensor([14]), torch.arange(20, 27)]
TURNS = {  # what is asked after a text
    "goes on": lambda text, said: torch.cat([text, said]),
    "parts in the middle": lambda text, said: torch.cat([text[: len(text) // 2], said, text[len(text) // 2 :]]),
    "is cut short": lambda text, said: text[: 1 + len(text) // 3],
    "goes on for longer": lambda text, said: torch.cat([text, said, said]),
}
KINDS = (
    "none",
    "sampled, then top",
    "dynamic",
    "layers left out",
    "heads",
    "n-grams",
    "suffixes",
    "suffixes, then a model",
)
small = partial(llama, num_hidden_layers=2)


def run(target, prompts, drafter=None, **options):
    return specdec.generate(target, prompts, drafter, **{**OPTIONS, **options}).tokens


def assert_resumes(target, drafter, fresh, prompts=PROMPTS, **options):
    """The text is that of a run which begins anew, with a drafter that is `fresh`; returns the whole texts."""
    found = run(target, prompts, drafter, resume=True, **options)
    expected = run(target.model, prompts, fresh, **{**options, "engine": "eager"})
    assert [t.tolist() for t in found] == [t.tolist() for t in expected]
    return [torch.cat(parts) for parts in zip(prompts, found, strict=True)]


def assert_conversation(model, drafter, **options):
    """Turn after turn, all resumed. drafter: makes one."""
    target, kept = ModelTarget(model), drafter()
    texts = assert_resumes(target, kept, drafter(), **options)
    for turn in TURNS.values():
        texts = assert_resumes(target, kept, drafter(), list(map(turn, texts, SAID)), **options)


GREEDY = [(name, "greedy") for name in ("heads", "suffixes, then a model")]


@pytest.mark.parametrize(("name", "sampling"), [*((name, "nucleus") for name in KINDS), *GREEDY])
def test_text_is_that_of_a_run_that_begins_anew(name, sampling):
    assert_conversation(small(), lambda: DRAFTERS[name](DRAFT), sampling=SAMPLINGS[sampling])


@pytest.mark.parametrize("name", ["layers left out", "heads"])
def test_models_with_sliding_windows_resume(name):
    assert_conversation(GATE["gemma3_sliding"](torch.float64), lambda: DRAFTERS[name](DRAFT))


def test_the_demo_pair_resumes():
    pair = specdec.demo.load()
    target, drafter = ModelTarget(pair.target), ModelDrafter(pair.draft)
    prompts = [pair.tokenizer(p.text, return_tensors="pt").input_ids[0] for p in pair.prompts[:3]]
    texts = assert_resumes(target, drafter, ModelDrafter(pair.draft), prompts)
    assert_resumes(target, drafter, ModelDrafter(pair.draft), [torch.cat([text, prompts[0]]) for text in texts])


@pytest.mark.parametrize("name", ["chain", "heads"])
def test_graphs_resume(name, monkeypatch):
    monkeypatch.setattr(specdec.engines.graphs, "_BLOCK", 16)  # most turns grow into another block, some do not
    assert_conversation(small(), lambda: DRAFTERS[name](DRAFT), engine=specdec.Graphs(capture=Tape))


@pytest.fixture
def read(monkeypatch):
    """(model, tokens per row) of every forward pass."""
    passes, forward = [], CachedModel.forward

    def noting(self, tokens, *args, **kwargs):
        passes.append((self.model, tokens.shape[1]))
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(CachedModel, "forward", noting)
    return passes


# A draft may have to read more: an accepted leaf, which was drawn but never read, and what another drafter drafted.
MISSED = {name: OPTIONS["max_new_tokens"] if name == "suffixes, then a model" else 1 for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_a_later_turn_reads_only_what_is_new(name, read):
    target, drafter = ModelTarget(small()), DRAFTERS[name](DRAFT)
    texts = map(torch.cat, zip(PROMPTS, run(target, PROMPTS, drafter, stop_tokens=()), strict=True))
    later = [torch.cat([text, said]) for text, said in zip(texts, SAID, strict=True)]
    for resume, due in ((True, max(map(len, SAID))), (False, max(map(len, later)) - 1)):
        read.clear()
        next(specdec.stream(target, later, drafter, max_new_tokens=1, resume=resume))  # 1: nothing is drafted
        *prefill, (_, scored) = read
        assert scored == 1
        for model in (target.model, DRAFT):
            counts = [count for of, count in prefill if of is model]
            assert not counts or due <= sum(counts) <= due + MISSED[name], name


def test_a_draft_with_another_tokenizer_reads_only_what_is_new(read):
    names = [f"w{i}" for i in range(50)]
    target = ModelTarget(small())
    drafter = Foreign(permuted(target.model, [*range(49, -1, -1)]), Chain(3), words(*names), words(*names[::-1]))
    [answer] = run(target, PROMPTS[:1], drafter, stop_tokens=())
    read.clear()
    run(target, [torch.cat([PROMPTS[0], answer, SAID[0]])], drafter, max_new_tokens=1, resume=True)
    assert sum(count for model, count in read if model is drafter.model) in (len(SAID[0]), len(SAID[0]) + 1)


@pytest.mark.parametrize("name", ["chain", "heads"])
def test_streams_that_are_left_half_way_can_be_resumed(name):
    target, drafter = ModelTarget(small()), DRAFTERS[name](DRAFT)
    for steps in range(4):
        stream, texts = specdec.stream(target, PROMPTS, drafter, resume=True, **OPTIONS), PROMPTS
        for _ in range(steps):
            texts = [torch.cat(parts) for parts in zip(texts, next(stream), strict=True)]
        stream.close()
        assert_resumes(target, drafter, DRAFTERS[name](DRAFT), [torch.cat(p) for p in zip(texts, SAID, strict=True)])


@pytest.mark.parametrize("failing", ["target", "draft"])
def test_runs_that_failed_in_any_pass_can_be_resumed(failing, monkeypatch):
    models = {"target": small(), "draft": small(1)}
    target, drafter = ModelTarget(models["target"]), ModelDrafter(models["draft"])
    texts = [torch.cat(parts) for parts in zip(PROMPTS, run(target, PROMPTS, drafter), strict=True)]
    layer = models[failing].model.layers[1]
    for last in (0, 1, 2, 5):  # the first passes are those of the prompts
        passes, forward = [], layer.forward

        def fail(*args, passes=passes, forward=forward, last=last, **kwargs):
            passes.append(1)
            if len(passes) > last:
                raise torch.OutOfMemoryError("out of memory")
            return forward(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(layer, "forward", fail)
            run(target, [torch.cat(p) for p in zip(texts, SAID, strict=True)], drafter, resume=True)
        assert_resumes(target, drafter, ModelDrafter(models["draft"]), texts)


@pytest.mark.parametrize("grown", [False, True])
def test_a_failure_half_way_to_the_next_run_leaves_nothing_to_resume(grown, monkeypatch):
    target = ModelTarget(small())

    def fail(self, other, kept):
        for stack in self._stacks.values():
            stack.zero_()
        raise torch.OutOfMemoryError("out of memory")

    run(target, PROMPTS)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(TreeCache, "take_over", fail)
        run(target, PROMPTS, resume=True, max_new_tokens=OPTIONS["max_new_tokens"] + 4 * grown)
    assert_resumes(target, None, None)


@pytest.mark.parametrize("order", [1, -1])
def test_rows_with_little_to_read_stay_in_their_slots(order):
    target, long = ModelTarget(small()), torch.arange(40)
    run(target, [long, long[:5]][::order])
    assert_resumes(target, None, None, [long, torch.cat([long[:5], long])[:40]][::order])


@pytest.mark.parametrize("grown", [False, True])
def test_what_lies_behind_the_kept_tokens_is_never_seen(grown):
    target = ModelTarget(small())
    run(target, PROMPTS)
    cache = target.cached.cache
    with torch.inference_mode():
        for stack in cache._stacks.values():
            for row, length in enumerate(cache.lengths.tolist()):
                stack[:, row, length:] = torch.nan
    assert_resumes(target, None, None, max_new_tokens=OPTIONS["max_new_tokens"] + 4 * grown)


def test_the_drafter_may_change_between_turns():
    target, texts = ModelTarget(small()), PROMPTS
    for name in ("heads", "layers left out", "none", "heads"):
        texts = assert_resumes(target, *(DRAFTERS[name](DRAFT) for _ in range(2)), texts)


def test_the_target_of_a_drafter_that_uses_states_serves_others():
    target = ModelTarget(small())
    for name in ("heads", "none", "heads", "chain"):  # the chain is drafted by the target's own model
        fresh = run(target.model, PROMPTS, DRAFTERS[name](DRAFT))
        assert all(map(torch.equal, run(target, PROMPTS, DRAFTERS[name](target.model)), fresh))


def test_other_batches_begin_anew():
    target, drafter = ModelTarget(small()), ModelDrafter(DRAFT)
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[:2], PROMPTS[1:], PROMPTS):
        assert_resumes(target, drafter, ModelDrafter(DRAFT), prompts)


@pytest.mark.parametrize("change", ["trained", "loaded", "moved"])
def test_weights_that_have_changed_begin_anew(change):
    models = small(), small(1)
    target, drafter = ModelTarget(models[0]), ModelDrafter(models[1])
    run(target, PROMPTS, drafter)
    for model, other in zip(models, (small(5), small(6)), strict=True):
        if change == "trained":
            model.requires_grad_().zero_grad()
            model(PROMPTS[0][None], labels=PROMPTS[0][None]).loss.backward()
            torch.optim.SGD(model.parameters(), 10.0).step()
        elif change == "loaded":
            model.load_state_dict(other.state_dict())
        else:
            for mine, its in zip(model.parameters(), other.parameters(), strict=True):
                mine.data = its.data
    assert_resumes(target, drafter, ModelDrafter(models[1]))


def test_inference_tensors_whose_writing_nobody_counts_begin_anew():
    with torch.inference_mode():
        model = small()
    assert all(p.is_inference() for p in model.parameters())
    target = ModelTarget(model)
    run(target, PROMPTS)
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(-1.5)
    assert_resumes(target, None, None)


def test_a_model_by_itself_keeps_nothing_to_resume():
    with pytest.raises(ValueError, match=r"resume=True with a LlamaForCausalLM.*specdec\.ModelTarget\(model\)"):
        specdec.generate(small(), PROMPTS, resume=True)
