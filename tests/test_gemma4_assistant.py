"""Gemma 4's assistants: how transformers samples with them, and how specdec does."""

from contextlib import contextmanager
from fractions import Fraction
from unittest.mock import patch

import pytest
import torch
from tiny_models import llama
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

import specdec
from experiments.studies.gemma4_assistant import PROMPT, distance, generated_law, pair, sure
from specdec import Sampling
from specdec.drafters import Gemma4AssistantDrafter
from specdec.laws import Law
from specdec.testing import Tape, assert_drafter, exact_law, target_law
from specdec.testing.noting import Noting
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
          "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 8}  # fmt: skip
PROMPTS = [torch.tensor([0, 1, 0]), torch.tensor([5]), torch.arange(14) * 3 % 8]  # the last is longer than the window


@torch.no_grad()
def drafted(target, assistant, text, path=()):
    """[vocab]: the assistant's logits after a path of drafts below a text, by transformers' own passes over the whole text."""
    read = target(torch.tensor([text[:-1]]), output_hidden_states=True, return_shared_kv_states=True)
    state, place = read.hidden_states[-1][:, -1:], torch.tensor([[len(text) - 1]])
    for token in (text[-1], *path):
        embedded = target.get_input_embeddings()(torch.tensor([[token]]))
        options = {"position_ids": place, "shared_kv_states": dict(read.shared_kv_states)}
        out = assistant(inputs_embeds=torch.cat([embedded, state], -1), **options)
        state = out.last_hidden_state
    return out.logits[0, 0]


@contextmanager
def proposals(after=None):
    """Inside, a list of what transformers' generator proposes: each text, and the drafts and logits that it hands on.

    The first drafts follow the state of place `after`, the prompt's last; if it is None, of the place that transformers takes
    for it, which is the prompt's first in version 5.17.
    """
    found, propose = [], SinglePositionMultiTokenCandidateGenerator.get_candidates

    def noted(generator, text, **named):
        if after is not None and not found:
            named["n_last_matches"] = after
        tokens, logits = propose(generator, text, **named)
        if logits is not None:
            found.append((tuple(text[0].tolist()), tokens[0, text.shape[1] :].tolist(), logits[0]))
        return tokens, logits

    with patch.object(SinglePositionMultiTokenCandidateGenerator, "get_candidates", noted):
        yield found


def test_transformers_writes_each_draft_too_often_by_just_what_its_acceptance_test_leaves_out():
    target, assistant = pair(4, seed=0)
    right = target_law(target, PROMPT, max_new_tokens=3)
    with proposals() as found:
        law, _ = generated_law(target, assistant, new_tokens=3)
    handed_on = {text[-1]: (drafts, logits) for text, drafts, logits in found}
    expected = 0.0
    for first, ([draft], logits) in handed_on.items():  # the first token is drawn without a draft, and the third
        share = sum(p for text, p in right.items() if text[0] == first)
        ends = [sum(p for text, p in right.items() if text[:2] == (first, i)) for i in range(4)]
        p, q = torch.tensor([float(end / share) for end in ends]), logits[0].softmax(-1)
        rest = (p - q).clamp(min=0)
        accepted = min(1.0, float(p[draft] / q[draft]))
        written = accepted * torch.eye(4)[draft] + (1 - accepted) * rest / rest.sum()
        assert int(q.argmax()) == draft and written[draft] > p[draft] + 0.05
        often = sum(p for text, p in law.items() if text[:2] == (first, draft))
        assert float(often / share) == pytest.approx(float(written[draft]), abs=1e-6)
        expected += float(share) * float((written - p).abs().sum()) / 2
    assert distance(law, right) == pytest.approx(expected, abs=1e-6)
    assert len(handed_on) == 4 and expected > 0.5


def test_transformers_is_lossless_with_an_assistant_that_reports_the_law_of_its_drafts():
    target, assistant = pair(4, seed=0)
    with sure(assistant):
        law, _ = generated_law(target, assistant, new_tokens=3)
    assert sum(law.values()) == pytest.approx(1)
    assert distance(law, target_law(target, PROMPT, max_new_tokens=3)) < 1e-6  # it compares in float32


def test_the_drafter_keeps_its_contract_along_trees():
    target, assistant = pair(4, seed=0)
    drafter = Gemma4AssistantDrafter(assistant, Widths((2, 1)))
    assert_drafter(drafter, target, [PROMPT, (2,)], horizon=8, max_new_tokens=2)


