"""What pictures say is what happened."""

import re
from html.parser import HTMLParser

import matplotlib
import pytest
import torch

import specdec
from specdec import Law, Sampling, display, rules
from specdec.display.picture import BLUE, BONUS, DRAFTED, GREEN, PLAIN, RECOVERED, Picture, Span
from specdec.display.text import Author, authors, pieces
from specdec.drafters import ModelDrafter
from specdec.generate import Generation
from specdec.testing import Table, TabularDrafter, TabularTarget
from specdec.theory import CostCurve, Costs
from specdec.trace import Step, Trace
from specdec.trees import Widths

matplotlib.use("Agg")
torch.set_num_threads(1)

PAIR = specdec.demo.load()
STOP = 3


def step(emitted, accepted, tried):
    return Step(4, [0, 1], emitted, accepted, tried, 0.0005, 0.002, 0.004, 0.001)


# row 0: a rejection after one draft, a whole path, no draft; row 1: a whole path, cut within a path, ended
HISTORY = Trace(steps=[step([2, 3], [1, 2], [2, 2]), step([3, 1], [2, 1], [2, 1]), step([1, 0], [0, 0], [0, 0])])


class Words:
    """A tokenizer of words, one of which is half a character and one of which is markup."""

    words = (b"a ", b"<b>&", "é".encode()[:1], "é".encode()[1:], b"\n")

    def decode(self, tokens):
        return b"".join(self.words[int(token)] for token in tokens).decode(errors="replace")


