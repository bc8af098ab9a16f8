"""The demo prompts: beginnings cut from held-out files, 16 for each of four tasks."""

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from experiments.demo_pair import data

Block = TypeVar("Block", ast.FunctionDef, ast.ClassDef)
PER_TASK, PER_FILE = 16, 2
TOKENS = (60, 200)


def build(held: Path, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Writes `out` (fields id, task, prompt, source, licence) from the held-out documents in `held`."""
    documents = [data.Document(**json.loads(line)) for line in held.read_text("utf-8").splitlines()]
    rows = []
    for task, beginnings in TASKS.items():
        found = [(text, d) for d in documents for text in beginnings(d)]
        found.sort(key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())
        taken: Counter[str] = Counter()
        for text, d in found:
            prompt = _cut(text, tokenizer)
            if prompt and taken[d.path] < PER_FILE and taken.total() < PER_TASK:
                source, licence = f"{d.package}: {d.path}", data.LICENCES[d.package]
                rows.append(
                    dict(id=f"{task}-{taken.total():02d}", task=task, prompt=prompt, source=source, licence=licence)
                )
                taken[d.path] += 1
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _cut(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The whole lines that fit into `TOKENS[1]` tokens, or "" where these are fewer than `TOKENS[0]` tokens."""
    lines = text.splitlines()
    while lines and len(tokenizer("\n".join(lines), verbose=False)["input_ids"]) > TOKENS[1]:
        lines.pop()
    prompt = "\n".join(lines).rstrip()
    return prompt if len(tokenizer(prompt)["input_ids"]) >= TOKENS[0] else ""


def _blocks(d: data.Document, kind: type[Block]) -> Iterator[tuple[Block, list[str]]]:
    """The functions or classes of a module with their source lines, dedented."""
    try:
        tree = ast.parse(d.text if d.kind == "code" else "")
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, kind):
            source = "\n".join(d.text.splitlines()[node.lineno - 1 : node.end_lineno])
            yield node, dedent(source).splitlines()


def _lines_to(node: ast.FunctionDef | ast.ClassDef, child: ast.stmt) -> int:
    return (child.end_lineno or child.lineno) - node.lineno + 1


def _functions(d: data.Document) -> Iterator[str]:
    """Signature and docstring, to be continued by the body."""
    for node, lines in _blocks(d, ast.FunctionDef):
        described = ast.get_docstring(node) and len(node.body) > 1
        if described and "test" not in d.path:
            yield "\n".join(lines[: _lines_to(node, node.body[0]) + 1])  # and the first line of the body


def _docstrings(d: data.Document) -> Iterator[str]:
    """A class up to somewhere in its docstring."""
    for node, lines in _blocks(d, ast.ClassDef):
        if len(ast.get_docstring(node) or "") > 200:
            yield "\n".join(lines[: min(_lines_to(node, node.body[0]) - 1, 12)])


def _tests(d: data.Document) -> Iterator[str]:
    """The first half of a test function."""
    for node, lines in _blocks(d, ast.FunctionDef):
        if node.name.startswith("test") and len(lines) >= 8:
            yield "\n".join(lines[: len(lines) // 2 + 1])


def _prose(d: data.Document) -> Iterator[str]:
    """The first paragraphs of a docstring or of a section of the language reference."""
    sentences = d.text.count(". ") + d.text.count(".\n")
    if d.kind == "prose" and len(d.text) > 500 and sentences > len(d.text) / 160 and ">>>" not in d.text[:600]:
        lines = d.text.splitlines()
        yield "\n".join(lines[: min(len(lines) // 2, 9)])


TASKS = {"functions": _functions, "docstrings": _docstrings, "tests": _tests, "prose": _prose}
