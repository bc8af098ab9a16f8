"""A stage that cannot be captured is run as it stands, whenever that turns out, and leaves nothing behind."""

import gc
import warnings

import pytest
import torch
from captured import DRAFTERS, STAGES, TARGET, captured_stages
from test_partly_captured import DRAFT
from tiny_models import PROMPTS

import specdec
from specdec.engines.cuda_graph import CudaCapture
from specdec.engines.host_reads import HostReads
from specdec.rules import SiblingRejection
from specdec.testing import Tape

CUDA = torch.device("cuda", 0)
INVALID = "CUDA error: operation failed due to a previous error during capture"
BUSY = "captures_underway.empty() INTERNAL ASSERT FAILED"


class Machine:
    """What torch does to streams and memory around a capture, by torch/cuda/graphs.py and CUDAGraph.cpp, without a device."""

    def __init__(self, monkeypatch):
        self.current, self.recording, self.pinned, self.uses = "default", [], [], {}
        self.fails, self.segments = None, []
        replaced = {"CUDAGraph": self.graph, "Stream": Stream, "graph_pool_handle": object, "stream": self.stream,
                    "memory_snapshot": self.snapshot, "synchronize": lambda: None, "empty_cache": self.empty_cache}  # fmt: skip
        for name, stand_in in replaced.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        below = {"_host_emptyCache": lambda: None, "_cuda_endAllocateToPool": self.end_allocation,
                 "_cuda_releasePool": self.release}  # fmt: skip
        for name, stand_in in below.items():
            monkeypatch.setattr(torch._C, name, stand_in, raising=False)

    def graph(self):
        return StandIn(self)

    def stream(self, stream):
        return StreamContext(self, stream)

    def allocate(self, size):
        """What a stage does that is captured now."""
        self.segments.append((self.recording[-1], size))

    def snapshot(self, pool):
        return [{"total_size": size} for owner, size in self.segments if owner is pool]

    def empty_cache(self):
        if self.recording:
            raise RuntimeError(BUSY)

    def end_allocation(self, device, pool):
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device, pool):
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0

    def begin(self, pool):
        if pool in self.pinned:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.uses[pool] = self.uses.get(pool, 0) + 1
        self.recording.append(pool)
        self.pinned.append(pool)


class StreamContext:
    def __init__(self, machine, stream):
        self.machine, self.stream = machine, stream

    def __enter__(self):
        self.found, self.machine.current = self.machine.current, self.stream

    def __exit__(self, *exception):
        self.machine.current = self.found


class Stream:
    def __init__(self, device):
        self.device_index = device.index


class StandIn:
    """A torch.cuda.CUDAGraph: `capture_end` raises before it tells the allocators, if the capture is not valid any more."""

    def __init__(self, machine):
        self.machine, self.ended = machine, False

    def capture_begin(self, pool, capture_error_mode, check_input_liveness=False):
        self.pool = pool
        if self.machine.fails == "begin":
            raise RuntimeError("CUDA error: no stream to capture")
        self.machine.begin(pool)
        if self.machine.fails == "begin late":
            raise RuntimeError("CUDA error: the stream is capturing already")

    def capture_end(self):
        if self.machine.fails in ("stage", "end"):
            raise RuntimeError(f"{INVALID}\nSearch for it in the documentation.")
        self.machine.end_allocation(0, self.pool)
        self.machine.pinned.remove(self.pool)
        self.ended = True
        if self.machine.fails == "instantiate":
            raise RuntimeError("CUDA error: out of memory")

    def replay(self):
        pass

    def __del__(self):
        if self.ended:
            self.machine.release(0, self.pool)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def waiting():
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA.")


FAILURES = {
    "begin": "no stream to capture",
    "begin late": "capturing already",
    "stage": "not permitted when stream is capturing",
    "end": "previous error during capture",
    "instantiate": "out of memory",
}


@pytest.mark.parametrize("point", FAILURES)
def test_a_capture_that_fails_leaves_streams_and_memory_as_they_were(point, machine):
    capture = CudaCapture(CUDA)
    first = capture(lambda: "an earlier one")
    machine.fails = point
    with pytest.raises(RuntimeError, match=FAILURES[point]):
        capture(waiting if point == "stage" else lambda: "never given out")
    machine.fails = None
    gc.collect()  # the error holds what it met on its way
    assert machine.current == "default"
    torch.cuda.empty_cache()
    assert sorted(machine.uses.values()) == [1]  # the first graph alone holds memory
    assert capture(lambda: "a later one").outputs == "a later one"
    assert first.outputs == "an earlier one" and machine.current == "default"


def test_what_is_wrong_with_a_stage_itself_is_raised_as_it_is(machine):
    def wrong():
        raise ValueError("nodes=9, at most 8") from KeyError("nodes")

    with pytest.raises(ValueError, match="nodes=9, at most 8") as caught:
        CudaCapture(CUDA)(wrong)
    assert isinstance(caught.value.__cause__, KeyError)
    torch.cuda.empty_cache()


def test_an_interrupted_capture_leaves_streams_and_memory_as_they_were(machine):
    def interrupted():
        machine.fails = "stage"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaCapture(CUDA)(interrupted)
    torch.cuda.empty_cache()
    assert machine.current == "default"


class Failing(Tape):
    """Fails for one stage: when it is captured, when that ends, or in its first or second replay."""

    def __init__(self, stage, name, point):
        self.name = stage.__closure__[-1].cell_contents.__name__.strip("_")
        self.point, self.replays = point if self.name == name else None, 0
        super().__init__(stage)
        if self.point == "stage":
            raise RuntimeError("CUDA error: not permitted\nSearch for it in the documentation.")

    def replay(self):
        self.replays += 1
        if self.point == "replay" or (self.point == "second replay" and self.replays == 2):
            raise RuntimeError("CUDA error: out of memory")
        super().replay()


