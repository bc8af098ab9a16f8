"""Forward passes compiled by torch.compile, once per shape and process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from tqdm import tqdm

_SHAPES = 256  # that may be compiled of one model; torch's own limit is 8


class Compiled:
    """A function compiled anew for every shape; as it stands if torch.compile cannot do it as a whole.

    Args:
        run: the function.
        name: what is shown while it is compiled, which takes from seconds to a minute.
    """

    def __init__(self, run: Callable[..., Any], name: str):
        self._run, self._name = run, name
        self._call: Callable[..., Any] = torch.compile(run, fullgraph=True, dynamic=False)
        self._shapes: set[Hashable] = set()

    def __call__(self, shape: tuple[int, ...], *args: Any) -> Any:
        """shape: all that the compiled code depends on."""
        if shape in self._shapes:
            return self._call(*args)
        self._shapes.add(shape)
        what = f"compiling {self._name}, {' x '.join(map(str, shape))}"
        try:
            with torch._dynamo.config.patch(recompile_limit=_SHAPES), tqdm(total=1, desc=what, leave=False) as bar:
                result = self._call(*args)
                bar.update()
                return result
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"engine: {self._name} cannot be compiled and runs as it stands: {reason}", stacklevel=2)
            self._call = self._run
            return self._run(*args)
