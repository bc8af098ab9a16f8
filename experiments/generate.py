"""Writes texts for a file of prompts, on one machine or, cut into shards, on many.

    python experiments/generate.py prompts=FILE sampling=temperature num_samples=4
    python experiments/generate.py -m prompts=FILE shards=8 'shard=range(0,8)' hydra/launcher=slurm
    python experiments/generate.py prompts=FILE shards=8 join=true

Settings and their defaults are in `conf/generate.yaml`. The third command joins what the jobs of the second have written, and
says what is missing. Coins are drawn by a prompt's place in the file, so the texts of shards are those of one run. All jobs
must see the same `folder`. What is stopped goes on from its journals when the same command is given again, to the same texts.
"""

from __future__ import annotations

from experiments.bench import calls

# Before the imports below, which take seconds: a mistake in the command is told at once.
if __name__ == "__main__":
    calls.script("generate", "generate")

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.bench.inputs import loaded, settled
from experiments.bench.results import Json, keep_settings, whole
from experiments.benchmark import with_models
from specdec import Generation
from specdec.prompt_files import read

# May differ between shards: they change no text, but for rounding. Of the prompts, what the file holds must be the same.
FREE = {
    "prompts",
    "folder",
    "shard",
    "shards",
    "join",
    "batch_size",
    "on_error",
    "engine",
    "device",
    "threads",
    "progress",
}


class Shard(NamedTuple):
    """A part of a job, and its files."""

    folder: Path
    name: str
    start: int  # place in the file of its first prompt
    end: int

    @property
    def texts(self) -> Path:
        """Its texts, once all of them are written."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def journal(self) -> Path:
        """Its texts that are finished already, as long as some are not."""
        return self.folder / f"{self.name}.journal"

    @property
    def source(self) -> Path:
        """How they were made, and what that took."""
        return self.folder / f"{self.name}.json"


def main(config: DictConfig) -> None:
    try:
        prompts = read(config.prompts)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    source = settled("experiments/generate.py", config)
    parts = cut(Path(config.folder), config.shards, len(prompts))
    if not 0 <= config.shard < config.shards:
        raise SystemExit(f"shard={config.shard}: must be 0 to {config.shards - 1}, as shards={config.shards}.")
    options: Any = OmegaConf.to_container(config)
    content = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    settings = {"prompts": content, **{k: v for k, v in options.items() if k not in FREE}}
    keep_settings(Path(config.folder), settings, begun=any(Path(config.folder).glob("shard_*")))
    part = parts[config.shard]
    if not config.join and not part.texts.exists():
        write(part, prompts[part.start : part.end], config, source)
    print(join(parts, config.num_samples) if config.join or config.shards == 1 else part.texts)


def cut(folder: Path, shards: int, prompts: int) -> list[Shard]:
    """The prompts in so many parts, as equal as can be; exits if there are too few."""
    if not 1 <= shards <= prompts:
        raise SystemExit(f"shards={shards}: must be 1 to {prompts}, the number of prompts.")
    ends = [i * prompts // shards for i in range(shards + 1)]
    return [Shard(folder, f"shard_{i}_of_{shards}", ends[i], ends[i + 1]) for i in range(shards)]


def write(part: Shard, prompts: list[Any], config: DictConfig, source: dict[str, Any]) -> None:
    """Write the texts of a shard."""
    models = loaded(config)
    processes = getattr(models.target, "tp_size", None) or 1  # that share the target would all write to the journal
    out = with_models(config, models)["chosen"](
        models.target, prompts, sampling=instantiate(config.sampling), max_new_tokens=config.new_tokens,
        stop_tokens=config.stop_tokens, tokenizer=models.tokenizer, seed=config.seed, first_index=part.start,
        num_samples=config.num_samples, batch_size=config.batch_size, on_error=config.on_error,
        journal=part.journal if processes == 1 else None, progress=config.progress, engine=config.engine,
    )  # fmt: skip
    counts = {
        "first": part.start, "prompts": len(prompts), "tokens": sum(map(len, out.tokens)), "skipped": len(out.skipped)
    }  # fmt: skip
    Json(str(part.source)).write({**source, **counts, "figures_of_the_last_call": out.summary()})
    with whole(part.texts) as path, open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(out, part.start, config.num_samples))
    part.journal.unlink(missing_ok=True)


def rows(out: Generation, start: int, samples: int) -> Iterator[dict[str, Any]]:
    """What the file says of each text: the place of its prompt, which sample it is, its new tokens, and the same as text.

    Of a prompt that cannot be decoded it says why instead.
    """
    for place, (tokens, text) in enumerate(zip(out.tokens, out.text or [], strict=True)):
        index, sample = divmod(place, samples)
        made = {"skipped": out.skipped[place]} if place in out.skipped else {"text": text, "tokens": tokens.tolist()}
        yield {"index": start + index, "sample": sample, **made}


def join(parts: list[Shard], samples: int) -> Path:
    """Write the texts of all shards that are done into one file, in order; exits with what is missing."""
    done = [part for part in parts if part.texts.exists()]
    with whole(parts[0].folder / "texts.jsonl") as path, open(path, "w", encoding="utf-8") as file:
        file.writelines(part.texts.read_text("utf-8") for part in done)
    joined = parts[0].folder / "texts.jsonl"
    if missing := [part for part in parts if part not in done]:
        counts = [samples * sum(part.end - part.start for part in some) for some in (done, parts)]
        named = ", ".join(f"{part.name} (prompts {part.start} to {part.end - 1})" for part in missing)
        numbers = ",".join(str(parts.index(part)) for part in missing)
        raise SystemExit(
            f"{joined} has {counts[0]} of {counts[1]} texts. Missing: {named}. Write them: -m shard={numbers}, then join."
        )
    return joined
