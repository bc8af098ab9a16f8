"""The certificate fails on bugs that shipped elsewhere, each planted in a rule, a drafter or the loop."""

import pytest

from certificates.cases import Case
from certificates.mutants import DRAFT, IN_RULES, MUTANTS, TREES, Sequential, example
from specdec.rules import BlockVerification
from specdec.testing import TabularDrafter, assert_lossless

BIASED = 1e-3  # a certificate of an exact rule reads 0; the smallest of these bugs moves the law by 1e-2
PLANTED_IN_THE_LIBRARY = [mutant for mutant in MUTANTS if mutant.patches]


def name_of(mutant) -> str:
    return mutant.name.replace(" ", "_")


@pytest.mark.parametrize("tree", TREES)
def test_the_rule_that_is_broken_is_exact_before(tree):
    assert Case(TabularDrafter(DRAFT, TREES[tree]), Sequential()).certify()["total_variation"] == 0


@pytest.mark.parametrize("mutant", PLANTED_IN_THE_LIBRARY, ids=name_of)
def test_the_library_is_exact_before_a_bug_is_planted_in_it(mutant):
    assert mutant.case.certify()["total_variation"] == 0


@pytest.mark.parametrize("mutant", MUTANTS, ids=name_of)
def test_the_certificate_catches_a_planted_bug(mutant):
    with mutant.planted():
        assert mutant.case.certify()["total_variation"] > BIASED


@pytest.mark.parametrize("mutant", IN_RULES, ids=name_of)
def test_the_standard_battery_catches_a_bug_planted_in_a_rule(mutant):
    with mutant.planted(), pytest.raises(AssertionError, match="is not lossless: total variation") as caught:
        assert_lossless(mutant.case.rule)
    assert float(str(caught.value).split("total variation ")[1].split()[0]) > BIASED


def test_the_uncapped_product_of_ratios_is_off_by_a_ninth_on_the_papers_example():
    mutant = MUTANTS[-1]
    assert mutant.case.rule.__class__ is BlockVerification
    exact = example(mutant.case.rule).certify()
    with mutant.planted():
        biased = mutant.case.certify()
    assert exact["expected_tokens"] - 1 == pytest.approx(11 / 9, abs=1e-12)  # the softmax rounds thirds
    assert biased["expected_tokens"] - 1 == pytest.approx(12 / 9, abs=1e-12)
    assert biased["total_variation"] == pytest.approx(1 / 9, abs=1e-12)
