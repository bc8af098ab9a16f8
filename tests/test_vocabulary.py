"""Draft models with another tokenizer: what is shared is drafted, and the law of the text stays the target's."""

import pytest
import torch
from small_drafters import editing
from tiny_models import PROMPTS, llama, reference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import specdec
from specdec import Law, Sampling
from specdec.drafters import ModelDrafter
from specdec.drafters.vocabulary import TranslatedModel
from specdec.testing import assert_drafter, exact_law, target_law
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)
LLAMA_TV = 1e-12  # float64 logits of one text differ by 1e-15 between batch shapes
PROMPT = (0, 1, 0)
TINY = {"eos_token_id": None, "hidden_size": 16, "head_dim": 4, "num_hidden_layers": 2}


def words(*tokens):
    """A tokenizer with these tokens, of which it reads one at a time."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])))


TARGET_WORDS, DRAFT_WORDS = words("a", "b", "c", "d"), words("x", "c", "y", "a", "z")  # b and d are the target's alone


class Foreign(ModelDrafter):
    """A draft model and both tokenizers: for runs that are given token ids."""

    def __init__(self, model, tree, target_tokenizer=TARGET_WORDS, tokenizer=DRAFT_WORDS):
        super().__init__(model, tree, tokenizer)
        self.target_tokenizer = target_tokenizer

    def start(self, target, batch, last=None):
        batch.tokenizer = self.target_tokenizer
        return super().start(target, batch, last)


def pair():
    return llama(vocab_size=4, **TINY), llama(1, vocab_size=5, **TINY)


TREES = [Chain(2), Widths((2, 1), Law.IID), Widths((2, 1), Law.WITHOUT_REPLACEMENT), Widths((2, 1)), Dynamic(5, 2, 2)]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_foreign_draft_is_lossless(tree):
    target, draft = pair()
    options = {"sampling": Sampling(1.0), "max_new_tokens": 3, "stop_tokens": (2,)}
    law = exact_law(target, PROMPT, Foreign(draft, tree), **options)
    assert float(law.total_variation(target_law(target, PROMPT, **options))) <= LLAMA_TV


def test_a_foreign_draft_keeps_the_contract_of_a_drafter():
    target, draft = pair()
    assert_drafter(
        Foreign(draft, Widths((2, 1))), target, [PROMPT, (3, 1, 2, 2, 0)], samplings=[Sampling(0.7, top_k=2)]
    )


def test_planted_bugs_change_the_law():
    """The law that is recorded must be the one drawn from: of the shared tokens alone, in the target's ids."""
    target, draft = pair()
    options = {"sampling": Sampling(1.0), "max_new_tokens": 2}
    truth = target_law(target, PROMPT, **options)

    def with_law(change):
        class Wrong(Foreign):
            def start(self, target, batch, last=None):
                run = super().start(target, batch)
                return editing(run, lambda tree: tree if tree.draft_probs is None else change(tree))

        return float(exact_law(target, PROMPT, Wrong(draft, Chain(1)), **options).total_variation(truth))

    def unrestricted(tree):  # the mass of the other tokens is still in the law
        tree.draft_probs.add_(torch.tensor([0.0, 0.2, 0.0, 0.2])).div_(1.4)
        return tree

    def mismapped(tree):  # the laws of the two shared tokens exchanged
        tree.draft_probs.copy_(tree.draft_probs[..., [2, 1, 0, 3]])
        return tree

    assert with_law(lambda tree: tree) <= LLAMA_TV
    assert with_law(unrestricted) > 1e-3
    assert with_law(mismapped) > 1e-3


