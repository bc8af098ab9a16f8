"""Checkpoints of EAGLE drafts in the layouts that tools write, with random tensors, and what such a network computes."""

import json

import torch
from safetensors.torch import save_file
from tiny_models import llama
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specdec.drafters.states_net import TargetParts
from specdec.drafters.text_level import TextLevel

HIDDEN, VOCAB, LAYERS, MID, HEADS, KV, SIZE = 16, 12, 7, 24, 4, 2, 4
KNOWN = [1, 2, 5, 6, 7, 11]  # ids of the target that a draft with a vocabulary of its own knows
TEXT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SHAPE = {"hidden_size": HIDDEN, "intermediate_size": MID, "num_hidden_layers": 1, "num_attention_heads": HEADS,
         "num_key_value_heads": KV, "rms_norm_eps": 1e-5, "vocab_size": VOCAB, "rope_theta": 500.0,
         "max_position_embeddings": 8}  # fmt: skip


def target(**changes):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": MID, "num_hidden_layers": LAYERS, "head_dim": SIZE}
    return llama(
        **{**sizes, "vocab_size": VOCAB, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None, **changes}
    )


def layer(generator, width, head_norms=False, hidden=HIDDEN):
    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4

    found = {
        "self_attn.q_proj.weight": random(HEADS * SIZE, width), "self_attn.k_proj.weight": random(KV * SIZE, width),
        "self_attn.v_proj.weight": random(KV * SIZE, width), "self_attn.o_proj.weight": random(hidden, HEADS * SIZE),
        "mlp.gate_proj.weight": random(MID, hidden), "mlp.up_proj.weight": random(MID, hidden),
        "mlp.down_proj.weight": random(hidden, MID), "input_layernorm.weight": 1 + random(hidden),
        "post_attention_layernorm.weight": 1 + random(hidden),
    }  # fmt: skip
    if width > hidden:
        found["hidden_norm.weight"] = 1 + random(hidden)
    if head_norms:
        found |= {"self_attn.q_norm.weight": 1 + random(SIZE), "self_attn.k_norm.weight": 1 + random(SIZE)}
    return found


def tensors(
    states=3, layers=1, known=KNOWN, embedding=True, head_norms=False, norms="", vocab=VOCAB, state_size=HIDDEN
):
    """Those of an EAGLE-3 draft, named as the authors do, but for more layers than one."""
    generator = torch.Generator().manual_seed(0)
    found = {f"midlayer.{name}": x for name, x in layer(generator, 2 * HIDDEN, head_norms).items()}
    for i in range(1, layers):
        found |= {f"layers.{i}.{name}": x for name, x in layer(generator, HIDDEN, head_norms).items()}

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5

    found |= {"fc.weight": random(HIDDEN, states * state_size), "norm.weight": 1 + random(HIDDEN)}
    found["lm_head.weight"] = random(len(known or range(vocab)), HIDDEN) * 3
    if embedding:
        found["embed_tokens.weight"] = random(vocab, HIDDEN)
    if norms == "input_norm":
        found["input_norm.weight"] = 1 + random(states * state_size)
    if norms == "fc_norm":
        found |= {f"fc_norm.{i}.weight": 1 + random(state_size) for i in range(states)}
    if known:
        ids = torch.tensor(known)
        found |= {
            "d2t": ids - torch.arange(len(ids)),
            "t2d": torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True),
        }
    return found


def eagle1(bias=True):
    generator = torch.Generator().manual_seed(0)
    found = {f"layers.0.{name}": x for name, x in layer(generator, HIDDEN).items() if name != "input_layernorm.weight"}
    found["fc.weight"] = torch.randn(HIDDEN, 2 * HIDDEN, generator=generator, dtype=torch.float64) * 0.4
    found["embed_tokens.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    return found | ({"fc.bias": found["fc.weight"][:, 0].clone()} if bias else {})


def renamed(found):
    """As Model-Optimizer, speculators and DeepSpec name them."""
    return {name.replace("midlayer", "layers.0"): tensor for name, tensor in found.items()}


def write(folder, config, found, pickled=False):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(found, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "model.safetensors")
    return folder


def official(folder, found, **keys):
    return write(
        folder, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE, **keys}, found, pickled=True
    )


