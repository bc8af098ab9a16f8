"""Prompts of one call have budgets and coins of their own, and may be chats: a text is what it would be in any other call."""

import pytest
import torch
from captured import DRAFT, DRAFTERS, TARGET
from golden_runs import WORDS
from tiny_models import PROMPTS
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import specdec
from specdec import Sampling
from specdec.testing import Tape
from specdec.trace import replay

torch.set_num_threads(1)
BUDGETS = [3, 11, 1, 8][: len(PROMPTS)]
OPTIONS = {"sampling": Sampling(1.0), "seed": 3, "stop_tokens": ()}
ENGINES = {"eager": lambda: "eager", "tape": lambda: specdec.Graphs(capture=Tape)}
TEMPLATE = "{% for m in messages %}w1 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"


@pytest.mark.filterwarnings("ignore:engine. the stage .* runs step by step")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["none", "chain", "sampled, then top", "heads", "suffixes, then a model"])
def test_each_prompt_has_its_own_budget_and_coins(name, engine):
    drafter, prompts = DRAFTERS[name](DRAFT), PROMPTS[: len(BUDGETS)]
    together = specdec.generate(TARGET, prompts, drafter, max_new_tokens=BUDGETS, engine=ENGINES[engine](), **OPTIONS)
    assert list(map(len, together.tokens)) == BUDGETS
    for index, (prompt, budget, found) in enumerate(zip(prompts, BUDGETS, together.tokens, strict=True)):
        alone = specdec.generate(TARGET, prompt, drafter, max_new_tokens=budget, first_index=index, **OPTIONS)
        assert torch.equal(alone.tokens[0], found), index


def test_a_job_in_parts_gives_the_texts_of_one_call():
    drafter, options = DRAFTERS["sampled, then top"](DRAFT), {**OPTIONS, "max_new_tokens": 12}
    whole = specdec.generate(TARGET, PROMPTS, drafter, **options).tokens
    parts = [specdec.generate(TARGET, PROMPTS[i:][:2], drafter, first_index=i, **options).tokens for i in (0, 2)]
    assert [t.tolist() for part in parts for t in part] == [t.tolist() for t in whole[:4]]


def test_equal_prompts_of_other_indices_get_other_samples():
    options = {**OPTIONS, "max_new_tokens": 12}
    texts = [specdec.generate(TARGET, PROMPTS[0], first_index=i, **options).tokens[0] for i in (0, 1, 2**31 - 1)]
    assert len({tuple(text.tolist()) for text in texts}) == 3


def test_a_recorded_part_is_replayed_with_its_own_coins():
    drafter, options = DRAFTERS["chain"](DRAFT), {**OPTIONS, "max_new_tokens": 12, "trace": "laws"}
    out = specdec.generate(TARGET, PROMPTS[:2], drafter, first_index=5, **options)
    again = replay(out.trace, specdec.rules.SiblingRejection())
    assert [step.accepted for step in again.steps] == [step.accepted for step in out.trace.steps]


def chat_words():
    backend = Tokenizer.from_str(WORDS.backend_tokenizer.to_str())
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)


def test_a_chat_is_read_in_the_tokenizers_template():
    user, answer = {"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}
    options = {**OPTIONS, "tokenizer": chat_words(), "max_new_tokens": 6}
    for chats, ids in (
        ([user], [[1, 7, 8, 2]]),
        ([[user], [user, {**user, "content": "w5"}]], [[1, 7, 8, 2], [1, 7, 8, 1, 5, 2]]),
        ([user, answer], [[1, 7, 8, 1, 9]]),  # the answer goes on
    ):
        found = specdec.generate(TARGET, chats, **options).tokens
        expected = specdec.generate(TARGET, ids, **options).tokens
        assert [t.tolist() for t in found] == [t.tolist() for t in expected]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([{"role": "user", "content": "w7"}], {}, "prompt 0 is a list of messages but there is no tokenizer"),
        ([{"role": "user", "content": "w7"}], {"tokenizer": WORDS}, "has no chat template"),
        (PROMPTS[:2], {"max_new_tokens": [3]}, "max_new_tokens has 1 numbers for 2 prompts"),
        (PROMPTS[:2], {"max_new_tokens": [3, 0]}, r"max_new_tokens\[1\]=0: must be"),
        (PROMPTS[:1], {"first_index": -1}, "first_index=-1: must be"),
    ],
)
def test_what_cannot_be_is_refused_with_the_cure(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        specdec.generate(TARGET, prompts, **options)
