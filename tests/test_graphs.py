"""Captured steps are the same steps: proved with a stand-in for CUDA graphs that replays operations on any device."""

import contextlib
import copy
import threading
import warnings

import pytest
import torch
from captured import (
    DRAFT,
    DRAFTERS,
    ON_HOST,
    OPTIONS,
    SAMPLINGS,
    SCORES_CAPTURED,
    TARGET,
    assert_replays,
    counted_graphs,
    heads,
    texts,
)
from test_models import MODELS
from tiny_models import PROMPTS, VOCAB, llama
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import specdec
import specdec_kernels.reference.verify
from specdec import Law, ModelTarget, Sampling
from specdec.arguments import as_request
from specdec.drafters import (
    Fallback,
    LayerSkipDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
    SuffixDrafter,
)
from specdec.engines.host_reads import HostReads
from specdec.loop import Decoding
from specdec.rules import BlockVerification, LenientRejection, SiblingRejection
from specdec.testing import Tape
from specdec.trees import Chain, Dynamic, Static
from specdec.trees.base import Grown, TreeRun

GREEDY = [(name, "greedy") for name in ("dynamic", "suffixes, then a model")]


@pytest.mark.parametrize(
    ("name", "sampling"), [*((name, "nucleus") for name in DRAFTERS if name not in ON_HOST), *GREEDY]
)
def test_replaying_gives_the_same_text(name, sampling):
    assert_replays(name, sampling, specdec.Graphs(capture=Tape))


@pytest.mark.parametrize("rule", [SiblingRejection(), LenientRejection(0.5), BlockVerification()])
def test_static_shapes_without_capture_give_the_same_text(rule):
    for drafter in (ModelDrafter(DRAFT, Chain(3)), NgramDrafter(3)):
        expected, found = (texts(drafter, e, rule=rule, sampling=Sampling(1.0)) for e in ("eager", "graph"))
        assert all(map(torch.equal, found, expected))


def test_trees_of_one_size_and_other_shapes_are_scored_as_they_are():
    prompts, runs = [torch.tensor([3, 4] * 4), torch.tensor([5, 6, 7])], []
    for engine in ("eager", "graph", specdec.Graphs(capture=Tape)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"engine": engine, "max_new_tokens": 40, "stop_tokens": ()}
            trace = specdec.generate(TARGET, prompts, NgramDrafter(4, 1, 3), **options).trace
        runs.append([step.accepted for step in trace.steps])
    assert runs[0] == runs[1] == runs[2]


def test_trees_may_promise_longer_paths_than_they_have_nodes(monkeypatch):
    monkeypatch.setattr(specdec.engines.graphs, "_BLOCK", 16)
    options = {"prompts": [torch.arange(12)], "max_new_tokens": 20, "stop_tokens": ()}  # to the end of the buffers
    for drafter in (ModelDrafter(DRAFT, Dynamic(3, 5, 1)), SuffixDrafter(nodes=2)):
        assert torch.equal(texts(drafter, "graph", **options)[0], texts(None, "eager", **options)[0])


def test_a_draft_that_was_silent_for_long_reads_no_further_than_its_buffers(monkeypatch):
    monkeypatch.setattr(specdec.engines.graphs, "_BLOCK", 16)

    class Late(Chain):
        capturable = False

        def start(self, batch, last=None):
            return LateRun(self, batch)

    class LateRun(TreeRun):
        def __init__(self, policy, batch):
            super().__init__(policy, batch)
            self.inner = Chain(1).start(batch)

        def grow(self, coins):
            if self.batch.host_lengths[0] > 40:  # it reads 40 tokens: as many as 64 would not fit
                return (yield from self.inner.grow(coins))
            tree = self.batch.undrafted()
            return Grown(tree, tree.topology.parents)

    options = {"prompts": [torch.arange(5)], "max_new_tokens": 43, "stop_tokens": ()}
    found = texts(ModelDrafter(DRAFT, Late(1)), specdec.Graphs(capture=Tape), **options)
    assert torch.equal(found[0], texts(None, "eager", **options)[0])


