"""Many prompts of unequal lengths and budgets, and their texts: written together, or each in a call of its own."""

from functools import lru_cache

from captured import DRAFT, DRAFTERS, TARGET
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

import specdec
from specdec import Sampling

SHARED = [t % 47 for t in range(3, 43)]  # more tokens than a row waits for
MANY = [[1, 2, 3, 4, 5], [9], [*range(30, 42)], [3, 4, 3, 4, 3], [9], [*SHARED, 5], [*SHARED, 6, 8], SHARED, [1, 2, 3],
        [1, 2, 3, 4, 5], [*SHARED, 5, 11]]  # fmt: skip
BUDGETS = [3, 11, 1, 8, 5, 12, 2, 6, 9, 1, 7]
SAMPLED = {"sampling": Sampling(1.0), "seed": 3, "stop_tokens": (7, 11, 40)}
WITHOUT_NEIGHBOURS = [name for name in DRAFTERS if not name.endswith("paused")]


def texts(prompts=MANY, drafter=None, target=TARGET, **options):
    options = {"max_new_tokens": BUDGETS, **SAMPLED, **options}
    return [text.tolist() for text in specdec.generate(target, prompts, drafter, **options).tokens]


@lru_cache
def alone(name, **options):
    """The text of each prompt in a call of its own, by a drafter of this name."""
    return [
        texts([prompt], DRAFTERS[name](DRAFT), first_index=i, max_new_tokens=budget, **options)[0]
        for i, (prompt, budget) in enumerate(zip(MANY, BUDGETS, strict=True))
    ]


class Counting:
    """Logits processor with state: a token becomes likelier with every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % scores.shape[1]] += 5
        return scores


PROCESSED = {
    "state": Sampling(1.0, processors=(Counting(),)),
    "penalty": Sampling(1.0, processors=(RepetitionPenaltyLogitsProcessor(1.5),)),
    "config": Sampling.from_generation_config(
        GenerationConfig(do_sample=True, no_repeat_ngram_size=2, min_new_tokens=1, eos_token_id=[7, 11], top_k=20)
    ),
}
