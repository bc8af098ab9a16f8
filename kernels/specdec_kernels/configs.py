"""How kernels are tiled on each chip: a static table, checked by `kernels/tools/aot_gate.py`; nothing is tuned at run time."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Tiles of block_m rows x block_n slots."""

    block_m: int
    block_n: int
    warps: int
    stages: int  # of the software pipeline over the unmasked tiles
    resident: int  # programs of this kernel, as compiled, that a multiprocessor holds at once (`plan.resident`)


# (arch, head_dim padded to a power of two, rows) -> configuration of tree attention for 16-bit elements. `rows` is the most
# that one program takes: 16 when no more than 16 rows share a KV head, 64 when no more than 64, else the largest there is.
ATTENTION = {
    ("sm_80", 64, 16): Config(16, 64, 4, 3, 4),
    ("sm_80", 64, 64): Config(64, 64, 4, 3, 2),
    ("sm_80", 64, 128): Config(128, 64, 8, 2, 1),
    ("sm_80", 128, 16): Config(16, 64, 4, 2, 3),
    ("sm_80", 128, 64): Config(64, 64, 8, 2, 1),
    ("sm_80", 128, 128): Config(128, 32, 8, 2, 1),
    ("sm_80", 256, 16): Config(16, 32, 4, 2, 2),
    ("sm_80", 256, 64): Config(64, 32, 8, 2, 1),
    ("sm_90", 64, 16): Config(16, 64, 4, 3, 4),
    ("sm_90", 64, 64): Config(64, 64, 4, 3, 2),
    ("sm_90", 64, 128): Config(128, 128, 8, 2, 1),
    ("sm_90", 128, 16): Config(16, 64, 4, 3, 3),
    ("sm_90", 128, 64): Config(64, 64, 4, 3, 2),
    ("sm_90", 128, 128): Config(128, 128, 8, 2, 1),
    ("sm_90", 256, 16): Config(16, 32, 4, 3, 2),
    ("sm_90", 256, 64): Config(64, 32, 8, 2, 1),
    ("sm_90", 256, 128): Config(128, 32, 8, 2, 1),
    ("sm_100", 64, 16): Config(16, 64, 4, 3, 4),
    ("sm_100", 64, 64): Config(64, 64, 4, 3, 3),
    ("sm_100", 64, 128): Config(128, 64, 8, 3, 1),
    ("sm_100", 128, 16): Config(16, 64, 4, 3, 3),
    ("sm_100", 128, 64): Config(64, 64, 4, 3, 2),
    ("sm_100", 128, 128): Config(128, 64, 8, 3, 1),
    ("sm_100", 256, 16): Config(16, 32, 4, 3, 2),
    ("sm_100", 256, 64): Config(64, 32, 8, 2, 1),
    ("gfx942", 64, 16): Config(16, 64, 4, 2, 3),
    ("gfx942", 64, 64): Config(64, 64, 4, 2, 2),
    ("gfx942", 64, 128): Config(128, 32, 8, 2, 1),
    ("gfx942", 128, 16): Config(16, 64, 4, 2, 2),
    ("gfx942", 128, 64): Config(64, 64, 4, 2, 1),
    ("gfx942", 128, 128): Config(128, 32, 8, 2, 1),
    ("gfx942", 256, 16): Config(16, 32, 4, 2, 2),
    ("gfx942", 256, 64): Config(64, 16, 8, 2, 1),
}

# For float32, every product of which takes three of the tensor cores: exactness for tests and small models, not speed.
EXACT = {64: Config(16, 32, 4, 2, 3), 128: Config(16, 32, 4, 2, 1), 256: Config(16, 16, 8, 1, 1)}


def attention_config(arch: str, dim: int, rows: int, element_size: int) -> Config:
    """For `rows` rows that share a KV head, of `dim` (a power of two from 64 to 256) elements."""
    if element_size > 2:
        return EXACT[dim]
    fitting = [limit for limit in (16, 64, 128) if (arch, dim, limit) in ATTENTION]
    return ATTENTION[arch, dim, next((limit for limit in fitting if rows <= limit), fitting[-1])]


class RecurrenceConfig(NamedTuple):
    """Tiles of block_k key channels x block_v value channels of a state."""

    block_k: int
    block_v: int
    warps: int
    stages: int  # of the software pipeline over the tiles of a program


# On every chip, for every size. Products are of float32, each three of the tensor cores, whose operands are held in registers:
# wider tiles spill, or leave room for two programs on a multiprocessor in place of three.
RECURRENCE = RecurrenceConfig(16, 32, 4, 3)


class StoredConfig(NamedTuple):
    """Blocks of `tokens` x `tiles` of 16 outputs of a product with a stored matrix."""

    tokens: int
    tiles: int
    warps: int
    stages: int  # of the software pipeline over groups of inputs


# By the most tokens of a launch, on every chip. A group of a tile is 256 or 512 bytes, so that many stages are under way.
STORED = {16: StoredConfig(16, 4, 4, 6), 64: StoredConfig(64, 4, 4, 6)}
