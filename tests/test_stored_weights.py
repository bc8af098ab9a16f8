"""Models whose weights are stored in fewer bits: targets and drafts like any others, of less memory."""

import copy
import pickle
import warnings
from functools import partial
from typing import Any

import peft
import pytest
import tiny_gguf
import torch
from hybrid_models import GATED_DELTA, STATE_SPACE
from tiny_models import GATE, MATRIX, PROMPTS, build, llama, reference
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import specdec
from experiments.equality import gap
from specdec.drafters import LayerSkipDrafter, MedusaDrafter, ModelDrafter, NgramDrafter
from specdec.huggingface.gguf import read_model
from specdec.models.fingerprint import fingerprint
from specdec.models.stored_layers import FORMATS, StoredEmbedding, StoredLinear, rows_of, unrounded
from specdec.trees import Widths

FAMILIES = {**GATE, "gemma4": MATRIX["gemma4_shared_unequal_layers"], "deepseek_v3": MATRIX["deepseek_v3_latent"],
            "qwen3_5": GATED_DELTA["qwen3_5"], "bamba": STATE_SPACE["bamba"]}  # fmt: skip
GEMMA: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
                "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 7,
                "bos_token_id": 1}  # fmt: skip
BYTES = {"bf16": 2, "int8": 1, "int4": 1}  # of a number of the LM head
NEAR = {"bf16": 1e-4, "int8": 0.02, "int4": 0.02}  # of the largest logit: how near two tokens are where texts may part


def small(seed=0, **changes):
    return llama(seed, torch.float32, **changes)


def dense(model):
    """The same model with plain layers that hold what is stored."""
    made = copy.deepcopy(model)
    layers: list[Any] = [part for part in made.modules() if isinstance(part, (StoredLinear, StoredEmbedding))]
    weights = [nn.Parameter(part.weight.clone(), requires_grad=False) for part in layers]
    for part, weight in zip(layers, weights, strict=True):
        part.__class__ = nn.Linear if hasattr(part, "out_features") else nn.Embedding
        part.weight = weight
    return made


def parts_from_generate(model, drafter, prompts=PROMPTS, tokens=24):
    """How near the best two tokens are where a text, of all prompts together or of one alone, parts from `model.generate`'s."""
    together = specdec.generate(model, prompts, drafter, max_new_tokens=tokens, stop_tokens=()).tokens
    alone = specdec.generate(model, prompts[0], drafter, max_new_tokens=tokens, stop_tokens=()).tokens
    theirs = [reference(model, p, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0).tolist() for p in prompts]
    pairs = zip([*prompts, prompts[0]], [*together, *alone], [*theirs, theirs[0]], strict=True)
    return [found[1] for prompt, ours, text in pairs if (found := gap(model, prompt, ours.tolist(), text))]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_any_family_decodes_as_its_own_generate(name):
    model = specdec.store_weights(FAMILIES[name](), "int8")
    assert max(parts_from_generate(model, NgramDrafter(), tokens=12), default=0) <= NEAR["int8"]


@pytest.mark.parametrize("weights", FORMATS)
def test_trees_and_ragged_batches_decode_as_generate(weights):
    model, draft = small(), specdec.store_weights(small(1), weights)
    specdec.store_weights(model, weights)
    for drafter in (None, ModelDrafter(draft, Widths([3, 2, 1])), LayerSkipDrafter([1], tree=Widths([2, 2]))):
        assert max(parts_from_generate(model, drafter), default=0) <= NEAR[weights]


def test_with_bfloat16_weights_texts_of_the_demo_pair_are_exactly_those_of_generate():
    pair = specdec.demo.load()
    specdec.store_weights(pair.target, "bf16")
    prompts = [pair.tokenizer(p.text, return_tensors="pt").input_ids[0] for p in pair.prompts[:2]]
    assert parts_from_generate(pair.target, MedusaDrafter(pair.heads), prompts) == []


