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
TEXT = "\n".join([*PAGES.values(), (ROOT / "experiments" / "README.md").read_text("utf-8")]).replace("\\\n", " ")
COMMANDS = [
    *re.findall(r"^((?:make|python) .*?)(?: +#.*)?$", TEXT, re.MULTILINE),
    *re.findall(r"`((?:make|python) [^`]+)`", TEXT),
]
SCRIPTS = {f"experiments/{path.stem}.py": path.stem for path in ROOT.glob("conf/*.yaml")}


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
    if "AutoModelForCausalLM" in code:
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
    assert len(COMMANDS) > 30
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if program == "make":
            assert words[0] in TARGETS, command
        else:
            module = f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else words[0]
            package = ROOT / module.removesuffix(".py") / "__main__.py"
            assert (ROOT / module).is_file() or package.is_file(), command
    assert all((ROOT / name).is_file() for name in re.findall(r"\bexperiments/[\w/]+\.py", TEXT))


def settings(command):
    """The name of its configuration, and words for it, where it takes settings. NAME stands for one that there is."""
    command = command.replace("make demo ARGS=", "python experiments/benchmark.py ").replace("=NAME", "=demo_greedy")
    _, script, *words = [*shlex.split(command), ""]
    words = [part for word in words for part in word.split() if not part.startswith(("-", "hydra/"))]
    return (SCRIPTS[script], words) if script in SCRIPTS and "..." not in words else None


@pytest.mark.parametrize("command", [command for command in dict.fromkeys(COMMANDS) if settings(command)])
def test_settings_of_commands_compose(command):
    name, words = settings(command)
    given = OverridesParser.create().parse_overrides(words)
    swept = [f"{each.key_or_group}={next(each.sweep_string_iterator())}" for each in given if each.is_sweep_override()]
    plain = [each.input_line for each in given if not each.is_sweep_override()]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose(name, [*plain, *swept])


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
