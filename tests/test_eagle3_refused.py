"""Checkpoints that are broken or made for another target are refused with what was found, what is needed and the cure."""

import eagle_files as files
import pytest
import torch
from eagle_files import HIDDEN, target, tensors

from specdec.drafters import Eagle3Drafter

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return target()


class Code:
    def __reduce__(self):
        return (print, ("run",))


def without(*names):
    return {name: tensor for name, tensor in tensors().items() if name not in names}


def changed(name, value):
    return {**tensors(), name: value}


BROKEN = {
    "another_size": (dict(found=tensors(state_size=32)), "fc.weight takes 96 numbers, and states .* are 3 x 16"),
    "number_of_states": (dict(found=tensors(5)), "fc.weight takes 80 numbers, .* pass states="),
    "vocabulary": (dict(found=tensors(known=None, vocab=20)), "lm_head.weight drafts 20 tokens, the target knows 12"),
    "embedding": (dict(found=changed("embed_tokens.weight", torch.ones(20, HIDDEN))), "embed_tokens.weight knows 20 tokens"),
    "marks": (dict(found=changed("t2d", torch.ones(20, dtype=torch.bool))), "t2d marks tokens of 20"),
    "missing": (dict(found=without("norm.weight", "midlayer.mlp.up_proj.weight")), r"lacks layers.0.mlp.up_proj.weight, norm"),
    "no_fc": (dict(found=without("fc.weight")), r"lacks fc.weight"),
    "no_head": (dict(found=without("lm_head.weight")), r"lm_head.weight is not there"),
    "unexpected": (dict(found=changed("extra.weight", torch.ones(2))), r"has extra.weight besides"),
    "shape": (dict(found=changed("norm.weight", torch.ones(8))), r"norm.weight is \[8\], and \[16\] goes with"),
    "no_norm": (dict(found=tensors(), norm_before_fc=True), r"lacks input_norm.weight"),
    "out_of_range": (dict(found=changed("d2t", torch.full((6,), 9))), "leads to ids 9 to 14, the target knows 12"),
    "twice": (dict(found=changed("d2t", torch.tensor([1, 0, 0, 0, 0, 0]))), "leads twice to id 1"),
    "not_as_many": (dict(found=changed("d2t", torch.tensor([1, 0]))), "knows 2 tokens, and lm_head.weight drafts 6"),
    "layers": (dict(found=tensors(), eagle_aux_hidden_state_layer_ids=[2, 16, 29]), "target has layers 0 to 6"),
    "another_kind": (dict(found=tensors(), speculators_model_type="dflash"), "speculators_model_type is 'dflash'"),
    "gemma": (dict(found=tensors(), model_type="gemma3_text"), "layers of Llama or Qwen3"),
    "heads": (dict(found=tensors(), head_dim=5), "head_dim=5 divides no q_proj of 16 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_refused_with_what_was_found_and_what_is_needed(tmp_path, model, name):
    given, message = BROKEN[name]
    folder = files.specforge(tmp_path / "draft", **given)
    with pytest.raises(ValueError, match=message) as error:
        Eagle3Drafter.from_pretrained(folder, model)
    assert str(folder) in str(error.value)


def test_folders_without_a_draft_are_refused_and_no_code_in_them_is_run(tmp_path, model, capsys):
    with pytest.raises(ValueError, match=r"There is no config.json in"):
        Eagle3Drafter.from_pretrained(tmp_path, model)
    folder = files.specforge(tmp_path / "draft", {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor pytorch_model.bin in"):
        Eagle3Drafter.from_pretrained(folder, model)
    torch.save({**tensors(), "extra": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        Eagle3Drafter.from_pretrained(folder, model)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        Eagle3Drafter.from_pretrained(tmp_path / "draught", model)
    with pytest.raises(ValueError, match="pass the model that it drafts for"):
        Eagle3Drafter.from_pretrained(folder, "llama")
