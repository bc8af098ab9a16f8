"""A model made larger without changing what it computes: real acceptance at the cost ratio of a large model.

The new layers add exactly nothing to the residual stream (their output projections are zero), the new MLP units and heads
are not read, and the new entries of the state are zero, but all of them are computed. This is no better a model, and its
figures say nothing about quality; they say what decoding costs when the target is that large and agrees with its draft as the
small one did.

    python experiments/demo_pair/enlarge.py outputs/peers

writes the pair for other libraries, which decode with copies of their own; one that is not installed is a row that says so:

    for MODEL in target draft; do
    optimum-cli export openvino --task text-generation-with-past --weight-format fp32 \\
        -m outputs/peers/$MODEL outputs/peers/openvino/$MODEL
    python experiments/export_gguf.py outputs/peers/$MODEL outputs/peers/$MODEL.gguf; done
    METHODS=transformers,assisted,lookup,openvino,openvino_draft,openvino_lookup,llama_cpp,llama_cpp_draft,llama_cpp_lookup
    python experiments/benchmark.py target=hub target.target=outputs/peers/target target.draft=outputs/peers/draft \\
        "methods=[$METHODS,chain,chain_compiled,suffix_then_chain_compiled]" 'over=[openvino,openvino_draft]' \\
        uncounted=1 ceilings=false
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

import specdec
from experiments.bench.models import Models
from specdec.drafters import MedusaHeads

LAYERS, WIDTH = 24, 2560  # of the target that is written; `conf/target/enlarged.yaml` has the same
NOISE = 1e-6  # equal weights of several layers would be stored and read only once by OpenVINO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the folders `target` and `draft`")
    folder = parser.parse_args().folder
    pair = load(LAYERS, WIDTH, NOISE)
    for name, model in {"target": pair.target, "draft": pair.draft}.items():
        assert model is not None
        model.save_pretrained(folder / name)
        pair.tokenizer.save_pretrained(folder / name)


def load(layers: int, intermediate_size: int, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> Models:
    """The demo pair with its target enlarged."""
    pair = specdec.demo.load(dtype)
    assert isinstance(pair.target, LlamaForCausalLM)
    return Models(enlarge(pair.target, layers, intermediate_size, noise), pair.draft, pair.tokenizer, pair.heads)


def enlarge(
    model: LlamaForCausalLM, layers: int, intermediate_size: int, noise: float = 0.0, hidden_size: int | None = None
) -> LlamaForCausalLM:
    """A Llama with more layers, wider MLPs and a larger hidden state whose logits are those of `model`.

    Args:
        model: at most as large.
        layers: number of layers; the new ones come last.
        intermediate_size: width of every MLP.
        noise: standard deviation of what would be zero, to keep predictions from being identical.
        hidden_size: of the state, zero from the old size on; as many more heads. As it was by default.
    """
    old, config = model.config, copy.deepcopy(model.config)
    growth, rest = divmod(hidden_size or old.hidden_size, old.hidden_size)
    if layers < old.num_hidden_layers or intermediate_size < old.intermediate_size or growth < 1 or rest:
        raise ValueError(
            f"layers={layers}, intermediate_size={intermediate_size}, hidden_size={hidden_size}: the model already has "
            f"{old.num_hidden_layers} layers of {old.intermediate_size} and a state of {old.hidden_size}; it can only grow, "
            "the state by a whole factor."
        )
    config.num_hidden_layers, config.intermediate_size = layers, intermediate_size
    config.hidden_size = growth * old.hidden_size
    config.num_attention_heads, config.num_key_value_heads = (
        growth * int(n or 0) for n in (old.num_attention_heads, old.num_key_value_heads)
    )
    config.rms_norm_eps = old.rms_norm_eps / growth  # the mean square is over so many more entries, all zero
    with torch.random.fork_rng(devices=[]), model.device:
        torch.manual_seed(0)
        large = LlamaForCausalLM._from_config(config, dtype=model.dtype).eval()
        _make_silent(large, noise)
    _copy_into(large, model, growth)
    large.generation_config = copy.deepcopy(model.generation_config)
    return large


@torch.no_grad()
def widen(heads: MedusaHeads, hidden_size: int) -> MedusaHeads:
    """Heads for a state that is zero from the old size on, as `enlarge` makes it, with the same logits."""
    blocks, count, old = heads.bias.shape
    if heads.lm_head is not None or hidden_size < old:
        raise ValueError(f"hidden_size={hidden_size}: heads that share the target's LM head can grow, from {old} on.")
    wide = MedusaHeads(count, blocks, hidden_size).to(heads.weight)  # of zeros: the new entries stay zero
    wide.weight[..., :old, :old], wide.bias[..., :old] = heads.weight, heads.bias
    return wide.eval()


@torch.no_grad()
def _make_silent(model: Any, noise: float) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.normal_(0, noise)
        layer.mlp.down_proj.weight.normal_(0, noise)


@torch.no_grad()
def _copy_into(large: LlamaForCausalLM, small: LlamaForCausalLM, growth: int) -> None:
    """Each weight of the small model becomes the leading block of the large one's."""
    weights = large.state_dict()
    weights["model.embed_tokens.weight"].zero_()  # nothing else writes to the state's new entries
    for name, weight in small.state_dict().items():
        scale = growth**-0.5 if name.endswith("norm.weight") else 1  # undoes the larger mean
        weights[name][tuple(slice(n) for n in weight.shape)] = weight * scale


if __name__ == "__main__":
    main()
