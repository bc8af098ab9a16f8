"""Trains the demo pair: a 5M-parameter target with early exits and a 0.7M draft distilled from it, on one CPU core.

    python experiments/demo_pair/train.py                # everything, about 85 minutes; may be stopped, and resumes
    python experiments/demo_pair/train.py --stage eval   # held-out losses and sample continuations

The target follows LayerSkip (arXiv:2404.16710): layers are skipped at random, deeper ones more often, and the shared
LM head also reads one early layer a step. Deviations: a whole batch skips a layer at once (that saves the compute), and
the early-exit loss is taken at every fourth position. Matrices are trained with Muon (arXiv:2502.16982), the rest with
AdamW. On Linux, `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` saves the eighth of the time that goes to page
faults.
"""

import argparse
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments.demo_pair import data, prompts

VOCAB = 4096
TARGET = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=640)
DRAFT = dict(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=384)
TOKENS_PER_STEP = 4096
PROSE = 0.3  # share of the training windows
MAX_LAYER_DROP = 0.1  # of the last layer
EXIT_WEIGHT = 0.15
MUON_LR, ADAM_LR = 0.02, 3e-3
SAVE_SECONDS, REPORT_SECONDS = 150, 20
ROOT = Path(__file__).resolve().parents[2]


class Progress(NamedTuple):
    """How far a run is; random choices are seeded by `step`, so this is also the state of its random generators."""

    step: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum (arXiv:2502.16982, section 2.1), matrices of one shape together.

    Deviation: tall matrices' updates are scaled by sqrt(rows / columns), wide ones not at all, as Muon first did.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:  # None: the layer was skipped
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["momentum"])
                    by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(mean, group["momentum"])))
            for pairs in by_shape.values():
                params, updates = zip(*pairs, strict=True)
                for p, update in zip(params, orthogonalised(torch.stack(updates)), strict=True):
                    scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalised(
    x: Tensor,  # [matrix, rows, columns] float32
) -> Tensor:
    """The nearest matrices whose singular values are about 1: five steps of a quintic Newton-Schulz iteration."""
    transposed = x.shape[1] > x.shape[2]
    x = x.mT if transposed else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if transposed else x


def build_model(shape: dict) -> LlamaForCausalLM:
    """A randomly initialised Llama whose blocks start as the identity: the output projections are zero."""
    torch.manual_seed(0)
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    size = dict(vocab_size=VOCAB, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True)
    config = LlamaConfig(**size, **ends, **shape)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    return model


def layer_outputs(
    model: LlamaForCausalLM,
    ids: Tensor,  # [batch, node] int64
    skipped: frozenset[int] = frozenset(),
) -> list[Tensor]:  # layers x [batch, node, hidden] float32
    """The hidden states after each layer, before the final norm."""
    hidden = model.model.embed_tokens(ids)
    rope = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    outputs = []
    for i, layer in enumerate(model.model.layers):
        if i not in skipped:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rope)
        outputs.append(hidden)
    return outputs


def head_loss(
    model: LlamaForCausalLM,
    hidden: Tensor,  # [batch, node, hidden] float32
    labels: Tensor,  # [batch, node] int64
) -> Tensor:
    """Mean cross-entropy in nats of the final norm and LM head on `hidden`."""
    logits = model.lm_head(model.model.norm(hidden))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def early_exit_loss(
    model: LlamaForCausalLM,
    ids: Tensor,  # [batch, node + 1] int64
    rng: random.Random,
) -> tuple[Tensor, Tensor]:
    """The loss to minimise and the last layer's own loss."""
    depth = len(model.model.layers)
    drop = [MAX_LAYER_DROP * (2 ** (i / (depth - 1)) - 1) for i in range(depth)]  # D(l) of LayerSkip, 4.1.1
    skipped = frozenset(i for i in range(depth) if rng.random() < drop[i])
    outputs = layer_outputs(model, ids[:, :-1], skipped)
    loss = head_loss(model, outputs[-1], ids[:, 1:])
    early = head_loss(model, outputs[rng.randrange(depth - 1)][:, ::4], ids[:, 1::4])
    return loss + EXIT_WEIGHT * early, loss


