"""A target that transformers cut over two processes writes what it writes in one, the same in both."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed
from tiny_models import PROMPTS, llama
from transformers import AutoModelForCausalLM

import specdec
from experiments.bench import calls
from experiments.bench.results import Json, Wandb
from specdec import ModelTarget, Sampling
from specdec.drafters import LayerSkipDrafter, MedusaDrafter, MedusaHeads, ModelDrafter, NgramDrafter
from specdec.trees import Widths

torch.set_num_threads(1)
RANKS = 2
LOADED = {"large": llama, "small": lambda: llama(1, num_hidden_layers=1)}


def texts(folder, **loading):
    """The key heads of a layer, and what every drafter and sampling writes."""
    model, draft = (
        AutoModelForCausalLM.from_pretrained(folder / name, **options).eval()
        for name, options in (("large", loading), ("small", {}))
    )
    target = ModelTarget(model)
    drafters = [
        None,
        ModelDrafter(draft, Widths([3, 2])),
        LayerSkipDrafter(exit_layer=1),
        MedusaDrafter(MedusaHeads(2, 1, 32).to(torch.float64).eval()),
        NgramDrafter(),
    ]
    runs, last = [], None
    for drafter, temperature in product(drafters, (0.0, 1.0)):
        options = {"sampling": Sampling(temperature), "max_new_tokens": 12, "seed": 3, "keep": True, "resume": last}
        last = specdec.generate(target, PROMPTS, drafter, **options)
        runs.append([tokens.tolist() for tokens in last.tokens])
    return target.lm.layout(None)[0].slabs[0].heads, runs


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_a_target_in_two_processes_writes_what_it_writes_in_one(tmp_path):
    for name, make in LOADED.items():
        make().save_pretrained(tmp_path / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    process = subprocess.run([*command, __file__, tmp_path], capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr
    heads, expected = texts(tmp_path)
    for rank in range(RANKS):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [heads // RANKS, expected]


def test_of_the_processes_of_an_experiment_the_first_alone_writes_and_prints(tmp_path, monkeypatch, capsys):
    def experiment():
        print(Json(str(tmp_path / "result.json")).write({"rank": os.environ["RANK"]}))
        print("progress", file=sys.stderr)
        if os.environ["RANK"] == "1":
            print(Wandb("project", dir=str(tmp_path / "wandb")).write({}))

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        calls.run(experiment)
    assert capsys.readouterr() == (f"{tmp_path / 'result.json'}\n", "progress\n")
    assert json.loads((tmp_path / "result.json").read_text("utf-8")) == {"rank": "0"}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


if __name__ == "__main__":  # one of the processes
    found = texts(Path(sys.argv[1]), tp_plan="auto")
    Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    calls.close_processes()
