"""How often greedy text is `model.generate`'s, and how near the ties are where it is not."""

import json
import sys

import pytest
import torch

from experiments import equality
from experiments.equality import DEMO, Case, gap, main, measured, random_case, table

torch.set_num_threads(1)


def test_texts_are_equal_in_float64_and_the_script_writes_that_down(tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    options = ["--models", "LlamaForCausalLM", "--dtypes", "float64", "--rows", "2", "--tokens", "6"]
    monkeypatch.setattr(sys, "argv", ["equality.py", *options, "--output", str(file)])
    main()
    found = json.loads(file.read_text("utf-8"))
    assert {(row["batch"], row["drafter"]) for row in found["figures"]} == {
        *((batch, drafter) for batch in (1, 8) for drafter in ("none", "n-gram", "small model")),
        (8, "model.generate"),
    }
    assert all(row["equal"] == row["rows"] == 2 and row["gaps"] == [] for row in found["figures"])
    assert found["options"]["tokens"] == 6 and found["versions"]["transformers"]
    assert file.with_suffix(".md").read_text("utf-8").count("| 2/2 | - | - | - |") == 7


def test_a_text_that_parts_is_found_with_its_place_and_its_gap(monkeypatch):
    case = random_case("LlamaForCausalLM", torch.float64, rows=2)
    right = equality.generated(case.target, case.prompts[:1], 6)[0]
    logits = case.target(torch.cat([case.prompts[0], torch.tensor(right[:4])])[None]).logits[0, -1].detach()
    best, second = logits.topk(2).indices.tolist()
    assert right[4] == best
    expected = float((logits[best] - logits[second]) / logits.abs().max())
    assert gap(case.target, case.prompts[0], right, right) is None
    assert gap(case.target, case.prompts[0], [*right[:4], second, 0], right) == (4, pytest.approx(expected, rel=1e-9))

    def wrong(case, drafter, prompts, tokens):
        return [[*text[:4], second, 0] for text in equality.generated(case.target, prompts, tokens)]

    monkeypatch.setattr(equality, "drafted", wrong)
    one = Case(case.target, case.draft, case.prompts[:1])
    row = next(measured(one, 6))
    assert row["equal"] == 0 and row["tokens_before_parting"] == [4] and row["gaps"] == [pytest.approx(expected)]


def test_the_table_counts_random_models_together_and_the_demo_pair_by_itself():
    rest = {"dtype": "bfloat16", "batch": 8, "drafter": "none"}
    figures = [
        {"model": "LlamaForCausalLM", "rows": 4, "equal": 3, "gaps": [0.002], **rest},
        {"model": "GPT2LMHeadModel", "rows": 4, "equal": 2, "gaps": [0.01, 0.001], **rest},
        {"model": DEMO, "rows": 4, "equal": 4, "gaps": [], **rest},
    ]
    assert table(figures).splitlines()[2] == "| bfloat16 | 8 | none | 5/8 | 1.0e-02 | 4/4 | - |"
