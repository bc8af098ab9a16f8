"""Logits processors that keep state from call to call give transformers' text: each text has a state of its own."""

import copy
from functools import partial

import pytest
import torch
from tiny_models import PROMPTS, VOCAB, llama, padded
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

import specdec
from certificates.cases import PROMPT
from specdec import Law, Sampling
from specdec.drafters import LayerSkipDrafter, ModelDrafter, NgramDrafter, SuffixDrafter
from specdec.processors import copied
from specdec.rules import (
    BlockVerification,
    KSeq,
    LenientRejection,
    LevelVerification,
    SiblingRejection,
    TraversalVerification,
)
from specdec.testing import Table, TabularDrafter, TabularTarget, exact_law, target_law
from specdec.trees import Chain, Widths

torch.set_num_threads(1)
TARGET, DRAFT, TWIN = llama(0), llama(1), llama(0)  # the twin's drafts are accepted: steps of many tokens
ONE, RAGGED = padded(PROMPTS[:1]), padded(PROMPTS)
WAYS = {
    "sibling": (ModelDrafter(TWIN, Widths([3, 2, 1])), SiblingRejection()),
    "a poor draft": (ModelDrafter(DRAFT, Widths([3, 2])), SiblingRejection()),
    "ngram": (NgramDrafter(), SiblingRejection()),
    "suffix": (SuffixDrafter(), SiblingRejection()),
    "block": (ModelDrafter(TWIN, Chain(4)), BlockVerification()),
    "traversal": (ModelDrafter(DRAFT, Widths([2, 2, 1])), TraversalVerification()),
    "level": (ModelDrafter(TWIN, Widths([2, 2])), LevelVerification()),
}


def only(scores, allowed):
    """The scores of the allowed tokens."""
    kept = torch.full_like(scores, -torch.inf)
    kept[:, allowed] = scores[:, allowed]
    return kept