class Page(HTMLParser):
    """(text, style, title) of everything on a page."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], [{}]
        self.feed(page)
        self.close()
        assert self.open == [{}], "a tag was not closed"

    def handle_starttag(self, tag, attrs):
        self.open.append(dict(attrs) if tag == "span" else {})

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        self.found.append((data, self.open[-1].get("style"), self.open[-1].get("title")))


def test_authors_are_those_of_the_trace():
    drafted, recovered, bonus, alone = "drafted", "recovered", "bonus", "alone"
    assert authors(HISTORY)[0] == [
        *(Author(drafted, 1, 0), Author(recovered, 2, 0)),
        *(Author(drafted, 1, 1), Author(drafted, 2, 1), Author(bonus, 3, 1), Author(alone, 1, 2)),
    ]
    assert authors(HISTORY)[1] == [
        *(Author(drafted, 1, 0), Author(drafted, 2, 0), Author(bonus, 3, 0), Author(drafted, 1, 1))
    ]


@pytest.mark.parametrize(
    "rule", [rules.SiblingRejection(), rules.TraversalVerification()], ids=lambda r: type(r).__name__
)
def test_authors_agree_with_the_recorded_trees(rule):
    """Told from the trees and decisions themselves, without the counts that `authors` reads."""
    drafter = TabularDrafter(Table(12, 4), Widths((3, 1)))
    options = {"sampling": Sampling(1.0), "stop_tokens": (STOP,), "max_new_tokens": 12, "trace": "laws", "rule": rule}
    prompts = [torch.tensor([b]) for b in range(12)]
    out = specdec.generate(TabularTarget(12, 3), prompts, drafter, **options)
    seen = set()
    for row, tokens in enumerate(out.tokens):
        wrote, at = authors(out.trace)[row], 0
        assert len(wrote) == len(tokens)
        for i, recorded in enumerate(out.trace.steps):
            decided, parents = recorded.record.decisions, recorded.record.bare.topology.parents[row]
            path = decided.path[row, : decided.accepted[row] + 1].tolist()
            there = recorded.record.bare.laws[row] != Law.PADDING
            leaf = not bool((there & (parents == path[-1])).any())
            last = "recovered" if not leaf else "bonus" if len(path) > 1 else "alone"
            expected = [("drafted", d, i) for d in range(1, len(path))] + [(last, len(path), i)]
            count = recorded.emitted[row]
            assert wrote[at : at + count] == expected[:count]
            at += count
        seen |= {author.kind for author in wrote}
    assert seen == {"drafted", "recovered", "bonus", "alone"}


def shown(tokens):
    return Generation([torch.tensor(row) for row in tokens], None, HISTORY, Words())


def test_text_has_the_colour_of_its_author():
    spans = display.text(shown([[0, 1, 2, 3, 4, 0], [0, 0, 1, 0]])).spans
    body = spans[[span.text for span in spans].index("\ntext 0: 6 tokens in 3 steps\n") + 1 :][:6]
    assert [(span.text, span.style) for span in body] == [
        ("a ", DRAFTED[0]), ("<b>&", RECOVERED), ("", DRAFTED[0]), ("é", DRAFTED[1]), ("\n", BONUS), ("a ", PLAIN)
    ]  # fmt: skip
    assert body[3].title == "drafted at depth 2, step 1"


def test_what_an_earlier_call_wrote_has_no_colour():
    spans = display.text(shown([[4, 4, 0, 1, 2, 3, 4, 0], [0, 0, 1, 0], [0]])).spans
    start = [span.text for span in spans].index("\ntext 0: 8 tokens, 2 of them by an earlier call in 3 steps\n") + 1
    assert [(span.text, span.style) for span in spans[start : start + 4]] == [
        ("\n", PLAIN), ("\n", PLAIN), ("a ", DRAFTED[0]), ("<b>&", RECOVERED)
    ]  # fmt: skip
    assert spans[start + 1].title == spans[-2].title == "written by an earlier call"


def test_page_is_escaped_and_complete():
    found = Page(shown([[0, 1, 2, 3, 4, 0], [0, 0, 1, 0]])._repr_html_()).found
    assert ("<b>&", RECOVERED.css, "recovered, step 0") in found
    assert "a <b>&é\na " in "".join(text for text, _, _ in found)


def test_page_asks_for_nothing_from_elsewhere_and_keeps_the_colour_of_text():
    page = shown([[0, 1, 2, 3, 4, 0], [0, 0, 1, 0]])._repr_html_()
    assert not re.search(r"<(script|link|img)|https?:|url\(", page)
    assert "color:" not in page.replace("background-color:", "") and "rgba(" in page


def test_terminal_has_no_colour_where_it_is_not_wanted(monkeypatch):
    picture = Picture([Span("a"), Span("b\nc", RECOVERED)])
    monkeypatch.delenv("NO_COLOR", raising=False)
    code = RECOVERED.ansi
    assert str(picture) == f"a\x1b[{code}mb\x1b[0m\n\x1b[{code}mc\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "")  # empty counts as not set: no-color.org
    assert "\x1b" in str(picture)
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(picture) == "ab\nc"


def test_pieces_add_up_to_the_text():
    text = PAIR.prompts[0].text + " naïve → ☃\n\tend"
    tokens = PAIR.tokenizer(text)["input_ids"]
    found = pieces(tokens, PAIR.tokenizer)
    assert len(found) == len(tokens) and "".join(found) == PAIR.tokenizer.decode(tokens)
    assert pieces([5, 7], None) == ["5 ", "7 "]


@pytest.fixture(scope="module")
def run():
    """Two texts of the demo pair."""
    drafter = ModelDrafter(PAIR.draft, Widths([2, 1]))
    options = {"tokenizer": PAIR.tokenizer, "sampling": Sampling(1.0), "max_new_tokens": 16, "trace": "laws"}
    return specdec.generate(PAIR.target, [p.text for p in PAIR.prompts[1:3]], drafter, **options)


@pytest.mark.parametrize("row", [0, 1])
def test_tree_shows_every_node_with_its_probabilities_and_the_path(run, row, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    for step in run.trace.steps[:4]:
        record, lines = step.record, str(display.tree(step, row)).splitlines()
        tree, laws = record.tree(), record.target.tensor()
        nodes = [i for i in range(1, tree.tokens.shape[1]) if tree.laws[row, i] != Law.PADDING]
        assert len(lines) == 2 + len(nodes) and lines[0] == str(int(tree.tokens[row, 0]))
        parents, tokens = tree.topology.parents[row], tree.tokens[row]
        expected = {(int(tokens[i]), f"p {laws[row, parents[i], tokens[i]]:.3f}") for i in nodes}
        assert {(int(re.sub(r"\D*(\d+) .*", r"\1", x)), re.search(r"p \S+", x)[0]) for x in lines[1:-1]} == expected
        assert sum(line.endswith("accepted") for line in lines) == step.accepted[row]
        token = int(record.decisions.token[row])
        assert lines[-1].startswith(f"emitted {token} after ")


def test_tree_of_a_drawn_token_shows_the_chance_it_was_drawn_with(run, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    record = run.trace.steps[0].record
    tree = record.tree()
    weights, (first, second) = tree.draft_probs[0, 0].clone(), tree.tokens[0, 1:3]
    weights[second] = 0  # the law of the first child leaves out the top one
    lines = str(display.tree(run.trace.steps[0], 0)).splitlines()
    assert f"├─ {int(first)}  q {weights[first] / weights.sum():.3f}  p " in lines[1]
    assert f"└─ {int(second)}  q top  p " in lines[3]


def test_a_tree_that_is_not_there_is_refused(run):
    with pytest.raises(ValueError, match="no tree in this step: record"):
        display.tree(HISTORY.steps[0])
    ended = [step for step in run.trace.steps if 0 in step.emitted]
    if ended:
        with pytest.raises(ValueError, match="not running in this step"):
            display.tree(ended[0], ended[0].emitted.index(0))


def test_plots_draw_the_figures_of_the_trace():
    axes = display.acceptance_by_depth({"chain": HISTORY})
    [line] = axes.get_lines()
    assert line.get_ydata().tolist() == HISTORY.summary()["acceptance_rate"] == [1.0, 2 / 3]
    bars = [bar.get_height() for bar in display.time_per_step({"chain": HISTORY}).patches]
    assert bars == pytest.approx([0.5, 2, 4, 1])  # ms
    drafter = TabularDrafter(Table(12, 4), Widths((2, 2)))
    traced = specdec.generate(TabularTarget(12, 3), torch.tensor([0]), drafter, trace="ceiling").trace
    [bar] = display.ceiling_shares({"greedy": traced}).patches
    assert bar.get_height() == traced.summary()["ceiling_share"] == 1
    with pytest.raises(ValueError, match=r"\['chain'\]: ceilings are not known"):
        display.ceiling_shares({"chain": HISTORY})
    matplotlib.pyplot.close("all")


def test_plots_say_what_they_show_and_in_which_unit():
    costs, traces = Costs(CostCurve((1, 9), (1.0, 1.0)), CostCurve((1, 9), (0.1, 0.1))), {"chain": HISTORY}
    by_depth, time = display.acceptance_by_depth(traces), display.time_per_step(traces)
    by_length = display.speed_up_by_length([0.5], costs)
    assert all(axes.get_title() for axes in (by_depth, time, by_length))
    assert "(tokens)" in by_depth.get_xlabel() and "(share)" in by_depth.get_ylabel()
    assert "(ms)" in time.get_ylabel() and "1 is decoding without drafts" in by_length.get_ylabel()
    matplotlib.pyplot.close("all")


def test_plots_have_the_colours_of_the_text():
    _, drafting, target, _ = (bar.get_facecolor() for bar in display.time_per_step({"chain": HISTORY}).patches)
    assert matplotlib.colors.to_hex(drafting) == BLUE and matplotlib.colors.to_hex(target) == GREEN
    assert "rgba({},{},{},".format(*bytes.fromhex(BLUE[1:])) in DRAFTED[0].css
    assert "rgba({},{},{},".format(*bytes.fromhex(GREEN[1:])) in BONUS.css
    matplotlib.pyplot.close("all")


def test_predicted_curve_is_that_of_the_cost_model():
    """A drafted token is accepted half the time; drafting takes a tenth of the target's time, whatever is verified."""
    costs = Costs(CostCurve((1, 9), (1.0, 1.0)), CostCurve((1, 9), (0.1, 0.1)))
    alone = {"median": 1.4, "low": None, "high": None}  # as the benchmark writes it
    measured = {1: {"median": 1.2, "low": 1.1, "high": 1.4}, 2: {"median": 1.3}, 3: alone}
    axes = display.speed_up_by_length([0.5, 0.5], costs, measured)
    assert axes.get_lines()[0].get_ydata() == pytest.approx([1, 1.5 / 1.1, 1.75 / 1.2])
    assert [line.get_ydata()[0] for line in axes.get_lines() if line.get_marker() == "o"] == [1.2, 1.3, 1.4]
    matplotlib.pyplot.close("all")


