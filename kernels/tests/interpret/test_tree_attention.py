"""The Triton kernel computes what the specification says: interpreted, on CPU tensors, with new inputs each run."""

import os
import runpy
import secrets
from pathlib import Path

import pytest
import torch
from attention_cases import Case, assert_right, draw

from specdec_kernels.backend import CHIPS
from specdec_kernels.triton import tree_attention as kernels

torch.set_num_threads(1)


@pytest.fixture
def seed():
    """Printed when a test fails; SEED=... runs it again."""
    seed = int(os.environ.get("SEED", secrets.randbits(32)))
    print(f"SEED={seed}")
    return seed


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that nobody has written to is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_kernel_is_right(case, seed, launch=kernels.tree_attention):
    arguments = draw(case, seed)
    assert_right(arguments, launch(**arguments, splits=case.splits))


HEADS = {"multi_head": (3, 3), "grouped": (6, 2), "multi_query": (5, 1)}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_any_grouping_of_heads_in_any_dtype(heads, dtype, seed):
    count, kv_heads = HEADS[heads]
    assert_kernel_is_right(Case(7, 150, count, kv_heads, batch=3, dtype=dtype), seed)


@pytest.mark.parametrize("nodes", [1, 31, 32, 33])
@pytest.mark.parametrize("length", [0, 1, 64, 129])
def test_any_tree_after_any_prefix(nodes, length, seed):
    assert_kernel_is_right(Case(nodes, length, 2, 1, splits=1 + nodes % 2, dtype=torch.float16), seed)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 8), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_any_size_of_heads(head_dim, value_dim, seed):
    assert_kernel_is_right(Case(5, 90, 2, 1, head_dim, value_dim, dtype=torch.bfloat16, batch=2), seed)


@pytest.mark.parametrize("window", [1, 17, 65, 200])
@pytest.mark.parametrize("splits", [1, 3])
def test_windows_count_positions(window, splits, seed):
    assert_kernel_is_right(Case(13, 140, 2, 2, window=window, splits=splits, batch=3, dtype=torch.float16), seed)


@pytest.mark.parametrize("splits", [2, 8])
def test_splits_merge_with_sinks_and_softcap(splits, seed):
    case = Case(9, 200, 4, 2, softcap=2.0, sinks=True, splits=splits, batch=2)
    assert_kernel_is_right(case, seed)


def test_splits_that_a_short_text_leaves_nothing_for_write_no_result(seed, monkeypatch):
    written, launch = [], kernels.merge_kernel

    class Noted:
        def __getitem__(self, grid):
            def run(parts, *arguments, **options):
                written.extend(not part.isnan().any() for part in parts)
                launch[grid](parts, *arguments, **options)

            return run

    arguments = draw(Case(5, 300, 2, 1), seed)
    arguments["lengths"].fill_(40)  # two tiles of slots; a third one of nodes
    monkeypatch.setattr(kernels, "merge_kernel", Noted())
    assert_right(arguments, kernels.tree_attention(**arguments, splits=5))
    assert written == [True, True, True, False, False]


def test_queries_may_be_the_last_nodes_of_a_tree(seed):
    assert_kernel_is_right(Case(5, 70, earlier=50, window=20, batch=2), seed)


LARGE = [Case(256, 20, 1, 1), Case(3, 4000, 1, 1, dtype=torch.bfloat16), Case(2, 640, 1, 1, splits=40)]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_largest_tree_a_long_prefix_and_many_splits(case, seed):
    assert_kernel_is_right(case, seed)


@pytest.fixture
def descriptors(monkeypatch):
    """The blocks of those that were made, on a chip that has the copy engine."""
    monkeypatch.setattr(kernels, "chip", lambda: CHIPS["sm_90"]._replace(processors=4, overlaps=False))
    monkeypatch.setattr(kernels, "_refusals", [])
    blocks, make = [], kernels.TensorDescriptor

    def noted(x, shape, strides, block):
        blocks.append(block)
        assert strides == sorted(strides, reverse=True)
        return make(x, shape, strides, block)

    monkeypatch.setattr(kernels, "TensorDescriptor", noted)
    return blocks


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("nodes", [3, 40])
def test_tiles_through_the_copy_engine(head_dim, nodes, seed, descriptors):
    assert_kernel_is_right(Case(nodes, 300, 4, 2, head_dim, dtype=torch.bfloat16, window=150), seed)
    assert [block[:3:2] for block in descriptors] == [[1, 1]] * 2  # slots come before heads, as in the cache


