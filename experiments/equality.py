"""What "equal" means in each dtype: how often greedy text is `model.generate`'s, and how near the ties are where it is not.

    python experiments/equality.py --output experiments/results/equality_cpu.json

Each prompt's text is compared with what `model.generate` writes for that prompt alone. Where the two part, both tokens are
looked up in the logits of one fresh forward pass over the text that they share: the gap between them, as a fraction of the
largest logit in absolute value, is how much rounding it took. `model.generate` over the padded batch is measured too, as
it parts from itself in the same way. Random models of a few classes, with a noisy copy as small model, and the demo pair.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

import specdec
from experiments.bench.report import markdown
from experiments.bench.results import Json, provenance, whole
from specdec.drafters import Drafter, ModelDrafter, NgramDrafter
from specdec.trees import Widths

SIZES = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}  # fmt: skip
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
RANDOM: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": SIZES,
    "Qwen3ForCausalLM": SIZES,
    "Gemma3ForCausalLM": {**SIZES, **WINDOWS},
    "GPT2LMHeadModel": {"vocab_size": 500, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512},
}
DEMO = "demo pair"
DTYPES = ("float64", "float32", "bfloat16", "float16")
BATCHES = (1, 8)
NOISE = 0.05  # of a weight of the small model, as a fraction of the target's own spread
THEIRS = "model.generate"


class Case(NamedTuple):
    """A target, its small model and prompts, each [length] int64."""

    target: PreTrainedModel
    draft: PreTrainedModel
    prompts: list[Tensor]


def random_case(kind: str, dtype: torch.dtype, rows: int) -> Case:
    """Weights large enough that texts do not repeat one token; prompts of 4 to 24 tokens."""
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    target = cls(cls.config_class(**RANDOM[kind], bos_token_id=1, eos_token_id=None, pad_token_id=0)).eval()
    for weight in target.parameters():
        weight.data *= 3 if weight.dim() > 1 else 1
    draft = copy.deepcopy(target)
    for weight in draft.parameters():
        weight.data += NOISE * weight.data.std() * torch.randn_like(weight)
    prompts = [torch.randint(1, 500, (int(torch.randint(4, 25, ())),)) for _ in range(rows)]
    return Case(target.to(dtype), draft.to(dtype), prompts)


def demo_case(dtype: torch.dtype, rows: int) -> Case:
    pair = specdec.demo.load(dtype)
    texts = (prompt.text for prompt in pair.prompts[:rows])
    return Case(pair.target, pair.draft, [pair.tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])


def generated(model: PreTrainedModel, prompts: list[Tensor], tokens: int) -> list[list[int]]:
    """What `model.generate` writes for one batch."""
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")  # [batch, longest] int64
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    run: Any = model.generate
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return run(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


def drafted(case: Case, drafter: Drafter | None, prompts: list[Tensor], tokens: int) -> list[list[int]]:
    out = specdec.generate(case.target, prompts, drafter, max_new_tokens=tokens, stop_tokens=())
    return [text.tolist() for text in out.tokens]


def gap(model: PreTrainedModel, prompt: Tensor, ours: list[int], theirs: list[int]) -> tuple[int, float] | None:
    """(tokens before the texts part, how near the two tokens are there); None if they do not part."""
    shared = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    if shared is None:
        return None
    text = torch.cat([prompt, torch.tensor(ours[:shared], dtype=torch.int64)])
    with torch.inference_mode():
        logits = model(text[None], use_cache=False).logits[0, -1].double()  # [vocab]
    return shared, float((logits[ours[shared]] - logits[theirs[shared]]).abs() / logits.abs().max())


def measured(case: Case, tokens: int) -> Iterator[dict[str, Any]]:
    """A row for every batch size and drafter."""
    alone = [generated(case.target, [prompt], tokens)[0] for prompt in case.prompts]
    drafters = {"none": None, "n-gram": NgramDrafter(), "small model": ModelDrafter(case.draft, Widths([2, 2, 1]))}
    for batch in BATCHES:
        groups = [case.prompts[i : i + batch] for i in range(0, len(case.prompts), batch)]
        ways = {name: [text for g in groups for text in drafted(case, d, g, tokens)] for name, d in drafters.items()}
        if batch > 1:
            ways[THEIRS] = [text for g in groups for text in generated(case.target, g, tokens)]
        for name, texts in ways.items():
            found = [gap(case.target, *row) for row in zip(case.prompts, texts, alone, strict=True)]
            parted = [entry for entry in found if entry is not None]
            yield {
                "batch": batch,
                "drafter": name,
                "rows": len(found),
                "equal": len(found) - len(parted),
                "tokens_before_parting": [shared for shared, _ in parted],
                "gaps": [near for _, near in parted],
            }


def measure(models: list[str], dtypes: list[str], rows: int, tokens: int) -> list[dict[str, Any]]:
    """Every model in every dtype."""
    figures = []
    for dtype, name in tqdm([(dtype, name) for dtype in dtypes for name in models], leave=False):
        of = getattr(torch, dtype)
        case = demo_case(of, rows) if name == DEMO else random_case(name, of, rows)
        figures += [{"model": name, "dtype": dtype, **row} for row in measured(case, tokens)]
    return figures


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown: a row for every dtype, batch and drafter; random models together, the demo pair by itself."""
    head = ["dtype", "batch", "drafter", "random models: equal", "largest gap", "demo pair: equal", "largest gap"]
    lines = [head]
    for key in dict.fromkeys((row["dtype"], row["batch"], row["drafter"]) for row in figures):
        alike = [row for row in figures if (row["dtype"], row["batch"], row["drafter"]) == key]
        parts = [[r for r in alike if r["model"] != DEMO], [r for r in alike if r["model"] == DEMO]]
        lines.append([*map(str, key), *(cell for part in parts for cell in _cells(part))])
    return markdown(lines)


def _cells(figures: list[dict[str, Any]]) -> tuple[str, str]:
    if not figures:
        return "-", "-"
    gaps = [near for row in figures for near in row["gaps"]]
    equal, rows = (sum(row[key] for row in figures) for key in ("equal", "rows"))
    return f"{equal}/{rows}", f"{max(gaps):.1e}" if gaps else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*RANDOM, DEMO], default=[*RANDOM, DEMO])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", type=int, default=16, help="prompts of each model")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each prompt")
    parser.add_argument(
        "--output", default="outputs/equality.json", help="where the figures go; the table goes beside them"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = provenance("experiments/equality.py", [], vars(options), "cpu")
    figures = measure(options.models, options.dtypes, options.rows, options.tokens)
    note = (
        f"{options.rows} prompts of each model x {options.tokens} tokens, greedy, on a CPU, each compared with `{THEIRS}` "
        "of that prompt alone. A gap is what parts the two tokens in the logits of a fresh forward pass, as a fraction of "
        f"the largest. The drafter `{THEIRS}` is transformers itself on the padded batch. "
        f"Commit `{(source['commit'] or 'unknown')[:7]}`, torch {source['versions']['torch']}, "
        f"transformers {source['versions']['transformers']}."
    )
    text = f"{table(figures)}\n\n{note}\n"
    print(text)
    with whole(Path(options.output).with_suffix(".md")) as file:
        file.write_text(text, "utf-8")
    print(Json(options.output).write({**source, "figures": figures}))


if __name__ == "__main__":
    main()
