"""Prompt sets: files, data sets and turns."""

import json
import sys
from functools import partial
from types import ModuleType

import pytest
import torch

import specdec
from experiments.bench.inputs import Turn, in_batches, in_turns
from experiments.bench.measure import AGAIN, rounds
from experiments.bench.prompts import Prompt, dataset, demo, read
from experiments.bench.real_prompts import real
from specdec import Sampling
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.models.cached_model import CachedModel

torch.set_num_threads(1)
PAIR = specdec.demo.load()
ROWS = [
    {"id": 1, "task": "qa", "turns": ["What?"]},
    {"id": 2, "task": "math", "turns": ["1 + 1", "And why?"]},
    {"question_id": 3, "category": "qa", "turns": ["Who?"]},
    {"id": 4, "prompt": "def f("},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n", "utf-8")
    return str(path)


def test_jsonl_has_turns_or_a_prompt_and_tasks_in_their_order(file):
    assert read(file) == [
        Prompt("qa", ["What?"]),
        Prompt("qa", ["Who?"]),
        Prompt("math", ["1 + 1", "And why?"]),
        Prompt("some", ["def f("]),
    ]
    assert read(file, tasks=["math", "qa"], per_task=1) == [
        Prompt("math", ["1 + 1", "And why?"]),
        Prompt("qa", ["What?"]),
    ]


def test_published_files_are_tasks_of_which_fewer_prompts_are_a_part_of_more(tmp_path):
    spec = [{"category": kind, "turns": [f"{kind} {i}"]} for kind in ("writing", "stem", "qa") for i in range(9)]
    rows = {
        "spec_bench.jsonl": spec,
        "humaneval.jsonl": [{"task_id": "HumanEval/0", "prompt": "def f():\n"}],
        "gsm8k_test.jsonl": [{"question": f"1 + {i}?", "answer": f"{1 + i}"} for i in range(9)],
    }
    for name, of in rows.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, of)), "utf-8")
    found = real(str(tmp_path), per_task=6)
    assert {prompt.task for prompt in found} == {"mt_bench", "qa", "humaneval", "gsm8k"}
    assert {prompt.turns[0].split()[0] for prompt in found if prompt.task == "mt_bench"} == {"writing", "stem"}
    assert Prompt("humaneval", ["def f():\n"], chat=True) in found
    assert set(map(str, real(str(tmp_path), ["gsm8k"], 2))) < set(map(str, found))
    (tmp_path / "humaneval.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"humaneval\.jsonl is not there.*openai/human-eval"):
        real(str(tmp_path))


def test_plain_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\ntwo\n", "utf-8")
    assert read(str(path)) == [Prompt("lines", ["one"]), Prompt("lines", ["two"])]


def test_task_that_is_not_there_is_told_with_those_that_are(file):
    with pytest.raises(SystemExit, match=r"no prompts for \['poetry'\]; choose from \['math', 'qa', 'some'\]"):
        read(file, tasks=["poetry"])
    with pytest.raises(SystemExit, match="There is no prompt"):
        read(file, per_task=0)


def test_demo_prompts_are_held_out_texts_by_task():
    found = demo(["prose", "tests"], 2)
    assert [p.task for p in found] == ["prose", "prose", "tests", "tests"]
    assert [p.turns for p in found[:2]] == [[p.text] for p in PAIR.prompts if p.task == "prose"][:2]


class Table(dict):
    """What `datasets.load_dataset` returns, as far as it is used."""

    @property
    def column_names(self):
        return list(self)


def test_data_set_gives_texts_or_turns_of_one_column(monkeypatch):
    asked = []
    module = ModuleType("datasets")
    module.load_dataset = lambda *a, **k: asked.append((a, k)) or Table(prompt=["a", "b"], talk=[["c", "d"], ["e"]])
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert dataset("org/set", "test", "prompt", per_task=1) == [Prompt("org/set", ["a"])]
    assert dataset("org/set", "train", "talk", "sub", chat=True)[0] == Prompt("org/set", ["c", "d"], True)
    assert asked == [(("org/set", None), {"split": "test"}), (("org/set", "sub"), {"split": "train"})]
    with pytest.raises(SystemExit, match="has the columns prompt, talk"):
        dataset("org/set", "test", "text")


def test_data_set_without_the_package_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="pip install datasets"):
        dataset("org/set", "test", "prompt")


