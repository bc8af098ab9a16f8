"""Texts of whole runs by fixed seeds: every drafter, tree, rule and engine, greedy and sampled.

    python tests/golden_runs.py

writes those of the eager engine to `golden_runs.json`, and the others have to give the same. They change when drawn coins or
laws do, which `Numerics` in CHANGELOG.md tells of; moving code about leaves every token where it is.
"""

import copy
import json
import warnings
from functools import partial
from pathlib import Path

import torch
from tiny_models import VOCAB, llama, padded
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, RepetitionPenaltyLogitsProcessor

import specdec
from specdec import Law, ModelTarget, Sampling
from specdec.drafters import (
    Fallback,
    LayerSkipDrafter,
    MedusaDrafter,
    MedusaHeads,
    ModelDrafter,
    NgramDrafter,
    SuffixDrafter,
)
from specdec.rules import (
    BlockVerification,
    KSeq,
    LenientRejection,
    LevelVerification,
    SiblingRejection,
    TraversalVerification,
    TypicalAcceptance,
)
from specdec.testing import Tape
from specdec.trees import Chain, Dynamic, Static, Widths

FILE = Path(__file__).with_suffix(".json")
ENGINES = {"eager": lambda: "eager", "graph": specdec.Graphs, "tape": lambda: specdec.Graphs(capture=Tape)}
NEW = 12  # tokens per prompt and turn
PROMPTS = [torch.tensor([3, 4, 3, 4, 3]), torch.tensor([9]), torch.arange(30, 42)]
SAID = [torch.tensor([11, 12, 13]), torch.tensor([14]), torch.arange(20, 25)]  # after the first texts
OPTIONS = {"max_new_tokens": NEW, "stop_tokens": (7, 21, 42), "seed": 22}
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(0.6, top_p=0.95),
    "processed": Sampling(0.6, top_p=0.95, processors=(RepetitionPenaltyLogitsProcessor(1.3),)),
}


def near(model, noise):
    """A model that often agrees with this one."""
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
    for parameter in made.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return made


def heads():
    made = MedusaHeads(3, 1, 32)
    torch.manual_seed(5)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made.eval()


def words(names):
    """A tokenizer with these tokens."""
    vocabulary = {name: i for i, name in enumerate(names)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=names[0])))


def rearranged(model, tokens):
    """The same model with its token tokens[i] as token i."""
    made = llama(num_hidden_layers=2, vocab_size=len(tokens))
    made.load_state_dict({k: v[tokens] if len(v) == VOCAB else v for k, v in model.state_dict().items()})
    return made


TARGET = llama(num_hidden_layers=2)
TARGET.lm_head.weight.data *= 4  # so that some tokens are likely
DRAFT = near(TARGET, 0.02)
SHARED = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).tolist()[
    :45
]  # five tokens are the target's alone
WORDS, DRAFT_WORDS = words([f"w{i}" for i in range(VOCAB)]), words([f"w{i}" for i in SHARED])

TREES = {
    "chain": lambda: Chain(3),
    "independent children": lambda: Widths((2, 2), Law.IID),
    "children without replacement": lambda: Widths((2, 2), Law.WITHOUT_REPLACEMENT),
    "sampled, then top": lambda: Widths((3, 1)),
    "top children": lambda: Widths((2, 1, 1), Law.POINT),
    "static": lambda: Static((-1, 0, 0, 1, 1, 2, 3), Law.WITHOUT_REPLACEMENT),
    "static, top": lambda: Static((-1, 0, 0, 0, 1, 1, 4)),
    "dynamic": lambda: Dynamic(8, 3, 2),
    "as long as they are sure": lambda: Dynamic(8, 3, 2, threshold=0.05),
}
MODELS = {  # drafters that draw trees
    "model": lambda tree: ModelDrafter(DRAFT, tree),
    "layers left out": lambda tree: LayerSkipDrafter(skip=[1], tree=tree),
    "heads": lambda tree: MedusaDrafter(heads(), tree),
    "other words": lambda tree: ModelDrafter(rearranged(DRAFT, SHARED), tree, DRAFT_WORDS),
    "n-grams, then a model": lambda tree: Fallback(NgramDrafter(2), ModelDrafter(DRAFT, tree)),
    "suffixes, then heads": lambda tree: Fallback(SuffixDrafter(), MedusaDrafter(heads(), tree)),
}
TEXT = {"none": lambda: None, "n-grams": lambda: NgramDrafter(4), "suffixes": SuffixDrafter}
RULES = {
    "sibling": SiblingRejection,
    "block": BlockVerification,
    "traversal": TraversalVerification,
    "k-seq": KSeq,
    "level": LevelVerification,
    "lenient": LenientRejection,
    "typical": TypicalAcceptance,
}


def drafter_of(name, tree):
    return TEXT[name]() if tree is None else MODELS[name](TREES[tree]())