@pytest.mark.parametrize("drafter", [specdec.demo.eagle3, specdec.demo.dspark])
def test_drafters_that_read_states_share_a_stored_head_and_embedding(drafter):
    pair = specdec.demo.load()
    specdec.store_weights(pair.target, "int8")
    prompt = pair.tokenizer(pair.prompts[9].text, return_tensors="pt").input_ids[0]
    made = drafter(pair.target)
    specdec.store_weights(made.net.eval(), "int8")  # a network of the drafter's own may be stored too
    assert max(parts_from_generate(pair.target, made, [prompt]), default=0) <= NEAR["int8"]
    assert specdec.generate(pair.target, prompt, made, max_new_tokens=24).summary()["acceptance_length"] > 1.5


@pytest.mark.parametrize("weights, far", [("bf16", 1e-6), ("int8", 0.03), ("int4", 0.03)])
def test_logits_are_those_of_what_is_stored(weights, far):
    model = specdec.store_weights(small(), weights)
    expected, found = dense(model)(PROMPTS[2][None]).logits, model(PROMPTS[2][None]).logits
    assert (found - expected).norm() <= far * expected.norm()


@pytest.mark.parametrize("weights", FORMATS)
def test_a_tied_embedding_has_no_matrix_of_its_own_and_keeps_its_scale(weights):
    model = build("Gemma3", **GEMMA, tie_word_embeddings=True)
    specdec.store_weights(model, weights)
    embedding, head, ids = model.get_input_embeddings(), model.get_output_embeddings(), torch.tensor([[3, 49, 0]])
    assert isinstance(embedding, StoredEmbedding) and isinstance(head, StoredLinear)
    assert not [*embedding.parameters()] and not [name for name, _ in embedding.named_buffers() if "scale" not in name]
    torch.testing.assert_close(embedding(ids), head.weight[ids] * GEMMA["hidden_size"] ** 0.5, rtol=5e-3, atol=0)
    assert torch.equal(rows_of(embedding, ids), head.weight[ids])
    assert (embedding.weight.shape, embedding.weight.dtype) == ((50, 32), torch.float32)
    assert head.stored_weight.nbytes == BYTES[weights] * 64 * 32  # 50 tokens take 4 tiles of 16


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made inside and were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage] = storage.nbytes()
        self.most = max(self.most, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("weights", FORMATS)
def test_no_second_copy_of_the_model_exists_while_it_is_stored(weights):
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(24))).eval()
    before = sum(parameter.nbytes for parameter in model.parameters())
    with Peak() as peak:
        specdec.store_weights(model, weights)
    kept = sum(buffer.nbytes for buffer in model.buffers())
    assert kept < 0.52 * before and not [name for name, _ in model.named_parameters() if "weight" in name]
    assert peak.most < kept + 0.5 * before


def test_plain_weights_stay_as_they_are_in_memory_of_their_own():
    model, again = llama(0, tie_word_embeddings=True), llama(0, tie_word_embeddings=True)
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    assert specdec.store_weights(model, "plain") is model and model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), again.parameters(), strict=True))
    moved = {name for name, weight in model.named_parameters() if weight.data_ptr() != before[name]}
    assert moved == {name for name in before if "norm" not in name} and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(PROMPTS[0][None]).logits, again(PROMPTS[0][None]).logits)


class Largest(TorchDispatchMode):
    """How many numbers the largest float32 tensor has that was made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if type(out) is torch.Tensor and out.dtype == torch.float32:
            self.numbers = max(self.numbers, out.numel())
        return out


def hooked(model):
    """With forward passes that call those of before, as accelerate's hooks have them."""
    layers: list[Any] = [part for part in model.modules() if isinstance(part, nn.Linear)]
    for layer in layers:
        layer.forward = partial(lambda forward, x: forward(x), layer.forward)
    return model


