"""Generated text, coloured by who wrote each token according to the trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from specdec.display.picture import BONUS, DEPTHS, DRAFTED, PLAIN, RECOVERED, Picture, Span, Style
from specdec.trace.trace import Trace

if TYPE_CHECKING:
    from specdec.generate import Generation


class Author(NamedTuple):
    """Who wrote a token.

    "drafted": the drafter, and the rule accepted it. "recovered": the target, after the rule accepted no child of the last
    accepted node. "bonus": the target, after the rule accepted a whole path. "alone": the target, in a step without a draft.
    """

    kind: Literal["drafted", "recovered", "bonus", "alone"]
    depth: int  # in the tree: 1 for a child of the root
    step: int  # of the trace, counted from 0


def authors(trace: Trace) -> dict[int, list[Author]]:
    """The author of every token of every text, by the text's index."""
    found: dict[int, list[Author]] = defaultdict(list)
    for i, step in enumerate(trace.steps):
        counts = zip(step.held, step.emitted, step.accepted, step.tried, strict=True)
        for text, emitted, accepted, tried in counts:
            if emitted:
                found[text] += [Author("drafted", depth, i) for depth in range(1, accepted + 1)]
            if emitted > accepted:
                found[text].append(Author(kind_of_last(accepted, tried), accepted + 1, i))
    return found


def kind_of_last(accepted: int, tried: int) -> Literal["recovered", "bonus", "alone"]:
    """The kind of the token that the target emits after the drafted ones."""
    return "recovered" if tried > accepted else "bonus" if accepted else "alone"


def text(generation: Generation) -> Picture:
    """Every text: accepted drafts by depth, recovered tokens, bonus tokens; token ids without a tokenizer.

    The trace does not say who wrote what an earlier call gave a text: these tokens have no colour.
    """
    spans, wrote = [*_legend(), Span("\n")], authors(generation.trace)
    for index, tokens in enumerate(generation.tokens):
        mine = wrote.get(index, [])[: len(tokens)]  # an interrupt may come between a step and its text
        steps, earlier = len({author.step for author in mine}), len(tokens) - len(mine)
        before = f", {earlier} of them by an earlier call" if earlier else ""
        spans.append(Span(f"\ntext {index}: {len(tokens)} tokens{before} in {steps} steps\n"))
        shown = pieces(tokens.tolist(), generation.tokenizer)
        spans += [Span(piece, PLAIN, "written by an earlier call") for piece in shown[:earlier]]
        written = zip(shown[earlier:], mine, strict=True)
        spans += [Span(piece, _style(author), _title(author)) for piece, author in written]
        spans.append(Span("\n"))
    return Picture(spans)


def pieces(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The characters that each token adds to the text. A character of several tokens counts for the last of them."""
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    found, shown = [], ""
    for end in range(1, len(tokens) + 1):
        whole = tokenizer.decode(tokens[:end])
        if whole.endswith("\ufffd") and end < len(tokens):
            whole = shown  # the token ends inside a character
        found.append(whole[len(shown) :])
        shown = whole
    return found


def _legend() -> list[Span]:
    depths = [Span(f" {depth} ", DRAFTED[depth - 1]) for depth in range(1, DEPTHS + 1)]
    last = [Span(" recovered ", RECOVERED), Span(" "), Span(" bonus ", BONUS)]
    return [Span("accepted draft, by depth "), *depths, Span(" "), *last]


def _style(author: Author) -> Style:
    others = {"recovered": RECOVERED, "bonus": BONUS, "alone": PLAIN}
    return others.get(author.kind) or DRAFTED[min(author.depth, DEPTHS) - 1]


def _title(author: Author) -> str:
    depth = f" at depth {author.depth}" if author.kind == "drafted" else ""
    return f"{author.kind}{depth}, step {author.step}"