class Cycle(LogitsProcessor):
    """The number of the call says which third of the vocabulary is allowed."""

    step = 0

    def __call__(self, input_ids, scores):
        low = VOCAB // 3 * (self.step % 3)
        self.step += 1
        return only(scores, slice(low, low + VOCAB // 3))


def counter():
    """The same as a function that counts by itself."""
    calls = 0

    def process(input_ids, scores):
        nonlocal calls
        low = VOCAB // 3 * (calls % 3)
        calls += 1
        return only(scores, slice(low, low + VOCAB // 3))

    return process


def remembering():
    """As one that counts in a default, and in an attribute of its own."""

    def process(input_ids, scores, calls=[0]):  # noqa: B006 - on purpose
        low = VOCAB // 3 * ((calls[0] + process.calls) % 3)
        calls[0] += 2
        process.calls -= 1
        return only(scores, slice(low, low + VOCAB // 3))

    process.calls = 0
    return process


class Module(torch.nn.Module):
    """As a module, which counts in a number and a buffer."""

    def __init__(self):
        super().__init__()
        self.head, self.step = torch.nn.Linear(2, 2), 0
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, input_ids, scores):
        low = VOCAB // 3 * ((self.step + int(self.steps)) % 3)
        self.step += 2
        self.steps -= 1
        return only(scores, slice(low, low + VOCAB // 3))


def prefixes():
    """A grammar as transformers takes it: a function that keeps the state of each row of the batch."""
    states = {}

    def allowed(row, text):
        states[row] = (states.get(row, 0) * 7 + int(text[-1]) + 1) % VOCAB
        return [states[row], (states[row] + 9) % VOCAB]

    return allowed


class Compiled:
    """Stands for an object of a compiled library: it cannot be copied, unless by a method of its own."""

    def __reduce_ex__(self, protocol):
        raise TypeError(f"cannot pickle {type(self).__name__}")


class CompiledGrammar(Compiled):
    """After token t of a text, tokens from step * t to step * t + width - 1 follow (modulo the vocabulary), or the end."""

    def __init__(self, step, width, end=7):
        self.step, self.width, self.end = step, width, end


class Matcher(Compiled):
    """Where a text stands in a grammar."""

    def __init__(self, grammar):
        self.grammar, self.allowed, self.ended = grammar, list(range(10, 20)), False

    def accept(self, token):
        grammar = self.grammar
        self.allowed = [(grammar.step * token + i) % VOCAB for i in range(grammar.width)] + [grammar.end]
        self.ended = token == grammar.end

    def fork(self):
        other = Matcher(self.grammar)
        other.allowed, other.ended = self.allowed, self.ended
        return other


class Grammars(LogitsProcessor):
    """Made as those of grammar libraries: a matcher for every row, once the batch is known, fed its last token by each call."""

    def __init__(self, *grammars):
        self.grammars, self.matchers = grammars, []

    def __call__(self, input_ids, scores):
        if self.matchers:
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.ended:
                    assert token in matcher.allowed, "no text of this grammar"
                    matcher.accept(token)
        else:
            grammars = self.grammars if len(self.grammars) > 1 else self.grammars * len(input_ids)
            self.matchers = list(map(Matcher, grammars))
        return torch.cat([only(row, m.allowed) for row, m in zip(scores.split(1), self.matchers, strict=True)])


SEVERAL = [CompiledGrammar(3, 5), CompiledGrammar(7, 9), CompiledGrammar(1, 2), CompiledGrammar(11, 4)]
PROCESSORS = {
    "counter": Cycle,
    "function": counter,
    "in an object": lambda: partial(Cycle()),
    "remembering": remembering,
    "module": Module,
    "in one of transformers": lambda: PrefixConstrainedLogitsProcessor(prefixes(), 1),
    "grammar": lambda: Grammars(CompiledGrammar(3, 5)),
    "watermark": lambda: SynthIDTextWatermarkLogitsProcessor(5, [1, 2, 3, 4], 256, 0, 64, "cpu"),
    "guidance": lambda: UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, TARGET),
}


def same(inputs, make, way, **options):
    drafter, rule = WAYS[way]
    call = {**inputs, "max_new_tokens": 14, "do_sample": False, "eos_token_id": 7, **options}
    expected = TARGET.generate(**call, logits_processor=LogitsProcessorList([make()]))
    method = specdec.custom_generate(drafter, rule=rule)
    return torch.equal(
        TARGET.generate(**call, logits_processor=LogitsProcessorList([make()]), custom_generate=method), expected
    )


@pytest.mark.parametrize("way", ["sibling", "traversal"])
@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_processor_with_state_gives_the_text_of_transformers(kind, inputs, way):
    assert same(inputs, PROCESSORS[kind], way)


def test_the_state_of_a_function_of_allowed_tokens_stays_as_it_is():
    options = {**RAGGED, "max_new_tokens": 12, "do_sample": False}
    expected, allowed = TARGET.generate(**options, prefix_allowed_tokens_fn=prefixes()), prefixes()
    for _ in range(2):  # the second time from the same state
        method = specdec.custom_generate(ModelDrafter(TWIN, Widths([2, 1])))
        got = TARGET.generate(**options, prefix_allowed_tokens_fn=allowed, custom_generate=method)
        assert torch.equal(got, expected)


class Gradient(LogitsProcessor):
    """Follows a gradient, and keeps the last one."""

    last = torch.zeros(())

    def __call__(self, input_ids, scores):
        with torch.enable_grad():
            at = scores.detach().clone().requires_grad_()
            (at.softmax(-1) * torch.arange(VOCAB).to(at)).sum().backward()
        assert at.grad is not None
        self.last = self.last + at.grad
        self.last += input_ids.shape[1]  # in place
        return scores + 50 * at.grad + self.last


@pytest.mark.parametrize("way", ["sibling", "block"])
def test_a_processor_may_take_gradients(way):
    assert same(RAGGED, Gradient, way)


@pytest.mark.filterwarnings("ignore:engine. the stage 'decide' runs step by step")
def test_a_processor_with_state_gives_the_text_of_transformers_under_an_engine_that_captures():
    method = specdec.custom_generate(ModelDrafter(TWIN, Chain(2)), engine="graph")
    options = {**RAGGED, "max_new_tokens": 14, "do_sample": False}
    for _ in range(2):
        got = TARGET.generate(**options, logits_processor=[Cycle()], custom_generate=method)
        assert torch.equal(got, TARGET.generate(**options, logits_processor=[Cycle()]))


@pytest.mark.parametrize("way", WAYS)
def test_every_row_follows_a_grammar_of_its_own(way):
    assert same(RAGGED, lambda: Grammars(*SEVERAL), way)


def test_guidance_of_a_generation_config_has_a_state_for_each_prompt():
    config = GenerationConfig(guidance_scale=1.7, eos_token_id=7, pad_token_id=0, max_new_tokens=14)
    options = {"sampling": Sampling.from_generation_config(config), "max_new_tokens": 14}
    out = specdec.generate(TARGET, PROMPTS, ModelDrafter(TWIN, Widths([3, 2, 1])), **options)
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        expected = TARGET.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), generation_config=config)
        assert tokens.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("way", ["sibling", "traversal"])
def test_a_batch_of_generate_has_a_state_for_each_prompt(way):
    drafter, rule = WAYS[way]
    sampling = Sampling(processors=[Grammars(CompiledGrammar(3, 5))])
    out = specdec.generate(TARGET, PROMPTS, drafter, rule=rule, sampling=sampling, max_new_tokens=14, stop_tokens=7)
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        own = LogitsProcessorList([Grammars(CompiledGrammar(3, 5))])
        options = {"attention_mask": torch.ones_like(prompt[None]), "eos_token_id": 7, "max_new_tokens": 14}
        expected = TARGET.generate(prompt[None], logits_processor=own, **options)
        assert tokens.tolist() == expected[0, len(prompt) :].tolist()


class Alternating(LogitsProcessor):
    """Every other call makes token 0 likelier, and less so from call to call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + torch.eye(scores.shape[1])[0] * (1 / self.calls if self.calls % 2 else -1)


@pytest.mark.parametrize(
    "rule", [SiblingRejection(), BlockVerification(), TraversalVerification(), LevelVerification()]
)
def test_a_sampled_text_has_exactly_the_law_of_a_processor_with_state(rule):
    target, drafter = TabularTarget(2, seed=0), TabularDrafter(Table(2, seed=1), Chain(2))
    options = {"sampling": Sampling(1.0, processors=[Alternating()]), "max_new_tokens": 3}
    law = exact_law(target, PROMPT, drafter, rule=rule, merge=False, **options)  # a context does not hold the state
    assert float(law.total_variation(target_law(target, PROMPT, **options))) == 0


class InOrder(LogitsProcessor):
    """Refuses a call whose text is not the last one and one token more."""

    calls = 0  # of all copies

    def __init__(self):
        self.last = None

    def __call__(self, input_ids, scores):
        type(self).calls += 1
        text = input_ids[0].tolist()
        assert self.last is None or text[:-1] == self.last
        self.last = text
        return scores


@pytest.mark.parametrize("level", ["summary", "ceiling", "laws"])
@pytest.mark.parametrize("way", WAYS)
def test_every_copy_is_called_once_for_each_prefix_of_its_text_in_order(way, level):
    drafter, rule = WAYS[way]
    processor, InOrder.calls = InOrder(), 0
    sampling = Sampling(1.0, processors=[processor])
    out = specdec.generate(
        TARGET, PROMPTS[:2], drafter, rule=rule, sampling=sampling, max_new_tokens=12, trace=level, stop_tokens=()
    )
    assert processor.last is None, "the one that was passed has changed"
    assert InOrder.calls >= 24  # each new token is decided on
    if level == "summary" and way == "sibling":  # where every node asked for is accepted, nothing is asked twice
        assert InOrder.calls == sum(map(len, out.tokens))


@pytest.mark.parametrize("rule", [SiblingRejection(), LenientRejection(0.5), KSeq()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("draft", [DRAFT, TWIN], ids=["poor", "good"])
def test_rules_from_the_root_down_call_processors_once_for_each_token_of_the_text(rule, draft):
    InOrder.calls, drafter = 0, ModelDrafter(draft, Widths([3, 2], Law.IID))
    options = {"sampling": Sampling(1.0, processors=[InOrder()]), "max_new_tokens": 12, "stop_tokens": ()}
    out = specdec.generate(TARGET, PROMPTS[:2], drafter, rule=rule, **options)
    assert InOrder.calls == sum(map(len, out.tokens))


class Large(Cycle):
    """Counts how often it is copied."""

    copies = 0

    def __deepcopy__(self, memo):
        type(self).copies += 1
        return copy.copy(self)


@pytest.mark.parametrize("tree", [Widths([3, 2, 1]), Chain(4)], ids=["tree", "chain"])
def test_a_processor_of_one_text_is_copied_once_where_rules_decide_from_the_root_down(tree):
    Large.copies, drafter = 0, ModelDrafter(DRAFT, tree)
    options = {"sampling": Sampling(processors=[Large()]), "max_new_tokens": 16, "stop_tokens": ()}
    out = specdec.generate(TARGET, PROMPTS[0], drafter, **options)
    expected = specdec.generate(TARGET, PROMPTS[0], **options)
    assert Large.copies == 2  # in each run one
    assert torch.equal(out.tokens[0], expected.tokens[0])


class Looking(SiblingRejection):
    """Looks at every node, which it has inherited not to do."""

    def decide_batch(self, tree, target_law, coins):
        for node in range(tree.tokens.shape[1]):
            target_law.at(torch.full_like(tree.tokens[:, 0], node))
        return super().decide_batch(tree, target_law, coins)


class LookingAndSayingSo(Looking):
    top_down = False


def test_a_rule_that_is_not_what_it_says_is_told_so():
    options = {"sampling": Sampling(processors=[Cycle()]), "max_new_tokens": 8}
    drafter = ModelDrafter(TWIN, Widths([3, 2]))
    with pytest.raises(ValueError, match="top_down = False"):
        specdec.generate(TARGET, PROMPTS[0], drafter, rule=Looking(), **options)
    got = specdec.generate(TARGET, PROMPTS[0], drafter, rule=LookingAndSayingSo(), **options)
    assert torch.equal(got.tokens[0], specdec.generate(TARGET, PROMPTS[0], **options).tokens[0])


class Generated(LogitsProcessor):
    """Its state cannot be copied by anyone."""

    def __init__(self):
        self.lows = (VOCAB // 3 * (i % 3) for i in range(1000))

    def __call__(self, input_ids, scores):
        low = next(self.lows)
        return only(scores, slice(low, low + VOCAB // 3))


def test_what_cannot_be_copied_goes_along_one_text():
    assert same(ONE, Generated, "sibling") and same(ONE, Generated, "ngram")


class Idle(Generated):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("rule", "tree", "level"),
    [
        (BlockVerification(), Chain(3), "summary"),
        (TraversalVerification(), Widths([2, 2]), "summary"),
        (SiblingRejection(), Widths([2, 2]), "laws"),
    ],
)
def test_what_cannot_be_copied_is_refused_where_several_texts_are_looked_at(rule, tree, level):
    options = {"rule": rule, "trace": level, "sampling": Sampling(0.1, processors=[Idle()]), "max_new_tokens": 14}
    with pytest.raises(ValueError, match=r"Idle.*cannot pickle 'generator'.*__deepcopy__.*SiblingRejection"):
        specdec.generate(TARGET, PROMPTS[0], ModelDrafter(DRAFT, tree), **options)


def test_what_cannot_be_copied_is_refused_for_several_prompts():
    with pytest.raises(ValueError, match=r"Generated.*4 prompts.*__deepcopy__.*one prompt at a time"):
        method = specdec.custom_generate()
        TARGET.generate(**RAGGED, max_new_tokens=2, logits_processor=[Generated()], custom_generate=method)
    with pytest.raises(ValueError, match="one prompt at a time"):
        specdec.generate(TARGET, PROMPTS, sampling=Sampling(processors=[Generated()]))


class Copies(Generated):
    """The same with the cure that the refusal names."""

    def __init__(self, step=0):
        self.step = step

    def __deepcopy__(self, memo):
        return Copies(self.step)

    def __call__(self, input_ids, scores):
        low = VOCAB // 3 * (self.step % 3)
        self.step += 1
        return only(scores, slice(low, low + VOCAB // 3))


def test_the_cure_for_what_cannot_be_copied_cures():
    assert same(RAGGED, Copies, "traversal")


class Guided(LogitsProcessor):
    """Runs a model: the target or the draft, which decoding keeps in another state in the meantime."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        return scores - 0.5 * self.model(input_ids=input_ids).logits[:, -1]


@pytest.mark.parametrize("model", [TARGET, DRAFT], ids=["target", "draft"])
@pytest.mark.parametrize("skips", [False, True], ids=["draft model", "layer skip"])
def test_a_processor_may_run_the_models_of_the_pair(model, skips):
    drafter = LayerSkipDrafter(exit_layer=2) if skips else ModelDrafter(DRAFT, Widths([3, 2]))
    options = {**RAGGED, "max_new_tokens": 14, "do_sample": False, "logits_processor": [Guided(model)]}
    got = TARGET.generate(**options, custom_generate=specdec.custom_generate(drafter))
    assert torch.equal(got, TARGET.generate(**options))


def test_copies_share_models_tokenizers_and_processors_of_transformers():
    tokenizer, penalty = specdec.demo.load().tokenizer, RepetitionPenaltyLogitsProcessor(1.3)
    holder = partial(print, TARGET, {"tokenizer": tokenizer}, LogitsProcessorList([penalty]), [0])
    (other,) = copied([holder])
    assert other is not holder
    assert other.args[0] is TARGET and other.args[1]["tokenizer"] is tokenizer
    assert other.args[2] is not holder.args[2] and other.args[2][0] is penalty
    assert other.args[3] is not holder.args[3]


def test_copies_of_a_module_share_its_parameters_and_nothing_else():
    module = Module()
    (other,) = copied([module])
    other(torch.zeros(1, 3), torch.zeros(1, VOCAB))
    assert other.head is not module.head and other.head.weight is module.head.weight
    assert (module.step, int(module.steps), other.step, int(other.steps)) == (0, 0, 2, -1)


def test_copies_share_with_each_other_what_the_originals_share():
    cycle = Cycle()
    first, second = copied([partial(cycle), cycle.__call__])
    first(torch.zeros(1, 3), torch.zeros(1, VOCAB))
    assert second.__self__ is first.func and second.__self__.step == 1 and cycle.step == 0


def test_a_function_that_was_copied_counts_by_itself():
    ids, scores, function = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, VOCAB), counter()
    function(ids, scores)
    (other,) = copied([function])
    (third,) = copied([copy.deepcopy(other)])
    first = [int(f(ids, scores).isfinite().nonzero()[0, 1]) for f in (other, other, third, function)]
    assert first == [VOCAB // 3, VOCAB // 3 * 2, VOCAB // 3, VOCAB // 3]
