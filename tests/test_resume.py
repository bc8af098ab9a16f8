"""Runs that go on in the caches of an earlier generation: the same text, and only what is new is read."""

import gc
from functools import partial

import pytest
import torch
from captured import DRAFT, DRAFTERS, SAMPLINGS, collecting_nothing
from test_vocabulary import Foreign, permuted, words
from tiny_models import GATE, llama

import specdec
from specdec import ModelTarget
from specdec.arguments import as_engine
from specdec.drafters import ModelDrafter
from specdec.drafters.model import ModelDraftRun
from specdec.models.cache import TreeCache
from specdec.models.cached_model import CachedModel
from specdec.models.target import ModelTargetRun, Scores
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


def begin(model, drafter=None, prompts=PROMPTS, **options):
    """A generation that can be resumed."""
    return specdec.generate(model, prompts, drafter, keep=True, **{**OPTIONS, **options})


def assert_resumes(last, model, drafter=None, prompts=PROMPTS, **options):
    """The text is that of a run that begins anew; returns the generation."""
    found = begin(model, drafter, prompts, resume=last, **options)
    expected = specdec.generate(model, prompts, drafter, **{**OPTIONS, **options, "engine": "eager"})
    assert [t.tolist() for t in found.tokens] == [t.tolist() for t in expected.tokens]
    return found


def whole(prompts, generation):
    """Prompts and what followed them."""
    return [torch.cat(parts) for parts in zip(prompts, generation.tokens, strict=True)]


def asked(texts):
    """Texts, and what is said after them."""
    return [torch.cat(parts) for parts in zip(texts, SAID, strict=True)]


def assert_conversation(model, drafter, **options):
    """Turn after turn, each resumes the one before."""
    last = begin(model, drafter, **options)
    texts = whole(PROMPTS, last)
    for turn in TURNS.values():
        prompts = list(map(turn, texts, SAID))
        last = assert_resumes(last, model, drafter, prompts, **options)
        texts = whole(prompts, last)


GREEDY = [(name, "greedy") for name in ("heads", "suffixes, then a model")]


@pytest.mark.parametrize(("name", "sampling"), [*((name, "nucleus") for name in KINDS), *GREEDY])
def test_text_is_that_of_a_run_that_begins_anew(name, sampling):
    assert_conversation(small(), DRAFTERS[name](DRAFT), sampling=SAMPLINGS[sampling])


@pytest.mark.parametrize("name", ["layers left out", "heads"])
def test_models_with_sliding_windows_resume(name):
    assert_conversation(GATE["gemma3_sliding"](torch.float64), DRAFTERS[name](DRAFT))


def test_the_demo_pair_resumes():
    pair = specdec.demo.load()
    drafter = ModelDrafter(pair.draft)
    prompts = [pair.tokenizer(p.text, return_tensors="pt").input_ids[0] for p in pair.prompts[:3]]
    last = begin(pair.target, drafter, prompts)
    assert_resumes(last, pair.target, drafter, [torch.cat([text, prompts[0]]) for text in whole(prompts, last)])


@pytest.mark.parametrize("name", ["chain", "heads"])
def test_graphs_resume(name, monkeypatch):
    monkeypatch.setattr(specdec.engines.graphs, "_BLOCK", 16)  # most turns grow into another block, some do not
    assert_conversation(small(), DRAFTERS[name](DRAFT), engine=specdec.Graphs(capture=Tape))


@pytest.fixture
def read(monkeypatch):
    """(model, tokens per row) of every forward pass."""
    passes, forward = [], CachedModel.forward

    def noting(self, tokens, *args, **kwargs):
        passes.append((self.lm.model, tokens.shape[1]))
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(CachedModel, "forward", noting)
    return passes


