"""A model for lm-evaluation-harness: tasks that write text (`generate_until`), with a draft and in refilled rows.

>>> from specdec.adapters.lm_eval import SpecdecLM
>>> lm = SpecdecLM(target, ModelDrafter(draft), tokenizer=tokenizer, batch_size=32)
>>> lm_eval.simple_evaluate(lm, tasks=["gsm8k"])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM  # type: ignore[import-not-found] - only those who have it import this module
from transformers import GenerationConfig

from specdec.arguments import as_target
from specdec.drafters import Drafter
from specdec.generate import generate
from specdec.sampling import Sampling

_BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class SpecdecLM(LM):
    """Writes what tasks ask for, as the harness's own `hf` model does, which log-likelihoods of given texts are left to.

    A text ends at the first string of `until`, which is cut off. It also ends, as in `model.generate`, at such a string that
    begins in the prompt. What a task does not set is transformers' default: top_k=50 where it samples. Requests with equal
    settings are decoded together, and each text has coins of its own.

    Args:
        target, drafter: as for `specdec.generate`.
        tokenizer: the target's.
        batch_size: texts at work at once.
        max_gen_toks: most new tokens where a task does not say.
        options: more for `specdec.generate`, such as `rule`, `seed` or `engine`.
    """

    def __init__(
        self,
        target: Any,
        drafter: Drafter | None = None,
        *,
        tokenizer: Any,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        **options: Any,
    ):
        super().__init__()
        if refused := {"num_samples", "journal", "keep", "resume"} & {*options}:
            raise ValueError(
                f"{sorted(refused)}: the harness wants one text for each request, and keeps them; leave this out."
            )
        self.target, self.drafter, self.tokenizer, self.max_gen_toks = target, drafter, tokenizer, max_gen_toks
        self.options = {"tokenizer": tokenizer, "batch_size": batch_size, **options}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts in the order of the requests, whose `args` are (context, settings)."""
        texts, groups, written = [""] * len(requests), {}, 0
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        for places in groups.values():
            until, budget, sampling = self._settings(requests[places[0]].args[1])
            prompts = [self._ids(requests[place].args[0], budget) for place in places]
            out = generate(
                self.target, prompts, self.drafter, sampling=sampling, max_new_tokens=budget, first_index=written,
                **self.options,
            )  # fmt: skip
            written += len(places)
            for place, text in zip(places, out.text or [], strict=True):
                texts[place] = text[: min((text.find(end) for end in until if end in text), default=None)]
                self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
        return texts

    def _settings(self, given: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
        """What ends a text, its most new tokens, and how tokens are chosen; greedily unless a task asks to sample."""
        left, until = dict(given), given.get("until") or []
        left.pop("until", None)
        until = [until] if isinstance(until, str) else [end for end in until if end]
        budget = next((left.pop(name) for name in _BUDGETS if name in left), self.max_gen_toks)
        left = {name: value for name, value in left.items() if value is not None}
        warm = left.get("temperature", 1.0 if left.get("do_sample") else 0.0) > 0
        left["do_sample"] = left.get("do_sample", True) and warm
        if not left["do_sample"]:
            left = {name: value for name, value in left.items() if name not in _OF_SAMPLING}
        ends = {"stop_strings": until} if until else {}
        return until, int(budget), Sampling.from_generation_config(GenerationConfig(), **left, **ends)

    def _ids(self, context: str, budget: int) -> list[int]:
        """The end of a context, as long as the target can read with so many new tokens; of an empty one its BOS or EOS."""
        bos, longest = self.tokenizer.bos_token, as_target(self.target).context_length
        ids = self.tokenizer(context, add_special_tokens=not (bos and context.startswith(bos)))["input_ids"]
        if not ids:
            ids = [self.tokenizer.bos_token_id if bos else self.tokenizer.eos_token_id]
        return ids if longest is None else ids[-max(longest - budget, 1) :]

    @property
    def tokenizer_name(self) -> str:
        """Tells chat templates apart in the harness's caches."""
        return self.tokenizer.name_or_path

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text, whose BOS token is not doubled."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "SpecdecLM writes text; for tasks on log-likelihoods use the harness's own model, lm_eval.models.huggingface.HFLM."
        )

    loglikelihood_rolling = loglikelihood