def test_a_notebook_shows_the_texts_of_a_run(run):
    page = "".join(text for text, _, _ in Page(run._repr_html_()).found)
    assert all(PAIR.tokenizer.decode(tokens) in page for tokens in run.tokens)


@pytest.fixture(scope="module")
def slotted():
    """Four texts of the demo pair in two rows, and each of them alone; their lengths differ."""
    drafter, prompts = ModelDrafter(PAIR.draft, Widths([2, 1])), [p.text for p in PAIR.prompts[1:5]]
    options = {"tokenizer": PAIR.tokenizer, "sampling": Sampling(1.0), "trace": "laws", "stop_tokens": ()}
    budgets = [3, 16, 8, 5]
    out = specdec.generate(PAIR.target, prompts, drafter, max_new_tokens=budgets, batch_size=2, **options)
    alone = [
        specdec.generate(PAIR.target, prompt, drafter, max_new_tokens=n, first_index=i, **options)
        for i, (prompt, n) in enumerate(zip(prompts, budgets, strict=True))
    ]
    return out, alone


def test_texts_that_share_a_row_have_their_own_authors(slotted):
    out, alone = slotted
    found = authors(out.trace)
    assert max(len(step.held) for step in out.trace.steps) == 2
    for index, own in enumerate(alone):
        assert out.tokens[index].tolist() == own.tokens[0].tolist()
        kinds = [(author.kind, author.depth) for author in authors(own.trace)[0]]
        assert [(author.kind, author.depth) for author in found[index]] == kinds


