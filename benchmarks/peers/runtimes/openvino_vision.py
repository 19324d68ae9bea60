"""OpenVINO: the encoder from our FP32 ONNX, in FP32, in BF16 if the CPU has it, and in INT8 by NNCF."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Peer, Samples, Workload, main_of, time_vision, timed_load


def quantised(workload: Workload) -> Path:
    """The file of the INT8 encoder."""
    return workload.folder / "openvino-int8" / "vision.xml"


def prepare(workload: Workload, variant: str) -> None:
    """Quantise the encoder with the workload's pictures, for `int8`."""
    if variant != "int8" or quantised(workload).is_file():
        return
    import nncf
    import openvino as ov

    model = ov.Core().read_model(source(workload))
    model.reshape([1, 3, workload.image_size, workload.image_size])
    pictures = [picture[None] for picture in workload.pixels()]
    result = nncf.quantize(model, nncf.Dataset(pictures), subset_size=len(pictures))
    quantised(workload).parent.mkdir(exist_ok=True)
    ov.save_model(result, quantised(workload), compress_to_fp16=False)


def source(workload: Workload) -> Path:
    """Our FP32 graph of encoder and projector."""
    return workload.folder / "fp32" / "vision.onnx"


def measure(workload: Workload, variant: str) -> Samples:
    """Time one inference request at a time. Raises RuntimeError for `bf16` on a CPU without BF16."""
    import openvino as ov

    core = ov.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if variant == "bf16" and "BF16" not in capabilities:
        raise RuntimeError(f"this CPU has no BF16, OpenVINO says; it has {', '.join(capabilities)}")
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": workload.threads, "PERFORMANCE_HINT": "LATENCY"}
    if variant != "int8":  # what is not quantised is left to OpenVINO's own choice
        options["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[variant]

    def load() -> Any:
        model = core.read_model(quantised(workload) if variant == "int8" else source(workload))
        model.reshape([1, 3, workload.image_size, workload.image_size])
        return core.compile_model(model, "CPU", options)

    compiled, samples = timed_load(load)
    request = compiled.create_infer_request()
    return samples | time_vision(lambda pixels: request.infer([pixels])[0], workload)


PEER = Peer("vision", ("bf16", "int8", "fp32"), measure, packages=("openvino", "nncf"), prepare=prepare)

if __name__ == "__main__":
    sys.exit(main_of(PEER))
