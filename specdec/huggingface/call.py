"""What `model.generate` does not pass to a custom decoding loop: the tokenizer, and its own arguments."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import update_wrapper
from types import FrameType
from typing import Any

from transformers import GenerationMixin


class LoopWithTokenizer:
    """A decoding loop for `custom_generate` that gets the `tokenizer` too, which transformers passes to its own loops only.

    transformers sets the tokenizer aside, then reads the loop's signature. At that moment the tokenizer is put back:
    otherwise `stop_strings` would be refused for want of a tokenizer, although one was passed.
    """

    def __init__(self, decode: Callable[..., Any]):
        self._decode = decode
        update_wrapper(self, decode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._decode(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        asking = _running("GenerationMixin._extract_generation_mode_kwargs")
        if asking is not None:
            aside, arguments = (asking.f_locals.get(name) for name in ("generation_mode_kwargs", "kwargs"))
            if aside and arguments is not None and aside.get("tokenizer") is not None:
                arguments["tokenizer"] = aside["tokenizer"]
        return inspect.signature(self._decode)


def arguments_of_generate() -> dict[str, Any]:
    """The arguments of the innermost running call of `model.generate`.

    Raises:
        ValueError: no such call is running in this thread.
    """
    running = _running("GenerationMixin.generate")
    if running is None:
        raise ValueError(
            "This decoding loop was not called by model.generate in this thread, so it cannot find the streamer. Pass "
            "it as model.generate(..., custom_generate=specdec.custom_generate(...)), or call it in the function that is "
            "passed there, in the same thread."
        )
    return running.f_locals


def _running(method: str) -> FrameType | None:
    """The innermost running call of a method of transformers' `GenerationMixin`, by its qualified name."""
    frame: FrameType | None = sys._getframe(1)
    home = GenerationMixin.__module__
    while frame is not None and (frame.f_code.co_qualname, frame.f_globals.get("__name__")) != (method, home):
        frame = frame.f_back
    return frame
