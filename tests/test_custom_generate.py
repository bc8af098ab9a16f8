"""`model.generate(custom_generate=specdec.custom_generate(...))` returns what `model.generate` returns."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, wraps

import pytest
import torch
from hybrid_models import HYBRIDS
from tiny_models import GATE, PROMPTS, VOCAB, llama, padded, state
from tiny_models import REFUSED as REFUSED_MODELS
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

import specdec
from specdec import Law, Sampling
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.huggingface.generation_config import split
from specdec.models.cache import GENERATE_CACHE
from specdec.models.ready import UnsupportedModel
from specdec.rules import BlockVerification
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
ROUNDING = 1e-12  # the same float64 operations in another order
PAIR = specdec.demo.load()
TARGET, DRAFT, TWIN = llama(0), llama(1), llama(0)  # the twin's drafts are accepted: steps of many tokens


ONE, RAGGED = padded(PROMPTS[:1]), padded(PROMPTS)


def both(model, inputs, method=None, **options):
    """transformers' own result, and that of specdec."""
    method = method or specdec.custom_generate(ModelDrafter(TWIN, Widths([2, 1, 1, 1])))
    call = {"max_new_tokens": 12, "do_sample": False, **inputs, **options}
    return model.generate(**call), model.generate(**call, custom_generate=method)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 24, 8)], ids=["one prompt", "ragged batch of 3"])
@pytest.mark.parametrize("ending", [False, True], ids=["no EOS in the text", "EOS in the text"])
def test_greedy_text_of_the_demo_pair_is_that_of_transformers(rows, ending):
    texts = [p.text for p in PAIR.prompts[rows]]
    inputs = PAIR.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ends = {"eos_token_id": int(PAIR.target.generate(**inputs, max_new_tokens=4)[0, -1])} if ending else {}
    method = specdec.custom_generate(ModelDrafter(PAIR.draft, Widths([3, 1])))
    expected, got = both(PAIR.target, inputs, method, max_new_tokens=16, **ends)
    assert got.dtype == torch.int64 and torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_sliding"])
def test_greedy_text_of_other_models_is_that_of_transformers(kind):
    model = GATE[kind]()
    before = state(model)
    expected, got = both(model, RAGGED, specdec.custom_generate(NgramDrafter()))
    assert torch.equal(got, expected)
    assert state(model) == before


