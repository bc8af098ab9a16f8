"""The demo models' corpus: Python code and English prose that every machine with the dependencies has.

Code is the standard library and the installed packages of `LICENCES`; prose is their docstrings, the language
reference in `pydoc_data` and the packages' long descriptions. `documents()` yields them filtered, de-duplicated and
split by file hash.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import pydoc_data.topics
import re
import sysconfig
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from experiments.bench.prompts import Prompt

END = "<|endoftext|>"
LICENCES = {
    "python": "PSF-2.0",
    "torch": "BSD-3-Clause",
    "transformers": "Apache-2.0",
    "numpy": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause",
    "hydra-core": "MIT",
    "omegaconf": "BSD-3-Clause",
    "pytest": "MIT",
    "huggingface_hub": "Apache-2.0",
    "tokenizers": "Apache-2.0",
    "safetensors": "Apache-2.0",
    "accelerate": "Apache-2.0",
    "Jinja2": "BSD-3-Clause",
    "rich": "MIT",
    "fsspec": "BSD-3-Clause",
    "packaging": "Apache-2.0 OR BSD-2-Clause",
    "filelock": "MIT",
    "httpx": "BSD-3-Clause",
    "click": "BSD-3-Clause",
    "pip": "MIT",
    "setuptools": "MIT",
}
HELD_OUT_ONE_IN = 50  # files
PACKAGE_BYTES = 8_000_000  # the largest packages would otherwise be most of the corpus
FILE_BYTES = (300, 150_000)
SKIP_PATHS = re.compile(
    r"_pb2|/(data|locale|_vendor|pip/_vendor|lib2to3|idlelib|turtledemo|encodings|tests?/data|parsing/(latex|autolev)/_antlr)/"
    r"|tables?\.py|uts46data|_codes\.py|/ensurepip/_bundled|__pycache__|site-packages|pydoc_data|cjkencodings|badsyntax"
)


class Document(NamedTuple):
    """One text of the corpus; `kind` is "code" or "prose", `path` is relative to the package's root."""

    package: str
    path: str
    kind: str
    text: str
    held_out: bool


def documents() -> Iterator[Document]:
    """All documents, code before the prose that was cut from the same file. The order is the same on every run."""
    seen_lines: set[int] = set()
    seen_prose: set[str] = set()
    for package in filter(_is_installed, LICENCES):
        room = PACKAGE_BYTES
        for path, text in sorted(_python_files(package), key=lambda item: _digest(item[0])):
            if room <= 0 or _is_table(text) or _is_near_duplicate(text, seen_lines):
                continue
            room -= len(text)
            held_out = is_held_out(f"{package}/{path}")
            yield Document(package, path, "code", text, held_out)
            for prose in _new(_docstrings(text), seen_prose):
                yield Document(package, path, "prose", prose, held_out)
        for path, text in _new_items(_descriptions(package), seen_prose):
            yield Document(package, path, "prose", text, is_held_out(f"{package}/{path}"))


def is_held_out(path: str) -> bool:
    """Whether the file `package/path` belongs to the held-out split."""
    return int(_digest(path)[:8], 16) % HELD_OUT_ONE_IN == 0


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_installed(package: str) -> bool:
    return package == "python" or any(importlib.metadata.distributions(name=package))


def _python_files(package: str) -> Iterator[tuple[str, str]]:
    if package == "python":
        root = Path(sysconfig.get_path("stdlib"))
        files = [(p.relative_to(root).as_posix(), p) for p in root.rglob("*.py")]
    else:
        listed = importlib.metadata.files(package) or []
        files = [(f.as_posix(), Path(f.locate())) for f in listed if f.suffix == ".py"]
    for name, path in files:
        if (
            SKIP_PATHS.search("/" + name)
            or not path.is_file()
            or not FILE_BYTES[0] <= path.stat().st_size <= FILE_BYTES[1]
        ):
            continue
        try:
            yield name, path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def _is_table(text: str) -> bool:
    """Generated tables, minified code and data: too regular, too few letters or lines too long."""
    lines = text.splitlines()
    letters = sum(c.isalpha() or c.isspace() for c in text) / len(text)
    packed = len(zlib.compress(text.encode(), 1)) / len(text)
    return letters < 0.68 or packed < 0.14 or max(map(len, lines)) > 400 or len(text) / len(lines) > 70


