"""Logits processors that keep state from call to call: every text in a tree has a state of its own.

transformers calls a processor once per token, so a grammar's matcher or a counter can follow the text by itself. A tree holds
several continuations of one text. So each call is made on a copy, and the state before it stays for the other continuations.
Where there will be no others, the processors themselves are called, which saves a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from types import CellType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Processors of this module keep no state, but for the two below and those that hold functions of the caller.
_WITHOUT_STATE = "transformers.generation.logits_process"
_WITH_STATE = ("SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor")
_PLAIN = (int, float, complex, str, bytes, NoneType, Tensor, torch.device, torch.dtype)
# Never copied. Of an nn.Module that is no PreTrainedModel, only the parameters: the rest may count calls.
_CONSTANT = (PreTrainedModel, nn.Parameter, PreTrainedTokenizerBase, ModuleType)
# Never copied either: classes of xgrammar, llguidance and tokenizers that no call changes and that are large.
_CONSTANT_NAMES = ("CompiledGrammar", "TokenizerInfo", "LLTokenizer", "Tokenizer")
# the methods by which matchers of these libraries copy themselves
_OWN_WAYS = ("fork", "deep_copy")
_NO_COPY = (
    "{names}: logits processors must follow {what} here, each in a state of its own, and cannot be copied: {why}. Give the "
    "class a __deepcopy__ that returns an independent copy, or {cure}."
)
_NOT_TOP_DOWN = (
    "The rule says top_down = True, but asked for the target's law at a node beside the path that it accepts. Set "
    "top_down = False on its class."
)


class Processors:
    """The logits processors of one row, in their state after one text.

    Args:
        processors: transformers `LogitsProcessor`s, or other callables of a text [1, length] and scores [1, vocab].
        lent: whether they belong to the caller, and must not be changed.
    """

    def __init__(self, processors: Sequence[Any] = (), lent: bool = True):
        self.processors, self._lent = tuple(processors), lent
        # What a second call in this state raises, once the processors themselves, and not copies, were called.
        self._no_copy_because: ValueError | None = None

    def __bool__(self) -> bool:
        return bool(self.processors)

    @property
    def keep_state(self) -> bool:
        """Whether what they say of a text may depend on calls for its beginnings."""
        return not all(map(_without_state, self.processors))

    def __call__(self, text: Tensor, scores: Tensor, last: bool = False) -> tuple[Tensor, Processors]:
        """Process the scores that follow a text.

        Args:
            text: [length] int64.
            scores: [1, vocab].
            last: whether no other call will be made in this state, so that no copy has to keep it.

        Returns:
            The new scores [1, vocab], and the processors in their state after this call.

        Raises:
            ValueError: it is the second call in this state, and the first was the last one, or no copy could be made for it.
        """
        processors, scores = self._called(text[None], scores, last)
        return scores, Processors(processors, lent=False)

    # Not in inference mode, as in `model.generate`: a processor may compute gradients of its own.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _called(self, texts: Tensor, scores: Tensor, last: bool) -> tuple[tuple[Any, ...], Tensor]:
        """The processors after this call, and the new scores. texts: [batch, length] int64, scores: [batch, vocab]."""
        processors, texts, scores = self._copies(last), texts.clone(), scores.clone()
        for processor in processors:
            scores = processor(texts, scores)
        return processors, scores

    def _copies(self, last: bool) -> tuple[Any, ...]:
        """Copies; or once the processors themselves, if this call is the last one, or if they cannot be copied."""
        if self._no_copy_because is not None:
            raise self._no_copy_because
        if last and not self._lent:
            self._no_copy_because = ValueError(_NOT_TOP_DOWN)
            return self.processors
        try:
            return copied(self.processors)
        except Exception as why:  # a user's class may raise anything
            cure = "decide from the root down (rule=SiblingRejection()) and without a trace of every law"
            self._no_copy_because = _refusal(self.processors, "several continuations of one text", why, cure)
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

    Models, tokenizers and transformers' own processors are not copied, nor are the parameters of other modules. Functions
    are copied if they remember something (`nonlocal`, defaults, attributes). Raises whatever `copy.deepcopy` raises.
    """
    processors = tuple(processors)
    memo: dict[int, Any] = {}
    functions: list[FunctionType] = []
    queue, seen = list(processors), {}
    while queue:
        part = queue.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part  # kept alive, so that no other object gets its id
        own_way = next((way for name in _OWN_WAYS if (way := getattr(type(part), name, None))), None)
        if _is_constant(part):
            memo[id(part)] = part
        elif own_way is not None:
            memo[id(part)] = own_way(part)
        elif isinstance(part, FunctionType) and (memory := memory_of(part)):
            functions.append(part)
            queue += memory
        else:
            queue += _parts(part)
    _copy_functions(functions, memo)
    return copy.deepcopy(processors, memo)


def _is_constant(part: Any) -> bool:
    return isinstance(part, _CONSTANT) or type(part).__name__ in _CONSTANT_NAMES or _without_state(part)


def _without_state(processor: Any) -> bool:
    kind = type(processor)
    stateless = kind.__module__ == _WITHOUT_STATE and not issubclass(kind, list) and kind.__name__ not in _WITH_STATE
    return stateless and all(map(_is_plain, vars(processor).values()))


def _is_plain(part: Any) -> bool:
    """Whether a value is data alone, without code that might change it."""
    if isinstance(part, dict):
        return all(map(_is_plain, part.values()))
    if isinstance(part, (list, tuple, set)):
        return all(map(_is_plain, part))
    return isinstance(part, _PLAIN) or _is_constant(part)


def _parts(part: Any) -> Iterable[Any]:
    """The objects that `copy.deepcopy` would copy next."""
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
    except Exception:  # it cannot be copied; `copy.deepcopy` raises if it comes to it
        return []
    return [] if isinstance(made, str) else made[1:3]


def memory_of(function: FunctionType) -> list[Any]:
    """What a function remembers: variables of the functions around it, defaults and attributes."""
    variables = [cell.cell_contents if _is_full(cell) else None for cell in function.__closure__ or ()]
    defaults = *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()
    return [*variables, *defaults, *vars(function).values()]


def _copy_functions(functions: list[FunctionType], memo: dict[int, Any]) -> None:
    """Copy functions, each with a memory of its own, into `memo`."""
    cells = {id(cell): cell for function in functions for cell in function.__closure__ or ()}
    memo.update({i: CellType() for i in cells})
    for function in functions:
        closure = tuple(memo[id(cell)] for cell in function.__closure__ or ())
        memo[id(function)] = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    for function in functions:  # a second pass: functions may remember each other
        memory = function.__defaults__, function.__kwdefaults__, {**vars(function)}
        made = memo[id(function)]
        made.__defaults__, made.__kwdefaults__, made.__dict__ = copy.deepcopy(memory, memo)
    for i, cell in cells.items():
        if _is_full(cell):
            memo[i].cell_contents = copy.deepcopy(cell.cell_contents, memo)


def _is_full(cell: CellType) -> bool:
    """Whether a variable of an outer function has been assigned to."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
