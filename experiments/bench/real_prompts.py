"""Prompts that others publish: Spec-Bench's six tasks, HumanEval and GSM8K, from files that lie in a folder.

They are not part of this repository: the summaries (CNN/DM) and translations (WMT) of Spec-Bench keep their publishers' rights.
Spec-Bench is Apache-2.0 otherwise, HumanEval and GSM8K are MIT.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from experiments.bench.prompts import Prompt, chosen, read

# where each file is published, and the name of its task; Spec-Bench names its own
FILES = {
    "spec_bench.jsonl": ("https://github.com/hemingkx/Spec-Bench: data/spec_bench/question.jsonl", None),
    "humaneval.jsonl": ("https://github.com/openai/human-eval: data/HumanEval.jsonl.gz, unpacked", "humaneval"),
    "gsm8k_test.jsonl": ("https://github.com/openai/grade-school-math: grade_school_math/data/test.jsonl", "gsm8k"),
}
MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}  # its categories


def real(
    folder: str, tasks: Sequence[str] | None = None, per_task: int | None = None, chat: bool = True
) -> list[Prompt]:
    """The prompts of these tasks: `mt_bench`, the other five of Spec-Bench by their names there, `humaneval`, `gsm8k`.

    Args:
        folder: has the files of `FILES`, as they are published or with "turns".
        tasks: those wanted, in this order; None for all.
        per_task: so many of each, drawn once; fewer are a part of more. None for all.
        chat: whether turns are messages of the tokenizer's chat template.
    """
    prompts = [prompt for name in FILES for prompt in _read(Path(folder, name), chat)]
    random.Random(0).shuffle(prompts)  # files are sorted by kind
    return chosen(prompts, tasks, per_task)


def _read(file: Path, chat: bool) -> list[Prompt]:
    url, task = FILES[file.name]
    if not file.exists():
        raise SystemExit(f"task.folder={file.parent}: {file.name} is not there. It is published at {url}.")
    return [prompt._replace(task=task or _task(prompt)) for prompt in read(str(file), chat=chat)]


def _task(prompt: Prompt) -> str:
    return "mt_bench" if prompt.task in MT_BENCH else prompt.task
