"""What the attention kernel is told of a tree says what the dense bias says, for every model and pattern."""

from functools import partial

import pytest
import torch
from captured import DRAFT, DRAFTERS, texts
from test_models import MODELS, NODES, TOLERANCE, WRONG, Walk
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

import specdec_kernels
from specdec.models import attention
from specdec.models.attention import View, _window, mask
from specdec.tree import Topology, chain
from specdec_kernels.cpu import can_load
from specdec_kernels.reference import tree_attention as reference
from specdec_kernels.tree_attention import MAX_NODES

torch.set_num_threads(1)


@pytest.fixture
def asked(monkeypatch):
    """The CPU answers as a GPU does; collects the packed masks, None where there was none."""
    answers, sight = [], View.packed_mask

    def note(view, window):
        answers.append(sight(view, window))
        return answers[-1]

    monkeypatch.setattr(specdec_kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr(View, "packed_mask", note)
    return answers


@pytest.fixture
def told(asked, monkeypatch):
    """The same, where a kernel takes few queries at a time."""
    monkeypatch.setattr(attention, "MAX_NODES", NODES)
    return asked


@pytest.mark.parametrize("name", MODELS)
def test_ragged_trees_in_one_forward_equal_their_paths_in_the_words_of_the_kernel(name, told):
    walk = Walk(MODELS[name](torch.float32), steps=2)
    assert max(walk.differences()) < TOLERANCE[torch.float32]
    assert max(answer.shape[2] for answer in told if answer is not None) > 2 * NODES
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


@pytest.mark.parametrize("window", [None, 1, 9, 300, 1000])
@pytest.mark.parametrize(("nodes", "count"), [(600, 600), (600, 300), (MAX_NODES + 1, 2)])
def test_the_packed_mask_of_a_long_chain_is_its_bias_part_by_part(nodes, count, window):
    view = View(torch.tensor([0, 5, 33]), chain(3, nodes), count, slots=nodes + 40)
    pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    words = view.packed_mask(_window(pattern, window, False, None))
    assert words is not None and "ancestors" not in vars(view.topology)  # [node, node], which nobody needs
    parts = [part[:, 0] for part in words.split(MAX_NODES, 2)]
    seen = [reference.visible(w[:, :, 0], w[:, 0, 1], w[:, :, 2:], view.slots) for w in parts]
    assert torch.equal(torch.cat(seen, 1), view.bias(pattern, torch.float32)[:, 0] == 0)


def test_trees_and_patterns_without_a_kernel_have_no_packed_mask():
    lengths, parents = torch.tensor([3]), torch.arange(-1, MAX_NODES)[None]
    trees = chain(1, MAX_NODES), Topology(parents, MAX_NODES), chain(1, MAX_NODES + 1)
    views = [View(lengths, tree, 1, 300) for tree in trees]
    assert [view.packed_mask(4) is None for view in views] == [False, True, False]
    assert views[0].packed_mask(_window(chunked(4, "cpu"), 4, False, None)) is None


def chunked(size, device):
    return chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64, device=device))


def broad(nodes, device):
    return Topology(torch.zeros(1, nodes, dtype=torch.int64, device=device), 1)


PATHS = {  # device ("meta" stands for a GPU), dtype, topology, pattern -> whether a kernel is called
    "a tree": ("meta", torch.bfloat16, partial(broad, 9), causal_mask_function, True),
    "a prompt": ("meta", torch.bfloat16, partial(chain, 1, 4096), causal_mask_function, True),
    "a prompt under a window": ("meta", torch.float16, partial(chain, 1, 4096), sliding_window_causal_mask_function(9), True),
    "a prompt in chunks": ("meta", torch.bfloat16, partial(chain, 1, 4096), chunked(9, "meta"), False),
    "a tree of 300": ("meta", torch.bfloat16, partial(broad, 300), causal_mask_function, False),
    "a tree on a CPU": ("cpu", torch.float32, partial(broad, 9), causal_mask_function, can_load()),
    "a prompt on a CPU": ("cpu", torch.float32, partial(chain, 1, 300), causal_mask_function, False),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_prompts_go_by_the_kernel_on_gpus_and_by_a_bias_on_cpus(name, monkeypatch):
    device, dtype, topology, pattern, packed = PATHS[name]
    monkeypatch.setattr(specdec_kernels, "DEVICES", {"meta"})
    tree = topology(device=device)
    nodes = tree.parents.shape[1]
    view = View(torch.zeros(1, dtype=torch.int64, device=device), tree, nodes, nodes)
    found = mask(mask_function=pattern, q_offset=view, device=torch.device(device), dtype=dtype, local_size=9)
    assert found is not None and found.dtype == (torch.int32 if packed else dtype)
    assert not packed or found.nbytes <= 40 * nodes


def test_on_a_gpu_a_bias_meets_as_many_heads_of_keys_as_of_queries(monkeypatch):
    calls = []

    def noted(query, key, value, *, attn_mask, scale, enable_gqa):
        calls.append((key.shape[1], value.shape[1], enable_gqa))
        return query

    monkeypatch.setattr(reference, "scaled_dot_product_attention", noted)
    for device in ("cpu", "meta"):
        query, key, bias = (torch.empty(1, *shape, device=device) for shape in ((8, 3, 4), (2, 5, 4), (1, 3, 5)))
        reference.biased_attention(query, key, key, bias)
    assert calls == [(2, 2, True), (8, 8, False)]


def test_scores_that_are_written_out_are_those_of_few_queries(monkeypatch):
    query, key, bias = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 1, 20, 30)
    whole = reference.biased_attention(query, key, key, bias, softcap=2.0, sinks=torch.ones(4))
    monkeypatch.setattr(reference, "QUERIES", 7)
    assert (
        reference.biased_attention(query, key, key, bias, softcap=2.0, sinks=torch.ones(4)) - whole
    ).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["none", "chain", "dynamic", "layers left out", "heads", "features"])
def test_where_there_is_a_kernel_no_dense_mask_is_built(name, asked, monkeypatch):
    expected = texts(DRAFTERS[name](DRAFT), "eager")
    monkeypatch.setattr(View, "bias", lambda *_: pytest.fail("a dense mask"))
    for engine in ("eager", "graph"):
        asked.clear()
        assert all(map(torch.equal, texts(DRAFTERS[name](DRAFT), engine), expected))
        # two bounds and one word, however long the cache is
        assert asked and all(answer.shape[3] == 3 for answer in asked)
