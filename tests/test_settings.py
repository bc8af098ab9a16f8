"""The settings of a job are the same in every process, and differ wherever its texts may."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_drafters import Proposing
from test_adapters import SWITCHES, with_two_adapters
from tiny_models import GPT2, MATRIX, PROMPTS, TOKENS, build, llama
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import specdec
from specdec import Sampling
from specdec.arguments import as_request
from specdec.drafters import Fallback, ModelDrafter, NgramDrafter
from specdec.journal import settings_of
from specdec.models.cache import TreeCache
from specdec.models.digest import config_digest, weights_digest
from specdec.models.target import ModelTarget
from specdec.rules import BlockVerification
from specdec.testing import TabularTarget
from specdec.trees import Chain

torch.set_num_threads(1)


class Own(Proposing):
    """A drafter of somebody's own, of a class without a repr."""

    def __init__(self, length=3):
        self.length, self.words, self._seen = length, ["a", "b"], object()

    def spec(self, sampling):
        return NgramDrafter().spec(sampling)


class ByHand:
    """So is this processor."""

    def __call__(self, texts, scores):
        return scores


class OtherCache(TreeCache):
    pass


PROCESSORS = [RepetitionPenaltyLogitsProcessor(1.2), NoBadWordsLogitsProcessor([[3]]), ByHand()]
JOB = {
    "target": llama(),
    "prompts": PROMPTS,
    "drafter": Fallback(Own(), ModelDrafter(llama(1), Chain(2))),
    "sampling": Sampling(0.8, top_p=0.9, processors=PROCESSORS),
    "stop_tokens": (9, 7),
}
SAME = {
    "a model built again": {"target": llama()},
    "an engine": {"engine": "graph"},
    "a trace": {"trace": "ceiling"},
    "the size of batches": {"batch_size": 2},
    "caches that are kept": {"keep": True},
    "prompts in another form": {"prompts": [prompt.numpy().astype(np.int32) for prompt in PROMPTS]},
    "stop tokens in another order": {"stop_tokens": {7, 9}},
    "one budget for each": {"max_new_tokens": [128] * 4},
    "a drafter built again": {"drafter": Fallback(Own(), ModelDrafter(llama(1), Chain(2)))},
}
OTHER = {
    "seed": {"seed": 1},
    "first index": {"first_index": 3},
    "logprobs": {"logprobs": True},
    "temperature": {"sampling": Sampling(0.7, top_p=0.9, processors=PROCESSORS)},
    "top_p": {"sampling": Sampling(0.8, processors=PROCESSORS)},
    "processors": {
        "sampling": Sampling(0.8, top_p=0.9, processors=[RepetitionPenaltyLogitsProcessor(1.3), *PROCESSORS[1:]])
    },
    "rule": {"rule": BlockVerification(), "drafter": JOB["drafter"]},
    "drafter": {"drafter": Fallback(Own(), ModelDrafter(llama(1), Chain(3)))},
    "drafter's weights": {"drafter": Fallback(Own(), ModelDrafter(llama(2), Chain(2)))},
    "target": {"target": ModelTarget(llama(), OtherCache)},
    "target's weights": {"target": llama(3)},
    "target's config": {"target": llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})},
    "stop tokens": {"stop_tokens": (9,)},
    "max_new_tokens": {"max_new_tokens": [128, 128, 128, 127]},
    "prompts' hash": {"prompts": [PROMPTS[1], PROMPTS[0], *PROMPTS[2:]]},
}


def of(**changes):
    return settings_of(as_request(**{**JOB, **changes}))


@pytest.mark.parametrize("case", SAME)
def test_what_changes_no_text_is_no_setting(case):
    assert of(**SAME[case]) == of()


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_texts_is_a_setting_under_its_own_name(name):
    found, expected = of(**OTHER[name]), of()
    assert {key for key in expected if found[key] != expected[key]} == {name}


def test_where_a_prompt_ends_is_a_setting():
    assert of(prompts=[[1, 2], [3]])["prompts' hash"] != of(prompts=[[1], [2, 3]])["prompts' hash"]


def test_samples_of_one_prompt_are_not_equal_prompts():
    alike, samples = of(prompts=[[5], [5]]), of(prompts=[[5]], num_samples=2)
    assert {key for key in alike if samples[key] != alike[key]} == {"num_samples", "prompts' hash"}