def _is_near_duplicate(text: str, seen: set[int]) -> bool:
    """Whether over 40 % of the three-line shingles occurred before, class names aside; if not, remembers them."""
    lines = [re.sub(r"\b[A-Z]\w*|\s+", "", line) for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 3 and not line.startswith("#")]
    shingles = {hash("\n".join(lines[i : i + 3])) for i in range(len(lines) - 2)}
    if not shingles or len(shingles & seen) > 0.4 * len(shingles):
        return True
    seen |= shingles
    return False


def _docstrings(source: str) -> Iterator[str]:
    """Docstrings of modules, classes and functions, dedented, that are long enough to be texts of their own."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if 200 <= len(text) <= 8000 and _reads_like_prose(text):
                yield text


def _descriptions(package: str) -> Iterator[tuple[str, str]]:
    if package == "python":
        for name, text in sorted(pydoc_data.topics.topics.items()):
            yield f"pydoc_data/topics/{name}", inspect.cleandoc(text)
    else:
        yield "METADATA", str(str(importlib.metadata.metadata(package).json.get("description", "")))


def _reads_like_prose(text: str) -> bool:
    return sum(c.isalpha() or c == " " for c in text) > 0.78 * len(text)


def _new(texts: Iterator[str], seen: set[str]) -> Iterator[str]:
    for text in texts:
        key = _digest(re.sub(r"\W+", "", text)[:400])
        if key not in seen:
            seen.add(key)
            yield text


def _new_items(items: Iterator[tuple[str, str]], seen: set[str]) -> Iterator[tuple[str, str]]:
    return ((path, text) for path, text in items if len(text) >= 200 and list(_new(iter([text]), seen)))


def build(folder: Path, vocab: int) -> None:
    """Writes the tokenizer, `{train,held}_{code,prose}.npy` (uint16 tokens), held-out texts and token counts."""
    texts = list(documents())
    tokenizer = train_tokenizer([d.text for d in texts if not d.held_out], vocab)
    tokenizer.save_pretrained(folder / "tokenizer")
    streams: dict[str, list[np.ndarray]] = {}
    counts: dict[str, int] = {}
    for d in texts:
        ids = np.array([tokenizer.eos_token_id, *tokenizer(d.text, verbose=False)["input_ids"]], dtype=np.uint16)
        streams.setdefault(f"{'held' if d.held_out else 'train'}_{d.kind}", []).append(ids)
        counts[f"{d.package} {d.kind}"] = counts.get(f"{d.package} {d.kind}", 0) + len(ids) * (not d.held_out)
    for name, parts in streams.items():
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    (folder / "counts.json").write_text(json.dumps(counts, indent=1))
    held = [json.dumps(d._asdict()) for d in texts if d.held_out]
    (folder / "held.jsonl").write_text("\n".join(held) + "\n")


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose only special token, `<|endoftext|>`, separates documents and is bos, eos and pad."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=ByteLevel.alphabet())
    bpe.train_from_iterator(texts[::3], trainer)  # a third of the files fixes 4096 merges; all of them only costs time
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=1024
    )


def beginnings(count: int, characters: int, one_in: int = 1) -> list[Prompt]:
    """The first characters of `count` documents that the demo models were trained on, one in `one_in` of those."""
    long = (d.text for d in documents() if not d.held_out and len(d.text) >= characters)
    some = islice((text for text in long if int(_digest(text)[:8], 16) % one_in == 0), count)
    return [Prompt("corpus", [text[:characters]]) for text in some]
