"""Drafts that are bundled for the demo target: read as they were trained, they change no text and beat the Medusa heads."""

import pytest
import torch

import specdec
from specdec import Sampling
from specdec.drafters import DSparkDrafter, Eagle3Drafter, MedusaDrafter, check
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
DRAFTS = specdec.demo.eagle3, specdec.demo.dspark
PAIR = specdec.demo.load()
PROMPTS = [torch.tensor(PAIR.tokenizer(prompt.text)["input_ids"][:60]) for prompt in PAIR.prompts[::4]]


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_bundled_draft_is_read_as_it_was_trained(draft):
    readings = check(PAIR.target, draft(PAIR.target), PROMPTS[::2])
    assert readings.best is readings.taken and readings.taken.overlap > 0.35


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_bundled_draft_is_accepted_more_often_than_the_heads_and_along_trees_more_often_than_along_chains(draft):
    options = {"sampling": Sampling(1.0), "max_new_tokens": 32, "stop_tokens": ()}
    chain, tree, heads = (
        specdec.generate(PAIR.target, PROMPTS, drafter, **options).summary()["acceptance_length"]
        for drafter in (
            draft(PAIR.target, Chain(4)),
            draft(PAIR.target, Widths((4, 2, 1))),
            MedusaDrafter(PAIR.heads, Chain(4)),
        )
    )
    assert chain > heads + 0.3 and tree > chain + 0.2


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_bundled_draft_changes_no_greedy_text(draft):
    drafter = draft(PAIR.target, Widths((2, 2)))
    out = specdec.generate(PAIR.target, PROMPTS[::4], drafter, max_new_tokens=24)
    alone = specdec.generate(PAIR.target, PROMPTS[::4], max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [t.tolist() for t in alone.tokens]


def test_a_draft_of_another_kind_is_told():
    with pytest.raises(ValueError, match=r"Qwen3DSparkModel; use DSparkDrafter\.from_pretrained"):
        Eagle3Drafter.from_pretrained(specdec.demo.FOLDER / "dspark", PAIR.target)
    with pytest.raises(ValueError, match="Eagle3"):
        DSparkDrafter.from_pretrained(specdec.demo.FOLDER / "eagle3", PAIR.target)
