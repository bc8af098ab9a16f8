"""Every file of conf/ is a constructor call that works, and a misspelt one is answered with the cure."""

import copy
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

import specdec
from experiments import distill_draft
from experiments.bench import calls
from experiments.bench.inputs import Setting
from experiments.benchmark import with_models
from specdec.drafters import Eagle3Drafter, Eagle3Net, ModelDrafter
from specdec.rules import TraversalVerification
from specdec.trees import Chain

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PRESETS = ("sweep", "experiment", "net")  # the first two set other options: see test_sweep.py
FILES = [file for file in CONF.glob("*/*.yaml") if file.parent.name not in PRESETS]
OPTIONS = sorted(file.relative_to(CONF).with_suffix("").as_posix() for file in FILES)
DEMO = specdec.demo.FOLDER
CHECKPOINT = Path(tempfile.mkdtemp(prefix="specdec-draft-"))
PLAN = CHECKPOINT / "plan.yaml"
MANDATORY = {
    "drafter/plan": [f"plan.path={PLAN}"],
    "rule/plan": [f"plan.path={PLAN}"],
    "drafter/eagle3": [f"drafter.source={CHECKPOINT}"],
    "target/hub": [f"target.target={DEMO / 'target'}", f"target.tokenizer={DEMO / 'tokenizer'}"],
    "task/corpus": ["task.count=1", "task.one_in=1"],
    "task/file": [f"task.path={DEMO / 'prompts.jsonl'}"],
    "task/dataset": ["task.name=made/up"],
    "task/real": ["task.folder=made_up"],
}
PAIR = specdec.demo.load()
LIKE = copy.deepcopy(PAIR.target.config)
LIKE.num_hidden_layers = 1
Eagle3Drafter(Eagle3Net(LIKE, (2, 3, 5), LIKE.hidden_size, LIKE.vocab_size)).save_pretrained(CHECKPOINT)
told = specdec.tuning.Speedup(specdec.tuning.Estimate(1.5))
specdec.Plan("draft", ModelDrafter(PAIR.draft, Chain(3)), TraversalVerification(), told, "pays", "because").save(PLAN)
ELSEWHERE = {"drafter/mtp"}  # needs a target with such a layer: test_mtp.py


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("benchmark", list(overrides))


def message(*overrides) -> str:
    with pytest.raises(SystemExit) as ended:
        calls.run(lambda: calls.check(OmegaConf.to_container(composed(*overrides))))
    return str(ended.value)


@pytest.fixture(autouse=True)
def _own_errors(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in ELSEWHERE])
def test_option_is_a_constructor_call_that_works(option):
    group, name = option.split("/")
    choice = f"methods=[{name}]" if group == "methods" else f"{group}={name}"
    config = composed(choice, *MANDATORY.get(option, []))
    calls.check(OmegaConf.to_container(config))
    assert "_target_" in (config.methods[name] if group == "methods" else config[group])
    assert list(with_models(config, PAIR)) == ([name] if group == "methods" else ["autoregressive", "chosen"])
    # made with models, just now; see test_prompts.py, test_smollm2.py
    if group not in ("methods", "drafter") and option not in ("task/dataset", "task/real", "target/smollm2"):
        assert instantiate(config[group]) is not None