def test_tiles_of_contiguous_heads_through_the_copy_engine(seed, descriptors):
    arguments = draw(Case(9, 300, 4, 2, 64, dtype=torch.bfloat16, window=150), seed)
    arguments |= {name: arguments[name].contiguous() for name in ("key", "value")}
    assert_right(arguments, kernels.tree_attention(**arguments))
    assert [block[:2] for block in descriptors] == [[1, 1]] * 2


def test_keys_and_values_that_lie_differently_are_loaded_without_the_copy_engine(seed, descriptors):
    arguments = draw(Case(9, 200, 4, 2, 64, dtype=torch.bfloat16), seed)
    arguments["key"] = arguments["key"].contiguous()
    assert_right(arguments, kernels.tree_attention(**arguments))
    assert not descriptors


def test_a_driver_that_refuses_descriptors_is_named_once_and_done_without(seed, descriptors, monkeypatch):
    asked = []

    def refused(*arguments):
        asked.append(arguments)
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    monkeypatch.setattr(kernels, "TensorDescriptor", refused)
    case = Case(5, 150, 2, 1, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="no descriptors for the copy engine .*invalid argument"):
        assert_kernel_is_right(case, seed)
    assert_kernel_is_right(case, seed + 1)
    assert len(asked) == 1


def test_what_is_wrong_with_a_launch_itself_is_raised(monkeypatch):
    monkeypatch.setattr(kernels, "_refusals", [])

    def launch(axes):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        kernels._launch(launch, kernels.tma.BY_SLOT)
    assert not kernels._refusals


@pytest.mark.parametrize("splits", [1, 4])
def test_a_node_that_sees_nothing_gets_zeros(splits, seed):
    arguments = draw(Case(3, 40, 2, 1), seed)
    arguments["ancestors"][:, 1], arguments["first"][:, 1] = 0, 40
    out, lse = kernels.tree_attention(**arguments, splits=splits)
    assert out[:, 1].eq(0).all() and lse[:, 1].eq(-torch.inf).all()
    assert out[:, ::2].ne(0).all() and lse[:, ::2].isfinite().all()


WINDOWED, UNSPLIT = (Case(60, 140, 2, 2, window=40, splits=splits) for splits in (4, 1))
FULL = Case(9, 90, 4, 2, softcap=2.0, sinks=True, splits=2, batch=3)
MUTANTS = {
    "the window one slot short": ("o_n[None, :] >= b_first", "o_n[None, :] > b_first", WINDOWED),
    "tiles at the window's edge unmasked": ("- tl.max(b_first, 0), 0) //", "- tl.min(b_first, 0), 0) //", WINDOWED),
    "no guard where a row saw nothing yet": ('tl.where(b_m_new == -float("inf"), 0.0, b_m_new)', "b_m_new + 0", UNSPLIT),
    "splits read that nobody wrote": ("(b_weight > 0)[:, :, None] & ", "", FULL),
    "slots after the tree read": ("(tl.reduce_or(b_word, 0) >> o_n & 1) != 0", "o_n >= 0", FULL),
    "slots before the text read": ("o_n >= 0, VALUE_DIM", "o_n >= -1000, VALUE_DIM", FULL),
    "children seen for nodes": ("b_word[:, None] >> o_n[None, :]", "b_word[:, None] >> (o_n[None, :] ^ 1)", FULL),
    "splits that overlap": ("(split + 1) * share", "(split + 1) * share + 1", FULL),
    "the sink in every split": ("tl.where(split == 0, b_sink", "tl.where(split >= 0, b_sink", FULL),
    "the last of many splits left out": ("o_s < splits", "o_s < splits - 1", FULL),
    "only one tile of splits merged": ("tl.range(0, splits, BLOCK_S)", "tl.range(0, BLOCK_S, BLOCK_S)", LARGE[2]),
    "half a softcap": ("1 - 2 / (1 + tl", "1 - 1 / (1 + tl", FULL),
    "values of the first head": ("tl.cast(head, tl.int64) * v_strides[1]", "0 * v_strides[1]", FULL),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN that some of them make
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name, tmp_path):
    right, wrong, case = MUTANTS[name]
    source = Path(kernels.__file__).read_text("utf-8")
    assert source.count(right) == 1
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, wrong), "utf-8")
    mutant = runpy.run_path(str(path))
    with pytest.raises(AssertionError):
        assert_kernel_is_right(case, 0, mutant["tree_attention"])
