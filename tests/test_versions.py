"""The oldest and the newest transformers that are allowed: which they are, and that texts are the same on both."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from golden_texts import CASES, FILE, texts
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tiny_models import GATE, PROMPTS, reference
from transformers import LlamaForCausalLM

import specdec
from specdec.drafters import ModelDrafter
from specdec.models.cache import GENERATE_CACHE, cache_argument
from specdec.trees import Widths

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


def pinned(file):
    """The version of transformers in a file of constraints."""
    [found] = re.findall(r"^transformers==(\S+)", (ROOT / file).read_text("utf-8"), re.MULTILINE)
    return Version(found)


OLDEST, NEWEST = pinned("constraints-oldest.txt"), pinned("constraints.txt")


def test_the_minor_releases_that_are_allowed_begin_and_end_with_those_that_are_tested():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    [allowed] = [r.specifier for r in map(Requirement, declared) if r.name == "transformers"]
    assert OLDEST.micro == 0 and OLDEST < NEWEST
    assert allowed == SpecifierSet(f">={OLDEST.major}.{OLDEST.minor},<{NEWEST.major}.{NEWEST.minor + 1}")


@pytest.mark.parametrize("case", CASES)
def test_sampled_texts_are_the_same_on_every_version(case):
    assert texts(case) == json.loads(FILE.read_text("utf-8"))[case]


class OldName(LlamaForCausalLM):
    """A model of somebody's own, written before transformers 5.24, in no need of what is not named here."""

    def forward(self, input_ids, position_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0):
        cache = {GENERATE_CACHE: past_key_values}
        return super().forward(
            input_ids, position_ids=position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, **cache
        )


class NewName(LlamaForCausalLM):
    """One written since."""

    def forward(self, input_ids, position_ids=None, cache=None, use_cache=None, logits_to_keep=0):
        cache = {GENERATE_CACHE: cache}
        return super().forward(
            input_ids, position_ids=position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, **cache
        )


class NoName(LlamaForCausalLM):
    """One that hands everything on."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "name"), [(OldName, "past_key_values"), (NewName, "cache"), (NoName, GENERATE_CACHE)], ids=str
)
def test_a_model_of_ones_own_is_given_the_cache_by_the_name_it_has_for_it(kind, name):
    plain = GATE["llama"](torch.float64)
    own = kind(plain.config).to(torch.float64).eval()
    own.load_state_dict(plain.state_dict())
    assert cache_argument(own) == name
    expected = [reference(plain, p).tolist() for p in PROMPTS]
    for target, draft in [(own, plain), (plain, own)]:
        out = specdec.generate(target, PROMPTS, ModelDrafter(draft, Widths((2, 2))), max_new_tokens=24)
        assert [text.tolist() for text in out.tokens] == expected
        assert out.summary()["acceptance_length"] > 2


def test_transformers_itself_names_the_cache_by_its_version():
    renamed = Version(transformers.__version__) >= Version("5.24")
    assert GENERATE_CACHE == cache_argument(GATE["llama"]()) == ("cache" if renamed else "past_key_values")
