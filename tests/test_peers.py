"""Other libraries in the same table: what is asked of them, and what is said of those that are not here."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_benchmark import run
from tiny_models import build

import specdec
from experiments.bench import calls
from experiments.bench.measure import AGAIN
from experiments.bench.models import Rounded
from experiments.bench.report import figures, over, table
from experiments.benchmark import with_models
from experiments.export_gguf import export
from experiments.peer_methods import baseline
from experiments.peer_methods.libraries import LlamaCpp, OpenVino, Peer, present
from specdec import Sampling
from specdec.models.stored_layers import is_stored

PAIR = specdec.demo.load()
PROMPT = torch.tensor(PAIR.tokenizer(PAIR.prompts[0].text)["input_ids"])
CONF = Path(__file__).resolve().parents[1] / "conf"


def test_every_method_of_the_table_can_be_made():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("benchmark", ["sweep=smollm2_peers", "task.folder=FOLDER"])
    calls.check(OmegaConf.to_container(config))
    methods = with_models(config, PAIR)
    assert {*config.over} < {*methods} and sum(isinstance(method, Peer) for method in methods.values()) == 8


@pytest.mark.parametrize("package, peer", [("openvino_genai", OpenVino("folder")), ("llama_cpp", LlamaCpp("file"))])
def test_a_peer_that_is_not_installed_is_a_row_that_says_so(package, peer, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    methods, absent = present({"transformers": baseline.generate, "peer": peer})
    assert absent == {"peer": f"{package} is not installed"} and list(methods) == ["transformers"]
    rounds = [{"transformers": [run(1, 1.0)], AGAIN: [run(1, 1.0)]}]
    text = table(figures(rounds), {"transformers": over(rounds, "transformers")}, absent)
    assert f"| peer | {package} is not installed | - |" in text


@pytest.mark.parametrize("prompts, temperature", [(2, 0.0), (1, 0.7)])
def test_a_peer_refuses_what_it_is_not_measured_with(prompts, temperature):
    with pytest.raises(ValueError, match="one prompt at a time, greedily; set batch=1"):
        OpenVino("folder")(PAIR.target, [PROMPT] * prompts, sampling=Sampling(temperature), max_new_tokens=2)


def test_rounded_weights_are_those_of_the_type_and_the_target_keeps_its_own():
    seen = []
    Rounded(lambda target, prompts: seen.append(target), torch.bfloat16)(PAIR.target, [PROMPT])
    assert {weight.dtype for weight in seen[0].parameters()} == {torch.bfloat16}
    Rounded(lambda target, prompts: seen.append(target), weights="int8")(PAIR.target, [PROMPT])
    assert is_stored(seen[1]) and not is_stored(PAIR.target)
    assert {weight.dtype for weight in PAIR.target.parameters()} == {torch.float32}


def stand_in(text: list[list[int]], asked: dict) -> ModuleType:
    """What `OpenVino` uses of openvino_genai; its pipelines stream `text`, step by step."""

    class Pipeline:
        def __init__(self, folder, device, **options):
            asked["options"] = options

        def generate(self, ids, config, streamer):
            asked["ids"], asked["config"] = ids, config
            for step in text:
                streamer.write(step)
            streamer.end()

    class Config(SimpleNamespace):
        def set_eos_token_id(self, token):
            self.eos = token

    module = ModuleType("openvino_genai")
    module.LLMPipeline, module.GenerationConfig, module.StreamerBase = Pipeline, Config, object
    module.SchedulerConfig, module.StreamingStatus = SimpleNamespace, SimpleNamespace(RUNNING=0)
    module.draft_model = lambda folder, device, **options: folder
    return module


@pytest.fixture
def openvino(monkeypatch):
    asked = {}
    monkeypatch.setitem(sys.modules, "openvino_genai", stand_in([[5], [6, 7, 8], [9]], asked))
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array))
    return asked


def test_openvino_is_told_token_ids_and_its_steps_are_counted(openvino, tmp_path):
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "openvino_model.xml").touch()
    peer = OpenVino(str(tmp_path / "target"), str(tmp_path / "draft"), draft_length=3)
    out = peer(PAIR.target, [PROMPT], sampling=Sampling(), max_new_tokens=5)
    assert out.tokens[0].tolist() == [5, 6, 7, 8, 9]
    assert [step.emitted for step in out.trace.steps] == [[3], [1]]  # the first token belongs to the prefill
    assert openvino["ids"].tolist() == [PROMPT.tolist()] and openvino["config"].num_assistant_tokens == 3
    assert openvino["config"].eos == PAIR.target.generation_config.eos_token_id
    assert openvino["options"]["draft_model"] == str(tmp_path / "draft")
    assert openvino["options"]["INFERENCE_NUM_THREADS"] == 1


def test_a_peer_without_its_copy_of_the_model_says_so(openvino, tmp_path):
    folder = str(tmp_path / "nothing")
    methods, absent = present({"peer": OpenVino(folder)})
    assert not methods and absent == {"peer": f"no model in {folder}"}


def test_prompt_lookup_of_transformers_writes_its_greedy_text_in_fewer_steps():
    plain, lookup = (baseline.generate(PAIR.target, [PROMPT], max_new_tokens=40, prompt_lookup=n) for n in (None, 4))
    assert torch.equal(lookup.tokens[0], plain.tokens[0])
    assert len(lookup.trace.steps) < len(plain.trace.steps)


def test_ratios_and_times_of_known_runs():
    rounds = [{"peer": [run(2, 1.0)], "ours": [run(3, 0.5)], AGAIN: [run(2, 1.0)]}] * 2
    assert over(rounds, "peer")["ours"]["median"] == 3.0
    spent = figures(rounds)["ours"]["milliseconds_per_step"]
    assert spent == {"draft": 0.0, "verify": 375.0, "other": 125.0}


def llama_stand_in(rounds: list[list[int]], made: list) -> ModuleType:
    """What `LlamaCpp` uses of llama_cpp; its models write `rounds`, and ask for a draft after each if they have a drafter."""

    class Llama:
        def __init__(self, file, draft_model=None, **options):
            self.file, self.draft_model, self.options = Path(file).name, draft_model, options
            made.append(self)

        def generate(self, tokens, temp):
            assert temp == 0
            self.drafts = []
            for written in rounds:
                yield from written
                if self.draft_model:
                    self.drafts.append(self.draft_model(np.array([*tokens, *written])).tolist())

    module = ModuleType("llama_cpp")
    module.Llama, module.GGML_TYPE_F32 = Llama, 0
    return module


@pytest.fixture
def files(tmp_path):
    for name in ("target", "draft"):
        (tmp_path / name).touch()
    return {name: str(tmp_path / name) for name in ("target", "draft")}


def test_llama_cpp_drafts_with_a_model_of_its_own_and_its_steps_are_counted(files, monkeypatch):
    made = []
    monkeypatch.setitem(sys.modules, "llama_cpp", llama_stand_in([[5], [6, 7, 8], [9, 10]], made))
    plain = LlamaCpp(files["target"])(PAIR.target, [PROMPT], sampling=Sampling(), max_new_tokens=5)
    assert [step.emitted for step in plain.trace.steps] == [[1]] * 4
    drafted = LlamaCpp(**files, draft_length=2)(PAIR.target, [PROMPT], sampling=Sampling(), max_new_tokens=5)
    assert drafted.tokens[0].tolist() == [5, 6, 7, 8, 9]
    assert [step.emitted for step in drafted.trace.steps] == [[3], [1]]
    _, draft, target = made
    assert (draft.file, target.file, target.drafts) == ("draft", "target", [[5, 6], [5, 6]])
    assert target.options["type_k"] == target.options["type_v"] == 0 and target.options["logits_all"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "draft.gguf"
    export(PAIR.draft, file)
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(file).tensors}


def test_every_weight_is_in_the_gguf_file(exported):
    weights = [*PAIR.draft.parameters()]
    assert len(exported) == len(weights)
    for name, weight in (
        ("token_embd.weight", PAIR.draft.model.embed_tokens.weight),
        ("blk.0.attn_v.weight", PAIR.draft.model.layers[0].self_attn.v_proj.weight),
        ("blk.0.ffn_down.weight", PAIR.draft.model.layers[0].mlp.down_proj.weight),
    ):
        assert torch.equal(exported[name], weight.float())


def test_queries_rotated_in_neighbouring_pairs_are_those_rotated_in_halves(exported):
    """llama.cpp turns the pairs (0, 1), (2, 3)...; transformers (0, size / 2), (1, size / 2 + 1)..., by the same angles."""
    attention, config = PAIR.draft.model.layers[0].self_attn, PAIR.draft.config
    x, angles = torch.randn(config.hidden_size), torch.arange(config.head_dim // 2) * 0.1
    halves = (attention.q_proj.weight.float() @ x).view(-1, 2, config.head_dim // 2)
    pairs = (exported["blk.0.attn_q.weight"] @ x).view(-1, config.head_dim // 2, 2)
    turned = [
        torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
        for a, b in (halves.unbind(1), pairs.unbind(2))
    ]
    torch.testing.assert_close(turned[0], turned[1])


def test_what_a_gguf_file_would_not_say_is_refused():
    with pytest.raises(SystemExit, match=r"gpt2, .*bias: only Llama models"):
        export(build("GPT2LMHeadModel", n_layer=1, n_embd=8, n_head=2), Path("never.gguf"))
