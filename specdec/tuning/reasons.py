"""Why a candidate pays or does not, and which number would have to change by how much."""

from __future__ import annotations

from math import ceil

from specdec.tuning.estimate import Estimate
from specdec.tuning.foretold import Foretold
from specdec.tuning.rows import Row, Verdict

# A pass over a tree that takes so many passes over one token is what costs.
_AMPLE = 1.5


def verdict(row: Row, noise: Estimate | None) -> Verdict:
    """Whether a candidate pays, as far as it was measured, or else foretold."""
    found, (low, high) = row.speedup.estimate, _band(noise)
    if found is None or found.low is None:
        return "cannot tell"
    if found.above(high):
        return "pays"
    return "does not pay" if found.below(low) else "cannot tell"


def _band(noise: Estimate | None) -> tuple[float, float]:
    """Between which speed-ups none can be told from 1."""
    if noise is None or noise.low is None or noise.high is None:
        return 1.0, 1.0
    return min(1.0, noise.low), max(1.0, noise.high)


def reason(row: Row, found: Verdict, noise: Estimate | None, batch: int) -> str:
    """The verdict in words."""
    name, known = row.candidate.name, row.speedup.estimate
    if known is None:
        return f"{name} was neither foretold nor decoded: give more seconds."
    if found == "pays":
        return f"{name} pays: {row.speedup}, {_parts(row.foretold)}"
    lack = _lack(row, batch)
    if found == "cannot tell":
        return f"This machine cannot tell whether {name} pays: {row.speedup}. {_more(known, noise)} {lack}".rstrip()
    return f"Nothing pays: the best is {name}, {row.speedup}. {lack}".rstrip()


def _more(known: Estimate, noise: Estimate | None) -> str:
    """What an answer would need."""
    if known.low is None or known.high is None:
        return "One prompt, or one round, says nothing of others: give more prompts and seconds."
    low, high = _band(noise)
    apart = max(known.value - high, low - known.value)
    wide = known.value - known.low if known.value > high else known.high - known.value
    if wide > 10 * apart:
        if low < high:
            return f"That is no more than this machine's noise, {low:.2f}-{high:.2f}: less noise or more seconds are needed."
        return "The difference is too small to be worth a longer search."
    times = max(wide / apart, 1.1)
    return (
        f"For an answer the interval must be {times:.1f} times as narrow: about {ceil(times**2)} times as many prompts and "
        "seconds."
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
    if length - rest > 0.01:
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
    or_ = "Or acceptance" if len(said) > 1 else "Acceptance"
    said.append(f"{or_} is too low: {found.step:.2f} tokens would be needed, {times:.2f} times as many.")
    return " ".join(said)
