"""A tiny chat model in a GGUF file: a vocabulary of bytes, and weights in several formats."""

import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from tiny_models import build
from transformers.convert_slow_tokenizer import bytes_to_unicode

from experiments.export_gguf import header, interleaved, renamed

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "Ġt", "Ġth"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIXED = {"ffn_down": GGMLQuantizationType.Q4_1, "ffn_up": GGMLQuantizationType.Q8_0, "attn_v": GGMLQuantizationType.F16}


def chat_model():
    return build("Llama", vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2,
                 pad_token_id=2, tie_word_embeddings=True, max_position_embeddings=128)  # fmt: skip


def write(file, model, formats=MIXED):
    """The model with the weights of some parts in these formats, and the others in float32."""
    writer = GGUFWriter(file, "llama")
    for key, value in {**header(model.config), "tokenizer_model": "gpt2"}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t", "Ġt h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            part = name.split(".")[-2]
            rows = interleaved(weight, heads[part]) if part in heads else weight
            kind = formats.get(renamed(name).split(".")[-2], GGMLQuantizationType.F32)
            writer.add_tensor(renamed(name), quants.quantize(rows.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(weight: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """What is left of a weight in this format."""
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))
