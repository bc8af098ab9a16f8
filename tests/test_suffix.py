"""Drafting from the text itself: the automaton counts right, trees hold what followed, and the text is the target's."""

import random
import re

import pytest
import torch
from tiny_models import PROMPTS, llama, reference

import specdec
from specdec import Law, Sampling
from specdec.drafters import NgramDrafter, SuffixDrafter
from specdec.drafters.suffix import SuffixAutomaton
from specdec.testing import TabularTarget, exact_law, target_law
from specdec.testing.drafters import Noting
from specdec.tree import tree_of_points

torch.set_num_threads(1)


def occurrences(text, part):
    return sum(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def follow(automaton, part):
    """The state of a string; None if it did not occur."""
    state = 0
    for token in part:
        state = automaton.next[state].get(token) if state is not None else None
    return state


@pytest.mark.parametrize("seed", range(20))
def test_the_automaton_knows_every_substring_and_how_often_it_occurred(seed):
    rng = random.Random(seed)
    text, automaton, last = [rng.randrange(3) for _ in range(30)], SuffixAutomaton(), 0
    for n, token in enumerate(text, start=1):
        last = automaton.write(last, [token])
        so_far, longest = text[:n], automaton.length[automaton.link[last]]
        repeated = [k for k in range(1, n) if occurrences(so_far, so_far[-k:]) > 1]
        assert longest == max(repeated, default=0)
        for _ in range(5):
            part = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
            state = follow(automaton, part)
            assert (0 if state is None else automaton.count[state]) == occurrences(so_far, part)


@pytest.mark.parametrize("seed", range(20))
def test_texts_that_grow_in_turns_are_strings_of_their_own_after_a_prompt_that_counts_once(seed):
    rng = random.Random(seed)
    prompt, automaton = [rng.randrange(3) for _ in range(rng.randint(1, 6))], SuffixAutomaton()
    start = automaton.write(0, prompt)
    texts, states = [[*prompt] for _ in range(4)], [start] * 4
    for _ in range(60):
        row = rng.randrange(4)
        news = [rng.randrange(2 + row % 2) for _ in range(rng.randint(1, 3))]
        texts[row] += news
        states[row] = automaton.write(states[row], news)
        assert [automaton.length[state] for state in states] == list(map(len, texts))
        assert [follow(automaton, text) for text in texts] == states
        part = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
        # by place in the trie of texts: the prompt is everybody's
        ends = {
            (end, row if end > len(prompt) else -1)
            for row, text in enumerate(texts)
            for end in range(len(part), len(text) + 1)
            if text[end - len(part) : end] == part
        }
        state = follow(automaton, part)
        assert (0 if state is None else automaton.count[state]) == len(ends)
        continued = automaton.continued(states[row])
        repeated = [
            k for k in range(1, len(texts[row]) + 1) if any(occurrences(t[:-1], texts[row][-k:]) for t in texts)
        ]
        assert automaton.length[continued] == max(repeated, default=0)


def test_text_that_never_changes_is_read_in_linear_time():
    automaton = SuffixAutomaton()
    last = automaton.write(0, [7] * 20_000)
    assert automaton.length[automaton.link[last]] == 19_999


def drafted(drafter, text):
    noting = Noting(drafter)
    specdec.generate(TabularTarget(50), torch.tensor(text), noting, max_new_tokens=20, stop_tokens=())
    parents, tokens = noting.drafts[0].parents, noting.drafts[0].tokens
    paths = [(tokens[0],)]
    for node in range(1, len(tokens)):
        paths.append((*paths[parents[node]], tokens[node]))
    return {path[1:] for path in paths[1:]}


def test_trees_hold_the_continuations_that_occurred():
    text = [1, 2, 3, 4, 1, 2, 3, 5, 9, 1, 2, 3]
    assert drafted(NgramDrafter(2, branches=1), text) == {(5,), (5, 9)}
    assert drafted(NgramDrafter(2, branches=2), text) == {(5,), (5, 9), (4,), (4, 1)}
    found = drafted(SuffixDrafter(nodes=9, depth=2, threshold=0.1), text)
    assert found == {(4,), (5,), (4, 1), (5, 9)}
    assert drafted(SuffixDrafter(threshold=0.4), text) == {(4,), (5,)}  # each as likely as the other, and none certain


def test_a_corpus_is_drafted_from_and_texts_do_not_run_on():
    corpus = [torch.tensor([7, 8, 9]), [7, 8, 9, 10, 11]]
    assert (9, 10) in drafted(SuffixDrafter(corpus=corpus), [1, 7, 8])
    assert drafted(SuffixDrafter(corpus=[[5, 6], [7]]), [5, 6]) == set()


@pytest.mark.parametrize(
    "drafter", [NgramDrafter(3, branches=3), SuffixDrafter(), SuffixDrafter(corpus=[range(50)])], ids=str
)
def test_the_text_is_the_targets(drafter):
    model = llama()
    out = specdec.generate(model, PROMPTS, drafter, max_new_tokens=48, stop_tokens=())
    assert [t.tolist() for t in out.tokens] == [
        reference(model, p, max_new_tokens=48, eos_token_id=-1).tolist() for p in PROMPTS
    ]
    assert out.summary()["acceptance_length"] > 1.1


@pytest.mark.parametrize("drafter", [NgramDrafter(2, branches=2), SuffixDrafter(5, 2, 2)], ids=str)
@pytest.mark.parametrize("merge", [True, False])
def test_sampled_text_is_lossless(drafter, merge):
    options = {"sampling": Sampling(1.0), "max_new_tokens": 3, "stop_tokens": (2,)}
    law = exact_law(TabularTarget(3), (0, 1, 0, 1, 1, 0), drafter, merge=merge, **options)
    assert law.total_variation(target_law(TabularTarget(3), (0, 1, 0, 1, 1, 0), **options)) == 0


def test_trees_of_points_are_padded_to_one_shape():
    tree = tree_of_points(torch.tensor([4, 5]), [[(1, 0), (2, 0), (3, 1)], []])
    assert tree.topology.children[0].tolist() == [[1, 2], [3, -1], [-1, -1], [-1, -1]]
    assert tree.laws.tolist() == [[Law.POINT] * 4, [Law.POINT, *[Law.PADDING] * 3]]
    assert tree.topology.depth == 2 and tree.tokens[:, 0].tolist() == [4, 5]


def test_corpus_of_the_docstring_is_drafted_from():
    """A corpus of the target's own text, on which it is right from the first token on."""
    pair = specdec.demo.load()
    prompt = pair.prompts[0].text
    text = specdec.generate(pair.target, prompt, tokenizer=pair.tokenizer, max_new_tokens=24).text
    assert text is not None
    known = {"tokenizer": pair.tokenizer, "documents": [prompt + text[0]], "SuffixDrafter": SuffixDrafter}
    (code,) = re.findall(r">>> (drafter = SuffixDrafter\(corpus.*)", SuffixDrafter.__doc__ or "")
    exec(code, known)
    out = specdec.generate(pair.target, prompt, known["drafter"], tokenizer=pair.tokenizer, max_new_tokens=24)
    assert out.text == text and out.trace.steps[0].accepted[0] > 4
