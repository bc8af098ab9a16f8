"""Tiny random models with recurrent state, of every family that is decoded, and of those that are refused."""

from copy import deepcopy
from functools import partial

import torch
import transformers
from tiny_models import SIZES, TOKENS, build

LAYERS = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {**SIZES, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "layer_types": LAYERS}  # fmt: skip
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
KDA = {**SIZES, "num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4, "kv_lora_rank": 16,
       "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "layer_types": LAYERS,
       "mlp_layer_types": ["dense", "sparse", "sparse"]}  # fmt: skip
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2}
SSD = {**SIZES, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}
CONVOLUTIONS = {**SIZES, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": False}


def hybrid(kind, dtype=torch.float32, seed=0, **config):
    """As `build`, with states that remember: decays by which a token is left after some, and inputs that matter."""
    model = build(kind, dtype, seed, **config)
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.data = torch.linspace(0.01, 0.4, weight.numel()).log().reshape(weight.shape).to(dtype)
        if "conv" in name and weight.dim() > 1:
            weight.data *= 2
    return model


GATED_DELTA = {
    "qwen3_next": partial(hybrid, "Qwen3Next", **DELTA, **EXPERTS),
    "qwen3_5": partial(hybrid, "Qwen3_5", **DELTA),
    "qwen3_5_moe": partial(hybrid, "Qwen3_5Moe", **DELTA, **EXPERTS),
    "olmo_hybrid": partial(hybrid, "OlmoHybrid", **{**DELTA, "linear_num_key_heads": 4}),
    "kimi_linear": partial(hybrid, "KimiLinear", **KDA, num_experts=4, num_experts_per_token=2,
                           experts_implementation="eager"),
    "bailing_hybrid": partial(hybrid, "BailingHybrid", **KDA, num_experts=16, num_expert_group=4, topk_group=2,
                              num_experts_per_tok=2),
}  # fmt: skip
STATE_SPACE = {
    "mamba2": partial(hybrid, "Mamba2", **MAMBA, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=16),
    "bamba": partial(hybrid, "Bamba", **SSD, attn_layer_indices=[1]),
    "granitemoehybrid": partial(hybrid, "GraniteMoeHybrid", **SSD, num_local_experts=4, num_experts_per_tok=2,
                                shared_intermediate_size=16, layer_types=LAYERS, position_embedding_type="rope"),
    "falcon_h1": partial(hybrid, "FalconH1", seed=5, **{**SSD, "num_hidden_layers": 2}, mamba_d_ssm=64),
    "nemotron_h": partial(hybrid, "NemotronH", seed=4, **{**SIZES, "num_hidden_layers": None}, ssm_state_size=8,
                          mamba_num_heads=8, mamba_head_dim=8, n_groups=2, chunk_size=16, n_routed_experts=4,
                          num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
                          layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]),
    "zamba2": partial(hybrid, "Zamba2", **{**SIZES, "num_key_value_heads": 4}, mamba_d_state=8, n_mamba_heads=8,
                      mamba_ngroups=2, chunk_size=16, mamba_headdim=8, attention_hidden_size=64, attention_head_dim=16,
                      kv_channels=8, layers_block_type=["linear_attention", "hybrid", "linear_attention"],
                      hybrid_layer_ids=[1]),
}  # fmt: skip
SCAN = {
    "mamba": partial(hybrid, "Mamba", **MAMBA, state_size=8, time_step_rank=4),
    "falcon_mamba": partial(hybrid, "FalconMamba", **MAMBA, state_size=8, time_step_rank=4),
    "jamba": partial(hybrid, "Jamba", seed=5, **SIZES, mamba_d_state=8, mamba_dt_rank=4, num_experts=2, num_experts_per_tok=1,
                     attn_layer_period=2, attn_layer_offset=1),
}  # fmt: skip
CONVOLUTION = {
    "lfm2": partial(hybrid, "Lfm2", seed=4, **CONVOLUTIONS),
    "lfm2_moe": partial(hybrid, "Lfm2Moe", seed=5, **CONVOLUTIONS, num_experts=4, num_experts_per_tok=2,
                        moe_intermediate_size=16, num_dense_layers=1),
    "lfm3": partial(hybrid, "Lfm3", **{**CONVOLUTIONS, "layer_types": ["conv", "full_attention", "sliding_attention"]},
                    sliding_window=8),
}  # fmt: skip


def installed(models):
    """Those of these models, or of (model, ...), whose class the installed transformers has."""
    kinds = {name: (made[0] if isinstance(made, tuple) else made).args[0] for name, made in models.items()}
    return {name: models[name] for name, kind in kinds.items() if hasattr(transformers, f"{kind}ForCausalLM")}


HYBRIDS = installed({**GATED_DELTA, **STATE_SPACE, **SCAN, **CONVOLUTION})

REFUSED = installed({
    "zamba": (partial(hybrid, "Zamba", **{**SIZES, "num_key_value_heads": 4, "num_hidden_layers": 5},
                      attention_hidden_size=64, attention_head_dim=16,
                      mamba_d_state=8, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1,
                      layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]),
              "a forward pass over our cache fails with RuntimeError: mamba_selective_scan is called again"),
    "inkling2": (partial(hybrid, "Inkling2", **SIZES, unpadded_vocab_size=50, swa_num_attention_heads=4,
                         swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=16, d_rel=4, rel_extent=16,
                         layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"], n_routed_experts=4,
                         num_experts_per_tok=2, moe_intermediate_size=16, n_layers_per_attn_res_block=2),
                 "a forward pass over our cache fails with TypeError.*'Tensor' and 'View'"),
    "zaya": (partial(hybrid, "Zaya", **SIZES, num_experts=4, moe_intermediate_size=16, router_hidden_size=8,
                     layer_types=["hybrid"] * 3), "layer 0 keeps a state that is computed by no function known here"),
    "recurrent_gemma": (partial(hybrid, "RecurrentGemma", **{**SIZES, "num_key_value_heads": 4}, lru_width=32,
                                attention_window_size=64, block_types=["recurrent", "attention"]),
                        "a text that is read in two forward passes differs by|its recurrent state is not in layers"),
    "minimax": (partial(hybrid, "MiniMax", **SIZES, num_local_experts=4, layer_types=LAYERS, block_size=8),
                "a forward pass over our cache fails with ValueError: MiniMax uses cache of its own"),
    "rwkv": (partial(hybrid, "Rwkv", **MAMBA, attention_hidden_size=32, intermediate_size=48),
             "its recurrent state is not in layers of the cache"),
    "xlstm": (partial(hybrid, "xLSTM", **MAMBA, embedding_dim=32, num_blocks=2, num_heads=4, chunk_size=16),
              "its recurrent state is not in layers of the cache"),
})  # fmt: skip


def disturbed(model, scale=0.02):
    """A copy whose weights are a little off: as a draft, it is right for most tokens."""
    made, generator = deepcopy(model), torch.Generator().manual_seed(1)
    for weight in made.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data += scale * weight.data.std(correction=0) * noise.to(weight.dtype)
    return made