# A draft may have to read more: an accepted leaf, which was drawn but never read, and what another drafter drafted.
MISSED = {name: OPTIONS["max_new_tokens"] if name == "suffixes, then a model" else 1 for name in KINDS}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_later_turn_reads_only_what_is_new(name, wrapped, read):
    model, drafter = small(), DRAFTERS[name](DRAFT)
    target = ModelTarget(model) if wrapped else model
    last = begin(target, drafter, stop_tokens=())
    later = asked(whole(PROMPTS, last))
    for resume, due in ((last, max(map(len, SAID))), (None, max(map(len, later)) - 1)):
        read.clear()
        next(specdec.stream(target, later, drafter, max_new_tokens=1, resume=resume))  # 1: nothing is drafted
        *prefill, (_, scored) = read
        assert scored == 1
        for of in (model, DRAFT):
            counts = [count for which, count in prefill if which is of]
            assert not counts or due <= sum(counts) <= due + MISSED[name], name


def test_a_draft_with_another_tokenizer_reads_only_what_is_new(read):
    names, model = [f"w{i}" for i in range(50)], small()
    drafter = Foreign(permuted(model, [*range(49, -1, -1)]), Chain(3), words(*names), words(*names[::-1]))
    last = begin(model, drafter, PROMPTS[:1], stop_tokens=())
    read.clear()
    later = [torch.cat([*whole(PROMPTS[:1], last), SAID[0]])]
    begin(model, drafter, later, max_new_tokens=1, resume=last)
    assert sum(count for of, count in read if of is drafter.model) in (len(SAID[0]), len(SAID[0]) + 1)


@pytest.mark.parametrize("name", ["chain", "heads"])
def test_streams_that_are_left_half_way_can_be_resumed(name):
    model, drafter, last = small(), DRAFTERS[name](DRAFT), None
    for steps in range(1, 4):
        stream, texts = specdec.stream(model, PROMPTS, drafter, keep=True, resume=last, **OPTIONS), PROMPTS
        for _ in range(steps):
            texts = [torch.cat(parts) for parts in zip(texts, next(stream), strict=True)]
        stream.close()
        assert all(map(torch.equal, whole(PROMPTS, stream.generation), texts))
        last = assert_resumes(stream.generation, model, drafter, asked(texts))


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_stream_keeps_its_text_when_others_go_on_in_what_it_owned(engine):
    model, engine = small(), as_engine(engine)
    for kept in (False, True):
        stream = specdec.stream(model, PROMPTS, keep=kept, engine=engine, **OPTIONS)
        texts = [torch.cat(parts) for parts in zip(*stream, strict=True)]
        last = stream.generation if kept else None
        specdec.generate(model, [text.flip(0) for text in PROMPTS], resume=last, engine=engine, **OPTIONS)
        assert all(map(torch.equal, stream.generation.tokens, texts))


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("name", ["chain", "heads", "none"])
def test_what_is_in_use_elsewhere_gives_the_same_text(name, engine):
    model, drafter, graphs = small(), DRAFTERS[name](DRAFT), specdec.Graphs(capture=Tape)
    options = {"engine": graphs if engine == "graph" else engine}
    last = begin(model, drafter, **options)
    later = asked(whole(PROMPTS, last))
    stream, found = specdec.stream(model, later, drafter, keep=True, resume=last, **{**OPTIONS, **options}), later
    for news in stream:
        found = [torch.cat(parts) for parts in zip(found, news, strict=True)]
        assert_resumes(last, model, drafter, later, **options)
        assert_resumes(stream.generation, model, drafter, found, **options)
    assert all(map(torch.equal, found, whole(later, specdec.generate(model, later, drafter, **OPTIONS))))


@pytest.mark.parametrize("grown", [0, 30])
@pytest.mark.parametrize("name", KINDS)
def test_a_generation_can_be_resumed_again(name, grown):
    model, drafter = small(), DRAFTERS[name](DRAFT)
    last = begin(model, drafter)
    later = asked(whole(PROMPTS, last))
    others = [text.flip(0) for text in later]
    for prompts in (later, others, later, PROMPTS):
        assert_resumes(last, model, drafter, prompts, max_new_tokens=OPTIONS["max_new_tokens"] + grown)


