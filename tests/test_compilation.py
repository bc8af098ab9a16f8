"""Compiled forward passes give the same text, and are compiled once per shape. Code generation is left out: it takes long."""

import copy
import functools

import pytest
import torch
from test_models import MODELS
from tiny_models import GATE, PROMPTS, llama
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

import specdec
import specdec_kernels
from specdec import Sampling
from specdec.drafters import LayerSkipDrafter, ModelDrafter
from specdec.engines.graphs import _tensors
from specdec.models.compilation import _ReadOnce
from specdec.trees import Chain, Dynamic
from specdec_kernels.attention import NODES
from specdec_kernels.linear import _FEW, _LARGE

torch.set_num_threads(1)
ROUNDING = 1e-5  # of a float32 sum of products of normal variables, times the root of how many there are
OPTIONS = {"max_new_tokens": 12, "stop_tokens": ()}


@pytest.fixture(autouse=True)
def captured_only(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()


def test_compiled_models_give_the_same_text():
    """Of the models the one with both kinds of layers, causal and sliding."""
    model, drafter = GATE["gemma3_sliding"](), LayerSkipDrafter(skip=[1], tree=Chain(2))
    expected, found = (
        specdec.generate(model, PROMPTS, drafter, engine=engine, **OPTIONS) for engine in ("eager", "compile")
    )
    assert all(map(torch.equal, found.tokens, expected.tokens))


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


def test_other_trees_texts_and_seeds_are_not_compiled_again(capsys):
    model, draft = llama(), llama(1, num_hidden_layers=1)
    engine, drafter = specdec.Graphs(compile=True), ModelDrafter(draft, Dynamic(8, 3, 2))
    compiled, before = [], counters["stats"]["unique_graphs"]
    for seed, prompts in ((0, PROMPTS), (1, [p.flip(0) for p in PROMPTS]), (2, [p + 1 for p in PROMPTS])):
        options = {**OPTIONS, "sampling": Sampling(1.0), "seed": seed}
        specdec.generate(model, prompts, drafter, engine=engine, **options)
        compiled.append(counters["stats"]["unique_graphs"] - before)
    assert compiled == [4] * 3  # the tree, and three levels of the draft
    assert capsys.readouterr().err.count("| 0/1") == 4  # bars


class Again:
    """A captured stage: run again, as it stands; it fills what it gave the first time."""

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


@pytest.mark.parametrize("tokens, columns", [(4, 512), (24, 512), (3, 512), (25, 512), (4, 256)])
def test_large_matrices_are_read_once_for_a_few_tokens(tokens, columns):
    x, weight = torch.randn(tokens, columns), torch.randn(256, columns)
    compiled = make_fx(lambda x, weight: x @ weight.permute(1, 0) + 1, tracing_mode="fake")(x, weight)
    _ReadOnce()(compiled.graph)
    compiled.recompile()
    ours = compiled.graph.find_nodes(op="call_function", target=torch.ops.specdec.linear.default)
    assert len(ours) == (tokens in _FEW and weight.numel() >= _LARGE)
    torch.testing.assert_close(compiled(x, weight), x @ weight.T + 1, atol=ROUNDING * columns**0.5, rtol=0)


def traced(query, key, value, bias, **options):
    """Attention as it stands in a model's graph, before and after `_ReadOnce`; how often ours is in it."""

    def attend(query, key, value, bias):
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True, **options)
        return out.transpose(1, 2).reshape(len(query), query.shape[2], -1) + 1

    before = make_fx(attend, tracing_mode="fake")(query, key, value, bias)
    before.graph.eliminate_dead_code()
    after = copy.deepcopy(before)
    _ReadOnce()(after.graph)
    after.recompile()
    return (
        before,
        after,
        len(after.graph.find_nodes(op="call_function", target=torch.ops.specdec.attention.default)),
    )


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
@pytest.mark.parametrize("nodes", [1, 2, 5, NODES])
def test_keys_are_read_once_for_all_heads_of_a_few_nodes(nodes, options):
    key, value = torch.randn(2, 2, 19, 2, 32).transpose(2, 3)
    operands = torch.randn(2, 4, nodes, 32), key, value, torch.zeros(2, 1, nodes, 19)
    operands[3][..., 1:].masked_fill_(torch.rand(2, 1, nodes, 18) < 0.3, -torch.inf)
    before, after, ours = traced(*operands, **options)
    assert ours == 1
    torch.testing.assert_close(after(*operands), before(*operands), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(
    "nodes, dim, dtype",
    [
        (NODES + 1, 32, torch.float32),
        (5, 24, torch.float32),
        (5, 32, torch.float64),
    ],
)
def test_other_attention_is_left_to_torch(nodes, dim, dtype):
    operands = torch.randn(2, 4, nodes, dim), *torch.randn(2, 2, 2, 19, dim), torch.zeros(2, 1, nodes, 19)
    before, after, ours = traced(*(x.to(dtype) for x in operands))
    assert ours == 0 and str(after.graph) == str(before.graph)


def test_attention_whose_weights_are_used_is_left_to_torch():
    def attend(query, key, value, bias):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)

    operands = torch.randn(2, 4, 5, 32), *torch.randn(2, 2, 4, 19, 32), torch.zeros(2, 1, 5, 19)
    compiled = make_fx(attend, tracing_mode="fake")(*operands)
    _ReadOnce()(compiled.graph)
    assert not compiled.graph.find_nodes(op="call_function", target=torch.ops.specdec.attention.default)
