"""Tree attention for unmodified transformers models, through their attention and mask interfaces.

A model asks for a mask once per kind of layer. It gives a function of two positions that says which pairs the kind may see
(causal, sliding, chunked). Our mask is that function at the positions of the tree nodes, restricted to the committed prefix
and each node's ancestors. All layers of the kind share it. It is packed bits where `specdec_kernels.tree_attention` has a
kernel for it, else a dense bias.

A prompt is read as a chain of up to 4096 nodes. On a GPU the kernel takes MAX_NODES of its queries at a time, for which what is
before them is prefix, so that no memory grows with queries times slots. Llama 3 8B at 128k tokens, in bfloat16: 16.1 GB of
weights, 17.2 GB of keys and values, and in the pass that reads the last 4096 tokens 0.4 GB of activations, 0.2 MB of masks and
8 MB of partial results. A dense bias would take 1.07 GB there; and under a bias, with heads that share keys, torch's attention
is its math kernel, which writes 69 GB of float32 scores more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

import specdec_kernels
from specdec.models.ready import autocast_dtype
from specdec.tree import Topology
from specdec_kernels import attention, tree_attention
from specdec_kernels.attention import DTYPES, serves
from specdec_kernels.cpu import can_load
from specdec_kernels.reference import convolution
from specdec_kernels.reference import tree_attention as reference
from specdec_kernels.tree_attention import MAX_NODES, supports

NAME = "specdec_tree"  # no "sdpa" or "flex_attention" in it: transformers would apply their support checks


@dataclass(eq=False)
class View:
    """What the nodes of one forward pass may see: the committed prefix of their row, and their ancestors.

    Slot s of row b holds the committed token s when s < lengths[b], else node s - lengths[b] of the tree. With two committed
    tokens, a tree of three nodes and 6 slots, a row is: token 0, token 1, node 0, node 1, node 2, unused.
    """

    lengths: Tensor  # [batch] int64: committed slots of each row
    topology: Topology  # the tree so far
    count: int  # the last `count` nodes of the topology are the queries
    slots: int  # slots attended to: a host bound on every row's lengths + nodes

    @property
    def first(self) -> int:
        """The first of the queries among the nodes."""
        return self.topology.parents.shape[1] - self.count

    @cached_property
    def positions(self) -> Tensor:
        """[batch, count] int64: the position of each query in its text."""
        return self.lengths[:, None] + self.topology.depths[:, -self.count :]

    @cached_property
    def ancestors(self) -> Tensor:
        """[batch, count, node] bool: whether a node is the query or an ancestor of it."""
        return self.topology.ancestors[:, -self.count :]

    @cached_property
    def depths(self) -> Tensor:
        """[batch, node] int64: edges from the root to each node."""
        return self.topology.depths

    def prepare(self, nodes: int, sizes: Iterable[int] = ()) -> None:
        """Compute the cached properties that masks are made of: torch.compile cannot follow `cached_property`.

        Args:
            nodes: absent nodes are added up to so many, so that masks of all levels of a tree have one shape.
            sizes: of `windows` that will be asked for.
        """
        added = 0, nodes - self.topology.parents.shape[1]
        for name in ("ancestors", "depths"):
            part = getattr(self, name).clone(memory_format=torch.contiguous_format)  # code is for one layout
            setattr(self, name, nn.functional.pad(part, added))
        _ = self.positions, [self.windows(size) for size in sizes]

    def windows(self, size: int) -> Tensor:
        """[batch, count, size] int64: where a convolution finds the inputs that each query sees."""
        if size not in self._windows:
            self._windows[size] = convolution.windows(self.topology.parents, size)[:, self.first :]
        return self._windows[size]

    @cached_property
    def _windows(self) -> dict[int, Tensor]:
        return {}

    def packed_mask(self, window: int | None) -> Tensor | None:
        """[batch, 1, count, 2 + word] int32: the mask for the kernel; None for trees and patterns that it does not support.

        It holds, for each query, the first slot that the query sees, the length of its prefix, and the bits of the nodes
        behind that prefix that it sees. In chains of more than MAX_NODES nodes, every MAX_NODES queries have a prefix of their
        own, all that is before them; otherwise it is that of the row. Models may slice it like any mask.

        Args:
            window: how many positions, its own included, a query may see; None for other patterns.
        """
        if window is None:
            return None
        if self.depths.shape[1] <= MAX_NODES:
            near = (self.positions - self.lengths[:, None])[..., None] - self.depths[:, None] < window
            words = reference.pack(self.ancestors & near)
            prefix = self.lengths[:, None].expand(-1, self.count)
        elif self.topology.is_chain:
            ages = torch.arange(MAX_NODES, device=self.lengths.device)
            ages = ages[:, None] - ages  # [query, node]
            words = reference.pack((ages >= 0) & (ages < window))
            words = words.repeat(-(-self.count // MAX_NODES), 1)[: self.count].expand(len(self.lengths), -1, -1)
            prefix = self.positions[:, ::MAX_NODES].repeat_interleave(MAX_NODES, 1)[:, : self.count]
        else:
            return None
        bounds = torch.stack([self.positions - window + 1, prefix], 2)
        return torch.cat([bounds.clamp(min=0).to(torch.int32), words], 2)[:, None]

    @property
    def _index(self) -> Tensor:
        """[batch, slot] int64: 0 for slots of the prefix, 1 + the node in slots of nodes, and one more for unused slots."""
        slots = torch.arange(1, self.slots + 1, device=self.lengths.device)
        return (slots - self.lengths[:, None]).clamp_(0, self.depths.shape[1] + 1)

    @property
    def _allowed(self) -> Tensor:
        """[batch, 1, count, slot] bool: whether a slot is in the query's prefix or holds one of its ancestors."""
        visible = nn.functional.pad(nn.functional.pad(self.ancestors, (1, 0), value=True), (0, 1))
        index = self._index[:, None].expand(-1, self.count, -1)
        return visible.gather(2, index)[:, None]

    @property
    def _slot_positions(self) -> Tensor:
        """[batch, 1, 1, slot] int64: the position of each key in its text."""
        slots = torch.arange(self.slots, device=self.lengths.device)
        index = self._index
        depth = nn.functional.pad(self.depths, (1, 1)).gather(1, index)
        return torch.where(index == 0, slots, self.lengths[:, None] + depth)[:, None, None]

    def bias(self, pattern: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        """[batch, 1, count, slot]: the mask of one kind of layer: 0 where a query sees a slot, else -inf."""
        allowed = self._allowed
        if pattern is not causal_mask_function:  # prefix and ancestors are causal already
            batch = torch.arange(len(self.lengths), device=self.lengths.device)[:, None, None, None]
            queries = self.positions[:, None, :, None]
            allowed = allowed & pattern(batch, batch.new_zeros(()), queries, self._slot_positions)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


_AND, _SLIDING = and_masks(causal_mask_function).__code__, sliding_window_overlay(0).__code__


def _window(pattern: Any, size: int | None, custom: bool, config: Any) -> int | None:
    """How many positions, its own included, a query sees under a causal or sliding pattern; None for other patterns.

    Args:
        pattern: transformers' mask function.
        size: the size of its sliding window or chunk, where transformers gives it.
        custom: whether other functions were combined with it.
        config: the model's config.
    """
    if pattern is causal_mask_function:
        return 1 << 30
    if getattr(pattern, "__code__", None) is _SLIDING:
        return size
    if getattr(pattern, "__code__", None) is not _AND:
        return None
    if torch.compiler.is_compiling():  # torch.compile cannot look into a function's closure
        chunks = getattr(config, "attention_chunk_size", None) is not None
        return None if custom or chunks else size
    (parts,) = (cell.cell_contents for cell in pattern.__closure__)
    if len(parts) == 2 and parts[0].__code__ is _SLIDING and parts[1] is causal_mask_function:
        return parts[0].__closure__[0].cell_contents
    return None


def mask(
    *,
    mask_function: Callable[..., Tensor],
    q_offset: Any,
    device: torch.device,
    dtype: torch.dtype,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The mask of one kind of layer, registered with transformers. Our cache passes its `View` as `q_offset`.

    None if `q_offset` is no `View`: the layer attends to something else than this text.
    """
    if not isinstance(q_offset, View):
        return None
    view = q_offset
    if _packs(device, dtype, view.depths.shape[1]):
        packed = view.packed_mask(_window(mask_function, local_size, use_vmap, config))
        if packed is not None:
            return packed
    return view.bias(mask_function, dtype).to(device)


def _packs(device: torch.device, dtype: torch.dtype, nodes: int) -> bool:
    """Whether there are kernels that read packed masks, and are the fastest for so many nodes."""
    few_on_cpu = device.type == "cpu" and dtype in DTYPES and nodes <= MAX_NODES
    return device.type in specdec_kernels.DEVICES or (few_on_cpu and (torch.compiler.is_compiling() or can_load()))


def attend(
    module: object, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if attention_mask is None:
        raise ValueError(
            f"{type(module).__name__} attends without a causal mask over its cache, so it cannot follow a tree: it reads both "
            "ways (a BERT-like model has to be loaded with is_decoder=True), or something else than the text."
        )
    options = kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux")
    if attention_mask.is_floating_point():
        return reference.biased_attention(query, key, value, attention_mask, *options), None
    if (inside := autocast_dtype(query.device)) is not None:  # what torch's own attention casts to
        with torch.autocast(query.device.type, enabled=False):
            return attend(module, query.to(inside), key.to(inside), value.to(inside), attention_mask, **kwargs)
    parts = zip(query.split(MAX_NODES, 2), attention_mask[:, 0].split(MAX_NODES, 1), strict=True)
    outputs = [_attend_packed(part, key, value, packed, *options) for part, packed in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, packed: Tensor, *options: Any) -> Tensor:
    """[batch, node, heads, value_dim]: of queries with one prefix. packed: [batch, node, 2 + word], see `View.packed_mask`."""
    operands = query, key, value, packed[:, :, 0], packed[:, 0, 1], packed[:, :, 2:]
    if query.device.type == "cpu" and serves(query.dtype, value.shape[3]):
        return attention(*operands, *options)
    kernel = tree_attention if supports(query.dtype, query.shape[3], value.shape[3]) else reference.tree_attention
    return kernel(*operands, *options)[0]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
