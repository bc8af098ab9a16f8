"""The recurrences of transformers' layers: what each token puts into a state, and what it reads from it.

A modelling module computes a recurrence by a function of its own for many tokens: the `functions` of a `Recurrence`. An object
of that class is one call of it, with the function's own arguments put into the terms of `specdec_kernels.reference`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from specdec.tree import Topology
from specdec_kernels import fold_linear_attention, gated_delta, linear_attention
from specdec_kernels.reference.selective_scan import fold_selective_scan, selective_scan

Parts = dict[str, Tensor]


class Recurrence(ABC):
    """One call of a recurrence, over the tokens of a pass.

    Class attributes:
        functions: the names of the functions in modelling modules that compute it for many tokens.

    Attributes:
        own: by name, [batch, node, ...]: what each token reads by, of no use later.
        kept: by name, [batch, node, ...]: what each token puts in. `read` may fill parts of it.
        fixed: by name: what is the same for all tokens.
        state: the shape of one row's state.
        dtype: that of the state: the model's, but at least float32.
    """

    functions: ClassVar[tuple[str, ...]]
    own: Parts
    kept: Parts
    fixed: Parts
    state: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    @abstractmethod
    def read(own: Parts, kept: Parts, fixed: Parts, state: Tensor, topology: Topology) -> Tensor:
        """[batch, node, ...]: what the last nodes of a tree read; `kept` is of all nodes, `own` of the last alone."""

    @staticmethod
    @abstractmethod
    def fold(state: Tensor, kept: Parts, fixed: Parts, path: Tensor, count: Tensor) -> None:
        """Bring the state to the end of the first count[b] nodes of path[b]: [batch, n] and [batch] int64."""

    @abstractmethod
    def result(self, read: Tensor) -> Tensor:
        """What the function returns beside the state, from what was read."""

    def continued(self, original: Callable[..., Any], state: Tensor, real: Tensor) -> tuple[Tensor, Tensor] | None:
        """(result, state) by the modelling module's own function, or None if that does not go on from a state.

        Args:
            original: the function, or a kernel in its place, which may name its first arguments otherwise.
            state: the state before the first token.
            real: [batch] int64: so many tokens of each row count; those after leave the state as it is.
        """
        return None


class GatedDelta(Recurrence):
    """The gated delta rule, with a decay for each head or, in Kimi Delta Attention, for each channel of the key."""

    functions = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")

    def __init__(
        self,
        query: Tensor,  # [batch, node, key_head, dim]
        key: Tensor,  # [batch, node, key_head, dim]
        value: Tensor,  # [batch, node, head, value_dim]
        g: Tensor,  # [batch, node, head] or [batch, node, head, dim]
        beta: Tensor,  # [batch, node, head]
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ):
        self._given, self._g, self._beta = (query, key, value), g, beta
        self._normed = use_qk_l2norm_in_kernel
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(self.dtype), key.to(self.dtype)
        if use_qk_l2norm_in_kernel:
            query, key = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (query, key))
        self.own = {"query": query * query.shape[3] ** -0.5, "value": value, "beta": beta}
        self.kept = {"key": key, "decay": g, "update": torch.empty_like(value, dtype=self.dtype)}
        self.fixed, self.state = {}, (value.shape[2], key.shape[3], value.shape[3])

    @staticmethod
    def read(own: Parts, kept: Parts, fixed: Parts, state: Tensor, topology: Topology) -> Tensor:
        return gated_delta(**own, **kept, state=state, ancestors=topology.ancestors.to(state.device))

    @staticmethod
    def fold(state: Tensor, kept: Parts, fixed: Parts, path: Tensor, count: Tensor) -> None:
        fold_linear_attention(state, kept["key"], kept["update"], kept["decay"], path, count)

    def result(self, read: Tensor) -> Tensor:
        return read.to(self._given[0].dtype)

    def continued(self, original: Callable[..., Any], state: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        counts = _counts(self._beta, real)
        decay = self._g.masked_fill(~(counts if self._g.dim() == 3 else counts[..., None]), 0)
        options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": self._normed}
        return original(*self._given, g=decay, beta=self._beta.masked_fill(~counts, 0), **options)


class StateSpace(Recurrence):
    """SSD, the recurrence of Mamba-2.

    Some models bound the step dt where they read many tokens, as `model.generate` has them read prompts, and not where they
    read one at a time. So tokens of a prompt have the bound here, in whatever pass they are read, and those written have not.
    """

    functions = ("mamba2_chunk_scan",)

    def __init__(
        self,
        hidden_states: Tensor,  # [batch, node, head, dim]
        dt: Tensor,  # [batch, node, head]
        A: Tensor,  # [head]
        B: Tensor,  # [batch, node, group, state]
        C: Tensor,  # [batch, node, group, state]
        chunk_size: int,
        D: Tensor | None = None,  # [head]
        dt_bias: Tensor | None = None,  # [head]
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        *,
        in_prompt: Tensor,  # [batch, node] bool: which tokens are of a prompt
        **_: Any,
    ):
        step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        step = softplus(step) if dt_softplus else step
        step = step.clamp(*dt_limit).where(in_prompt.to(step.device)[..., None], step)
        self._given, self._skip, self._chunk_size = (hidden_states, step, A, B, C), D, chunk_size
        self.dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        step = step.to(self.dtype)
        self.own = {"query": C}
        self.kept = {"key": B, "value": hidden_states * step[..., None], "decay": A * step}
        self.fixed, self.state = {}, (hidden_states.shape[2], B.shape[3], hidden_states.shape[3])

    @staticmethod
    def read(own: Parts, kept: Parts, fixed: Parts, state: Tensor, topology: Topology) -> Tensor:
        return linear_attention(**own, **kept, state=state, ancestors=topology.ancestors.to(state.device))

    @staticmethod
    def fold(state: Tensor, kept: Parts, fixed: Parts, path: Tensor, count: Tensor) -> None:
        fold_linear_attention(state, **kept, path=path, count=count)

    def result(self, read: Tensor) -> Tensor:
        inputs, skip = self._given[0], self._skip
        return (read if skip is None else read + inputs * skip[:, None]).contiguous()

    def continued(self, original: Callable[..., Any], state: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        inputs, step, *others = self._given
        options = {"chunk_size": self._chunk_size, "D": self._skip, "return_final_states": True}
        state = state.transpose(2, 3).contiguous()
        step = step.masked_fill(~_counts(step, real), 0)
        out, state = original(inputs, step, *others, initial_states=state, **options)
        return out, state.transpose(2, 3)


class SelectiveScan(Recurrence):
    """The recurrence of Mamba. Modelling modules' own function for many tokens takes no state, so it is not used."""

    functions = ("mamba_selective_scan",)

    def __init__(
        self,
        hidden_states: Tensor,  # [batch, channel, node]
        dt: Tensor,  # [batch, channel, node]
        A: Tensor,  # [channel, state]
        B: Tensor,  # [batch, state, node]
        C: Tensor,  # [batch, state, node]
        D: Tensor | None = None,  # [channel]
        z: Tensor | None = None,  # [batch, channel, node]
        delta_bias: Tensor | None = None,  # [channel]
        delta_softplus: bool = False,
        **_: Any,
    ):
        step = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
        step = softplus(step) if delta_softplus else step
        self._inputs, self._skip, self._gate = hidden_states, D, z
        self.dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        step = step.to(self.dtype).transpose(1, 2)
        self.own = {"read": C.transpose(1, 2)}
        self.kept = {"write": B.transpose(1, 2), "value": hidden_states.transpose(1, 2) * step, "step": step}
        self.fixed, self.state = {"rate": A}, tuple(A.shape)

    @staticmethod
    def read(own: Parts, kept: Parts, fixed: Parts, state: Tensor, topology: Topology) -> Tensor:
        return selective_scan(**own, **kept, **fixed, state=state, parents=topology.parents.to(state.device))

    @staticmethod
    def fold(state: Tensor, kept: Parts, fixed: Parts, path: Tensor, count: Tensor) -> None:
        fold_selective_scan(state, **kept, **fixed, path=path, count=count)

    def result(self, read: Tensor) -> Tensor:
        out = read.transpose(1, 2)
        out = out if self._skip is None else out + self._inputs * self._skip[:, None]
        return (out if self._gate is None else out * silu(self._gate)).to(self._inputs.dtype)


def _counts(like: Tensor, real: Tensor) -> Tensor:
    """[batch, node, 1] bool: whether a token counts, for a tensor [batch, node, head]."""
    return (torch.arange(like.shape[1], device=like.device) < real[:, None])[..., None]


# by the names of functions
KINDS: dict[str, Any] = {name: kind for kind in (GatedDelta, StateSpace, SelectiveScan) for name in kind.functions}
