"""What TRL's trainer gets for its prompts: texts, and the log-probabilities that they were drawn with."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

import specdec
from specdec.adapters.trl import rollouts
from specdec.drafters import NgramDrafter

torch.set_num_threads(1)
PAIR = specdec.demo.load()
TEXTS = [prompt.text for prompt in PAIR.prompts[:2]]
TWICE = [text for text in TEXTS for _ in range(2)]  # as the trainer repeats them: two generations of each


def trainer(model, **law):
    """What the rollout reads of a trainer."""
    config = GenerationConfig(do_sample=True, max_new_tokens=12, top_k=0, **law)
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    return SimpleNamespace(
        model=model,
        accelerator=accelerator,
        processing_class=PAIR.tokenizer,
        generation_config=config,
        max_completion_length=12,
        tools=[],
        chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ mark }}{% endfor %}",
        chat_template_kwargs={"mark": "!"},
    )


def forced(model, prompt, new, temperature):
    """Log-probabilities of `new` after `prompt` by one forward pass."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0].tolist()


def test_each_prompt_gets_a_text_and_the_log_probabilities_of_its_tokens():
    model = copy.deepcopy(PAIR.target).train()
    torch.manual_seed(0)
    out = rollouts(NgramDrafter(), batch_size=3)(TWICE, trainer(model, temperature=0.7))
    assert model.training and out["prompt_ids"] == PAIR.tokenizer(TWICE)["input_ids"]
    assert len({tuple(text) for text in out["completion_ids"]}) == 4
    model.eval()
    for prompt, new, found in zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True):
        assert 0 < len(new) <= 12 and found == pytest.approx(forced(model, prompt, new, 0.7), abs=1e-4)


def test_texts_follow_from_the_random_state_of_torch_and_differ_from_call_to_call():
    roll, asking = rollouts(), trainer(PAIR.target, temperature=1.0)
    torch.manual_seed(0)
    first, second = (roll(TEXTS, asking)["completion_ids"] for _ in range(2))
    torch.manual_seed(0)
    assert roll(TEXTS, asking)["completion_ids"] == first != second


def test_messages_are_read_in_the_template_of_the_trainer():
    out = rollouts()([[{"role": "user", "content": "hello"}]], trainer(PAIR.target))
    assert PAIR.tokenizer.decode(out["prompt_ids"][0]) == "[user] hello!"


def test_the_model_goes_on_training_after_prompts_that_are_refused():
    model = copy.deepcopy(PAIR.target).train()
    with pytest.raises(ValueError, match="exceed the target's context"):
        rollouts()(["word " * 5000], trainer(model))
    assert model.training


@pytest.mark.filterwarnings("ignore")
def test_trl_itself_trains_on_rollouts(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer, seen = copy.deepcopy(PAIR.target), copy.deepcopy(PAIR.tokenizer), []
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    before = [weight.detach().clone() for weight in model.parameters()]
    roll = rollouts(NgramDrafter(), batch_size=4)

    def noting(prompts, trainer):
        model.eval()
        seen.append((roll(prompts, trainer), prompts))
        out = seen[-1][0]
        for prompt, new, found in zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True):
            assert found == pytest.approx(forced(model, prompt, new, 0.9), abs=1e-4)  # with the weights of now
        model.train()
        return out

    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=8, temperature=0.9,
        max_steps=2, learning_rate=1e-3, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    reward = lambda completions, **_: [float(text.count("e")) for text in completions]  # noqa: E731
    training = GRPOTrainer(
        model,
        reward,
        args,
        Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
        rollout_func=noting,
    )
    training.train()
    assert [len(prompts) for _, prompts in seen] == [4, 4]
    assert all(len({*prompts}) == 1 and len(set(map(str, out["completion_ids"]))) > 1 for out, prompts in seen)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_every_module_is_left_in_its_mode_and_what_changes_the_texts_asked_for_is_refused():
    model = copy.deepcopy(PAIR.target).train()
    model.model.layers[0].eval()
    rollouts()(TEXTS, trainer(model, temperature=1.0))
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    with pytest.raises(ValueError, match=r"\['journal', 'num_samples'\]: the trainer wants one new completion"):
        rollouts(num_samples=2, journal="run.jsonl")
