"""A prompt that cannot be decoded names its place; it ends a job, or is left out of it with the reason."""

import pytest
import torch
from test_prompts_apart import WORDS, chat_words
from tiny_models import VOCAB, llama

import specdec
from specdec.models.target import ModelTarget
from specdec.prompts import as_list, as_prompts

torch.set_num_threads(1)
TARGET = ModelTarget(llama())


class Picky:
    """A tokenizer of numbers that fails on other words, as its library does."""

    def decode(self, tokens):
        return " ".join(map(str, tokens))

    def __call__(self, text):
        if "x" in text:
            raise RuntimeError("no bytes for x.")
        return {"input_ids": [int(word) for word in text.split()]}


TEMPLATED = (
    "{% for m in messages %}{% if m['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}w1{% endfor %}"
)
BAD = {
    "empty": ([], "prompt 1 is empty; give at least one token"),
    "longer than the context": ([3] * 256, "prompt 1 has 256 tokens, and 4 new ones would exceed.*at most 255 tokens"),
    "too long with its budget": ([3] * 253, "prompt 1 has 253 tokens, and 4 new ones.*max_new_tokens to at most 3"),
    "an id beyond the vocabulary": ([1, VOCAB], "prompt 1 contains token id 50; .* ids 0 to 49"),
    "a huge id": ([2**70], r"prompt 1\[0\]=1180591620717411303424: must be"),
    "no ids": ([1.5], r"prompt 1\[0\]=1.5: must be an integer"),
    "a batch": (torch.ones(2, 2, dtype=torch.int64), r"prompt 1 is a tensor of shape \[2, 2\]"),
    "another kind": (None, "prompt 1 is a NoneType"),
    "text that its tokenizer refuses": (
        "1 x",
        r"prompt 1 cannot be tokenised \(RuntimeError: no bytes for x\); correct it",
    ),
    "empty text": ("", "prompt 1 is empty"),
    "a message alone": ({"role": "user", "content": "1"}, "prompt 1 is a dict; of chat messages pass the list"),
}


def sorted_out(given, on_error, tokenizer=None):
    budgets = [4] * len(given)
    prompts, skipped = as_prompts(as_list(given), budgets, TARGET, tokenizer, on_error)
    return {i: tokens.tolist() for i, tokens in prompts.items()}, skipped


@pytest.mark.parametrize("case", BAD)
def test_a_bad_prompt_among_others_is_skipped_with_the_reason_or_raised(case):
    bad, reason = BAD[case]
    given = [[5, 6], bad, "7 8"]
    prompts, skipped = sorted_out(given, "skip", Picky())
    assert prompts == {0: [5, 6], 2: [7, 8]}
    with pytest.raises(ValueError, match=reason) as raised:
        sorted_out(given, "raise", Picky())
    assert skipped == {1: str(raised.value)}
    with pytest.raises(ValueError, match=reason):
        specdec.generate(TARGET, given, tokenizer=Picky(), max_new_tokens=4)


def test_a_chat_that_its_template_refuses_is_skipped_with_the_reason():
    tokenizer = chat_words()
    tokenizer.chat_template = TEMPLATED
    good, bad = ([{"role": role, "content": "w3"}] for role in ("user", "bad"))
    prompts, skipped = sorted_out([good, bad], "skip", tokenizer)
    assert list(prompts) == [0]
    assert skipped == {1: "prompt 1 cannot be tokenised (TemplateError: no such role); correct it, or pass token ids."}
    prompts, skipped = sorted_out([[5], good], "skip", WORDS)
    assert prompts == {0: [5]} and "prompt 1 is a list of messages but the" in skipped[1]


def test_the_first_bad_prompt_is_raised_whatever_is_wrong_with_it():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sorted_out([[5], [], [1.5]], "raise")


def test_there_may_be_no_good_prompt():
    prompts, skipped = sorted_out(["w1", []], "skip")
    assert prompts == {} and [*skipped] == [0, 1] and "prompt 0 is text but there is no tokenizer" in skipped[0]


def test_good_prompts_are_all_there():
    assert sorted_out([[5], [6, 7]], "skip") == ({0: [5], 1: [6, 7]}, {})


def test_on_error_is_one_of_two():
    with pytest.raises(ValueError, match="on_error='ignore': must be one of 'raise', 'skip'"):
        sorted_out([[5]], "ignore")
