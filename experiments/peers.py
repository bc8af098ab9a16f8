"""specdec beside other libraries: the same weights, the same prompts, in the same rounds, in one table.

    python experiments/peers.py

writes the enlarged demo pair to outputs/peers, where other libraries (`experiments/peer_methods/libraries.py`) look for their
own copies of it:

    cd outputs/peers; for MODEL in target draft; do
    optimum-cli export openvino --task text-generation-with-past --weight-format fp32 -m $MODEL openvino/$MODEL; done
    cd ../..; for MODEL in target draft; do
    python experiments/export_gguf.py outputs/peers/$MODEL outputs/peers/$MODEL.gguf; done

Settings are in `conf/peers.yaml`. One prompt at a time and greedy. A library that is not here is a row that says so. The first
round is not counted, as forward passes are compiled in it. Times exclude the prefill, as in `experiments/benchmark.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from torch import Tensor

from experiments.bench import calls, reading
from experiments.bench.inputs import begin
from experiments.bench.measure import AGAIN, Method, Round, rounds, uninterrupted
from experiments.bench.report import cells, figures, interval, markdown, median, speed
from experiments.bench.results import leads, whole
from experiments.benchmark import with_models
from experiments.peer_methods.libraries import Absent
from specdec import Sampling
from specdec.trace import Trace


@hydra.main(config_path="../conf", config_name="peers", version_base="1.3")
def main(config: DictConfig) -> None:
    setting = begin("experiments/peers.py", config)
    models, ids, sampling = setting.models, setting.prompts, setting.sampling
    for name in ("target", "draft"):  # what exporters read
        getattr(models, name).save_pretrained(Path(config.folder, name), is_main_process=leads())
        models.tokenizer.save_pretrained(Path(config.folder, name))
    methods, absent = present(with_models(config, models), models.target, ids[0], sampling)
    counts = {"sampling": sampling, "max_new_tokens": config.new_tokens, "repeats": 1 + config.repeats}
    complete = rounds(models.target, methods, [[prompt] for prompt in ids], **counts)
    next(complete)  # in which all shapes are compiled
    finished = uninterrupted(complete)
    found = {
        "figures": figures(finished),
        "over": {peer: over(finished, peer) for peer in config.over if peer in methods},
        "milliseconds_per_step": {name: spent([done[name] for done in finished]) for name in methods},
        "reading_the_weights": reading.least(list(models.target.parameters())),
        "absent": absent,
    }
    text = table(found) + "\n\n" + note(config, found, len(ids), len(finished))
    print(text, end="\n\n")
    print(setting.log.write({**setting.source, "prompts": len(ids), "rounds": len(finished), **found}))
    with whole(config.table) as file:
        file.write_text(text + "\n", "utf-8")


def present(
    methods: dict[str, Method], target: Any, prompt: Tensor, sampling: Sampling
) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods that run here, and why the others do not."""
    absent = {}
    for name, method in methods.items():
        try:
            method(target, [prompt], sampling=sampling, max_new_tokens=2)
        except Absent as reason:
            absent[name] = str(reason)
    return {name: method for name, method in methods.items() if name not in absent}, absent


def over(finished: list[Round], peer: str) -> dict[str, Any]:
    """Speeds of all methods over one, paired by round and prompt."""
    speeds = {name: speed([done[name] for done in finished]) for name in finished[0]}
    return {name: median(mine / speeds[peer]) for name, mine in speeds.items()}


def spent(runs: list[Any]) -> dict[str, float]:
    """Milliseconds per step: drafting, the target's forward pass, the rest. Of a peer's step all counts as the target's."""
    summary = Trace(steps=[step for row in runs for run in row for step in run.trace.steps]).summary()
    return {
        part: 1e3 * summary[f"{part}_seconds"] / summary["target_forwards"] for part in ("draft", "verify", "other")
    }


def table(found: dict[str, Any]) -> str:
    """The figures of every method as markdown; one that is absent says why."""
    ratios = found["over"]
    head = ["method", "tokens/s (95 % CI)", *(f"over {peer}" for peer in ratios), "acceptance length", "= transformers"]
    rows = [
        [
            name,
            *cells(row, "tokens_per_second"),
            *(interval(ratio[name], digits=2) for ratio in ratios.values()),
            *cells(row, "acceptance_length", "identical"),
        ]
        for name, row in found["figures"].items()
    ]
    return markdown(
        [head, *rows, *([name, reason, *["-"] * (len(head) - 2)] for name, reason in found["absent"].items())]
    )


def note(config: DictConfig, found: dict[str, Any], prompts: int, count: int) -> str:
    """Under which conditions the figures hold, and where the time of our steps goes."""
    read = found["reading_the_weights"]
    lines = [
        f"{prompts} prompts x {config.new_tokens} tokens x {count} rounds, one prompt at a time, greedy, {config.dtype}, "
        f"{config.threads} CPU thread. Medians; intervals of ratios are bootstraps over prompts and rounds, paired. One round "
        f'more came first and is not counted: forward passes are compiled in it. Prefill excluded. Noise floor: "{AGAIN}".',
        f"Reading the target's weights once takes {read['milliseconds']:.1f} ms (by {read['way']}). Milliseconds per step, "
        "drafting + target + rest: "
        + "; ".join(
            f"{name} {step['draft']:.1f} + {step['verify']:.1f} + {step['other']:.1f}"
            for name, step in found["milliseconds_per_step"].items()
        )
        + ". Of what is not ours, all counts as the target's.",
    ]
    return "\n\n".join(lines)


if __name__ == "__main__":
    calls.run(main)
