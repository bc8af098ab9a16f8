"""What a run in slots leaves behind: streams that were closed, models, engines, and no more memory than its texts take."""

import pytest
import torch
from captured import DRAFT, DRAFTERS, TARGET
from many_texts import BUDGETS, MANY, SAMPLED, alone, texts
from tiny_models import llama, state

import specdec
from specdec.arguments import as_request
from specdec.drafters import ModelDrafter
from specdec.loop import Decoding
from specdec.testing import TabularTarget, Tape

torch.set_num_threads(1)


def test_models_are_left_as_they_were_found():
    draft = llama(1, num_hidden_layers=1)
    found = state(TARGET), state(draft)
    texts(drafter=ModelDrafter(draft), batch_size=3)
    for _ in specdec.stream(TARGET, MANY, ModelDrafter(draft), batch_size=3, max_new_tokens=BUDGETS):
        assert (state(TARGET), state(draft)) == found
    assert (state(TARGET), state(draft)) == found


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_a_stream_yields_every_token_once(batch_size):
    parts = [[] for _ in MANY]
    drafter = DRAFTERS["chain"](DRAFT)
    stream = specdec.stream(TARGET, MANY, drafter, batch_size=batch_size, max_new_tokens=BUDGETS, **SAMPLED)
    for index, new in stream:
        assert len(new) and new.dtype == torch.int64
        parts[index] += new.tolist()
    assert parts == alone("chain") == [text.tolist() for text in stream.generation.tokens]


@pytest.mark.parametrize("at", range(0, 60, 4))
def test_a_stream_that_is_closed_keeps_what_was_written(at):
    parts = [[] for _ in MANY]
    stream = specdec.stream(TARGET, MANY, batch_size=3, max_new_tokens=BUDGETS, **SAMPLED)
    for _, (index, new) in zip(range(at + 1), stream, strict=False):
        parts[index] += new.tolist()
    for _ in range(2):
        found = [text.tolist() for text in stream.generation.tokens]
        # the rest of the last step has been written too
        assert all(
            text[: len(part)] == part and len(text) <= len(part) + 1 for text, part in zip(found, parts, strict=True)
        )
        stream.close()


@pytest.mark.filterwarnings("ignore:engine. the stage .* runs step by step")
@pytest.mark.parametrize("engine", ["eager", "tape"])
def test_two_runs_that_share_all_parts_do_not_meet(engine):
    engine = specdec.Graphs(capture=Tape) if engine == "tape" else engine
    target, drafter = specdec.ModelTarget(TARGET), DRAFTERS["chain"](DRAFT)
    options = {"batch_size": 3, "max_new_tokens": BUDGETS, "engine": engine, **SAMPLED}
    streams = [specdec.stream(target, prompts, drafter, **options) for prompts in (MANY, MANY[::-1])]
    going = list(streams)
    while going:
        going = [stream for stream in going if next(stream, None) is not None]
    found = [[text.tolist() for text in stream.generation.tokens] for stream in streams]
    assert found == [alone("chain"), texts(MANY[::-1], drafter)]


def test_the_next_call_uses_weights_that_have_changed():
    model, draft, engine = llama(5), llama(6, num_hidden_layers=1), specdec.Graphs(capture=Tape)
    target, drafter = specdec.ModelTarget(model), ModelDrafter(draft)
    options = {"batch_size": 3, "engine": engine}
    before = texts(drafter=drafter, target=target, **options)
    for module, seed in ((model, 7), (draft, 8)):
        module.load_state_dict(llama(seed, num_hidden_layers=len(module.model.layers)).state_dict())
    after = texts(drafter=drafter, target=target, **options)
    assert before != after == texts(drafter=ModelDrafter(llama(8, num_hidden_layers=1)), target=llama(7))


def test_texts_that_have_ended_keep_no_buffers():
    budgets, options = [1000] + [1] * 39, {"batch_size": 2, "stop_tokens": (1, 2, 3, 4)}
    with Decoding(as_request(TabularTarget(5), [[1]] * 40, max_new_tokens=budgets, **options)) as run:
        for _ in run.steps():
            pass
        kept = [text.tokens if text.tokens.base is None else text.tokens.base for text in run.slots.written.values()]
    assert sum(array.nbytes for array in kept) == 8 * sum(map(len, run.emitted))


def test_notes_of_ended_texts_are_one_tensor_each():
    request = as_request(TARGET, MANY, batch_size=3, logprobs=True, max_new_tokens=BUDGETS, **SAMPLED)
    with Decoding(request) as run:
        for _ in run.steps():
            pass
        written = [run.slots.written[index] for index in range(len(MANY))]
        assert [len(text.notes) for text in written] == [1] * len(MANY)
        assert [len(text.noted) for text in written] == list(map(len, run.emitted))
