"""Other libraries as decoding methods, called and measured like `specdec.generate`: one prompt at a time, greedy.

Each is imported when it is first called; `Absent` says that it, or its copy of the model, is not here.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.baseline import StepTimes
from specdec import Generation, Sampling


class Absent(Exception):
    """A peer, or its copy of the model, that is not on this machine."""


class OpenVino:
    """OpenVINO GenAI, from folders that `optimum-cli export openvino` wrote. Prompts and texts are token ids.

    Args:
        target: folder of the target.
        draft: of the draft model, for speculative decoding.
        lookup: whether to draft by prompt lookup.
        draft_length: most tokens drafted in a step.
        threads: CPU threads.
    """

    def __init__(
        self, target: str, draft: str | None = None, lookup: bool = False, draft_length: int = 4, threads: int = 1
    ):
        self._folders, self._lookup, self._length = [f for f in (target, draft) if f], lookup, draft_length
        self._options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
        }
        self._pipeline: Any = None

    def __call__(
        self, target: Any, prompts: list[Tensor], *, sampling: Sampling, max_new_tokens: int, seed: int = 0
    ) -> Generation:
        genai, [prompt] = _imported("openvino_genai"), prompts
        self._pipeline = self._pipeline or self._load(genai)
        config = genai.GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, apply_chat_template=False)
        config.set_eos_token_id(target.generation_config.eos_token_id)
        if self._lookup or len(self._folders) > 1:
            config.num_assistant_tokens = self._length
        if self._lookup:
            config.max_ngram_size = 3
        ids, steps, tokens = _imported("openvino").Tensor(prompt[None].numpy()), StepTimes(), []

        def write(new: int | list[int]) -> None:
            tokens.extend(new if isinstance(new, list) else [new])
            steps.note(len(tokens))

        self._pipeline.generate(ids, config, _streamer(genai, write))
        return Generation([torch.tensor(tokens)], None, steps.trace([len(tokens)], max_new_tokens))

    def _load(self, genai: Any) -> Any:
        for folder in self._folders:
            if not Path(folder, "openvino_model.xml").exists():
                raise Absent(f"no exported model in {folder}")
        target, *draft = self._folders
        options = {**self._options, "scheduler_config": genai.SchedulerConfig()}
        if draft:
            options["draft_model"] = genai.draft_model(draft[0], "CPU", **self._options)
        if self._lookup:
            options["prompt_lookup"] = True
        return genai.LLMPipeline(target, "CPU", **options)


def _streamer(genai: Any, write: Any) -> Any:
    class Streamer(genai.StreamerBase):
        def write(self, token: int | list[int]) -> Any:
            write(token)
            return genai.StreamingStatus.RUNNING

        def end(self) -> None: ...

    return Streamer()


class LlamaCpp:
    """llama.cpp through llama-cpp-python, from a GGUF file in float32. Prompts and texts are token ids.

    Args:
        file: the target.
        threads: CPU threads.
    """

    def __init__(self, file: str, threads: int = 1):
        self._file, self._threads = file, threads
        self._model: Any = None

    def __call__(
        self, target: Any, prompts: list[Tensor], *, sampling: Sampling, max_new_tokens: int, seed: int = 0
    ) -> Generation:
        llama_cpp, [prompt] = _imported("llama_cpp"), prompts
        if not Path(self._file).exists():
            raise Absent(f"no model in {self._file}")
        if self._model is None:
            threads = {"n_threads": self._threads, "n_threads_batch": self._threads}
            self._model = llama_cpp.Llama(self._file, n_ctx=len(prompt) + 1024, verbose=False, **threads)
        steps, tokens = StepTimes(), []
        for token in self._model.generate(prompt.tolist(), temp=0.0):
            tokens.append(token)
            steps.note(len(tokens))
            if len(tokens) == max_new_tokens or token == target.generation_config.eos_token_id:
                break
        return Generation([torch.tensor(tokens)], None, steps.trace([len(tokens)], max_new_tokens))


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise Absent(f"{package} is not installed") from None
