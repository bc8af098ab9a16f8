"""Which drafter, tree and rule are fastest for a target, prompts and a machine: measure, foretell, search, check, explain."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.arguments import as_engine, as_request
from specdec.checks import as_int, check_flag
from specdec.clock import told_by
from specdec.drafters import LayerSkipDrafter
from specdec.engines.base import Engine
from specdec.models.target import Target
from specdec.prompts import Prompts
from specdec.sampling import Sampling
from specdec.trace.bill import CostlyDraftsWarning
from specdec.trees import Chain
from specdec.tuning import layers, roofline
from specdec.tuning.budget import Budget
from specdec.tuning.checking import Check
from specdec.tuning.conditions import Conditions
from specdec.tuning.findings import Findings
from specdec.tuning.measuring import measured
from specdec.tuning.offers import OWN, Offer, fitting, named, own_offers
from specdec.tuning.plan import Plan
from specdec.tuning.probes import probes
from specdec.tuning.search import Known, finalists, foretold
from specdec.tuning.writing import as_written, write

# The share of all the time at which each part ends.
_WRITTEN, _LAYERS, _MEASURED, _FORETOLD, _CHECKED = 0.15, 0.25, 0.42, 0.6, 1.0
# Most rounds of measuring. It ends before if after some rounds every price is so sure, in steps without a draft.
_ROUNDS, _LOOK, _SURE = 200, 8, 0.02
# Candidates that are decoded.
_CHECKS = 3


def tune(
    target: PreTrainedModel | Target,
    prompts: Prompts,
    drafters: Any = None,
    *,
    own: Sequence[str] = OWN,
    sampling: Sampling = Sampling(),
    tokenizer: Any = None,
    texts: Sequence[Any] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 1,
    engine: Engine | str = "eager",
    seconds: float = 60,
    progress: bool = True,
) -> Plan:
    """Find out which drafter, tree and rule are fastest for this target, prompts like these and this machine.

    >>> plan = specdec.tune(target, prompts, {"draft": draft}, sampling=Sampling(1.0), tokenizer=tokenizer)
    >>> print(plan.table())
    >>> specdec.generate(target, prompts, plan.drafter, rule=plan.rule, tokenizer=tokenizer)

    The target writes a text for each prompt. Steps are timed, of trees of some sizes and of each drafter, beside steps without
    a draft. From the texts and the times, acceptance and speed-up of every drafter, tree and rule follow: exactly for drafters
    that grow trees of fixed shapes, by replaying the texts for those that follow from a text (`specdec.prediction`). Shapes are
    sought by their measured price. The best three, without those that are surely slower than the first, are decoded, in turns
    with decoding without a draft.

    Times are of the thread's processor where a CPU computes with one thread, which other processes do not change, and otherwise
    of the clock. Speed-ups are of decoding with all rows at work, reading of prompts left out.

    Args:
        target: as for `generate`.
        prompts: as for `generate`: some that are like those to come. Those that cannot be decoded are left out, and noted.
        drafters: drafters, draft models or Medusa heads to be compared, or functions that make them: one, several, or several
            by name. Trees are chosen for those that grow trees. Ones that cannot be made or do not fit the target are left out,
            and the plan says why.
        own: what is compared of the target's own: "ngram", "suffix" (from the text, each also `Paused`), "layers" (drafting
            without some of its layers, which are sought), "mtp" (the layer in its repository).
        sampling: how tokens are chosen.
        tokenizer: as for `generate`.
        texts: what the target wrote after each prompt with this sampling, where that is known: token ids, as in
            `Generation.tokens`. They must be its own: all is foretold from them. Otherwise it writes them here.
        max_new_tokens: of each text, at least 8; more of a given one is not used.
        batch_size: rows that are at work together.
        engine: as for `generate`.
        seconds: how long it may take. What was not reached is said in the plan. Ctrl-C ends it with the plan so far.
        progress: whether to show a bar.

    Raises:
        ValueError: bad input, or no prompt that can be decoded.
    """
    check_flag("progress", progress)
    batch = as_int("batch_size", batch_size, 1)
    asked = {
        "sampling": sampling,
        "max_new_tokens": as_int("max_new_tokens", max_new_tokens, 8),
        "tokenizer": tokenizer,
        "engine": engine,
    }
    request = as_request(target, prompts, on_error="skip", **asked)
    if not request.texts:
        raise ValueError(f"No prompt can be decoded: {next(iter(request.skipped.values()))}")
    conditions = Conditions(
        target=request.target,
        sampling=request.sampling,
        batch=batch,
        engine=partial(as_engine, engine),
        new_tokens=asked["max_new_tokens"],
        tokenizer=tokenizer,
    )
    ids = [torch.from_numpy(text.tokens) for text in request.texts]
    left_out = [f"Left out: {message}" for message in request.skipped.values()]
    known = None if texts is None else as_written(texts, request, max_new_tokens)
    found, asked_of = Findings(ids, conditions, notes=left_out, written=known or []), named(drafters)
    with Budget(seconds, progress) as budget, steadily(request.target.device):
        try:
            _search(found, asked_of, tuple(own), budget)
        except KeyboardInterrupt:
            found.notes.append(
                f"It was interrupted after {budget.spent:.0f} of {seconds:.0f} s: this is the plan so far."
            )
            if not found.rows:
                with suppress(KeyboardInterrupt):
                    _foretell(found, lambda share: lambda: True, budget.say)
    return found.plan()


def _search(found: Findings, drafters: dict[str, Any], names: tuple[str, ...], budget: Budget) -> None:
    """All parts, one after the other, each as long as its share of the time."""
    conditions = found.conditions
    ours, refused = own_offers(conditions.target, names)
    found.refused.update(refused)
    every = drafters | {offer.name: offer.drafter for offer in ours}
    found.offers, refused = fitting(every, max(found.prompts, key=len), conditions)
    found.refused.update(refused)
    if not found.written:
        write(found.written, found.prompts, conditions, budget.until(_WRITTEN), budget.say)
    if not found.written:
        found.notes.append("The target ends every text with its first tokens: nothing is to be gained.")
        return
    if "layers" in names and conditions.target.model is not None:
        _search_layers(found, conditions.target.model, budget)
    _measure(found, budget)
    _foretell(found, budget.until, budget.say)
    _check(found, budget)


def _search_layers(found: Findings, model: PreTrainedModel, budget: Budget) -> None:
    texts = [(found.prompts[text.prompt], text.new) for text in found.written if text.sample == 0]
    every_second = texts[::2]  # what is chosen of many is not to be judged by the texts that it was chosen by alone
    over = budget.until(_LAYERS)
    if over():
        found.refused["layers"] = "there was no time to seek layers to leave out; give more seconds."
        return
    try:
        trial, count = layers.found(model, every_second, found.conditions.sampling, over, budget.say)
    except ValueError as error:
        found.refused["layers"] = str(error)
        return
    about = f"{sorted(trial.skip)}, the best of {count} sets{' that time allowed' * over()}"
    if trial.speed_up <= 1:
        found.refused["layers"] = (
            f"by chains of one row, {about}, are foretold to give {trial.speed_up:.2f} times the speed."
        )
        return
    found.offers.append(Offer("layers", LayerSkipDrafter(skip=sorted(trial.skip), tree=Chain(trial.length))))
    found.notes.append(f"Layers left out: {about}.")


def _measure(found: Findings, budget: Budget) -> None:
    if found.conditions.target.model is not None:
        try:
            found.machine = roofline.machine(found.conditions.target.model)
        except Exception as error:  # it explains a plan, which is made without it
            found.notes.append(f"What this machine allows was not measured: {error}")
    every = islice(cycle(groups(found.prompts, found.conditions.batch)), _ROUNDS)
    made, over = probes(found.offers, found.conditions), budget.until(_MEASURED)
    for prices in measured(made, every, found.conditions, over, budget.say):
        found.prices, found.noise = prices, prices.noise
        if len(prices.alone) % _LOOK == 0 and prices.sure(_SURE):
            break


def _foretell(found: Findings, until: Callable[[float], Callable[[], bool]], say: Callable[[str], None]) -> None:
    """Tree by tree, of all drafters in turn; of each at least the first."""
    prices, over, share = found.prices, until(_FORETOLD), (_FORETOLD - _MEASURED) / (len(found.offers) + 1)
    if prices is None:
        found.notes.append("No steps were timed: give more seconds.")
        return
    known = (found.prompts, found.written, found.conditions, prices)
    searches = {
        offer.name: foretold(offer, Known(*known, until(_MEASURED + i * share)))
        for i, offer in enumerate(found.offers, 1)
    }
    first = True
    while searches and (first or not over()):
        for name in list(searches):
            say(f"foretelling {name}")
            if (row := next(searches[name], None)) is None:
                del searches[name]
            else:
                found.rows.append(row)
            if not first and over():
                break
        first = False
    if searches:
        names = ", ".join(searches)
        found.notes.append(f"Time ended before all trees were foretold of {names}: others may be better.")


def _check(found: Findings, budget: Budget) -> None:
    """Decode the best, as many as there is time for."""
    over, prices = budget.until(_CHECKED), found.prices
    if not found.rows or prices is None:
        return
    once = prices.unit * found.conditions.new_tokens
    fits = int((budget.seconds - budget.spent) / max(once, 1e-9)) - 2
    best = finalists(found.rows, _CHECKS)
    rows, asked = best[: max(fits, 1)], groups(found.prompts, found.conditions.batch)
    check = Check([row.candidate for row in rows], found.conditions)
    try:
        check.run(asked, over, budget.say)
    finally:
        if not check.prompts:
            found.notes.append("There was no time to decode with the best: speed-ups are foretold, not measured.")
        else:
            found.noise = check.noise
            if len(rows) < len(best):
                found.notes.append(f"There was time to decode with {len(rows)} of the best {len(best)} only.")
            if check.rounds < len(asked):
                found.notes.append(
                    f"There was time to decode {check.rounds} of {len(asked)} groups of prompts: what is measured is of these."
                )
        for row, estimate in zip(rows, check.speedups(), strict=False):
            found.rows[found.rows.index(row)] = replace(row, measured=estimate)


def groups(prompts: Sequence[Tensor], batch: int) -> list[list[Tensor]]:
    """Groups of so many prompts, which together hold every prompt; the last is filled with the first ones again."""
    again = cycle(prompts)
    return [list(islice(again, batch)) for _ in range(-(-len(prompts) // batch))]


@contextmanager
def steadily(device: torch.device) -> Iterator[None]:
    """Inside, one CPU thread is timed by what it computes, and nobody is warned of drafts that cost more than they give."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock: Callable[[], float] = time.thread_time
    with told_by(clock) if alone else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore", CostlyDraftsWarning)
        warnings.filterwarnings("ignore", "engine: the stage")
        yield
