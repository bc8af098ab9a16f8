"""GGUF files are targets and drafts of experiments: mixed formats, any float type, and errors that tell the cure."""

import pytest
import tiny_gguf
import torch
from gguf import GGMLQuantizationType
from tiny_models import reference
from transformers import AutoModelForCausalLM

import specdec
from experiments.bench.models import load
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.huggingface import gguf

MODEL = tiny_gguf.chat_model()
QUESTION = [{"role": "user", "content": "the theatre, 12 times"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(path, MODEL)
    return path


def test_weights_of_mixed_formats_are_those_of_the_file(file):
    read = gguf.read_model(file, torch.float32).state_dict()
    assert {*read} == {*MODEL.state_dict()}
    layer, kinds = "model.layers.1.", tiny_gguf.MIXED
    for name, part in (("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up"), ("self_attn.v_proj", "attn_v")):
        weight = MODEL.state_dict()[f"{layer}{name}.weight"]
        assert torch.equal(read[f"{layer}{name}.weight"], tiny_gguf.rounded(weight, kinds[part]))
        assert not torch.equal(read[f"{layer}{name}.weight"], weight)
    for name in ("model.embed_tokens", "lm_head", f"{layer}self_attn.q_proj", f"{layer}mlp.gate_proj", "model.norm"):
        assert torch.equal(read[f"{name}.weight"], MODEL.state_dict()[f"{name}.weight"])


def test_what_was_read_can_be_saved_and_computes_the_same(file, tmp_path):
    read = gguf.read_model(file, torch.float32)
    read.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(saved(ids).logits, read(ids).logits) and saved.generation_config.eos_token_id == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experiments_decode_with_a_file_as_target_tokenizer_and_draft(file, dtype):
    models = load(str(file), str(file), draft=str(file), dtype=dtype)
    assert {weight.dtype for weight in models.target.parameters()} == {dtype}
    prompt = models.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert models.tokenizer.decode(prompt) == (
        "<|im_start|>user\nthe theatre, 12 times<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = reference(models.target, torch.tensor(prompt))
    for drafter in (NgramDrafter(), ModelDrafter(models.draft)):
        out = specdec.generate(models.target, QUESTION, drafter, tokenizer=models.tokenizer, max_new_tokens=24)
        assert out.tokens[0].tolist() == expected.tolist()


def test_format_that_is_not_known_is_refused_with_the_cure(tmp_path):
    kind = GGMLQuantizationType.Q8_1  # llama.cpp's own, for activations: nobody writes it to files
    path = tmp_path / "strange.gguf"
    tiny_gguf.write(path, MODEL, {})
    raw = path.read_bytes()
    name = b"blk.0.ffn_down.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions, and both of them
    path.write_bytes(raw[:at] + int(kind).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(ValueError, match=r"strange\.gguf cannot be read: .*llama-quantize \(F16, Q8_0, Q4_1"):
        gguf.read_model(path, torch.float32)


@pytest.mark.parametrize("content, problem", [(None, "there is no such file"), (b"no", "cannot be read: ")])
def test_file_that_is_no_gguf_is_told(content, problem, tmp_path):
    path = tmp_path / "some.gguf"
    if content is not None:
        path.write_bytes(content)
    for read in (gguf.read_tokenizer, lambda file: gguf.read_model(file, torch.float32)):
        with pytest.raises(ValueError, match=rf"some\.gguf:? {problem}"):
            read(path)


def test_package_that_is_missing_is_told_before_anything_is_read(file, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gguf accelerate"):
        gguf.read_model(file, torch.float32)
