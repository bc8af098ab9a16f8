"""Self-speculation: the target drafts for itself without some of its layers.

Draft & Verify (Zhang et al., arXiv:2309.08168) skips any set of layers; LayerSkip (Elhoushi et al., arXiv:2404.16710) leaves
after the first few. Weights and the target's own KV cache are shared: what the kept layers write for drafted tokens is
scratch that verification overwrites, and every token of the text has its full keys and values when it is attended to.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set

from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.checks import as_int, as_ints
from specdec.drafters.base import Context
from specdec.drafters.tree_drafter import TreeDrafter
from specdec.models.routing import passing_through
from specdec.models.target import ModelTarget, Target
from specdec.trees.base import Frontier, TreePolicy


class LayerSkipDrafter(TreeDrafter):
    """Drafts with the target's own layers, but for those in `skip` and those from `exit_layer` on.

    >>> LayerSkipDrafter(exit_layer=3)  # the first three layers, then the final norm and the LM head
    >>> LayerSkipDrafter(skip=[2, 4], tree=Widths([4, 2, 1]))

    Args:
        skip: indices of layers to leave out.
        exit_layer: number of layers before the exit; all by default.
        tree: the tree policy; a chain of 4 by default.
    """

    capturable_scores = True

    def __init__(self, skip: Sequence[int] = (), exit_layer: int | None = None, tree: TreePolicy | None = None):
        super().__init__(tree)
        self.skip = as_ints("skip", sorted(skip) if isinstance(skip, Set) else skip, cure="give indices of layers")
        self.exit_layer = None if exit_layer is None else as_int("exit_layer", exit_layer)

    def __repr__(self) -> str:
        return f"LayerSkipDrafter(skip={list(self.skip)}, exit_layer={self.exit_layer}, tree={self.tree})"

    def start(self, target: Target, context: Context) -> None:
        if not isinstance(target, ModelTarget):
            raise ValueError(f"The target is a {type(target).__name__}; only a transformers model has layers to skip.")
        layers, self._cached = decoder_layers(target.cached.model), target.cached
        end = len(layers) if self.exit_layer is None else self.exit_layer
        skipped = {*self.skip, *range(end, len(layers))}
        if not skipped < set(range(len(layers))) or not skipped or end > len(layers):
            raise ValueError(
                f"{self}: the target has layers 0 to {len(layers) - 1}; skip at least one of them and keep at least one."
            )
        if needed := sorted(skipped - {*skippable(target.cached.model)}):
            raise ValueError(
                f"Later layers use the keys and values of layers {needed}, which therefore cannot be skipped."
            )
        self._skipped = [layers[i] for i in sorted(skipped)]

    def prepare(self, frontier: Frontier, context: Context) -> Hashable:
        self._cached.longest = context.longest - 1
        return context.longest

    def score(self, frontier: Frontier, context: Context) -> Tensor:
        with passing_through(self._skipped):
            return self._cached.forward(frontier.tokens, frontier.topology)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers, in order; raises ValueError if it does not run each of them once."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    parts = {part for outer in lists for part in outer.modules() if part is not outer}  # of a layer
    found = next((m for m in lists if len(m) == count and m not in parts), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no list of the {count} layers that its cache is for (it may run some of them more "
            "than once), so none can be left out; use another drafter, such as NgramDrafter()."
        )
    return found


def skippable(model: PreTrainedModel) -> range:
    """Indices of the layers whose keys and values no other layer uses."""
    count = len(decoder_layers(model))
    sharing = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0) or 0
    return range(count - sharing if sharing else 0, count)
