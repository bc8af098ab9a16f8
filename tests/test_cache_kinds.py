"""A KV cache may store keys and values in another form; everything else goes on as it does."""

from dataclasses import replace

import pytest
import torch
from tiny_models import GATE, PROMPTS, llama, reference

import specdec
from specdec.drafters import ModelDrafter
from specdec.models.cache import TreeCache
from specdec.testing import Tape
from specdec.trees import Widths

torch.set_num_threads(1)
ENGINES = {"eager": lambda: "eager", "tape": lambda: specdec.Graphs(capture=Tape)}


class Twice(TreeCache):
    """Stores two copies of what it is given, one behind the other, and reads the second: nothing is rounded."""

    def stored(self, slab):
        return replace(slab, dim=2 * slab.dim)

    def packed(self, states):
        return torch.cat([torch.zeros_like(states), states], -1)

    def unpacked(self, stored, dtype):
        return stored[..., stored.shape[-1] // 2 :]


class Half(Twice):
    """Reads half of what it was given, so that its texts are others."""

    def unpacked(self, stored, dtype):
        return super().unpacked(stored, dtype) / 2


@pytest.mark.parametrize("name", GATE)
def test_cache_that_stores_in_another_shape_gives_the_text_of_transformers(name):
    model = GATE[name]()
    target, drafter = specdec.ModelTarget(model, Twice), ModelDrafter(model, Widths([2, 1]))
    out = specdec.generate(target, PROMPTS, drafter, max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [reference(model, p).tolist() for p in PROMPTS]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_reads_what_was_packed(engine):
    model = llama(dtype=torch.float32)
    options = {"max_new_tokens": 16, "engine": ENGINES[engine]()}
    found = specdec.generate(specdec.ModelTarget(model, Twice), PROMPTS, ModelDrafter(model), **options).tokens
    assert [t.tolist() for t in found] == [reference(model, p, max_new_tokens=16).tolist() for p in PROMPTS]


@pytest.mark.parametrize("kinds", [(Half, TreeCache), (TreeCache, Half), (Twice, Half)], ids=str)
def test_no_cache_takes_over_from_one_of_another_kind(kinds):
    model, prompt, engine = llama(), PROMPTS[2], specdec.Graphs(capture=Tape)
    first, second = (specdec.ModelTarget(model, cache) for cache in kinds)
    said = specdec.generate(first, prompt, max_new_tokens=8, keep=True, stop_tokens=())
    text = torch.cat([prompt, said.tokens[0], torch.tensor([3, 4])])
    options = {"max_new_tokens": 12, "stop_tokens": ()}
    expected = specdec.generate(second, text, **options).tokens[0]
    assert torch.equal(specdec.generate(second, text, resume=said, **options).tokens[0], expected)
    other = specdec.generate(first, text, engine=engine, **options).tokens[0]
    assert torch.equal(specdec.generate(second, text, engine=engine, **options).tokens[0], expected)
    assert not torch.equal(other, expected)