def counting():
    """A model that writes the next token after each."""
    model = llama(num_hidden_layers=1, max_position_embeddings=4096)
    for product in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
        product.weight.data.zero_()
    embedding = model.get_input_embeddings().weight.data
    embedding[0] = 1  # padding, which is 0
    model.lm_head.weight.data = torch.nn.functional.normalize(embedding).roll(1, 0)
    return model


@pytest.mark.filterwarnings("ignore:engine. the stage")
def test_2048_new_tokens_and_longer_texts_replay_the_same_graphs():
    target, drafter, (engine, made) = ModelTarget(counting()), NgramDrafter(15), counted_graphs()
    for length, new_tokens in ((5, 2048), (2060, 20)):  # in rooms of 2304 tokens
        options = {"prompts": [torch.arange(length) % VOCAB], "max_new_tokens": new_tokens, "stop_tokens": ()}
        found = specdec.generate(target, drafter=drafter, engine=engine, **options)
        assert torch.equal(found.tokens[0], torch.arange(length, length + new_tokens) % VOCAB)
        assert {step.nodes for step in found.trace.steps} <= {1, 16}
        assert len(made) == 2 * 2  # both sizes of trees are scored and decided on


def test_another_batch_begins_anew():
    engine, drafter = specdec.Graphs(capture=Tape), ModelDrafter(DRAFT, Chain(3))
    for prompts in (PROMPTS, PROMPTS[:2], PROMPTS):
        assert all(map(torch.equal, texts(drafter, engine, prompts), texts(drafter, "eager", prompts)))


def test_parts_that_another_engine_has_used_in_between_keep_their_graphs():
    target, drafter, (engine, made) = ModelTarget(llama()), ModelDrafter(llama(), Chain(3)), counted_graphs()
    options = {**OPTIONS, "sampling": Sampling(1.0), "stop_tokens": ()}
    for _ in range(2):
        found = specdec.generate(target, PROMPTS, drafter, engine=engine, **options)
        expected = specdec.generate(target, PROMPTS, drafter, **options)
        assert all(map(torch.equal, found.tokens, expected.tokens))
        assert min(found.summary()["acceptance_rate"]) == 1  # the model drafts for itself
        assert len(made) == 4


def test_streams_at_once_have_graphs_of_their_own_and_the_next_ones_replay_them():
    drafter, (engine, made) = ModelDrafter(DRAFT, Chain(3)), counted_graphs()
    options = {**OPTIONS, "sampling": Sampling(1.0), "stop_tokens": ()}
    expected = specdec.generate(TARGET, PROMPTS, drafter, **options).tokens
    for _ in range(2):
        streams = [specdec.stream(TARGET, PROMPTS, drafter, engine=engine, **options) for _ in range(2)]
        steps = [*zip(*streams, strict=True)]
        for one in zip(*steps, strict=True):
            assert all(map(torch.equal, map(torch.cat, zip(*one, strict=True)), expected))
        assert len(made) == 2 * 4


@pytest.mark.parametrize("name", [*ON_HOST, "suffixes, then a model", "none"])
def test_drafters_that_draft_on_the_host_replay_the_graphs_of_their_last_run(name):
    drafter, (engine, made) = DRAFTERS[name](DRAFT), counted_graphs()
    expected, counts = texts(drafter, "eager"), []
    for _ in range(4):
        assert all(map(torch.equal, texts(drafter, engine), expected))
        counts.append(len(made))
    assert 0 < counts[-2] == counts[-1]  # by then every size of tree has been seen often enough


def test_weights_that_have_moved_are_captured_again():
    model, engine = llama(), specdec.Graphs(capture=Tape)
    for _ in range(2):
        found = specdec.generate(model, PROMPTS, engine=engine, **OPTIONS).tokens
        assert all(map(torch.equal, found, specdec.generate(model, PROMPTS, **OPTIONS).tokens))
        model.float().double()
        for p in model.parameters():
            p.data = p.data.flip(0).clone()


def test_an_inner_draft_whose_weights_have_moved_is_captured_again():
    draft, (engine, made), counts = llama(1), counted_graphs(), []
    drafter = Fallback(NgramDrafter(2), ModelDrafter(draft, Chain(2)))
    for moved in (False, False, False, False, True, False):
        if moved:
            for p in draft.parameters():
                p.data = p.data.flip(0).clone()
        found, before = texts(drafter, engine), len(made)
        assert all(map(torch.equal, found, texts(drafter, "eager")))
        counts.append(before)
    assert 0 < counts[2] == counts[3] < counts[4]  # by then every size of tree has been seen often enough


