"""Training Medusa heads: laws stand where heads are to predict them, heads learn, and the demo target's are bundled."""

import pytest
import torch
from tiny_models import MATRIX, llama

import specdec
from specdec.drafters import MedusaDrafter, MedusaHeads
from specdec.training.medusa import States, acceptance_by_head, medusa_loss
from specdec.training.self_distillation import continuations

torch.set_num_threads(1)
BATCHING = 1e-12  # float64: logits of one text differ by 1e-15 between batch shapes
TEXTS = [torch.arange(3, 20), torch.arange(5, 31), torch.tensor([9, 8, 7, 9, 8, 7, 30, 31, 32, 33, 34])]
HEADS, WINDOW, PROMPT = 3, 2, 4
PAIR = specdec.demo.load()
UNTRAINED, TRAINED = (0.20, 0.17, 0.15, 0.15), (0.28, 0.22, 0.20, 0.19)  # most and least acceptance by head


def tiny_states(model):
    return States(model, TEXTS, PROMPT, HEADS, WINDOW)


def test_laws_are_the_targets_own_of_the_tokens_that_heads_predict():
    model = llama()
    states = tiny_states(model)
    at, found = states.places(states.starts), []
    for text in TEXTS:
        hidden = model.model(text[None]).last_hidden_state[0]
        laws = model(text[None]).logits[0].log_softmax(-1)
        last = len(text) - 1 - HEADS - WINDOW  # of the places where windows begin: what follows is the target's too
        for start in range(PROMPT - 1, last + 1):
            found += [(hidden[t], laws[t + 1 : t + 1 + HEADS]) for t in range(start, start + WINDOW)]
    assert len(found) == len(at.hidden) == WINDOW * len(states.starts)
    assert torch.allclose(torch.stack([h for h, _ in found]), at.hidden, rtol=0, atol=BATCHING)
    assert torch.allclose(torch.stack([law for _, law in found]), at.laws.double(), rtol=0, atol=1e-5)  # kept in float32


def test_heads_learn_to_be_accepted():
    model, heads = llama(), MedusaHeads(HEADS, 1, 32).double()
    model.lm_head.weight.data *= 10  # far from uniform laws
    states = tiny_states(model)
    before = acceptance_by_head(heads, states, states.starts)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.01, weight_decay=0)
    for _ in range(30):
        loss = medusa_loss(heads, states, states.starts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = acceptance_by_head(heads, states, states.starts)
    assert all(b > a + 0.1 for a, b in zip(before, after, strict=True))
    assert states.lm_head.weight.grad is None


def test_targets_whose_laws_are_not_those_of_the_lm_head_are_refused():
    with pytest.raises(ValueError, match="scales or caps its logits"):
        tiny_states(MATRIX["cohere2_sliding"]())
    with pytest.raises(ValueError, match="windows of 20 and 3 heads"):
        States(llama(), TEXTS[:1], PROMPT, HEADS, 20)


@pytest.fixture(scope="module")
def own():
    """States of the demo target over what it makes of the demo prompts, which nothing was trained on."""
    prompts = [torch.tensor(PAIR.tokenizer(prompt.text)["input_ids"][:60]) for prompt in PAIR.prompts[::4]]
    texts = next(continuations(PAIR.target, prompts, new_tokens=48))
    return States(PAIR.target, texts, 60, len(PAIR.heads), 4)


def test_bundled_heads_are_trained(own):
    trained = acceptance_by_head(PAIR.heads, own, own.starts[::4])
    untrained = acceptance_by_head(MedusaHeads(4, 1, 256), own, own.starts[::4])
    assert all(rate > floor for rate, floor in zip(trained, TRAINED, strict=True)), trained
    assert all(rate < most for rate, most in zip(untrained, UNTRAINED, strict=True)), untrained


def test_bundled_heads_change_no_greedy_text():
    prompts = [torch.tensor(PAIR.tokenizer(prompt.text)["input_ids"]) for prompt in PAIR.prompts[::32]]
    out = specdec.generate(PAIR.target, prompts, MedusaDrafter(PAIR.heads), max_new_tokens=24)
    alone = specdec.generate(PAIR.target, prompts, max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [t.tolist() for t in alone.tokens]
    assert out.summary()["acceptance_length"] > 1.2
