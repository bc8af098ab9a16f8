"""The table of `quantised_self`."""

from __future__ import annotations

from typing import Any

from experiments.bench.report import markdown
from experiments.studies.quantised_costs import LONG


def page(result: dict[str, Any]) -> str:
    """One table: a row for every draft, and the columns of what it says, costs and gains."""
    drafts, roofline = result["drafts"], result["roofline"]
    columns = list(roofline["the target"])
    head = [
        "draft",
        "perplexity of the target in this format",
        "T = 0: acceptance, length of a chain of 4",
        "T = 0.7: the same",
        *columns,
    ]
    names = list(dict.fromkeys(["the target", *drafts, *roofline]))
    rows = [[name, *_said(drafts.get(name, {})), *_gains(roofline, name, columns)] for name in names]
    return "\n\n".join([f"# Quantisation and speculation\n\n{markdown([head, *rows])}", note(result), ""])


def _said(row: dict[str, Any]) -> list[str]:
    perplexity = f"{row['perplexity']:.2f}" if "perplexity" in row else "-"
    laws = [row.get(name) for name in ("T = 0", "T = 0.7")]
    return [perplexity, *(f"{law['acceptance']:.3f}, {law['lengths'][4]:.2f}" if law else "-" for law in laws)]


def _gains(roofline: dict[str, Any], name: str, columns: list[str]) -> list[str]:
    cells = [roofline.get(name, {}).get(column) for column in columns]
    return ["-" if cell is None else f"{cell[0]:.2f}" + (f" ({cell[1]})" if cell[1] else "") for cell in cells]


def note(result: dict[str, Any]) -> str:
    """Under which conditions the figures hold."""
    options, lengths = result["options"], result["drafts"]["the target"]["prompts"]
    return (
        f"SmolLM2-135M-Instruct, float32, {len(lengths)} prompts ({options['per_task']} of each of "
        f"{', '.join(options['tasks'])}; {', '.join(map(str, lengths))} tokens), {options['new_tokens']} new tokens each; "
        f"windows after those of at least {LONG}. Acceptance is the mean of sum "
        "min(p, q); a chain's length counts the target's own token. The weights come from a file in Q4_1 with its head in "
        "int8 (groups of 32): there the draft is the target, and other grids of few bits round it a second time, so a model "
        "trained in 16 bits may lose less to them. The head is rounded like the rest unless the row says otherwise."
        "\n\nRows 'as stored here' are the model after `specdec.store_weights`, which rounds activations of integers too; 'off "
        "the grid' the same model with its hidden dimensions in another order, so that its groups are not the file's. What "
        "their products cost: `experiments/studies/stored_weights.py`.\n\nThe last columns are a roofline, not a measurement: "
        "one H200 (4.8 TB/s, 989 TFLOPS in bf16, 1,979 TOPS in int8), weights and cache of Llama-3.1-8B, 32,768 tokens of "
        "context in every text, nothing counted but "
        "reading and computing, T = 0.7, acceptance of the 135M model, that of windows after far shorter texts. In the row "
        "of the target: its speed over the bf16 target; below: the speed-up over the target of that column alone, "
        "and in brackets the length of the chain that is best, of up to 8. A draft that is quantised shares the target's "
        "cache. Weights and window together: rates multiplied. The model of 1.2 billion weights is assumed to have a rate of "
        "0.7, drafts from the text a length of 2.0 at no cost."
    )
