"""What measurements become in the record: four digits, medians with their spread, and the most device memory."""

from __future__ import annotations

from benchmarks.gpu.record import Part
from fastvlm_edge.bench.record import summary
from fastvlm_edge.machine.peak_memory import DeviceMemory, peak_host_mib

STAGES = ("ttft_ms", "preprocess_ms", "vision_ms", "prefill_ms")


def first_token(rows: list[tuple[float, ...]]) -> Part:
    """Rows of seconds in the order of STAGES, one a run."""
    columns = zip(STAGES, zip(*rows, strict=True), strict=True)
    return {"first_token": {stage: summary(1e3 * value for value in column) for stage, column in columns}}


def most_memory(memory: DeviceMemory) -> Part:
    """The part with what was most so far, on the GPU and on the host."""
    return {"device_mib": memory.look(), "host_mib": int(peak_host_mib())}
