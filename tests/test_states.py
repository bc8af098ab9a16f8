"""Drafters are told the target's states of all that is before each root: those of a forward pass without specdec."""

import pytest
import torch
from tiny_models import GATE, MATRIX, llama

import specdec
from specdec import DraftTree, Law, Sampling, TreeSpec
from specdec.drafters import Drafter, DraftRun, Fallback
from specdec.engines.base import Engine
from specdec.models import cached_model
from specdec.testing import Tape
from specdec.tree import Topology

torch.set_num_threads(1)
NEAR = 1e-12  # of the largest state of a text: float64 rounds so in batches of other shapes
VOCAB, DEPTH, WIDTH = 6, 3, 4  # so few tokens that most of them are children of a root
NAMES = "llama", "gemma3_sliding", "gpt2", "opt"
MODELS = {name: {**GATE, **MATRIX}[name](torch.float64, vocab_size=VOCAB) for name in NAMES}
ENGINES = {"eager": Engine, "graph": specdec.Graphs, "tape": lambda: specdec.Graphs(capture=Tape)}
PROMPTS = [torch.tensor([3, 4] * 6), torch.tensor([1]), torch.tensor([5, 2, 0]), torch.arange(10) % VOCAB]
SAID = [torch.tensor([3]), torch.tensor([4, 5, 1]), torch.arange(8) % VOCAB, torch.tensor([2, 2])]
OPTIONS = {"sampling": Sampling(1.0), "max_new_tokens": 14, "stop_tokens": (5,)}


class Listening(Drafter):
    """Drafts the tokens that are next in number, and keeps what it is told of the target's states.

    Args:
        states: that it asks for.
        capturable: whether its steps may be captured; if not, its trees change their depth from step to step.
        knows: whether it goes on from the states that an earlier turn was told.
        every: it drafts after roots that are multiples of this.
    """

    def __init__(self, states=(0, 2, -1), capturable=True, knows=True, every=1):
        self.states, self.capturable, self.knows, self.every = states, capturable, knows, every
        self.runs = []  # for the test to look at

    def spec(self, sampling):
        return TreeSpec(frozenset({Law.POINT}), 1 + DEPTH * WIDTH, DEPTH, WIDTH, by_depth=True)

    def start(self, target, batch, last=None):
        same = last is not None and last.batch is batch
        self.runs.append(last if same else ListeningRun(self, target, batch))
        self.runs[-1].begin(last if batch.resume else None)
        return self.runs[-1]


class ListeningRun(DraftRun):
    def __init__(self, drafter, target, batch):
        super().__init__(drafter, batch)
        hidden = target.cached.lm.model.config.hidden_size
        shape = len(batch), batch.capacity + 1, len(drafter.states), hidden
        self.found = torch.full(
            shape, torch.nan, dtype=torch.float64
        )  # by position; behind all of them what is garbage
        self.ends, self.gaps = torch.zeros((2, len(batch)), dtype=torch.int64)  # what follows the last; places left out
        self.places = torch.arange(WIDTH)
        self.rows = torch.arange(len(batch))[:, None]
        self.parents = torch.tensor([-1, *[0] * WIDTH, *range(1, 1 + (DEPTH - 1) * WIDTH)]).expand(len(batch), -1)
        self.steps = 0

    def begin(self, last):
        """Keep of the states of an earlier turn what is before the first difference of the texts."""
        known = [0] * len(self.batch)
        if last is not None and self.drafter.knows:
            known = [min(alike(*row)) for row in zip(last.texts, self.batch.texts, last.ends.tolist(), strict=True)]
        for row, count in enumerate(known):
            if last is not None:
                self.found[row, :count] = last.found[row, :count].clone()
            self.found[row, count:] = torch.nan
        self.known, self.texts = known, self.batch.records
        self.told, self.chunks, self.prompts_read = [0] * len(self.batch), [], False
        self.ends.copy_(torch.tensor(known))
        self.gaps.zero_()

    def states_known(self, rows):
        return {row: self.known[row] for row in rows}

    def enter(self, rows):
        self.prompts_read = True

    def read(self, states, start, count):
        if not self.prompts_read:
            self.chunks.append(states.shape[1])
            self.told = [told + new for told, new in zip(self.told, count.tolist(), strict=True)]
        place = torch.arange(states.shape[1], device=states.device)
        index = torch.where(place < count[:, None], start[:, None] + place, self.found.shape[1] - 1)
        self.found[self.rows, index] = states
        self.gaps += (start > self.ends) & (count > 0)
        self.ends.copy_(torch.where(count > 0, start + count, self.ends))

    def propose(self, coins):
        self.steps += 1
        depth = DEPTH if self.batch.static else min(self.batch.max_depth, 1 + self.steps % DEPTH)
        if depth == 0:
            return self.batch.undrafted()
        root = self.batch.root[:, None]
        children = (root + 1 + self.places) % VOCAB
        tokens = torch.cat([root, *((children + i) % VOCAB for i in range(depth))], 1)
        drafts = (root % self.drafter.every == 0) | (torch.arange(tokens.shape[1]) == 0)
        laws = torch.where(drafts, int(Law.POINT), int(Law.PADDING)).to(torch.uint8)
        return DraftTree(tokens, Topology(self.parents[:, : tokens.shape[1]], depth, WIDTH), laws)


