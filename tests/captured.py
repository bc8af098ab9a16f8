"""Drafters whose steps are captured, and what a run by captured stages is compared with."""

import contextlib
import gc
import warnings
from copy import copy

import torch
from tiny_models import PROMPTS, llama

import specdec
from specdec import Law, Sampling
from specdec.drafters import (
    Eagle3Drafter,
    Eagle3Net,
    Fallback,
    LayerSkipDrafter,
    MedusaDrafter,
    MedusaHeads,
    ModelDrafter,
    NgramDrafter,
    Paused,
    SuffixDrafter,
)
from specdec.testing import Tape
from specdec.theory import CostCurve
from specdec.trees import Chain, Dynamic, Static, Widths

STAGES = ("propose", "score", "decide", "commit")
OPTIONS = {"max_new_tokens": 16, "stop_tokens": (7,), "seed": 3}


def heads():
    made = MedusaHeads(3, 1, 32)
    torch.manual_seed(5)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def eagle():
    torch.manual_seed(6)
    config = copy(TARGET.config)
    config.num_hidden_layers = 1
    return Eagle3Net(config, (0, 1, -1), 32).eval()


TARGET, DRAFT = llama(), llama(1, num_hidden_layers=1)
DRAFTERS = {
    "none": lambda draft: None,
    "chain": lambda draft: ModelDrafter(draft, Chain(3)),
    "independent children": lambda draft: ModelDrafter(draft, Widths((2, 2), Law.IID)),
    "sampled, then top": lambda draft: ModelDrafter(draft, Widths((3, 1))),
    "static": lambda draft: ModelDrafter(draft, Static((-1, 0, 0, 1, 1, 2, 3), Law.WITHOUT_REPLACEMENT)),
    "dynamic": lambda draft: ModelDrafter(draft, Dynamic(8, 3, 2)),
    "layers left out": lambda draft: LayerSkipDrafter(skip=[1], tree=Widths((2, 1))),
    "heads": lambda draft: MedusaDrafter(heads().to(draft.device), Widths((2, 2, 1))),
    "features": lambda draft: Eagle3Drafter(eagle().to(draft.device), Widths((2, 2))),
    "n-grams": lambda draft: NgramDrafter(4),
    "suffixes": lambda draft: SuffixDrafter(),
    "suffixes, then a model": lambda draft: Fallback(SuffixDrafter(), ModelDrafter(draft, Chain(3))),
    "chain, paused": lambda draft: Paused(ModelDrafter(draft, Chain(3)), 0.5, 0.4, SECONDS),
    "layers left out, paused": lambda draft: Paused(LayerSkipDrafter(skip=[1], tree=Chain(3)), 0.5, 0.4, SECONDS),
    "heads, paused": lambda draft: Paused(MedusaDrafter(heads().to(draft.device), Widths((2, 1))), 0.5, 0.4, SECONDS),
    "as long as they are sure": lambda draft: ModelDrafter(draft, Dynamic(8, 3, 2, threshold=0.05)),
}
SECONDS = CostCurve((1, 8), (1.0, 2.5))
ON_HOST = ["n-grams", "suffixes"]
SCORES_CAPTURED = [*DRAFTERS][-5:]
SAMPLINGS = {"greedy": Sampling(), "nucleus": Sampling(0.8, top_p=0.9)}


def texts(drafter, engine, prompts=PROMPTS, target=TARGET, **options):
    prompts = [prompt.to(target.device) for prompt in prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return specdec.generate(target, prompts, drafter, engine=engine, **{**OPTIONS, **options}).tokens


def counted_graphs(**options):
    """An engine, and all that it has captured so far."""
    made = []
    return specdec.Graphs(capture=lambda stage: made.append(Tape(stage)) or made[-1], **options), made


def captured_stages(engine):
    """Names of what this engine has captured."""
    return {key[0] for stages in engine._stages for key in stages.graphs}


def assert_replays(name, sampling, engine, target=TARGET, draft=DRAFT):
    """Runs of the drafter of this name that are captured and replayed give the text of eager ones."""
    options = {"prompts": PROMPTS[1:3], "sampling": SAMPLINGS[sampling], "target": target}
    runs = [(DRAFTERS[name](draft), "eager"), (DRAFTERS[name](draft), engine)]
    # trees of other drafters are numbered the same when cut at the budget; those of `Dynamic` are not, nor are their coins
    end = -3 if name == "dynamic" and sampling != "greedy" else None
    for seed in (3, 4):  # the second run replays the graphs of the first
        expected, found = (texts(*run, **options, seed=seed) for run in runs)
        assert [t[:end].tolist() for t in found] == [t[:end].tolist() for t in expected]
        if name in SCORES_CAPTURED:
            assert "drafted" in captured_stages(engine)
        elif name in ON_HOST:  # their trees come in several sizes
            assert engine.captured >= 2
        else:
            assert engine.captured == 4


@contextlib.contextmanager
def collecting_nothing():
    """Python frees what nobody refers to, and does not look for circles."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
