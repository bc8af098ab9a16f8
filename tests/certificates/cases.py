"""One case of the certificate: a drafter, a rule, a sampling and a target, and the row of figures it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specdec import Law, Sampling
from specdec.drafters import Drafter, ModelDrafter, NgramDrafter, NoDrafter, Paused
from specdec.rules import Rule, SiblingRejection
from specdec.testing import TabularTarget, exact_law, target_law
from specdec.theory import CostCurve
from specdec.trees import Dynamic

PROMPT = (0, 1, 0)
ROUNDING = 1e-12  # of float64 Llamas: logits of one text differ by 1e-15 between batch shapes
KEYS = (
    "drafter", "tree", "law", "rule", "sampling", "eos", "horizon", "lossless", "mutant", "total_variation",
    "expected_tokens", "paths", "refused",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """What is enumerated. `merge` as in `exact_law`."""

    drafter: Drafter
    rule: Rule = field(default_factory=SiblingRejection)
    sampling: Sampling = field(default_factory=lambda: Sampling(1.0))
    target: TabularTarget | PreTrainedModel = field(default_factory=lambda: TabularTarget(3, seed=0))
    stop_tokens: tuple[int, ...] = ()
    horizon: int = 3
    merge: bool = True

    @cached_property
    def refused(self) -> str | None:
        """Why the rule refuses the drafter's trees; None when it does not."""
        try:
            self.rule.check(self.drafter.spec(self.sampling))
        except ValueError as error:
            return str(error)
        return None

    def certify(self) -> dict[str, Any]:
        """`total_variation` (the integer 0 when the laws are equal), `expected_tokens` of the first step, `paths`."""
        options: dict[str, Any] = {"sampling": self.sampling, "max_new_tokens": self.horizon}
        options["stop_tokens"] = self.stop_tokens
        law = exact_law(self.target, PROMPT, self.drafter, rule=self.rule, merge=self.merge, **options)
        lost = abs(1 - sum(law.probabilities.values()))
        assert lost <= (0 if isinstance(self.target, TabularTarget) else ROUNDING), (
            f"{float(lost)} of probability is lost"
        )
        distance = law.total_variation(target_law(self.target, PROMPT, **options))
        exact = 0 if distance == 0 else float(distance)
        expected = law.expected_tokens if self.merge else None  # of whole runs it is the length of the text
        return {"total_variation": exact, "expected_tokens": expected, "paths": law.paths}

    def row(self, mutant: str | None = None) -> dict[str, Any]:
        """The row of the certificate's table, with exactly the keys `KEYS`."""
        found: dict[str, Any] = dict.fromkeys(KEYS[-4:-1]) if self.refused else self.certify()
        drafter = self.drafter.drafter if isinstance(self.drafter, Paused) else self.drafter
        tree = getattr(drafter, "tree", None)
        values: dict[str, Any] = {
            "drafter": drafter_name(self.drafter),
            "tree": f"chain {drafter.length}" if isinstance(drafter, NgramDrafter) else tree_name(tree),
            "law": law_name(self.drafter.spec(self.sampling).laws),
            "rule": type(self.rule).__name__,
            "sampling": sampling_name(self.sampling),
            "eos": bool(self.stop_tokens),
            "horizon": self.horizon,
            "lossless": self.rule.lossless and mutant is None,
            "mutant": mutant,
            **found,
            "refused": self.refused,
        }
        return {key: values[key] for key in KEYS}


def llama(seed: int, layers: int) -> LlamaForCausalLM:
    """A float64 Llama over 4 tokens whose laws are far from uniform."""
    config = LlamaConfig(vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
                         max_position_embeddings=32, bos_token_id=0, eos_token_id=3)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double().eval()  # type: ignore[call-arg] - torch's own signature is overloaded
    for p in model.parameters():
        p.data *= 4 if p.dim() > 1 else 1
    return model


def paused(drafter: Drafter) -> Paused:
    """One whose drafts are too dear unless two tokens are accepted, so that it is paused and tries again within a few steps."""
    return Paused(drafter, patience=0.5, share=0.6, seconds=CostCurve((1, 5), (1.0, 3.0)))


def drafter_name(drafter: Drafter) -> str:
    if isinstance(drafter, Paused):
        return f"{drafter_name(drafter.drafter)}, paused"
    known = {ModelDrafter: "model", NgramDrafter: "n-gram", NoDrafter: "none"}
    return known.get(type(drafter), "table")


def tree_name(tree: Any) -> str:
    """`chain 2`, `widths 2-1`, `dynamic 5 nodes`."""
    if tree is None:
        return "its own"
    if isinstance(tree, Dynamic):
        return f"dynamic {tree.nodes} nodes"
    kind = "chain" if max(tree.widths) == 1 else "widths"
    return f"{kind} {len(tree.widths) if kind == 'chain' else '-'.join(map(str, tree.widths))}"


def law_name(laws: frozenset[Law]) -> str:
    """The sampled law, or `point`. POINT beside a sampled law is what that law becomes where its support ends."""
    return ", ".join(sorted(law.name.lower() for law in laws - {Law.POINT})) or "point"


def sampling_name(sampling: Sampling) -> str:
    """`greedy`, `temperature 0.7`, `top-k 2` ..."""
    cuts = {"top-k": sampling.top_k, "top-p": sampling.top_p, "min-p": sampling.min_p}
    names = [f"{type(p).__name__.removesuffix('LogitsProcessor')} {p.penalty}" for p in sampling.processors]
    names += [f"{name} {value}" for name, value in cuts.items() if value is not None]
    if sampling.temperature != 1 or not names:
        names.insert(0, f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy")
    return ", ".join(names)
