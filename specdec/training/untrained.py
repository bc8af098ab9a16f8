"""Drafters with networks that are to be trained for a target: of layers like its own, and beginning with its LM head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from specdec.checks import as_int
from specdec.drafters import DFlashDrafter, DSparkDrafter, Eagle3Drafter, EagleDrafter, MedusaDrafter
from specdec.drafters.block_files import BlockReading
from specdec.drafters.dflash import DFlashNet
from specdec.drafters.dspark import DSparkNet
from specdec.drafters.eagle import EagleNet
from specdec.drafters.eagle3 import Eagle3Net
from specdec.drafters.eagle3_files import Eagle3Reading, default_states
from specdec.drafters.medusa import MedusaHeads
from specdec.trees.base import TreePolicy


def eagle3(
    target: PreTrainedModel,
    tree: TreePolicy | None = None,
    *,
    known: Tensor | None = None,
    states: Sequence[int] | None = None,
    layers: int = 1,
    **reading: bool,
) -> Eagle3Drafter:
    """An EAGLE-3 draft with an LM head of its own.

    Args:
        target: the target.
        tree: the tree policy.
        known: [drafted] int64: ids of the tokens that it drafts; None for all.
        states: which of the target's states it reads; by default those before layers 2, n // 2 and n - 3 of n, or, if these
            are not three, 2, n // 2 and n - 1.
        layers: of the network.
        reading: of `Eagle3Reading`.
    """
    config = _like(target, layers)
    vocab = config.vocab_size if known is None else len(known)
    net = Eagle3Net(
        config, _spread(target, 3) if states is None else states, config.hidden_size, vocab, Eagle3Reading(**reading)
    )
    return Eagle3Drafter(_with_head(net, target, known), tree)


def eagle(target: PreTrainedModel, tree: TreePolicy | None = None, *, layers: int = 1) -> EagleDrafter:
    """An EAGLE-1 draft, which is as near to the MTP layers of targets as a plain file: it extends the last state."""
    config = _like(target, layers)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}  # by which such files are read
    return EagleDrafter(_with_head(EagleNet(config, bias=False), target, None), tree)


def dflash(
    target: PreTrainedModel,
    tree: TreePolicy | None = None,
    *,
    known: Tensor | None = None,
    mask_token: int | None = None,
    **sizes: Any,
) -> DFlashDrafter:
    """A DFlash draft, with the target's embedding, and its LM head unless it drafts some tokens only.

    Args:
        target, tree, known: as for `eagle3`.
        mask_token: the token in slots that are to be filled; by default the target's token for padding or the end.
        sizes: `states`, as many as layers by default, spread over the target; `layers` (default 2); `slots` (default 5).
    """
    return DFlashDrafter(
        _with_head(DFlashNet(**_block(target, known, mask_token, False, **sizes)), target, known), tree
    )


def dspark(
    target: PreTrainedModel,
    tree: TreePolicy | None = None,
    *,
    known: Tensor | None = None,
    mask_token: int | None = None,
    rank: int = 64,
    **sizes: Any,
) -> DSparkDrafter:
    """A DSpark draft: what `dflash` makes, a Markov head of this rank that adds nothing yet, and a confidence head."""
    parts = _block(target, known, mask_token, True, **sizes)
    net = DSparkNet(tokens=parts["config"].vocab_size, rank=rank, confident=True, **parts)
    assert net.markov_head is not None
    nn.init.zeros_(net.markov_head.markov_w2.weight)
    return DSparkDrafter(_with_head(net, target, known), tree)


def medusa(
    target: PreTrainedModel, tree: TreePolicy | None = None, *, heads: int = 4, blocks: int = 2
) -> MedusaDrafter:
    """Medusa heads that begin as the target's LM head, and share it."""
    return MedusaDrafter(MedusaHeads(heads, blocks, target.config.get_text_config().hidden_size), tree)


def _like(target: PreTrainedModel, layers: int) -> LlamaConfig:
    """A config of layers of the sizes of the target's."""
    own: Any = target.config.get_text_config()
    hidden, heads = own.hidden_size, own.num_attention_heads
    rotary, wide = getattr(own, "rope_parameters", None) or {}, getattr(own, "intermediate_size", None) or 4 * hidden
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=max(wide) if isinstance(wide, list) else wide,  # layers may differ
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(own, "num_key_value_heads", None) or heads,
        head_dim=getattr(own, "head_dim", None) or hidden // heads,
        rms_norm_eps=getattr(own, "rms_norm_eps", 1e-6),
        vocab_size=own.vocab_size,
        max_position_embeddings=own.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rotary.get("rope_theta", 10000.0)},
    )


def _spread(target: PreTrainedModel, count: int) -> tuple[int, ...]:
    """So many of the target's states; three as EAGLE-3 reads them."""
    n = target.config.get_text_config().num_hidden_layers
    if count == 3:
        usual = default_states(n)
        return usual if usual[0] < usual[1] < usual[2] else (min(2, n - 1), n // 2, n - 1)
    return tuple(round(float(i)) for i in torch.linspace(min(2, n - 1), max(n - 2, 1), count))


def _block(
    target: PreTrainedModel,
    known: Tensor | None,
    mask_token: int | None,
    from_anchor: bool,
    states: Sequence[int] | None = None,
    layers: int = 2,
    slots: int = 5,
) -> dict[str, Any]:
    config, own = _like(target, layers), target.config.get_text_config()
    if mask_token is None:
        ends = own.pad_token_id if own.pad_token_id is not None else own.eos_token_id
        mask_token = ends[0] if isinstance(ends, list) else ends
    if mask_token is None:
        raise ValueError("mask_token=None: the target's config has no token for padding or the end; give one.")
    mask_token = as_int(
        "mask_token", mask_token, 0, config.vocab_size - 1, cure="give an id of the target's vocabulary"
    )
    return {
        "config": config,
        "states": _spread(target, layers) if states is None else states,
        "state_size": config.hidden_size,
        "slots": slots,
        "mask_token": mask_token,
        "vocab": None if known is None else len(known),
        "reading": BlockReading(from_anchor),
    }


def _with_head(net: Any, target: PreTrainedModel, known: Tensor | None) -> Any:
    """The network on the target's device, with the target's rows in an LM head of its own."""
    if getattr(net, "lm_head", None) is not None:
        head: Any = target.get_output_embeddings()
        net.lm_head.weight.data.copy_(head.weight if known is None else head.weight[known.to(head.weight.device)])
    net.target_ids = known
    return net.to(target.device)
