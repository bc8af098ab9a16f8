"""Whole runs by fixed seeds give the recorded texts, token for token, by every engine."""

import json

import pytest
import torch
from golden_runs import CASES, ENGINES, FILE, NEW, OPTIONS, PROMPTS, SAMPLINGS, TARGET, drafter_of, run

import specdec

torch.set_num_threads(1)
STORED = json.loads(FILE.read_text("utf-8"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_the_text_is_the_recorded_one(case, engine):
    assert run(case, ENGINES[engine]()) == STORED[case]


def test_every_recorded_case_is_run():
    assert [*STORED] == [*CASES]


def test_recorded_texts_end_at_stop_tokens_and_at_the_budget_and_draft_much():
    """What is not in the texts cannot be seen to change."""
    texts = [line for lines in STORED.values() for line in lines if "|" in line]
    counts = [len(line.replace("|", " ").split()) for line in texts]
    assert 0.1 < sum(count == NEW for count in counts) / len(counts) < 0.9
    assert sum(" " in line for line in texts) > len(texts) / 2


def test_stages_are_captured():
    engine, options = ENGINES["tape"](), {**OPTIONS, "sampling": SAMPLINGS["sampled"]}
    specdec.generate(TARGET, PROMPTS, drafter_of("model", "chain"), engine=engine, **options)
    assert engine.captured == 4
