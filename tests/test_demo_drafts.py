"""The draft that is bundled for the demo target: it is read as it was trained, changes no text, and beats the Medusa heads."""

import torch

import specdec
from specdec import Sampling
from specdec.drafters import MedusaDrafter, check
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
PAIR = specdec.demo.load()
PROMPTS = [torch.tensor(PAIR.tokenizer(prompt.text)["input_ids"][:60]) for prompt in PAIR.prompts[::4]]


def test_the_bundled_draft_is_read_as_it_was_trained():
    readings = check(PAIR.target, specdec.demo.eagle3(PAIR.target), PROMPTS)
    assert readings.best is readings.taken and readings.taken.overlap > 0.35


def test_the_bundled_draft_is_accepted_more_often_than_the_heads_and_along_trees_more_often_than_along_chains():
    options = {"sampling": Sampling(1.0), "max_new_tokens": 32, "stop_tokens": ()}
    chain, tree, heads = (
        specdec.generate(PAIR.target, PROMPTS, drafter, **options).summary()["acceptance_length"]
        for drafter in (
            specdec.demo.eagle3(PAIR.target, Chain(4)),
            specdec.demo.eagle3(PAIR.target, Widths((4, 2, 1))),
            MedusaDrafter(PAIR.heads, Chain(4)),
        )
    )
    assert chain > heads + 0.3 and tree > chain + 0.2


def test_the_bundled_draft_changes_no_greedy_text():
    drafter = specdec.demo.eagle3(PAIR.target, Widths((2, 2)))
    out = specdec.generate(PAIR.target, PROMPTS[::4], drafter, max_new_tokens=24)
    alone = specdec.generate(PAIR.target, PROMPTS[::4], max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [t.tolist() for t in alone.tokens]