def turns(*prompts: Prompt) -> list[tuple[str, str]]:
    return [(PAIR.tokenizer.decode(ids), turn.task) for ids, turn in in_turns(list(prompts), PAIR, Sampling(), 8)]


def test_later_turn_holds_the_earlier_one_and_the_targets_own_answer():
    first = PAIR.prompts[0].text
    answer = specdec.generate(PAIR.target, first, max_new_tokens=8, tokenizer=PAIR.tokenizer).text[0]
    assert turns(Prompt("a", [first, "Go on."]), Prompt("b", ["x = 1"])) == [
        (first, "a"),
        (f"{first}\n\n{answer}\n\nGo on.", "a"),
        ("x = 1", "b"),
    ]


def test_chat_turns_are_messages_of_the_template(monkeypatch):
    monkeypatch.setattr(PAIR.tokenizer, "chat_template", TEMPLATE)
    (first, _), (second, _) = turns(Prompt("a", ["Hello", "Again"], chat=True))
    assert first == "<user>Hello<assistant>"
    assert second.startswith(first) and second.endswith("<user>Again<assistant>")


def test_conversations_are_decoded_together_turn_by_turn():
    turns = [Turn("a", 0), Turn("a", 1), Turn("b", 0), Turn("c", 0), Turn("c", 1), Turn("c", 2)]
    prompts = list(map(torch.tensor, range(6)))
    found = [([int(p) for p in rows], of, later) for rows, of, later in in_batches(prompts, turns, 2)]
    assert found == [
        ([0, 2], "a and b", False),
        ([1], "a", True),
        ([3], "c", False),
        ([4], "c", True),
        ([5], "c", True),
    ]


def test_methods_read_only_what_is_new_in_a_later_turn(monkeypatch):
    prompt = Prompt("a", [PAIR.prompts[0].text, "Go on."])
    ids, turns = map(list, zip(*in_turns([prompt, prompt], PAIR, Sampling(), 8), strict=True))
    batches, _, later = map(list, zip(*in_batches(ids, turns, 2), strict=True))
    methods = {
        "plain": specdec.generate,
        "chain": partial(specdec.generate, drafter=ModelDrafter(PAIR.draft)),
        "ngram": partial(specdec.generate, drafter=NgramDrafter()),
    }
    complete = rounds(PAIR.target, methods, batches, repeats=2, sampling=Sampling(), max_new_tokens=8, later=later)
    read, begin = [], CachedModel.read

    def noting(self, tokens, goals, listen=None):
        missing = max(goal - int(self.cache.lengths[row]) for row, goal in goals.items())
        if missing:  # of two rows of one prompt, one copies from the other
            read.append((self.lm.model, missing))
        begin(self, tokens, goals, listen)

    first, second = (batch[0] for batch in batches)
    text = torch.cat([first, specdec.generate(PAIR.target, first, max_new_tokens=8).tokens[0]])
    # an answer may be cut into other tokens when it is read
    alike = int((second[: len(text)] == text).cumprod(0).sum())
    new = len(second) - 1 - min(alike, len(text) - 1)
    assert alike >= len(first) and new < len(second) / 5
    monkeypatch.setattr(CachedModel, "read", noting)
    for done in complete:
        assert all(run.identical == 2 for runs in done.values() for run in runs)
        assert set(done) == {*methods, AGAIN}
        counts = [count for model, count in read if model is PAIR.target]
        assert counts == [len(first) - 1] * 4 + [new] * 4
        counts = [count for model, count in read if model is PAIR.draft]
        assert counts[0] == len(first) - 1 and counts[1] in (new, new + 1)  # an accepted leaf was never read
        read.clear()
