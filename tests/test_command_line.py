"""The commands do what the functions do, and a mistake ends in a message."""

import json

import pytest

import specdec
from specdec.__main__ import main
from specdec.drafters import ModelDrafter
from specdec.rules import SiblingRejection
from specdec.trees import Chain
from specdec.tuning import Estimate, Speedup

DEMO = ["--target", "demo", "--draft", "demo"]
TEXT = "def fib(n):"


def test_texts_are_those_of_generate(tmp_path, capsys):
    pair, output = specdec.demo.load(), tmp_path / "texts.jsonl"
    main(["generate", *DEMO, "--prompt", TEXT, "--new-tokens", "12", "--output", str(output)])
    expected = specdec.generate(pair.target, TEXT, tokenizer=pair.tokenizer, max_new_tokens=12)
    assert json.loads(output.read_text()) == {"text": expected.text[0], "tokens": expected.tokens[0].tolist()}
    assert "drafted by ModelDrafter(LlamaForCausalLM, Chain(4))" in capsys.readouterr().out


def test_a_plan_decides_who_drafts(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    drafter = ModelDrafter(specdec.demo.load().draft, Chain(2))
    specdec.Plan("draft", drafter, SiblingRejection(), Speedup(Estimate(1.2)), "pays", "because").save(path)
    main(["generate", *DEMO, "--prompt", TEXT, "--new-tokens", "8", "--plan", str(path)])
    assert "drafted by ModelDrafter(LlamaForCausalLM, Chain(2))" in capsys.readouterr().out


def test_drafts_are_called_as_they_are_given_and_one_that_cannot_be_loaded_does_not_end_a_search(tmp_path, capsys):
    for name in ("Model-0.5B", "Model-0.5B-Instruct"):
        (tmp_path / name).symlink_to(specdec.demo.FOLDER / "draft")
    drafts = [str(tmp_path / name) for name in ("Model-0.5B", "Model-0.5B-Instruct", "nowhere")]
    words = ["--own", "--seconds", "1", "--new-tokens", "8", "--prompt", TEXT]
    main(["tune", "--target", "demo", *(word for name in drafts for word in ("--draft", name)), *words])
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in drafts[:2]) and f"{drafts[2]} was not compared" in said
    drafter = ModelDrafter(specdec.demo.load().draft, Chain(2))
    specdec.Plan(drafts[1], drafter, SiblingRejection(), Speedup(), "pays", "because").save(tmp_path / "plan.yaml")
    for among in (drafts[1:2], drafts[:2]):
        chosen = [word for name in among for word in ("--draft", name)]
        main(["generate", "--target", "demo", *chosen, "--plan", str(tmp_path / "plan.yaml"), *words[-4:]])
        assert "drafted by ModelDrafter(LlamaForCausalLM, Chain(2))" in capsys.readouterr().out


def test_a_plan_is_made_shown_and_saved(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{TEXT}\nimport os\n")
    words = ["--own", "ngram", "--seconds", "1", "--new-tokens", "8", "--save", str(tmp_path / "plans" / "plan.yaml")]
    main(["tune", "--target", "demo", "--prompts", str(tmp_path / "prompts.txt"), *words])
    assert "| drafter | tree | rule |" in capsys.readouterr().out
    assert specdec.Plan.load(tmp_path / "plans" / "plan.yaml", specdec.demo.load().target).name in (
        "ngram",
        "autoregressive",
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate", "--target", "demo"], "there is no prompt: give --prompts FILE or --prompt TEXT"),
        (["tune", "--target", "demo", "--prompts", "nowhere.txt"], "prompts=nowhere.txt cannot be read"),
        (["generate", "--target", "demo", "--prompt", "a", "--dtype", "fp32"], "--dtype fp32: there is no such type"),
        (["generate", *DEMO, "--prompt", "a", "--plan", "p", "--drafter", "ngram"], "say who drafts: give one of them"),
        (["generate", *DEMO, "--prompt", "a", "--drafter", "ngram"], "say who drafts: give one of them"),
        (["generate", "--target", "demo", "--prompt", "a", "--threads", "0"], "--threads=0: must be"),
        (["generate", "--target", "demo", "--prompt", "a", "--device", "cuda:99"], "--device cuda:99: torch finds"),
        (
            ["generate", "--target", "demo", "--prompt", "a", "--device", "here"],
            "--device here: there is no such device",
        ),
        (["tune", "--target", "demo", "--prompt", "a", "--save", "."], ". cannot be written"),
        (["tune", "--target", "demo", "--prompt", "a", "--picture", "a.foo"], "--picture a.foo: there is no such kind"),
        (["tune", *DEMO, "--draft", "demo", "--prompt", "a"], "two drafters are called demo"),
        (["generate", "--target", "demo", "--prompt", "a", "--top-k", "3"], "top_k=3 at temperature=0"),
    ],
)
def test_mistakes_end_in_a_message(words, message):
    with pytest.raises(SystemExit, match=message):
        main(words)


def test_an_interrupt_ends_in_a_message(monkeypatch):
    def interrupted(asked):
        raise KeyboardInterrupt

    monkeypatch.setattr("specdec.command_line.options.models", interrupted)
    with pytest.raises(SystemExit, match="specdec: interrupted"):
        main(["generate", *DEMO, "--prompt", "a"])


@pytest.mark.parametrize("command", ["tune", "generate"])
def test_help_shows_every_option_with_what_it_does(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert all(
        option in said for option in ("--target", "--draft", "--prompts", "--temperature", "--batch", "--engine")
    )