class Forbid(LogitsProcessor):
    """Knows the rows by their place, as processors of a batch may: bans another token in each."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, (torch.arange(len(scores)) + 20)[:, None], -torch.inf)


OPTIONS = [
    {"repetition_penalty": 1.8},
    {"guidance_scale": 2.0},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 8, "eos_token_id": [7, 30]},
    {"min_length": 16, "eos_token_id": [7, 30]},
    {"max_length": 25, "max_new_tokens": None},
    {"exponential_decay_length_penalty": (3, 1.5)},
    {"forced_eos_token_id": 9},
    {"logits_processor": LogitsProcessorList([Forbid()])},
    {"prefix_allowed_tokens_fn": lambda row, text: list(range(row, VOCAB, 2))},
    {"pad_token_id": None, "eos_token_id": [3, 7, 30]},
    {"eos_token_id": None},
    {"eos_token_id": -1},
    {"pad_token_id": None, "eos_token_id": [7, -1, VOCAB, 30]},
    {"use_cache": False},
    {"cache_implementation": "static"},
]


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_arguments_mean_what_they_mean_to_transformers(options):
    expected, got = both(TARGET, RAGGED, **options)
    assert torch.equal(got, expected)


def test_without_a_drafter_it_decodes_all_the_same():
    expected, got = both(TARGET, RAGGED, specdec.custom_generate())
    assert torch.equal(got, expected)


LAWS = [
    ({"top_k": 0}, Sampling(1.0)),
    ({"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.02}, Sampling(0.7, 9, 0.8, 0.02)),
    ({"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)]), "top_k": 5}, Sampling(0.5, 5)),
    ({"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)]), "top_k": 0}, Sampling(1.0, 3)),
]


@pytest.mark.parametrize(
    ("options", "sampling"), LAWS, ids=lambda part: "-".join(part) if isinstance(part, dict) else ""
)
def test_sampled_text_is_that_of_generate_with_the_same_seed(options, sampling):
    drafter, rule = ModelDrafter(DRAFT, Chain(3)), BlockVerification()
    method = specdec.custom_generate(drafter, rule=rule, seed=5)
    got = TARGET.generate(**ONE, do_sample=True, max_new_tokens=12, custom_generate=method, **options)
    out = specdec.generate(TARGET, PROMPTS[0], drafter, rule=rule, sampling=sampling, seed=5, max_new_tokens=12)
    assert got[0, len(PROMPTS[0]) :].tolist() == out.tokens[0].tolist()


WARPERS = [TemperatureLogitsWarper(0.6), TopKLogitsWarper(12), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)]
ORDERS = {
    "usual": WARPERS,
    "reversed": WARPERS[::-1],
    "twice": [WARPERS[0], WARPERS[1], WARPERS[0]],
    "nucleus before temperature": [WARPERS[2], WARPERS[0]],
    "keeps several tokens": [TopPLogitsWarper(0.1, min_tokens_to_keep=4)],
    "finite filter": [TopKLogitsWarper(5, filter_value=-1.0)],
    "another in between": [WARPERS[0], Forbid(), WARPERS[3]],
}


@pytest.mark.parametrize("order", ORDERS)
def test_warpers_keep_their_law_in_any_order(order):
    logits = torch.randn(2, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    text = torch.zeros(2, 1, dtype=torch.int64)
    expected = LogitsProcessorList(ORDERS[order])(text, logits).softmax(-1)  # type: ignore[arg-type]
    fields, processors = split(GenerationConfig(do_sample=True), ORDERS[order])
    got = Sampling(**fields).probabilities(LogitsProcessorList(processors)(text, logits))  # type: ignore[arg-type]
    assert float((got - expected).abs().max()) <= ROUNDING


def test_the_seed_is_drawn_from_torch_unless_it_is_given():
    def sample(before, **seed):
        torch.manual_seed(before)
        method = specdec.custom_generate(ModelDrafter(DRAFT), **seed)
        return TARGET.generate(**RAGGED, do_sample=True, max_new_tokens=12, custom_generate=method).tolist()

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, seed=4) == sample(2, seed=4)
    method, texts = specdec.custom_generate(), [sample(1)]
    torch.manual_seed(1)
    texts = [TARGET.generate(**ONE, do_sample=True, max_new_tokens=12, custom_generate=method) for _ in range(2)]
    assert not torch.equal(*texts)  # each call draws anew


def test_several_texts_of_one_prompt_are_samples_of_their_own():
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "eos_token_id": None}
    got = TARGET.generate(**ONE, **options, custom_generate=specdec.custom_generate(seed=0))
    assert got.shape == (3, 17) and len({tuple(row) for row in got.tolist()}) == 3


def test_a_result_in_full_has_the_text_and_the_trace():
    expected, got = both(TARGET, RAGGED, return_dict_in_generate=True)
    assert isinstance(got, GenerateDecoderOnlyOutput) and torch.equal(got.sequences, expected.sequences)
    assert got.scores is got.logits is got.attentions is got.hidden_states is None
    assert got.get(GENERATE_CACHE) is None
    assert got.trace.summary()["acceptance_length"] >= 1


SCORED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 12}


def assert_same_scores(got, expected, ends=(), fills=0):
    """Equal to those of transformers up to where each text ends; 0 for the token that fills the row after it."""
    assert len(got.scores) == len(got.logits) == len(expected.scores)
    new = got.sequences[:, -len(got.scores) :]
    over = torch.isin(new, torch.tensor(ends)).cumsum(1).roll(1, 1).index_fill(1, torch.tensor(0), 0) > 0
    filled = torch.full((VOCAB,), -torch.inf).index_fill(0, torch.tensor(fills), 0)
    for name in ("scores", "logits"):
        assert {(part.shape, part.dtype) for part in got[name]} == {((len(new), VOCAB), torch.float32)}
        found, right = torch.stack(got[name], 1), torch.stack(expected[name], 1)
        torch.testing.assert_close(found, torch.where(over[..., None], filled, right), atol=1e-4, rtol=0)
    transitions = partial(TARGET.compute_transition_scores, normalize_logits=True)
    found, right = (transitions(out.sequences, out.scores) for out in (got, expected))
    torch.testing.assert_close(found, right.where(~over, 0), atol=1e-4, rtol=0)
    return over


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.8}, {"min_new_tokens": 8}], ids="-".join)
def test_scores_and_logits_of_a_greedy_text_are_those_of_transformers(options):
    ends = [7, 30, 25]  # texts end at different lengths
    expected, got = both(TARGET, RAGGED, **SCORED, eos_token_id=ends, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert assert_same_scores(got, expected, ends).any()


FILTERS = [
    {"top_k": 0},
    {"temperature": 0.01, "top_k": 20},  # most probabilities round to 0 in float32
    {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
    {"logits_processor": LogitsProcessorList([Forbid()]), "top_k": 0, "top_p": 0.9},
]


@pytest.mark.parametrize("engine", ["eager", "tape"])
@pytest.mark.parametrize("options", FILTERS, ids="-".join)
@pytest.mark.filterwarnings("ignore:engine")  # logits processors
def test_scores_and_logits_of_a_sampled_text_are_those_of_transformers(options, engine, monkeypatch):
    made = "eager" if engine == "eager" else specdec.Graphs(capture=specdec.testing.Tape)
    method = specdec.custom_generate(ModelDrafter(DRAFT, Widths([2, 1])), seed=3, engine=made)
    call = {**RAGGED, **SCORED, "do_sample": True, "eos_token_id": None, **options}
    got = TARGET.generate(**call, custom_generate=method)
    tokens = iter(got.sequences[:, -12:, None].unbind(1))
    # transformers' own loop draws the same tokens
    monkeypatch.setattr(torch, "multinomial", lambda probs, num_samples: next(tokens))
    expected = TARGET.generate(**call)
    assert torch.equal(got.sequences, expected.sequences)
    assert not assert_same_scores(got, expected).any()


def test_scores_are_kept_only_if_asked_for():
    for name, other in (("scores", "logits"), ("logits", "scores")):
        call = {"return_dict_in_generate": True, f"output_{name}": True}
        expected, got = both(TARGET, RAGGED, **call)
        assert getattr(got, other) is None and torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(got[name]), torch.stack(expected[name]), atol=1e-4, rtol=0)
    assert isinstance(both(TARGET, RAGGED, output_scores=True)[1], torch.Tensor)


def test_scores_end_where_a_stopping_criterion_cuts_the_text():
    class Sums(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, 12:].sum(1) > 150

    options = {"stopping_criteria": StoppingCriteriaList([Sums()]), "eos_token_id": [7]}
    expected, got = both(TARGET, RAGGED, **SCORED, **options)
    assert torch.equal(got.sequences, expected.sequences) and len(got.scores) == len(expected.scores) < 12
    over = torch.stack(got.scores, 1)[..., 0] == 0
    assert over.any() and torch.equal(got.sequences[:, 12:][over], torch.zeros_like(got.sequences[:, 12:][over]))
    kept = ~over[..., None].expand(-1, -1, VOCAB)
    found, right = torch.stack(got.scores, 1)[kept], torch.stack(expected.scores, 1)[kept]
    torch.testing.assert_close(found, right, atol=1e-4, rtol=0)


class Recorder(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def put(self, value):
        self.told.append(value.tolist())

    def end(self):
        self.told.append("end")


def wrapped(method):
    """As a user would to time it."""

    def timed(*args, **kwargs):
        return method(*args, **kwargs)

    return timed


WRAPS = {
    "itself": lambda method: method,
    "wrapped": wrapped,
    "partial": partial,
    "named": lambda m: wraps(m)(wrapped(m)),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("ends", [None, 30])
def test_a_streamer_is_told_what_transformers_tells_it(ends, wrap):
    expected, got = Recorder(), Recorder()
    options = {**ONE, "max_new_tokens": 12, "eos_token_id": ends}
    TARGET.generate(**options, streamer=expected)
    method = WRAPS[wrap](specdec.custom_generate(ModelDrafter(TWIN)))
    TARGET.generate(**options, streamer=got, custom_generate=method)
    assert got.told == expected.told


def test_a_streamer_is_told_the_end_after_an_error():
    def fail(input_ids, scores):
        if input_ids.shape[1] > 8:
            raise RuntimeError("of a processor")
        return scores

    streamer, refused = Recorder(), Recorder()
    options = {**ONE, "max_new_tokens": 12, "custom_generate": specdec.custom_generate()}
    with pytest.raises(RuntimeError, match="of a processor"):
        TARGET.generate(**options, streamer=streamer, logits_processor=[fail])
    assert len(streamer.told) == 1 + 4 + 1 and streamer.told[-1] == "end"
    with pytest.raises(ValueError, match="one prompt at a time"):
        TARGET.generate(**{**options, **RAGGED}, streamer=refused)
    assert len(refused.told) == 2 and refused.told[-1] == "end"


@pytest.mark.parametrize("wrap", WRAPS)
def test_an_assistant_is_refused_however_the_loop_is_called(wrap):
    method = WRAPS[wrap](specdec.custom_generate())
    with pytest.raises(ValueError, match="ModelDrafter"):
        TARGET.generate(**ONE, max_new_tokens=2, assistant_model=DRAFT, custom_generate=method)


def test_a_loop_in_another_thread_is_refused_as_it_cannot_see_the_streamer():
    method, streamer = specdec.custom_generate(), Recorder()

    def elsewhere(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(method, *args, **kwargs).result()

    with pytest.raises(ValueError, match="in the same thread"):
        TARGET.generate(**ONE, max_new_tokens=2, streamer=streamer, custom_generate=elsewhere)


class Sum(StoppingCriteria):
    """Ends a text by what is in all of it, padding too."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(1) % 11 == 0


