"""How matrices are stored in fewer bits than float32, and what the products with them are.

A matrix [out, in] lies in tiles of 16 outputs: `[tile, step, 16, n]` with the n inputs of a step of each output side by side.
Outputs and inputs that are missing in the last tile and step are 0.

- bf16: n = 2, bfloat16. x is not rounded, and products are summed in float32.
- int8: n = 4, integers from -127 to 127, with 128 added, and a scale of each output.
- int4: integers from 0 to 15 in groups of 32 inputs, each with a scale and a least value in float16: a weight is
  integer * scale + least, as in GGUF's Q4_1, and in Q4_0 with least = -8 * scale. A group is [4, 16, 4]: byte (v, output, i)
  holds input 4 v + i and, in its upper half, 16 + 4 v + i.

With integers, x is rounded to integers from -127 to 127, with a scale of each token and group of 32 inputs. Products within a
group are exact, and groups are summed in float32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

OUTPUTS, GROUP = 16, 32
LEAST = 2.0**-100  # a group of smaller numbers of x counts as 0: their scale has no inverse


def pack_bf16(weight: Tensor) -> tuple[Tensor]:
    """weight: [out, in] floating point; returns [tile, step, 16, 2] bfloat16."""
    return (_tiles(weight.bfloat16(), 2).contiguous(),)


def unpack_bf16(weight: Tensor) -> Tensor:
    """[16 * tile, 2 * step] float32."""
    return weight.transpose(1, 2).flatten(2).flatten(0, 1).float()


def linear_bf16(x: Tensor, weight: Tensor, out: int) -> Tensor:
    """x: [..., in] float32; weight: of `pack_bf16`; returns [..., out]."""
    return _product(x, unpack_bf16(weight), out)


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [out, in] floating point; returns [tile, step, 16, 4] uint8, of whole groups, and scales [tile, 16] float32."""
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    whole = (weight / torch.where(scale > 0, scale, 1)[:, None]).round() + 128
    stored = _tiles(pad(whole.to(torch.uint8), (0, -weight.shape[1] % GROUP), value=128), 4)
    return stored.contiguous(), pad(scale, (0, -len(scale) % OUTPUTS)).view(-1, OUTPUTS)


def unpack_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """[16 * tile, 4 * step] float32."""
    return (weight.transpose(1, 2).flatten(2).flatten(0, 1).float() - 128) * scale.view(-1, 1)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, out: int) -> Tensor:
    """x: [..., in] float32; weight, scale: of `pack_int8`; returns [..., out]."""
    return _product(rounded(x), unpack_int8(weight, scale), out)


def pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [out, in] floating point; returns [tile, group, 4, 16, 4] uint8, and [tile, group, 2, 16] float16.

    Each group takes the best of three grids: from its least to its largest weight; and around 0 from -8 to 7 steps, of which
    its largest in size is the -8th or the -7th. Weights on one of these stay as they are, up to steps in float16: those of
    GGUF's Q4_0, which llama.cpp makes with and without an importance matrix, and of Q4_1 without one.
    """
    weight = weight.float()
    weight = pad(weight, (0, -weight.shape[1] % GROUP, 0, -weight.shape[0] % OUTPUTS))
    groups = weight.unflatten(1, (-1, GROUP))  # [out, group, 32]
    least, most = groups.aminmax(dim=2)
    extreme = torch.where(most > -least, most, least)
    found = _on_grid(groups, (most - least) / 15, least)
    for step in (extreme / -8, extreme / -7):
        found = _nearer(groups, found, _on_grid(groups, step, -8 * step))
    whole, scales = found[0].to(torch.uint8), torch.stack(found[1:], 2).half()
    tiles = whole.view(-1, OUTPUTS, whole.shape[1], 2, 4, 4)  # [tile, output, group, half, v, i]
    stored = (tiles[:, :, :, 0] | tiles[:, :, :, 1] << 4).permute(0, 2, 3, 1, 4)
    return stored.contiguous(), scales.unflatten(0, (-1, OUTPUTS)).permute(0, 2, 3, 1).contiguous()


def unpack_int4(weight: Tensor, scales: Tensor) -> Tensor:
    """[16 * tile, 32 * group] float32."""
    step, least = scales.float().permute(2, 0, 3, 1)[..., None]  # [tile, 16, group, 1] each
    return (_integers(weight) * step + least).flatten(2).flatten(0, 1)


def linear_int4(x: Tensor, weight: Tensor, scales: Tensor, out: int) -> Tensor:
    """x: [..., in] float32; weight, scales: of `pack_int4`; returns [..., out]."""
    return _product(rounded(x), unpack_int4(weight, scales), out)


def rows(ids: Tensor, weight: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
    """What is stored of the outputs `ids` [n] int64, in n tiles of one output; `unpack_...` unpacks it."""
    at = ids // OUTPUTS, ids % OUTPUTS
    return weight.movedim(-2, 1)[at].unsqueeze(-2), *(each.movedim(-1, 1)[at].unsqueeze(-1) for each in scales)


def rounded(x: Tensor) -> Tensor:
    """x [..., in] rounded in each group, filled up with zeros to whole ones; no numbers in groups where x is not finite."""
    groups = pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    most = groups.abs().amax(-1, True)
    steps = torch.full_like(most, 127)  # a tensor: with a number, torch multiplies by a reciprocal, and rounds twice
    whole = (groups * torch.where(most >= LEAST, steps / most, 0)).round()
    finite = most.isfinite()
    return (
        torch.where(finite, whole, 0) * torch.where(finite, torch.where(most >= LEAST, most / steps, 0), torch.nan)
    ).flatten(-2)


def _tiles(weight: Tensor, n: int) -> Tensor:
    """[tile, step, 16, n] of [out, in]."""
    weight = pad(weight, (0, -weight.shape[1] % n, 0, -weight.shape[0] % OUTPUTS))
    return weight.view(-1, OUTPUTS, weight.shape[1] // n, n).transpose(1, 2)


def _on_grid(groups: Tensor, step: Tensor, least: Tensor) -> tuple[Tensor, ...]:
    """The nearest integers from 0 to 15 [..., 32], and the grid that they count on: step and least [...], of float16."""
    step, least = step.half().float(), least.half().float()
    whole = (groups - least[..., None]) / torch.where(step != 0, step, 1)[..., None]
    return whole.round().clamp(0, 15), step, least


def _nearer(groups: Tensor, first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of two answers of `_on_grid`, for each group the one with less error."""
    errors = [
        (whole * step[..., None] + low[..., None] - groups).square().sum(2) for whole, step, low in (first, second)
    ]
    better = errors[1] < errors[0]
    return torch.where(better[..., None], second[0], first[0]), *map(
        partial(torch.where, better), second[1:], first[1:]
    )


def _integers(weight: Tensor) -> Tensor:
    """[tile, 16, group, 32] uint8, from 0 to 15, of [tile, group, 4, 16, 4]."""
    halves = torch.stack([weight & 15, weight >> 4], 2)  # [tile, group, half, v, output, i]
    return halves.permute(0, 4, 1, 2, 3, 5).flatten(3)


def _product(x: Tensor, weight: Tensor, out: int) -> Tensor:
    return (pad(x, (0, weight.shape[1] - x.shape[-1])) @ weight.T)[..., :out]
