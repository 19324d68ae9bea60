"""The steps of a run, each the work of one process: what it finds it prints as lines that `run` reads, an exception among them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

from benchmarks.checkpoint import random_checkpoint
from benchmarks.gpu.eager import generate, speed_of_transformers
from benchmarks.gpu.floor import measure_limits
from benchmarks.gpu.ours import ask_demo, speed_of_ours
from benchmarks.gpu.record import Part
from benchmarks.gpu.static_loop import reply_by_static_loop, speed_of_compiled
from benchmarks.gpu.transformers_model import ask_demo_in_transformers
from benchmarks.gpu.workload import DEMO, Task, model_directory
from fastvlm_edge.bench.record import digits

PART = "part: "
"""What the lines begin with that a step prints for the record; everything else on its output is noise of libraries."""


def be_step(step: str, task: Task) -> int:
    """Run a step in this process and print its parts; an exception becomes a part called `error`."""
    kind, _, rest = step.partition(":")
    work = {
        "device": step_device,
        "checkpoint": step_checkpoint,
        "convert": step_convert,
        "reference": step_reference,
        "limits": step_limits,
        "build": step_build,
        "parity": step_parity,
        "speed": step_speed,
    }[kind]
    try:
        for part in work(task, *rest.split(":")):
            print(PART + json.dumps(part), flush=True)
    except Exception as error:
        if os.environ.get("FASTVLM_EDGE_DEBUG"):
            raise
        reason = " ".join(str(error).split())[:600]
        known = type(error).__name__ in ("FastVLMError", "CudaError", "OutOfDeviceMemory")
        print(PART + json.dumps({"error": f"{step}: {reason if known else f'{type(error).__name__}: {reason}'}"}), flush=True)
        return 1
    return 0


def step_device(_task: Task, *_: str) -> Iterator[Part]:
    """Which GPU, driver, libraries and machine."""
    from benchmarks import machine
    from fastvlm_edge.machine.description import describe_gpu, gpu_versions, package_version
    from fastvlm_edge.nvidia.drivers import open_cuda

    open_cuda().close()  # no GPU ends the run here, with the reason
    described = machine.describe()
    described["versions"] |= gpu_versions()
    described["versions"] |= {name: found for name in ("timm", "triton") if (found := package_version(name))}
    yield {"machine": described, "device": describe_gpu()}


def step_checkpoint(task: Task, *_: str) -> Iterator[Part]:
    """The random 0.5B, where no checkpoint was named."""
    if not (task.checkpoint / "config.json").is_file():
        if task.checkpoint != task.work / "checkpoint":
            raise FileNotFoundError(f"{task.checkpoint} has no config.json; give a checkpoint folder, or leave --checkpoint out")
        random_checkpoint(task.work)
    yield {}


def step_convert(task: Task, model: str, precision: str) -> Iterator[Part]:
    """A model directory, unless it is there from an earlier run."""
    from fastvlm_edge.convert.pipeline import convert

    output = model_directory(task, model, precision)
    if not (output / "fastvlm.json").is_file():
        convert(str(DEMO if model == "demo" else task.checkpoint), output, precision=precision)
    yield {}


def step_reference(task: Task, *_: str) -> Iterator[Part]:
    """Replies of the demo model in FP32, on onnxruntime and the CPU."""
    from fastvlm_edge import FastVLM

    with FastVLM.load(model_directory(task, "demo", "fp32"), "ort") as vlm:
        (task.work / "demo-replies.json").write_text(json.dumps(ask_demo(vlm)), encoding="utf-8")
    yield {}


def step_limits(_task: Task, *_: str) -> Iterator[Part]:
    """What the GPU allows at most."""
    return measure_limits()


def step_build(task: Task, precision: str) -> Iterator[Part]:
    """Engines of the demo model and of the one to measure, compared with onnxruntime by `build` itself."""
    from fastvlm_edge.engines.build import build
    from fastvlm_edge.progress import stderr_progress

    for model, key in (("demo", "demo_engines"), ("model", "engines")):
        directory = model_directory(task, model, precision)
        began = time.perf_counter()
        record = build(directory, "auto", progress=stderr_progress())
        cosines = {name: record.parity[name]["cosine"] for name in ("image_features", "logits") if name in record.parity}
        described = {
            "library": f"{record.library} {record.version}",
            "target": record.target,
            "mib": sum(entry.bytes for entry in record.files.values()) >> 20,
            "build_seconds": {part: record.build.get(part, {}).get("seconds") for part in ("vision", "decoder")},
            "seconds_here": digits(time.perf_counter() - began),
        }
        yield {key: described, "parity": {f"{key}_cosine": cosines}}


def step_parity(task: Task, library: str, kind: str) -> Iterator[Part]:
    """Replies of the demo model against the reference."""
    if library in ("tensorrt", "ort-cuda"):
        from fastvlm_edge import FastVLM

        with FastVLM.load(model_directory(task, "demo", kind), library) as vlm:
            yield agreement(ask_demo(vlm), task)
        return
    reply = reply_by_static_loop if library == "compiled" else generate
    yield agreement(ask_demo_in_transformers(task, kind, reply), task)


def agreement(found: list[list[int]], task: Task) -> Part:
    """The part that says how many replies equal those of the reference."""
    expected = json.loads((task.work / "demo-replies.json").read_text(encoding="utf-8"))
    equal = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
    return {"parity": {"asked": len(expected), "equal": equal}}


def step_speed(task: Task, library: str, kind: str) -> Iterator[Part]:
    """Load, first token, decoding, memory."""
    if library in ("tensorrt", "ort-cuda"):
        return speed_of_ours(task, library, kind)
    return speed_of_compiled(task, kind) if library == "compiled" else speed_of_transformers(task, kind)
