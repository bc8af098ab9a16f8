"""Which layers a target should leave out when it drafts for itself (`LayerSkipDrafter`): a search by predicted speed-up.

Draft & Verify (Zhang et al., arXiv:2309.08168, section 3.3) decodes with every set that it tries. Deviation: here one forward
pass of the kept layers, over the ends of many texts that the target wrote, gives a set's acceptance by depth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import as_int, as_ints, as_seed, check_kind
from specdec.drafters.layer_skip import layers_of, skippable
from specdec.models.causal_lm import CausalLM
from specdec.models.routing import passing_through
from specdec.sampling import Sampling
from specdec.theory import CostCurve, Costs, measure_costs, predicted_speed_up
from specdec.training.distillation import acceptance_by_depth
from specdec.tree import chain

Skip = frozenset[int]  # indices of the layers left out


class Rehearsal:
    """Places in the target's own texts from which chains are drafted without decoding.

    The context is in the cache as the whole model wrote it, and the drafted nodes attend to it and to each other through
    the kept layers alone, as in `LayerSkipDrafter`. (If whole texts were read without the layers, kept layers would find
    other keys and values, and be judged far too low.) All places weigh the same, whereas decoding begins more steps where
    little is accepted: lengths predicted for uneven texts are too long by some per cent.

    Args:
        model: the target.
        texts: 1-D int64 tensors whose last `depth` tokens, at least, were written by the target under `sampling`.
        depth: length of the chains. They draft the last `depth` tokens of every text.
        sampling: the sampling that will be decoded with.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Tensor], depth: int, sampling: Sampling):
        depth = as_int("depth", depth, 1)
        check_kind("sampling", sampling, Sampling)
        lm, self._sampling = CausalLM(model), sampling
        self.layers = layers_of(model)
        lengths = torch.tensor([len(text) for text in texts])
        if int(lengths.min()) < depth + 2:
            raise ValueError(f"A text has {int(lengths.min())} tokens: chains of {depth} need {depth + 2} or more.")
        tokens = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(lm.device)
        path = (lengths[:, None] - depth - 1 + torch.arange(depth + 1)).to(tokens.device)
        self._path = tokens.gather(1, path)  # [text, depth + 1]: the root and what followed it
        roots = (lengths - depth - 1).tolist()
        self._longest = max(roots)  # tokens before a root
        with torch.inference_mode():
            self._cached = lm.start(len(tokens), tokens.shape[1], depth)
            self._cached.read_anew(tokens, dict(enumerate(roots)))
        self._target = self._laws(frozenset())

    def reach(self, skip: Skip) -> list[float]:
        """[depth]: unbiased estimates of the chance that sibling rejection accepts a chain up to each depth.

        Greedy laws are one-hot, and the estimate is the share of texts whose tokens are drafted.
        """
        written = self._path[:, 1:]
        return acceptance_by_depth(self._target, self._laws(skip), written, written.shape[1]).mean((0, 1)).tolist()

    def _laws(self, skip: Skip) -> Tensor:
        """[text, depth, vocab]: log-laws after all nodes but the last, without the layers in `skip`."""
        nodes = self._path[:, :-1]
        shape = chain(len(nodes), nodes.shape[1], nodes.device)
        with torch.inference_mode(), passing_through([self.layers[i] for i in sorted(skip)]):
            logits = self._cached.forward(nodes, shape, self._longest)
            return self._sampling.probabilities(logits).log()


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of the target's forward pass, and of drafting one token with some of its layers."""

    verify: CostCurve  # the target's forward pass, by nodes
    outside: float  # embedding, final norm and LM head
    layer: float  # each layer; all are taken to cost the same

    def keeping(self, layers: int) -> Costs:
        """The costs of steps that draft with so many layers."""
        return Costs(self.verify, CostCurve((1,), (self.draft(layers),)))

    def draft(self, layers: int) -> float:
        """Seconds of drafting one token with so many layers."""
        return self.outside + layers * self.layer


