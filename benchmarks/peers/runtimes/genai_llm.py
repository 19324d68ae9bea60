"""onnxruntime-genai: the LLM in INT4 as its own model builder makes it, run by its own generator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.protocol import Peer, Samples, Workload, main_of, time_llm, timed_load


def folder_of(workload: Workload, variant: str) -> Path:
    """The directory of the built model."""
    return workload.folder / f"genai-{variant}"


def prepare(workload: Workload, variant: str) -> None:
    """Build the model: INT4 by block of 32 (the builder's default), activations in INT8 inside the products (accuracy level 4)."""
    folder = folder_of(workload, variant)
    if not (folder / "genai_config.json").is_file():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(workload.llm), "-o", str(folder), "-p", "int4"]
        extra = ["-e", "cpu", "-c", str(workload.folder / "genai-cache"), "--extra_options", "int4_accuracy_level=4"]
        subprocess.run([*command, *extra], check=True, stdout=sys.stderr)


def measure(workload: Workload, variant: str) -> Samples:
    """Time greedy replies by `append_tokens` and `generate_next_token`; prefill ends with the first token."""
    import onnxruntime_genai as og

    folder = folder_of(workload, variant)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = workload.threads
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    model, samples = timed_load(lambda: og.Model(str(folder)))
    generators: list[og.Generator] = []

    def reset() -> None:
        generators.clear()
        params = og.GeneratorParams(model)
        params.set_search_options(
            max_length=len(workload.ids) + workload.new_tokens, min_length=len(workload.ids) + workload.new_tokens, do_sample=False
        )
        generators.append(og.Generator(model, params))

    def prefill(ids: list[int]) -> int:
        generators[0].append_tokens(ids)
        return decode(0)

    def decode(_token: int) -> int:  # the generator remembers its own last token
        generators[0].generate_next_token()
        return int(generators[0].get_next_tokens()[0])

    return samples | time_llm(prefill, decode, reset, workload)


PEER = Peer(
    "llm",
    ("int4",),
    measure,
    packages=("torch==2.13.0", "onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "transformers"),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main_of(PEER))