READERS = {  # whose forward passes read a weight or ask for its dtype
    "gemma": partial(build, "Gemma3", **{**GEMMA, "vocab_size": 4096}, tie_word_embeddings=True),
    "mamba": partial(
        build, "Mamba", vocab_size=4096, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4
    ),
    "hooked": lambda: hooked(small(vocab_size=4096)),
}


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")  # of kernels that Mamba misses
def test_no_pass_unpacks_a_matrix(name, weights):
    model = specdec.store_weights(READERS[name](), weights)
    model(PROMPTS[0][None])  # the first one looks for the kernels
    with torch.inference_mode(), Largest() as largest:
        model(PROMPTS[0][None])
    assert largest.numbers <= 5 * 4096  # logits


def test_a_stored_weight_is_known_without_its_numbers_and_cannot_be_written():
    layer = specdec.store_weights(nn.Linear(40, 24).eval(), "int8")
    with Largest() as largest:
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device.type, weight.numel()) == ((24, 40), torch.float32, "cpu", 960)
        assert weight.data.shape == (24, 40)
    assert largest.numbers == 0
    numbers, x = weight.clone(), torch.randn(3, 40)
    assert type(numbers) is torch.Tensor and torch.equal(weight[3:5], numbers[3:5])
    assert torch.equal(nn.functional.linear(x, weight, layer.bias), layer(x))
    assert torch.equal(nn.functional.embedding(torch.tensor([5, 23]), weight), numbers[[5, 23]])

    def assign():
        weight.data = numbers

    def erase():
        weight[5] = 0

    for write in (erase, weight.data.zero_, weight.zero_, assign):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"stored in int8 cannot be written.*before store_weights"),
        ):
            write()


@pytest.mark.parametrize("token", [50, 63, -1])
def test_a_stored_embedding_refuses_ids_that_its_plain_one_refuses(token):
    model = specdec.store_weights(small(tie_word_embeddings=True), "int8")
    with pytest.raises(IndexError):
        model(torch.tensor([[1, token]]))


@pytest.mark.parametrize("weights", FORMATS)
def test_products_are_unrounded_where_that_is_asked_for(weights):
    layer = specdec.store_weights(nn.Linear(72, 24).eval(), weights)
    x = torch.randn(3, 72)
    rounded, exact = layer(x), x @ layer.weight.clone().T + layer.bias
    with unrounded():
        torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), rounded)
    assert ((rounded - exact).abs().max() > 1e-3) == (weights != "bf16")


@pytest.mark.parametrize("weights", FORMATS)
def test_a_model_that_scores_by_place_in_a_pass_is_refused_whatever_it_is_stored_in(weights):
    model = specdec.store_weights(small(), weights)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out + 0.01 * torch.arange(out.shape[-2])[:, None]
    )
    with pytest.raises(ValueError, match=r"of the largest logit, of which rounding is at most 1e-03"):
        specdec.ModelTarget(model)


@pytest.mark.parametrize("weights", FORMATS)
def test_stored_models_decode_under_autocast(weights):
    model = specdec.store_weights(small(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = specdec.generate(model, PROMPTS[0], NgramDrafter(), max_new_tokens=8, stop_tokens=()).tokens[0]
        assert torch.equal(found[:4], reference(model, PROMPTS[0], max_new_tokens=4, eos_token_id=None, pad_token_id=0))


class OwnNames(nn.Linear):
    scales: torch.Tensor

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scales", torch.full((1,), 3.0))

    dtype = rows = kept = property(lambda self: self.weight.dtype)

    def forward(self, input):
        return super().forward(input) * self.scales


def test_names_of_a_subclass_are_its_own():
    layer = OwnNames(40, 24).eval()
    specdec.store_weights(layer, "int8")
    x = torch.randn(3, 40)
    assert layer.dtype == torch.float32
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) * 3)


