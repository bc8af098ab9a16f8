"""Memory of a run is its own: it is counted, kept for the next run of its kind within a limit, and freed with its engine."""

import contextlib
import gc
import threading
import types
import weakref

import pytest
import torch
from captured import DRAFT, DRAFTERS, OPTIONS, TARGET, collecting_nothing, counted_graphs
from hybrid_models import HYBRIDS
from test_capture_failures import CUDA, Machine
from test_threads import together
from tiny_models import PROMPTS
from torch import Tensor, nn

import specdec
from specdec import ModelTarget, Sampling
from specdec.arguments import as_request
from specdec.drafters import Drafter, ModelDrafter
from specdec.engines.cuda_graph import CudaCapture
from specdec.engines.pool import Pool
from specdec.loop import Decoding
from specdec.models import memory
from specdec.models.causal_lm import CausalLM
from specdec.testing import Tape
from specdec.trees import Chain

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:engine. the stage")
SHARED = (  # what runs share, and what leads to everything
    nn.Module, ModelTarget, Drafter, CausalLM, specdec.Graphs, torch._ops.OpOverload, type, types.ModuleType,
    types.FunctionType,
)  # fmt: skip


def storages(owner):
    """Bytes by address of all memory that can be reached from here, but for models and descriptions."""
    found, seen, left = {}, set(), [owner]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, SHARED):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            found |= {storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {}
        else:
            left += gc.get_referents(one)
    return found


def weights(*models):
    return {p.untyped_storage().data_ptr() for m in models for p in (*m.parameters(), *m.buffers())}


def taking(engine, drafter, target=TARGET, prompts=PROMPTS, **options):
    return specdec.generate(target, prompts, drafter, engine=engine, **{**OPTIONS, **options})


SMALL = 1 << 14  # bytes of buffers that nobody counts: coins, places of nodes


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", ["none", "chain", "heads", "features", "layers left out", "suffixes, then a model"])
def test_bytes_that_wait_are_those_that_ended_runs_hold(name, batch_size):
    engine, drafter = specdec.Graphs(), DRAFTERS[name](DRAFT)
    taking(engine, drafter, batch_size=batch_size)
    ((_, parts, counted, _),) = engine._pool._idle
    held = storages(parts)
    own = sum(
        size for address, size in held.items() if address not in weights(TARGET, DRAFT, *parts.description.models)
    )
    assert own - SMALL - own // 20 <= counted == engine.pooled_bytes <= own


def test_recurrent_states_and_graphs_are_counted():
    model = HYBRIDS["mamba2"]()
    plain, engine = (specdec.Graphs(capture=capture) for capture in (None, Tape))
    for each in (plain, engine):
        taking(each, None, target=model)
    ((_, parts, counted, _),) = engine._pool._idle
    assert plain.pooled_bytes >= sum(
        part.nbytes for layer in parts.target.cached.cache.recurrent for part in layer.parts
    )
    assert counted == plain.pooled_bytes + sum(graph.bytes for graph in parts.batch.stages.graphs.values())
    assert counted > plain.pooled_bytes


def test_the_oldest_parts_are_dropped_beyond_the_limit(caches):
    target, (engine, made) = ModelTarget(TARGET), counted_graphs()

    def captures(rows):
        before = len(made)
        taking(engine, None, target, PROMPTS[:rows])
        return len(made) - before

    assert captures(3) == 4
    most = engine.pooled_bytes  # of three rows; of one and two together it is less
    engine, made = counted_graphs(pool_bytes=most * 5 // 4)
    assert [captures(rows) for rows in (1, 2, 1, 2)] == [4, 4, 0, 0]
    assert 0 < engine.pooled_bytes <= most * 5 // 4
    del caches[:]
    assert [captures(rows) for rows in (3, 3)] == [4, 0]  # one and two rows had to go: the older of them, and the other
    assert engine.pooled_bytes <= most * 5 // 4
    assert captures(1) == 4
    with collecting_nothing():
        assert engine.drop() and not engine.drop()
        assert engine.pooled_bytes == 0 and not any(cache() for cache in caches)


def test_what_is_larger_than_the_limit_is_not_kept_and_nothing_is_kept_by_0_bytes(caches):
    engine = specdec.Graphs()
    taking(engine, None, prompts=PROMPTS[:1])
    most = engine.pooled_bytes
    engine = specdec.Graphs(pool_bytes=most)
    taking(engine, None, prompts=PROMPTS[:1])
    with pytest.warns(UserWarning, match="is not kept"):
        taking(engine, None)  # and does not drop what was there
    assert engine.pooled_bytes == most and any(cache() for cache in caches)
    engine = specdec.Graphs(pool_bytes=1000)
    with pytest.warns(
        UserWarning, match=r"takes [\d,]+ bytes and is not kept .* may take 1,000: .* Raise Graphs\(pool_b"
    ):
        taking(engine, None)
    taking(specdec.Graphs(pool_bytes=0), None)
    assert engine.pooled_bytes == 0 and not any(cache() for cache in caches)
    for wrong in (-1, 1.5, "1 GB"):
        with pytest.raises(ValueError, match=r"pool_bytes=.*give a number of bytes; 0 keeps nothing"):
            specdec.Graphs(pool_bytes=wrong)


def test_by_default_a_quarter_of_the_memory_may_wait(monkeypatch):
    engine = specdec.Graphs()
    taking(engine, None)
    size = engine.pooled_bytes
    monkeypatch.setattr(specdec.runs, "all_memory", lambda device: 4 * size - 1)
    engine = specdec.Graphs()
    with pytest.warns(UserWarning, match=f"takes {size:,} bytes"):
        taking(engine, None)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize(
    "name", ["none", "dynamic", "heads", "layers left out", "suffixes, then a model", "chain, paused"]
)
def test_memory_is_freed_with_its_engine_at_once(name, batch_size, caches):
    engine, drafter = specdec.Graphs(capture=Tape), DRAFTERS[name](DRAFT)
    with collecting_nothing():
        taking(engine, drafter, batch_size=batch_size)
        graphs = [weakref.ref(captured.graph) for stages in engine._stages for captured in stages.graphs.values()]
        assert graphs and any(cache() for cache in caches)
        del engine
        assert not any(cache() for cache in caches) and not any(graph() for graph in graphs)


def test_compiled_passes_hold_no_memory_of_their_runs(caches, monkeypatch):
    monkeypatch.setattr("specdec.models.compilation._part", lambda graph, inputs: graph)
    torch._dynamo.reset()
    engine = specdec.Graphs(compile=True)
    taking(engine, None)
    with collecting_nothing():  # but for what the compiler has left in circles
        del engine
        assert len(caches) == 1 and not caches[0]()


def test_a_run_that_finds_too_little_memory_takes_that_which_waits(monkeypatch):
    engine, target = specdec.Graphs(), ModelTarget(TARGET)
    taking(engine, None, target)
    first = engine.pooled_bytes

    def free(device):  # room for one such run
        return 2 * first - first // 2 - engine.pooled_bytes

    monkeypatch.setattr(memory, "free_memory", free)
    found = taking(engine, None, target, PROMPTS[:3])
    assert 0 < engine.pooled_bytes < first  # the first is gone
    assert all(map(torch.equal, found.tokens, taking("eager", None, prompts=PROMPTS[:3]).tokens))
    with pytest.raises(memory.DoesNotFit):
        taking(engine, None, target, PROMPTS * 4)


@pytest.mark.parametrize("name", ["chain", "dynamic", "heads", "layers left out", "suffixes, then a model"])
def test_runs_side_by_side_share_no_memory(name):
    engine, drafter, target = specdec.Graphs(capture=Tape), DRAFTERS[name](DRAFT), ModelTarget(TARGET)
    options = {**OPTIONS, "sampling": Sampling(1.0), "engine": engine}
    known = weights(TARGET, DRAFT, *drafter.models)
    for _ in range(2):  # the second two go on in what the first two gave back
        with contextlib.ExitStack() as stack:
            runs = [stack.enter_context(Decoding(as_request(target, PROMPTS, drafter, **options))) for _ in range(2)]
            while not all(run.finished for run in runs):
                for run in runs:
                    if not run.finished:
                        run.step()
            one, other = (storages(run.runs).keys() - known for run in runs)
            assert one and other and not one & other
            assert runs[0].emitted == runs[1].emitted
        assert len(engine._pool._idle) == 2
    assert runs[0].emitted == [text.tolist() for text in taking("eager", drafter, sampling=Sampling(1.0)).tokens]


def test_threads_side_by_side_share_no_memory():
    engine, drafter, target = specdec.Graphs(capture=Tape), ModelDrafter(DRAFT, Chain(3)), ModelTarget(TARGET)
    expected = [text.tolist() for text in taking("eager", drafter, sampling=Sampling(1.0)).tokens]

    def run():
        return [text.tolist() for text in taking(engine, drafter, target, sampling=Sampling(1.0)).tokens]

    for _ in range(2):
        assert together([run] * 3) == [expected] * 3
    owned = [storages(parts).keys() - weights(TARGET, DRAFT) for _, parts, _, _ in engine._pool._idle]
    assert len(set().union(*owned)) == sum(map(len, owned))


def test_threads_capture_one_at_a_time(monkeypatch):
    """Torch refuses a capture while another one goes on, whatever thread that is in."""
    machine, inside, go = Machine(monkeypatch), threading.Event(), threading.Event()

    def slow():
        inside.set()
        assert go.wait(60)

    def later():
        assert inside.wait(60)
        threading.Timer(0.05, go.set).start()
        return CudaCapture(CUDA)(lambda: "later").outputs

    assert together([lambda: CudaCapture(CUDA)(slow).outputs, later]) == [None, "later"]
    assert not machine.recording


def test_bytes_of_a_graph_are_those_that_its_pool_has_grown_by(monkeypatch):
    machine, gigabyte = Machine(monkeypatch), 1 << 30
    capture = CudaCapture(CUDA)
    graphs = [capture(lambda size=size: machine.allocate(size)) for size in (gigabyte, 0, 3)]
    other = CudaCapture(CUDA)(lambda: machine.allocate(5))
    assert [graph.bytes for graph in graphs] == [gigabyte, 0, 3] and other.bytes == 5


def test_a_run_that_python_collects_while_the_pool_is_at_work_adds_its_parts():
    """An exception's traceback may hold a stream in a circle; the collector may begin wherever Python runs."""
    engine, armed = specdec.Graphs(), []

    class Collects(ModelDrafter):
        def __eq__(self, other):
            if armed and armed.pop():
                gc.collect()
            return self is other

        __hash__ = ModelDrafter.__hash__

    drafters = [Collects(DRAFT, Chain(2)) for _ in range(2)]
    taking(engine, drafters[0])  # waits in the pool
    with collecting_nothing():
        stream = specdec.stream(TARGET, PROMPTS, drafters[1], engine=engine, **OPTIONS)
        next(stream)
        circle = [stream]
        circle.append(circle)
        del stream, circle
        armed.append(True)
        taking(engine, drafters[1])
    assert len(engine._pool._idle) == 3 and not armed


def test_what_is_added_while_the_lock_is_held_waits_for_who_holds_it():
    class Part:
        bytes, device_memory = 10, None

    pool = Pool(limit=25)
    with pool._lock:
        for key in range(3):
            pool.add(key, Part())
    assert pool.bytes == 20 and pool.take(0) is None and pool.take(2) is not None and pool.take(2) is None
