"""After a training step, which writes to weights in place, the next call uses the new ones: target, draft and heads."""

import copy
import warnings
from functools import partial

import pytest
import torch
from captured import heads
from tiny_models import PROMPTS, llama

import specdec
from specdec import Sampling
from specdec.drafters import LayerSkipDrafter, MedusaDrafter, ModelDrafter, TargetParts
from specdec.testing import Tape
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
small = partial(llama, num_hidden_layers=2)


class Elsewhere(MedusaDrafter):
    """Its runs have a copy of the heads, as if those were on another device than the target."""

    def _net_on(self, device, last):
        net = copy.deepcopy(self.net) if last is None else last.net
        net.load_state_dict(self.net.state_dict())
        return net


DRAFTERS = {
    "none": lambda draft, heads: None,
    "a draft model": lambda draft, heads: ModelDrafter(draft, Chain(3)),
    "layers left out": lambda draft, heads: LayerSkipDrafter(exit_layer=1, tree=Chain(3)),
    "heads": lambda draft, heads: MedusaDrafter(heads, Widths((2, 1))),
    "heads elsewhere": lambda draft, heads: Elsewhere(heads, Widths((2, 1))),
}
ENGINES = {"eager": lambda: "eager", "graphs": specdec.Graphs, "captured": lambda: specdec.Graphs(capture=Tape)}
OPTIONS = {"max_new_tokens": 8, "stop_tokens": (), "seed": 3, "sampling": Sampling(0.8)}


def train(target, draft, heads):
    """One step of each: large, so that texts and drafts change."""
    text = torch.cat(PROMPTS)[None]
    states = target(text, output_hidden_states=True, labels=text)
    hidden, parts = states.hidden_states[-1][0].detach(), TargetParts.of(target, heads)
    guessed = heads.block(None, hidden, None, heads.depth, parts).logits.flatten(0, 1)
    losses = states.loss, draft(text, labels=text).loss, guessed.logsumexp(-1).mean() - guessed[:, 3].mean()
    models = target, draft, heads
    gradients = [
        torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
        for model, loss in zip(models, losses, strict=True)
    ]
    for model, found, rate in zip(models, gradients, (3.0, 3.0, 10.0), strict=True):
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient
        torch.optim.SGD(model.parameters(), rate).step()


def decoded(models, drafter, engine, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a GPU, nothing is captured
        return specdec.generate(models[0], PROMPTS[1:3], drafter, engine=engine, **OPTIONS, **options)


def found(out):
    """Texts, and how much of each step's draft was accepted: they show the weights of the target and of the drafter."""
    return [t.tolist() for t in out.tokens], [step.accepted for step in out.trace.steps]


@pytest.mark.parametrize("keep", [False, True], ids=["begun", "resumed"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_next_call_uses_the_weights_of_the_last_training_step(name, engine, keep):
    models, runs, last, results = (small(), small(1), heads()), ENGINES[engine](), None, []
    drafter = DRAFTERS[name](*models[1:])
    train(*models)  # the first pass of all sets attributes of the model, so that nothing would be replayed
    for _ in range(2):
        fresh = copy.deepcopy(models)
        due = found(decoded(fresh, DRAFTERS[name](*fresh[1:]), "eager"))
        for _ in range(2):  # captured, and replayed
            last = decoded(models, drafter, runs, keep=keep, resume=last if keep else None)
            assert found(last) == due
        results.append(due)
        train(*models)
    (text, accepted), (new_text, now_accepted) = results
    assert text != new_text
    assert name == "none" or accepted != now_accepted
