"""Planted in the loop."""

from __future__ import annotations

from transformers import RepetitionPenaltyLogitsProcessor

from certificates.cases import Case
from certificates.mutants.mutant import DRAFT, STOP, Mutant
from specdec import Sampling
from specdec.outcome import Outcome
from specdec.target_law import LogitsLaw
from specdec.testing import TabularDrafter
from specdec.trees import Chain

_of, _processed = Outcome.of, LogitsLaw._processed


def deaf_to_stops(tree, decisions, stop_tokens, left, invalid):
    """`Outcome.of` for which text runs on after a stop token."""
    return _of(tree, decisions, stop_tokens[:0], left, invalid)


def without_the_path(self, row, node):
    """`LogitsLaw._processed` that shows the processors the text up to the root, whatever the node."""
    logits = self._logits
    self._logits = logits[:, node : node + 1].expand_as(logits)
    scores = _processed(self, row, 0)
    self._logits = logits
    return scores


PENALTY = Sampling(1.0, processors=(RepetitionPenaltyLogitsProcessor(1.5),))
_LOOP = {
    "text runs on after a stop token": ({"stop_tokens": (STOP,)}, (Outcome, "of", deaf_to_stops)),
    "processors computed once per block": ({"sampling": PENALTY}, (LogitsLaw, "_processed", without_the_path)),
}
IN_LOOP = [
    Mutant(name, Case(TabularDrafter(DRAFT, Chain(2)), **options), (planted,))
    for name, (options, planted) in _LOOP.items()
]
