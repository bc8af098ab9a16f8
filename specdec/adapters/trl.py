"""Rollouts for TRL's GRPOTrainer: each group's prompt is read once, and log-probabilities come with the text.

>>> from specdec.adapters.trl import rollouts
>>> GRPOTrainer(model, rewards, args, data, rollout_func=rollouts(NgramDrafter(), batch_size=64))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from specdec.arguments import as_prompts
from specdec.drafters import Drafter
from specdec.generate import generate
from specdec.sampling import Sampling


def rollouts(
    drafter: Drafter | None = None, *, batch_size: int | None = None, **options: Any
) -> Callable[[Sequence[Any], Any], dict[str, Any]]:
    """What the trainer takes as `rollout_func`: one completion for each prompt, in order.

    The trainer repeats each prompt `num_generations` times. What texts share is read once, and each has coins of its own. They
    follow from torch's random state, which the trainer seeds for each process and keeps in its checkpoints. The trainer's
    model is decoded in eval mode, with its weights of now. It must be whole on its device, not cut up by FSDP or DeepSpeed.

    Args:
        drafter, batch_size: as for `specdec.generate`.
        options: more for it, such as `rule` or `engine`.
    """

    def rollout_func(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        read = as_prompts(prompts, tokenizer)
        training = model.training
        try:
            out = generate(
                model.eval(), read, drafter, batch_size=batch_size, logprobs=True, seed=int(torch.randint(2**62, ())),
                sampling=Sampling.from_generation_config(trainer.generation_config),
                max_new_tokens=trainer.max_completion_length, tokenizer=tokenizer, **options,
            )  # fmt: skip
        finally:
            model.train(training)
        lists = {"prompt_ids": read, "completion_ids": out.tokens, "logprobs": out.logprobs or []}
        return {name: [row.tolist() for row in rows] for name, rows in lists.items()}

    return rollout_func
