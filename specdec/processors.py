"""Logits processors that may keep state from call to call: every text that a tree holds has its own.

transformers calls a processor once per token, so a grammar's matcher or a counter can follow the text by itself. A tree holds
several continuations of one text. A call is therefore made on a copy, and the state before it stays for the other
continuations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

_WITHOUT_STATE = "transformers.generation.logits_process"  # a call of what this module defines leaves no trace
_WITH_STATE = ("SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor")  # but for these
_CONSTANT = (nn.Module, PreTrainedTokenizerBase, ModuleType)
# Of compiled libraries (xgrammar, llguidance, tokenizers): nothing that calls change, and nothing that `copy` can copy cheaply.
_CONSTANT_NAMES = ("CompiledGrammar", "TokenizerInfo", "LLTokenizer", "Tokenizer")
_OWN_WAYS = ("fork", "deep_copy")  # how their matchers are copied
_NO_COPY = (
    "{names}: logits processors have to follow {what} here, each in a state of its own, and cannot be copied: {why}. Give "
    "the class a __deepcopy__ that returns an independent copy, or {cure}."
)


class Processors:
    """The logits processors of one row in the state that their calls along one text have left them in.

    Args:
        processors: transformers `LogitsProcessor`s, or other callables of a text [1, length] and scores [1, vocab].
    """

    def __init__(self, processors: Sequence[Any] = ()):
        self.processors = tuple(processors)
        # Why they cannot be copied; set once they themselves have been called.
        self._no_copy_because: Exception | None = None

    def __bool__(self) -> bool:
        return bool(self.processors)

    def __call__(self, text: Tensor, scores: Tensor) -> tuple[Tensor, Processors]:
        """Process the scores [1, vocab] that follow a text [length] int64.

        Returns them and the processors in the state after the call.

        Raises:
            ValueError: they cannot be copied, and were called before in this state.
        """
        copies = self._copies()
        for processor in copies:
            scores = processor(text[None], scores)
        return scores, Processors(copies)

    def _copies(self) -> tuple[Any, ...]:
        """Copies; if there can be none, they themselves, once: that is right as long as calls go along one text."""
        if self._no_copy_because is not None:
            cure = "decide from the root down (rule=SiblingRejection()) and without a trace of every law"
            raise _refusal(self.processors, "several continuations of one text", self._no_copy_because, cure)
        try:
            return copied(self.processors)
        except Exception as why:  # whatever a class of somebody else's raises
            self._no_copy_because = why
            return self.processors


def check_copies(processors: Sequence[Any], rows: int) -> None:
    """Raise ValueError if processors that cannot be copied would have to serve several rows."""
    if rows > 1:
        try:
            copied(processors)
        except Exception as why:
            raise _refusal(processors, f"{rows} prompts", why, "pass one prompt at a time") from why


def _refusal(processors: Sequence[Any], what: str, why: Exception, cure: str) -> ValueError:
    names = ", ".join(type(processor).__name__ for processor in processors if not _without_state(processor))
    return ValueError(
        _NO_COPY.format(names=names, what=what, why=f"{type(why).__name__}: {why}".rstrip("."), cure=cure)
    )


def copied(processors: Sequence[Any]) -> tuple[Any, ...]:
    """Independent copies, made together: what two of them share, their copies share.

    Models, tokenizers and transformers' own processors are not copied. Functions are, as far as they remember something
    (`nonlocal`). Raises whatever `copy.deepcopy` does.
    """
    processors = tuple(processors)
    memo: dict[int, Any] = {}
    functions: list[FunctionType] = []
    queue, seen = list(processors), {}
    while queue:
        part = queue.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part  # alive, so that no other object gets its id
        own_way = next((way for name in _OWN_WAYS if (way := getattr(type(part), name, None))), None)
        if _is_constant(part):
            memo[id(part)] = part
        elif own_way is not None:
            memo[id(part)] = own_way(part)
        elif isinstance(part, FunctionType) and part.__closure__:
            functions.append(part)
            queue += [cell.cell_contents for cell in part.__closure__ if _is_full(cell)]
        else:
            queue += _parts(part)
    _copy_functions(functions, memo)
    return copy.deepcopy(processors, memo)


def _is_constant(part: Any) -> bool:
    return isinstance(part, _CONSTANT) or type(part).__name__ in _CONSTANT_NAMES or _without_state(part)


def _without_state(processor: Any) -> bool:
    kind = type(processor)
    return kind.__module__ == _WITHOUT_STATE and not issubclass(kind, list) and kind.__name__ not in _WITH_STATE


def _parts(part: Any) -> Iterable[Any]:
    """What `copy.deepcopy` would go on to."""
    if isinstance(part, MethodType):
        return [part.__self__]
    if isinstance(part, dict):
        return [*part.values(), *vars(part).values()] if hasattr(part, "__dict__") else list(part.values())
    if isinstance(part, (list, tuple, set)):
        return [*part, *vars(part).values()] if hasattr(part, "__dict__") else list(part)
    if isinstance(part, (type, FunctionType, str, bytes, int, float, complex)) or hasattr(part, "__deepcopy__"):
        return []
    try:
        made = part.__reduce_ex__(4)
    except Exception:  # it cannot be copied, as `copy.deepcopy` will find if it gets here
        return []
    return [] if isinstance(made, str) else made[1:3]


def _copy_functions(functions: list[FunctionType], memo: dict[int, Any]) -> None:
    """Copies with variables of their own in place of those of the functions that they were defined in."""
    cells = {id(cell): cell for function in functions for cell in function.__closure__ or ()}
    memo.update({i: CellType() for i in cells})
    for function in functions:
        closure = tuple(memo[id(cell)] for cell in function.__closure__ or ())
        memo[id(function)] = made = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
        )
        made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, {**vars(function)}
    for i, cell in cells.items():
        if _is_full(cell):
            memo[i].cell_contents = copy.deepcopy(cell.cell_contents, memo)


def _is_full(cell: CellType) -> bool:
    """Whether the variable has been assigned to."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
