"""Sets of prompts: the bundled ones, a file, or a data set of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import specdec


class Prompt(NamedTuple):
    """What one user says, turn by turn."""

    task: str
    turns: list[str]
    chat: bool = False  # each turn is a message of the tokenizer's chat template; otherwise a text to be continued


def demo(tasks: Sequence[str], per_task: int | None) -> list[Prompt]:
    """The prompts of the demo pair: texts that neither model was trained on."""
    return read(str(specdec.demo.FOLDER / "prompts.jsonl"), tasks, per_task)


def read(
    path: str, tasks: Sequence[str] | None = None, per_task: int | None = None, chat: bool = False
) -> list[Prompt]:
    """The prompts of a file.

    Args:
        path: `.jsonl` has objects with "turns", a "prompt" or a "question", and perhaps a "task" or "category" (Spec-Bench has
            "turns" and "category"); any other file has one prompt a line, all of one task.
        tasks: those wanted, in this order; None for all.
        per_task: the first so many of each; None for all.
        chat: whether turns are messages of the tokenizer's chat template.
    """
    lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    rows: Iterable[dict[str, Any]] = (
        map(json.loads, lines) if path.endswith(".jsonl") else ({"prompt": line} for line in lines)
    )
    return chosen((_prompt(row, Path(path).stem, chat) for row in rows), tasks, per_task)


def dataset(
    name: str, split: str, column: str, subset: str | None = None, per_task: int | None = None, chat: bool = False
) -> list[Prompt]:
    """The first prompts of a data set: each one text, or a list of turns, of this column."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found] - optional
    except ImportError:
        raise SystemExit("task=dataset needs the package datasets: pip install datasets.") from None
    rows = load_dataset(name, subset, split=split)
    if column not in rows.column_names:
        raise SystemExit(f"task.column={column}: {name} has the columns {', '.join(rows.column_names)}.")
    said = ([turns] if isinstance(turns, str) else list(turns) for turns in rows[column])
    return chosen((Prompt(name, turns, chat) for turns in said), None, per_task)


def _prompt(row: dict[str, Any], name: str, chat: bool) -> Prompt:
    task = row.get("task", row.get("category", name))
    said = row["turns"] if "turns" in row else [row["question"] if "question" in row else row["prompt"]]
    return Prompt(task, said, chat)


def chosen(prompts: Iterable[Prompt], tasks: Sequence[str] | None, per_task: int | None) -> list[Prompt]:
    """The first `per_task` prompts of each of these tasks."""
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    if unknown := set(tasks or ()) - set(by_task):
        raise SystemExit(f"task.tasks: there are no prompts for {sorted(unknown)}; choose from {sorted(by_task)}.")
    found = [prompt for task in tasks or by_task for prompt in by_task[task][:per_task]]
    if not found:
        raise SystemExit(f"There is no prompt in {len(by_task)} tasks of which task.per_task={per_task} are wanted.")
    return found