@pytest.mark.parametrize("name", [file.stem for file in (CONF / "net").glob("*.yaml")])
def test_networks_to_train_are_made_for_the_target(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train_drafter", [f"net={name}"])
    calls.check(OmegaConf.to_container(config))
    drafter = instantiate(config.net)(PAIR.target, Chain(2))
    out = specdec.generate(PAIR.target, torch.arange(5, 25), drafter, max_new_tokens=4, stop_tokens=())
    assert (
        out.tokens[0].tolist()
        == specdec.generate(PAIR.target, torch.arange(5, 25), max_new_tokens=4, stop_tokens=()).tokens[0].tolist()
    )
    assert sum(p.numel() for p in drafter.net.parameters()) < 3.1e6


@pytest.mark.parametrize(
    "override, constructor, meant",
    [
        ("sampling.temprature=1", "specdec.Sampling", "temperature"),
        ("+sampling.temprature=1", "specdec.Sampling", "temperature"),
        ("tree.lenght=2", "specdec.trees.Chain", "length"),
        ("+methods.chosen.ruel=1", "specdec.generate", "rule"),
        ("bach=2", "the configuration", "batch"),
    ],
)
def test_misspelt_key_is_told_with_its_constructor_and_the_argument_that_was_meant(override, constructor, meant):
    key = override.partition("=")[0]
    text = message(override)
    assert text.startswith(f"{key.removeprefix('+')}: {constructor} has no argument {key.rpartition('.')[2]!r}")
    assert f"did you mean {meant!r}?" in text


def test_argument_that_a_file_does_not_list_is_told_how_to_be_added():
    assert "use +sampling.top_k=3" in message("sampling.top_k=3")


def test_misspelt_option_is_told_with_the_options_there_are():
    text = message("sampling=temperatur")
    assert all(option in text for option in ("greedy", "nucleus", "temperature"))


@pytest.mark.parametrize("option", ["tp_plan", "device_map"])
def test_the_target_is_loaded_as_it_is_asked_to_be(option, monkeypatch):
    config = composed("target=hub", *MANDATORY["target/hub"], f"+target.loading.{option}=auto", "target.draft=small")
    calls.check(OmegaConf.to_container(config))
    asked = {}

    def load(name, **options):
        asked[name] = options
        return PAIR.target

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    instantiate(config.target)
    assert {name: options.get(option) for name, options in asked.items()} == {
        str(DEMO / "target"): "auto",
        "small": None,
    }


def test_experiment_on_a_draft_model_that_is_not_there_is_told_what_to_set():
    setting = Setting(PAIR._replace(draft=None), [], [], specdec.Sampling(), None, {"options": {"device": "cpu"}})
    with pytest.raises(SystemExit, match=r"target\.draft is not set"):
        _ = setting.draft
    assert replace(setting, models=PAIR).draft is PAIR.draft


def test_drafts_that_would_be_trained_on_whole_texts_are_refused_before_any_work():
    with pytest.raises(SystemExit, match="prompt_length is null"):
        distill_draft.main(OmegaConf.create({"prompt_length": None}))


def test_method_without_its_draft_model_is_told_what_to_set():
    config = composed("target=hub", *MANDATORY["target/hub"])
    with pytest.raises(SystemExit, match=r"target\.draft is not set"):
        with_models(config, PAIR._replace(draft=None))
    config = composed("target=hub", *MANDATORY["target/hub"], "methods=[autoregressive,ngram,transformers]")
    assert list(with_models(config, PAIR._replace(draft=None))) == ["autoregressive", "ngram", "transformers"]


def without(module: str, folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """A script as a user calls it, where importing that module fails."""
    (folder / f"{module}.py").write_text(f"raise ModuleNotFoundError(name={module!r})")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "experiments" / script), *arguments]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "mistake, meant",
    [("sampling=temperatur", "temperature"), ("+sampling.temprature=1", "'temperature'"), ("thread=2", "'threads'")],
)
@pytest.mark.parametrize("script", ["benchmark.py", "generate.py", "acceptance.py"])
def test_mistake_in_a_command_is_told_before_torch_is_imported_which_takes_seconds(script, mistake, meant, tmp_path):
    done = without("torch", tmp_path, script, mistake)
    assert done.returncode == 1 and meant in done.stderr and "Traceback" not in done.stderr


def test_folder_of_options_may_lie_outside_of_the_repository(tmp_path):
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "mine.yaml").write_text("_target_: specdec.drafters.NgramDrafter\nlength: 7\n")
    done = without("torch", tmp_path, "benchmark.py", f"--config-dir={tmp_path}", "drafter=mine", "--cfg=job")
    assert "drafter:\n  _target_: specdec.drafters.NgramDrafter\n  length: 7\n" in done.stdout
    assert "--config-dir" in without("torch", tmp_path, "benchmark.py", "--help").stdout


def test_experiment_without_its_extra_is_told_what_to_install(tmp_path):
    done = without("hydra", tmp_path, "benchmark.py")
    assert done.returncode == 1 and done.stderr.startswith("hydra is not installed")
    assert "make install" in done.stderr and "[experiments]" in done.stderr and "Traceback" not in done.stderr


def test_a_published_draft_is_checked_by_one_command(tmp_path):
    command = [
        sys.executable,
        ROOT / "experiments" / "check_drafter.py",
        f"drafter.source={CHECKPOINT}",
        "task.per_task=1",
    ]
    done = subprocess.run([*command, "new_tokens=8"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "as taken" in done.stdout and "acceptance length 1." in done.stdout
    assert len(list(tmp_path.glob("outputs/*.json"))) == 1


def test_a_plan_is_what_chosen_methods_draft_with():
    config = composed("drafter=plan", "rule=plan", f"plan.path={PLAN}")
    chosen = with_models(config, PAIR)["chosen"].keywords
    assert str(chosen["drafter"]) == str(ModelDrafter(PAIR.draft, Chain(3)))
    assert isinstance(chosen["rule"], TraversalVerification)
