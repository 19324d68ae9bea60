"""fastvlm-edge among its peers: the whole path from picture to text on the CPU or a GPU, or its decoder alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.protocol import DECODE, DEEP, Peer, Samples, Workload, main_of, time_llm, timed_load

if TYPE_CHECKING:
    from fastvlm_edge.bench.measure import Settings

ALONE = "-llm"
NAMES = {"ttft_cold_ms": "ttft_ms"}


def measure(workload: Workload, variant: str) -> Samples:
    """`fp32`, `int8` or `int4`; with `-llm` the decoder alone; on a GPU a backend and a precision, such as `tensorrt-int4`."""
    from fastvlm_edge.bench.measure import Settings

    if variant.endswith(ALONE):
        return measure_llm(workload, variant.removesuffix(ALONE))
    backend, _, precision = variant.rpartition("-")
    settings = Settings(
        backend or "ort", workload.threads, workload.runs, new_tokens=workload.new_tokens, depths=(DEEP,) if backend else ()
    )
    return samples_of(workload.folder / precision, settings)


def samples_of(directory: Path, settings: Settings) -> Samples:
    """What one process of `fastvlm-edge bench` measures, under the names of the peers' record."""
    from fastvlm_edge.bench.measure import measure

    samples: Samples = {}
    for line in measure(directory, settings):
        if "figure" in line:
            name, _, depth = line["figure"].partition("@")
            if depth and int(depth) >= DEEP:
                name = f"{DECODE}@{DEEP}"
            samples.setdefault(NAMES.get(name, name), []).append(line["value"])
    return samples


def measure_llm(workload: Workload, precision: str) -> Samples:
    """Time the decoder alone, through the backend that answers questions."""
    from fastvlm_edge.backends import malloc
    from fastvlm_edge.backends.ort import OrtDecoder
    from fastvlm_edge.backends.ort_session import on_device, share_arena
    from fastvlm_edge.model_dir.manifest import read_manifest

    directory = workload.folder / precision

    def load() -> OrtDecoder:
        share_arena()
        with malloc.loading():
            return OrtDecoder(on_device(directory, read_manifest(directory), threads=workload.threads))

    decoder, samples = timed_load(load)

    def feed(ids: list[int]) -> int:
        return int(decoder.step(ids).top_ids[-1, 0])

    return samples | time_llm(feed, lambda token: feed([token]), decoder.reset, workload)


def prepare(workload: Workload, variant: str) -> None:
    """Build the engines of the model to measure and of the demo, unless they are up to date."""
    backend, _, precision = variant.rpartition("-")
    if backend == "tensorrt":
        for directory in directories(workload, precision):
            build_engines(directory)


def check(workload: Workload, variant: str) -> dict[str, Any]:
    """Compare the demo's greedy replies with those of onnxruntime on the CPU; with TensorRT, also the figures of `fastvlm-edge build`."""
    from benchmarks.peers.demo import ask, compare_replies
    from fastvlm_edge import FastVLM

    backend, _, precision = variant.rpartition("-")
    measured, demo = directories(workload, precision)
    found: dict[str, Any] = {}
    if backend == "tensorrt":
        found = {"engines": build_engines(measured), "demo_engines": build_engines(demo)}
    with FastVLM.load(demo, backend) as vlm:
        return compare_replies(workload.folder, ask(vlm)) | found


def directories(workload: Workload, precision: str) -> tuple[Path, Path]:
    """The model directories to measure and of the demo."""
    from benchmarks.peers.demo import demo_model

    return workload.folder / precision, demo_model(workload.folder, precision)


def build_engines(directory: Path) -> dict[str, Any]:
    """Library, size, seconds and verification of engines for the GPU of this machine; built only if they are not up to date."""
    from fastvlm_edge.engines.build import build
    from fastvlm_edge.progress import stderr_progress

    record = build(directory, "auto", progress=stderr_progress())
    return {
        "library": f"{record.library} {record.version}",
        "target": record.target,
        "mib": sum(entry.bytes for entry in record.files.values()) >> 20,
        "build_seconds": {part: record.build.get(part, {}).get("seconds") for part in ("vision", "decoder")},
        "verification": record.parity,
    }


PEER = Peer(
    "all",
    ("int4", "int8", "fp32", "int4-llm", "int8-llm"),
    measure,
    gpu_variants=("tensorrt-int4", "tensorrt-int8", "tensorrt-fp16", "ort-cuda-fp16"),
    prepare=prepare,
    check=check,
)

if __name__ == "__main__":
    sys.exit(main_of(PEER))
