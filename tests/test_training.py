"""Training may be stopped at any time, and goes on as if it had not been."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny_models import llama

from experiments.bench.training import fit, take_up
from specdec.training.distillation import kl

torch.set_num_threads(1)
SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "distill_draft.py"
CONFIG = SimpleNamespace(lr=1e-2, texts_per_step=2, report_every=3)
TEXTS = torch.arange(60).view(6, 10) % 50


def trained(path, steps_until_it_stops=None):
    """(weights, reports) after 8 steps, of which an error ends the first attempt."""
    target, draft, done = llama(0, torch.float32), llama(1, torch.float32), []

    def law(model, texts):
        return model(input_ids=texts[:, :-1], use_cache=False).logits.log_softmax(-1)

    def loss(texts, _):
        if len(done) == steps_until_it_stops:
            raise KeyboardInterrupt
        done.append(texts)
        return kl(law(target, texts).detach(), law(draft, texts), texts[:, 1:])

    history = fit(draft, loss, TEXTS, lambda: {"rates": [0.5]}, CONFIG, path, steps=8)
    return draft.state_dict(), history


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, stop):
    expected, reports = trained(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped.pt", stop)
    found, again = trained(tmp_path / "stopped.pt")
    assert all(map(torch.equal, found.values(), expected.values()))
    assert again == reports and [report["step"] for report in reports] == [3, 6, 8]


@pytest.mark.parametrize("script", ["distill_draft", "train_drafter"])
def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path, script):
    with initialize_config_dir(str(SCRIPT.parents[1] / "conf"), version_base="1.3"):
        first, same, *others = (compose(script, changed) for changed in (
            [], ["report_every=1", "log=none"], ["lr=1"], ["new_tokens=9"], ["target=enlarged"], ["sampling.temperature=2"]
        ))  # fmt: skip
    for config in (first, same):
        take_up(tmp_path / "new", config)
    for config in others:
        with pytest.raises(SystemExit, match=r"other settings \(\w+\): choose another folder"):
            take_up(tmp_path / "new", config)


def test_distillation_that_is_killed_is_taken_up_again(tmp_path):
    options = ["task=demo", "held_out=2", "texts_at_once=3", "steps=3", "report_every=1", "new_tokens=8",
               "measured.per_task=1", "measured_tokens=4", "seeds=[0]", "~losses.lk", "~losses.cross_entropy", "~losses.kl",
               f"folder={tmp_path}", f"log.path={tmp_path / 'result.json'}"]  # fmt: skip
    command = [sys.executable, str(SCRIPT), *options]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as first:
        while not (tmp_path / "tau_token_0.pt").exists() and first.poll() is None:
            time.sleep(0.01)
        first.kill()
    texts = (tmp_path / "texts.pt").read_bytes()
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert second.returncode == 0, second.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "texts.pt").read_bytes() == texts
    assert {name: [row["step"] for row in rows] for name, rows in found["history"].items() if name != "before"} == {
        "tau_token_0": [1, 2, 3],
        "tau_block_0": [1, 2, 3],
    }
    assert (tmp_path / "tau_block_0" / "model.safetensors").exists()