def alike(old, new, end):
    """How far two texts agree, and where states of the first one end."""
    count = min(len(old), len(new))
    differ = (old[:count] != new[:count]).nonzero()[0]
    return (int(differ[0]) if len(differ) else count), end, len(new)


def states_of(model, text, which):
    """[position, state, hidden] of a text [position] int64, without specdec."""
    with torch.inference_mode():
        states = model(text[None], output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([states[i][0] for i in which], 1)


def assert_told(model, run, texts):
    """A run has been told the states of these texts, but for the last tokens, which nobody has read."""
    assert run.ends.tolist() == [len(text) - 1 for text in texts] and not run.gaps.any()
    for text, found in zip(texts, run.found, strict=True):
        expected = states_of(model, text, run.drafter.states)[:-1]
        assert expected.numel() == 0 or (found[: len(expected)] - expected).abs().max() <= NEAR * expected.abs().max()


def turn(model, prompts, drafter, listeners=None, **options):
    """A run whose listeners are asked after every step; returns what it has generated, and whole texts."""
    texts, stream = prompts, specdec.stream(model, prompts, drafter, keep=True, **{**OPTIONS, **options})
    for new in stream:
        texts = [torch.cat(parts) for parts in zip(texts, new, strict=True)]
        for listener in listeners or [drafter]:
            assert_told(model, listener.runs[-1], texts)
    summary = stream.generation.summary()
    assert summary["acceptance_length"] > 1.2  # paths of trees were kept
    return stream.generation, texts


@pytest.mark.filterwarnings("ignore:engine")  # what drafts on the host is not captured
@pytest.mark.parametrize("capturable", [True, False], ids=["captured", "on the host"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_states_after_every_step_are_those_of_a_fresh_prefill(name, engine, capturable):
    model, engine = MODELS[name], ENGINES[engine]()
    drafter = Listening(capturable=capturable)
    for seed in (1, 2):
        turn(model, PROMPTS, drafter, engine=engine, seed=seed)


def test_states_may_be_handed_on_by_name():
    def by_name(module, args, named):
        return (), {"input" if module is model.lm_head else "hidden_states": args[0], **named}

    model = llama(vocab_size=VOCAB)
    for module in (*model.model.layers[1:], model.lm_head):
        module.register_forward_pre_hook(by_name, with_kwargs=True)
    turn(model, PROMPTS, Listening())


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_that_is_read_in_chunks_is_told_chunk_by_chunk(name, monkeypatch):
    monkeypatch.setattr(cached_model, "_TOKENS", 3 * len(PROMPTS))
    drafter = Listening()
    turn(MODELS[name], PROMPTS, drafter)
    assert drafter.runs[-1].chunks == [3, 3, 3, 2]


@pytest.mark.filterwarnings("ignore:engine")
@pytest.mark.parametrize("engine", ENGINES)
def test_drafters_of_other_states_in_one_are_told_their_own(engine):
    model, engine = MODELS["gemma3_sliding"], ENGINES[engine]()
    first, second = Listening((1,), every=2), Listening((0, -1, 2))
    for seed in (1, 2):
        turn(model, PROMPTS, Fallback(first, second), [first, second], engine=engine, seed=seed)


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_later_turn_tells_what_is_new_to_a_drafter_that_knows_the_rest(engine, knows):
    model, engine, drafter = MODELS["llama"], ENGINES[engine](), Listening(knows=knows)
    last, texts = turn(model, PROMPTS, drafter, engine=engine)
    for seed in (1, 2):
        later = [torch.cat(parts) for parts in zip(texts, SAID, strict=True)]
        last, texts = turn(model, later, drafter, engine=engine, resume=last, seed=seed)
        assert drafter.runs[-1].told == [len(new) if knows else len(new) - 1 for new in (SAID if knows else later)]


@pytest.mark.parametrize("knows", [True, False])
def test_a_later_turn_that_parts_from_the_text_is_told_from_there(knows):
    model, drafter = MODELS["gpt2"], Listening(knows=knows)
    last, texts = turn(model, PROMPTS, drafter)
    later = [torch.cat([text[: len(text) // 2], said, text]) for text, said in zip(texts, SAID, strict=True)]
    turn(model, later, drafter, resume=last)


@pytest.mark.parametrize("state", [3, -2])
def test_states_that_there_are_not_are_refused_with_those_that_there_are(state):
    with pytest.raises(ValueError, match=rf"states={state}: LlamaForCausalLM has layers 0 to 2; .* or -1 for what"):
        specdec.generate(llama(), PROMPTS, Listening((0, state)))