def test_a_tree_is_found_by_its_text_whatever_its_row(slotted, monkeypatch):
    """Up to rounding it is the tree of the same text alone."""
    monkeypatch.setenv("NO_COLOR", "1")
    out, alone = slotted

    def tokens(step, text):
        return re.findall(r"\'.*?\'", str(display.tree(step, text, PAIR.tokenizer)))

    for index, own in enumerate(alone):
        running = [step for step in out.trace.steps if (row := step.row(index)) is not None and step.emitted[row]]
        assert len(running) == len(own.trace.steps)
        for step, lone in zip(running, own.trace.steps, strict=True):
            assert tokens(step, index) == tokens(lone, 0)
    first = out.trace.steps[0]
    missing = next(index for index in range(4) if index not in first.held)
    with pytest.raises(ValueError, match=rf"text={missing}: it was not running in this step; .* one of \[\d, \d\]"):
        display.tree(first, missing)


def slot(held, emitted, enter=0.0):
    return Step(1, held, emitted, [0] * len(held), [0] * len(held), enter, 0.0, 1.0, 0.0)


# text 0 ends after one step, and text 2 gets its row while text 1 goes on; then text 2 alone moves to a batch of one row
SLOTS = Trace(prefill_seconds=2.0, steps=[slot([0, 1], [1, 1]), slot([2, 1], [1, 1], enter=0.5), slot([2], [1])])


def test_rows_are_drawn_from_the_first_tokens_of_their_texts_to_the_last():
    whole = Trace(steps=[slot([0, 1], [1, 1])] * 3)
    above, below = display.rows({"whole": whole, "slots": SLOTS})
    assert [bar.get_bbox().intervalx.tolist() for bar in above.patches] == [[0, 3], [0, 3]]
    bars = {text.get_text(): bar.get_bbox() for text, bar in zip(below.texts, below.patches, strict=True)}
    found = {text: (box.intervaly.mean(), *box.intervalx) for text, box in bars.items()}
    assert found == {"0": (0, 0, 3), "1": (1, 0, 4.5), "2": (0, 3, 5.5)}
    assert below.get_title() == "slots: 100% of the rows running" and below.get_xlabel() == "time (s)"
    assert above.get_ylabel() == below.get_ylabel() == "row"
    matplotlib.pyplot.close("all")


def test_rows_running_are_counted_step_by_step():
    idle = Trace(steps=[slot([0, 1], [1, 1]), slot([0, 1], [0, 1])])
    axes = display.rows_running({"slots": SLOTS, "idle": idle})
    slots, half = axes.patches
    assert slots.get_data().values.tolist() == [2, 2, 1] and slots.get_data().edges.tolist() == [0, 3, 4.5, 5.5]
    assert half.get_data().values.tolist() == [2, 1] and half.get_label() == "idle (mean share 75%)"
    assert axes.get_xlabel() == "time (s)" and axes.get_ylabel() == "rows"
    matplotlib.pyplot.close("all")
