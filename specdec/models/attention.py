"""Tree attention for unmodified transformers models, through their attention and mask interfaces.

The model asks for a mask once per layer kind and says by a function of positions which pairs that kind may see (causal,
sliding, chunked). We answer with that pattern evaluated at the positions of the tree nodes, and restricted to the
committed prefix and each node's own ancestors: in the words of `specdec_kernels.tree_attention` where that has a kernel
for it, else as a dense bias; all layers of the kind share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

import specdec_kernels
from specdec.tree import Topology
from specdec_kernels import tree_attention
from specdec_kernels.reference import tree_attention as reference
from specdec_kernels.tree_attention import MAX_NODES, supports

NAME = "specdec_tree"  # no "sdpa" or "flex_attention" in it: transformers would apply their support checks


@dataclass(eq=False)
class View:
    """What the nodes of one forward pass may see: the committed prefix of their row, and their ancestors.

    Slot s of row b holds the committed token s when s < lengths[b], else node s - lengths[b] of the tree.
    """

    lengths: Tensor  # [batch] int64: committed slots of each row
    topology: Topology  # of the tree so far
    count: int  # the last `count` nodes of the topology are the queries
    slots: int  # slots attended to, a host bound on every row's lengths + nodes

    @cached_property
    def positions(self) -> Tensor:
        """[batch, count] int64: logical positions of the queries."""
        return self.lengths[:, None] + self.topology.depths[:, -self.count :]

    def prepare(self) -> None:
        """Have computed what masks are made of: `cached_property` itself cannot be compiled."""
        _ = self.positions, self._allowed, self._slot_positions, self.topology.ancestors, self.topology.depths

    def packed_mask(self, window: int | None) -> Tensor | None:
        """[batch, 1, count, 2 + word] int32: the same for the kernel, None for trees and patterns that it does not know.

        Of each query the first slot that it sees, the length of its prefix, and the bits of the nodes that it sees. Models
        may slice it like any mask.

        Args:
            window: how many positions, its own included, a query may see; None if there is another pattern.
        """
        depths = self.topology.depths
        if window is None or depths.shape[1] > MAX_NODES:  # long prompts are read as long chains
            return None
        near = depths[:, -self.count :, None] - depths[:, None] < window
        words = reference.pack(self.topology.ancestors[:, -self.count :] & near)
        bounds = torch.stack([self.positions - window + 1, self.lengths[:, None].expand(-1, self.count)], 2)
        return torch.cat([bounds.clamp(min=0).to(torch.int32), words], 2)[:, None]

    @cached_property
    def _index(self) -> Tensor:
        """[batch, slot] int64: column of `Topology.visible` that answers for each slot."""
        slots = torch.arange(1, self.slots + 1, device=self.lengths.device)
        return (slots - self.lengths[:, None]).clamp_(0, self.topology.parents.shape[1] + 1)

    @cached_property
    def _allowed(self) -> Tensor:
        """[batch, 1, count, slot] bool: prefix and ancestors, before the layer kind's own pattern."""
        visible = self.topology.visible[:, -self.count :]
        index = self._index[:, None].expand(-1, self.count, -1)
        return visible.gather(2, index)[:, None]

    @cached_property
    def _slot_positions(self) -> Tensor:
        """[batch, 1, 1, slot] int64: logical positions of the keys."""
        slots = torch.arange(self.slots, device=self.lengths.device)
        depth = nn.functional.pad(self.topology.depths, (1, 1)).gather(1, self._index)
        return torch.where(self._index == 0, slots, self.lengths[:, None] + depth)[:, None, None]

    def bias(self, pattern: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        """[batch, 1, count, slot]: 0 where seen, -inf where not, for one kind of layer."""
        allowed = self._allowed
        if pattern is not causal_mask_function:  # ancestors and prefix are causal as they stand
            batch = torch.arange(len(self.lengths), device=self.lengths.device)[:, None, None, None]
            queries = self.positions[:, None, :, None]
            allowed = allowed & pattern(batch, batch.new_zeros(()), queries, self._slot_positions)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


_AND, _SLIDING = and_masks(causal_mask_function).__code__, sliding_window_overlay(0).__code__


def _window(pattern: Any, size: int | None, custom: bool, config: Any) -> int | None:
    """How many positions, its own included, a query of transformers' causal or sliding pattern sees; None for others.

    Args:
        pattern: the function.
        size: of the sliding window or the chunk that it was made with, if transformers says so.
        custom: whether other functions were combined with it.
        config: the model's.
    """
    if pattern is causal_mask_function:
        return 1 << 30
    if getattr(pattern, "__code__", None) is not _AND:
        return None
    if torch.compiler.is_compiling():  # which cannot look into functions
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
    """`q_offset` is what the cache says of the queries of this forward pass: ours answer with a `View`.

    None if the mask is not over our cache: attention to something else than this text.
    """
    if not isinstance(q_offset, View):
        return None
    view = q_offset
    if device.type in specdec_kernels.DEVICES:
        packed = view.packed_mask(_window(mask_function, local_size, use_vmap, config))
        if packed is not None:
            return packed
    return view.bias(mask_function, dtype).to(device)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if attention_mask is None:
        raise ValueError(
            f"{type(module).__name__} attends without a causal mask over its cache, so it cannot follow a tree: it reads both "
            "ways (a BERT-like model has to be loaded with is_decoder=True), or something else than the text."
        )
    options = kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux")
    if attention_mask.is_floating_point():
        return reference.biased_attention(query, key, value, attention_mask, *options), None
    first, lengths, ancestors = attention_mask[:, 0, :, 0], attention_mask[:, 0, 0, 1], attention_mask[:, 0, :, 2:]
    fits = supports(query.dtype, query.shape[3], value.shape[3])
    kernel = tree_attention if fits else reference.tree_attention
    return kernel(query, key, value, first, lengths, ancestors, *options)[0], None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
