"""What the attention kernel is told of a tree says what the dense bias says, for every model and pattern."""

import pytest
import torch
from captured import DRAFT, DRAFTERS, texts
from test_models import MODELS, TOLERANCE, WRONG, Walk
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

import specdec_kernels
from specdec.models.attention import View, _window
from specdec.tree import Topology, chain
from specdec_kernels.reference import tree_attention as reference
from specdec_kernels.tree_attention import MAX_NODES

torch.set_num_threads(1)


@pytest.fixture
def told(monkeypatch):
    """The CPU answers as a GPU does; collects whether each answer was a sight."""
    answers, sight = [], View.packed_mask

    def note(view, window):
        answers.append(sight(view, window))
        return answers[-1]

    monkeypatch.setattr(specdec_kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr(View, "packed_mask", note)
    return answers


@pytest.mark.parametrize("name", MODELS)
def test_ragged_trees_in_one_forward_equal_their_paths_in_the_words_of_the_kernel(name, told):
    walk = Walk(MODELS[name](torch.float32), steps=2)
    assert max(walk.differences()) < TOLERANCE[torch.float32]
    assert any(answer is not None for answer in told)
    assert any(answer is None for answer in told) == ("chunked" in name)


@pytest.mark.parametrize("column", [0, 1, 2], ids=["first", "length", "word"])
def test_the_walk_finds_wrong_words(column, told, monkeypatch):
    sight = View.packed_mask

    def wrong(view, window):
        words = sight(view, window)
        words[..., column] ^= 1
        return words

    walk = Walk(MODELS["gemma3_sliding"](torch.float32), steps=2)
    monkeypatch.setattr(View, "packed_mask", wrong)
    assert max(walk.differences()) > WRONG


@pytest.mark.parametrize("window", [None, 1, 2, 3, 9, 100])
@pytest.mark.parametrize("count", [1, 4, 40])
def test_the_packed_mask_of_a_view_is_its_bias(window, count):
    generator = torch.Generator().manual_seed(0)
    parents = torch.stack([(torch.rand(3, generator=generator) * node).long() for node in range(40)], 1)
    parents[:, 0] = -1
    view = View(torch.tensor([0, 5, 33]), Topology(parents, depth=39), count, slots=80)
    pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    words = view.packed_mask(_window(pattern, window, False, None))
    assert words is not None
    seen = reference.visible(words[:, 0, :, 0], words[:, 0, 0, 1], words[:, 0, :, 2:], slots=80)
    assert torch.equal(seen, view.bias(pattern, torch.float32)[:, 0] == 0)


def test_patterns_and_trees_without_a_kernel_have_no_packed_mask():
    lengths = torch.tensor([3])
    short, long = (View(lengths, chain(1, nodes), nodes, 3 + nodes) for nodes in (MAX_NODES, MAX_NODES + 1))
    assert short.packed_mask(4) is not None and long.packed_mask(4) is None
    chunked = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    assert short.packed_mask(_window(chunked, 4, False, None)) is None


@pytest.mark.parametrize("name", ["none", "chain", "dynamic", "layers left out", "heads", "features"])
def test_where_there_is_a_kernel_no_dense_mask_is_built(name, told, monkeypatch):
    expected = texts(DRAFTERS[name](DRAFT), "eager")
    monkeypatch.setattr(View, "bias", lambda *_: pytest.fail("a dense mask"))
    for engine in ("eager", "graph"):
        told.clear()
        assert all(map(torch.equal, texts(DRAFTERS[name](DRAFT), engine), expected))
        assert told and all(
            answer.shape[3] == 3 for answer in told
        )  # two bounds and one word, however long the cache is