@pytest.mark.parametrize("weights", FORMATS)
def test_copies_casts_and_states_of_a_stored_model_are_as_of_any_other(weights):
    model, other = (specdec.store_weights(small(seed, tie_word_embeddings=True), weights) for seed in (0, 1))
    ids = PROMPTS[0][None]
    expected, head = model(ids).logits, model.get_output_embeddings()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, expected)
    assert copied.get_input_embeddings().stored_in[0] is copied.get_output_embeddings()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, expected)
    before = [buffer.clone() for buffer in head.buffers()]
    model.to(torch.bfloat16)
    assert model(ids).logits.dtype == model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(head.buffers(), before, strict=True))
    # all of the pass is rounded to bfloat16 now, whose steps are 2^-8 of a number
    assert max(parts_from_generate(model, NgramDrafter(), PROMPTS[:1], 8), default=0) < 2.0**-5


def test_a_change_of_formats_is_seen():
    model = small()
    before = fingerprint(model, numbers=False)
    specdec.store_weights(model.lm_head, "int8")
    assert fingerprint(model, numbers=False) != before


def test_formats_may_be_mixed():
    model = small()
    specdec.store_weights(model.model.layers, "int4")
    specdec.store_weights(model, "bf16")
    formats = [part.stored_as for part in model.modules() if isinstance(part, StoredLinear)]
    assert formats == ["int4"] * 21 + ["bf16"]
    assert max(parts_from_generate(model, NgramDrafter()), default=0) <= NEAR["int4"]


def test_int4_stores_the_head_in_8_bits():
    model = specdec.store_weights(small(), "int4")
    assert [part.stored_as for part in model.modules() if isinstance(part, StoredLinear)] == ["int4"] * 21 + ["int8"]


def test_weights_of_a_gguf_file_in_4_bits_are_stored_as_they_are(tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.chat_model())
    model = read_model(tmp_path / "tiny.gguf", torch.float32)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    before = {name: part.weight.clone() for name, part in layers.items()}
    specdec.store_weights(model, "int4")
    exact = {name for name, part in layers.items() if torch.equal(part.weight, before[name])}
    assert exact == {name for name in layers if tiny_gguf_part(name) in ("Q4_0", "Q4_1")} and exact


def tiny_gguf_part(name):
    parts = {"down_proj": "ffn_down", "up_proj": "ffn_up", "v_proj": "attn_v"}
    kind = tiny_gguf.MIXED.get(parts.get(name.rsplit(".", 1)[-1], ""))
    return None if kind is None else kind.name


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("weights", FORMATS)
def test_stored_layers_compile_whole(weights):
    layer = specdec.store_weights(nn.Sequential(nn.Linear(40, 24)).eval(), weights)
    x = torch.randn(3, 40)
    with torch.inference_mode():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_a_layer_that_reads_weights_by_itself_gets_them():
    class Odd(nn.Linear):
        def forward(self, input):
            return nn.functional.linear(input, self.weight) * 2

    layer = Odd(40, 24).eval()
    held = nn.Sequential(layer).eval()
    specdec.store_weights(held, "int8")
    x = torch.randn(3, 40)
    assert isinstance(layer, Odd) and torch.equal(held(x), nn.functional.linear(x, layer.weight) * 2)


def test_what_cannot_be_stored_is_refused_with_the_cure():
    model = small()
    with pytest.raises(ValueError, match=r"weights='int3': expected one of 'plain', 'bf16', 'int8', 'int4'"):
        specdec.store_weights(model, "int3")
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        specdec.store_weights(small().train(), "int8")
    with pytest.raises(ValueError, match=r"Embedding has no nn\.Linear"):
        specdec.store_weights(nn.Embedding(3, 4).eval(), "int8")
    with pytest.raises(ValueError, match="on meta, where nothing reads int8; move it"):
        specdec.store_weights(nn.Linear(3, 4, device="meta").eval(), "int8")
    with pytest.raises(ValueError, match=r"computes its weight from others; remove its parametrization"):
        specdec.store_weights(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)).eval(), "int8")
    with pytest.raises(ValueError, match=r"of torch\.float8_e4m3fn, quantised already"):
        specdec.store_weights(nn.Linear(3, 4).eval().to(torch.float8_e4m3fn), "int8")
    taken: Any = nn.Linear(3, 4).eval()
    taken.stored_as = "mine"
    with pytest.raises(ValueError, match=r"has stored_as, as stored layers name what they add"):
        specdec.store_weights(taken, "int8")
    with pytest.raises(ValueError, match=r"on meta, where nothing reads bf16; cast it, model\.bfloat16"):
        specdec.store_weights(nn.Linear(3, 4, device="meta").eval(), "bf16")
    specdec.store_weights(model, "int4")
    with pytest.raises(ValueError, match=r"stored in int4, int8 already; load it anew"):
        specdec.store_weights(model, "bf16")
    with pytest.raises(ValueError, match="takes no gradients"):
        model.lm_head(torch.randn(2, 32, requires_grad=True))
    with pytest.raises(ValueError, match="pass a model of torch"):
        specdec.store_weights("a name", "int8")  # type: ignore[type-var]


