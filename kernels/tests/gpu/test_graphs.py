"""On a GPU steps that are captured and replayed are the same steps, and greedy text is that of the CPU."""

import pytest
import torch
from test_graphs import DRAFTERS, SAMPLINGS, assert_replays, texts
from tiny_models import llama

import specdec


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_replaying_gives_the_same_text(name, sampling):
    target, draft = llama().cuda(), llama(1, num_hidden_layers=1).cuda()  # float64: no decision hangs on rounding
    assert_replays(name, sampling, specdec.Graphs(), target, draft)


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_is_that_of_the_cpu(name):
    models = llama(dtype=torch.float32), llama(1, torch.float32, num_hidden_layers=1)
    expected = texts(DRAFTERS[name](models[1]), "eager", target=models[0])
    target, draft = (model.cuda() for model in models)
    for engine in ("eager", specdec.Graphs()):
        found = texts(DRAFTERS[name](draft), engine, target=target)
        assert [t.tolist() for t in found] == [t.tolist() for t in expected]
