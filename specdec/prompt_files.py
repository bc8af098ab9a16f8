"""Files of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: str) -> list[Any]:
    """The prompts of a file, as `specdec.generate` takes them.

    Args:
        path: `.jsonl` has objects with either a "prompt" (a text, or token ids) or "messages" (of a chat); any other file has
            one text a line.

    Raises:
        ValueError: it cannot be read, or there are no prompts in it.
    """
    try:
        lines = [line for line in Path(path).read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts={path} cannot be read: {error}.") from None
    if not lines:
        raise ValueError(f"prompts={path} holds no prompt.")
    return [_prompt(line, f"{path}, prompt {i}") for i, line in enumerate(lines)] if path.endswith(".jsonl") else lines


def _prompt(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from None
    found = [row[key] for key in ("prompt", "messages") if isinstance(row, dict) and key in row]
    if len(found) != 1:
        raise ValueError(f'{where}: give an object with either a "prompt" or "messages", not {line[:80]}')
    return found[0]
