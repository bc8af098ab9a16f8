"""Hosted CI and the pre-commit hook call what `.ci/run` calls, and the citation is of this version."""

import shlex
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CALLS = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]


def loaded(name):
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def jobs():
    return loaded(".github/workflows/ci.yml")["jobs"].values()


def test_ci_lints_and_tests():
    assert CALLS == ["make lint", "make test", "make test-versions", "make test-smollm2", "make test-package"]


def test_hosted_ci_calls_what_ci_calls():
    assert [[step["run"] for step in job["steps"] if "run" in step] for job in jobs()] == [CALLS]


def test_hosted_ci_begins_with_the_oldest_python_that_is_supported():
    for job in jobs():
        pythons = job["strategy"]["matrix"]["python"]
        assert f">={pythons[0]}" == PROJECT["requires-python"]
        assert all(isinstance(python, str) for python in pythons)  # 3.10 is the number 3.1


def test_hosted_ci_fetches_nothing_but_the_sources_and_python():
    used = [step["uses"].partition("@")[0] for job in jobs() for step in job["steps"] if "uses" in step]
    assert used == ["actions/checkout", "actions/setup-python"]


def test_hosted_site_is_what_make_docs_builds():
    steps = loaded(".github/workflows/docs.yml")["jobs"]["build"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make docs"]
    [built] = [step["with"]["path"] for step in steps if "upload-pages-artifact" in step.get("uses", "")]
    assert f"sphinx --fail-on-warning --keep-going --quiet -c notebooks . {built}\n" in (ROOT / "Makefile").read_text()


def test_precommit_calls_the_lint_of_ci_on_the_whole_repository():
    hooks = [hook for repo in loaded(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == CALLS[:1]
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in hooks)


def test_lint_is_what_its_hook_is_named():
    (hook,) = loaded(".pre-commit-config.yaml")["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0].splitlines()[1:]
    tools = [shlex.join(word.rpartition("/")[2] for word in shlex.split(line) if "=" not in word) for line in recipe]
    assert hook["name"].split(", ") == tools


def test_citation_names_this_version_and_licence():
    citation = loaded("CITATION.cff")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert {*citation["keywords"]} == {*PROJECT["keywords"]}
    assert citation["authors"] and citation["message"] and citation["cff-version"] == "1.2.0"
