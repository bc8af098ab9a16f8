"""Random combinations on objects that are used again and again: the text is that of a plain run."""

import os
import random
import time

import pytest
import torch
from captured import DRAFT, DRAFTERS
from tiny_models import GATE, VOCAB

import specdec
from specdec import Law, ModelTarget, Sampling
from specdec.drafters import Fallback, ModelDrafter, NgramDrafter, SuffixDrafter
from specdec.rules import LevelVerification, SiblingRejection, TraversalVerification
from specdec.testing import Tape
from specdec.trees import Chain, Dynamic, Static

SEED, SECONDS = int(os.environ.get("SEED", "0")), 8  # SEED=... draws others, and repeats what a failure names
MODELS = {kind: GATE[kind](dtype=torch.float64) for kind in ("llama", "gemma3_sliding", "gpt2")}


def drafter(r, draft):
    shape = [-1, *(r.randrange(max(i - 3, 0), i) for i in range(1, r.randint(2, 12)))]
    dynamic = Dynamic(r.choice((2, 3, 8, 25)), r.randint(1, 6), r.randint(1, 5), r.choice((0.0, 0.3)))
    model = ModelDrafter(draft, r.choice([Chain(8), dynamic, Static(shape, r.choice((Law.POINT, Law.IID)))]))
    own = r.choice(
        [NgramDrafter(r.randint(1, 8), 2, r.randint(1, 3)), SuffixDrafter(r.choice((2, 17)), threshold=0.01)]
    )
    return r.choice([model, own, Fallback(own, model), *(make(draft) for make in DRAFTERS.values())])


def assert_plain(seed):
    r = random.Random(seed)
    model = MODELS[r.choice([*MODELS])]
    draft = r.choice([model, DRAFT])
    target, drafters = ModelTarget(model), [(n, drafter(random.Random(n), draft)) for n in (seed, seed + 10**6)]
    engines, prompts = ["eager", specdec.Graphs(), specdec.Graphs(capture=Tape)], [torch.tensor([1])]
    last = None  # of the generations that were kept
    for _ in range(4):
        if r.random() < 0.5:
            prompts = [torch.tensor(r.choices(range(1, VOCAB), k=r.choice((1, 2, 9)))) for _ in range(r.randint(1, 4))]
        options = {"max_new_tokens": r.choice((1, 2, 12)), "stop_tokens": r.choice(((), (7,), range(0, VOCAB, 6)))}
        options |= {"rule": r.choice([TraversalVerification(), LevelVerification(), SiblingRejection()]), "seed": seed}
        options["sampling"] = Sampling(r.choice((0.0, 1.0)))
        number, kept = r.choice(drafters)
        turns = {"resume": r.choice([None, last]), "keep": r.random() < 0.7}
        found = specdec.generate(target, prompts, kept, engine=r.choice(engines), **turns, **options)
        last = found if turns["keep"] else last
        plain = drafter(random.Random(number), draft) if options["sampling"].temperature else None
        expected = specdec.generate(model, prompts, plain, **options).tokens
        assert [t.tolist() for t in found.tokens] == [t.tolist() for t in expected], f"{kept}, {options}"
        prompts = [torch.cat(parts) for parts in zip(prompts, expected, strict=True)]


@pytest.mark.filterwarnings("ignore:engine")  # what cannot be captured
def test_any_combination_gives_the_text_of_a_plain_run(monkeypatch):
    monkeypatch.setattr(specdec.engines.graphs, "_BLOCK", 16)
    end, seed = time.monotonic() + SECONDS, SEED
    while seed == SEED or time.monotonic() < end:
        print(f"SEED={seed}")  # pytest shows it of a failure
        assert_plain(seed)
        seed += 1
