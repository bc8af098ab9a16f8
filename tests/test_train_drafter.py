"""Training networks on the target's states: every kind learns, in bounded memory, and says the length that is served."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tiny_models import llama
from torch.utils._python_dispatch import TorchDispatchMode

import specdec
from experiments.bench.training import beginnings
from specdec.drafters import DFlashDrafter, DSparkDrafter, Eagle3Drafter, EagleDrafter, MedusaDrafter, check
from specdec.training import distillation, states, untrained
from specdec.training.features import Features, TargetTexts
from specdec.training.self_distillation import continuations
from specdec.training.states import Comparison, acceptance, states_loss

torch.set_num_threads(1)
SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "train_drafter.py"
KINDS = {
    untrained.eagle: EagleDrafter,
    untrained.eagle3: Eagle3Drafter,
    untrained.dflash: DFlashDrafter,
    untrained.dspark: DSparkDrafter,
    untrained.medusa: MedusaDrafter,
}
SEEDS = torch.Generator().manual_seed(0)
TEXTS = torch.randint(0, 50, (6, 24), generator=SEEDS)


def target():
    model = llama(dtype=torch.float32).requires_grad_(False)
    model.lm_head.weight.data *= 10  # far from uniform laws
    return model


def drafter_of(make, model, **options):
    torch.manual_seed(0)
    needs = {"mask_token": 0} if make in (untrained.dflash, untrained.dspark) else {}
    return make(model, **needs, **options)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_kind_learns_and_is_read_back_as_it_was_trained(make, tmp_path):
    model = target()
    drafter = drafter_of(make, model)
    net, text = drafter.net.train(), TargetTexts.read(model, drafter.net, TEXTS, 2)
    before = acceptance([Comparison(net, model, text, 3)])
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    for _ in range(25):
        optimizer.zero_grad()
        states_loss(distillation.kl, Comparison(net, model, text, 3)).backward()
        optimizer.step()
    assert (acceptance([Comparison(net.eval(), model, text, 3)]) > before + 0.05).all()
    drafter.save_pretrained(tmp_path, target=model)
    again = KINDS[make].from_pretrained(tmp_path, model)
    rates = (acceptance([Comparison(each.net, model, text, 3)]) for each in (again, drafter))
    assert torch.allclose(*rates, rtol=0, atol=1e-6)
    overlaps = [check(model, each, list(TEXTS)).taken.overlap for each in (again, drafter)]
    assert overlaps[0] == pytest.approx(overlaps[1], abs=1e-6)


def test_a_target_that_asks_for_gradients_is_refused():
    model = target()
    net = drafter_of(untrained.dspark, model).net
    text = TargetTexts.read(model, net, TEXTS)
    states_loss(distillation.tv, Comparison(net, model, text, 3)).backward()
    assert all(p.grad is not None for p in net.parameters())
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match=r"requires_grad_\(False\)"):
        Comparison(net, model, text, 3)
    with torch.no_grad():
        Comparison(net, model, text, 3)
    with pytest.raises(ValueError, match="training mode"):
        TargetTexts.read(model.train(), net, TEXTS)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                # storage, as an expanded view is not made
                self.numel = max(self.numel, each.untyped_storage().nbytes() // each.itemsize)
        return out


@pytest.mark.parametrize(("make", "options"), [(untrained.eagle3, {}), (untrained.dspark, {"rank": 8})])
def test_a_bound_on_laws_bounds_memory_and_changes_no_gradient(make, options):
    model = llama(dtype=torch.float64, vocab_size=2000).requires_grad_(False)
    net = drafter_of(make, model, known=torch.arange(0, 2000, 4), **options).net.double()
    found = {}
    for at_once in (2**26, 6 * 3 * 2000 * 2):  # all places, or two at a time
        net.zero_grad()
        with Largest() as largest:
            comparison = Comparison(net, model, TargetTexts.read(model, net, TEXTS), 3)
            loss = states_loss(distillation.lk, comparison, laws_at_once=at_once)
            loss.backward()
        found[at_once] = loss.item(), [p.grad.clone() for p in net.parameters()], largest.numel
    (whole, gradients, most), (parts, same, least) = found.values()
    weights = max(p.numel() for p in [*model.parameters(), *net.parameters()])
    assert parts == pytest.approx(whole, rel=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(gradients, same, strict=True))
    assert least <= max(6 * 2 * 2000, weights) < most / 3


def test_texts_before_which_nothing_was_written_are_not_learnt():
    model = target()
    net = drafter_of(untrained.eagle3, model, known=torch.arange(10, 40)).net
    comparison = Comparison(net, model, TargetTexts.read(model, net, TEXTS, 12), 3)
    places = comparison.places + 1
    for row in range(len(TEXTS)):
        text = torch.cat([TEXTS[row], torch.full((3,), -1)])[places[row]]
        due = torch.where((places[row] >= 12) & (text >= 10) & (text < 40), text - 10, -1)
        assert torch.equal(comparison.tokens[row], due)


def test_acceptance_is_that_of_all_places_below_tokens_that_can_be_drafted():
    """A token that cannot be drafted counts where it is due, and no drafts are accepted beyond it."""
    model, known = target(), torch.arange(10, 40)
    drafter = drafter_of(untrained.eagle3, model, known=known)
    longer = [
        torch.cat([text, torch.zeros(2).long()]) for text in TEXTS
    ]  # drafts below their last tokens are looked at, too
    overlaps = check(model, drafter, longer, 3).taken.overlaps.view(len(TEXTS), -1, 3)
    sums, counts = torch.zeros(3), torch.zeros(3)
    for row, text in enumerate(TEXTS):
        for root in range(1, overlaps.shape[1] + 1):
            for depth in range(min(3, len(text) - 1 - root)):  # beyond the text there is no token
                if torch.isin(text[root + 1 : root + 1 + depth], known).all():
                    sums[depth], counts[depth] = sums[depth] + overlaps[row, root - 1, depth], counts[depth] + 1
    texts = TargetTexts.read(model, drafter.net, TEXTS)
    halves = [TargetTexts.read(model, drafter.net, TEXTS[part]) for part in (slice(0, 1), slice(1, None))]
    for given in ([texts], halves):
        found = acceptance(Comparison(drafter.net, model, each, 3) for each in given)
        assert torch.allclose(found, sums / counts, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [untrained.eagle3, untrained.dspark], ids=lambda make: make.__name__)
def test_what_comes_after_the_end_of_a_text_changes_nothing(make):
    model = target()
    net = drafter_of(make, model).net
    short = TEXTS[:, :15]
    longer = torch.cat([short, torch.full((len(TEXTS), 4), -1)], 1)
    found = [
        states_loss(distillation.kl, Comparison(net, model, TargetTexts.read(model, net, texts, 2), 2)).item()
        for texts in (short, longer)
    ]
    rates = [acceptance([Comparison(net, model, TargetTexts.read(model, net, each, 2), 2)]) for each in (short, longer)]
    assert found[0] > 0 and found[1] == pytest.approx(found[0], rel=1e-5)
    assert torch.allclose(*rates, rtol=1e-5)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_texts_are_read_together_changes_no_rate_and_short_ones_teach_what_there_is(make):
    """Whole prompts of one token and more, and answers that end at once."""
    lengths, firsts = torch.tensor([2, 3, 3, 5, 24, 12]), torch.tensor([1, 1, 2, 4, 22, 11])
    texts = TEXTS.where(torch.arange(24) < lengths[:, None], -1)
    model = target()
    net = drafter_of(make, model).net
    features = Features(model, net, texts, firsts)
    rows = list(torch.arange(len(texts)).split(1))
    whole, alone = (
        acceptance(Comparison(net, model, features[r], 2) for r in each) for each in ([torch.arange(6)], rows)
    )
    assert torch.allclose(whole, alone, rtol=1e-5)
    for row in rows:  # a first draft is due wherever the target wrote, but below the first token
        comparison = Comparison(net, model, features[row], 2, 4, torch.Generator().manual_seed(0))
        due = min(int((lengths - firsts.clamp(min=2))[row]), 4)
        assert int((comparison.tokens[..., 0] >= 0).sum()) == due
        net.zero_grad()
        states_loss(distillation.kl, comparison).backward()
        assert any(p.grad is not None and p.grad.any() for p in net.parameters()) == (due > 0)


def test_others_may_use_the_target_while_its_states_are_read():
    model = target()
    net = drafter_of(untrained.eagle3, model).net
    expected = model.generate(TEXTS[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
    ended, wrong = threading.Event(), []

    def read():
        while not ended.is_set():
            list(Comparison(net, model, TargetTexts.read(model, net, TEXTS), 2).at(slice(0, 2)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(6):
            new = specdec.generate(model, TEXTS[0], max_new_tokens=12, stop_tokens=()).tokens[0]
            plain = model.generate(TEXTS[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
            wrong += [not torch.equal(found, expected[0, 24:]) for found in (new, plain[0, 24:])]
    finally:
        ended.set()
        reader.join()
    assert wrong == [False] * 12


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_gradients_of_short_texts_are_those_in_float64(make):
    """Attention of so few nodes is the CPU's own kernel where nobody asks for gradients."""
    found = []
    for dtype in (torch.float32, torch.float64):
        model = llama(dtype=dtype, head_dim=16).requires_grad_(False)
        net, places = drafter_of(make, model).net.to(dtype), torch.Generator().manual_seed(0)
        comparison = Comparison(net, model, TargetTexts.read(model, net, TEXTS[:1, :12]), 2, 2, places)
        states_loss(distillation.kl, comparison).backward()
        found.append([torch.zeros(()) if p.grad is None else p.grad for p in net.parameters()])
    for ours, exact in zip(*found, strict=True):
        assert torch.allclose(ours.double(), exact.double(), rtol=0, atol=1e-4 * float(exact.abs().max()))


