"""Every Python block of the README and of the pages runs as it stands; commands and links name what there is."""

import re
import shlex
from pathlib import Path

import pytest
import transformers
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

import specdec

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {"README": README} | {page.stem: page.read_text("utf-8") for page in sorted(ROOT.glob("notebooks/*.md"))}
LINKING = [*ROOT.glob("*.md"), *(ROOT / page for page in ("experiments/README.md", "kernels/README.md"))]
LINKING += [*ROOT.glob("notebooks/*.md"), *ROOT.glob("experiments/results/*.md"), ROOT / "specdec" / "demo" / "CARD.md"]


# with what is printed, where that follows
CODE = {
    f"{name} {i}": block
    for name, text in PAGES.items()
    for i, block in enumerate(
        re.findall(r"^```python\n(.*?)^```$(?:\n\n^```\n(.*?)^```$)?", text, re.DOTALL | re.MULTILINE), 1
    )
}
TARGETS = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
COMMANDS = [
    line.partition(" #")[0].strip()
    for text in PAGES.values()
    for block in re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(make|python) ", line)
]
BENCHMARKS = [command for command in COMMANDS if "benchmark.py" in command or "ARGS=" in command]


@pytest.fixture
def _stand_ins(monkeypatch):
    """For a hub and a GPU: the demo pair, and its tokenizer with a chat template."""
    pair = specdec.demo.load()
    for model in (pair.target, pair.draft):
        monkeypatch.setattr(model, "to", {"cuda": model}.__getitem__)
    pair.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    models = {"HuggingFaceTB/SmolLM2-1.7B-Instruct": pair.target, "HuggingFaceTB/SmolLM2-135M-Instruct": pair.draft}
    load = staticmethod(lambda name, dtype: models[name])
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", staticmethod(lambda name: pair.tokenizer))


@pytest.mark.parametrize("name", CODE)
def test_code_runs_and_prints_what_the_page_says(name, tmp_path, monkeypatch, request, capsys):
    code, printed = CODE[name]
    if "from_pretrained" in code:
        request.getfixturevalue("_stand_ins")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code, scope)
    assert printed in ("", capsys.readouterr().out)
    if "Stutter" in scope:
        from specdec.rules import SiblingRejection
        from specdec.testing import assert_lossless

        assert_lossless(SiblingRejection(), drafters=[scope["Stutter"]()])


def test_readme_is_the_first_screen():
    assert len(README.splitlines()) <= 130


def test_commands_name_what_there_is():
    assert len(COMMANDS) > 8
    for command in COMMANDS:
        program, first, *_ = shlex.split(command)
        assert first in TARGETS if program == "make" else (ROOT / first).is_file(), command
    for text in PAGES.values():
        assert {*re.findall(r"`make ([\w-]+)", text)} <= TARGETS
        assert all((ROOT / name).is_file() for name in re.findall(r"\bexperiments/[\w/]+\.py", text))


@pytest.mark.parametrize("command", BENCHMARKS)
def test_settings_of_benchmarks_compose(command):
    words = shlex.split(command)[2:]
    words = shlex.split(words[0].removeprefix("ARGS=")) if "ARGS=" in command else words
    given = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    swept = [f"{each.key_or_group}={next(each.sweep_string_iterator())}" for each in given if each.is_sweep_override()]
    plain = [each.input_line for each in given if not each.is_sweep_override()]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("benchmark", [*plain, *swept])
    assert "autoregressive" in config.methods


def anchors(path):
    heads = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`\(", "", page.read_text("utf-8"), flags=re.DOTALL)
    ):
        if re.match(r"https://[\w.-]+\.\w+/", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_of_experiments_names_every_script_and_no_other():
    folder = ROOT / "experiments"
    text = (folder / "README.md").read_text("utf-8")
    named = re.findall(r"experiments/[\w/]+\.py", text)
    assert all((ROOT / name).is_file() for name in named)
    assert all(script.name in text for script in folder.glob("*.py"))
