"""The committed certificates are what the script finds, and a sample of them is found again."""

import json

import pytest

from certificates.cases import KEYS
from experiments.bench.results import ROOT, provenance
from experiments.certify import cases, certify, document, failures

RESULTS = ROOT / "experiments" / "results"
ROWS = json.loads((RESULTS / "certificates.json").read_text("utf-8"))
EVERY = 29  # a prime: the sample runs through all rules, trees and samplings


def test_a_sample_of_the_certificates_is_found_again():
    sample = list(range(0, len(ROWS), EVERY))
    assert [{**row, "total_variation": None} for row in certify(sample)] == [
        {**ROWS[i], "total_variation": None} for i in sample
    ]


def test_the_committed_certificates_cover_every_case_and_none_fails():
    assert len(ROWS) == len(cases())
    assert all(tuple(row) == KEYS for row in ROWS)
    assert failures(ROWS) == []


def test_lossless_rules_are_exactly_lossless_on_tables_and_the_others_are_not():
    ran = [row for row in ROWS if row["refused"] is None and row["mutant"] is None]
    exact = [row["total_variation"] for row in ran if row["lossless"] and row["drafter"] != "model"]
    assert len(exact) > 500
    assert set(map(repr, exact)) == {"0"}  # the integer, not a small float
    assert max(row["total_variation"] for row in ran if not row["lossless"]) > 0.1


def test_refusals_name_a_cure():
    refused = [row for row in ROWS if row["refused"]]
    assert refused
    assert all("use " in row["refused"] or "draft " in row["refused"] for row in refused)


@pytest.mark.parametrize("wrong", [{"total_variation": 1e-17}, {"total_variation": 0, "mutant": "missed"}], ids=str)
def test_a_biased_rule_and_a_missed_bug_fail(wrong):
    row = next(row for row in ROWS if row["lossless"] and row["drafter"] == "table" and row["refused"] is None)
    assert failures([row]) == []
    assert failures([{**row, **wrong}]) != []


def test_the_document_states_commit_and_versions():
    made = provenance("experiments/certify.py", [], {}, "cpu")
    text = document(ROWS[::EVERY], {**made, "commit": "abc", "dirty": False})
    assert "commit abc" in text
    assert f"torch {made['versions']['torch']}" in text
