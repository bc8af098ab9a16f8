"""An EAGLE-3 draft in a format that engines serve, and the commands that serve it.

    python experiments/export.py meta-llama/Llama-3.1-8B-Instruct outputs/eagle3 exported/eagle3

The commands are printed, and written beside the draft as serve.txt.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from specdec.drafters import Eagle3Drafter, Eagle3Net
from specdec.drafters.eagle3_export import FORMATS

SETTINGS = "trtllm.yaml"  # JSON, which is YAML


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="the model that is drafted for: a name on the hub, or a folder")
    parser.add_argument("draft", help="its draft, in any layout that specdec reads: a name on the hub, or a folder")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    parser.add_argument("--tokens", type=int, default=3, help="how many tokens to draft a step")
    args = parser.parse_args()
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype="auto")
    drafter = Eagle3Drafter.from_pretrained(args.draft, target)
    drafter.save_pretrained(args.folder, args.format, target)
    folder = args.folder.resolve()
    engines = commands(drafter.net, args.target, folder, args.format, args.tokens)
    if "TensorRT-LLM" in engines:
        (folder / SETTINGS).write_text(json.dumps(settings(drafter.net, folder, args.tokens), indent=1) + "\n", "utf-8")
    text = "\n".join(f"# {engine}\n{command}" for engine, command in engines.items())
    (folder / "serve.txt").write_text(text + "\n", "utf-8")
    print(text)


def commands(net: Eagle3Net, target: str, folder: Path, format: str, tokens: int) -> dict[str, str]:
    """The command of each engine that reads what was written."""
    name, model = str(folder), shlex.quote(target)
    draft = {
        "method": "eagle3",
        "model": name,
        "num_speculative_tokens": tokens,
        "draft_sample_method": "probabilistic",
    }
    vllm = {"vLLM": f"vllm serve {model} --speculative-config {shlex.quote(json.dumps(draft))}"}
    if format == "speculators":
        return {**vllm, "vLLM, drafting greedily as the files say": f"vllm serve {shlex.quote(name)}"}
    sglang = (
        f"python -m sglang.launch_server --model-path {model} --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {shlex.quote(name)} --speculative-num-steps {tokens} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {tokens + 1}"
    )
    engines = {**vllm, "SGLang (a larger topk drafts trees, greedily)": sglang}
    if not (net.norms or net.reading.norm_output):  # those of EAGLE-3.1, which TensorRT-LLM may pass over
        settings = shlex.quote(str(folder / SETTINGS))
        engines["TensorRT-LLM"] = f"trtllm-serve {model} --extra_llm_api_options {settings}"
    return engines


def settings(net: Eagle3Net, folder: Path, tokens: int) -> dict[str, Any]:
    """Those of TensorRT-LLM, which counts the layers that states come out of."""
    after = [state - 1 for state in net.states]
    found = {"decoding_type": "Eagle3", "max_draft_len": tokens, "speculative_model": str(folder)}
    return {"speculative_config": {**found, "eagle3_layers_to_capture": after}}


if __name__ == "__main__":
    main()
