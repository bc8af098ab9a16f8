"""On a GPU steps that are captured and replayed are the same steps, and greedy text is that of the CPU."""

import pytest
import torch
from test_graphs import DRAFTERS, SAMPLINGS, assert_replays, texts
from tiny_models import PROMPTS, llama

import specdec
import specdec.models.attention


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


class Again:
    """Stands for a captured stage and runs it anew: what is left is the same shapes, buffers and kernels, uncaptured."""

    bytes = 0

    def __init__(self, stage):
        self._stage, self.outputs = stage, None

    def replay(self):
        self.outputs = self._stage()


# Of logits in bfloat16, which lie 2 apart here: off by 0.009 on a CPU, and two of them decide. (The tests above never reach
# tree attention's kernel: it has no float64.)
ROUNDING = 0.05


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", ["none", "chain", "sampled, then top", "layers left out", "heads"])
def test_bfloat16_steps_are_the_same_when_captured_and_their_kernels_are_run(name, sampling, monkeypatch):
    calls, attend = [], specdec.models.attention.tree_attention
    monkeypatch.setattr(specdec.models.attention, "tree_attention", lambda *args: calls.append(1) or attend(*args))
    target, draft = (llama(seed, torch.bfloat16, num_hidden_layers=n).cuda() for seed, n in ((0, 3), (1, 1)))
    drafter = DRAFTERS[name]
    if name == "heads":
        made = drafter(draft)
        made.heads.to(torch.bfloat16)
        drafter = lambda draft: made  # noqa: E731
    graphs = specdec.Graphs()
    options = {"target": target, "sampling": SAMPLINGS[sampling]}
    for seed in (3, 4):
        expected = texts(drafter(draft), specdec.Graphs(capture=Again), seed=seed, **options)
        found = texts(drafter(draft), graphs, seed=seed, **options)
        assert [t.tolist() for t in found] == [t.tolist() for t in expected]
    assert calls and graphs.captured


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_greedy_bfloat16_text_is_almost_the_most_probable_in_float64(engine):
    target, draft = (llama(seed, torch.bfloat16, num_hidden_layers=n).cuda() for seed, n in ((0, 3), (1, 1)))
    exact = llama(0, torch.bfloat16).double()
    assert_almost_greedy(exact, texts(DRAFTERS["chain"](draft), engine, target=target))


def assert_almost_greedy(exact, found):
    for prompt, text in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits = exact(torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1 : -1]
        short = logits.max(-1).values - logits.gather(1, text[:, None])[:, 0]
        assert len(text) and short.max() < ROUNDING