@pytest.mark.parametrize("size, formats", [(1e-6, {"bf16", "int8"}), (1e-3, {*FORMATS}), (1e5, {"bf16", "int8"}),
                                           (torch.inf, set())])  # fmt: skip
def test_a_format_takes_the_sizes_that_it_has_numbers_for(size, formats):
    for weights in FORMATS:
        layer = nn.Linear(32, 16).eval()
        layer.weight.data *= size / layer.weight.abs().max()
        expected = layer.weight.data.clone()
        if weights in formats:
            specdec.store_weights(layer, weights)
            assert (layer.weight - expected).norm() < 0.1 * expected.norm()
        else:
            with pytest.raises(ValueError, match=f"the largest in size must be from .* in {weights}"):
                specdec.store_weights(layer, weights)


def of_parts():
    model = small()
    specdec.store_weights(model.model.layers[1], "int8")
    return model


@pytest.mark.parametrize("made", [of_parts, lambda: specdec.store_weights(small(), "int8").model,
                                  lambda: specdec.store_weights(small(tie_word_embeddings=True), "bf16")])  # fmt: skip
def test_transformers_saves_and_resizes_no_model_of_which_anything_is_stored(made, tmp_path):
    model = made()
    for call in (lambda: model.save_pretrained(tmp_path), lambda: model.resize_token_embeddings(60), model.tie_weights):
        with pytest.raises(ValueError, match=r"call it before store_weights"):
            call()
    assert not [*tmp_path.iterdir()] and model.config.vocab_size == 50
    small().save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore")  # of PEFT about transformers, and of a folder for a base model
def test_adapters_are_saved_from_a_stored_model_and_its_head_is_found(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = peft.get_peft_model(small(), config).eval()
    specdec.store_weights(model, "int4")
    expected = model(PROMPTS[0][None]).logits
    assert model.get_output_embeddings().stored_as == "int8"
    model.save_pretrained(tmp_path)
    loaded = specdec.store_weights(peft.PeftModel.from_pretrained(small(), tmp_path).eval(), "int4")
    assert torch.equal(loaded(PROMPTS[0][None]).logits, expected)


@pytest.mark.parametrize("weights", FORMATS)
def test_pickles_of_a_stored_model_compute_the_same(weights):
    model = specdec.store_weights(build("Gemma3", **GEMMA, tie_word_embeddings=True), weights)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(PROMPTS[0][None]).logits, model(PROMPTS[0][None]).logits)
    assert loaded.get_input_embeddings().stored_in[0] is loaded.get_output_embeddings()


def test_a_cpu_without_the_instructions_is_told_so(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specdec.store_weights(small(), "bf16")
        with pytest.raises(UserWarning, match="no AVX-512 with VNNI, which products in int8 are made for"):
            specdec.store_weights(small(), "int8")


def test_a_quantised_model_that_does_not_run_in_inference_mode_is_refused_with_the_cure():
    model = small()
    model.lm_head.register_forward_hook(lambda module, args, output: output.clone() if output._version < 0 else None)
    assert model(PROMPTS[0][None]).logits.shape == (1, 5, 50)
    with pytest.raises(ValueError, match=r"does not run in torch\.inference_mode .*specdec\.store_weights"):
        specdec.ModelTarget(model)
