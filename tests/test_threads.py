"""Several threads run one model: each gets the text that it would get alone, and the model is found as it was left.

Threads are made to overlap by a hook in which a pass stops until it is let go on: after masks were made, before the last
layers attend.
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
import torch
from tiny_models import GATE, MATRIX, PROMPTS, llama, padded, state

import specdec
from specdec.drafters import LayerSkipDrafter, ModelDrafter, NgramDrafter
from specdec.models.fingerprint import fingerprint
from specdec.models.probe import layout_of
from specdec.models.routing import Route, passing_through
from specdec.trees import Chain

torch.set_num_threads(1)
TIMEOUT = 60  # seconds, after which a test that waits for ever fails
OPTIONS = {"max_new_tokens": 12, "stop_tokens": ()}


class Gate:
    """A hook of the model's owner in which chosen threads stop once."""

    def __init__(self, module):
        self.stops, self.passes = {}, 0
        module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.passes += 1
        stop = self.stops.pop(threading.get_ident(), None)
        if stop:
            stop.reached.set()
            assert stop.go.wait(TIMEOUT)

    def stopped(self, work, *args):
        """A thread that does this work, once it stands in its first pass."""
        return Stopped(self, work, args)


class Stopped:
    def __init__(self, gate, work, args):
        self.reached, self.go, self._gate = threading.Event(), threading.Event(), gate
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(self._run, work, args)
        self._future.add_done_callback(lambda _: self.reached.set())
        assert self.reached.wait(TIMEOUT)
        if self._future.done():
            self._future.result()
            raise AssertionError("It did not stop.")

    def _run(self, work, args):
        self._gate.stops[threading.get_ident()] = self
        return work(*args)

    def end(self):
        """What the work gives."""
        self.go.set()
        return self._future.result(TIMEOUT)


def alone(work, *args):
    """What the work gives in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *args).result(TIMEOUT)


def together(works):
    """What pieces of work give that begin at the same time, in threads that take turns often."""
    barrier, interval = threading.Barrier(len(works)), sys.getswitchinterval()

    def begin(work):
        barrier.wait(TIMEOUT)
        return work()

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            return [future.result(TIMEOUT) for future in [pool.submit(begin, work) for work in works]]
    finally:
        sys.setswitchinterval(interval)


def run(model, drafter=None, prompts=PROMPTS, **options):
    """The new tokens of each row."""
    return [t.tolist() for t in specdec.generate(model, prompts, drafter, **{**OPTIONS, **options}).tokens]


def plain(model, prompts=PROMPTS):
    """The same of transformers' own greedy generate, over a batch that is padded on the left."""
    inputs = padded(prompts)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def set_to(implementation, kind="llama"):
    """A model with this attention, its gate, and its text."""
    model = GATE[kind]()  # float32: in float64, transformers' eager attention makes NaN of rows that see nothing
    model.set_attn_implementation(implementation)
    gate, expected = Gate(model.model.layers[1]), plain(model)
    assert run(model) == expected
    return model, gate, expected


ORDERS = list(permutations(range(3)))
ATTENTION = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


@ATTENTION
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_runs_end_in_any_order(order, implementation):
    model, gate, expected = set_to(implementation)
    found = state(model)
    runs = [gate.stopped(run, model) for _ in order]
    for which in order:
        assert runs[which].end() == expected
        assert run(model) == expected
    assert state(model) == found
    assert plain(model) == expected


@ATTENTION
@pytest.mark.parametrize("kind", ["llama", "gemma3_sliding"])
def test_plain_generate_within_a_run(kind, implementation):
    model, gate, expected = set_to(implementation, kind)
    found, within = state(model), gate.stopped(run, model, NgramDrafter())
    assert state(model) == found
    assert alone(plain, model) == expected
    assert within.end() == expected
    assert state(model) == found


@ATTENTION
@pytest.mark.parametrize("kind", ["llama", "gemma3_sliding"])
def test_a_run_within_a_pass_of_plain_generate(kind, implementation):
    model, gate, expected = set_to(implementation, kind)
    found, whole, begun = state(model), gate.stopped(plain, model), gate.stopped(plain, model)
    assert run(model) == expected
    assert whole.end() == expected
    within = gate.stopped(run, model)
    assert begun.end() == expected  # it was unrouted when it made its mask, and the model is routed now
    after = gate.stopped(plain, model)
    assert within.end() == expected
    assert after.end() == expected  # and the reverse
    assert state(model) == found


def test_one_prompt_has_no_mask_of_sdpa_and_right_texts():
    model, gate, _ = set_to("sdpa")
    expected = plain(model, PROMPTS[:1])
    within = gate.stopped(run, model, None, PROMPTS[:1])
    assert alone(plain, model, PROMPTS[:1]) == expected
    begun = gate.stopped(plain, model, PROMPTS[:1])
    assert [within.end(), begun.end()] == [expected] * 2


def test_attention_that_somebody_sets_during_a_run_stays_set():
    model, gate, expected = set_to("sdpa")
    within = gate.stopped(run, model)
    alone(model.set_attn_implementation, "eager")
    assert alone(plain, model) == expected
    assert within.end() == expected
    assert model.config._attn_implementation == "eager"
    assert plain(model) == expected


