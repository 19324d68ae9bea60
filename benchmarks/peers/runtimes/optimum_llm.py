"""optimum-onnx: the LLM exported by it and run by its `ORTModelForCausalLM` on onnxruntime, FP32 and dynamically quantised to INT8."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Peer, Samples, Workload, main_of, time_llm, timed_load


def folder_of(workload: Workload, variant: str) -> Path:
    """The directory of the exported model."""
    return workload.folder / f"optimum-{variant}"


def prepare(workload: Workload, variant: str) -> None:
    """Export the LLM, and quantise it for `int8`."""
    from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    if not (folder_of(workload, "fp32") / "model.onnx").is_file():
        model = ORTModelForCausalLM.from_pretrained(workload.llm, export=True, dtype="float32")
        model.save_pretrained(folder_of(workload, "fp32"))
    if variant == "int8" and not list(folder_of(workload, "int8").glob("*.onnx")):
        quantizer = ORTQuantizer.from_pretrained(folder_of(workload, "fp32"), file_name="model.onnx")
        settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantizer.quantize(save_dir=folder_of(workload, "int8"), quantization_config=settings, use_external_data_format=False)


def measure(workload: Workload, variant: str) -> Samples:
    """Time a greedy loop over the model's own forward with its cache."""
    import onnxruntime as ort
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    torch.set_num_threads(workload.threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = workload.threads
    folder = folder_of(workload, variant)
    name = next(folder.glob("*.onnx")).name
    model, samples = timed_load(lambda: ORTModelForCausalLM.from_pretrained(folder, file_name=name, session_options=options))
    state: dict[str, Any] = {}

    def reset() -> None:
        state.update(past=None, length=0)

    def feed(ids: list[int]) -> int:
        start, state["length"] = state["length"], state["length"] + len(ids)
        out = model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, state["length"], dtype=torch.int64),
            position_ids=torch.arange(start, state["length"])[None],
            past_key_values=state["past"],
            use_cache=True,
        )
        state["past"] = out.past_key_values
        return int(out.logits[0, -1].argmax())

    with torch.inference_mode():
        return samples | time_llm(feed, lambda token: feed([token]), reset, workload)


PEER = Peer("llm", ("int8", "fp32"), measure, packages=("torch==2.13.0", "optimum-onnx[onnxruntime]"), prepare=prepare)

if __name__ == "__main__":
    sys.exit(main_of(PEER))
