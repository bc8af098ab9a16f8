"""Networks on the target's states: one pass after each step keeps up with the text, whoever wrote it and however it came."""

import gc

import pytest
import torch
from captured import eagle
from tiny_models import PROMPTS, llama, reference

import specdec
from certificates.cases import llama as four_tokens
from specdec import Sampling
from specdec.drafters import Eagle3Drafter, Eagle3Net, Fallback, MedusaDrafter, MedusaHeads, Paused, SuffixDrafter
from specdec.drafters.balance import Balance
from specdec.drafters.states_drafter import StatesRun
from specdec.models.cache import TreeCache
from specdec.testing import assert_drafter, exact_law, target_law
from specdec.theory import CostCurve
from specdec.trees import Chain, Dynamic, Widths

torch.set_num_threads(1)
TARGET = llama(dtype=torch.float64)


def network(**options):
    """A float64 network for a target of four tokens, whose laws are far from uniform."""
    config = four_tokens(seed=0, layers=1).config
    torch.manual_seed(1)
    net = Eagle3Net(config, (1, 2, 3), 16, **options).double().eval()
    for parameter in net.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return net


def drafter(tree=None):
    return Eagle3Drafter(eagle().double(), tree or Widths((2, 2)))


@pytest.mark.parametrize("tree", [Chain(2), Widths((2, 1))], ids=str)
def test_eagle3_keeps_the_contract_of_a_drafter(tree):
    assert_drafter(Eagle3Drafter(network(vocab=4), tree), four_tokens(seed=0, layers=4), [(0, 1, 0), (2,)], horizon=8)


def test_a_reduced_vocabulary_changes_no_law():
    net = network(vocab=2)
    net.target_ids = torch.tensor([1, 3])
    target, options = four_tokens(seed=0, layers=4), {"sampling": Sampling(0.7), "max_new_tokens": 3}
    law = exact_law(target, (0, 1), Eagle3Drafter(net, Dynamic(5, 2, 2)), **options)
    assert law.expected_tokens > 1.1
    assert law.total_variation(target_law(target, (0, 1), **options)) <= 1e-12


def shifted(run, states, start, count):
    """Reads each state beside the token of its own place, not the next."""
    READ(run, states.roll(1, 1), start, count)


def stale(run, states, start, count):
    """Keeps the features of drafts in the cache, where the target's states should take their places."""
    READ(run, states, start, count.clamp(max=1) if states.shape[1] <= run._nodes else count)


def of_the_wrong_layer(run, states, start, count):
    READ(run, states.flip(2), start, count)


READ = StatesRun.read


@pytest.mark.parametrize("planted", [shifted, stale, of_the_wrong_layer], ids=lambda f: f.__name__)
def test_what_is_read_wrongly_is_found(monkeypatch, planted):
    monkeypatch.setattr(StatesRun, "read", planted)
    options = {"samplings": (Sampling(1.0),), "max_new_tokens": 1, "horizon": 8}
    with pytest.raises(AssertionError, match=r"by a law that is|afresh"):
        assert_drafter(Eagle3Drafter(network(), Chain(2)), four_tokens(seed=0, layers=4), [(0, 1, 0), (2,)], **options)


def test_texts_are_those_of_the_target_whatever_the_batch():
    for batch_size in (None, 2, 8):
        out = specdec.generate(TARGET, PROMPTS, drafter(), max_new_tokens=12, batch_size=batch_size, stop_tokens=())
        for prompt, text in zip(PROMPTS, out.tokens, strict=True):
            assert torch.equal(text, reference(TARGET, prompt, max_new_tokens=12))


