"""The draft tree of one step, with the probabilities of its tokens and the path that was accepted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specdec.checks import as_int, check_kind
from specdec.display.picture import FAINT, PATH, PLAIN, Picture, Span
from specdec.display.text import kind_of_last
from specdec.laws import is_random
from specdec.trace.laws import Record
from specdec.trace.trace import Step
from specdec.tree import RowTree


def tree(step: Step, text: int = 0, tokenizer: Any = None) -> Picture:
    """One line per node: its token, and the probabilities q and p that draft and target gave it after its ancestors.

    q is the chance of the token under the law it was drawn from, given its elder siblings; "top" if it was chosen without a
    coin. The accepted path is set off, and the token emitted after it comes last.

    Args:
        step: of a trace recorded with trace="laws".
        text: which of the texts that the step's rows hold, by its index.
        tokenizer: shows tokens as text; None shows their ids.
    """
    check_kind("step", step, Step)
    row, record = step.row(as_int("text", text, 0)), step.record
    if record is None:
        raise ValueError('There is no tree in this step: record the run with trace="laws".')
    if row is None or not step.emitted[row]:
        running = [held for held, count in zip(step.held, step.emitted, strict=True) if count]
        raise ValueError(f"text={text}: it was not running in this step; choose another step, or one of {running}.")
    decided, drafted = record.decisions, record.tree().row(row)
    path = decided.path[row, : step.accepted[row] + 1].tolist()
    spans = [Span(_name(drafted.tokens[0], tokenizer), PATH), Span("\n")]
    for head, node, facts in _lines(record, drafted, row, 0, ""):
        on_path = node in path
        spans += [Span(head, FAINT), Span(_name(drafted.tokens[node], tokenizer), PATH if on_path else PLAIN)]
        spans += [Span(f"  {facts}{'  accepted' if on_path else ''}", FAINT), Span("\n")]
    if step.emitted[row] == step.accepted[row]:
        return Picture([*spans, Span("the text ends with an accepted token\n")])
    token, last = int(decided.token[row]), path[-1]
    kind = kind_of_last(step.accepted[row], step.tried[row])
    p = record.law().probabilities(row, last)[token]
    after = f" after {_name(drafted.tokens[last], tokenizer)}  p {p:.3f}  {kind}"
    return Picture([*spans, Span("emitted "), Span(_name(token, tokenizer), PATH), Span(f"{after}\n")])


def _lines(record: Record, drafted: RowTree, row: int, node: int, margin: str) -> Iterator[tuple[str, int, str]]:
    """(margin, node, probabilities) of every node below a node."""
    p = record.law().probabilities(row, node)
    draws = list(drafted.draws(node, len(p)))
    for slot, (child, q) in enumerate(draws):
        token, last = drafted.tokens[child], slot == len(draws) - 1
        drawn = f"{q[token]:.3f}" if is_random(drafted.laws[node], slot) else "top"
        yield f"{margin}{'└─ ' if last else '├─ '}", child, f"q {drawn}  p {p[token]:.3f}"
        yield from _lines(record, drafted, row, child, f"{margin}{'   ' if last else '│  '}")


def _name(token: int, tokenizer: Any) -> str:
    return repr(tokenizer.decode([token])) if tokenizer is not None else str(token)