def test_a_draft_whose_weights_have_moved_and_another_rule_are_captured_again():
    (engine, made), rules = counted_graphs(), {lenience: LenientRejection(lenience) for lenience in (0.2, 1.0)}
    draft, own = llama(1), heads()
    for drafter, module in ((ModelDrafter(draft, Chain(3)), draft), (MedusaDrafter(own), own)):

        def run(engine, lenience=0.2, drafter=drafter):
            options = {"rule": rules[lenience], "sampling": Sampling(1.0), "stop_tokens": ()}
            return texts(drafter, engine, **options)

        before, _ = len(made), (run(engine), run(engine))
        assert len(made) == before + 4
        for p in module.parameters():
            p.data = p.data.clone()
        run(engine)
        assert len(made) == before + 8
        assert all(map(torch.equal, run(engine, 1.0), run("eager", 1.0)))
        assert len(made) == before + 12


def test_trees_of_one_size_and_other_shapes_have_graphs_of_their_own():
    options = {**OPTIONS, "sampling": Sampling(1.0), "max_new_tokens": 40, "stop_tokens": ()}
    accepted = []
    for engine in (specdec.Graphs(capture=Tape), "eager"):
        for parents in (-1, 0, 0, 1), (-1, 0, 0, 2):
            drafter = LayerSkipDrafter(exit_layer=2, tree=Static(parents, Law.IID))
            steps = specdec.generate(TARGET, PROMPTS[0], drafter, engine=engine, **options).trace.steps
            accepted.append([step.accepted for step in steps])
    assert accepted[:2] == accepted[2:] and accepted[0] != accepted[1]


def test_what_cannot_be_captured_is_named_once():
    cases = {
        "drafts on the host": {"drafter": NgramDrafter(3)},
        "BlockVerification decides on the host": {
            "drafter": ModelDrafter(DRAFT, Chain(2)),
            "rule": BlockVerification(),
        },
        "trace='ceiling'": {"drafter": ModelDrafter(DRAFT, Chain(2)), "trace": "ceiling"},
    }
    for reason, options in cases.items():
        engine = specdec.Graphs(capture=Tape)
        with pytest.warns(UserWarning, match=reason) as caught:
            specdec.generate(TARGET, PROMPTS, engine=engine, **{**OPTIONS, **options})
        stages = {str(w.message) for w in caught}
        assert len(stages) == len(caught)
        assert engine.captured


def peek(module, args):
    assert float(args[0].sum()) >= 0


def test_a_model_that_waits_for_its_device_is_run_step_by_step():
    model = llama()
    model.get_input_embeddings().register_forward_pre_hook(peek)
    engine = specdec.Graphs(capture=Tape)
    with pytest.warns(UserWarning, match=r"'score'.*waits for the device \(aten.item"):
        found = specdec.generate(model, PROMPTS, ModelDrafter(DRAFT, Chain(3)), engine=engine, **OPTIONS).tokens
    assert all(map(torch.equal, found, texts(ModelDrafter(DRAFT, Chain(3)), "eager")))
    assert engine.captured == 3


def on_meta(run):
    """A run like this one, on a device that has no numbers to wait for."""

    def moved(tensor, memo):
        return memo.setdefault(id(tensor), tensor.detach().to("meta"))

    kinds, table, lock = (torch.Tensor, torch.nn.Parameter), copy._deepcopy_dispatch, type(threading.Lock())
    found = [kind.__deepcopy__ for kind in kinds]
    table[torch.device] = lambda device, memo: torch.device("meta")
    table[lock] = lambda held, memo: held
    try:
        for kind in kinds:
            kind.__deepcopy__ = moved
        return copy.deepcopy(run)
    finally:
        del table[torch.device], table[lock]
        for kind, method in zip(kinds, found, strict=True):
            kind.__deepcopy__ = method


