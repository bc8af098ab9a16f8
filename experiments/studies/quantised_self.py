"""How quantisation and speculation act on each other: a model whose draft is itself, in fewer bits or with fewer keys.

    OMP_NUM_THREADS=1 python -m experiments.studies.quantised_self FOLDER --per-task 4

FOLDER has the prompts of `experiments/bench/real_prompts.py`. Writes quantisation_and_speculation.json and .md to
experiments/results:

- Acceptance: SmolLM2-135M-Instruct continues the prompts, greedily and at T = 0.7, and the drafts are read along its texts,
  with caches of their own. Given a text, a chain accepts its token x with chance min(1, q(x) / p(x)), and steps are cut as in
  `specdec.prediction`. A draft with a window reads the target's own keys and values, of the first 4 places and the latest
  ones (StreamingLLM, arXiv:2309.17453; as a draft, TriForce, arXiv:2404.11912); each place is taken to be the first of its
  step.
- The same with weights stored as `specdec.store_weights` does, activations rounded too; also off the grid of the file that they
  were read from, with the model's hidden dimensions in another order.
- Perplexity, of the target in each format, on the prompts.
- Speed-ups on a roofline of an H200 with a model of 8 billion weights, from that acceptance. No model was run there.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import specdec
from experiments.bench.real_prompts import real
from experiments.bench.results import ROOT, Json, provenance
from experiments.studies import quantised_costs, quantised_page
from specdec import Sampling
from specdec.models.stored_layers import FORMATS

SINKS = 4  # first places that a window keeps
WINDOWS = (32, 64, 128, 256)
SAMPLINGS = {"T = 0": Sampling(), "T = 0.7": Sampling(0.7)}
DEPTHS = (1, 2, 3, 4, 6, 8)
OUT = ROOT / "experiments" / "results" / "quantisation_and_speculation.json"


class Grid(NamedTuple):
    """Weights as integers of so many bits times a scale for each group of a row.

    Args:
        bits: of each integer.
        group: neighbouring weights of a row that share a scale; 0 for the whole row.
        offset: whether a group has a smallest value too, as in GGUF's Q4_1; if not, integers are symmetric about 0.
    """

    bits: int
    group: int = 0
    offset: bool = False

    def __call__(self, weight: Tensor) -> Tensor:  # [rows, columns] float -> the same, rounded
        groups = weight.unflatten(1, (-1, self.group or weight.shape[1]))
        low, high = groups.amin(-1, True), groups.amax(-1, True)
        if self.offset:
            scale = (high - low).clamp_min(1e-12) / (2**self.bits - 1)
            return (((groups - low) / scale).round() * scale + low).flatten(1)
        most = 2 ** (self.bits - 1) - 1
        scale = torch.maximum(high, -low).clamp_min(1e-12) / most
        return ((groups / scale).round().clamp(-most - 1, most) * scale).flatten(1)


GRIDS = {
    "int8, a scale per row": Grid(8),
    "int4, groups of 32": Grid(4, 32),
    "int4, groups of 64": Grid(4, 64),
    "int4, a scale per row": Grid(4),
    "int3, groups of 64": Grid(3, 64),
    "Q4_1": Grid(4, 32, offset=True),
    "Q4_1, head in int8": Grid(4, 32, offset=True),
}
HEADS = {"Q4_1, head in int8": Grid(8, 32)}  # the grids of the file that the target was read from


class Written(NamedTuple):
    """A prompt and what the target wrote after it.

    Args:
        ids: [place] int64: both.
        start: where the new text begins.
        laws: [new place, vocab]: the target's laws there.
    """

    ids: Tensor
    start: int
    laws: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--tasks", nargs="+", default=["mt_bench", "qa", "gsm8k", "humaneval", "rag"])
    parser.add_argument("--per-task", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = provenance("-m", ["experiments.studies.quantised_self", *sys.argv[1:]], vars(options), "cpu")
    with torch.inference_mode():
        found = acceptance(options)
    result = {**source, "drafts": found, "roofline": quantised_costs.roofline(found)}
    Json(str(OUT)).write(result)
    OUT.with_suffix(".md").write_text(quantised_page.page(result), "utf-8")
    print(OUT.with_suffix(".md").read_text("utf-8"))


def acceptance(options: argparse.Namespace) -> dict[str, Any]:
    """For each draft: perplexity, and for both temperatures agreement, acceptance and lengths."""
    model = specdec.demo.smollm2.load()
    prompts = [_ids(model.tokenizer, p.turns[0]) for p in real(options.folder, options.tasks, options.per_task)]
    written = {
        name: [_written(model.target, ids, sampling, options.new_tokens, i) for i, ids in enumerate(prompts)]
        for name, sampling in SAMPLINGS.items()
    }
    lengths = [len(ids) for ids in prompts]
    found: dict[str, Any] = {"the target": {"perplexity": perplexity(model.target, prompts), "prompts": lengths}}
    for name, grid in GRIDS.items():
        with rounded(model.target, grid, HEADS.get(name, grid)):
            found[name] = {"perplexity": perplexity(model.target, prompts), **_compared(written, _own(model.target))}
        print(name, found[name], flush=True)
    for name, stored in _stored(model.target):
        found[name] = {"perplexity": perplexity(stored, prompts), **_compared(written, _own(stored))}
        print(name, found[name], flush=True)
    after_long = {
        name: [text for text in texts if text.start >= quantised_costs.LONG] for name, texts in written.items()
    }
    for window in WINDOWS:
        name = f"window of {SINKS} + {window} keys"
        found[name] = _compared(after_long, _windowed(model.target, window))
        print(name, found[name], flush=True)
    return found


def _stored(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    for name in FORMATS:
        yield f"{name}, as stored here", specdec.store_weights(copy.deepcopy(model), name)
    yield "int4, as stored here, off the grid", specdec.store_weights(in_another_order(model), "int4")


def in_another_order(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a Llama that computes the same, with its hidden dimensions in another order: its groups are others."""
    made = copy.deepcopy(model)
    order = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for name, weight in made.named_parameters():  # tied ones are named once
        module = name.split(".")[-2]
        writes = "norm" in module or module in ("o_proj", "down_proj")
        weight.data = (weight[order] if writes else weight[:, order]).contiguous()
    return made


