"""Long jobs: interrupted anywhere, gone on with to the same texts; nothing is lost, doubled or half used."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llama
from transformers import (
    GenerationConfig,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

import specdec
from specdec import Sampling, journal
from specdec.batch import Batch
from specdec.drafters import MedusaDrafter, MedusaHeads, ModelDrafter, NgramDrafter, SuffixDrafter
from specdec.loop import Decoding
from specdec.models import memory
from specdec.models.cached_model import CachedModel
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
TARGET, DRAFT = llama(dtype=torch.float64), llama(1, dtype=torch.float64)
DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(50) for _ in range(DRAW.randrange(1, 20))] for _ in range(6)]
OPTIONS = {
    "sampling": Sampling(temperature=0.8),
    "seed": 5,
    "stop_tokens": (7, 9),
    "num_samples": 2,
    "max_new_tokens": 16,
}
DRAFTERS = {
    "none": lambda: None,
    "chain": lambda: ModelDrafter(DRAFT, Chain(2)),
    "tree": lambda: ModelDrafter(DRAFT, Widths((2, 2))),
    "n-grams": NgramDrafter,
    "suffixes": SuffixDrafter,
    "medusa": lambda: MedusaDrafter(MedusaHeads(2, 1, 32).double()),
}
WHOLE = {name: specdec.generate(TARGET, PROMPTS, make(), **OPTIONS).tokens for name, make in DRAFTERS.items()}


def job(path, name="chain", **more):
    return specdec.generate(TARGET, PROMPTS, DRAFTERS[name](), **{"batch_size": 3, **OPTIONS, "journal": path, **more})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def interrupted(stage, after, path, name, **more):
    """A call that an interrupt ends inside of a stage, unless it is done before."""
    counts, whole = iter(range(after)), getattr(*stage)

    def failing(self, *args, **kwargs):
        found = whole(self, *args, **kwargs)
        if next(counts, None) is None:
            raise KeyboardInterrupt
        return found

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(*stage, failing)
        job(path, name, **more)


STAGES = [
    (Decoding, "_propose"),
    (Decoding, "_score"),
    (Decoding, "_decide"),
    (Decoding, "_commit"),
    (Batch, "note"),
    (Batch, "enter"),
    (CachedModel, "read"),
]


@pytest.mark.parametrize("name", DRAFTERS)
@settings(max_examples=5, deadline=None)
@given(breaks=st.lists(st.tuples(st.sampled_from(STAGES), st.integers(0, 12)), max_size=4))
def test_an_interrupt_at_any_place_loses_no_text_and_changes_none(name, breaks, tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "run.jsonl"
    for stage, after in breaks:
        interrupted(stage, after, path, name)
    assert all(map(torch.equal, job(path, name).tokens, WHOLE[name]))
    finished = [line["text"] for line in lines(path) if "step" not in line]
    assert sorted(finished) == [*range(2 * len(PROMPTS))]


def test_texts_in_hand_go_on_from_where_they_were(tmp_path):
    path = tmp_path / "run.jsonl"
    interrupted((Decoding, "_score"), 5, path, "chain")
    before = journal.read(path)[1]
    assert len(before.in_hand) == 3 and all(len(kept.tokens) >= kept.step >= 1 for kept in before.in_hand.values())
    out = job(path)
    emitted = sum(sum(step.emitted) for step in out.trace.steps)
    kept = sum(len(text.tokens) for text in (*before.in_hand.values(), *before.finished.values()))
    assert emitted == sum(map(len, out.tokens)) - kept


def test_a_stream_gives_first_what_earlier_calls_wrote_and_a_closed_one_is_gone_on_with(tmp_path):
    path, options = tmp_path / "run.jsonl", {**OPTIONS, "journal": tmp_path / "run.jsonl", "batch_size": 3}
    stream = specdec.stream(TARGET, PROMPTS, DRAFTERS["chain"](), **options)
    for _, _ in zip(range(20), stream, strict=False):
        pass
    stream.close()
    texts = [[] for _ in WHOLE["chain"]]
    for index, tokens in specdec.stream(TARGET, PROMPTS, DRAFTERS["chain"](), **options):
        texts[index] += tokens.tolist()
    assert texts == [tokens.tolist() for tokens in WHOLE["chain"]]
    assert {line["text"] for line in lines(path)} == {*range(len(texts))}


def test_a_finished_job_is_read_from_its_journal(tmp_path):
    path = tmp_path / "run.jsonl"
    first, size = job(path, logprobs=True), (tmp_path / "run.jsonl").stat().st_size
    again = job(path, logprobs=True)
    assert path.stat().st_size == size and again.trace.steps == []
    for name in ("tokens", "logprobs", "raw_logprobs"):
        assert all(map(torch.equal, getattr(again, name), getattr(first, name)))


def test_log_probabilities_of_an_interrupted_job_are_those_of_a_whole_one(tmp_path):
    path, whole = tmp_path / "run.jsonl", job(tmp_path / "whole.jsonl", logprobs=True)
    interrupted((Decoding, "_score"), 6, path, "chain", logprobs=True)
    assert journal.read(path)[1].in_hand
    out = job(path, logprobs=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(out.logprobs, whole.logprobs, strict=True))


def test_another_batch_size_goes_on_with_the_job_and_other_settings_are_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    interrupted((Decoding, "_score"), 5, path, "chain")
    with pytest.raises(ValueError, match="seed is 5 there, 6 here"):
        job(path, seed=6)
    with pytest.raises(ValueError, match=r"temperature is 0\.8 there, 1\.0 here"):
        job(path, sampling=Sampling(1.0))
    assert all(map(torch.equal, job(path, batch_size=5).tokens, WHOLE["chain"]))


def test_a_full_disk_ends_the_job_and_loses_no_finished_text(tmp_path, monkeypatch):
    path, whole = tmp_path / "run.jsonl", journal.Journal._append

    def full(self, line):
        if line.get("text") == 7 and "step" not in line:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, line)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(journal.Journal, "_append", full)
        job(path)
    done = journal.read(path)[1].finished
    assert done and all(kept.tokens.tolist() == WHOLE["chain"][i].tolist() for i, kept in done.items())
    assert all(map(torch.equal, job(path).tokens, WHOLE["chain"]))


def _decode_for_ever(path):
    step = Decoding.step

    def slow(self):
        time.sleep(0.05)
        return step(self)

    Decoding.step = slow
    job(path)


def test_a_killed_process_loses_no_finished_text(tmp_path):
    path = tmp_path / "run.jsonl"
    process = multiprocessing.get_context("fork").Process(target=_decode_for_ever, args=(path,))
    process.start()
    while process.is_alive() and not (path.exists() and len(path.read_bytes().splitlines()) > 4):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(journal.read(path)[1].finished) >= 3
    assert all(map(torch.equal, job(path).tokens, WHOLE["chain"]))


def test_prompts_that_cannot_be_decoded_are_skipped_with_the_reason(tmp_path):
    path, prompts = tmp_path / "run.jsonl", [PROMPTS[0], [], PROMPTS[2], [51]]
    options = {**OPTIONS, "batch_size": 2, "journal": path, "on_error": "skip"}
    for _ in range(2):  # as they were asked for, and from the journal
        out = specdec.generate(TARGET, prompts, DRAFTERS["chain"](), **options)
        assert {i: reason[:19] for i, reason in out.skipped.items()} == {
            **dict.fromkeys((2, 3), "prompt 1 is empty; "),
            **dict.fromkeys((6, 7), "prompt 3 contains t"),
        }
        assert [len(tokens) for tokens in out.tokens][2:4] == [0, 0]
        for place in (0, 1, 4, 5):  # the others are what they are without them
            assert torch.equal(out.tokens[place], WHOLE["chain"][place])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        specdec.generate(TARGET, prompts, **{**OPTIONS, "batch_size": 2})
    none = specdec.generate(TARGET, [[], [51]], on_error="skip", journal=tmp_path / "none.jsonl")
    assert [*none.skipped] == [0, 1] and [len(tokens) for tokens in none.tokens] == [0, 0]


def test_rows_that_cannot_fit_into_memory_are_refused_before_the_run(monkeypatch):
    made = specdec.generate(TARGET, PROMPTS[:1], keep=True, max_new_tokens=16).runs.target.cached.cache
    row = sum(stack.nbytes for stack in made._stacks.values())
    monkeypatch.setattr(memory, "free_memory", lambda device: int(3.5 * row))
    with pytest.raises(ValueError, match=rf"of 9 texts of up to {made.capacity} tokens .* pass batch_size=3"):
        specdec.generate(TARGET, PROMPTS[:1] * 9, max_new_tokens=16)
    assert len(specdec.generate(TARGET, PROMPTS[:1] * 9, batch_size=3, max_new_tokens=16).tokens) == 9


def test_a_bar_shows_texts_rows_and_acceptance_length(capsys):
    specdec.generate(TARGET, PROMPTS, DRAFTERS["chain"](), batch_size=3, progress=True, **OPTIONS)
    shown = capsys.readouterr().err
    assert "12/12" in shown and "tokens/s" in shown and "acceptance length" in shown


class Refusing(specdec.ModelTarget):
    """Reads texts that begin with token 9 otherwise than they are."""

    def check_text(self, text):
        if text[0] == 9:
            raise ValueError("this text was read as another one")


def test_a_text_that_the_target_refuses_when_it_has_ended_is_never_handed_out(tmp_path):
    path, options = tmp_path / "run.jsonl", {"max_new_tokens": 4, "stop_tokens": (), "batch_size": 1}
    for _ in range(2):
        with pytest.raises(ValueError, match="read as another one"):
            specdec.generate(Refusing(TARGET), [[3, 4], [9]], journal=path, **options)
        assert [*journal.read(path)[1].finished] == [0]


def forbids(tokens):
    return lambda texts, scores: scores.index_fill(1, torch.tensor(tokens), -torch.inf)


OTHERS = {
    "lists": [SuppressTokensLogitsProcessor([*range(first)], device="cpu") for first in (20, 21)],
    "tables": [SequenceBiasLogitsProcessor({(token,): 9.0}) for token in (41, 42)],
    "functions": [forbids([1]), forbids([2])],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_journal_of_other_processors_is_refused(kind, tmp_path):
    options = {"journal": tmp_path / "run.jsonl", "max_new_tokens": 4}
    first, second = (Sampling(processors=[processor]) for processor in OTHERS[kind])
    made = specdec.generate(TARGET, PROMPTS, sampling=first, **options)
    assert specdec.generate(TARGET, PROMPTS, sampling=first, **options).trace.steps == [] and made.trace.steps
    with pytest.raises(ValueError, match="processors is "):
        specdec.generate(TARGET, PROMPTS, sampling=second, **options)


def test_a_journal_of_a_model_that_was_trained_in_few_places_is_refused(tmp_path):
    model, options = llama(dtype=torch.float64), {"journal": tmp_path / "run.jsonl", "max_new_tokens": 4}
    specdec.generate(model, PROMPTS, **options)
    model.get_input_embeddings().weight.data[17, 3] += 1e-3
    with pytest.raises(ValueError, match="target's weights is "):
        specdec.generate(model, PROMPTS, **options)


def test_a_journal_knows_which_prompts_were_skipped(tmp_path):
    options = {"journal": tmp_path / "run.jsonl", "on_error": "skip", "max_new_tokens": 4}
    specdec.generate(TARGET, [[], PROMPTS[0]], **options)
    with pytest.raises(ValueError, match="other settings"):
        specdec.generate(TARGET, PROMPTS[:1], first_index=1, **options)


def test_texts_in_hand_go_on_under_processors_that_keep_no_state(tmp_path):
    sampling, path = Sampling(0.8, processors=[RepetitionPenaltyLogitsProcessor(1.3)]), tmp_path / "run.jsonl"
    whole = job(tmp_path / "whole.jsonl", sampling=sampling)
    with specdec.stream(
        TARGET, PROMPTS, DRAFTERS["chain"](), **{**OPTIONS, "sampling": sampling}, journal=path
    ) as stream:
        for _ in zip(range(3), stream, strict=False):
            pass
    kept = {index: len(text.tokens) for index, text in journal.read(path)[1].in_hand.items()}
    out = job(path, sampling=sampling)
    assert all(map(torch.equal, out.tokens, whole.tokens)) and sum(kept.values()) > 10
    emitted = sum(sum(step.emitted) for step in out.trace.steps)
    finished = sum(map(len, out.tokens)) - emitted
    assert finished >= sum(kept.values())  # nothing of these was written again


def test_a_journal_of_stop_strings_that_another_tokenizer_finds_is_refused(tmp_path):
    pair, config = specdec.demo.load(), GenerationConfig(stop_strings=["\n"], max_new_tokens=8)
    options = {
        "sampling": Sampling.from_generation_config(config),
        "journal": tmp_path / "run.jsonl",
        "max_new_tokens": 8,
    }
    specdec.generate(pair.target, [[5, 6, 7]], tokenizer=pair.tokenizer, **options)
    other = specdec.demo.load().tokenizer
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match="stopping is "):
        specdec.generate(pair.target, [[5, 6, 7]], tokenizer=other, **options)