def generated(engine, temperature, **options):
    settings = {"prompts": PROMPTS[1:3], "max_new_tokens": 20, "stop_tokens": (), **options}
    sampling = specdec.Sampling(temperature)
    return specdec.generate(TARGET, drafter=DRAFTERS["chain"](DRAFT), engine=engine, sampling=sampling, **settings)


@pytest.mark.parametrize("point", ["stage", "replay", "second replay"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_of_which_the_capture_fails_is_run_as_it_stands(name, point):
    engine = specdec.Graphs(capture=lambda stage: Failing(stage, name, point))
    reason = "not permitted" if point == "stage" else "out of memory"
    for temperature in (0.0, 1.0):
        eager = generated("graph", temperature)
        with pytest.warns(UserWarning, match=f"'{name}'.*failed .RuntimeError: CUDA error: {reason}.\\.$") as caught:
            found = generated(engine, temperature)
        assert len(caught) == 1
        assert [t.tolist() for t in found.tokens] == [t.tolist() for t in eager.tokens]
        assert [s.accepted for s in found.trace.steps] == [s.accepted for s in eager.trace.steps]
        assert engine.captured >= 3


def test_a_tape_of_a_stage_that_fails_has_changed_nothing():
    found = torch.zeros(2)

    def stage():
        found.add_(1)
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        Tape(stage)
    assert found.tolist() == [0, 0]


def test_a_stage_that_was_replayed_is_run_as_it_stands_when_its_next_capture_fails(monkeypatch):
    """Graphs of later stages that read what its graphs filled are not replayed on anything else."""
    monkeypatch.setattr(specdec.engines.graphs, "_BLOCK", 16)
    captured = []

    def capture(stage):
        captured.append(Failing(stage, "propose", "stage" if len(captured) >= 4 else None))
        return captured[-1]

    engine, options = specdec.Graphs(capture=capture), {"prompts": [PROMPTS[0]], "max_new_tokens": 40}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):  # the first block again, whose graphs are there
            found = generated(engine, 0.0, **options)
            assert torch.equal(found.tokens[0], generated("eager", 0.0, **options).tokens[0])


def test_a_capture_that_failed_is_tried_again_in_the_next_run():
    left = ["stage"]
    engine = specdec.Graphs(capture=lambda stage: Failing(stage, "propose", left.pop() if left else None))
    eager = generated("graph", 0.0)
    with pytest.warns(UserWarning, match="'propose'.*failed"):
        texts = [generated(engine, 0.0).tokens]
    assert "propose" not in captured_stages(engine)
    texts += [generated(engine, 0.0).tokens for _ in range(2)]  # warnings are errors
    assert captured_stages(engine) >= {"propose", "score", "decide", "commit"}
    assert all(torch.equal(a, b) for each in texts for a, b in zip(each, eager.tokens, strict=True))


def test_a_step_that_is_interrupted_while_it_is_watched_is_watched_again():
    class Counting(SiblingRejection):
        calls = 0

        def __call__(self, tree, law, coins):
            Counting.calls += 1
            if Counting.calls == 2:
                raise KeyboardInterrupt
            torch.tensor(float(Counting.calls))  # a graph would repeat the first number
            return super().__call__(tree, law, coins)

    engine = specdec.Graphs(capture=Tape)
    options = {"rule": Counting(), "engine": engine, "max_new_tokens": 12}
    with pytest.raises(KeyboardInterrupt):
        specdec.generate(TARGET, PROMPTS[1:3], DRAFTERS["chain"](DRAFT), **options)
    with pytest.warns(UserWarning, match="'decide'.*waits for the device"):
        specdec.generate(TARGET, PROMPTS[1:3], DRAFTERS["chain"](DRAFT), **options)
    assert "decide" not in captured_stages(engine)


class SyncDebug:
    """torch.cuda's debug mode of synchronisation, and operations that wait inside of C++."""

    def __init__(self, monkeypatch, mode=0):
        self.mode, self.calls = mode, 0
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode):
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

    def wait(self, *_):
        self.calls += 1
        if self.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.mode == 1:
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp)", stacklevel=1
            )


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_waiting_inside_of_operations_is_noted_and_the_debug_mode_given_back(mode, monkeypatch):
    debug = SyncDebug(monkeypatch, mode)
    with HostReads(CUDA) as host:
        debug.wait()
    assert host.reads == {"an operation that called a synchronizing CUDA operation"}
    assert debug.mode == mode
    with pytest.raises(ZeroDivisionError), HostReads(CUDA):
        raise ZeroDivisionError
    assert debug.mode == mode
    with pytest.warns(FutureWarning, match="something else"), HostReads(CUDA) as host:
        warnings.warn("something else", FutureWarning, stacklevel=1)
    assert not host.reads


def test_a_model_that_waits_inside_of_its_operations_is_run_as_it_stands(monkeypatch):
    debug, engine = SyncDebug(monkeypatch), specdec.Graphs(capture=Tape)
    monkeypatch.setattr(specdec.engines.graphs, "HostReads", lambda device: HostReads(CUDA))
    hook = TARGET.get_output_embeddings().register_forward_pre_hook(debug.wait)
    try:
        with pytest.warns(UserWarning, match="'score'.*called a synchronizing CUDA operation"):
            found = generated(engine, 0.0)
        calls = debug.calls
        eager = generated("eager", 0.0)
    finally:
        hook.remove()
    assert [t.tolist() for t in found.tokens] == [t.tolist() for t in eager.tokens]
    assert calls > len(found.trace.steps) and debug.mode == 0  # in every step, and while the prompts were read
    assert engine.captured == 3
