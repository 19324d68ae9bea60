"""llama.cpp: the LLM as GGUF, all matrices Q8_0, or Q4_0 with a Q8_0 head. Installing llama-cpp-python compiles it, which takes minutes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Peer, Samples, Workload, main_of, time_llm, timed_load


def path_of(workload: Workload, variant: str) -> Path:
    """The GGUF file."""
    return workload.folder / f"llama-{variant}.gguf"


def prepare(workload: Workload, variant: str) -> None:
    """Write the checkpoint as GGUF."""
    path = path_of(workload, variant)
    if not path.is_file():
        partial = path.with_suffix(".partial")
        write_gguf(workload.checkpoint, partial, variant)
        partial.replace(path)


def measure(workload: Workload, variant: str) -> Samples:
    """Time greedy replies through llama-cpp-python's `eval`."""
    import llama_cpp
    import numpy as np

    threads, room = workload.threads, -(-(len(workload.ids) + workload.new_tokens) // 256) * 256

    def load() -> Any:
        path = str(path_of(workload, variant))
        return llama_cpp.Llama(path, n_ctx=room, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    llama, samples = timed_load(load)
    vocab = llama.n_vocab()

    def feed(ids: list[int]) -> int:
        llama.eval(ids)
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (vocab,)).argmax())

    return samples | time_llm(feed, lambda token: feed([token]), llama.reset, workload)


def write_gguf(checkpoint: Path, path: Path, variant: str) -> None:
    """Write the LLM of a native checkpoint: matrices in the type of `variant`, the tied embedding in Q8_0, vectors in F32."""
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
                kind = getattr(gguf.GGMLQuantizationType, "Q8_0" if "embed" in name else variant.upper())
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


PEER = Peer(
    "llm",
    ("q4_0", "q8_0"),
    measure,
    packages=("llama-cpp-python", "gguf", "ml_dtypes", "numpy", "safetensors"),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main_of(PEER))