@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one", "ragged"])
def test_stopping_criteria_cut_where_transformers_stops(inputs):
    options = {"stopping_criteria": StoppingCriteriaList([Sum()]), "return_dict_in_generate": True}
    expected, got = both(TARGET, inputs, **options, eos_token_id=[7, 30])
    assert torch.equal(got.sequences, expected.sequences)
    for row, text in enumerate(got.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
        told = [(step.emitted[row], step.accepted[row], step.tried[row]) for step in got.trace.steps]
        assert sum(emitted for emitted, _, _ in told) == len(bytes(text).rstrip(b"\0"))  # 0 is the padding
        assert all(accepted <= tried <= emitted for emitted, accepted, tried in told)


class OddRows(ModelDrafter):
    """Drafts for every other row, so that rows grow by unequal steps."""

    def propose(self, context, coins):
        tree = super().propose(context, coins)
        laws = tree.laws.clone()
        laws[::2, 1:] = Law.PADDING
        return replace(tree, laws=laws)


class Shorter(MaxLengthCriteria):
    """Says something else than its `max_length`."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 18)


class OtherEnd(EosTokenCriteria):
    """Says something else than its `eos_token_id`."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 0


@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("make", [lambda: Shorter(100), lambda: Shorter(14), lambda: OtherEnd([5])])
def test_subclasses_of_the_criteria_of_transformers_are_asked(make, inputs):
    expected, got = both(TARGET, inputs, max_new_tokens=20, eos_token_id=7, stopping_criteria=[make()])
    assert torch.equal(got, expected)
    assert not torch.equal(got, TARGET.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=7))


