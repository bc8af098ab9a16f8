"""Every supported model scores a batch of ragged trees in one forward pass as it scores their paths one by one."""

import copy
import random

import pytest
import torch
from tiny_models import GATE, LIMITED, MATRIX, PROMPTS, REFUSED, VOCAB, state
from tiny_models import reference as by_transformers
from transformers import AttentionInterface, AutoModelForCausalLM, QuantoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

import specdec
from specdec import DraftTree, Law
from specdec.arguments import as_request
from specdec.batch import Batch
from specdec.drafters import ModelDrafter, NoDrafter
from specdec.models import attention
from specdec.models.attention import View
from specdec.models.cache import TreeCache
from specdec.models.ready import UnsupportedModel
from specdec.models.target import ModelTarget
from specdec.outcome import Outcome
from specdec.rules.base import Decisions
from specdec.tree import Topology
from specdec.trees import Widths
from specdec_kernels.reference import tree_attention as reference

torch.set_num_threads(1)

# Largest difference of a logit from the plain model's, as a fraction of the largest logit. Batches of other shapes round
# differently, a few units in the last place per layer; a wrong mask or position shows in the first digit or two.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
WRONG = 1e-3

# These round to float32 inside (softmax, router, rotation): in float64 they are no more exact than in float32.
ROUNDED_INSIDE = {(name, torch.float64) for name in ("gemma2_softcap_sliding", "deepseek_v3_latent", "llama4_chunked")}

NODES = 7
FATES = ["accept all", "reject all", "stop", "accept some"]


class Walk:
    """A batch that grows by chance: random trees of which random paths are accepted, without a drafter or a rule."""

    def __init__(self, model, steps, seed=0, plain=None):
        self.plain, self.target, self.steps = plain or copy.deepcopy(model), ModelTarget(model), steps
        self.random, prompts = random.Random(seed), [*PROMPTS, torch.arange(10, 30)]  # some longer than the window
        request = as_request(self.target, prompts, max_new_tokens=steps * NODES)
        longest = max(text.longest for text in request.texts)
        self.batch = Batch(len(prompts), longest + NODES, VOCAB, torch.device("cpu"))
        self.batch.begin(request, request.texts, longest)

    def differences(self):
        """The largest difference of every step."""
        with torch.inference_mode():
            self.run = self.target.start(self.batch)
            self.run.enter([*range(len(self.batch))], NoDrafter().start(self.run, self.batch))
            for step in range(self.steps):
                tree = self._random_tree()
                logits = self.run.score(tree).logits
                yield max(self._difference(row, tree, logits[row]) for row in range(len(self.batch)))
                self._commit(tree, step)

    def _random_tree(self):
        rows = [self._random_row(int(text[-1])) for text in self.batch.texts]
        tokens, parents, laws = (torch.tensor(column) for column in zip(*rows, strict=True))
        return DraftTree(tokens, Topology(parents, depth=NODES - 1), laws.to(torch.uint8))

    def _random_row(self, root):
        tokens, parents, laws = [root], [-1], [Law.POINT]
        for node in range(1, NODES):
            parents.append(self.random.randrange(node))
            tokens.append(self.random.randrange(VOCAB))
            padding = self.random.random() < 0.2 or laws[parents[node]] == Law.PADDING
            laws.append(Law.PADDING if padding else Law.POINT)
        return tokens, parents, laws

    def _difference(self, row, tree, logits):
        """Between the logits of a row's nodes and those of the plain model on the full text of each path."""
        found = []
        for path in paths_to_leaves(tree, row):
            text = self.batch.texts[row].tolist() + tree.tokens[row, path[1:]].tolist()
            alone = self.plain(torch.tensor([text]), use_cache=False).logits[0, -len(path) :]
            found.append(float((logits[path] - alone).abs().max() / alone.abs().max()))
        return max(found)

    def _commit(self, tree, step):
        """Rows meet their fates in turn; each step every fate is met by some row."""
        batch = len(self.batch)
        path = torch.tensor([[0, *self.random.choices(range(NODES), k=NODES - 1)] for _ in range(batch)])
        accepted, left = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), NODES)
        for row in range(batch):
            fate, leaf = FATES[(step + row) % len(FATES)], self.random.choice(paths_to_leaves(tree, row))
            count = {"accept all": len(leaf), "reject all": 1}.get(fate) or self.random.randint(1, len(leaf))
            path[row, :count], accepted[row] = torch.tensor(leaf[:count]), count - 1
            left[row] *= fate != "stop"
        token, never = torch.tensor(self.random.choices(range(VOCAB), k=batch)), torch.zeros(batch, dtype=torch.bool)
        decisions = Decisions(path, accepted, token)
        outcome = Outcome.of(tree, decisions, torch.tensor([], dtype=torch.int64), left, (never, never))
        self.batch.append(outcome)
        self.run.commit(outcome)
        self.batch.note(outcome)