def test_settings_can_be_read():
    found = of()
    assert found["target"] == "ModelTarget(LlamaForCausalLM, TreeCache)" and found["target's dtype"] == "torch.float64"
    assert (found["texts"], found["seed"], found["temperature"], found["max_new_tokens"]) == (4, 0, 0.8, 128)
    assert found["stop tokens"] == [7, 9] and found["rule"] == "SiblingRejection()"
    assert found["processors"][2] == "ByHand()" and "penalty=1.2" in found["processors"][0]
    assert found["drafter"] == "Fallback(Own(), ModelDrafter(LlamaForCausalLM, Chain(2)))"
    assert of(drafter=Own())["drafter"] == "Own(length=3, words=['a', 'b'])"
    assert of(target=TabularTarget(50, 3), drafter=None)["target"] == "TabularTarget(seed=3, vocab=50)"
    assert all(len(json.dumps(value)) < 400 for value in found.values())


def test_a_generation_config_counts_but_for_the_budgets():
    def named(budget=128, **fields):
        return of(sampling=Sampling.from_generation_config(GenerationConfig(**fields)), max_new_tokens=budget)

    plain = named(do_sample=True, repetition_penalty=1.2)
    shorter, other = (
        named(64, do_sample=True, repetition_penalty=1.2),
        named(do_sample=True, repetition_penalty=1.3),
    )
    assert {key for key in plain if shorter[key] != plain[key]} == {"max_new_tokens"}
    assert {key for key in plain if other[key] != plain[key]} == {"generation config"}


ELSEWHERE = """
import json, sys
sys.path.insert(0, "tests")
from test_settings import of
print(json.dumps(of()))
"""


def test_another_process_finds_the_same_settings():
    """With other addresses, and sets and dicts in another order."""
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == json.loads(json.dumps(of()))


def digests(model):
    return config_digest(model), weights_digest(model)


@pytest.mark.parametrize("family", ["gpt2", "gemma3n_shared_layers", "deepseek_v3_latent"])
def test_digests_do_not_change_by_decoding_saving_and_loading(family, tmp_path):
    model = MATRIX[family]() if family in MATRIX else build("GPT2LMHeadModel", **TOKENS, **GPT2)
    before = digests(model)
    specdec.generate(model, PROMPTS, max_new_tokens=3)
    assert digests(model) == before
    model.save_pretrained(tmp_path)
    assert digests(AutoModelForCausalLM.from_pretrained(tmp_path).eval()) == before


def test_any_training_step_changes_the_weights_digest():
    """Also one that changes biases or one layer alone, and one so small that hardly a value changes."""
    model = build("GPT2LMHeadModel", **TOKENS, **GPT2)
    found = {weights_digest(model)}
    for parameters in (model.parameters(), [model.transformer.h[1].attn.c_attn.bias], [model.transformer.wte.weight]):
        optimiser = torch.optim.SGD(parameters, lr=1e-4)
        model(PROMPTS[2][None], labels=PROMPTS[2][None]).loss.backward()
        optimiser.step()
        found.add(weights_digest(model))
    assert len(found) == 4


def test_a_dtype_changes_the_weights_digest():
    model = llama(dtype=torch.float32)
    assert (
        len({weights_digest(model), weights_digest(llama(dtype=torch.bfloat16)), weights_digest(model.double())}) == 3
    )


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # a second adapter
def test_a_switch_of_adapters_changes_the_weights_digest():
    model = with_two_adapters()
    found = {"two adapters": weights_digest(model)}
    for name, switch in SWITCHES.items():
        switch(model)
        found[name] = weights_digest(model)
    assert found["adapter b"] == found["two adapters"] and found["b again"] == found["b at three times its strength"]
    assert len({*found.values()}) == len(found) - 2
    assert weights_digest(with_two_adapters()) == found["two adapters"]


def test_the_digest_of_a_small_tensor_reads_every_value():
    model = torch.nn.Linear(341, 3, bias=False)
    found = {weights_digest(model)}
    for value in range(model.weight.numel()):
        model.weight.data.view(-1)[value] += 1
        found.add(weights_digest(model))
    assert len(found) == 1024


def test_the_digest_of_a_large_tensor_reads_every_column():
    """Its values are read at a distance that is no multiple of a row, so a change of one column in 64 is seen."""
    model = torch.nn.Linear(64, 4096, bias=False)
    before = weights_digest(model)
    for column in range(64):
        model.weight.data[:, column] += 1
        assert weights_digest(model) != before
        before = weights_digest(model)
