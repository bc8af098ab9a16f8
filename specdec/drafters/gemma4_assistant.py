"""Gemma 4's assistants: a few layers that attend to the target's own keys and values, and have none themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch import Batch
from specdec.checks import check_kind
from specdec.drafters.states_drafter import StatesDrafter, StatesRun
from specdec.drafters.states_net import StatesNet, TargetParts
from specdec.models.attention import NAME
from specdec.models.cache import TreeLayer
from specdec.models.level import Level
from specdec.models.ready import autocast_dtype
from specdec.models.routing import Route
from specdec.models.stored_layers import rows_of
from specdec.models.target import ModelTargetRun
from specdec.trees.base import Frontier, TreePolicy

if TYPE_CHECKING:
    from transformers import Gemma4AssistantForCausalLM, Gemma4UnifiedAssistantForCausalLM

_KINDS = "full_attention", "sliding_attention"


class Gemma4AssistantNet(StatesNet):
    """The assistant's network: of pairs of a token and the state before it, seen from the root's position.

    The state before the root is the target's; that before a draft is what the assistant gives for the draft's parent.
    """

    states: ClassVar[tuple[int, ...]] = (-1,)  # type: ignore[misc]

    def __init__(self, assistant: Gemma4AssistantForCausalLM | Gemma4UnifiedAssistantForCausalLM):
        super().__init__()
        self.assistant: Any = assistant
        self.state_size = self.kept = assistant.config.backbone_hidden_size
        config = assistant.config.get_text_config()
        self.vocab, self._window = config.vocab_size, config.sliding_window
        attentions = [layer.self_attn for layer in self.assistant.model.layers]
        # by kind of layer: heads of the keys that it reads, and their size
        self.heads = {
            a.layer_type: (config.num_attention_heads // a.num_key_value_groups, a.head_dim) for a in attentions
        }

    def follow(self, tokens: Tensor, states: Tensor, level: Level, target: TargetParts) -> Tensor:
        return states[:, :, 0]

    def hidden(
        self, embedded: Tensor, states: Tensor, root: Tensor, shared: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """What the LM head reads.

        Args:
            embedded: [batch, n, state_size]: the tokens, by the target's embedding.
            states: [batch, n, state_size]: the states before them.
            root: [batch] int64: the position of the root, and so how many slots it sees.
            shared: by kind of layer: keys and values [batch, kv_head, slot, head_dim] of the target's last such layer.

        Returns:
            [batch, n, hidden of the assistant]; zeros in rows whose root sees nothing.
        """
        n = embedded.shape[1]
        x = self.assistant.pre_projection(torch.cat([embedded, states], -1))
        hidden = self.assistant.model(
            inputs_embeds=x,
            attention_mask={kind: self._bias(kind, root, keys, n) for kind, (keys, _) in shared.items()},
            position_ids=root[:, None].expand(-1, n),
            shared_kv_states=shared,
            use_cache=False,
            # all nodes; transformers 5.24 takes its default for a wish to leave some out, and then fails with more than one
            logits_to_keep=torch.arange(n, device=x.device),
        ).last_hidden_state
        return torch.where(root[:, None, None] > 0, hidden, 0)

    def _bias(self, kind: str, root: Tensor, keys: Tensor, n: int) -> Tensor:
        """[batch, 1, n, slot]: 0 for slots that the root sees in layers of this kind, else -inf."""
        slots, root = torch.arange(keys.shape[2], device=root.device), root[:, None]
        seen = slots < root.clamp(min=1)  # with no slot at all there would be NaN
        if kind == "sliding_attention":
            # transformers counts the window from the position before the root, and lets it reach one position further
            seen &= slots >= root - 1 - self._window
        bias = torch.zeros(seen.shape, dtype=keys.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        return bias[:, None, None].expand(-1, -1, n, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[batch, n, vocab], of what the LM head reads; -inf outside the clusters of tokens that are looked at."""
        assistant = self.assistant
        clusters = assistant.masked_embedding
        if clusters is None:
            return assistant.lm_head(hidden)
        chosen = clusters.centroids(hidden).topk(clusters.centroid_intermediate_top_k).indices
        tokens = clusters.token_ordering.long().view(clusters.num_centroids, -1)[chosen].flatten(2)
        scores = (rows_of(assistant.lm_head, tokens) @ hidden[..., None])[..., 0]
        return scores.new_full((*hidden.shape[:2], clusters.vocab_size), -torch.inf).scatter_(2, tokens, scores)