def paths_to_leaves(tree, row):
    """The node indices from the root to every leaf that is no padding."""
    parents, laws = tree.topology.parents[row].tolist(), tree.laws[row].tolist()
    real = [node for node in range(NODES) if laws[node] != Law.PADDING]
    inner = {parents[node] for node in real}
    paths = []
    for node in set(real) - inner:
        path = [node]
        while path[0]:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return paths


MODELS = {**GATE, **MATRIX}
CASES = [(name, dtype) for name in MODELS for dtype in TOLERANCE if (name, dtype) not in ROUNDED_INSIDE]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_ragged_trees_in_one_forward_equal_their_paths(name, dtype):
    walk = Walk(MODELS[name](dtype), steps=8 if name in GATE else 4)
    assert max(walk.differences()) < TOLERANCE[dtype]


def plant_causal_mask(patch):
    def earlier_nodes(view):
        return torch.ones_like(view.topology.ancestors).tril()[:, -view.count :]

    patch.setattr(View, "ancestors", property(earlier_nodes))


def plant_full_mask(patch):
    patch.setattr(View, "_allowed", property(lambda view: torch.ones(len(view.lengths), 1, view.count, view.slots) > 0))
    pack = reference.pack
    patch.setattr(reference, "pack", lambda ancestors: pack(ancestors) | -1)


def plant_slots_as_positions(patch):
    patch.setattr(View, "positions", property(lambda view: view.lengths[:, None] + torch.arange(view.count)))


def plant_first_nodes_committed(patch):
    keep = TreeCache.keep
    patch.setattr(TreeCache, "keep", lambda cache, path, n: keep(cache, torch.arange(NODES).expand_as(path), n))


def plant_stopped_rows_grow(patch):
    keep = TreeCache.keep
    patch.setattr(TreeCache, "keep", lambda cache, path, n: keep(cache, path, n.clamp(min=1)))


def plant_all_rows_commit_alike(patch):
    keep = TreeCache.keep
    patch.setattr(TreeCache, "keep", lambda cache, path, n: keep(cache, path[:1].expand_as(path), n))


def plant_window_over_slots(patch):
    patch.setattr(View, "_slot_positions", property(lambda view: torch.arange(view.slots)[None, None, None]))


def plant_no_window(patch):
    bias = View.bias
    patch.setattr(View, "bias", lambda view, pattern, dtype: bias(view, causal_mask_function, dtype))
    patch.setattr(attention, "_window", lambda *_: 1 << 30)


BUGS = [plant_causal_mask, plant_full_mask, plant_slots_as_positions, plant_first_nodes_committed, plant_stopped_rows_grow,
        plant_all_rows_commit_alike]  # fmt: skip
WINDOW_BUGS = [plant_window_over_slots, plant_no_window]
# float32 goes by packed masks, which have no positions of slots, and float64 by a bias
PLANTED = [
    (name, bug, dtype)
    for name in GATE
    for bug in BUGS + WINDOW_BUGS
    for dtype in (torch.float32, torch.float64)
    if ("sliding" in name or bug not in WINDOW_BUGS) and (bug is not plant_window_over_slots or dtype == torch.float64)
]


