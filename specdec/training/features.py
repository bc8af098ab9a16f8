"""What a target says of texts, to train on: computed when it is asked for, and kept in a file if there is room."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from specdec.drafters.states_net import StatesNet
from specdec.drafters.text_states import read_texts
from specdec.models.digest import digest, weights_digest


@dataclass(frozen=True, eq=False)
class TargetTexts:
    """Texts that the target wrote, and what it says of them when it reads them again.

    Args:
        tokens: [batch, t] int64; negative after the end of a text.
        states: [batch, t, state, state_size]: those that a network asks for.
        hidden: [batch, t, hidden]: what the target's LM head reads.
        prompt_lengths: [batch] int64: how many tokens of each text the target has not written.
    """

    tokens: Tensor
    states: Tensor
    hidden: Tensor
    prompt_lengths: Tensor

    @classmethod
    def read(
        cls, target: PreTrainedModel, net: StatesNet, tokens: Tensor, prompt_lengths: Tensor | int = 1
    ) -> TargetTexts:
        """One pass of the target over texts [batch, t] int64, for this network; one number if prompts are of one length."""
        lengths = torch.as_tensor(prompt_lengths, device=tokens.device).expand(len(tokens))
        return cls(tokens, *read_texts(target, tokens.clamp(min=0), net.states), lengths)

    def padded(self, count: int) -> TargetTexts:
        """These, with room for so many tokens more."""
        states, hidden = pad(self.states, (0, 0, 0, 0, 0, count)), pad(self.hidden, (0, 0, 0, count))
        return TargetTexts(pad(self.tokens, (0, count), value=-1), states, hidden, self.prompt_lengths)


class Features:
    """`TargetTexts`, some rows at a time, as long as the longest of them.

    Args:
        target: the target.
        net: the network whose states are read.
        texts: [n, t] int64: texts that the target wrote; negative after the end of a text.
        prompt_lengths: [n] int64: how many tokens of each it did not.
        folder: where states are kept, once computed, in the target's dtype: 2 bytes x (states + 1) x hidden size for every
            token in bfloat16. Their file is named by the texts, the states and the target's weights, so that others are never
            taken for these. None: states are computed whenever they are asked for.

    Raises:
        OSError: there is no room for the file.
    """

    def __init__(
        self, target: PreTrainedModel, net: StatesNet, texts: Tensor, prompt_lengths: Tensor, folder: Path | None = None
    ):
        self._target, self._net, self.texts, self._prompt_lengths = target, net, texts, prompt_lengths
        self._kept = self._known = None
        if folder is not None:
            file = folder / f"states_{_digest(target, net, texts)}"
            known = file.with_suffix(".known")
            if not file.exists():
                known.unlink(missing_ok=True)
            self._kept = _mapped(file, (*texts.shape, len(net.states) + 1, net.state_size), target.dtype)
            self._known = _mapped(known, texts.shape[:1], torch.bool)  # rows whose states are there; written after them

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Tensor) -> TargetTexts:
        """The texts of these rows [batch] int64."""
        if self._kept is None or self._known is None:
            return self._read(rows)
        if len(new := rows[~self._known[rows]].unique()):
            found = self._read(new)
            states = torch.cat([found.states, found.hidden[:, :, None]], 2).to("cpu", self._kept.dtype)
            self._kept[new, : states.shape[1]] = states
            self._known[new] = True
        device, texts = self._target.device, self._texts(rows)
        kept = self._kept[rows, : texts.shape[1]].to(device)
        return TargetTexts(texts.to(device), kept[:, :, :-1], kept[:, :, -1], self._prompt_lengths[rows].to(device))

    def _texts(self, rows: Tensor) -> Tensor:
        """[batch, t] int64: those texts, without columns that none of them reaches."""
        texts = self.texts[rows]
        return texts[:, : int((texts >= 0).sum(1).max())]

    def _read(self, rows: Tensor) -> TargetTexts:
        device = self._target.device
        texts, lengths = self._texts(rows).to(device), self._prompt_lengths[rows].to(device)
        return TargetTexts.read(self._target, self._net, texts, lengths)


def _digest(target: PreTrainedModel, net: StatesNet, texts: Tensor) -> str:
    """A name for the states that a target has for a network along texts."""
    about = repr((net.states, list(texts.shape), weights_digest(target)))
    return digest(about.encode(), texts.contiguous().numpy().tobytes())


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that is a file; zeros where nothing has been written. Room on the disk is taken at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    size = torch.Size(shape).numel()
    with open(file, "ab") as there:
        os.posix_fallocate(there.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
