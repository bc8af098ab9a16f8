"""A Llama model of transformers as a GGUF file in float32, for llama.cpp.

    python experiments/export_gguf.py outputs/peers/target outputs/peers/target.gguf

The file holds no vocabulary: `experiments/peer_methods/libraries.py` hands over token ids. Needs the gguf package.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that save_pretrained wrote")
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    args = parser.parse_args()
    export(AutoModelForCausalLM.from_pretrained(args.model), args.file)


def export(model: Any, file: Path) -> None:
    """Writes a `LlamaForCausalLM`.

    Raises:
        SystemExit: it is no Llama, its positions are scaled, or its layers have biases.
    """
    from gguf import GGUFWriter

    refuse(model)
    writer = GGUFWriter(file, "llama")
    for key, value in header(model.config).items():
        getattr(writer, f"add_{key}")(value)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # llama.cpp reads the embedding where there is no output
        projection = name.split(".")[-2]
        rows = interleaved(weight, heads[projection]) if projection in heads else weight
        writer.add_tensor(renamed(name), rows.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refuse(model: Any) -> None:
    """What the names and the header here do not say is not written down as if it were nothing."""
    scaled = model.config.model_type == "llama" and model.config.rope_parameters["rope_type"] != "default"
    biases = [name for name in model.state_dict() if name.endswith(".bias")]
    if model.config.model_type != "llama" or scaled or biases:
        what = model.config.model_type + (", scaled positions" if scaled else "") + (f", {biases[0]}" if biases else "")
        raise SystemExit(f"{what}: only Llama models without biases and scaled positions are written as GGUF here.")


def header(config: Any) -> dict[str, Any]:
    """What llama.cpp must know of the model, by the names of GGUFWriter's methods."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "no_vocab",
        "file_type": 0,  # all float32
    }


def renamed(name: str) -> str:
    """The tensor's name in a GGUF file."""
    module, _, kind = name.rpartition(".")
    if module in WHOLE:
        return f"{WHOLE[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.{kind}"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """[heads * size, hidden] with the rows of a head as llama.cpp rotates them: i next to i + size / 2, pairs side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