def test_a_pass_that_fails_ends_for_its_own_thread_alone():
    model, gate, expected = set_to("sdpa")
    found, failing = state(model), set()

    def fail(module, args):
        if threading.get_ident() in failing:
            raise RuntimeError("out of memory")

    def failing_run():
        failing.add(threading.get_ident())
        return run(model, LayerSkipDrafter(skip=[1], tree=Chain(2)))

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    run(model)
    first, within, last = gate.stopped(run, model), gate.stopped(failing_run), gate.stopped(run, model)
    assert first.end() == expected
    with pytest.raises(RuntimeError, match="out of memory"):
        within.end()
    assert alone(plain, model) == expected
    assert last.end() == expected
    handle.remove()
    assert state(model) == found


def test_layers_are_left_out_in_one_thread_alone():
    model, _, expected = set_to("sdpa")
    found, layers = state(model), model.model.layers
    with passing_through(layers[:1]):
        without = plain(model)
    assert without != expected
    with passing_through(layers[:1]):
        assert alone(plain, model) == expected
        assert alone(run, model, LayerSkipDrafter(skip=[0, 2], tree=Chain(2))) == expected
        assert plain(model) == without
    assert state(model) == found


@pytest.mark.parametrize("own", [False, True], ids=["of the class", "of its own"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_layers_left_out_come_back_in_any_order(order, own):
    model, _, expected = set_to("sdpa")
    layer = model.model.layers[0]
    if own:  # as accelerate's hooks are
        layer.forward = lambda *args, forward=layer.forward, **kwargs: forward(*args, **kwargs)
    before, seen = vars(layer).get("forward"), fingerprint(model, numbers=True)
    gate = Gate(model.lm_head)
    seen = fingerprint(model, numbers=True)

    def without():
        with passing_through([layer]):
            return plain(model)

    alone_without = alone(without)
    threads = [gate.stopped(without) for _ in order]
    for which in order:
        assert fingerprint(model, numbers=True) == seen  # of runs that begin now
        assert alone(plain, model) == expected
        assert threads[which].end() == alone_without
    assert vars(layer).get("forward") is before
    assert plain(model) == expected


def test_a_forward_function_that_somebody_sets_while_its_layer_is_left_out_stays():
    model, _, expected = set_to("sdpa")
    layer = model.model.layers[0]
    with passing_through([layer]):
        layer.forward = lambda *args, forward=layer.forward, **kwargs: forward(*args, **kwargs)
        hooked = layer.forward
        assert plain(model) != expected
    assert vars(layer)["forward"] is hooked
    assert plain(model) == expected


def test_a_probe_within_a_probe_of_another_model():
    one, other = llama(), llama(1)
    within = Gate(one.model.layers[0]).stopped(layout_of, one)  # before its attention was called
    assert layout_of(other) == within.end()


def test_a_fresh_model_is_probed_by_one_of_many_threads():
    counted, model = llama(), llama()
    gates = [Gate(m.lm_head) for m in (counted, model)]
    layout = layout_of(counted)
    assert together([lambda: layout_of(model)] * 8) == [layout] * 8
    assert gates[0].passes == gates[1].passes > 0


def test_a_module_is_looked_at_while_another_thread_hooks_it():
    module, ended = torch.nn.Identity(), threading.Event()
    before = fingerprint(module, numbers=True)

    def hook_often():
        while not ended.is_set():
            with passing_through([module]):
                module.register_forward_pre_hook(lambda *_: None).remove()

    def look():
        try:
            return [fingerprint(module, numbers=True).count("forward") for _ in range(20000)]
        finally:
            ended.set()

    assert together([hook_often, look])[1] == [0] * 20000
    assert fingerprint(module, numbers=True) == before


@pytest.mark.parametrize("kind", ["llama", "gemma3n_shared_layers"])
def test_many_runs_and_plain_generates_at_once(kind):
    """From the first of all on: the model is fresh."""
    model, small = {**GATE, **MATRIX}[kind](dtype=torch.float64), llama(1, num_hidden_layers=1)
    found, expected = state(model), plain(model)
    last = model.config.get_text_config().num_hidden_layers - 1

    def drafters():
        return [None, NgramDrafter(), LayerSkipDrafter(exit_layer=last), ModelDrafter(small, Chain(2))]

    works = [lambda d=d: run(model, d) for d in drafters() + drafters()] + [lambda: plain(model)] * 2
    assert together(works) == [expected] * len(works)
    assert state(model) == found
    assert plain(model) == expected


def test_compiled_code_asks_the_thread_that_runs_it():
    model = llama()
    config, implementation = model.config, model.config._attn_implementation
    route, graphs = Route(model, "other"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=False)
    def routed(x):
        return x + 1 if config._attn_implementation == "other" and route.here else x

    zero = torch.zeros(1)
    assert routed(zero) == 0
    with route:
        assert routed(zero) == 1
        assert alone(routed, zero) == 0
        with route, Route(llama(1), "another"):
            assert routed(zero) == 1
        assert routed(zero) == 1
    assert routed(zero) == 0
    assert config._attn_implementation == implementation


def test_a_compiled_run_beside_plain_generate(monkeypatch):
    monkeypatch.setattr("specdec.models.compilation._part", lambda graph, inputs: graph)
    model = llama()
    expected, found = plain(model), state(model)
    drafter = LayerSkipDrafter(skip=[1], tree=Chain(2))
    works = [lambda: run(model, drafter, engine="compile"), lambda: plain(model)]
    assert together(works) == [expected] * 2
    assert state(model) == found
