"""Drafters that read nothing but text, as proposers of vLLM: chains of fixed tokens, which vLLM tests with the target.

>>> # proposers.py, on PYTHONPATH
>>> class Mine(Proposer):
...     drafter = SuffixDrafter(corpus=texts)

    vllm serve TARGET --speculative-config '{"method": "custom_class", "model": "proposers.Mine", "num_speculative_tokens": 8}'
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from specdec.batch import Batch
from specdec.drafters import Drafter, DraftRun, NgramDrafter, SuffixDrafter
from specdec.engines.base import Engine
from specdec.laws import Law
from specdec.outcome import Outcome
from specdec.request import Text
from specdec.sampling import Sampling
from specdec.tree import DraftTree


class Proposer:
    """What vLLM makes of a class named by `model`, and asks for drafts after each step. Give a subclass its `drafter`.

    Raises:
        ValueError: the drafter needs a model, the target's states or coins, or drafts from other requests.
    """

    drafter: ClassVar[Drafter]

    def __init__(self, vllm_config: Any):
        model, self._spec = vllm_config.model_config, self.drafter.spec(Sampling())
        if self._spec.laws != {Law.POINT} or self.drafter.states or self.drafter.models or not self._spec.by_row:
            raise ValueError(
                f"{self.drafter} does not draft from the row's text alone; use NgramDrafter or SuffixDrafter."
            )
        self._most, self._longest = vllm_config.speculative_config.num_speculative_tokens, model.max_model_len
        self._vocab = model.get_vocab_size()
        self._runs: dict[int, DraftRun] = {}  # of each row of vLLM's batch, which may come to hold another request

    def load_model(self, *args: Any) -> None:
        """There is none."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft for each request, but for those that have just got no token, as their prompts are being read.

        Args:
            sampled_token_ids: the tokens that the step gave each request.
            num_tokens_no_spec: [request] int: how long each text is, these tokens included.
            token_ids_cpu: [request, max_model_len] int: the texts.
            slot_mappings: not used.
        """
        return [
            self._draft(row, token_ids_cpu[row, : num_tokens_no_spec[row]].astype(np.int64)) if new else []
            for row, new in enumerate(sampled_token_ids)
        ]

    def _draft(self, row: int, text: np.ndarray) -> list[int]:
        left = min(self._most + 1, self._longest - len(text))
        if left < 2:
            return []
        run = self._runs.get(row)
        held = text[:0] if run is None else run.batch.text(0)
        if run is None or not np.array_equal(held, text[: len(held)]):
            run = self._runs[row] = self._begin(text, left)
        elif len(held) < len(text):
            outcome = Outcome.given(text[len(held) :].tolist(), left)
            run.batch.append(outcome)
            run.batch.note(outcome)
            run.commit(outcome)
        return _first_path(run.propose(None), left - 1)  # type: ignore[arg-type] - no coin decides where a token is drafted

    def _begin(self, text: np.ndarray, left: int) -> DraftRun:
        batch = Batch(1, self._longest + self._most + 1, self._vocab, torch.device("cpu"))
        settings: Any = SimpleNamespace(
            sampling=Sampling(),
            stop_tokens=(),
            tokenizer=None,
            engine=Engine(),
            static=False,
            spec=self._spec,
            keep=False,
            slots=None,
            seed=0,
        )
        batch.begin(settings, [Text(0, text, len(text), left, 0)], self._longest)
        run = self.drafter.start(None, batch)  # type: ignore[arg-type] - it asks nothing of a target
        run.enter([0])
        return run


class Ngram(Proposer):
    """`NgramDrafter` as it is."""

    drafter = NgramDrafter()


class Suffix(Proposer):
    """`SuffixDrafter` as it is."""

    drafter = SuffixDrafter()


def _first_path(tree: DraftTree, most: int) -> list[int]:
    """The tokens of first children from the root down, at most so many."""
    path, node = [], 0
    rows = zip(tree.tokens[0].tolist(), tree.topology.parents[0].tolist(), tree.laws[0].tolist(), strict=True)
    for i, (token, parent, law) in enumerate(rows):
        if parent == node and law != Law.PADDING and len(path) < most:
            path, node = [*path, token], i
    return path