def test_a_confidence_learns_how_often_its_token_is_accepted():
    model = target()
    net: Any = drafter_of(untrained.dspark, model, known=torch.arange(0, 50, 2)).net
    sure: Any = net.confidence_head
    text, optimizer = TargetTexts.read(model, net, TEXTS), torch.optim.AdamW(sure.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        comparison = Comparison(net, model, text, 3)
        states_loss(distillation.tv, comparison).backward()
        optimizer.step()
    found: Any = comparison.at(slice(None))
    told = torch.cat([at.confidence.detach()[at.reached] for at in found])
    rates = torch.cat([at.overlap.detach()[at.reached] for at in found])
    assert torch.corrcoef(torch.stack([told, rates]))[0, 1] > 0.5 and float((told - rates).mean().abs()) < 0.05


def test_confidences_are_trained_under_autocast_by_a_function_outside_of_it(monkeypatch):
    """On a GPU torch refuses that function under autocast."""
    model, within, whole = target(), [], states.binary_cross_entropy
    net: Any = drafter_of(untrained.dspark, model).net

    def noted(*args):
        within.append(torch.is_autocast_enabled("cpu"))
        return whole(*args)

    monkeypatch.setattr(states, "binary_cross_entropy", noted)
    with torch.autocast("cpu", torch.bfloat16):
        states_loss(distillation.kl, Comparison(net, model, TargetTexts.read(model, net, TEXTS), 3)).backward()
    grad = net.confidence_head.proj.weight.grad
    assert within == [False] * 3 and grad is not None and grad.any()


def test_states_that_are_kept_are_those_that_were_computed(tmp_path):
    model = target()
    net = drafter_of(untrained.eagle3, model).net
    rows, asked = torch.tensor([4, 1, 4]), []
    model.register_forward_pre_hook(lambda *_: asked.append(1))

    def kept(texts=TEXTS):
        asked.clear()
        found = Features(model, net, texts, torch.full((len(texts),), 2), tmp_path)[rows]
        fresh = TargetTexts.read(model, net, texts[rows], 2)
        assert all(
            torch.allclose(getattr(found, part), getattr(fresh, part), atol=1e-5) for part in ("states", "hidden")
        )
        return len(asked) == 1  # by `fresh` alone

    assert [kept(), kept()] == [False, True]
    assert [kept(TEXTS[:, :20]), kept()] == [False, True]
    model.model.layers[0].mlp.up_proj.weight.data *= 2
    assert [kept(), kept()] == [False, True]
    for file in tmp_path.glob("states_*"):
        if file.suffix != ".known":
            file.unlink()  # what is said to be known is gone
    assert [kept(), kept()] == [False, True]


def test_places_for_which_nothing_can_be_drafted_are_refused():
    model = target()
    net = drafter_of(untrained.medusa, model).net
    with pytest.raises(ValueError, match="Texts of 1 token"):
        Comparison(net, model, TargetTexts.read(model, net, TEXTS[:, :1]), 3)
    with pytest.raises(ValueError, match="depth=5"):
        Comparison(net, model, TargetTexts.read(model, net, TEXTS), 5)


@pytest.mark.parametrize(("length", "continued"), [(None, [2, 5]), (3, [3]), (1, [1, 1, 1])])
def test_whole_prompts_are_continued_but_those_of_one_token(length, continued):
    setting: Any = SimpleNamespace(prompts=[torch.arange(n) for n in (1, 2, 5)])
    assert [len(ids) for ids in beginnings(setting, OmegaConf.create({"prompt_length": length}))] == continued


def test_texts_that_are_made_in_two_goes_are_those_of_one():
    """In slots and batches of other sizes, too: a text depends on its place and its prompt alone."""
    model, prompts = llama(), [torch.arange(1, 2 + n % 7) for n in range(11)]
    model.generation_config.eos_token_id = [*range(20, 30)]  # some end early

    def made(some, **options):
        return [text for part in continuations(model, some, new_tokens=9, **options) for text in part]

    whole, goes = made(prompts, batch=2), [*made(prompts[:4], batch=1), *made(prompts[4:], batch=3, first_index=4)]
    assert len(whole) == 11 and all(map(torch.equal, goes, whole))
    assert len({len(text) - len(prompt) for text, prompt in zip(whole, prompts, strict=True)}) > 2


def test_training_that_is_killed_is_taken_up_again_and_serves_what_it_expects(tmp_path):
    task = ["task=demo", "~task.count", "~task.one_in", "task.per_task=4", "new_tokens=24", "prompt_length=20"]
    fitted = ["net=dspark", "drafted=300", "depth=2", "held_out=4", "steps=6", "report_every=2", "keep_features=true"]
    options = [*task, *fitted, "tree.length=2"]

    def command(folder):
        return [sys.executable, str(SCRIPT), *options, f"folder={folder}", f"log.path={folder / 'result.json'}"]

    def finish(folder):
        done = subprocess.run(command(folder), cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((folder / "result.json").read_text())

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(command(killed), cwd=tmp_path, stderr=subprocess.DEVNULL) as first:
        while not (killed / "training.pt").exists() and first.poll() is None:
            time.sleep(0.01)
        first.kill()
    said, found = finish(killed)
    _, other = finish(whole)
    assert found["history"] == other["history"] and found["figures"] == other["figures"]
    assert [row["step"] for row in found["history"]["net"]] == [2, 4, 6]
    served, expected = (found["figures"][name]["mean"] for name in ("served", "expected"))
    assert "standard errors" in said and abs(served - expected) < 0.3
    pair = specdec.demo.load()
    assert DSparkDrafter.from_pretrained(killed / "net", pair.target).net.vocab == 300
