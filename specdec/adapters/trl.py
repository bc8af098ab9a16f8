"""Rollouts for TRL's GRPOTrainer: each group's prompt is read once, and log-probabilities come with the text.

>>> from specdec.adapters.trl import rollouts
>>> GRPOTrainer(model, rewards, args, data, rollout_func=rollouts(NgramDrafter(), batch_size=64))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

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

    if refused := {"num_samples", "journal", "on_error", "keep", "resume"} & {*options}:
        raise ValueError(f"{sorted(refused)}: the trainer wants one new completion for each prompt; leave this out.")

    def rollout_func(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        read = [_ids(prompt, trainer) for prompt in prompts]
        modes = [(module, module.training) for module in model.modules()]
        try:
            out = generate(
                model.eval(), read, drafter, batch_size=batch_size, logprobs=True, seed=int(torch.randint(2**62, ())),
                sampling=Sampling.from_generation_config(trainer.generation_config),
                max_new_tokens=trainer.max_completion_length, tokenizer=tokenizer, **options,
            )  # fmt: skip
        finally:
            for module, mode in modes:
                module.training = mode
        completions, logprobs = ([row.tolist() for row in rows or []] for rows in (out.tokens, out.logprobs))
        return {"prompt_ids": read, "completion_ids": completions, "logprobs": logprobs}

    return rollout_func


def _ids(prompt: str | Sequence[Any], trainer: Any) -> list[int]:
    """Token ids of a text, or of messages in the trainer's chat template."""
    tokenizer = trainer.processing_class
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    options = {"tools": trainer.tools or None, "chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **options)
