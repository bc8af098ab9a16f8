"""Networks on the target's states are trained as they are served, and a file that is read wrongly is found out."""

import copy

import pytest
import torch

import specdec
from specdec.drafters import Eagle3Drafter, Eagle3Net, check
from specdec.drafters.eagle3 import Eagle3Reading
from specdec.training.distillation import kl
from specdec.training.features import TargetTexts
from specdec.training.states import Comparison, states_loss

torch.set_num_threads(1)
PAIR = specdec.demo.load()
PAIR.target.requires_grad_(False)
TEXTS = [PAIR.tokenizer(prompt.text, return_tensors="pt").input_ids[0][:60] for prompt in PAIR.prompts]
TEXTS = torch.stack([text for text in TEXTS if len(text) == 60][:4])
READINGS = {
    "plain": Eagle3Reading(),
    "norm_output": Eagle3Reading(norm_output=True),
    "norm_before_residual": Eagle3Reading(norm_before_residual=True),
}


@pytest.fixture(scope="module", params=READINGS)
def trained(request):
    """A network that has been trained for seconds, under one reading."""
    config = copy.deepcopy(PAIR.target.config)
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    net = Eagle3Net(config, (1, 2, 4), config.hidden_size, config.vocab_size, READINGS[request.param])
    net.lm_head.weight.data.copy_(PAIR.target.get_output_embeddings().weight)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        states_loss(kl, Comparison(net, PAIR.target, TargetTexts.read(PAIR.target, net, TEXTS), 3)).backward()
        optimizer.step()
    return net.eval()


def found(net, name, **wrong):
    """Whether a network that is read wrongly is found to do better in the way of this name."""
    readings = check(PAIR.target, Eagle3Drafter(net.changed(**wrong)), list(TEXTS))
    (right,) = (reading for reading in readings.others if reading.name == name)
    return right.overlap > readings.taken.overlap


def test_layers_that_are_one_off_are_found(trained):
    assert found(trained, "states (1, 2, 4), one layer earlier", states=(2, 3, 5))
    assert found(trained, "states (1, 2, 4), one layer later", states=(0, 1, 3))
    assert found(trained, "states (1, 2, 4), in reverse order", states=(4, 2, 1))


def test_flags_that_are_the_other_way_are_found(trained, request):
    name = request.node.callspec.params["trained"]
    if name == "plain":
        assert found(trained, "norm_output=False", reading=Eagle3Reading(norm_output=True))
        assert found(trained, "norm_before_residual=False", reading=Eagle3Reading(norm_before_residual=True))
    else:
        assert found(trained, f"{name}=True", reading=Eagle3Reading())


def test_a_draft_that_is_read_as_it_was_trained_is_the_best(trained, request):
    if request.node.callspec.params["trained"] == "plain":
        readings = check(PAIR.target, Eagle3Drafter(trained), list(TEXTS))
        assert readings.best is readings.taken
        assert str(readings).splitlines()[1].endswith("<- take this")


@pytest.mark.parametrize(
    ("texts", "said"),
    [([], "give some"), ([[1, 2, 3]], "has 3 tokens"), ([[1, 4096, *range(9)]], "4095"), (["words"], "sequence")],
)
def test_texts_that_tell_nothing_are_refused(texts, said):
    net = Eagle3Net(PAIR.target.config, (1, 2, 4), 256, 4096)
    with pytest.raises(ValueError, match=said):
        check(PAIR.target, Eagle3Drafter(net), texts)


def test_texts_that_are_too_few_to_tell_change_nothing():
    torch.manual_seed(3)
    net = Eagle3Net(PAIR.target.config, (1, 2, 4), 256, 4096).eval()  # untrained: no reading is right
    readings = check(PAIR.target, Eagle3Drafter(net), [TEXTS[0][:8]])
    assert readings.best is readings.taken
