"""Several sizes of pictures: a graph and an engine for each size, or one for all of them?

Question: Should the encoder have a graph for each size of pictures, or one whose size is dynamic? And what should TensorRT make of it: an
engine for each size, one engine with a profile for each size, or one engine with one profile?
Verdict: one dynamic graph. onnxruntime computes the same with it, as fast within 5 %, with the weights in memory once. TensorRT for RTX
stores the weights once in an engine with a profile for each size, and has the kernels of the engines for one size. The product does that.
Ran: 2026-11-29, at commit a6e7807 (record: benchmarks/results/image_sizes.json).
Command at that commit: python -m benchmarks.studies.image_sizes --checkpoint FOLDER

FOLDER is a random 0.5B (`examples/checkpoints/random_checkpoint.py`). Every build runs in its own process, for SM 8.6 and without a GPU.
`calibrated` has INT8 inputs before every dense product, as a calibrated encoder has; the values of the scales change nothing. Kernels,
scratch memory and bytes of an engine are what the builder says; the bytes are about what the engine takes on the device. On a CPU, all
blocks compute in INT8 with `int8`; memory is that of a process that loads the sessions and encodes a picture of each size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.machine import describe
from benchmarks.engine_builds import SM86, AnonymousPeak, anonymous_mib, stored_bytes
from fastvlm_edge.backends.ort_session import load, session_options, share_arena
from fastvlm_edge.convert.checkpoint.checkpoint import load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.vision import build_vision
from fastvlm_edge.convert.precision import on_cpu, precision_plan
from fastvlm_edge.convert.weights.vision import write_vision_weights
from fastvlm_edge.engines.layers import parse_listing
from fastvlm_edge.nvidia.tensorrt_library import BuildSettings, find_library

RESULT = Path(__file__).resolve().parents[1] / "results" / "image_sizes.json"
SIZES = (1024, 512, 256)
PRECISIONS = ("fp32", "fp16", "int8", "calibrated")
SCALE = 0.05
ON_CPU = ("fp32", "int8")
ROUNDS, THREADS = 9, 2


def jobs() -> list[dict[str, Any]]:
    """Name, graph and the ranges of sizes of every build: smallest, optimal, largest for each profile."""
    exact = [(size,) * 3 for size in SIZES]
    return [
        *({"engine": f"of {size} px", "graph": str(size), "profiles": [(size,) * 3]} for size in SIZES),
        {"engine": "dynamic, a profile for each size", "graph": "dynamic", "profiles": exact},
        {"engine": "dynamic, one profile", "graph": "dynamic", "profiles": [(min(SIZES), max(SIZES), max(SIZES))]},
    ]


def write_graphs(checkpoint: Path, folder: Path, precision: str) -> None:
    """The graphs of one precision over one file of weights."""
    folder.mkdir(parents=True)
    plan = precision_plan("int8" if precision == "calibrated" else precision)
    source = open_checkpoint(str(checkpoint))
    weights = WeightsFile(folder / "vision.weights")
    write_vision_weights(load_vision(source), load_projector(source), plan, weights, lambda: None)
    weights.close()
    integers = [name.removesuffix(".weight.scale") for name in weights.entries if name.endswith(".weight.scale")]
    dense = [name for name in integers if is_dense(name)] if precision == "calibrated" else []
    for size in (*SIZES, None):
        graph = GraphBuilder("vision", weights)
        build_vision(graph, source.vision, source.text.hidden, size, plan, dict.fromkeys(dense, SCALE))
        graph.save(folder / f"{size or 'dynamic'}.onnx")
        if precision in ON_CPU:
            graph = GraphBuilder("vision", weights)
            inputs = [name for name in integers if name.endswith((".fc1", ".fc2", ".qkv", ".token_mixer.proj"))]
            build_vision(
                graph, source.vision, source.text.hidden, size, on_cpu(plan), integer_inputs=[n for n in inputs if ".se." not in n]
            )
            graph.save(folder / f"vision.cpu.{size or 'dynamic'}.onnx")


def is_dense(name: str) -> bool:
    """Whether calibration may quantise the inputs of a layer (`calib/encoder/chain.py`)."""
    return name.endswith((".fc1", ".fc2", ".qkv", ".token_mixer.proj", ".downsample.proj.1", "stem.2")) and ".se." not in name


def run_on_cpu(folder: Path, graphs: list[str]) -> dict[str, Any]:
    """Load the graphs into this process, and encode a picture of each size with those that take it. Times if there are both kinds."""
    share_arena()
    before = anonymous_mib()
    began = time.perf_counter()
    paths = {graph: folder / f"vision.cpu.{graph}.onnx" for graph in graphs}
    sessions = {graph: load(path, session_options(path, THREADS), ["CPUExecutionProvider"]) for graph, path in paths.items()}
    loaded, mib = time.perf_counter() - began, anonymous_mib() - before
    times: dict[str, list[float]] = {}
    sums: dict[str, float] = {}
    both = len(graphs) > len(SIZES)
    for turn in range(ROUNDS if both else 1):
        for size in SIZES:
            pixels = np.random.default_rng(size).random((1, 3, size, size), np.float32)
            able = [graph for graph in graphs if graph in (str(size), "dynamic")]
            for graph in able[:: -1 if turn % 2 else 1]:
                name = f"{size} px, {'dynamic' if graph == 'dynamic' else 'fixed'}"
                began = time.perf_counter()
                features = sessions[graph].run(None, {"pixel_values": pixels})[0]
                times.setdefault(name, []).append(1000 * (time.perf_counter() - began))
                sums[name] = float(np.abs(features).sum())
    figures = {"loaded_mib": mib, "used_mib": anonymous_mib() - before, "load_seconds": round(loaded, 2)}
    if not both:
        return figures
    return {"median_ms": {name: round(float(np.median(each))) for name, each in times.items()}, "sum_of_features": sums}


def build(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run one build in this process."""
    profiles = tuple({"pixel_values": tuple((1, 3, size, size) for size in sizes)} for sizes in job["profiles"])
    library, settings = find_library(("tensorrt_rtx",)), BuildSettings(profiles=profiles, compute_capabilities=(SM86,))
    path = folder / f"{job['graph']}.onnx"
    began, cpu = time.perf_counter(), time.process_time()
    with AnonymousPeak() as anonymous:
        built = library.build(path, settings)
    layers = [layer for layer in parse_listing(built.listing) if layer.kind not in ("shape_call", "signal", "wait")]
    return {
        "onnx_weight_bytes": stored_bytes(path),
        "engine_bytes": len(memoryview(built.plan)),
        "scratch_bytes": built.scratch_bytes,
        "kernels": len(layers),
        "attentions": sum("mha" in layer.name for layer in layers),
        "int8_products": sum(
            layer.kind in ("correlation", "gemm") and any(each.dtype == "Int8" for each in layer.inputs) for layer in layers
        ),
        "written_out": sum(layer.widens_weights for layer in layers),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_anonymous_mib": anonymous.mib,
    }


