"""Medusa heads: laws by depth, lossless with every tree, and the layout of published checkpoints."""

import json
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import GATE, MATRIX, PROMPTS, llama, reference
from torch._subclasses import FakeTensorMode

import specdec
from specdec import Law, Sampling
from specdec.drafters import MedusaDrafter, MedusaHeads
from specdec.drafters.states_net import TargetParts
from specdec.models.states import Capture
from specdec.testing import exact_law, target_law
from specdec.training.features import TargetTexts
from specdec.training.self_distillation import continuations
from specdec.training.states import Comparison, acceptance
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)
PAIR = specdec.demo.load()
PAIR.target.requires_grad_(False)
LLAMA_TV = 1e-12  # float64 logits of one text differ by 1e-15 between batch shapes


def heads(count=3, blocks=1, hidden=32, vocab=None, dtype=torch.float64):
    made = MedusaHeads(count, blocks, hidden, vocab).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.data.normal_(0, 0.5, generator=generator)
    return made


def logits(made, hidden, lm_head):
    """[batch, head, vocab], for the target's states [batch, hidden]."""
    nothing: Any = None
    target = TargetParts(nothing, lm_head, hidden.dtype)
    return made.block(nothing, hidden, nothing, made.depth, target).logits


@pytest.mark.parametrize("name", GATE)
@pytest.mark.parametrize("tree", [Chain(3), Widths((3, 2, 1)), Dynamic(8, 3, 2)], ids=str)
def test_greedy_text_equals_transformers_generate(name, tree):
    model = GATE[name]()
    out = specdec.generate(model, PROMPTS, MedusaDrafter(heads(dtype=torch.float32), tree), max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [reference(model, p).tolist() for p in PROMPTS]


@pytest.mark.parametrize("tree", [Chain(2), Widths((2, 1)), Widths((2, 1), Law.IID), Dynamic(5, 2, 2)], ids=str)
def test_sampled_text_is_lossless(tree):
    model = llama(vocab_size=3, hidden_size=16, head_dim=4, eos_token_id=None, num_hidden_layers=2)
    options = {"sampling": Sampling(1.0), "max_new_tokens": 3, "stop_tokens": (2,)}
    law = exact_law(model, (0, 1, 0), MedusaDrafter(heads(2, hidden=16), tree), **options)
    assert float(law.total_variation(target_law(model, (0, 1, 0), **options))) <= LLAMA_TV


def published(folder, made, prefix, suffix):
    """Write heads as the authors' code does."""
    tensors = {}
    for i in range(made.depth):
        for j in range(len(made.weight)):
            tensors[f"{prefix}{i}.{j}.linear.weight"] = made.weight[j, i].detach().clone()
            tensors[f"{prefix}{i}.{j}.linear.bias"] = made.bias[j, i].detach().clone()
        tensors[f"{prefix}{i}.{len(made.weight)}.weight"] = made.lm_head[i].detach().clone()
    folder.mkdir()
    config = {"medusa_num_heads": made.depth, "medusa_num_layers": len(made.weight), "base_model_name_or_path": "x/y"}
    (folder / "config.json").write_text(json.dumps(config))
    if suffix == "pt":
        torch.save(tensors, folder / "medusa_lm_head.pt")
    else:
        save_file(tensors, folder / "medusa_lm_head.safetensors")


@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_published_checkpoints_load(tmp_path, prefix, suffix):
    made, hidden = heads(3, blocks=2, vocab=50), torch.randn(4, 32, dtype=torch.float64)
    published(tmp_path / "heads", made, prefix, suffix)
    found = logits(MedusaHeads.load(tmp_path / "heads"), hidden, None)
    for i in range(3):  # head by head, as in the paper
        x = hidden
        for j in range(2):
            x = x + torch.nn.functional.silu(x @ made.weight[j, i].T + made.bias[j, i])
        assert torch.allclose(found[:, i], x @ made.lm_head[i].T)


@pytest.mark.parametrize("vocab", [None, 50])
def test_heads_are_saved_and_loaded(tmp_path, vocab):
    made = heads(2, vocab=vocab)
    MedusaDrafter(made).save_pretrained(tmp_path / "heads")
    loaded = MedusaHeads.load(tmp_path / "heads")
    assert all(map(torch.equal, made.state_dict().values(), loaded.state_dict().values()))
    assert (loaded.lm_head is None) == (vocab is None)


def test_the_heads_see_the_state_before_the_root():
    model, made = llama(), heads(2)
    options = {"max_new_tokens": 12, "stop_tokens": (), "trace": "laws"}
    out = specdec.generate(model, PROMPTS[2], MedusaDrafter(made, Chain(2)), **options)
    assert len(out.trace.steps) > 3
    text, new = PROMPTS[2].tolist(), iter(out.tokens[0].tolist())
    for step in out.trace.steps:
        tokens = step.record.bare.tokens[0].tolist()
        with torch.inference_mode():
            hidden = model.model(torch.tensor([text[:-1]])).last_hidden_state[:, -1]
            expected = logits(made, hidden, model.lm_head).argmax(-1)[0].tolist()
        assert tokens[1:] == expected[: len(tokens) - 1]
        text += islice(new, step.emitted[0])


@pytest.mark.parametrize("kind", ["opt", "llama4_chunked"])  # one goes around its base model, the other names none
def test_heads_are_given_what_the_lm_head_reads(kind):
    model = MATRIX[kind](dtype=torch.float64)
    found = specdec.generate(model, PROMPTS[0], MedusaDrafter(heads(2), Chain(2)), max_new_tokens=8)
    assert torch.equal(found.tokens[0], reference(model, PROMPTS[0], max_new_tokens=8))


class Elsewhere(torch.nn.Linear):
    """An LM head whose logits are on another device."""

    def __init__(self):
        super().__init__(32, 50, bias=False)

    def forward(self, hidden):
        return torch.empty(*hidden.shape[:2], 50, device="cuda")


def test_states_and_an_lm_head_on_another_device_are_brought_to_the_heads():
    """As of a model that `device_map` lays over two devices: the embedding on one, the rest on another."""
    head = torch.nn.Identity()
    capture = Capture(SimpleNamespace(get_output_embeddings=lambda: head), (-1,), torch.device("meta"))
    with capture.of_pass(0):
        head(torch.zeros(1, 3, 32))
    assert (capture.states.shape, capture.states.device.type) == ((1, 3, 1, 32), "meta")
    with FakeTensorMode():  # tensors without numbers, on devices that need not be there
        found = logits(MedusaHeads(2, 1, 32), torch.empty(1, 32), Elsewhere())
    assert (found.shape, found.device.type) == ((1, 2, 50), "cpu")


def test_heads_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at most 2 tokens, not 3"):
        specdec.generate(llama(), PROMPTS, MedusaDrafter(heads(2), Chain(3)))
    with pytest.raises(ValueError, match="states of size 16"):
        specdec.generate(llama(), PROMPTS, MedusaDrafter(heads(2, hidden=16)))
    for temperature, vocab in ((0, 200), (1, 200), (0, 20)):
        with pytest.raises(ValueError, match=f"knows {vocab} tokens, the target knows 50"):
            drafter = MedusaDrafter(heads(2, vocab=vocab, dtype=torch.float32))
            specdec.generate(llama(), PROMPTS, drafter, sampling=Sampling(temperature), max_new_tokens=4)
    with pytest.raises(FileNotFoundError):
        MedusaDrafter.from_pretrained(tmp_path, llama())
    published(tmp_path / "heads", heads(2, vocab=50), "", "pt")
    (tmp_path / "heads" / "config.json").write_text('{"medusa_num_heads": 3, "medusa_num_layers": 1}')
    with pytest.raises(ValueError, match="No tensor"):
        MedusaDrafter.from_pretrained(tmp_path / "heads", llama())


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_draft_after_a_prompt_of_one_token_depends_on_no_other_text(engine):
    """No state comes before its root: neither a neighbour's padding nor what an earlier run has left may stand there."""
    model, drafter, alone = llama(eos_token_id=None), MedusaDrafter(heads(2), Widths((2, 1))), torch.tensor([9])
    options = {"sampling": Sampling(1.0), "max_new_tokens": 12}
    expected = specdec.generate(model, alone, drafter, **options).tokens[0]
    engine = specdec.Graphs() if engine == "graph" else engine
    for prompts in ([alone, torch.arange(30, 42)], [torch.tensor([8])], [alone]):
        found = specdec.generate(model, prompts, drafter, engine=engine, **options).tokens[0]
        assert torch.equal(found, expected) == (prompts[0] is alone)


def test_bundled_heads_are_trained():
    prompts = [torch.tensor(PAIR.tokenizer(prompt.text)["input_ids"][:60]) for prompt in PAIR.prompts[::4]]
    texts = [text for text in next(continuations(PAIR.target, prompts, new_tokens=48)) if len(text) == 108]

    def rates(heads):
        known = TargetTexts.read(PAIR.target, heads, torch.stack(texts), 60)
        return acceptance([Comparison(heads, PAIR.target, known, 4)])

    assert (rates(PAIR.heads) > torch.tensor([0.28, 0.22, 0.20, 0.19])).all()
    assert (rates(MedusaHeads(4, 1, 256)) < torch.tensor([0.20, 0.17, 0.15, 0.15])).all()


def test_bundled_heads_change_no_greedy_text():
    prompts = [torch.tensor(PAIR.tokenizer(prompt.text)["input_ids"]) for prompt in PAIR.prompts[::8]]
    out = specdec.generate(PAIR.target, prompts, MedusaDrafter(PAIR.heads), max_new_tokens=32)
    alone = specdec.generate(PAIR.target, prompts, max_new_tokens=32)
    assert [t.tolist() for t in out.tokens] == [t.tolist() for t in alone.tokens]
    assert out.summary()["acceptance_length"] > 1.2
