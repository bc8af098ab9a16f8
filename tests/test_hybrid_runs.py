"""Runs over recurrent states: what later turns and other rows can go on from, engines, threads, memory."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hybrid_models import HYBRIDS, disturbed
from peft import LoraConfig, get_peft_model
from test_graphs import reads_of
from test_hybrids import ONE_OF_EACH
from test_medusa import heads
from test_threads import Gate
from tiny_models import PROMPTS, llama, reference, state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import specdec
import specdec_kernels
from specdec.drafters import Fallback, MedusaDrafter, ModelDrafter, NgramDrafter, Paused, SuffixDrafter
from specdec.models import memory
from specdec.models.cache import Source, TreeCache
from specdec.models.cached_model import CachedModel
from specdec.models.layer_shapes import LayerShape
from specdec.models.probe import layout_of
from specdec.models.recurrent import RecurrentLayer
from specdec.testing import Tape
from specdec.tree import chain
from specdec.trees import Chain, Widths
from specdec_kernels.reference.gated_delta import gated_delta

torch.set_num_threads(1)
OPTIONS = {"max_new_tokens": 10, "stop_tokens": ()}
ENGINES = {"static": specdec.Graphs, "tape": lambda: specdec.Graphs(capture=Tape)}


@pytest.fixture
def entered(monkeypatch):
    """How many tokens entered states, pass by pass; those of all models but of llamas."""
    found, forward = [], CachedModel.forward

    def noting(run, *args, entering=None, **kwargs):
        found.extend([] if entering is None or not run.cache.recurrent else [int(entering.sum())])
        return forward(run, *args, entering=entering, **kwargs)

    monkeypatch.setattr(CachedModel, "forward", noting)
    return found


def texts(generation):
    return [text.tolist() for text in generation.tokens]


def plain(model, prompts, tokens=10):
    """What `model.generate` writes after each prompt."""
    return [reference(model, each, max_new_tokens=tokens, eos_token_id=None).tolist() for each in prompts]


BEGINNING = torch.arange(2, 45)


def ending(*ids, beginning=BEGINNING):
    """Prompts with one beginning of 43 tokens: each goes on with one of these ids, and another token."""
    return [torch.cat([beginning, torch.tensor([each, 5])]) for each in ids]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_turn_goes_on_where_the_last_one_ended_and_from_no_other_place(name, entered):
    model, said = HYBRIDS[name](), torch.tensor([11, 12, 13])
    last = specdec.generate(model, PROMPTS, NgramDrafter(), keep=True, **OPTIONS)
    goes_on = [torch.cat([prompt, text, said]) for prompt, text in zip(PROMPTS, last.tokens, strict=True)]
    expected = texts(specdec.generate(model, goes_on, **OPTIONS))
    entered.clear()
    last = specdec.generate(model, goes_on, NgramDrafter(), keep=True, resume=last, **OPTIONS)
    assert texts(last) == expected
    assert sum(entered) == len(PROMPTS) * len(said), (
        "the last token of the answer, and what was said but for its last token"
    )

    cut = [text[:-1] for text in goes_on]
    expected = texts(specdec.generate(model, cut, **OPTIONS))
    entered.clear()
    assert texts(specdec.generate(model, cut, NgramDrafter(), resume=last, **OPTIONS)) == expected
    assert sum(entered) == sum(len(text) - 1 for text in cut), "no state is kept there, so that all is read again"


def test_a_last_turn_that_nobody_will_resume_stays_in_the_caches_of_the_turn_before(monkeypatch):
    model, made, build = HYBRIDS["mamba2"](), [], TreeCache.__init__
    monkeypatch.setattr(TreeCache, "__init__", lambda *args: made.append(args) or build(*args))
    target = specdec.ModelTarget(model)
    made.clear()  # those of the probe
    last = specdec.generate(target, PROMPTS, keep=True, **OPTIONS)
    specdec.generate(target, PROMPTS, resume=last, **OPTIONS)
    assert len(made) == 1


DRAFTERS = {
    "none": lambda model: None,
    "model": lambda model: ModelDrafter(disturbed(model), Chain(2)),
    "heads": lambda model: MedusaDrafter(heads(dtype=torch.float32), Chain(2)),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "mamba"])
def test_an_answer_is_written_anew_from_the_end_of_its_prompt(name, drafter, entered):
    model, prompts = HYBRIDS[name](), [torch.arange(start, 45) for start in (2, 9)]
    draft, models = DRAFTERS[drafter](model), 2 if drafter == "model" else 1
    replaced = [torch.cat([prompt, torch.tensor([3, 5])]) for prompt in prompts]
    for later, read in ((prompts, 0), (replaced, 2)):
        last = specdec.generate(model, prompts, draft, keep=True, **OPTIONS)
        entered.clear()
        last = specdec.generate(model, later, draft, keep=True, resume=last, **OPTIONS)
        # the state of the last token that is read is what heads draft from: that token is read in any case
        assert sum(entered) == models * len(later) * (read + (drafter == "heads"))
        assert texts(last) == plain(model, later)
        goes_on = [torch.cat([*each, torch.tensor([9])]) for each in zip(later, last.tokens, strict=True)]
        expected = texts(specdec.generate(model, goes_on, **OPTIONS))
        assert texts(specdec.generate(model, goes_on, draft, resume=last, **OPTIONS)) == expected


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_prompts_of_one_call_share_is_read_once(name, drafter, entered):
    model, longer = HYBRIDS[name](), torch.cat([BEGINNING, torch.arange(10, 45)])
    prompts = [*ending(3), *ending(4, beginning=longer), *ending(6), *ending(7, beginning=longer), *ending(3)]
    found = specdec.generate(model, prompts, DRAFTERS[drafter](model), **OPTIONS)
    assert texts(found) == plain(model, prompts)
    # and the last token of each: nobody waits for so few
    assert sum(entered) == (2 if drafter == "model" else 1) * (len(longer) + len(prompts))
    assert (
        texts(specdec.generate(model, prompts[::-1], DRAFTERS[drafter](model), **OPTIONS))
        == plain(model, prompts)[::-1]
    )


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_samples_that_come_later_begin_where_their_prompt_ended(batch_size, drafter, entered):
    model, prompts = HYBRIDS["qwen3_5"](), [torch.arange(start, 45) for start in (2, 2, 2, 3, 3, 3)]
    draft = DRAFTERS[drafter](model)
    found = specdec.generate(model, prompts, draft, batch_size=batch_size, **OPTIONS)
    assert texts(found) == plain(model, prompts)
    heard = 4 if drafter == "heads" else 0
    assert sum(entered) == (2 if drafter == "model" else 1) * (42 + 41 + heard)


def test_texts_that_come_later_begin_where_others_parted(entered):
    model, prompts = HYBRIDS["mamba2"](), ending(3, 4, 6, 7, 8, 9)
    found = specdec.generate(model, prompts, batch_size=2, **OPTIONS)
    assert texts(found) == plain(model, prompts)
    assert sum(entered) == 43 + len(prompts), "what they share, and one token of each"


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_texts_that_enter_while_others_go_on_and_batches_that_shrink_give_the_same(name, monkeypatch):
    model = HYBRIDS[name]()
    drafter, prompts = ModelDrafter(disturbed(model), Widths([2, 1])), [*PROMPTS, torch.arange(3, 29), *PROMPTS[::-1]]
    budgets = [4, 17, 9, 12, 6, 3, 14, 8, 25]
    alone = [
        specdec.generate(model, [prompt], max_new_tokens=budget, stop_tokens=()).tokens[0].tolist()
        for prompt, budget in zip(prompts, budgets, strict=True)
    ]
    found = specdec.generate(model, prompts, drafter, max_new_tokens=budgets, stop_tokens=(), batch_size=4)
    assert texts(found) == alone


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "falcon_h1", "mamba", "lfm2"])
def test_every_engine_gives_the_same_text(name, engine):
    model = HYBRIDS[name]()
    drafter = ModelDrafter(disturbed(model), Widths([2, 1]))
    expected, found = (
        specdec.generate(model, PROMPTS, drafter, engine=made, **OPTIONS) for made in ("eager", ENGINES[engine]())
    )
    assert texts(found) == texts(expected)


@pytest.mark.parametrize(("name", "depth"), [("qwen3_5", 0), ("mamba2", 1), ("mamba", 0)])
def test_compiled_passes_over_nodes_give_the_same_text(name, depth, monkeypatch):
    """Code generation is left out: it takes long."""
    monkeypatch.setattr("specdec.models.compilation._part", lambda graph, inputs: graph)
    torch._dynamo.reset()
    model = HYBRIDS[name]()
    drafter = ModelDrafter(disturbed(model), Chain(depth)) if depth else None
    expected, found = (
        specdec.generate(model, PROMPTS, drafter, engine=engine, **OPTIONS) for engine in ("eager", "compile")
    )
    assert texts(found) == texts(expected)


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "mamba"])
def test_steps_do_not_wait_for_the_host(name, monkeypatch):
    monkeypatch.setattr(specdec_kernels, "DEVICES", {"meta"})
    model = HYBRIDS[name]()
    assert not reads_of(model, None)
    assert not reads_of(model, ModelDrafter(disturbed(model), Widths([2, 1])))


def test_threads_that_run_one_model_get_the_texts_that_they_would_get_alone():
    model = HYBRIDS["qwen3_5"]()
    gate, left = Gate(model.model.layers[2]), state(model)
    drafter = ModelDrafter(disturbed(model), Chain(2))
    alone = texts(specdec.generate(model, PROMPTS, drafter, **OPTIONS))
    plain = reference(model, PROMPTS[2], max_new_tokens=10).tolist()
    ours = gate.stopped(lambda: specdec.generate(model, PROMPTS, drafter, **OPTIONS))  # stands within a pass
    assert reference(model, PROMPTS[2], max_new_tokens=10).tolist() == plain
    assert texts(specdec.generate(model, PROMPTS, drafter, **OPTIONS)) == alone
    theirs = gate.stopped(lambda: reference(model, PROMPTS[2], max_new_tokens=10))
    assert texts(ours.end()) == alone
    assert theirs.end().tolist() == plain
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: texts(specdec.generate(model, PROMPTS, drafter, **OPTIONS)), range(4)))
    assert found == [alone] * 4
    assert state(model) == left


def once(counter, number, error):
    """A hook that raises the error when it is called for the `number`-th time."""

    def hook(*_):
        counter.append(None)
        if len(counter) == number:
            raise error

    return hook


@pytest.mark.parametrize(
    "error", [RuntimeError("planted"), KeyboardInterrupt("planted")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("part", ["x_proj", "convolve", "recur"])
def test_a_pass_that_fails_within_a_recurrent_layer_leaves_no_layer_waiting(part, error, monkeypatch):
    """x_proj is computed between the convolution and the recurrence; the others fail inside of these."""
    model, calls = HYBRIDS["mamba"](), []
    target, plain = specdec.ModelTarget(model), reference(model, PROMPTS[2])
    expected = texts(specdec.generate(target, PROMPTS, **OPTIONS))
    with monkeypatch.context() as patch:
        if part == "x_proj":
            handle = model.backbone.layers[1].mixer.x_proj.register_forward_hook(once(calls, 3, error))
        else:
            handle = None
            whole, fail = getattr(RecurrentLayer, part), once(calls, 3, error)
            patch.setattr(RecurrentLayer, part, lambda *args, **kw: fail() or whole(*args, **kw))
        with pytest.raises(type(error), match="planted"):
            specdec.generate(target, PROMPTS, **OPTIONS)
        assert len(calls) == 3
        if handle:
            handle.remove()
    assert torch.equal(reference(model, PROMPTS[2]), plain)
    assert texts(specdec.generate(target, PROMPTS, **OPTIONS)) == expected


@pytest.mark.parametrize("number", [4, 5])  # of the call that is interrupted: of the first commit, or of the second
@pytest.mark.parametrize("said", [(), (3,)], ids=["as it is", "with more to read"])
@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "mamba"])
def test_a_run_that_is_interrupted_while_states_change_may_be_resumed(name, said, number, monkeypatch):
    model, calls, keep = HYBRIDS[name](), [], RecurrentLayer.keep
    fail = once(calls, number, KeyboardInterrupt())
    stream = specdec.stream(model, PROMPTS, keep=True, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(RecurrentLayer, "keep", lambda *args: fail() or keep(*args))
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    written = stream.generation.tokens
    goes_on = [torch.cat([*each, torch.tensor(said).long()]) for each in zip(PROMPTS, written, strict=True)]
    expected = texts(specdec.generate(model, goes_on, **OPTIONS))
    assert texts(specdec.generate(model, goes_on, resume=stream.generation, **OPTIONS)) == expected


FUNCTIONS = {  # of modelling modules
    "qwen3_5": ["causal_conv1d_fn", "torch_chunk_gated_delta_rule"],
    "mamba2": ["causal_conv1d_fn", "mamba2_chunk_scan"],
    "lfm2": ["causal_conv1d_fn"],
}


@pytest.mark.parametrize(("name", "function"), [(name, each) for name in FUNCTIONS for each in FUNCTIONS[name]])
def test_functions_that_others_wrap_around_a_run_and_take_away_again_change_no_text(name, function, monkeypatch):
    model = HYBRIDS[name]()
    module, calls = sys.modules[type(model).__module__], []
    expected = [reference(model, prompt, max_new_tokens=10, eos_token_id=None).tolist() for prompt in PROMPTS]
    found = getattr(module, function)
    plain = getattr(found, "__wrapped__", found)  # as the module has it where nobody has served
    monkeypatch.setattr(module, function, plain)
    for inner in (plain, found):  # a profiler comes before us or after us
        with monkeypatch.context() as patch:
            patch.setattr(module, function, lambda *args, _inner=inner, **kw: calls.append(None) or _inner(*args, **kw))
            assert texts(specdec.generate(model, PROMPTS, **OPTIONS)) == expected
        assert texts(specdec.generate(model, PROMPTS, **OPTIONS)) == expected
    assert calls


@pytest.mark.parametrize(("name", "function"), [(name, each) for name in FUNCTIONS for each in FUNCTIONS[name]])
def test_a_function_that_is_replaced_in_the_midst_of_a_run_ends_it_with_an_error(name, function, monkeypatch):
    model, calls = HYBRIDS[name](), []
    target = specdec.ModelTarget(model)
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, function, served := getattr(module, function))

    def rebind(*_):
        calls.append(None)
        if len(calls) == 4:
            setattr(module, function, served.__wrapped__)

    handle = model.get_input_embeddings().register_forward_hook(rebind)
    with pytest.raises(RuntimeError, match="function of the modelling module replaced during the run"):
        specdec.generate(target, PROMPTS, **OPTIONS)
    handle.remove()
    expected = [reference(model, prompt, max_new_tokens=10, eos_token_id=None).tolist() for prompt in PROMPTS]
    assert texts(specdec.generate(target, PROMPTS, **OPTIONS)) == expected


@pytest.mark.parametrize("name", ["qwen3_5", "mamba", "lfm2"])
def test_a_hook_may_run_another_model_of_the_class_within_a_pass(name):
    model = HYBRIDS[name]()
    other = disturbed(model)
    expected = [reference(model, prompt, max_new_tokens=10, eos_token_id=None).tolist() for prompt in PROMPTS]
    heard = other(torch.tensor([[1, 2, 3]])).logits
    found = []
    layer = next(part for each, part in model.named_modules() if each.endswith("layers.1"))
    layer.register_forward_hook(lambda *_: found.append(other(torch.tensor([[1, 2, 3]])).logits))
    assert texts(specdec.generate(model, PROMPTS, **OPTIONS)) == expected
    assert found and all(torch.equal(each, heard) for each in found)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # a second adapter
@pytest.mark.parametrize("names", [["two"], ["one", "two", "__base__"]], ids="-".join)
@pytest.mark.parametrize("name", ["mamba2", "lfm2"])
def test_each_row_may_have_its_own_adapter_and_there_may_be_one_row(name, names):
    options = LoraConfig(r=4, target_modules=["in_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(HYBRIDS[name](), options, adapter_name="one")
    model.add_adapter("two", options)
    model.eval()
    tokens = torch.arange(1, 31).reshape(3, 10)[: len(names)]
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "max_new_tokens": 10}
    found = model.generate(**call, adapter_names=names, custom_generate=specdec.custom_generate(NgramDrafter()))
    assert torch.equal(found, expected := model.generate(**call, adapter_names=names))
    assert not torch.equal(expected, model.generate(**call))


WRAPPERS = {
    "itself": lambda drafter: drafter,
    "fallback": lambda drafter: Fallback(SuffixDrafter(), drafter),
    "paused": lambda drafter: Paused(drafter, patience=99),
}


@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_a_draft_that_must_read_what_its_target_copies_reads_it_in_chunks(wrapped, entered, monkeypatch):
    """The target's keys are there for the whole beginning, but the draft has a state where a prompt ended alone."""
    monkeypatch.setattr("specdec.slots._CHUNK", 4)
    target, draft = llama(dtype=torch.float32), HYBRIDS["mamba2"]()
    prompts, tokens = [*ending(3), torch.tensor([9]), *ending(4)], [40, 5, 3]
    drafter = WRAPPERS[wrapped](ModelDrafter(draft, Chain(2)))
    found = specdec.generate(target, prompts, drafter, max_new_tokens=tokens, stop_tokens=(), batch_size=2)
    assert texts(found) == [plain(target, [each], n)[0] for each, n in zip(prompts, tokens, strict=True)]
    assert entered[0] == 44 and max(entered[1:]) <= 4 and sum(entered[1:]) >= 44


