"""A real model: SmolLM2-135M-Instruct writes the same greedy text with drafts as `model.generate` does without.

`make test-smollm2` downloads the model, 93 MB, and runs this file; nothing else needs it.
"""

import os
import shutil
import subprocess
import sys
from tempfile import TemporaryDirectory

import nbformat
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from test_conf import CONF
from tiny_models import padded, reference

import specdec
from experiments.bench.inputs import in_turns
from experiments.bench.prompts import Prompt
from specdec import Sampling
from specdec.cache_folder import cache_folder
from specdec.demo import smollm2
from specdec.drafters import NgramDrafter, SuffixDrafter

pytestmark = pytest.mark.smollm2
torch.set_num_threads(1)
NEW = 24
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
CAPITAL = "What is the capital of France?"
CHATS = [
    [{"role": "user", "content": CAPITAL}],
    [{"role": "user", "content": "Repeat this three times: the cat sat on the mat, and the dog sat on the cat."}],
    [
        {"role": "user", "content": "How many legs has a spider?"},
        {"role": "assistant", "content": "A spider has 8 legs."},
        {"role": "user", "content": "And two spiders?"},
    ],
]
TEXTS = [
    "def total(numbers):\n    result = 0\n    for number in numbers:\n",
    "One, two, three, four, one, two, three, four,",
]
DRAFTERS = [NgramDrafter(), SuffixDrafter()]


@pytest.fixture(scope="module")
def model():
    return smollm2.load()


@pytest.fixture(scope="module")
def prompts(model):
    """Token ids: chats in transformers' own rendering, and texts."""
    chats = [model.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in CHATS]
    return [torch.tensor(ids) for ids in [*chats, *(model.tokenizer(text)["input_ids"] for text in TEXTS)]]


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [reference(model.target, prompt, max_new_tokens=NEW).tolist() for prompt in prompts]


def test_converting_takes_less_than_two_gigabytes_of_memory(model):
    code = "import resource, specdec; specdec.demo.smollm2.folder(); print(resource.getrusage(0).ru_maxrss)"  # KiB
    with TemporaryDirectory() as cache:  # not tmp_path, which would keep half a gigabyte
        shutil.copy(cache_folder() / smollm2.WHEEL, cache)
        variables = {**os.environ, "SPECDEC_CACHE": cache}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * 10**9 / 1024


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda drafter: type(drafter).__name__)
def test_chats_and_texts_together_get_the_text_of_generate(drafter, model, expected):
    options = {"tokenizer": model.tokenizer, "max_new_tokens": NEW}
    out = specdec.generate(model.target, [*CHATS, *TEXTS], drafter, **options)
    assert [row.tolist() for row in out.tokens] == expected
    assert out.summary()["acceptance_length"] > 1.2


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda drafter: type(drafter).__name__)
def test_each_prompt_alone_gets_the_text_of_generate(drafter, model, prompts, expected):
    for prompt, text in zip(prompts, expected, strict=True):
        assert specdec.generate(model.target, prompt, drafter, max_new_tokens=NEW).tokens[0].tolist() == text


def test_padded_batch_in_transformers_own_call_gets_its_own_text(model, prompts):
    call = {**padded(prompts), "max_new_tokens": NEW, "do_sample": False}
    method = specdec.custom_generate(SuffixDrafter())
    assert torch.equal(model.target.generate(**call, custom_generate=method), model.target.generate(**call))


def test_chat_template_is_applied_once(model, prompts):
    rendered = model.tokenizer.decode(prompts[0])
    assert rendered == f"{SYSTEM}<|im_start|>user\n{CAPITAL}<|im_end|>\n<|im_start|>assistant\n"
    [(asked, _)] = in_turns([Prompt("chat", [CAPITAL], chat=True)], model, Sampling(), NEW)
    assert torch.equal(asked, prompts[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experiments_load_it_in_one_word_and_it_knows_the_capital_of_france(dtype):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        models = instantiate(compose("benchmark", ["target=smollm2", f"dtype={dtype}"]).target)
    assert {weight.dtype for weight in models.target.parameters()} == {getattr(torch, dtype)}
    out = specdec.generate(models.target, CHATS[0], SuffixDrafter(), tokenizer=models.tokenizer, max_new_tokens=NEW)
    assert "Paris" in out.text[0]


def test_text_beyond_its_context_is_refused_with_the_limit(model):
    with pytest.raises(ValueError, match=r"8192; set max_new_tokens to at most 12|at most 12"):
        specdec.generate(model.target, torch.ones(8180, dtype=torch.int64), max_new_tokens=13)


def test_quickstart_shows_this_model_and_a_tree_of_which_a_path_was_accepted():
    cells = nbformat.read(CONF.parent / "notebooks" / "1_quickstart.ipynb", as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    shown = next(i for i, source in enumerate(sources) if "longest = " in source)
    scope: dict = {}
    for source in sources[: shown + 1]:
        exec(source, scope)
    assert scope["chat"].target.config.vocab_size == 49152
    assert "class Stack" in scope["answer"].text[0]
    assert scope["longest"].emitted[0] >= 5