@pytest.mark.parametrize("failing", ["target", "draft"])
def test_runs_that_failed_in_any_pass_can_be_resumed(failing, monkeypatch):
    models = {"target": small(), "draft": small(1)}
    model, drafter = models["target"], ModelDrafter(models["draft"])
    last = begin(model, drafter)
    texts = whole(PROMPTS, last)
    layer = models[failing].model.layers[1]
    for end in (0, 1, 2, 5):  # the first passes are those of the prompts
        passes, forward = [], layer.forward

        def fail(*args, passes=passes, forward=forward, end=end, **kwargs):
            passes.append(1)
            if len(passes) > end:
                raise torch.OutOfMemoryError("out of memory")
            return forward(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(layer, "forward", fail)
            begin(model, drafter, asked(texts), resume=last)
        assert_resumes(last, model, drafter, texts)


@pytest.mark.parametrize("end", [1, 2])
def test_what_a_failing_step_has_read_is_read_again(end, monkeypatch):
    model = small()
    drafter, commit, steps = ModelDrafter(model), ModelDraftRun.commit, []

    def fail(self, outcome):  # the target and the draft have read the tokens of this step, and nobody noted them
        commit(self, outcome)
        steps.append(outcome)
        if len(steps) == end:
            raise KeyboardInterrupt

    stream, texts = specdec.stream(model, PROMPTS, drafter, keep=True, **OPTIONS), PROMPTS
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ModelDraftRun, "commit", fail)
        for news in stream:
            texts = [torch.cat(parts) for parts in zip(texts, news, strict=True)]
    assert_resumes(stream.generation, model, drafter, [torch.cat([text, text.new_zeros(5)]) for text in texts])


@pytest.mark.parametrize("grown", [False, True])
def test_a_failure_half_way_to_the_next_run_leaves_nothing_to_resume(grown, monkeypatch):
    model = small()

    def fail(self, sources):
        for stack in self._stacks.values():
            stack.zero_()
        raise torch.OutOfMemoryError("out of memory")

    last = begin(model)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(TreeCache, "take", fail)
        begin(model, resume=last, max_new_tokens=OPTIONS["max_new_tokens"] + 4 * grown)
    assert_resumes(last, model)


@pytest.mark.parametrize("order", [1, -1])
def test_rows_with_little_to_read_stay_in_their_slots(order):
    model, long = small(), torch.arange(40)
    last = begin(model, None, [long, long[:5]][::order])
    assert_resumes(last, model, None, [long, torch.cat([long[:5], long])[:40]][::order])


@pytest.mark.parametrize("grown", [False, True])
def test_what_lies_behind_the_kept_tokens_is_never_seen(grown):
    model = small()
    last = begin(model)
    cache = last.runs.target.cached.cache
    with torch.inference_mode():
        for stack in cache._stacks.values():
            for row, length in enumerate(cache.lengths.tolist()):
                stack[:, row, length:] = torch.nan
    assert_resumes(last, model, max_new_tokens=OPTIONS["max_new_tokens"] + 4 * grown)


def test_the_drafter_may_change_between_turns():
    model, last, texts = small(), None, PROMPTS
    for name in ("heads", "layers left out", "none", "heads"):
        last = assert_resumes(last, model, DRAFTERS[name](DRAFT), texts)
        texts = whole(texts, last)


def test_a_drafter_that_uses_states_resumes_a_run_without_them():
    model, last = small(), None
    for name in ("heads", "none", "heads", "chain"):  # the chain is drafted by the target's own model
        last = assert_resumes(last, model, DRAFTERS[name](model))


def test_other_batches_begin_anew():
    model, drafter, last = small(), ModelDrafter(DRAFT), None
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[:2], PROMPTS[1:], PROMPTS):
        last = assert_resumes(last, model, drafter, prompts)


def test_other_models_begin_anew():
    last = begin(small(), ModelDrafter(DRAFT))
    for model in (small(1), llama(2, num_hidden_layers=3)):
        assert_resumes(last, model, ModelDrafter(model))


class Biased(ModelTarget):
    """Likes one token better than its model does."""

    def start(self, batch, states=(), last=None):
        run = super().start(batch, states, last)
        return run if isinstance(run, BiasedRun) else BiasedRun(self, batch, run.cached)