def grid():
    """(drafter, tree, rule, sampling): every tree and every drafter with every rule, and every drafter with every tree."""
    found = [("model", tree, rule, "sampled") for tree in TREES for rule in RULES]
    any_tree = [rule for rule in RULES if rule not in ("block", "k-seq")]
    for i, name in enumerate(MODELS):
        for j, tree in enumerate(TREES):
            found += [(name, tree, any_tree[(i + j) % len(any_tree)], "sampled")]
            found += [(name, tree, any_tree[(i + j + 2) % len(any_tree)], "greedy")] if (i + j) % 2 else []
        found += [(name, "chain", rule, "sampled") for rule in ("block", "k-seq")]
    found += [(name, None, rule, "sampled") for name in TEXT for rule in RULES]
    found += [(name, None, rule, "greedy") for name in TEXT for rule in ("sibling", "typical")]
    found += [("model", tree, rule, "processed") for tree in ("chain", "dynamic") for rule in ("sibling", "traversal")]
    return dict.fromkeys(found)


def first_turn(*args, **options):
    return specdec.generate(*args, **options, keep=True)


def second_turn(last, *args, **options):
    """A run that begins where the run of the Generation `last` ended."""
    return specdec.generate(*args, **options, resume=last)


def shown(out):
    """A line per prompt: its new tokens, with a bar between two steps."""
    lines = []
    for row, text in enumerate(out.tokens):
        tokens, counts = iter(text.tolist()), [step.emitted[row] for step in out.trace.steps]
        lines.append("|".join(" ".join(str(next(tokens)) for _ in range(count)) for count in counts if count))
    return lines


def turns(name, tree, rule, sampling, engine):
    """Two turns of a conversation, line by line."""
    target, drafter = ModelTarget(TARGET), drafter_of(name, tree)
    options = {**OPTIONS, "rule": RULES[rule](), "sampling": SAMPLINGS[sampling], "engine": engine}
    options["tokenizer"] = WORDS if name == "other words" else None
    try:
        first = first_turn(target, PROMPTS, drafter, **options)
    except ValueError:  # the rule does not take these trees
        return ["refused"]
    later = [torch.cat(parts) for parts in zip(PROMPTS, first.tokens, SAID, strict=True)]
    return shown(first) + shown(second_turn(first, target, later, drafter, **options))


def counted(trace):
    """A line per step: what was emitted, accepted and tried in each row."""
    return [" ".join(map(str, (*step.emitted, *step.accepted, *step.tried))) for step in trace.steps]


def recorded(tree, rule, other, engine):
    """A run whose laws are recorded, and what another rule would have decided."""
    options = {**OPTIONS, "sampling": SAMPLINGS["sampled"], "rule": RULES[rule](), "engine": engine, "trace": "laws"}
    out = specdec.generate(TARGET, PROMPTS, drafter_of("model", tree), **options)
    return shown(out) + counted(out.trace) + counted(specdec.trace.replay(out.trace, RULES[other]()))


def bounded(tree, rule, engine):
    """A run with the best that any rule could do, and how far this one is from the target's law."""
    options = {**OPTIONS, "sampling": SAMPLINGS["sampled"], "rule": RULES[rule](), "engine": engine, "trace": "ceiling"}
    out = specdec.generate(TARGET, PROMPTS, drafter_of("model", tree), **options)
    metrics = out.summary()
    return [*shown(out), f"{metrics['ceiling_share']:.5f} {metrics['divergence']:.5f}"]


def called_by_transformers(name, tree, do_sample, engine):
    """`model.generate`, with the processors that it makes itself."""
    how = {"do_sample": True, "temperature": 0.6, "top_p": 0.95} if do_sample else {"do_sample": False}
    method = specdec.custom_generate(drafter_of(name, tree), seed=22, engine=engine)
    ends = {"max_new_tokens": NEW, "eos_token_id": [7, 21, 42], "repetition_penalty": 1.2, "pad_token_id": 0}
    found = TARGET.generate(**padded(PROMPTS), **how, **ends, custom_generate=method)
    return [" ".join(map(str, row)) for row in found.tolist()]


CASES = {" / ".join(part or "no tree" for part in case): partial(turns, *case) for case in grid()} | {
    "laws / chain": partial(recorded, "chain", "sibling", "block"),
    "laws / independent children": partial(recorded, "independent children", "k-seq", "level"),
    "laws / dynamic": partial(recorded, "dynamic", "sibling", "traversal"),
    "ceiling / sampled, then top": partial(bounded, "sampled, then top", "sibling"),
    "ceiling / chain, lenient": partial(bounded, "chain", "lenient"),
    "custom_generate / chain, sampled": partial(called_by_transformers, "model", "chain", True),
    "custom_generate / heads, sampled": partial(called_by_transformers, "heads", "sampled, then top", True),
    "custom_generate / dynamic, greedy": partial(called_by_transformers, "model", "dynamic", False),
}


def run(case, engine):
    """The lines of a case by an engine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "engine: the stage")  # some stages are run step by step
        return CASES[case](engine=engine)


def main():
    torch.set_num_threads(1)
    rows = [f"{json.dumps(case)}: {json.dumps(run(case, 'eager'), indent=1)}" for case in CASES]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
