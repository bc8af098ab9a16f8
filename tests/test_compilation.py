"""Compiled forward passes give the same text, and are compiled once per shape. Code generation is left out: it takes long."""

import os
from pathlib import Path

import pytest
import torch
from test_models import MODELS
from tiny_models import PROMPTS, llama
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir
from torch.fx.experimental.proxy_tensor import make_fx

import specdec
import specdec_kernels
from specdec import Sampling
from specdec.drafters import LayerSkipDrafter, ModelDrafter, NgramDrafter
from specdec.engines.graphs import _tensors
from specdec.models.compilation import Compiled, _Products
from specdec.trees import Chain, Dynamic
from specdec_kernels.linear import _FEW, _LARGE

torch.set_num_threads(1)
ROUNDING = 1e-5  # of a float32 sum of products of normal variables, times the root of how many there are
OPTIONS = {"max_new_tokens": 12, "stop_tokens": ()}


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """Parts run as they were captured; how many there were to be compiled."""
    found = []
    monkeypatch.setattr("specdec.models.compilation._part", lambda graph, inputs: found.append(graph) or graph)
    torch._dynamo.reset()
    return found


WITH_WINDOWS = ["gemma3_sliding", "mistral_sliding", "gemma2_softcap_sliding", "cohere2_sliding", "llama4_chunked"]


@pytest.mark.parametrize("name", WITH_WINDOWS)
def test_compiled_models_tell_the_kernels_what_eager_ones_do(name, monkeypatch):
    """Of windows too: the compiler cannot look into transformers' patterns. Text is long enough to leave them."""
    monkeypatch.setattr(specdec_kernels, "DEVICES", {"cpu"})
    model, drafter = MODELS[name](torch.float64), LayerSkipDrafter(skip=[1], tree=Chain(2))
    expected, found = (
        specdec.generate(model, PROMPTS, drafter, engine=engine, **OPTIONS) for engine in ("eager", "compile")
    )
    assert all(map(torch.equal, found.tokens, expected.tokens))


def test_other_trees_texts_and_seeds_are_not_compiled_again():
    model, draft = llama(), llama(1, num_hidden_layers=1)
    engine, drafter = specdec.Graphs(compile=True), ModelDrafter(draft, Dynamic(8, 3, 2))
    compiled, before = [], counters["stats"]["unique_graphs"]
    for seed, prompts in ((0, PROMPTS), (1, [p.flip(0) for p in PROMPTS]), (2, [p + 1 for p in PROMPTS])):
        options = {**OPTIONS, "sampling": Sampling(1.0), "seed": seed}
        specdec.generate(model, prompts, drafter, engine=engine, **options)
        compiled.append(counters["stats"]["unique_graphs"] - before)
    assert compiled == [2] * 3  # the tree, and all levels of the draft


