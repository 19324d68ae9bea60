"""The GPU of this machine: what it is, which rates it reaches, and what FastVLM could take on it at least.

`python -m benchmarks.peers.gpu` prints device, versions and rates as one JSON object. Without a GPU it says what is missing and exits with
status 1. Not yet run on hardware.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.peers.protocol import DEEP
from fastvlm_edge.bench.record import digits
from fastvlm_edge.errors import FastVLMError

if TYPE_CHECKING:
    from fastvlm_edge.planning.workload import Shape

RATE_OF = {"fp16": "float16", "bf16": "bfloat16", "int8": "float16", "int4": "float16"}
"""Precision -> the type whose matrix rate bounds it: integer weights are multiplied as floats."""
COPIED_BYTES, COPIES = 512 << 20, 20
MATRIX_SIZE = 8192


def describe() -> dict[str, Any]:
    """The GPU with its driver, the versions that its figures depend on, and its measured limits. Raises FastVLMError without a GPU."""
    from fastvlm_edge.machine.description import gpu_versions, package_version
    from fastvlm_edge.nvidia.description import describe_gpu
    from fastvlm_edge.nvidia.drivers import open_cuda

    open_cuda().close()  # raises
    versions = gpu_versions() | {name: found for name in ("timm", "triton") if (found := package_version(name))}
    return {"device": describe_gpu(), "versions": versions, "limits": measure_limits()}


def measure_limits() -> dict[str, Any]:
    """Bytes/s of copies within device memory, read and written, by the toolkit's CUDA module; matrix products by PyTorch if it has CUDA."""
    limits: dict[str, Any] = {"copy_gb_per_second": digits(copy_rate() / 1e9)}
    try:
        import torch
    except ImportError:
        return limits | {"matrix_tflops_missing": "PyTorch is not installed"}
    if not torch.cuda.is_available():
        return limits | {"matrix_tflops_missing": "this PyTorch has no CUDA"}
    rates = {name: digits(matrix_rate(torch, name) / 1e12) for name in ("float16", "bfloat16", "tf32", "float32")}
    return limits | {"matrix_tflops": rates}


def copy_rate(nbytes: int = COPIED_BYTES, copies: int = COPIES) -> float:
    """Bytes/s that device-to-device copies read and write together, the best of three series."""
    from fastvlm_edge.nvidia.drivers import open_cuda

    cuda = open_cuda()
    nbytes = min(nbytes, cuda.free_bytes() // 8)
    stream = cuda.create_stream()
    source, destination = cuda.allocate(nbytes), cuda.allocate(nbytes)
    best = 0.0
    try:
        cuda.zero(source, nbytes, stream)
        cuda.copy(destination, source, nbytes, stream)
        cuda.synchronize(stream)
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(copies):
                cuda.copy(destination, source, nbytes, stream)
            cuda.synchronize(stream)
            best = max(best, 2 * nbytes * copies / (time.perf_counter() - began))
    finally:
        for address in (source, destination):
            cuda.free(address)
        cuda.destroy_stream(stream)
        cuda.close()
    return best


def matrix_rate(torch: Any, name: str, size: int = MATRIX_SIZE) -> float:
    """Floating-point operations per second of a square product, the best of ten after three that warm up."""
    if torch.cuda.mem_get_info()[0] < 16 * size**2:
        size //= 4
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = float("inf")
    for run in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.matmul(a, b, out=out)
        end.record()
        torch.cuda.synchronize()
        if run >= 3:
            best = min(best, begin.elapsed_time(end) / 1e3)
    return float(2 * size**3 / best)


def floor_of(shape: Shape, image_size: int, prompt: int, precisions: Iterable[str], limits: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest milliseconds and the most tokens/s that the measured rates allow, by precision.

    Counts of operations and bytes are those of `fastvlm-edge plan`. Its count for prefill has the whole last layer, which is some 4 % more
    than our graph computes (`planning.workload.prefill_macs`).
    """
    from fastvlm_edge.planning.workload import PRECISIONS, decode_bytes, prefill_macs, vision_work

    work = vision_work(shape.vision, shape.text.hidden, image_size)
    vision, prefill = 2 * (work.dense + work.grouped), 2 * prefill_macs(shape.text, prompt)
    floor: dict[str, Any] = {"vision_gflop": digits(vision / 1e9), "prefill_gflop": digits(prefill / 1e9), "by_precision": {}}
    bandwidth, rates = limits.get("copy_gb_per_second"), limits.get("matrix_tflops", {})
    for precision in precisions:
        weights, rate = PRECISIONS[precision], rates.get(RATE_OF[precision])
        row: dict[str, Any] = {"vision_ms": digits(vision / rate / 1e9), "prefill_ms": digits(prefill / rate / 1e9)} if rate else {}
        for positions in (prompt, DEEP):
            read = decode_bytes(shape.text, weights.body, weights.head, positions)
            row[f"mb_per_token@{positions}"] = digits(read / 1e6)
            if bandwidth:
                row[f"decode_tokens_per_second@{positions}"] = digits(bandwidth * 1e9 / read)
        floor["by_precision"][precision] = row
    return floor


def main() -> int:
    """Print the description; 1 without a GPU."""
    try:
        found = describe()
    except FastVLMError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