class Asked(StoppingCriteria):
    """Keeps what it is asked about, and answers as `end` says."""

    def __init__(self, end):
        self.end, self.texts = end, []

    def __call__(self, input_ids, scores, **kwargs):
        self.texts.append(input_ids.tolist())
        return self.end(input_ids, len(self.texts))


def each(truth):
    return lambda ids, calls: torch.full((len(ids),), truth(ids, calls))


CRITERIA = {
    "never": each(lambda ids, calls: False),
    "after some calls": each(lambda ids, calls: calls >= 8),
    "when every row has a token": each(lambda ids, calls: bool((ids[:, 12:] > 40).any(1).all())),
    "when any row has a token": each(lambda ids, calls: bool((ids[:, 12:] > 40).any())),
    "one row after the other": lambda ids, calls: torch.arange(len(ids)) * 3 + 1 == calls,
    "all but the first": lambda ids, calls: (torch.arange(len(ids)) > 0) & (calls >= 2),
    "by what a row holds": lambda ids, calls: ids.sum(1) % 11 == 0,
}


CRITERIA_RUNS = [(kind, RAGGED, ends) for kind in CRITERIA for ends in (None, 7, [7, 30], -1)]
CRITERIA_RUNS += [(kind, ONE, None) for kind in CRITERIA]


