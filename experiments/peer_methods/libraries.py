"""Other libraries as decoding methods, called and measured like `specdec.generate`: one prompt at a time, greedy.

Each is imported when it is first called; `Absent` says that it, or its copy of the model, is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.peer_methods.baseline import StepTimes
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
    """llama.cpp through llama-cpp-python, from GGUF files in float32 (`experiments/export_gguf.py`), with token ids.

    The bindings draft by prompt lookup; in its place a draft model of theirs may write on greedily.

    Args:
        target: file of the target.
        draft: of the draft model, for speculative decoding.
        lookup: whether to draft by prompt lookup.
        draft_length: most tokens drafted in a step.
        threads: CPU threads.
    """

    def __init__(
        self, target: str, draft: str | None = None, lookup: bool = False, draft_length: int = 4, threads: int = 1
    ):
        self._target, self._draft, self._lookup, self._length = target, draft, lookup, draft_length
        self._options: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
        self._model: Any = None
        self._steps, self._tokens = StepTimes(), list[int]()

    def __call__(
        self, target: Any, prompts: list[Tensor], *, sampling: Sampling, max_new_tokens: int, seed: int = 0
    ) -> Generation:
        [prompt] = prompts
        self._model = self._model or self._load(_imported("llama_cpp"))
        steps, tokens = self._steps, self._tokens = StepTimes(), list[int]()
        for token in self._model.generate(prompt.tolist(), temp=0.0):
            tokens.append(token)
            if len(tokens) == max_new_tokens or token == target.generation_config.eos_token_id:
                break
            if not self._model.draft_model:  # else a step ends when the next draft is asked for
                steps.note(len(tokens))
        steps.note(len(tokens))
        return Generation([torch.tensor(tokens)], None, steps.trace([len(tokens)], max_new_tokens))

    def _load(self, llama_cpp: Any) -> Any:
        precise = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # float16 unless told
        options = {**self._options, **precise, "n_ctx": 0}  # as long as the model's positions

        def load(file: str, draft: Any = None) -> Any:
            if not Path(file).exists():
                raise Absent(f"no model in {file}")
            return llama_cpp.Llama(file, draft_model=draft, logits_all=draft is not None, **options)

        if self._lookup:
            speculative = import_module("llama_cpp.llama_speculative")
            lookup = speculative.LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=self._length)
            return load(self._target, self._noting(lookup))
        if self._draft:
            draft = load(self._draft)
            return load(
                self._target,
                self._noting(lambda ids: np.array([*islice(draft.generate(ids.tolist(), temp=0.0), self._length)])),
            )
        return load(self._target)

    def _noting(self, draft: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """The same drafts; that one is asked for ends a step."""

        def propose(ids: np.ndarray) -> np.ndarray:
            self._steps.note(len(self._tokens))
            return draft(ids)

        return propose


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise Absent(f"{package} is not installed") from None