def measure_layer_costs(model: PreTrainedModel, nodes: int, context: int, repeats: int = 15) -> LayerCosts:
    """Measure passes through all layers and through as few as possible; `nodes`, `context` as in `measure_costs`."""
    nodes = as_int("nodes", nodes, 1)
    layers, free = layers_of(model), skippable(model)
    sizes = range(1, nodes + 1)
    whole = measure_costs(model, nodes=sizes, context=context, repeats=repeats).verify
    with passing_through([layers[i] for i in free[1:]]):
        few = measure_costs(model, nodes=(1,), context=context, repeats=repeats).verify
    layer = (whole(1) - few(1)) / (len(free) - 1)
    return LayerCosts(whole, whole(1) - len(layers) * layer, layer)


@dataclass(frozen=True)
class Trial:
    """A set of layers that was tried."""

    skip: Skip
    reach: Sequence[float]  # [depth], as from `Rehearsal.reach`
    length: int  # length, at least 1, of the chain with the largest predicted speed-up
    speed_up: float  # its predicted speed-up

    @property
    def acceptance_length(self) -> float:
        """The predicted acceptance length of that chain."""
        return 1 + sum(self.reach[: self.length])


def predict(skip: Skip, reach: Sequence[float], costs: Costs) -> Trial:
    """The best chain for this set, at these costs."""
    speed = {n: predicted_speed_up(1 + sum(reach[:n]), range(-1, n), costs) for n in range(1, len(reach) + 1)}
    length = max(speed, key=speed.__getitem__)
    return Trial(skip, reach, length, speed[length])


Attempt = Generator[Trial, None, Trial]


def search(
    trial: Callable[[Skip], Trial], layers: Sequence[int], least: int, most: int, seed: int = 0
) -> Iterator[Trial]:
    """Search for the fastest set, and yield every set that is tried. It ends when no single change improves the best.

    Three phases:

    - Layers are left out one by one, always the one that costs the least acceptance, up to `most`. A layer costs more once
      others are gone, so it is measured again only when it comes up for removal (the lazy greedy of Minoux, 1978).
    - Every early exit is tried.
    - Single layers of the fastest set are exchanged, added and removed in random order.

    Args:
        trial: measures a set.
        layers: the layers that may be left out.
        least, most: how many of them must and may be left out.
        seed: decides the order of exchanges.
    """
    layers = as_ints("layers", layers, 0)
    most = as_int("most", most, 0, len(layers))
    least = as_int("least", least, 0, most)
    seed = as_seed(seed)
    tried: dict[Skip, Trial] = {}

    def attempt(skip: Skip) -> Attempt:
        if skip not in tried:
            tried[skip] = trial(skip)
            yield tried[skip]
        return tried[skip]

    yield from _eliminate(attempt, layers, most)
    for count in range(least, most + 1):
        yield from attempt(frozenset(layers[len(layers) - count :]))
    best, rng = max((t for t in tried.values() if len(t.skip) >= least), key=lambda t: t.speed_up), random.Random(seed)
    while best is not None:
        neighbours, best_so_far, best = _neighbours(best.skip, layers, least, most), best, None
        rng.shuffle(neighbours)
        for skip in neighbours:
            found = yield from attempt(skip)
            if found.speed_up > best_so_far.speed_up:
                best = found
                break


def _eliminate(attempt: Callable[[Skip], Attempt], layers: Sequence[int], most: int) -> Generator[Trial, None, None]:
    left, skip = [(-float("inf"), layer) for layer in layers], frozenset()
    heapify(left)
    while len(skip) < most:
        _, layer = heappop(left)
        found = yield from attempt(skip | {layer})
        if not left or -sum(found.reach) <= left[0][0]:
            skip |= {layer}
        else:
            heappush(left, (-sum(found.reach), layer))


def _neighbours(skip: Skip, layers: Sequence[int], least: int, most: int) -> list[Skip]:
    kept = [layer for layer in layers if layer not in skip]
    removed, added = [skip - {i} for i in sorted(skip)], [skip | {j} for j in kept]
    exchanged = [skip - {i} | {j} for i in sorted(skip) for j in kept]
    return [s for s in (*removed, *added, *exchanged) if least <= len(s) <= most]