@pytest.mark.parametrize(("kind", "inputs", "ends"), CRITERIA_RUNS)
def test_criteria_are_asked_what_transformers_asks_and_end_the_same_texts(kind, inputs, ends):
    drafter = OddRows(TWIN, Chain(4))
    answers, asked = [], []
    for options in ({}, {"custom_generate": specdec.custom_generate(drafter)}):
        criterion = Asked(CRITERIA[kind])
        options |= {**inputs, "eos_token_id": ends, "max_new_tokens": 20, "stopping_criteria": [criterion]}
        answers.append(TARGET.generate(**options, do_sample=False).tolist())
        asked.append(criterion.texts)
    assert answers[0] == answers[1] and asked[0] == asked[1]


def test_a_time_limit_ends_a_text():
    _, got = both(TARGET, ONE, max_time=0.0)
    assert got.shape[1] == len(PROMPTS[0]) + 1
    _, got = both(TARGET, RAGGED, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)]))
    assert got.shape[1] == RAGGED["input_ids"].shape[1] + 1


@pytest.mark.parametrize("as_config", [False, True], ids=["argument", "generation config"])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 24, 8)], ids=["one prompt", "ragged batch of 3"])
def test_stop_strings_and_their_tokenizer_mean_what_they_mean_to_transformers(rows, as_config):
    texts = [p.text for p in PAIR.prompts[rows]]
    inputs = PAIR.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 24, "do_sample": False, "stop_strings": ["if not", "return", "_"]}
    if as_config:
        options = {"generation_config": GenerationConfig(**options, eos_token_id=0, pad_token_id=0)}
    options |= {**inputs, "tokenizer": PAIR.tokenizer}
    expected = PAIR.target.generate(**options)
    got = PAIR.target.generate(**options, custom_generate=specdec.custom_generate(ModelDrafter(PAIR.draft)))
    assert torch.equal(got, expected)
    longer = PAIR.target.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert not torch.equal(got, longer[:, : got.shape[1]]) or got.shape[1] < longer.shape[1]  # some text has been cut


def test_stop_strings_pass_through_a_function_that_wraps_the_loop():
    options = PAIR.tokenizer(PAIR.prompts[0].text, return_tensors="pt") | {
        "max_new_tokens": 24,
        "stop_strings": "if not",
    }
    expected = PAIR.target.generate(**options, tokenizer=PAIR.tokenizer)
    method = WRAPS["named"](specdec.custom_generate(ModelDrafter(PAIR.draft)))
    assert torch.equal(PAIR.target.generate(**options, tokenizer=PAIR.tokenizer, custom_generate=method), expected)


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="`tokenizer` argument"):
        PAIR.target.generate(**ONE, max_new_tokens=2, stop_strings="x", custom_generate=specdec.custom_generate())