@contextmanager
def rounded(model: Any, grid: Grid, head: Grid) -> Iterator[None]:
    """The model with all matrices but its embedding on grids, the LM head on one of its own, also where it is the embedding."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    kept = [module.weight for module in linears]
    for module in linears:
        chosen = head if module is model.get_output_embeddings() else grid
        module.weight = nn.Parameter(chosen(module.weight), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in zip(linears, kept, strict=True):
            module.weight = weight


def perplexity(model: Any, prompts: list[Tensor]) -> float:
    """Of all tokens of the prompts but the first of each."""
    losses = [
        nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none") for ids in prompts
    ]
    return float(torch.cat(losses).mean().exp())


def along(rates: np.ndarray, depth: int) -> float:
    """The acceptance length of chains: tokens of a text per expected step, by each token's chance to be accepted."""
    begins = np.zeros(len(rates) + depth + 1)
    begins[0] = 1
    for place in range(len(rates)):
        survival = np.cumprod([1.0, *rates[place : place + depth]])
        begins[place + 1 : place + 1 + len(survival)] -= begins[place] * np.diff([*survival, 0.0])
    return len(rates) / begins[: len(rates)].sum()


Logits = Callable[[Tensor, int], Tensor]  # of ids, before each token from a place on: [new place, vocab]


def _own(model: Any) -> Logits:
    def logits(ids: Tensor, start: int) -> Tensor:
        return model(ids[None, :-1], logits_to_keep=len(ids) - start).logits[0]

    return logits


def _windowed(model: Any, window: int) -> Logits:
    """Two streams in one pass: places as the target reads them, then those that draft and see the first stream's keys."""

    def logits(ids: Tensor, start: int) -> Tensor:
        n, drafting = len(ids) - 1, torch.arange(start - 1, len(ids) - 1)
        places = torch.arange(n)
        mask = torch.zeros(n + len(drafting), n + len(drafting), dtype=torch.bool)
        mask[:n, :n] = places <= places[:, None]
        near = (places < SINKS) | (places > drafting[:, None] - window)
        mask[n:, :n] = near & (places < drafting[:, None])
        mask[n:, n:] = torch.eye(len(drafting), dtype=torch.bool)
        at = torch.cat([places, drafting])
        inputs = {"attention_mask": mask[None, None], "position_ids": at[None], "logits_to_keep": len(drafting)}
        return model(ids[:-1][at][None], **inputs).logits[0]

    return logits


def _compared(written: dict[str, list[Written]], draft: Logits) -> dict[str, Any]:
    found = {}
    for name, texts in written.items():
        heat, pairs = SAMPLINGS[name].temperature, [(text, draft(text.ids, text.start)) for text in texts]
        laws = [(text, _law(logits, heat)) for text, logits in pairs]
        rates = [_rates(text, law) for text, law in laws]
        shared = torch.cat([torch.minimum(text.laws, law).sum(-1) for text, law in laws])
        tokens = sum(map(len, rates))
        lengths = [tokens / sum(len(of) / along(of, depth) for of in rates) for depth in DEPTHS]
        found[name] = {"acceptance": float(shared.mean()), "lengths": dict(zip(DEPTHS, lengths, strict=True))}
    return found


def _rates(text: Written, law: Tensor) -> np.ndarray:
    new = text.ids[text.start :, None]
    p, q = text.laws.gather(1, new)[:, 0], law.gather(1, new)[:, 0]
    return (q / p).clamp(max=1).double().numpy()


def _law(logits: Tensor, heat: float) -> Tensor:
    """[place, vocab]: at temperature 0, 1 for the best token."""
    if heat == 0:
        return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return torch.softmax(logits.float() / heat, -1)


def _written(model: Any, ids: Tensor, sampling: Sampling, most: int, seed: int) -> Written:
    new = specdec.generate(model, [ids], sampling=sampling, max_new_tokens=most, seed=seed).tokens[0]
    both = torch.cat([ids, new])
    return Written(both, len(ids), _law(_own(model)(both, len(ids)), sampling.temperature))


def _ids(tokenizer: Any, turn: str) -> Tensor:
    message = [{"role": "user", "content": turn}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