def permuted(model, tokens):
    """The same model with token tokens[i] as token i; -1: one that the model does not have, with weights of its token 0."""
    draft = llama(vocab_size=len(tokens), dtype=model.dtype)
    weights = {name: value for name, value in model.state_dict().items() if len(value) != len(model.lm_head.weight)}
    draft.load_state_dict(weights, strict=False)
    for mine, its in zip(
        (draft.lm_head, draft.model.embed_tokens), (model.lm_head, model.model.embed_tokens), strict=True
    ):
        mine.weight.data[:] = its.weight.data[torch.tensor(tokens).clamp(min=0)]
    return draft


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_model_with_other_ids_drafts_what_the_target_writes(temperature):
    target, order = llama(eos_token_id=None), torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    names = [f"w{i}" for i in range(50)]
    draft = permuted(target, [*order, -1])
    drafter = Foreign(draft, Chain(3), words(*names), words(*(names[i] for i in order), "extra"))
    out = specdec.generate(target, PROMPTS, drafter, sampling=Sampling(temperature), max_new_tokens=12, stop_tokens=())
    assert out.summary()["acceptance_length"] == 4


LINES = [
    "the cat sat on the mat and the dog sat on the log",
    "a dog and a cat went to the theatre",
    "où est le théâtre ?",
]


def byte_level(size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece(size):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


REAL = {"more byte-level": (byte_level(300), byte_level(280)), "sentencepiece drafts": (byte_level(300), sentencepiece(310)),
        "sentencepiece target": (sentencepiece(310), byte_level(300))}  # fmt: skip


@pytest.mark.parametrize("case", REAL)
def test_tokens_are_the_same_when_their_text_is(case):
    target_tokenizer, draft_tokenizer = REAL[case]
    sizes = len(target_tokenizer), len(draft_tokenizer)
    translated = TranslatedModel(llama(vocab_size=sizes[1]), sizes[0], target_tokenizer, draft_tokenizer)
    reads, shared = translated._ids.tolist(), (~translated._unshared).tolist()
    assert reads[target_tokenizer.eos_token_id] == draft_tokenizer.eos_token_id
    text = " the cat and the dog"
    ids = target_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sum(shared[i] for i in ids) >= len(ids) - 1
    assert draft_tokenizer.decode([reads[i] for i in ids]).strip() == text.strip()


@pytest.mark.parametrize(
    ("case", "tree"), list(zip(REAL, [Chain(3), Widths((3, 2)), Dynamic(6, 2, 3)], strict=True)), ids=str
)
def test_real_tokenizers_draft_for_each_other(case, tree):
    target_tokenizer, draft_tokenizer = REAL[case]
    target = llama(vocab_size=len(target_tokenizer), eos_token_id=target_tokenizer.eos_token_id)
    drafter = ModelDrafter(llama(1, vocab_size=len(draft_tokenizer)), tree, tokenizer=draft_tokenizer)
    texts, options = ["the cat", "où", "a dog went on and on"], {"tokenizer": target_tokenizer, "max_new_tokens": 16}
    out = specdec.generate(target, texts, drafter, **options)
    prompts = [torch.tensor(target_tokenizer(text)["input_ids"]) for text in texts]
    assert [t.tolist() for t in out.tokens] == [reference(target, p, max_new_tokens=16).tolist() for p in prompts]
    sampled = specdec.generate(target, texts, drafter, sampling=Sampling(1.0, top_p=0.9), **options)
    assert all(len(tokens) for tokens in sampled.tokens)


def test_pairs_that_share_too_little_are_refused():
    target, few = llama(eos_token_id=None), words(*(f"w{i}" for i in range(50)))
    drafter = Foreign(llama(1), Chain(2), few, words("w1", "w2", *(f"v{i}" for i in range(48))))
    with pytest.raises(ValueError, match=r"2 of the target's 50 tokens \(4.0%\); at least 5%"):
        specdec.generate(target, PROMPTS, drafter, max_new_tokens=4)


@pytest.mark.parametrize("missing", ["target", "draft"])
def test_a_missing_tokenizer_is_asked_for(missing):
    drafter = ModelDrafter(llama(vocab_size=40), tokenizer=None if missing == "draft" else DRAFT_WORDS)
    with pytest.raises(ValueError, match=r"ModelDrafter\(tokenizer=...\) and generate\(tokenizer=...\)"):
        specdec.generate(llama(), PROMPTS, drafter, tokenizer=None if missing == "target" else TARGET_WORDS)
