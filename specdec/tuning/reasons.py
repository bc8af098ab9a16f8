"""Why a candidate pays or does not, and which number would have to change by how much."""

from __future__ import annotations

from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import Foretold
from specdec.tuning.rows import Row, Verdict

_AMPLE = 1.5  # a pass over a tree that takes so many passes over one token is what costs


def verdict(row: Row, noise: Estimate | None) -> Verdict:
    """Whether a candidate pays, as far as it was measured, or else foretold."""
    found = row.speedup.estimate
    if found is None or found.low is None:
        return "cannot tell"
    high = max(1.0, noise.high if noise and noise.high else 1.0)
    low = min(1.0, noise.low if noise and noise.low else 1.0)
    if found.above(high):
        return "pays"
    return "does not pay" if found.below(low) else "cannot tell"


def reason(row: Row, found: Verdict, batch: int) -> str:
    """The verdict in words."""
    name, known = row.candidate.name, row.speedup.estimate
    if known is None:
        return f"{name} was neither foretold nor decoded: give more seconds."
    if found == "pays":
        return f"{name} pays: {row.speedup}, {_parts(row.foretold)}"
    if found == "cannot tell":
        return (
            f"This machine cannot tell whether {name} pays: {row.speedup}. {_more(known)} {_lack(row, batch)}".rstrip()
        )
    return f"Nothing pays: the best is {name}, {row.speedup}. {_lack(row, batch)}"


def _more(known: Estimate) -> str:
    if known.low is None or known.high is None:
        return "It was measured once only: give more seconds or prompts."
    wide = (known.high - known.low) / 2
    apart = max(abs(known.value - 1), 0.01)
    times = max((wide / apart) ** 2, 1.0)
    if times > 100:
        return "The difference is too small to be worth a longer search."
    return (
        f"For an answer the interval must be {wide / apart:.1f} times as narrow: about {times:.0f} times as many seconds, or "
        "less noise."
    )


def _parts(found: Foretold | None) -> str:
    if found is None:
        return "which is not foretold."
    return (
        f"as a step gives {found.acceptance.value:.2f} tokens and takes {found.step:.2f} of one without a draft "
        f"(drafting {found.draft:.2f}, the target's pass {found.verify:.2f}, the loop {found.other:.2f})."
    )


def _lack(row: Row, batch: int) -> str:
    """Which number would have to change by how much for a speed-up above 1."""
    found = row.foretold
    if found is None or found.step <= found.acceptance.value:
        return ""
    length, rest = found.acceptance.value, found.verify + found.other
    said = [f"A step gives {length:.2f} tokens and takes {found.step:.2f} of one without a draft."]
    if length > rest:
        said.append(
            f"The draft is too slow: drafting takes {found.draft:.2f} of a step and must take less than {length - rest:.2f} "
            f"({found.draft / (length - rest):.1f} times as fast)."
        )
    elif batch > 1 and found.verify > _AMPLE:
        said.append(
            f"The batch of {batch} is too large: the target's pass over the drafts takes {found.verify:.2f} of one over one "
            f"token a row, and must take less than {max(length - found.other - found.draft, 0):.2f}; try a smaller batch."
        )
    times = found.step / length
    said.append(f"Or acceptance is too low: {found.step:.2f} tokens would be needed, {times:.2f} times as many.")
    return " ".join(said)
