"""What a planted bug is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from specdec import Law
from specdec.testing import Table
from specdec.trees import Chain, Dynamic, Widths

STOP = 2
DRAFT = Table(3, seed=1)
TREES = {
    "chain": Chain(2),
    "iid": Widths((2, 1), Law.IID),
    "without_replacement": Widths((2, 1), Law.WITHOUT_REPLACEMENT),
    "dynamic": Dynamic(5, 2, 2),
}


@dataclass(frozen=True, eq=False)
class Mutant:
    """One planted bug, and a case in which it shows."""

    name: str
    case: Any  # a `Case`, or a `FastCase` of the batched code
    patches: tuple[
        tuple[Any, str, Any], ...
    ] = ()  # (owner, attribute, wrong value), where the library itself is changed

    @contextmanager
    def planted(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, attribute, wrong in self.patches:
                stack.enter_context(patch.object(owner, attribute, wrong, create=True))
            yield
