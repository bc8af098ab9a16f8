"""What a target says of texts, to train on: computed when it is asked for, and kept in a file if there is room."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.states_net import StatesNet
from specdec.drafters.text_states import read_texts


@dataclass(frozen=True, eq=False)
class TargetTexts:
    """Texts that the target wrote, and what it says of them when it reads them again.

    Args:
        tokens: [batch, t] int64.
        states: [batch, t, state, state_size]: those that a network asks for.
        hidden: [batch, t, hidden]: what the target's LM head reads.
        prompt_length: how many tokens of each text the target has not written.
    """

    tokens: Tensor
    states: Tensor
    hidden: Tensor
    prompt_length: int = 1

    @classmethod
    def read(cls, target: PreTrainedModel, net: StatesNet, tokens: Tensor, prompt_length: int = 1) -> TargetTexts:
        """One pass of the target over texts [batch, t] int64, for this network."""
        return cls(tokens, *read_texts(target, tokens, net.states), prompt_length)


class Features:
    """`TargetTexts` of one length, some rows at a time.

    Args:
        target: the target.
        net: the network whose states are read.
        texts: [n, t] int64: texts that the target wrote.
        prompt_length: how many tokens of each it did not.
        file: where states are kept, once computed, in the target's dtype: 2 bytes x (states + 1) x hidden size for every token
            in bfloat16. None: they are computed whenever they are asked for. The file is for these texts and this network.
    """

    def __init__(
        self, target: PreTrainedModel, net: StatesNet, texts: Tensor, prompt_length: int, file: Path | None = None
    ):
        self._target, self._net, self.texts, self._prompt_length = target, net, texts, prompt_length
        self._kept = self._known = None
        if file is not None:
            shape = (*texts.shape, len(net.states) + 1, net.state_size)
            self._kept = _mapped(file, shape, target.dtype)
            # [n] bool: rows whose states are in the file; written after them
            self._known = _mapped(file.with_suffix(".known"), texts.shape[:1], torch.bool)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Tensor) -> TargetTexts:
        """The texts of these rows [batch] int64."""
        if self._kept is None or self._known is None:
            return self._read(rows)
        if len(new := rows[~self._known[rows]].unique()):
            found = self._read(new)
            self._kept[new] = torch.cat([found.states, found.hidden[:, :, None]], 2).to("cpu", self._kept.dtype)
            self._known[new] = True
        device = self._target.device
        kept = self._kept[rows].to(device)
        return TargetTexts(self.texts[rows].to(device), kept[:, :, :-1], kept[:, :, -1], self._prompt_length)

    def _read(self, rows: Tensor) -> TargetTexts:
        return TargetTexts.read(self._target, self._net, self.texts[rows].to(self._target.device), self._prompt_length)


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that is a file; zeros where nothing has been written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    size = torch.Size(shape).numel()
    if file.exists() and file.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, and {size * dtype.itemsize} are due: delete it.")
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
