"""Sweeps: every preset runs, a job that fails ends nothing, and the same command goes on where it stopped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from experiments.bench.measure import AGAIN, Refused
from experiments.bench.sweep import identity, job, shown, unused

ROOT = Path(__file__).resolve().parents[1]
CONF, RESULTS = ROOT / "conf", ROOT / "experiments" / "results"
TINY = ["task.per_task=1", "task.tasks=[functions]", "repeats=1", "new_tokens=4", "ceilings=false"]
SWEEPS = sorted(file.stem for file in CONF.glob("sweep/*.yaml"))
EXPERIMENTS = sorted(CONF.glob("experiment/*.yaml"))


def results(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in folder.glob("*.json")]


@pytest.mark.filterwarnings("ignore:engine. the stage")  # drafts from the text are made on the host
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch.compile
@pytest.mark.parametrize("preset", SWEEPS)
def test_sweep_preset_runs(run, preset):
    params = yaml.safe_load((CONF / "sweep" / f"{preset}.yaml").read_text())["hydra"]["sweeper"]["params"]
    one = ",".join(f"{key}:'{str(values).split(',')[-1]}'" for key, values in params.items())
    demo = ["target=demo", "task=demo"]  # some are of a model that is downloaded
    out, ended = run(f"sweep={preset}", f"hydra.sweeper.params={{{one}}}", *demo, *TINY)
    assert ended is None
    [done] = results(Path("outputs/sweep") / preset)
    assert next(iter(done["figures"])) in ("autoregressive", "transformers") and AGAIN in done["figures"]
    assert f"\n\noutputs/sweep/{preset}\n" in out


def test_every_experiment_preset_runs(run):
    names = [file.stem for file in EXPERIMENTS if "benchmark.py" in file.read_text()]
    out, ended = run("-m", f"experiment={','.join(names)}", "target=demo", *TINY)
    assert ended is None
    assert f"[{len(names)}/{len(names)}] experiment={names[-1]}: " in out
    assert not [done for done in results(Path("outputs/sweep")) if "figures" not in done]


def without_folders(options: Any) -> dict:
    """The options without the folders of `experiments` in which functions lie, as a file may move and stay what it is."""
    return json.loads(re.sub(r'"experiments\.(?:\w+\.)?(\w+\.\w+)"', r'"\1"', json.dumps(options)))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_experiment_preset_is_what_made_the_published_result(file):
    [name] = [text.partition("results/")[2] for text in file.read_text().splitlines() if "results/" in text]
    published = without_folders(json.loads((RESULTS / name).read_text())["options"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = without_folders(OmegaConf.to_container(compose("benchmark", [f"experiment={file.stem}"])))
    for key in set(published) - {"log", "task", "methods", "drafter", "tree"}:
        assert config[key] == published[key], key
    if "benchmark.py" in file.read_text():
        assert config["methods"] == published["methods"]
        assert all(config[part] == published[part] for part in ("drafter", "tree") if part in published)
    assert {key: config["task"][key] for key in ("tasks", "per_task")} == {
        key: published["task"][key] for key in ("tasks", "per_task")
    }


def test_failing_and_refused_jobs_end_nothing_and_the_same_command_goes_on(run, tmp_path):
    command = ["-m", "tree=chain,widths", "rule=block", "task.tasks=[functions],[nonsense]", *TINY[:1], *TINY[2:]]
    command += ["log=csv"]
    out, ended = run(*command)
    assert ended == "2 of 4 jobs failed: the same command tries them again."
    assert "[1/4] tree=chain task.tasks=[functions]: chosen ~ " in out
    assert "[2/4] tree=chain task.tasks=[nonsense]: failed: SystemExit: task.tasks: there are no prompts for" in out
    assert "[3/4] tree=widths task.tasks=[functions]: refused: chosen: BlockVerification verifies chains" in out
    folder = tmp_path / "outputs" / "sweep"
    done = {file: file.stat().st_mtime_ns for file in folder.glob("*.json") if "failed" not in file.read_text()}
    again, ended = run(*command)
    assert ended == "2 of 4 jobs failed: the same command tries them again."
    assert again.count(": known, ") == 2 and again.count(": failed: ") == 2
    assert len(done) == 2 and all(file.stat().st_mtime_ns == written for file, written in done.items())
    assert len(list(folder.glob("*.csv"))) == 1 and len(list(folder.glob("*.json"))) == 4


def test_single_run_says_why_it_is_refused(run):
    _, ended = run("tree=widths", "rule=block", *TINY)
    assert ended is not None and ended.startswith("chosen: BlockVerification verifies chains")


def composed(*overrides, **options):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("benchmark", list(overrides), **options)


@pytest.mark.parametrize(
    "one, other, same",
    [
        (["drafter=ngram", "tree=chain"], ["drafter=ngram", "tree=dynamic"], True),
        (["drafter=model", "tree=chain"], ["drafter=model", "tree=dynamic"], False),
        (["log=json"], ["log=csv", "log.path=elsewhere.csv"], True),
        (["rule=block"], ["rule=sibling"], False),
        (["methods=[autoregressive]", "rule=block"], ["methods=[autoregressive]", "rule=sibling"], True),
        (["sampling.temperature=0"], ["sampling.temperature=1"], False),
        (["tree.length=2"], ["tree.length=3"], False),
        (["batch=1"], ["batch=2"], False),
    ],
)
def test_jobs_are_the_same_exactly_if_they_measure_the_same(one, other, same):
    assert (identity(composed(*one)) == identity(composed(*other))) == same


def test_tree_is_no_part_of_a_drafter_that_takes_none():
    assert unused(composed("drafter=ngram")) == ["tree"]
    assert unused(composed("drafter=suffix_then_model")) == []
    assert unused(composed("methods=[autoregressive,chain]")) == ["drafter", "tree"]


def test_settings_of_a_job_keep_no_folders(monkeypatch):
    command = [
        "target=hub",
        "target.target=/home/me/model",
        "target.draft=org/model",
        "task=file",
        "task.path=/a/b.txt",
    ]
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(composed(*command, return_hydra_config=True))
    found = shown(composed(*command))
    assert [found[key] for key in ("target.target", "target.draft", "task.path")] == ["model", "org/model", "b.txt"]


def raising(error: BaseException):
    def compare(config, gather):
        raise error

    return compare


def test_interrupted_job_leaves_no_file_and_ends_the_sweep(tmp_path, monkeypatch):
    config = composed(f"hydra.sweep.dir={tmp_path}", return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(config)
    with pytest.raises(KeyboardInterrupt):
        job(composed(), raising(KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []
    assert job(composed(), raising(OSError("no space"))) == "failed: OSError: no space"
    assert job(composed(), raising(Refused("chosen: no"))) == "refused: chosen: no"
    assert job(composed(), raising(AssertionError("is not called"))) == "known, refused: chosen: no"


@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_launchers_run_the_jobs_elsewhere(run, launcher, tmp_path):
    pytest.importorskip(
        f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason="not installed: specdec[cluster]"
    )
    _, ended = run("-m", "rule=sibling,block", f"hydra/launcher={launcher}", *TINY)
    assert ended is None
    assert len([done for done in results(tmp_path / "outputs" / "sweep") if "figures" in done]) == 2