def test_an_engine_serves_one_call_after_the_other():
    method = specdec.custom_generate(ModelDrafter(DRAFT, Chain(2)), engine="graph")
    for inputs in (ONE, RAGGED, RAGGED):
        expected, got = both(TARGET, inputs, method)
        assert torch.equal(got, expected)


REFUSED = {
    "beams": ({"num_beams": 2}, "set num_beams=1"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
    "assistant": ({"assistant_model": DRAFT}, "ModelDrafter"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions.*leave them out"),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    "cache": ({GENERATE_CACHE: DynamicCache()}, f"{GENERATE_CACHE}: .*leave it out"),
    "quantised cache": ({"cache_implementation": "quantized"}, "in full and on the model's device"),
    "synchronised processes": ({"synced_gpus": True}, "synced_gpus"),
    "embeddings": ({"inputs_embeds": torch.zeros(4, 12, 32)}, "inputs_embeds"),
    "streamed batch": ({"streamer": Recorder()}, "one prompt at a time"),
    "right padding": ({"attention_mask": RAGGED["attention_mask"].flip(1)}, "padding_side='left'"),
    "positions": ({"position_ids": torch.arange(12).expand(4, -1)}, "position_ids"),
    "too long": ({"max_length": 12, "max_new_tokens": None}, "max_length"),
    "longer than the context": ({"max_new_tokens": 256}, "context of 256"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_left_out_is_refused(case):
    options, cure = REFUSED[case]
    with pytest.raises(ValueError, match=cure):
        call = {"max_new_tokens": 8, "do_sample": False, **RAGGED, **options}
        TARGET.generate(**call, custom_generate=specdec.custom_generate(NgramDrafter()))


@pytest.mark.parametrize(
    ("method", "cure"),
    [
        (specdec.custom_generate, r"call it: .*custom_generate=specdec.custom_generate\(drafter\)"),
        (
            NgramDrafter(),
            r"NgramDrafter is neither a decoding loop .*custom_generate=specdec.custom_generate\(drafter\)",
        ),
    ],
    ids=["not called", "a drafter"],
)
def test_what_is_no_loop_is_refused_and_not_ignored(method, cure):
    with pytest.raises(ValueError, match=cure):
        TARGET.generate(**ONE, max_new_tokens=4, custom_generate=method)


def test_arguments_in_the_wrong_place_are_told_theirs():
    with pytest.raises(ValueError, match=r"given a BlockVerification too.*custom_generate\(drafter, rule=...\)"):
        specdec.custom_generate(NgramDrafter(), BlockVerification())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'sampling'.*model.generate\(..., do_sample=True, temperature=..."):
        specdec.custom_generate(NgramDrafter(), sampling=Sampling(0.7))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen3_5", "mamba", "jamba"])
def test_models_with_recurrent_state_decode_in_their_own_call(name):
    model, options = HYBRIDS[name](), {"max_new_tokens": 12, "do_sample": False}
    ids = torch.arange(3, 12)[None]
    expected = model.generate(ids, **options)
    assert torch.equal(
        model.generate(ids, **options, custom_generate=specdec.custom_generate(NgramDrafter())), expected
    )


@pytest.mark.parametrize("kind", ["bloom", "t5"])
def test_a_model_that_is_not_supported_is_refused_by_name(kind):
    model = REFUSED_MODELS[kind][0]()
    with pytest.raises(UnsupportedModel, match=type(model).__name__):
        ids = torch.tensor([[1, 2, 3]])
        model.generate(ids, max_new_tokens=2, bos_token_id=1, custom_generate=specdec.custom_generate())
