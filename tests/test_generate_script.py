"""Texts for a file of prompts: those of shards are those of one run, what is missing is named, and mistakes are told."""

import json
from functools import partial
from pathlib import Path

import pytest

import specdec
from experiments.generate import cut
from specdec import Sampling, journal
from specdec.drafters import NgramDrafter
from specdec.journal import Journal
from specdec.prompt_files import read

ROOT = Path(__file__).resolve().parents[1]
PAIR = specdec.demo.load()
TEXTS = [prompt.text for prompt in PAIR.prompts[:5]]
TINY = [
    "prompts=prompts.jsonl",
    "new_tokens=6",
    "drafter=ngram",
    "sampling=temperature",
    "num_samples=2",
    "batch_size=4",
]


@pytest.fixture
def run(run):
    """Runs the script in a folder with the prompts."""
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS), "utf-8")
    return partial(run, script="generate.py")


def written(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_two_shards_give_the_texts_of_one_run(run, launcher):
    if launcher != "basic":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="not installed: specdec[cluster]")
    assert run(*TINY, "folder=whole") == ("whole/texts.jsonl\n", None)
    _, ended = run("-m", *TINY, "folder=parts", "shards=2", "shard=range(0,2)", f"hydra/launcher={launcher}")
    assert ended is None
    assert run(*TINY, "folder=parts", "shards=2", "join=true") == ("parts/texts.jsonl\n", None)
    out = specdec.generate(
        PAIR.target,
        TEXTS,
        NgramDrafter(),
        sampling=Sampling(1.0),
        max_new_tokens=6,
        num_samples=2,
        tokenizer=PAIR.tokenizer,
    )
    expected = [
        {"index": i // 2, "sample": i % 2, "text": out.text[i], "tokens": out.tokens[i].tolist()} for i in range(10)
    ]
    assert written("parts/texts.jsonl") == written("whole/texts.jsonl") == expected
    made = json.loads(Path("parts/shard_1_of_2.json").read_text())
    assert (made["first"], made["prompts"]) == (2, 3) and made["versions"]["torch"]
    assert made["tokens"] == sum(map(len, out.tokens[4:]))


def test_what_is_missing_is_named_and_what_is_done_stays(run):
    assert run(*TINY, "shards=3", "shard=2")[1] is None
    before = Path("outputs/generate/shard_2_of_3.jsonl").stat().st_mtime_ns
    _, ended = run(*TINY, "shards=3", "join=true")
    assert ended == (
        "outputs/generate/texts.jsonl has 4 of 10 texts. Missing: shard_0_of_3 (prompts 0 to 0), "
        "shard_1_of_3 (prompts 1 to 2). Write them: -m shard=0,1, then join."
    )
    assert [(row["index"], row["sample"]) for row in written("outputs/generate/texts.jsonl")] == [
        (3, 0), (3, 1), (4, 0), (4, 1),
    ]  # fmt: skip
    assert run("-m", *TINY, "shards=3", "shard=range(0,3)")[1] is None
    assert run(*TINY, "shards=3", "join=true")[1] is None
    assert len(written("outputs/generate/texts.jsonl")) == 10
    assert Path("outputs/generate/shard_2_of_3.jsonl").stat().st_mtime_ns == before


def test_a_folder_is_of_one_job(run):
    assert run(*TINY, "shards=5", "shard=0")[1] is None
    _, ended = run(*TINY, "shards=5", "shard=1", "seed=1", "num_samples=1")
    assert "other settings (num_samples, seed): choose another folder" in ended
    Path("prompts.jsonl").write_text('{"prompt": "else"}\n')
    assert "other settings (prompts)" in run(*TINY)[1]
    assert [*Path("outputs/generate").glob("shard_*.jsonl")] == [Path("outputs/generate/shard_0_of_5.jsonl")]


def test_an_interrupted_shard_goes_on_from_its_journal_to_the_same_texts(run, monkeypatch):
    job = [*TINY, "shards=2", "shard=1"]
    run(*job, "folder=whole")
    kept, end = [], Journal.end

    def interrupted(writing, text, *arguments, **columns):
        end(writing, text, *arguments, **columns)
        kept.append(text)
        if len(kept) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "end", interrupted)
        assert run(*job)[1].startswith("Interrupted")
    assert {*journal.read("outputs/generate/shard_1_of_2.journal")[1].finished} == {*kept} != {*range(6)}
    assert not Path("outputs/generate/shard_1_of_2.jsonl").exists()
    assert run(*job)[1] is None
    assert written("outputs/generate/shard_1_of_2.jsonl") == written("whole/shard_1_of_2.jsonl")
    assert not [*Path().rglob("*.journal")]


def test_texts_that_are_all_in_the_journal_are_not_decoded_again(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        run(*TINY)
    before = written("outputs/generate/texts.jsonl")
    Path("outputs/generate/shard_0_of_1.jsonl").unlink()
    monkeypatch.setattr("specdec.loop.Decoding.step", None)
    assert run(*TINY) == ("outputs/generate/texts.jsonl\n", None)
    assert written("outputs/generate/texts.jsonl") == before


def test_prompts_that_cannot_be_decoded_are_noted_with_the_reason(run):
    rows = [{"prompt": TEXTS[0]}, {"prompt": [5] * 2000}, {"prompt": TEXTS[1]}]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert run(*TINY, "on_error=skip")[1] is None
    found = written("outputs/generate/texts.jsonl")
    assert [(row["index"], "skipped" in row) for row in found] == [(i, i == 1) for i in (0, 0, 1, 1, 2, 2)]
    assert "prompt 1 has 2000 tokens" in found[2]["skipped"] and len(found[4]["tokens"]) == 6


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["shards=2", "shard=2"], "shard=2: must be 0 to 1, as shards=2."),
        (["shards=6"], "shards=6: must be 1 to 5, the number of prompts."),
        (["prompts=nowhere.txt"], "prompts=nowhere.txt cannot be read: "),
        (["prompts=empty.txt"], "prompts=empty.txt holds no prompt."),
        (["prompts=broken.jsonl"], "broken.jsonl, prompt 1 is not JSON: "),
        (
            ["prompts=other.jsonl"],
            'other.jsonl, prompt 0: give an object with either a "prompt" or "messages", not {"text"',
        ),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(run, overrides, message):
    Path("empty.txt").write_text("\n")
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    Path("other.jsonl").write_text('{"text": "a"}\n')
    _, ended = run(*TINY, *overrides, "target=hub", "target.target=no/such/model")
    assert ended.startswith(message)
    assert not Path("outputs").exists()


def test_prompts_are_lines_or_objects_with_texts_tokens_or_chats(tmp_path):
    chat = [{"role": "user", "content": "Hello\u2028there"}]
    rows = [{"prompt": "a\nb"}, {"prompt": [5, 6]}, {"messages": chat, "id": 3}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert read(str(path)) == ["a\nb", [5, 6], chat]
    (tmp_path / "prompts.txt").write_text("one\n\n two\n")
    assert read(str(tmp_path / "prompts.txt")) == ["one", " two"]


@pytest.mark.parametrize("shards, prompts", [(1, 1), (3, 5), (4, 64), (7, 7)])
def test_shards_hold_every_prompt_once_and_are_of_equal_size(shards, prompts):
    parts = cut(Path(), shards, prompts)
    assert [i for part in parts for i in range(part.start, part.end)] == [*range(prompts)]
    assert {part.end - part.start for part in parts} <= {prompts // shards, -(-prompts // shards)}