def test_a_copied_cache_goes_on_by_itself():
    layout = layout_of(HYBRIDS["falcon_h1"]())
    made = TreeCache(layout, 2, 8, torch.device("cpu"), 3)
    made.take({row: Source(made, row, 0) for row in range(2)})
    copied = copy.deepcopy(made)
    assert all(layer._cache is copied for layer in copied.layers)
    for layer in copied.recurrent:
        layer.state += 1
    assert all(int(layer.state.count_nonzero()) == 0 for layer in made.recurrent)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.0196), (torch.float32, 0.0274)], ids=str)
def test_what_a_node_takes_is_small_beside_a_state(dtype, share):
    """By arithmetic, in the sizes of Qwen3-Next-80B: 2 * 16 + 32 heads of 128 are convolved, and 32 have a state."""
    config = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 128,
              "linear_value_head_dim": 128}  # fmt: skip
    [shape, *_] = (each.recurrent for each in layout_of(HYBRIDS["qwen3_5"](dtype, **config)))
    node, whole = sum(each.bytes for each in shape.kept.values()), shape.state.bytes
    assert (whole, node) == (8 * 128 * 128 * 4, (4 * 128 + 8 * 128 + 8) * 4)
    assert shape.input.bytes == (2 * 4 * 128 + 8 * 128) * dtype.itemsize
    assert shape.bytes(5) - shape.bytes(4) == node + shape.input.bytes
    # every quarter of the heads has the same share
    assert (node + shape.input.bytes) / whole == pytest.approx(share, rel=0.01)