def reads_of(target, drafter, sampling=SAMPLINGS["nucleus"], rule=SiblingRejection()):
    """What the host and a device with kernels wait for each other for in the stages of a step."""
    settings = {"sampling": sampling, "max_new_tokens": 24, "stop_tokens": (7,), "seed": 3}
    run = Decoding(as_request(target, PROMPTS, drafter, rule=rule, **settings, engine=specdec.Graphs()))
    run.step()
    run = on_meta(run)
    host = HostReads()
    try:
        with torch.inference_mode():
            for watched in (contextlib.nullcontext(), host):  # constants are made in the first step
                with watched:
                    tree = run._propose()
                    scores = run._score(tree)
                    run._commit(run._decide(tree, scores), scores)
    except RuntimeError as error:  # of a device that is asked for a number
        assert "meta tensor" in str(error)
        return {str(error)}
    return host.reads


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", [name for name in DRAFTERS if name not in ON_HOST + SCORES_CAPTURED])
def test_nothing_waits_for_the_host(name, sampling, monkeypatch):
    monkeypatch.setattr(specdec_kernels, "DEVICES", {"meta"})
    assert not reads_of(TARGET, DRAFTERS[name](DRAFT), SAMPLINGS[sampling])


# of the models: GPT-2 looks for padding in every input, Gemma 3n's sparse layers make a tensor each time
WAITING = {"gpt2": "item() cannot be called", "gemma3n_shared_layers": "made from Python numbers"}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_do_not_wait_for_the_host(name, monkeypatch):
    monkeypatch.setattr(specdec_kernels, "DEVICES", {"meta"})
    found = reads_of(MODELS[name](torch.bfloat16), None)
    assert WAITING[name] in str(found) if name in WAITING else not found


def test_what_waits_is_found(monkeypatch):
    monkeypatch.setattr(specdec_kernels, "DEVICES", {"meta"})

    class Listed(Chain):
        def start(self, batch, last=None):
            batch.tokens[:, [0, 1]]  # not in a step
            return ListedRun(self, batch)

    class ListedRun(TreeRun):
        def grow(self, coins):
            self.batch.tokens[:, [0, 1]]
            return Chain(2).start(self.batch).grow(coins)

    assert reads_of(TARGET, ModelDrafter(DRAFT, Listed(2))) == {"a tensor made from Python numbers"}


def test_states_are_those_of_the_step_whatever_else_runs_step_by_step(monkeypatch):
    monkeypatch.setattr(specdec.engines.graphs, "_BLOCK", 16)
    waits, options = llama(), {"max_new_tokens": 40, "sampling": Sampling(1.0)}
    waits.get_input_embeddings().register_forward_pre_hook(peek)
    for model, rule in ((waits, SiblingRejection()), (TARGET, BlockVerification())):
        engine, drafter = specdec.Graphs(capture=Tape), MedusaDrafter(heads(), Chain(3))
        for seed in (3, 4):
            settings = {**options, "target": model, "rule": rule, "seed": seed, "prompts": PROMPTS[1:3]}
            expected, found = (texts(drafter, e, **settings) for e in ("eager", engine))
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", SCORES_CAPTURED)
def test_scores_that_are_replayed_fit_those_that_are_not(name):
    engine, drafters = specdec.Graphs(capture=Tape), [DRAFTERS[name](DRAFT) for _ in range(2)]
    for seed in range(8):
        options = {"prompts": PROMPTS[1:3], "sampling": Sampling(1.0), "seed": seed, "max_new_tokens": 9}
        expected, found = (texts(*each, **options) for each in zip(drafters, ("eager", engine), strict=True))
        assert all(map(torch.equal, found, expected))


def test_engines_that_there_are_not():
    with pytest.raises(ValueError, match="engine='fast': must be one of 'eager', 'graph', 'compile'"):
        specdec.generate(TARGET, PROMPTS, engine="fast")


def test_what_watches_steps_in_several_threads_takes_turns():
    entered, left = threading.Event(), threading.Event()

    def watch():
        with HostReads():
            entered.set()
            left.wait(10)

    other = threading.Thread(target=watch)
    with HostReads():
        other.start()
        assert not entered.wait(0.1)
    assert entered.wait(10)
    left.set()
    other.join()
    assert not is_in_torch_dispatch_mode()