def test_a_conversation_goes_on_from_what_was_read(monkeypatch):
    told = []

    def noting(run, states, start, count):
        told.append(int(count.sum()))
        READ(run, states, start, count)

    monkeypatch.setattr(StatesRun, "read", noting)
    options, one = {"max_new_tokens": 8, "stop_tokens": (), "sampling": Sampling(0.8)}, drafter()
    first = specdec.generate(TARGET, PROMPTS[0], one, keep=True, **options)
    whole = torch.cat([PROMPTS[0], first.tokens[0], torch.tensor([3, 4, 5])])
    told.clear()
    on = specdec.generate(TARGET, whole, one, resume=first, **options)
    resumed = sum(told)
    told.clear()
    anew = specdec.generate(TARGET, whole, one, **options)
    assert torch.equal(on.tokens[0], anew.tokens[0])
    assert sum(told) - resumed >= len(PROMPTS[0]) - 1  # positions that were not read again


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda d: Paused(d, 0.5, 0.4, CostCurve((1, 7), (1.0, 2.5))),
        lambda d: Fallback(SuffixDrafter(), d),
        lambda d: Fallback(d, MedusaDrafter(MedusaHeads(2, 1, 32).double(), Chain(2))),
    ],
    ids=["paused", "second choice", "first choice"],
)
def test_it_keeps_up_in_steps_that_it_does_not_draft_for(wrapped):
    out = specdec.generate(TARGET, PROMPTS, wrapped(drafter()), max_new_tokens=12, stop_tokens=(), batch_size=2)
    for prompt, text in zip(PROMPTS, out.tokens, strict=True):
        assert torch.equal(text, reference(TARGET, prompt, max_new_tokens=12))


def test_networks_for_other_targets_are_refused():
    with pytest.raises(ValueError, match="reads states of size 16, the target's have 32"):
        specdec.generate(
            llama(dtype=torch.float64, num_hidden_layers=4), PROMPTS[0], Eagle3Drafter(network()), max_new_tokens=2
        )
    net = eagle().double()
    net.vocab, net.target_ids = 2, torch.tensor([0, 50])
    with pytest.raises(ValueError, match="drafts tokens 0 to 50, the target knows 50"):
        specdec.generate(TARGET, PROMPTS[0], Eagle3Drafter(net), max_new_tokens=2)
    net.vocab, net.target_ids, net.states = None, None, (0, 7)
    with pytest.raises(ValueError, match="states=7"):
        specdec.generate(TARGET, PROMPTS[0], Eagle3Drafter(net), max_new_tokens=2)


def test_norms_of_keys_run_under_autocast():
    net = network(head_norms=True, vocab=4).float()
    target = four_tokens(seed=0, layers=4).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = specdec.generate(target, [0, 1, 0], Eagle3Drafter(net, Widths((2, 1))), max_new_tokens=8, stop_tokens=())
        plain = specdec.generate(target, [0, 1, 0], max_new_tokens=8, stop_tokens=())
    assert torch.equal(out.tokens[0], plain.tokens[0])


def test_a_network_that_gives_nan_is_reported():
    net = network(vocab=4)
    net.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="cannot have been drawn as they say"):
        options = {"sampling": Sampling(1.0), "max_new_tokens": 8}
        specdec.generate(four_tokens(seed=0, layers=4), [0, 1, 0], Eagle3Drafter(net, Chain(2)), **options)


@pytest.mark.parametrize(
    "one",
    [lambda: Fallback(SuffixDrafter(), drafter()), lambda: MedusaDrafter(MedusaHeads(2, 1, 32).double(), Chain(2))],
    ids=["beside a drafter from text", "medusa"],
)
def test_turns_of_a_conversation_read_and_keep_no_more_than_is_new(monkeypatch, one):
    told, one, text, last = [], one(), PROMPTS[0], None

    def noting(run, states, start, count):
        told.append(int(count.sum()))
        READ(run, states, start, count)

    monkeypatch.setattr(StatesRun, "read", noting)
    gc.collect()
    before = sum(type(thing) is TreeCache for thing in gc.get_objects())
    for _ in range(4):
        told.clear()
        last = specdec.generate(TARGET, text, one, resume=last, keep=True, max_new_tokens=6, stop_tokens=())
        text = torch.cat([text, last.tokens[0], torch.tensor([3])])
    assert sum(told) <= 12  # its six tokens, the one that was said, and what is read again
    gc.collect()
    now = sum(type(thing) is TreeCache for thing in gc.get_objects())
    assert now <= before + 4  # of the target and of the drafts, of two turns


def test_a_pause_survives_trees_of_a_root_alone():
    two = [PROMPTS[0], PROMPTS[0][:5]]
    out = specdec.generate(TARGET, two, Paused(drafter()), max_new_tokens=12, batch_size=1, stop_tokens=())
    for prompt, text in zip(two, out.tokens, strict=True):
        assert torch.equal(text, reference(TARGET, prompt, max_new_tokens=12))
    balance = Balance(1.0, 0.01)
    for nodes, seconds in ((0, 1.0), (1, 1.2), (5, 1.5), (1, 1.2)):
        balance.see(nodes, 1, seconds)
    assert balance.loss(5) == pytest.approx(0.5)