def test_states_that_do_not_fit_into_memory_are_refused_before_the_run_with_their_size(monkeypatch):
    model, tree = HYBRIDS["mamba"](), Widths([2, 1])
    [shape] = {repr(each): each.recurrent for each in layout_of(model)}.values()
    one, two = (2 * shape.bytes(5, states) for states in (1, 2))
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * one)
    assert one < two and 3 * one // two == 2
    match = r"Recurrent states, {}trees of 5 nodes, keys and values of {} texts .*; pass batch_size=2"
    drafter = ModelDrafter(disturbed(model), tree)
    with pytest.raises(ValueError, match=match.format("", 4)):
        specdec.generate(model, PROMPTS, drafter, **OPTIONS)
    with pytest.raises(ValueError, match=match.format("two a row, ", 3)):
        specdec.generate(model, PROMPTS, drafter, batch_size=3, **OPTIONS)
    assert len(specdec.generate(model, PROMPTS, drafter, batch_size=2, **OPTIONS).tokens) == len(PROMPTS)
    assert TreeCache([LayerShape(recurrent=shape)], 1, 99, torch.device("cpu"), 5).room == 5


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor that is made within has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.numbers = max([self.numbers, *made])
        return out


def test_with_a_decay_for_each_channel_no_tensor_grows_with_the_square_of_the_nodes_times_the_channels():
    made, nodes, heads, dim = torch.Generator().manual_seed(0), 48, 2, 32
    query, key, value, gate = (torch.randn(1, nodes, heads, dim, generator=made) for _ in range(4))
    state, beta = torch.zeros(1, heads, dim, dim), torch.ones(1, nodes, heads)
    with Largest() as largest:
        ancestors = chain(1, nodes, torch.device("cpu")).ancestors
        gated_delta(query, key, value, -gate.abs(), beta, state, ancestors, torch.empty_like(value))
    assert 0 < largest.numbers <= heads * nodes * max(2 * dim, nodes)
