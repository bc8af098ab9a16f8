"""A kind of cache that rounds keys and values to 8 bits: that changes the model's law, and drafts may not change it further."""

from dataclasses import replace

import torch

from certificates.cases import llama
from specdec import ModelTarget
from specdec.drafters import ModelDrafter
from specdec.models.cache import TreeCache
from specdec.testing import exact_law


class Int8Cache(TreeCache):
    def stored(self, slab):
        return replace(slab, dim=slab.dim + 4, dtype=torch.int8)  # each vector's scale lies behind it

    def packed(self, states):
        scale = states.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / 127
        return torch.cat([(states / scale).round().to(torch.int8), scale.view(torch.int8)], -1)

    def unpacked(self, stored, dtype):
        return stored[..., :-4].to(dtype) * stored[..., -4:].contiguous().view(torch.float32).to(dtype)


target = ModelTarget(llama(seed=0, layers=2), cache=Int8Cache)
drafted, alone = (exact_law(target, (0, 1, 0), drafter) for drafter in (ModelDrafter(llama(seed=1, layers=1)), None))
assert drafted.total_variation(alone.probabilities) <= 1e-12