def distillation_loss(
    draft: LlamaForCausalLM,
    target: LlamaForCausalLM,
    ids: Tensor,  # [batch, node + 1] int64
) -> tuple[Tensor, Tensor]:
    """Forward KL(target || draft) over the whole vocabulary, in nats: both the loss and what is reported."""
    with torch.no_grad():
        wanted = target(input_ids=ids[:, :-1], use_cache=False).logits.log_softmax(-1)
    got = draft(input_ids=ids[:, :-1], use_cache=False).logits.log_softmax(-1)
    loss = F.kl_div(got.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
    return loss, loss.detach()


class Corpus:
    """Random windows of the training tokens and fixed windows of the held-out ones."""

    def __init__(self, folder: Path):
        if not (folder / "counts.json").exists():
            print("building the corpus", flush=True)
            data.build(folder, VOCAB)
        self.tokens = {path.stem: np.load(path) for path in folder.glob("*.npy")}

    def batch(self, step: int, length: int) -> Tensor:  # [batch, length + 1] int64
        rng = np.random.default_rng([0, step])
        rows = []
        for _ in range(TOKENS_PER_STEP // length):
            tokens = self.tokens["train_prose" if rng.random() < PROSE else "train_code"]
            start = rng.integers(len(tokens) - length)
            rows.append(tokens[start : start + length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def held_out(self, kind: str, windows: int) -> Tensor:  # [windows, 513] int64
        tokens = self.tokens[f"held_{kind}"]
        starts = np.linspace(0, len(tokens) - 513, windows).astype(int)
        return torch.from_numpy(np.stack([tokens[s : s + 513] for s in starts]).astype(np.int64))


@torch.no_grad()
def held_out_losses(model: LlamaForCausalLM, corpus: Corpus, kind: str, windows: int) -> list[float]:
    """Mean held-out cross-entropy in nats a token of each exit layer, the last entry being the whole model."""
    depth = len(model.model.layers)
    totals = torch.zeros(depth)
    chunks = corpus.held_out(kind, windows).split(8)
    for ids in chunks:
        outputs = layer_outputs(model, ids[:, :-1])
        totals += torch.stack([head_loss(model, h, ids[:, 1:]) for h in outputs]) * len(ids)
    return [round(t / windows, 3) for t in totals.tolist()]


def train(
    model: LlamaForCausalLM,
    corpus: Corpus,
    path: Path,
    minutes: float,
    teacher: LlamaForCausalLM | None,
    resume: bool,
) -> None:
    """Trains for `minutes` of CPU time (so a stopped process loses none) and keeps `path` up to date."""
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is b for b in blocks)]
    muon, adam = (
        Muon(blocks, MUON_LR),
        torch.optim.AdamW(others, ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )
    at = load_checkpoint(path, model, muon, adam) if resume and path.exists() else Progress()
    begun, saved, reported = time.process_time() - at.cpu_seconds, at.cpu_seconds, at.cpu_seconds
    while (done := at.cpu_seconds / (60 * minutes)) < 1:
        for optimizer, peak in ((muon, MUON_LR), (adam, ADAM_LR)):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_factor(done)
        length = (
            256 if done < 0.3 else 512 if done < 0.88 else 1024
        )  # short first: attention is a fifth of the cost at 512
        loss, shown = objective(model, corpus.batch(at.step, length), teacher, at.step, done)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        at = Progress(at.step + 1, at.tokens + TOKENS_PER_STEP, time.process_time() - begun)
        if at.cpu_seconds - reported > REPORT_SECONDS:
            reported = at.cpu_seconds
            rate = at.tokens / at.cpu_seconds
            print(
                f"{path.stem} {done:4.0%} step {at.step} {rate:,.0f} tok/s loss {shown:.3f} norm {norm:.2f}", flush=True
            )
        if at.cpu_seconds - saved > SAVE_SECONDS:
            saved = at.cpu_seconds
            save_checkpoint(path, model, muon, adam, at)
            losses = {kind: held_out_losses(model, corpus, kind, 16)[-1] for kind in ("code", "prose")}
            print(f"held out: {losses}", flush=True)
    save_checkpoint(path, model, muon, adam, at)


def objective(
    model: LlamaForCausalLM,
    ids: Tensor,  # [batch, node + 1] int64
    teacher: LlamaForCausalLM | None,
    step: int,
    done: float,
) -> tuple[Tensor, Tensor]:
    """What to minimise and what to report. The draft reads plain text first, which is faster than distilling."""
    if teacher is None:
        return early_exit_loss(model, ids, random.Random(step))
    if done < 0.25:
        loss = head_loss(model, layer_outputs(model, ids[:, :-1])[-1], ids[:, 1:])
        return loss, loss.detach()
    return distillation_loss(model, teacher, ids)


def learning_rate_factor(done: float) -> float:
    """Warm-up over 2 % of the time budget, then flat, then linear to zero over the last 60 %."""
    return min(1.0, done / 0.02 + 0.05, (1 - done) / 0.6)


def save_checkpoint(path: Path, model: LlamaForCausalLM, muon: Muon, adam: torch.optim.AdamW, at: Progress) -> None:
    state = dict(model=model.state_dict(), muon=muon.state_dict(), adam=adam.state_dict(), at=tuple(at))
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)  # a run that is stopped while it writes keeps the previous checkpoint


def load_checkpoint(path: Path, model: LlamaForCausalLM, muon: Muon, adam: torch.optim.AdamW) -> Progress:
    state = torch.load(path)
    model.load_state_dict(state["model"])
    muon.load_state_dict(state["muon"])
    adam.load_state_dict(state["adam"])
    return Progress(*state["at"])


def trained(path: Path, shape: dict) -> LlamaForCausalLM:
    """The model of the checkpoint at `path`."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: run --stage {path.stem} first")
    model = build_model(shape)
    model.load_state_dict(torch.load(path)["model"])
    return model.eval()


def export(work: Path, out: Path) -> None:
    """Writes both models in bfloat16 and the tokenizer in the form that `from_pretrained` reads, and the prompts."""
    for name, shape in (("target", TARGET), ("draft", DRAFT)):
        trained(work / f"{name}.pt", shape).bfloat16().save_pretrained(out / name)
    tokenizer = AutoTokenizer.from_pretrained(work / "data" / "tokenizer")
    shutil.copytree(work / "data" / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    prompts.build(work / "data" / "held.jsonl", tokenizer, out / "prompts.jsonl")


def evaluate(work: Path, corpus: Corpus) -> None:
    """Prints held-out losses of each exit layer and continuations of held-out beginnings."""
    tokenizer = AutoTokenizer.from_pretrained(work / "data" / "tokenizer")
    for name, shape in (("target", TARGET), ("draft", DRAFT)):
        model = trained(work / f"{name}.pt", shape)
        print(name, Progress(*torch.load(work / f"{name}.pt")["at"]))
        for kind in ("code", "prose"):
            print(name, kind, held_out_losses(model, corpus, kind, 64))
            ids = corpus.held_out(kind, 3)[:, :64]
            for sampling in (dict(do_sample=False), dict(do_sample=True, temperature=0.8, top_k=0)):
                mask = torch.ones_like(ids)
                for row in model.generate(ids, attention_mask=mask, max_new_tokens=96, **sampling):  # pyright: ignore
                    print(f"--- {name} {kind} {sampling}")
                    print(tokenizer.decode(row[:64]) + "<<<>>>" + tokenizer.decode(row[64:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", "data", "target", "draft", "export", "eval"), default="all")
    parser.add_argument("--minutes", type=float, default=66, help="CPU minutes for the target")
    parser.add_argument("--draft-minutes", type=float, default=15, help="CPU minutes for the draft")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "outputs" / "demo", help="folder of the corpus and checkpoints"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "specdec" / "demo", help="folder of the exported pair")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (args.work / "data").mkdir(parents=True, exist_ok=True)
    corpus = Corpus(args.work / "data")
    if args.stage in ("all", "target"):
        train(build_model(TARGET), corpus, args.work / "target.pt", args.minutes, None, args.resume)
    if args.stage in ("all", "draft"):
        teacher = trained(args.work / "target.pt", TARGET)
        train(build_model(DRAFT), corpus, args.work / "draft.pt", args.draft_minutes, teacher, args.resume)
    if args.stage in ("all", "export"):
        export(args.work, args.out)
    if args.stage in ("all", "eval"):
        evaluate(args.work, corpus)


if __name__ == "__main__":
    main()