def specforge(folder, found, **keys):
    return write(folder, {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **SHAPE, **keys}, found)


def optimizer(folder, found, ids=(1, 2, 3), **keys):
    eagle = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": ids}
    return write(
        folder, {"architectures": ["LlamaForCausalLMEagle3"], **SHAPE, "eagle_config": eagle, **keys}, renamed(found)
    )


def speculators(folder, found, ids=(2, 3, 4), family="llama", **keys):
    shape = {key: value for key, value in SHAPE.items() if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": SHAPE["rope_theta"]}
    layers = {**shape, "model_type": family, "head_dim": SIZE, "rope_parameters": rope}
    config = {"speculators_model_type": "eagle3", "transformer_layer_config": layers, **keys}
    return write(folder, {**config, "eagle_aux_hidden_state_layer_ids": ids}, renamed(found))


def deepspec(folder, found, ids=(0, 1, 2, 3, 4), **keys):
    return write(folder, {"model_type": "qwen3", **SHAPE, "target_layer_ids": ids, **keys}, renamed(found))


def page(count, first=0):
    """A whole text in one pass, from this position on."""
    causal = torch.ones(1, count, count, dtype=torch.bool).tril()
    return TextLevel(torch.arange(first, first + count)[None], causal)


def norm(x, weight, eps=SHAPE["rms_norm_eps"]):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def attention(x, part, theta):
    """[n, heads * size], of [n, width]."""

    def heads(name, normed):
        y = linear(x, part[f"self_attn.{name}_proj.weight"]).unflatten(-1, (-1, SIZE)).transpose(0, 1)
        return norm(y, part[normed]) if normed in part else y

    q, k, v = (heads(name, f"self_attn.{name}_norm.weight") for name in "qkv")
    frequencies = 1 / theta ** (torch.arange(0, SIZE, 2).float() / SIZE)
    angles = torch.arange(len(x))[:, None] * torch.cat([frequencies, frequencies])
    q, k = apply_rotary_pos_emb(q[None], k[None], angles.cos()[None].double(), angles.sin()[None].double())
    found = scaled_dot_product_attention(q, k, v[None], is_causal=True, enable_gqa=True)[0]
    return linear(found.transpose(0, 1).flatten(1), part["self_attn.o_proj.weight"])


def feed_forward(x, part):
    y = norm(x, part["post_attention_layernorm.weight"])
    gate, up = linear(y, part["mlp.gate_proj.weight"]), linear(y, part["mlp.up_proj.weight"])
    return linear(silu(gate) * up, part["mlp.down_proj.weight"])


def expected(found, tokens, states, theta=500.0, norm_before_residual=False):
    """The logits [n, known] of the authors' network, written out, for the pairs of a text."""
    part = {name.removeprefix("midlayer."): tensor for name, tensor in found.items()}
    feature = linear(states.flatten(1), part["fc.weight"])
    beside = norm(part["embed_tokens.weight"][tokens], part["input_layernorm.weight"])
    normed = norm(feature, part["hidden_norm.weight"])
    x = (normed if norm_before_residual else feature) + attention(torch.cat([beside, normed], -1), part, theta)
    x = x + feed_forward(x, part)
    return linear(norm(x, part["norm.weight"]), part["lm_head.weight"])


@torch.no_grad()
def logits(net, model, text=TEXT, seed=1):
    """[n, known]: for the pairs of a page of text with random states."""
    states = page_states(net, text, seed)
    parts = TargetParts.of(model, net)
    return net.logits(net.follow(text, states, page(text.shape[1]), parts), parts)[0]


def page_states(net, text=TEXT, seed=1):
    generator, count = torch.Generator().manual_seed(seed), len(net.states)
    return torch.randn(*text.shape, count, net.state_size, generator=generator, dtype=torch.float64)