LEVELS = {  # drafts, and how many sizes their passes have: a draft model reads an accepted leaf and the root together
    "a model's chain": (lambda draft: ModelDrafter(draft, Chain(9)), {(1, 2), (1, 1)}),
    "a model's tree": (lambda draft: ModelDrafter(draft, Dynamic(3, 3, 2)), {(1, 2)}),
    "layers left out": (lambda draft: LayerSkipDrafter(skip=[1], tree=Chain(3)), {(1, 1)}),
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_of_a_draft_that_are_as_wide_share_code(name):
    make, sizes = LEVELS[name]
    before, options = counters["stats"]["unique_graphs"], {"prompts": PROMPTS[:1], **OPTIONS}
    found = specdec.generate(llama(), drafter=make(llama(1)), engine="compile", **options)
    assert counters["stats"]["unique_graphs"] - before == 1 + len(sizes)  # and the tree of the target
    assert torch.equal(found.tokens[0], specdec.generate(llama(), **options).tokens[0])


def test_code_that_torch_gives_up_is_compiled_again_beyond_its_own_limit():
    model, engine, threads = specdec.ModelTarget(llama()), specdec.Graphs(compile=True), torch.get_num_threads()
    expected = specdec.generate(model, PROMPTS, **OPTIONS).tokens
    before = counters["stats"]["unique_graphs"]
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            for number in (1, 2):
                torch.set_num_threads(number)
                found = specdec.generate(model, PROMPTS, engine=engine, **OPTIONS).tokens
                assert all(map(torch.equal, found, expected))
    finally:
        torch.set_num_threads(threads)
    assert counters["stats"]["unique_graphs"] - before == 2


@pytest.mark.filterwarnings("ignore:engine. the stage")
def test_texts_of_any_length_are_for_the_same_code(parts):
    """Two sizes of trees are compiled in a run of many tokens, and nothing more for other runs in caches of its size."""
    model = llama(max_position_embeddings=4096, head_dim=16).float()
    compiled, before = [], counters["stats"]["unique_graphs"]
    for length, new_tokens in ((5, 2048), (2100, 10), (3000, 20)):
        options = {"prompts": [torch.arange(length) % 30], "max_new_tokens": new_tokens, "stop_tokens": ()}
        found = specdec.generate(model, drafter=NgramDrafter(7), engine="compile", **options)
        compiled.append(counters["stats"]["unique_graphs"] - before)
        assert {step.nodes for step in found.trace.steps} <= {1, 8}
        assert torch.equal(found.tokens[0], specdec.generate(model, drafter=NgramDrafter(7), **options).tokens[0])
    assert compiled == [2] * 3 and len(parts) == 2 * 3


ALIKE = {
    "llama": 1,
    "gemma3_sliding": 1,
    "smollm3_some_layers_without_positions": 2,
}  # sliding layers have another mask


@pytest.mark.parametrize("name", ALIKE)
def test_layers_that_are_alike_are_compiled_once(name, parts):
    model = MODELS[name](torch.float64)
    expected, found = (specdec.generate(model, PROMPTS, engine=engine, **OPTIONS) for engine in ("eager", "compile"))
    assert all(map(torch.equal, found.tokens, expected.tokens))
    assert len(parts) == 1 + ALIKE[name] + 1  # before the layers, the layers by kind, and after them


class InFloat32(nn.Module):
    """A norm that is computed outside of autocast, as some models do."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.norm(x)


def test_layers_that_begin_inside_a_context_are_cut_around_it(parts, monkeypatch):
    monkeypatch.setattr("specdec.models.compilation._part", lambda g, i: parts.append(g) or aot_eager(g, [*i]))
    model = llama()
    for layer in model.model.layers:
        layer.input_layernorm = InFloat32(layer.input_layernorm)
    specdec.generate(model, PROMPTS, engine="compile", **OPTIONS)  # a part that leaves what another enters would warn
    assert len(parts) == 3


def test_a_model_in_which_no_layers_are_found_is_compiled_whole(parts, monkeypatch):
    monkeypatch.setattr("specdec.models.layerwise._layer", lambda node, last: None)
    found = specdec.generate(llama(), PROMPTS, engine="compile", **OPTIONS)
    assert all(map(torch.equal, found.tokens, specdec.generate(llama(), PROMPTS, **OPTIONS).tokens))
    assert len(parts) == 1


def test_without_a_compiler_models_run_as_they_stand(monkeypatch):
    def fails(graph, inputs):
        raise InvalidCxxCompiler

    monkeypatch.setattr("specdec.models.compilation._part", fails)
    with pytest.warns(
        UserWarning, match="LlamaForCausalLM cannot be compiled and runs .*: No working C.. compiler"
    ) as said:
        found = specdec.generate(llama(), PROMPTS, ModelDrafter(llama(1), Chain(2)), engine="compile", **OPTIONS)
    assert len(said) == 2  # once for each model
    assert all(map(torch.equal, found.tokens, specdec.generate(llama(), PROMPTS, **OPTIONS).tokens))


def test_code_is_kept_in_a_folder_of_this_machine_and_others_are_left_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "specdec.models.compilation._part", lambda graph, inputs: seen.append(Path(cache_dir())) or graph
    )
    specdec.generate(llama(), PROMPTS, engine="compile", **OPTIONS)
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir())
    monkeypatch.setattr("specdec.cache_folder._processor", lambda: "another")
    torch._dynamo.reset()
    specdec.generate(llama(), PROMPTS, engine="compile", **OPTIONS)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    torch._dynamo.reset()
    specdec.generate(llama(), PROMPTS, engine="compile", **OPTIONS)
    first, other, own = dict.fromkeys(seen)
    assert first.parent == other.parent == tmp_path / "compiled" and own == tmp_path / "own"
    assert torch.__version__ in first.name and other.name.endswith("another") and first.is_dir()


def test_a_hook_that_comes_or_goes_after_a_pass_was_compiled_is_obeyed():
    model = llama()
    bias = 100.0 * (torch.arange(50) == 9)
    before = specdec.generate(model, PROMPTS[:1], engine="compile", **OPTIONS).tokens[0]
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    assert specdec.generate(model, PROMPTS[:1], engine="compile", **OPTIONS).tokens[0].tolist() == [9] * 12
    hook.remove()
    assert torch.equal(specdec.generate(model, PROMPTS[:1], engine="compile", **OPTIONS).tokens[0], before)


@pytest.mark.parametrize("folder, reason", [("file/here", "Not a directory"), ("with space", "no path with a space"),
                                            (None, "home directory")])  # fmt: skip
def test_without_a_folder_for_code_torchs_own_is_used_and_that_is_said_once(folder, reason, tmp_path, monkeypatch):
    seen = []
    (tmp_path / "file").touch()
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "SPECDEC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("specdec.models.compilation._part", lambda g, i: seen.append(cache_dir()) or g)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without HOME
    if folder:
        monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / folder))
    with pytest.warns(UserWarning, match=f"kept in torch's own folder: .*{reason}.*SPECDEC_CACHE") as said:
        for size in (1, 2):
            call = Compiled(lambda x: x + 1, nn.Identity())
            assert call((size,), torch.ones(size)).tolist() == [2] * size
    assert len(said) == 1 and seen == [default_cache_dir()] * 2


class Again:
    """A captured stage: run again, as it stands; it fills what it gave the first time."""

    bytes = 0

    def __init__(self, stage):
        self.stage, self.outputs = stage, None

    def replay(self):
        outputs = self.stage()
        self.outputs = self.outputs or outputs
        for to, new in zip(_tensors(self.outputs), _tensors(outputs), strict=True):
            if to is not new:
                to.copy_(new)


def test_steps_that_are_watched_before_they_are_captured_run_as_they_stand():
    model, engine = llama(), specdec.Graphs(compile=True, capture=Again)
    expected, found = (specdec.generate(model, PROMPTS, engine=e, **OPTIONS) for e in ("eager", engine))
    assert all(map(torch.equal, found.tokens, expected.tokens))
    assert engine.captured == 4


def test_a_model_that_cannot_be_compiled_runs_as_it_stands():
    model = llama()
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: print(float(args[0].sum()), end=""))
    with pytest.warns(UserWarning, match="LlamaForCausalLM cannot be compiled and runs as it stands: "):
        found = specdec.generate(model, PROMPTS, engine="compile", **OPTIONS)
    again = specdec.generate(
        model, PROMPTS, engine="compile", **OPTIONS
    )  # not tried again: the warning would be an error
    expected = specdec.generate(llama(), PROMPTS, **OPTIONS)
    for other in (found, again):
        assert all(map(torch.equal, other.tokens, expected.tokens))


@pytest.mark.parametrize("tokens, columns", [(1, 512), (32, 512), (33, 512), (4, 255)])
def test_large_matrices_are_read_once_for_a_few_tokens(tokens, columns):
    x, weight = torch.randn(tokens, columns), torch.randn(256, columns)
    compiled = make_fx(lambda x, weight: x @ weight.permute(1, 0) + 1, tracing_mode="fake")(x, weight)
    _Products()(compiled.graph)
    compiled.recompile()
    ours = compiled.graph.find_nodes(op="call_function", target=torch.ops.specdec.linear.default)
    assert len(ours) == (tokens in _FEW and weight.numel() >= _LARGE)
    torch.testing.assert_close(compiled(x, weight), x @ weight.T + 1, atol=ROUNDING * columns**0.5, rtol=0)
