"""Trains an EAGLE-3 network for a frozen target on text of its own making. May be stopped at any time, and resumes.

    python experiments/train_eagle3.py                       # for the demo target
    python experiments/train_eagle3.py target=hub target.target=NAME task=file task.path=FILE

Everything is kept in `folder`: the target's texts, the newest checkpoint, and at the end the network as engines read it.
Settings are in `conf/train_eagle3.yaml`.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("train_eagle3", "train_eagle3")

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from experiments.bench.inputs import begin
from experiments.bench.training import chosen, fit, lengths, own_texts, take_up
from specdec.drafters import Eagle3Drafter, Eagle3Net
from specdec.training import distillation
from specdec.training.states import acceptance, drafted, states_loss
from specdec.trees import Chain


def main(config: DictConfig) -> None:
    setting, folder = begin("experiments/train_eagle3.py", config), Path(config.folder)
    target = setting.models.target
    take_up(folder, config)
    texts = own_texts(chosen(setting, config), config, folder / "texts.pt")
    length = config.prompt_length + config.new_tokens
    whole = torch.stack([text for text in texts if len(text) == length])
    unseen, seen = whole[: config.held_out], whole[config.held_out :]
    net = network(target, config)
    kind = getattr(distillation, config.loss)

    def loss(some: Tensor) -> Tensor:
        return states_loss(kind, drafted(net, target, some, config.depth, config.prompt_length), config.decay)

    few = partial(evaluate, net, target, unseen[:16], config.prompt_length, 24)
    steps = fit(net, loss, seen, few, config, folder / "checkpoint.pt", steps=config.steps, seed=config.seed)
    net.eval().to(torch.bfloat16)
    if calls.leads():
        Eagle3Drafter(net).save_pretrained(folder / "eagle3")
    net.to(target.dtype)  # rounded, as it will be loaded
    found = evaluate(net, target, unseen, config.prompt_length, 64)
    for name, value in found.items():
        print(f"{name}: {value}")
    data = {"texts": len(seen), "parameters": sum(p.numel() for p in net.parameters())}
    print(folder / "eagle3", setting.log.write({**setting.source, **data, "figures": found, "history": steps}))


def network(target: PreTrainedModel, config: DictConfig) -> Eagle3Net:
    """A network of one of the target's own layers in size, which begins with the target's LM head."""
    like = deepcopy(target.config.get_text_config())
    like.num_hidden_layers, hidden = 1, like.hidden_size
    torch.manual_seed(config.seed)
    net = Eagle3Net(like, config.states, hidden, like.vocab_size)
    head: Any = target.get_output_embeddings()
    assert net.lm_head is not None
    net.lm_head.weight.data.copy_(head.weight)
    return net.to(target.device)


@torch.no_grad()
def evaluate(net: Eagle3Net, target: PreTrainedModel, texts: Tensor, prompt_length: int, tokens: int) -> dict[str, Any]:
    """Acceptance of chains of 4 on texts not trained on: as training sees it, and as it is when served."""
    parts = [drafted(net, target, some, 4, prompt_length) for some in texts.split(4)]
    depths = torch.tensor([acceptance(part) for part in parts])
    found: dict[str, Any] = {"accepted by depth": depths.mean(0).tolist(), "expected": 1 + float(depths.sum(1).mean())}
    net.eval()
    found |= lengths(target, list(texts[:, :prompt_length]), Eagle3Drafter(net, Chain(4)), tokens)
    net.train()
    return found
