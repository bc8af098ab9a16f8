"""Other libraries as decoding methods, called and measured like `specdec.generate`: one prompt at a time, greedy.

Each is imported when it is first needed, and reads copies of the models in a format of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from experiments.peer_methods.baseline import StepTimes
from specdec import Generation, Sampling


class Peer(ABC):
    """A library that is not one of those specdec needs.

    Args:
        target: the library's copy of the target.
        draft: of the draft model, for speculative decoding.
        lookup: whether to draft by prompt lookup.
        draft_length: most tokens drafted in a step.
        threads: CPU threads.
    """

    package: ClassVar[str]
    inside: ClassVar[str] = "."  # the file that a copy is known by

    def __init__(
        self, target: str, draft: str | None = None, lookup: bool = False, draft_length: int = 4, threads: int = 1
    ):
        self._copies, self._lookup = [copy for copy in (target, draft) if copy], lookup
        self._length, self._threads = draft_length, threads
        self._model: Any = None

    def missing(self) -> str:
        """Why the library cannot run here; "" if it can."""
        try:
            import_module(self.package)
        except ImportError:
            return f"{self.package} is not installed"
        return next((f"no model in {copy}" for copy in self._copies if not Path(copy, self.inside).exists()), "")

    def __call__(
        self, target: Any, prompts: list[Tensor], *, sampling: Sampling, max_new_tokens: int, seed: int = 0
    ) -> Generation:
        if len(prompts) > 1 or sampling.temperature > 0:
            raise ValueError(
                f"{len(prompts)} prompts at temperature {sampling.temperature:g}: {self.package} is measured with one prompt at"
                " a time, greedily; set batch=1 and sampling.temperature=0, or leave the method out."
            )
        self._model = self._model or self._load(import_module(self.package))
        steps, tokens = StepTimes(), list[int]()
        self._write(prompts[0], target.generation_config.eos_token_id, max_new_tokens, steps, tokens)
        return Generation([torch.tensor(tokens)], None, steps.trace([len(tokens)], max_new_tokens))

    @abstractmethod
    def _load(self, library: Any) -> Any:
        """What is loaded once."""

    @abstractmethod
    def _write(self, prompt: Tensor, end: int, most: int, steps: StepTimes, tokens: list[int]) -> None:
        """Fill `tokens`, at most so many, and note the end of each step."""


def present(methods: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The methods that can run here, and why the others cannot."""
    absent = {name: why for name, method in methods.items() if isinstance(method, Peer) and (why := method.missing())}
    return {name: method for name, method in methods.items() if name not in absent}, absent


class OpenVino(Peer):
    """OpenVINO GenAI, from folders that `optimum-cli export openvino` wrote, with activations and cache in float32."""

    package = "openvino_genai"
    inside = "openvino_model.xml"

    def _load(self, library: Any) -> Any:
        precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": self._threads, **precise}
        target, *draft = self._copies
        more = {"draft_model": library.draft_model(draft[0], "CPU", **options)} if draft else {}
        more |= {"prompt_lookup": True} if self._lookup else {}
        return library.LLMPipeline(target, "CPU", scheduler_config=library.SchedulerConfig(), **options, **more)

    def _write(self, prompt: Tensor, end: int, most: int, steps: StepTimes, tokens: list[int]) -> None:
        genai, openvino = import_module(self.package), import_module("openvino")
        config = genai.GenerationConfig(max_new_tokens=most, do_sample=False, apply_chat_template=False)
        config.set_eos_token_id(end)
        if self._lookup or len(self._copies) > 1:
            config.num_assistant_tokens = self._length
        if self._lookup:
            config.max_ngram_size = 3

        def write(new: int | list[int]) -> None:
            tokens.extend(new if isinstance(new, list) else [new])
            steps.note(len(tokens))

        self._model.generate(openvino.Tensor(prompt[None].numpy()), config, _streamer(genai, write))


def _streamer(genai: Any, write: Any) -> Any:
    class Streamer(genai.StreamerBase):
        def write(self, token: int | list[int]) -> Any:
            write(token)
            return genai.StreamingStatus.RUNNING

        def end(self) -> None: ...

    return Streamer()


class LlamaCpp(Peer):
    """llama.cpp through llama-cpp-python, from GGUF files (`experiments/export_gguf.py`), with its cache in float32.

    The bindings draft by prompt lookup; in its place a draft model of theirs may write on greedily.
    """

    package = "llama_cpp"

    def _load(self, library: Any) -> Any:
        precise = {"type_k": library.GGML_TYPE_F32, "type_v": library.GGML_TYPE_F32}  # float16 unless told
        threads = {"n_threads": self._threads, "n_threads_batch": self._threads}
        self._asked: Callable[[], None] = lambda: None

        def load(file: str, draft: Any = None) -> Any:
            # a context of 0: as long as the model's positions
            return library.Llama(
                file, draft_model=draft, logits_all=draft is not None, n_ctx=0, verbose=False, **threads, **precise
            )

        target, *draft = self._copies
        if self._lookup:
            speculative = import_module("llama_cpp.llama_speculative")
            lookup = speculative.LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=self._length)
            return load(target, self._asking(lookup))
        if draft:
            small = load(draft[0])
            return load(
                target,
                self._asking(lambda ids: np.array([*islice(small.generate(ids.tolist(), temp=0.0), self._length)])),
            )
        return load(target)

    def _asking(self, draft: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """The same drafts; that one is asked for is said before."""

        def propose(ids: np.ndarray) -> np.ndarray:
            self._asked()
            return draft(ids)

        return propose

    def _write(self, prompt: Tensor, end: int, most: int, steps: StepTimes, tokens: list[int]) -> None:
        self._asked = lambda: steps.note(len(tokens))
        for token in self._model.generate(prompt.tolist(), temp=0.0):
            tokens.append(token)
            if len(tokens) == most or token == end:
                break
            if not self._model.draft_model:  # else a step ends when the next draft is asked for
                self._asked()
        self._asked()