def main() -> None:
    """Run all builds and write the record after each; or be the process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a random 0.5B")
    parser.add_argument("--work", type=Path, default=Path("build/image_sizes"), help="where the graphs are written")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        print(json.dumps(run_on_cpu(options.work, job["graphs"]) if "graphs" in job else build(options.work, job)))
        return
    document: dict[str, Any] = {"machine": describe(), "results": []}
    document["machine"]["versions"]["tensorrt_rtx"] = version("tensorrt_rtx")
    for precision in PRECISIONS:
        folder = options.work / precision
        if not folder.is_dir():
            write_graphs(options.checkpoint, folder, precision)
        fixed = list(map(str, SIZES))
        cpu = [
            {"on_cpu": "a graph for each size", "graphs": fixed},
            {"on_cpu": "one dynamic graph", "graphs": ["dynamic"]},
            {"on_cpu": "both in turn", "graphs": [*fixed, "dynamic"]},
        ]
        for job in [*(cpu if precision in ON_CPU else ()), *(jobs() if precision != "fp32" else ())]:
            command = [sys.executable, "-m", "benchmarks.studies.image_sizes", "--work", str(folder), "--job", json.dumps(job)]
            done = subprocess.run(command, capture_output=True, text=True)
            figures = {"error": done.stderr[-500:]} if done.returncode else json.loads(done.stdout.splitlines()[-1])
            row = {"precision": precision, **job, **figures}
            print(row, flush=True)
            document["results"].append(row)
            RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