class BiasedRun(ModelTargetRun):
    def score(self, tree):
        scores = super().score(tree)
        return Scores(scores.logits + 10 * (torch.arange(self.batch.vocab) == 3), scores.states)


@pytest.mark.filterwarnings("ignore:engine")  # what cannot be captured
@pytest.mark.parametrize("engine", ["eager", "graph", "tape"])
def test_another_target_of_the_same_model_begins_anew(engine):
    model, engine = small(), specdec.Graphs(capture=Tape) if engine == "tape" else as_engine(engine)
    targets, options = [Biased(model), model, Biased(model), ModelTarget(model)], {**OPTIONS, "max_new_tokens": 12}
    expected = [specdec.generate(target, PROMPTS, **options).tokens for target in targets]
    assert not all(map(torch.equal, *expected[:2]))
    last = None
    for resumes in (False, True):
        for target, tokens in zip(targets, expected, strict=True):
            out = specdec.generate(target, PROMPTS, engine=engine, keep=resumes, resume=last, **options)
            assert all(map(torch.equal, out.tokens, tokens))
            last = out if resumes else None


@pytest.mark.parametrize("change", ["trained", "loaded", "moved"])
def test_weights_that_have_changed_begin_anew(change):
    models = small(), small(1)
    drafter = ModelDrafter(models[1])
    last = begin(models[0], drafter)
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
    assert_resumes(last, models[0], drafter)


def test_inference_tensors_whose_writing_nobody_counts_begin_anew():
    with torch.inference_mode():
        model = small()
    assert all(p.is_inference() for p in model.parameters())
    last = begin(model)
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(-1.5)
    assert_resumes(last, model)


REFUSED = {
    "True": (lambda: True, "resume is a bool; pass the generation to go on from, which was made with keep=True"),
    "tokens": (lambda: begin(small()).tokens, "resume is a list; pass the generation to go on from"),
    "nothing kept": (
        lambda: specdec.generate(small(), PROMPTS, max_new_tokens=2),
        r"a generation that has kept nothing \(or was read from a finished journal\); generate it with keep=True",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resumed_is_refused(case):
    resume, cure = REFUSED[case]
    with pytest.raises(ValueError, match=cure):
        specdec.generate(small(), PROMPTS, resume=resume())


def test_a_stream_that_has_not_begun_has_nothing_to_resume():
    with pytest.raises(ValueError, match=r"the stream has not begun; .* next\(stream\)"):
        _ = specdec.stream(small(), PROMPTS, keep=True).generation


def test_an_engine_does_not_collect_what_turns_leave_that_go_on_from_one_generation(caches, monkeypatch):
    monkeypatch.setattr(specdec.engines.graphs, "_BLOCK", 16)
    model, engine = small(), specdec.Graphs()
    last = begin(model, engine=engine)
    for seed in range(4):  # in larger caches than the first
        specdec.generate(model, PROMPTS, resume=last, engine=engine, max_new_tokens=40, seed=seed)
    gc.collect()
    assert [cache() is not None for cache in caches] == [True, *[False] * 4]


@pytest.mark.parametrize("keep", [False, True])
def test_a_generation_holds_its_caches_only_if_it_was_asked_to(keep, caches):
    model, drafter = small(), ModelDrafter(DRAFT)
    with collecting_nothing():
        out = specdec.generate(model, PROMPTS, drafter, keep=keep, **OPTIONS)
        assert len(caches) == 2 and all((cache() is not None) == keep for cache in caches)
        del out
        assert all(cache() is None for cache in caches)


def test_a_stream_that_is_dropped_half_way_lets_go_of_its_caches(caches):
    model, engine = small(), specdec.Graphs()
    with collecting_nothing():
        stream = specdec.stream(model, PROMPTS, ModelDrafter(DRAFT), **OPTIONS)
        next(stream)
        del stream
        assert all(cache() is None for cache in caches)
        for _ in range(3):
            next(specdec.stream(model, PROMPTS, engine=engine, **OPTIONS))
    assert [cache() is not None for cache in caches] == [False, False, True]  # the last runs had the same one