def test_the_law_of_chains_is_the_targets():
    target, assistant = pair(4, seed=1)
    options = {"sampling": Sampling(0.7), "max_new_tokens": 3}
    law = exact_law(target, PROMPT, Gemma4AssistantDrafter(assistant, Chain(2)), **options)
    assert law.total_variation(target_law(target, PROMPT, **options)) <= Fraction(1, 10**12)
    assert law.expected_tokens > 1.2


@pytest.mark.parametrize("changes", [{}, SHARED], ids=["own layers", "shared layers"])
def test_every_node_is_drafted_by_the_law_of_transformers_passes(changes):
    target, assistant = pair(8, seed=2, **changes)
    noting = Noting(Gemma4AssistantDrafter(assistant, Widths((2, 1, 1))))
    options = {"max_new_tokens": 12, "stop_tokens": (), "batch_size": 2}
    specdec.generate(target, PROMPTS, noting, sampling=Sampling(0.8), **options)
    compared = 0
    for draft in noting.drafts:
        drawn = draft.probs is not None and len(draft.text) > 1
        for node, found in enumerate(draft.probs if drawn else ()):
            if draft.laws[node] not in (Law.PADDING, Law.POINT):
                logits = drafted(target, assistant, draft.text, draft.path(node))
                torch.testing.assert_close(found, (logits / 0.8).softmax(-1).to(found), atol=1e-9, rtol=0)
                compared += 1
    assert compared > 40


@pytest.mark.parametrize("prompt", PROMPTS[::2], ids=len)
def test_greedy_drafts_are_those_of_transformers_own_generator(prompt):
    target, assistant = pair(8, seed=3)
    with proposals(after=len(prompt) - 1) as found:
        target.generate(prompt[None], assistant_model=assistant, do_sample=False, max_new_tokens=5)
    text, drafts, _ = found[0]  # the first after the prompt; later ones also see keys of rejected drafts
    noting = Noting(Gemma4AssistantDrafter(assistant, Chain(3)))
    specdec.generate(target, torch.tensor(text), noting, max_new_tokens=4, stop_tokens=())
    assert noting.drafts[0].tokens[1:] == drafts and len(drafts) == 3


@pytest.mark.parametrize("engine", ["eager", specdec.Graphs(capture=Tape)], ids=["eager", "captured"])
def test_texts_are_those_of_the_target_whatever_the_batch(engine):
    target, assistant = pair(8, seed=2, **SHARED)
    drafter = Gemma4AssistantDrafter(assistant, Widths((2, 1)))
    out = specdec.generate(target, PROMPTS, drafter, max_new_tokens=12, stop_tokens=(), engine=engine)
    for prompt, text in zip(PROMPTS, out.tokens, strict=True):
        assert torch.equal(text, target.generate(prompt[None], do_sample=False, max_new_tokens=12)[0, len(prompt) :])


def test_only_tokens_of_the_clusters_that_are_looked_at_are_drafted():
    clusters = {"use_ordered_embeddings": True, "num_centroids": 4, "centroid_intermediate_top_k": 2}
    target, assistant = pair(8, seed=2, clusters=clusters)
    assistant.masked_embedding.token_ordering.copy_(torch.tensor([3, 5, 0, 1, 7, 2, 6, 4]))
    noting = Noting(Gemma4AssistantDrafter(assistant, Chain(2)))
    specdec.generate(target, PROMPTS[0], noting, sampling=Sampling(1.0), max_new_tokens=6, stop_tokens=())
    drafts = [draft for draft in noting.drafts if draft.probs is not None]
    assert len(drafts) > 1
    for draft in drafts:
        theirs = drafted(target, assistant, draft.text)
        kept = theirs.topk(4).indices
        expected = torch.full((8,), -torch.inf, dtype=torch.float64).index_copy_(0, kept, theirs[kept]).softmax(-1)
        torch.testing.assert_close(draft.probs[0], expected.to(draft.probs), atol=1e-9, rtol=0)


def test_other_targets_are_refused():
    assistant = pair(50, seed=0)[1]
    refused = {
        r"reads states of size 16, the target's have 32": llama(),
        r"last full_attention and the last sliding_attention layer .*LlamaForCausalLM has none": llama(hidden_size=16),
        r"1 heads of size 8 in full_attention layers, the target's have 1 of size 16": pair(50, 0, global_head_dim=16)[
            0
        ],
    }
    for match, target in refused.items():
        with pytest.raises(ValueError, match=match):
            specdec.generate(target, PROMPTS[0], Gemma4AssistantDrafter(assistant), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"Gemma4AssistantForCausalLM\.from_pretrained"):
        Gemma4AssistantDrafter(llama())
