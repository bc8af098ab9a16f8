"""Tiny random models of every kind that the tests decode from: weights so large that masks and positions matter."""

from functools import partial

import torch
import transformers

VOCAB = 50
WINDOW = 8  # sliding windows and chunks: shorter than most texts
PROMPTS = [torch.arange(1, 6), torch.tensor([9]), torch.arange(30, 42), torch.tensor([3, 4, 3, 4, 3])]


def build(kind, dtype=torch.float32, seed=0, **config):
    """A model of the class that transformers calls `kind` or `kind`ForCausalLM."""
    cls = getattr(transformers, kind, None) or getattr(transformers, f"{kind}ForCausalLM")
    if dtype == torch.float64 and "num_experts_per_tok" in config:
        config["experts_implementation"] = "eager"  # the default, grouped_mm, has no float64 on CPU
    torch.manual_seed(seed)
    model = cls(cls.config_class(**config)).to(dtype).eval()
    for p in model.parameters():
        p.data *= 3 if p.dim() > 1 else 1
    return model


def padded(prompts):
    """What a tokenizer that pads on the left gives for them."""
    longest = max(map(len, prompts))
    rows = [torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts]
    mask = [torch.arange(longest) >= longest - len(p) for p in prompts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(mask).long()}


def reference(model, prompt, **options):
    """The new tokens of transformers' own greedy generate."""
    return model.generate(prompt[None], **{"max_new_tokens": 24, "do_sample": False, **options})[0, len(prompt) :]


def state(model):
    """All of a model, but its weights, that decoding could leave changed."""
    configs = [m.config for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    return [c.to_dict() for c in configs], [c._attn_implementation for c in configs], hooks, model.training


TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}
SIZES = {**TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}  # fmt: skip
SLIDING = {**SIZES, "sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SHARED = {**SLIDING, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
          "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}  # fmt: skip
NO_ROPE = {**SIZES, "num_hidden_layers": 4, "no_rope_layer_interval": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA4 = {**NO_ROPE, **EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": WINDOW}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}


def llama(seed=0, dtype=torch.float64, **changes):
    """A small Llama; float64 unless told otherwise."""
    return build("Llama", dtype, seed, **{**SIZES, **changes})


GATE = {
    "llama": partial(build, "Llama", **SIZES),
    "qwen3": partial(build, "Qwen3", **SIZES),
    "gpt2": partial(build, "GPT2LMHeadModel", **TOKENS, **GPT2),
    "gemma3_sliding": partial(build, "Gemma3", **MIXED),
    "mixtral_sliding": partial(build, "Mixtral", **SLIDING, **EXPERTS),
    "gpt_oss_sliding": partial(build, "GptOss", **SLIDING, **EXPERTS, rope_parameters=YARN),
}
MATRIX = {
    "qwen2": partial(build, "Qwen2", **SIZES),
    "gpt_neox": partial(build, "GPTNeoX", **SIZES),
    "opt": partial(build, "OPT", **SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "phi3": partial(build, "Phi3", **SIZES),
    "mistral_sliding": partial(build, "Mistral", **SLIDING),
    "qwen3_moe": partial(build, "Qwen3Moe", **SIZES, **EXPERTS, moe_intermediate_size=24),
    "gemma2_softcap_sliding": partial(
        build, "Gemma2", **MIXED, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, attn_implementation="eager"
    ),
    "gemma3n_shared_layers": partial(
        build, "Gemma3n", **SHARED, laurel_rank=8, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]
    ),
    "gemma4_shared_unequal_layers": partial(build, "Gemma4", **SHARED, global_head_dim=16),
    "cohere2_sliding": partial(build, "Cohere2", **MIXED),
    "smollm3_some_layers_without_positions": partial(build, "SmolLM3", **NO_ROPE),
    "deepseek_v3_latent": partial(
        build, "DeepseekV3", **{**SIZES, "num_key_value_heads": 4}, **MLA, moe_intermediate_size=24, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
    ),
    "llama4_chunked": partial(build, "Llama4", **LLAMA4),
}  # fmt: skip

LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 20,
        "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}  # fmt: skip
LIMITED = {  # with the longest text whose cache stays valid
    "phi3_longrope": lambda: (build("Phi3", **SIZES, rope_parameters=LONG, original_max_position_embeddings=20), 20),
    "llama4_tuned": lambda: (build("Llama4", **LLAMA4, floor_scale=20, attn_scale=2.0), 19),
}

INTERFACE, BIAS = "attention does not go through", "position bias follows the slot"
REFUSED = {
    "bloom": (partial(build, "Bloom", **TOKENS, hidden_size=32, n_layer=2, n_head=4), BIAS),
    "mpt": (partial(build, "Mpt", **TOKENS, d_model=32, n_layers=2, n_heads=4), BIAS),
    "falcon": (partial(build, "Falcon", **TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), INTERFACE),
    "gptj": (partial(build, "GPTJ", **TOKENS, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), INTERFACE),
    "gpt_neo": (partial(build, "GPTNeo", **TOKENS, hidden_size=32, num_layers=2, num_heads=4,
                        attention_types=[[["global", "local"], 1]]), INTERFACE),
    "t5": (partial(build, "T5ForConditionalGeneration", vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=4, d_ff=48,
                   d_kv=8), "encoder-decoder"),
}  # fmt: skip
