"""llama.cpp beside ours: prefill and decode speed of the 0.5B LLM (no encoder there), Q4_0 body with a Q8_0 head, in one run.

    python benchmarks/peers/llamacpp.py [--work DIR] [--out benchmarks/results/llama_cpp.json]

The first run makes an environment of its own in DIR/llama-cpp (llama-cpp-python is compiled: minutes) and writes the checkpoint of
`benchmarks/cpu.py` as GGUF. The same random weights, the same number of positions, the same threads; rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PROMPT_TOKENS = 290
NEW_TOKENS = 64
PACKAGES = ("gguf", "ml_dtypes", "numpy", "safetensors", "llama-cpp-python")


def main() -> int:
    """Run both in turns and write the JSON, or do one step of it in the other environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "llama_cpp.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", choices=("gguf", "llama.cpp", "fastvlm-edge"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.work / "llama-q4_0.gguf"
    if options.step == "gguf":
        write_gguf(options.work / "checkpoint", model)
        return 0
    if options.step:
        measure = {"llama.cpp": measure_llama, "fastvlm-edge": measure_ours}[options.step]
        print(json.dumps(measure(model if options.step == "llama.cpp" else options.work / "int4", options.threads)))
        return 0

    from benchmarks import machine
    from benchmarks.cpu import prepare

    prepare(options.work)
    python = environment(options.work / "llama-cpp")
    base = [__file__, "--work", str(options.work), "--threads", str(options.threads), "--step"]
    if not model.is_file():
        subprocess.run([python, *base, "gguf"], check=True)
    runs: dict[str, list[dict[str, float]]] = {"llama.cpp": [], "fastvlm-edge": []}
    for number in range(options.rounds):
        for name, interpreter in (("llama.cpp", python), ("fastvlm-edge", sys.executable)):
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            done = subprocess.run([interpreter, *base, name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], stdout=subprocess.PIPE, check=True, text=True).stdout
    document = {
        "what": f"0.5B LLM, random weights, INT4 body and INT8 head: prefill of {PROMPT_TOKENS}, then {NEW_TOKENS} tokens",
        "machine": machine.describe(),
        "llama_cpp_python": next(package["version"] for package in json.loads(listed) if package["name"].replace("_", "-") == PACKAGES[-1]),
        "limits": machine.limits(options.threads),
        "results": {name: {key: spread([run[key] for run in found]) for key in found[0]} for name, found in runs.items()},
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document["results"], indent=1))
    return 0


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(statistics.median(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def environment(folder: Path) -> str:
    """The interpreter of an environment with llama-cpp-python, made at the first call."""
    python = folder / "bin" / "python"
    if not (folder / ".ready").is_file():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (folder / ".ready").touch()
    return str(python)


def measure_ours(model: Path, threads: int) -> dict[str, float]:
    """The decoder alone, through the backend that answers questions."""
    import numpy as np

    from fastvlm_edge.backends.ort import OrtDecoder
    from fastvlm_edge.backends.ort_session import on_device
    from fastvlm_edge.manifest import read_manifest

    decoder = OrtDecoder(on_device(model, read_manifest(model), threads=threads))
    ids = np.random.default_rng(0).integers(0, 500, PROMPT_TOKENS).tolist()
    return timed(decoder.step, decoder.reset, ids)


def measure_llama(model: Path, threads: int) -> dict[str, float]:
    """The same through llama-cpp-python's `eval`."""
    import numpy as np
    from llama_cpp import Llama

    llama = Llama(str(model), n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = np.random.default_rng(0).integers(0, 500, PROMPT_TOKENS).tolist()
    return timed(llama.eval, llama.reset, ids)


def timed(step: Any, reset: Any, ids: list[int]) -> dict[str, float]:
    """Prefill in milliseconds and decode in tokens a second, the better of three after a warm-up."""
    prefills, speeds = [], []
    for _ in range(4):
        reset()
        marks = [time.perf_counter()]
        step(ids)
        marks.append(time.perf_counter())
        for token in range(NEW_TOKENS):
            step([token])
        marks.append(time.perf_counter())
        prefills.append((marks[1] - marks[0]) * 1e3)
        speeds.append(NEW_TOKENS / (marks[2] - marks[1]))
    return {"prefill_ms": min(prefills[1:]), "decode_tokens_per_second": max(speeds[1:])}


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The LLM of a native checkpoint as GGUF: matrices Q4_0, the tied embedding Q8_0, vectors F32."""
    import gguf
    import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
    import numpy as np
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{number}>" for number in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["a b"])
    with safe_open(next(checkpoint.glob("*.safetensors")), framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if "language_model" not in name:
                continue
            array = np.asarray(tensors.get_tensor(name)).astype(np.float32)
            kind = gguf.GGMLQuantizationType.F32
            if array.ndim > 1:
                kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in name else gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """The name of a Qwen2 tensor in GGUF."""
    short = name.split("language_model.")[-1].removeprefix("model.")
    whole = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    if short in whole:
        return whole[short]
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    _, layer, rest = short.split(".", 2)
    inner, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{parts[inner]}.{kind}"


if __name__ == "__main__":
    sys.exit(main())
