"""Planted in the loop."""

from __future__ import annotations

from transformers import RepetitionPenaltyLogitsProcessor

from certificates.cases import Case
from certificates.mutants.mutant import DRAFT, STOP, Mutant
from specdec import Sampling
from specdec.loop import Decoding
from specdec.target_law import LogitsLaw
from specdec.testing import TabularDrafter
from specdec.trees import Chain

_accept, _processed = Decoding._accept, LogitsLaw._processed


def deaf_to_drafted_stops(self, *args):
    """`Decoding._accept` for which text runs on after a stop token."""
    found, self.stop_tokens = self.stop_tokens, self.stop_tokens[:0]
    acceptance = _accept(self, *args)
    self.stop_tokens = found
    return acceptance


def without_the_path(self, row, node):
    """`LogitsLaw._processed` that shows the processors the text up to the root, whatever the node."""
    logits = self._logits
    self._logits = logits[:, node : node + 1].expand_as(logits)
    scores = _processed(self, row, 0)
    self._logits = logits
    return scores


PENALTY = Sampling(1.0, processors=(RepetitionPenaltyLogitsProcessor(1.5),))
_LOOP = {
    "text runs on after a stop token": ({"stop_tokens": (STOP,)}, (Decoding, "_accept", deaf_to_drafted_stops)),
    "processors computed once per block": ({"sampling": PENALTY}, (LogitsLaw, "_processed", without_the_path)),
}
IN_LOOP = [
    Mutant(name, Case(TabularDrafter(DRAFT, Chain(2)), **options), (planted,))
    for name, (options, planted) in _LOOP.items()
]
