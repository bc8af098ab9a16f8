"""What a target says of texts, to train on: computed when it is asked for, and kept in a file if there is room."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.states_net import StatesNet
from specdec.training.states import Read, read


class Features:
    """Texts of one length as the target reads them, some rows at a time.

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
            self._known = _mapped(file.with_suffix(".known"), texts.shape[:1], torch.bool)  # written after the states

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Tensor) -> Read:
        """The texts of these rows [batch] int64."""
        tokens = self.texts[rows].to(self._target.device)
        if self._kept is None or self._known is None:
            return read(self._target, self._net, tokens, self._prompt_length)
        if len(new := rows[~self._known[rows]].unique()):
            found = read(self._target, self._net, self.texts[new].to(self._target.device), self._prompt_length)
            self._kept[new] = torch.cat([found.states, found.hidden[:, :, None]], 2).to("cpu", self._kept.dtype)
            self._known[new] = True
        kept = self._kept[rows].to(self._target.device)
        return Read(tokens, kept[:, :, :-1], kept[:, :, -1], self._prompt_length)


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that is a file; zeros where nothing has been written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    size = torch.Size(shape).numel()
    if file.exists() and file.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, and {size * dtype.itemsize} are due: delete it.")
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