@pytest.mark.parametrize(("name", "bug", "dtype"), PLANTED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_walk_finds_planted_bugs(name, bug, dtype, monkeypatch):
    walk = Walk(GATE[name](dtype), steps=8)
    bug(monkeypatch)
    assert any(difference > WRONG for difference in walk.differences())


@pytest.mark.parametrize("name", MATRIX)
def test_greedy_text_equals_transformers_generate(name):
    model = MATRIX[name]()
    assert_greedy_text_is_that_of_transformers(model, ModelDrafter(model, Widths((2, 2))))


def assert_greedy_text_is_that_of_transformers(model, drafter):
    out = specdec.generate(model, PROMPTS, drafter, max_new_tokens=24)
    assert [t.tolist() for t in out.tokens] == [by_transformers(model, p).tolist() for p in PROMPTS]
    assert out.summary()["acceptance_length"] > 1.5


def test_quantised_weights_decode_as_they_do_in_transformers(tmp_path):
    full = GATE["llama"]()
    full.save_pretrained(tmp_path)
    eight_bits = QuantoConfig(weights="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=eight_bits, dtype=torch.float32)
    assert model.is_quantized and not torch.equal(model(PROMPTS[0][None]).logits, full(PROMPTS[0][None]).logits)
    assert max(Walk(model, steps=4, plain=model).differences()) < TOLERANCE[torch.float32]
    assert_greedy_text_is_that_of_transformers(model, ModelDrafter(full, Widths((2, 2))))
    assert_greedy_text_is_that_of_transformers(full, ModelDrafter(model, Widths((2, 2))))


@pytest.mark.parametrize("name", LIMITED)
def test_texts_end_where_logits_begin_to_depend_on_the_forward_pass(name):
    model, limit = LIMITED[name]()
    longest = limit - max(map(len, PROMPTS))
    expected = [by_transformers(model, p, max_new_tokens=longest).tolist() for p in PROMPTS]
    out = specdec.generate(model, PROMPTS, ModelDrafter(model, Widths((2, 2))), max_new_tokens=longest)
    assert [t.tolist() for t in out.tokens] == expected
    with pytest.raises(ValueError, match=f"context of {limit}"):
        specdec.generate(model, PROMPTS, max_new_tokens=longest + 1)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_score_trees_are_refused_by_name_with_the_reason(name):
    make, reason = REFUSED[name]
    model = make()
    found = [state(model), *map(torch.clone, model.parameters())]
    with pytest.raises(UnsupportedModel, match=f"{type(model).__name__} cannot be decoded speculatively: .*{reason}"):
        specdec.generate(model, PROMPTS)
    with pytest.raises(UnsupportedModel, match=reason):
        ModelDrafter(model)
    assert state(model) == found[0]
    assert all(map(torch.equal, model.parameters(), found[1:]))


def without_softcap(*args, softcap=None, **options):
    """What transformers' sdpa did until it refused softcaps."""
    return sdpa_attention_forward(*args, **options)


def test_an_attention_that_leaves_something_out_is_named_and_all_of_it_computed(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "uncapped", without_softcap)
    model, whole = (MODELS["gemma2_softcap_sliding"](torch.float32, query_pre_attn_scalar=1) for _ in range(2))
    whole.set_attn_implementation("eager")
    model.set_attn_implementation("uncapped")
    with torch.inference_mode():
        assert not torch.allclose(model(PROMPTS[2][None]).logits, whole(PROMPTS[2][None]).logits, atol=0.01)
    with pytest.warns(UserWarning, match="'uncapped' attention leaves out .*set_attn_implementation"):
        walk = Walk(model, steps=3, plain=whole)
    assert max(walk.differences()) < TOLERANCE[torch.float32]
    assert model.config._attn_implementation == "uncapped"


def test_trees_that_no_attention_of_the_model_agrees_with_are_refused(monkeypatch):
    monkeypatch.setattr(View, "positions", property(lambda view: torch.zeros_like(view.topology.parents)))
    model = MODELS["llama"]()
    with pytest.raises(UnsupportedModel, match=r"differs from its paths by .* of the largest logit"):
        ModelTarget(model)