class Gemma4AssistantDrafter(StatesDrafter):
    """Drafts with the assistant of a Gemma 4 model, along any tree, sampled with its laws or greedily.

    transformers' `model.generate(assistant_model=...)` takes the assistant's most likely tokens and hands on its whole law, so
    that texts that it samples do not have the target's law. Here drafts are drawn from the law that is handed on.

    A text of one token has no state yet: until it grows, its drafts are guesses from zeros.

    Deviations: an assistant with clusters of tokens drafts those of the clusters that it looks at, where transformers gives
    all others one small logit, which depends on the batch. After a rejection transformers' assistant also sees the keys and
    values of the first rejected draft, and here it does not.

    Args:
        assistant: transformers' `Gemma4AssistantForCausalLM` or `Gemma4UnifiedAssistantForCausalLM`, in eval mode.
        tree: the tree policy; a chain of 4 by default. A level of the tree is a pass of the assistant.
    """

    net: Gemma4AssistantNet

    def __init__(
        self, assistant: Gemma4AssistantForCausalLM | Gemma4UnifiedAssistantForCausalLM, tree: TreePolicy | None = None
    ):
        # here, as few need them
        from transformers import Gemma4AssistantForCausalLM, Gemma4UnifiedAssistantForCausalLM

        kinds = Gemma4AssistantForCausalLM, Gemma4UnifiedAssistantForCausalLM
        check_kind("assistant", assistant, kinds, "load it with Gemma4AssistantForCausalLM.from_pretrained")
        super().__init__(Gemma4AssistantNet(assistant), tree)

    def _run(self, net: Gemma4AssistantNet, target: ModelTargetRun, batch: Batch, last: StatesRun | None) -> StatesRun:
        lm, layers = target.cached.lm, producers(target.cached.lm.model)
        missing = [kind for kind in _KINDS if kind not in layers]
        if missing:
            raise ValueError(
                f"{self} attends to the last {' and the last '.join(missing)} layer of a Gemma 4 model; "
                f"{type(lm.model).__name__} has none: use the target that the assistant was made for."
            )
        layout = lm.layout(autocast_dtype(lm.device))
        for kind, (heads, size) in net.heads.items():
            keys, _ = layout[layers[kind]].slabs
            if (keys.heads, keys.dim) != (heads, size):
                raise ValueError(
                    f"{self} reads keys of {heads} heads of size {size} in {kind} layers, the target's have {keys.heads} of "
                    f"size {keys.dim}: use the target that the assistant was made for."
                )
        return Gemma4AssistantRun(self, net, target, batch, last)


class Gemma4AssistantRun(StatesRun):
    """An assistant at work, in the target's cache."""

    net: Gemma4AssistantNet

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self._route = Route(self.net.assistant, NAME)
        self._layers = producers(self._target.cached.lm.model)
        # [batch, nodes, kept]: of all nodes asked for; captured graphs write to it in place
        self._states = torch.zeros(len(self.last), self._nodes, self.net.kept).to(self.last)

    def score(self, frontier: Frontier) -> Tensor:
        asked, count = frontier.topology.parents.shape[1], frontier.tokens.shape[1]
        if frontier.topology.depth == 0:
            states = self.last[:, None]
        else:
            parents = frontier.topology.parents[:, -count:, None].expand(-1, -1, self.net.kept)
            states = self._states.gather(1, parents)
        embedded = self.parts.embed(frontier.tokens).to(states)
        with self._route:
            hidden = self.net.hidden(embedded, states, self._target.cached.cache.lengths, self._shared())
        self._states[:, asked - count : asked] = self.net.assistant.post_projection(hidden)
        return self.net.over_target(self.net.logits(hidden), self.batch.vocab)

    def _shared(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By kind: keys and values of the target's last layer of the kind, of all committed slots of any row."""
        cache = self._target.cached.cache
        slots, shared = min(max(self.batch.longest - 1, 1), cache.capacity), {}
        for kind in _KINDS:
            layer = cache.layers[self._layers[kind]]
            assert isinstance(layer, TreeLayer)
            keys, values = layer.read(slots, self.last.dtype)
            shared[kind] = keys.to(self.last), values.to(self.last)
        return shared


def producers(model: PreTrainedModel) -> dict[str, int]:
    """By kind, the last layer that has keys and values of its own: what transformers' `shared_kv_states` are of."""
    config = model.config.get_text_config()
    own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    return {kind: layer for layer, kind in enumerate((getattr(config, "layer_types", None) or [])[:own])}
