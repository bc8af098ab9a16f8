"""Self-speculation: the target drafts for itself without some of its layers.

Draft & Verify (Zhang et al., arXiv:2309.08168) skips any set of layers; LayerSkip (Elhoushi et al., arXiv:2404.16710) exits
after the first few. Weights and the target's own KV cache are shared. Keys and values that the kept layers write for drafted
tokens are scratch, which verification overwrites; those of the text so far are the full model's.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.batch import Batch
from specdec.checks import as_int, as_ints
from specdec.drafters.base import DraftRun
from specdec.drafters.tree_drafter import TreeDrafter, TreeDraftRun
from specdec.models.cached_model import CachedModel
from specdec.models.probe import run_alone
from specdec.models.routing import learn_outputs, passing_through
from specdec.models.states import decoder_layers
from specdec.models.target import ModelTargetRun, TargetRun
from specdec.trees.base import Frontier, TreePolicy


class LayerSkipDrafter(TreeDrafter):
    """Drafts with the target's own layers, but for those in `skip` and those from `exit_layer` on.

    >>> LayerSkipDrafter(exit_layer=3)  # the first three layers, then the final norm and the LM head
    >>> LayerSkipDrafter(skip=[2, 4], tree=Widths([4, 2, 1]))

    Args:
        skip: indices of layers to leave out.
        exit_layer: how many layers are run before the exit; all by default.
        tree: the tree policy; a chain of 4 by default.
    """

    capturable_scores = True

    def __init__(self, skip: Sequence[int] = (), exit_layer: int | None = None, tree: TreePolicy | None = None):
        super().__init__(tree)
        self.skip = as_ints("skip", sorted(skip) if isinstance(skip, Set) else skip, cure="give indices of layers")
        self.exit_layer = None if exit_layer is None else as_int("exit_layer", exit_layer)

    def __repr__(self) -> str:
        return f"LayerSkipDrafter(skip={list(self.skip)}, exit_layer={self.exit_layer}, tree={self.tree})"

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        if not isinstance(target, ModelTargetRun):
            raise ValueError(
                f"The target is a {type(target.target).__name__}; only a transformers model has layers to skip."
            )
        skipped = self.skipped(target.cached.lm.model)
        return LayerSkipRun(self, batch, target.cached, skipped, last).begun(last)

    def skipped(self, model: PreTrainedModel) -> list[nn.Module]:
        """The layers of this target that are left out. Raises ValueError if they cannot be."""
        layers = layers_of(model)
        end = len(layers) if self.exit_layer is None else self.exit_layer
        skipped = {*self.skip, *range(end, len(layers))}
        if not skipped < set(range(len(layers))) or not skipped or end > len(layers):
            raise ValueError(
                f"{self}: the target has layers 0 to {len(layers) - 1}; skip at least one of them and keep at least one."
            )
        if needed := sorted(skipped - {*skippable(model)}):
            raise ValueError(
                f"Later layers use the keys and values of layers {needed}, which therefore cannot be skipped."
            )
        return [layers[i] for i in sorted(skipped)]


class LayerSkipRun(TreeDraftRun):
    """The target drafting for itself, in its own cache."""

    def __init__(
        self,
        drafter: LayerSkipDrafter,
        batch: Batch,
        cached: CachedModel,
        skipped: Sequence[nn.Module],
        last: DraftRun | None,
    ):
        super().__init__(drafter, batch, last, cached)
        self.cached, self._skipped = cached, skipped

    def enter(self, rows: list[int]) -> None:
        """Nothing is to be done, as all that is kept of a text is in the target's cache."""

    def score(self, frontier: Frontier) -> Tensor:
        with passing_through(self._skipped):
            return self.cached.forward(frontier.tokens, frontier.topology, self.batch.longest - 1)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers; `passing_through` knows from now on what they return."""
    layers = decoder_layers(model)
    learn_outputs(layers, partial(run_alone, model))
    return layers


def skippable(model: PreTrainedModel) -> range:
    """Indices of the layers whose keys and values no other layer reads."""
    count = len(decoder_layers(model))
    sharing = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0) or 0
    return range(count - sharing if sharing else 0, count)
