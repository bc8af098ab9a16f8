"""Sampled texts of tiny float64 models by fixed seeds, which every tested version of transformers has to reproduce.

    python tests/golden_texts.py

writes them to `golden_texts.json`. They change when drawn coins or laws do, which `Numerics` in CHANGELOG.md tells of.
"""

import json
from pathlib import Path

import torch
from tiny_models import GATE, MATRIX, PROMPTS
from transformers import GenerationConfig

import specdec
from specdec import Law, Sampling
from specdec.drafters import LayerSkipDrafter, ModelDrafter, NgramDrafter
from specdec.rules import BlockVerification, KSeq, TraversalVerification
from specdec.trees import Chain, Dynamic, Widths

FILE = Path(__file__).with_suffix(".json")
MODELS = {**GATE, **MATRIX}
WARPED = GenerationConfig(do_sample=True, temperature=0.8, top_k=20, repetition_penalty=1.3, no_repeat_ngram_size=3)


def drafting(seed, tree):
    """The same kind of model with other weights drafts."""
    return lambda kind: ModelDrafter(MODELS[kind](torch.float64, seed=seed), tree)


# the kind of model, what drafts for it, and how its text is sampled
CASES = {
    "small model, tree": ("llama", drafting(1, Widths((2, 2))), {"sampling": Sampling(1.0)}),
    "small model, dynamic tree": ("qwen3", drafting(0, Dynamic(8, 3, 2)), {"sampling": Sampling(0.7)}),
    "windows, independent children": (
        "gemma3_sliding",
        drafting(1, Widths((3, 1), Law.IID)),
        {"sampling": Sampling(1.0, top_k=10), "rule": KSeq()},
    ),
    "experts, chain by blocks": (
        "mixtral_sliding",
        drafting(0, Chain(3)),
        {"sampling": Sampling(1.0, top_p=0.9), "rule": BlockVerification()},
    ),
    "learnt positions, traversal": (
        "gpt2",
        drafting(1, Widths((2, 2), Law.WITHOUT_REPLACEMENT)),
        {"sampling": Sampling(0.9, min_p=0.01), "rule": TraversalVerification()},
    ),
    "shared layers, n-grams": ("gemma4_shared_unequal_layers", lambda _: NgramDrafter(3), {"sampling": Sampling(0.3)}),
    "layers skipped": (
        "smollm3_some_layers_without_positions",
        lambda _: LayerSkipDrafter(skip=[1]),
        {"sampling": Sampling(1.0)},
    ),
    "a generation config": ("llama", drafting(1, Chain(2)), {"sampling": Sampling.from_generation_config(WARPED)}),
}


def texts(case):
    """The new tokens of every prompt, in one batch."""
    kind, drafter, options = CASES[case]
    out = specdec.generate(
        MODELS[kind](torch.float64), PROMPTS, drafter(kind), max_new_tokens=20, stop_tokens=(), seed=20, **options
    )
    return [text.tolist() for text in out.tokens]


def main():
    torch.set_num_threads(1)
    rows = [f"{json.dumps(case)}: [\n" + ",\n".join(map(json.dumps, texts(case))) + "\n]" for case in CASES]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
