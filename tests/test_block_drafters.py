"""DFlash and DSpark: one pass over a block, certified along chains and trees."""

from dataclasses import replace

import pytest
import torch
from block_nets import (
    LLAMA_TV,
    NORMS,
    ONE,
    PROMPTS,
    Noting,
    dflash,
    distance,
    dspark,
    heard,
    plain_block,
    target,
    unsure,
)

import specdec
from specdec import Law, Sampling
from specdec.drafters.block_files import BlockReading
from specdec.drafters.dflash import DFlashDrafter
from specdec.drafters.dspark import DSparkDrafter
from specdec.testing import Tape, assert_drafter
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)


@pytest.mark.parametrize("tree", [Chain(2), Widths((2, 1))], ids=str)
def test_text_drafted_by_blocks_is_lossless(tree):
    assert distance(DFlashDrafter(dflash(), tree)) <= LLAMA_TV


@pytest.mark.parametrize(
    ("gated", "tree"),
    [(False, Widths((2, 1), Law.WITHOUT_REPLACEMENT)), (False, Dynamic(5, 2, 2)), (True, Chain(2))],
    ids=str,
)
def test_text_drafted_by_blocks_and_the_token_before_is_lossless(tree, gated):
    assert distance(DSparkDrafter(dspark(gated=gated), tree), Sampling(0.7)) <= LLAMA_TV


@pytest.mark.parametrize("of_tokens", [True, False])
@pytest.mark.parametrize("tree", [Chain(2), Widths((2, 1))], ids=str)
def test_stops_by_confidence_do_not_anticipate(tree, of_tokens):
    net = unsure(dspark(confident=True, confident_of_tokens=of_tokens))
    drafter = Noting(DSparkDrafter(net, tree, confidence=0.5))
    assert distance(drafter) <= LLAMA_TV
    assert len({size for tree in drafter.trees for size in (tree.laws != Law.PADDING).sum(1).tolist()}) > 1
    assert len({tree.tokens.shape[1] for tree in drafter.trees}) > 1  # the target is not given what no row has


class Anticipating(Noting):
    """Drops the nodes that have drawn token 0."""

    def note(self, tree):
        laws = tree.laws.clone()
        laws[:, 1:][tree.tokens[:, 1:] == 0] = Law.PADDING
        return replace(tree, laws=laws)


def test_a_stop_that_anticipates_is_found_by_the_certificate():
    assert distance(Anticipating(DSparkDrafter(dspark(), Chain(1))), max_new_tokens=2) > 0.01


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
READINGS = {
    "full": ({}, BlockReading()),
    "from the anchor": ({}, BlockReading(from_anchor=True)),
    "a window": (WINDOWS, BlockReading()),
    "a causal window": (WINDOWS, BlockReading(causal=(True, False))),
}


@pytest.mark.parametrize("name", READINGS)
def test_blocks_after_any_acceptance_are_those_of_a_pass_over_the_text(name):
    of, reading = READINGS[name]
    model, drafter, texts, kept = target(), DFlashDrafter(dflash(4, of=of, reading=reading), Chain(3)), PROMPTS, set()
    found = heard(drafter.net)
    with torch.inference_mode():
        for new in specdec.stream(model, PROMPTS, drafter, sampling=ONE, max_new_tokens=9, stop_tokens=()):
            for logits, _ in found:  # none in the last step, which drafts nothing
                for row, text in enumerate(texts):
                    expected = plain_block(drafter.net, model, text)[: logits.shape[1]]
                    assert not len(new[row]) or torch.allclose(logits[row], expected, atol=NORMS)
            found.clear()
            kept |= {len(part) for part in new}
            texts = [torch.cat(parts) for parts in zip(texts, new, strict=True)]
    assert len(kept) > 2


def test_a_drafter_of_blocks_keeps_its_contract():
    net = unsure(dspark(gated=True, confident=True))
    drafter = DSparkDrafter(net, Chain(2), confidence=0.5)
    prompts = [text.tolist() for text in PROMPTS]
    assert_drafter(drafter, target(), prompts, samplings=[ONE], horizon=8)


def test_texts_are_the_same_in_slots_in_captured_steps_and_in_later_turns():
    drafter, options = (
        DSparkDrafter(dspark(), Widths((2, 1))),
        {"sampling": ONE, "max_new_tokens": 8, "stop_tokens": ()},
    )
    model, first = target(), specdec.generate(target(), PROMPTS, drafter, keep=True, **options)
    tape = specdec.Graphs(capture=Tape)
    for others in ({"batch_size": 2}, {"engine": tape}):
        found = specdec.generate(model, PROMPTS, drafter, **others, **options).tokens
        assert all(map(torch.equal, found, first.tokens))
    first = specdec.generate(model, PROMPTS, drafter, keep=True, **options)
    later = [torch.cat([prompt, said, torch.tensor([1])]) for prompt, said in zip(PROMPTS, first.tokens, strict=True)]
    resumed, fresh = (specdec.generate(model, later, drafter, resume=last, **options) for last in (first, None))
    assert all(map(torch.equal, resumed.tokens, fresh.tokens))
