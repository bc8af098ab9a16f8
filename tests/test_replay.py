"""Replayed steps are those of the run."""

import pytest
import torch
from tiny_models import llama

from specdec import Sampling, generate
from specdec.drafters import Fallback, LayerSkipDrafter, ModelDrafter, NgramDrafter, SuffixDrafter
from specdec.prediction import NotForetold, replay
from specdec.trees import Chain, Dynamic

torch.set_num_threads(1)
PROMPTS = [torch.tensor([3, 4, 3, 4, 3]), torch.tensor([7, 8, 9, 7, 8, 9])]
POINTS = [
    NgramDrafter(),
    SuffixDrafter(),
    ModelDrafter(llama(1), Dynamic(9, 3, 2)),
    Fallback(NgramDrafter(), ModelDrafter(llama(1), Dynamic(5, 2, 2))),
]


@pytest.mark.parametrize("drafter", POINTS, ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.3, top_k=5)], ids=["greedy", "sampled"])
def test_replayed_steps_are_those_of_the_run(drafter, sampling):
    target = llama(0, eos_token_id=None)
    run = generate(target, PROMPTS, drafter, sampling=sampling, max_new_tokens=24)
    again = replay(PROMPTS, run.tokens, drafter, target.config.vocab_size, sampling)
    steps = [[(step.nodes, step.emitted, step.accepted) for step in trace.steps] for trace in (run.trace, again)]
    assert steps[0] == steps[1]
    assert any(sum(accepted) for _, _, accepted in steps[0])


def test_drafts_that_a_text_does_not_tell_are_refused():
    with pytest.raises(NotForetold, match="draws children by IID"):
        replay(PROMPTS, PROMPTS, ModelDrafter(llama(1), Chain(2)), 97, Sampling(1.0))
    with pytest.raises(ValueError, match="only a transformers model has layers"):
        replay(PROMPTS, PROMPTS, LayerSkipDrafter(exit_layer=1), 97)
