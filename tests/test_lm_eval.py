"""What lm-evaluation-harness gets: the target's own texts, cut where its tasks say, in its order."""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import specdec
from specdec import Sampling
from specdec.drafters import NgramDrafter

torch.set_num_threads(1)
PAIR = specdec.demo.load()
TEXTS = [prompt.text for prompt in PAIR.prompts[:6]]
GREEDY = Sampling()
PARAGRAPH = {"until": ["\n\n"], "max_gen_toks": 48}


class Hook:
    """Remembers what the harness's cache is told."""

    def __init__(self):
        self.told = []

    def add_partial(self, kind, args, text):
        self.told.append((kind, args, text))


@pytest.fixture
def model_class(monkeypatch):
    """`SpecdecLM` over a stand-in for the harness, which the tests of what it does by itself need not have."""
    stand_in = ModuleType("lm_eval.api.model")
    stand_in.LM = type("LM", (), {"__init__": lambda self: setattr(self, "cache_hook", Hook())})
    for name, module in {"lm_eval": ModuleType("lm_eval"), "lm_eval.api": ModuleType("lm_eval.api")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", stand_in)
    monkeypatch.delitem(sys.modules, "specdec.adapters.lm_eval", raising=False)
    yield importlib.import_module("specdec.adapters.lm_eval").SpecdecLM
    sys.modules.pop("specdec.adapters.lm_eval", None)


def asked(*requests):
    return [SimpleNamespace(args=request) for request in requests]


def alone(text, tokens, sampling=GREEDY, **options):
    made = specdec.generate(
        PAIR.target, text, sampling=sampling, max_new_tokens=tokens, tokenizer=PAIR.tokenizer, **options
    )
    return made.text[0]


def test_texts_come_in_the_order_of_requests_and_end_before_the_first_string_of_until(model_class):
    lm = model_class(PAIR.target, NgramDrafter(), tokenizer=PAIR.tokenizer, batch_size=2)
    settings = [PARAGRAPH, {"until": "\n", "max_gen_toks": 20}, PARAGRAPH, {"until": ["e", "\n"], "max_gen_toks": 20}]
    texts = lm.generate_until(asked(*zip(TEXTS[:4], settings, strict=True)))
    whole = [alone(text, kind["max_gen_toks"]) for text, kind in zip(TEXTS[:4], settings, strict=True)]
    expected = [whole[0].split("\n\n")[0], whole[1].split("\n")[0], whole[2].split("\n\n")[0]]
    expected.append(whole[3].split("\n")[0].split("e")[0])
    assert texts == expected and any(len(text) < len(full) for text, full in zip(texts, whole, strict=True))
    for request in zip(TEXTS[:4], settings, texts, strict=True):
        assert ("generate_until", request[:2], request[2]) in lm.cache_hook.told


def test_a_text_is_not_decoded_beyond_its_end(model_class, monkeypatch):
    lm, seen = model_class(PAIR.target, tokenizer=PAIR.tokenizer), []

    def noting(*arguments, **options):
        seen.append(specdec.generate(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(sys.modules[model_class.__module__], "generate", noting)
    (text,) = lm.generate_until(asked((TEXTS[0], {"until": ["\n"], "max_gen_toks": 64})))
    beginning, end, _ = alone(TEXTS[0], 64).partition("\n")
    assert text == beginning and end
    assert "\n" in seen[0].text[0] and "\n" not in PAIR.tokenizer.decode(seen[0].tokens[0][:-1])


def test_tasks_that_do_not_sample_are_decoded_greedily_whatever_temperature_they_name(model_class):
    lm = model_class(PAIR.target, tokenizer=PAIR.tokenizer)
    kinds = [{"max_gen_toks": 8}, {"max_gen_toks": 8, "do_sample": False, "temperature": 0.9, "top_p": 0.5}]
    kinds.append({"max_tokens": 8, "temperature": 0.0})
    assert lm.generate_until(asked(*((TEXTS[0], kind) for kind in kinds))) == [alone(TEXTS[0], 8)] * 3


def test_equal_requests_that_sample_get_samples_of_their_own(model_class):
    lm = model_class(PAIR.target, tokenizer=PAIR.tokenizer, seed=3)
    kinds = [{"do_sample": True, "temperature": 0.8, "max_gen_toks": 12}] * 2 + [
        {"temperature": 0.8, "max_gen_toks": 11}
    ]
    texts = lm.generate_until(asked(*((TEXTS[1], kind) for kind in kinds)))
    law = {"sampling": Sampling(temperature=0.8, top_k=50), "seed": 3}  # top_k: transformers' own default
    assert texts == [alone(TEXTS[1], tokens, first_index=i, **law) for i, tokens in enumerate((12, 12, 11))]
    assert len({*texts}) == 3


def test_settings_that_mean_nothing_are_refused(model_class):
    lm = model_class(PAIR.target, tokenizer=PAIR.tokenizer)
    with pytest.raises(ValueError, match="temprature"):
        lm.generate_until(asked((TEXTS[0], {"do_sample": True, "temprature": 0.8})))


def test_a_bos_token_that_the_template_wrote_is_not_doubled(model_class):
    read = []

    class Reader:
        bos_token = "<s>"

        def __call__(self, text, add_special_tokens):
            read.append((text, add_special_tokens))
            return {"input_ids": [1]}

    lm = model_class(PAIR.target, tokenizer=Reader())
    assert [lm._ids(text, 1) for text in ("<s>user: hi", "hi <s>")] == [[1], [1]]
    assert read == [("<s>user: hi", False), ("hi <s>", True)]


def test_log_likelihoods_are_refused_with_what_to_use(model_class):
    lm = model_class(PAIR.target, tokenizer=PAIR.tokenizer)
    for method in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(NotImplementedError, match="HFLM"):
            method([])


@pytest.mark.filterwarnings("ignore")
def test_the_harness_itself_scores_a_task_with_it(tmp_path):
    """The right answers are the target's own, so each of them counts."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    from specdec.adapters.lm_eval import SpecdecLM

    answers = [alone(text, 48).split("\n\n")[0] for text in TEXTS]
    rows = [json.dumps({"question": text, "answer": answer}) for text, answer in zip(TEXTS, answers, strict=True)]
    (tmp_path / "task.jsonl").write_text("\n".join([*rows, json.dumps({"question": TEXTS[0], "answer": "no"})]))
    config = {
        "task": "own_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": PARAGRAPH,
        "metric_list": [{"metric": "exact_match"}],
    }
    lm = SpecdecLM(PAIR.target, NgramDrafter(), tokenizer=PAIR.tokenizer, batch_size=4)
    found = lm_eval.simple_evaluate(lm, tasks=[ConfigurableTask(config=config)], bootstrap_iters=0)
    assert found["results"]["own_words"]["exact_match,none"] == pytest.approx(6 / 7)


def test_contexts_that_are_too_long_keep_their_end_and_empty_ones_begin_with_a_token(model_class):
    lm = model_class(PAIR.target, tokenizer=PAIR.tokenizer)
    longest, ids = PAIR.target.config.max_position_embeddings, PAIR.tokenizer(TEXTS[0] * 40)["input_ids"]
    assert len(ids) > longest
    assert lm._ids(TEXTS[0] * 40, 16) == ids[-(longest - 16) :]
    assert lm._ids("", 16) == [PAIR.tokenizer.bos_token_id or PAIR.tokenizer.eos_token_id]
    assert len(lm.generate_until(asked(("", {"max_gen_toks": 4}), (TEXTS[0] * 40, {"max_gen_toks": 4})))) == 2


@pytest.mark.parametrize(
    "settings", [{"temperature": None}, {"do_sample": True, "temperature": 0.0}, {"temperature": 0}]
)
def test_settings_without_a_temperature_are_greedy(model_class, settings):
    lm = model_class(PAIR.target, tokenizer=PAIR.tokenizer)
    assert lm.generate_until(asked((TEXTS[0], {**settings, "max_gen_toks": 8}))) == [alone(TEXTS[0], 8)]


def test_options_that_change_what_is_asked_for_are_refused(model_class):
    with pytest.raises(ValueError, match=r"\['num_samples'\]: the harness wants one text for each request"):
        model_class(PAIR.target, tokenizer=PAIR.tokenizer, num_samples=2)
