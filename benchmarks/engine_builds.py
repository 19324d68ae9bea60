"""What building engines of real size with TensorRT for RTX costs: bytes, seconds and memory by layout of the profiles and by builder flag.

    python -m benchmarks.engine_builds [--models build/bench] [--only GROUP]

Every build runs in a process of its own, so that its peak memory is its own. Needs no GPU. `--models` holds one model directory per
precision, made by `fastvlm-edge convert`.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from benchmarks.common.machine import describe

RESULT = Path(__file__).resolve().parent / "results" / "engine_builds.json"
CAPACITY = (128, 1024, 4096)
SEQUENCES: dict[str, list[tuple[int, int, int]]] = {
    "one profile": [(1, 64, 512)],
    "two profiles": [(2, 256, 512), (1, 1, 1)],
    "prefill alone": [(2, 256, 512)],
    "decode alone": [(1, 1, 1)],
}
"""Layouts of the decoder: (least, best, most) tokens of each profile."""
PRECISIONS = ("int4", "int8", "fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Job:
    """One build."""

    group: str
    precision: str
    graph: str = "decoder"
    layout: str = "one profile"
    flags: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ("SM86",)
    """Empty: TensorRT's default."""
    level: int = 3
    workspace_mib: int = 0
    """0: no limit set."""
    detailed: bool = True
    timing_cache: bool = False
    quantize_inputs: str = ""
    """Vision: put Q and DQ before `all` convolutions, or only before `dense` ones, those that are not grouped."""
    cancel_after: float = 0.0
    """Seconds after which the progress monitor asks to stop; 0: never."""


def jobs(precisions: list[str]) -> list[Job]:
    """All builds, in the order of the record."""
    plain = Job("layout", "int8")
    every = [
        Job("layout", precision, layout=layout, flags=flags)
        for precision in precisions
        for layout in (SEQUENCES if precision in ("int4", "int8", "fp16") else ("one profile",))
        for flags in ((), ("STRIP_PLAN",))
    ]
    every += [Job("vision", precision, "vision", "static", flags) for precision in precisions for flags in ((), ("STRIP_PLAN",))]
    every += [Job("w8a8", "int8", "vision", "static", quantize_inputs=which) for which in ("all", "dense")]
    flags = replace(plain, group="flag")
    sets = (("REFIT",), ("REFIT_IDENTICAL",), ("STRIP_PLAN", "REFIT_IDENTICAL"), ("WEIGHT_STREAMING",), ("DISABLE_COMPILATION_CACHE",))
    every += [replace(flags, flags=each) for each in sets]
    every += [replace(flags, detailed=False), replace(flags, timing_cache=True)]
    every += [replace(flags, gpus=gpus) for gpus in (("SM89",), ("SM120",), ("SM86", "SM89", "SM120"), ())]
    every += [replace(plain, group="level", level=level) for level in range(6)]
    every += [replace(plain, group="workspace", workspace_mib=mib) for mib in (1, 16, 1024)]
    every += [replace(plain, group="cancel", cancel_after=seconds) for seconds in (0.5, 2.0, 4.0)]
    return every


def build(job: Job, model: Path) -> dict[str, Any]:
    """Run one build in this process and return what it cost; `errors` if the graph cannot be parsed."""
    import tensorrt_rtx as trt

    from benchmarks.common.tensorrt_log import LOG, layers

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Adds up phases of the same name; asks to stop after `job.cancel_after` seconds."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, dict[str, Any]] = {}
            self.calls: list[float] = []
            self.refused_at = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phase = self.phases.setdefault(
                phase_name, {"parent": parent_phase, "times": 0, "steps": 0, "announced": 0, "start": _since(began)}
            )
            phase["times"] += 1
            phase["announced"] += num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases[phase_name]["steps"] += 1
            self.calls.append(_since(began))
            stop = job.cancel_after > 0 and self.calls[-1] > job.cancel_after
            if stop and not self.refused_at:
                self.refused_at = self.calls[-1]
            return not stop

        def phase_finish(self, phase_name: str) -> None:
            self.phases[phase_name]["end"] = _since(began)

    imported = _peak_mib()
    builder = trt.Builder(LOG)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOG)
    began = time.perf_counter()
    if not parser.parse(_model_bytes(model, job.quantize_inputs), str(model)):
        return {"errors": [parser.get_error(i).desc() for i in range(parser.num_errors)]}
    row: dict[str, Any] = {"parse_seconds": _since(began), "imported_mib": imported, "parsed_mib": _peak_mib()}
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(job.gpus)
    for index, gpu in enumerate(job.gpus):
        config.set_compute_capability(getattr(trt.ComputeCapability, gpu), index)
    config.builder_optimization_level = job.level
    if job.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_mib << 20)
    for flag in job.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if job.timing_cache:
        cache = config.create_timing_cache(b"")
        row["timing_cache"] = {"accepted": config.set_timing_cache(cache, False), "bytes_before": cache.serialize().nbytes}
    config.progress_monitor = monitor = Monitor()
    for sequence in SEQUENCES.get(job.layout, [(1, 1, 1)]):
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            profile.set_shape(tensor.name, *_shapes(tensor.name, tuple(tensor.shape), sequence))
        config.add_optimization_profile(profile)
    began = time.perf_counter()
    with AnonymousPeak() as anonymous:
        plan = builder.build_serialized_network(network, config)
    row |= {"build_seconds": _since(began), "peak_mib": _peak_mib(), "peak_anonymous_mib": anonymous.mib}
    row["engine_bytes"] = plan.nbytes if plan else None
    if job.timing_cache:
        row["timing_cache"]["bytes_after"] = config.get_timing_cache().serialize().nbytes
    text = "\n".join(message for _, message in LOG.lines)
    errors = [message for severity, message in LOG.lines if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)]
    row |= {"errors": errors} if errors else {}
    row["weights_in_engine_bytes"] = _last(text, "Total Weights Memory: ")
    row["activation_bytes"] = _last(text, "Total Activation Memory: ")
    if job.detailed and plan:
        kernels = layers(text)["kernels"]
        row |= {"kernels": len(kernels), "matrix_kernels": _matrix_kernels(kernels)}
    if job.group == "cancel" or (not job.flags and job.layout in ("one profile", "static") and job.group in ("layout", "vision")):
        row["progress"] = {"phases": monitor.phases, "steps": len(monitor.calls)}
        row["progress"] |= {"refused_at": monitor.refused_at} if job.cancel_after else {}
        gaps = [b - a for a, b in zip([0.0, *monitor.calls], [*monitor.calls, row["build_seconds"]], strict=True)]
        row["progress"]["longest_silence_seconds"] = round(max(gaps), 2)
    return row


def _model_bytes(model: Path, quantize_inputs: str) -> bytes:
    """The graph without its weights, with Q and DQ before the convolutions that `quantize_inputs` names. The scale does not matter."""
    if not quantize_inputs:
        return model.read_bytes()
    proto = onnx.load(str(model), load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    proto.graph.initializer.append(helper.make_tensor("qdq.zero", TensorProto.INT8, [], [0]))
    for kind in {TensorProto.FLOAT, TensorProto.FLOAT16}:
        proto.graph.initializer.append(helper.make_tensor(f"qdq.scale{kind}", kind, [], [0.05]))
    nodes: dict[str, onnx.NodeProto] = {}
    for node in proto.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Conv" and ("group" not in attributes or attributes["group"].i == 1 or quantize_inputs == "all"):
            weight = nodes[node.input[1]]
            kind = kinds[weight.input[1]] if weight.op_type == "DequantizeLinear" else weight.attribute[0].i  # a Cast
            x, q, dq, scale = node.input[0], f"{node.input[0]}/q", f"{node.input[0]}/dq", f"qdq.scale{kind}"
            if dq not in nodes:
                nodes[q] = helper.make_node("QuantizeLinear", [x, scale, "qdq.zero"], [q], name=q)
                nodes[dq] = helper.make_node("DequantizeLinear", [q, scale, "qdq.zero"], [dq], name=dq)
            node.input[0] = dq
        nodes[node.output[0]] = node
    ordered = list(nodes.values())
    del proto.graph.node[:]
    proto.graph.node.extend(ordered)
    return bytes(proto.SerializeToString())


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _last(text: str, label: str) -> int | None:
    """The largest number that follows `label` in the log. A plan for several GPUs lists one engine after another."""
    found = [int(part.split(" ")[0]) for part in text.split(label)[1:]]
    return max(found, default=None)


def _shapes(name: str, shape: tuple[int, ...], sequence: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """(least, best, most) of one input."""
    if name in ("input_ids", "position_ids"):
        return [(1, tokens) for tokens in sequence]
    if name == "logit_positions":
        return [(1, 1), (1, 1), (1, 8)]
    if name == "image_features":
        return [(rows, shape[1]) for rows in (1, 256, 1024)]
    if name == "pixel_values":
        return [(1, *shape[1:])] * 3
    return [(1, shape[1], capacity, shape[3]) for capacity in CAPACITY]


def _matrix_kernels(kernels: list[str]) -> dict[str, int]:
    """Kernels that hold weights or multiply: how many read integers directly, and how many dequantise into memory first."""
    count: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        kind = kernel.partition("[")[0].partition(":")[0]
        integers = "Int8 const" in kernel or "Int4 const" in kernel
        if kind == "runtime_fusion" and integers:
            count["product that dequantises as it reads"] += 1
        elif kind == "kgen" and integers and "Gath" not in kernel:
            count["weights dequantised into memory"] += 1
        elif kind in ("gemm", "correlation"):
            count[f"{kind} {kernel.partition(': ')[2]}"] += 1
    return dict(count.most_common())


def describe_graph(model: Path) -> dict[str, Any]:
    """Bytes of a graph's tensors on disk, and the commonest float type of its weights and their scales."""
    tensors = onnx.load(str(model), load_external_data=False).graph.initializer
    lengths = [{entry.key: entry.value for entry in tensor.external_data}.get("length", "0") for tensor in tensors]
    kinds = collections.Counter(TensorProto.DataType.Name(t.data_type) for t in tensors if t.data_type in (1, 10, 16))
    return {"onnx_weight_bytes": sum(map(int, lengths)), "float": kinds.most_common(1)[0][0]}


class AnonymousPeak:
    """The most anonymous memory that this process holds, sampled every 20 ms. The resident peak counts the mapped weights file too."""

    def __enter__(self) -> AnonymousPeak:
        self.mib = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            self.mib = max([self.mib, *(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))])


def _job(fields: dict[str, Any]) -> Job:
    job = Job(**fields)
    return replace(job, flags=tuple(job.flags), gpus=tuple(job.gpus))


def main() -> None:
    """Run all builds, each in a process of its own, and write the record after each; or be one of these processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", help="one group, its rows put in place of the recorded ones")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = _job(json.loads(options.job))
        print(json.dumps(build(job, options.models / job.precision / f"{job.graph}.onnx")))
        return
    present = [precision for precision in PRECISIONS if (options.models / precision / "decoder.onnx").is_file()]
    document = json.loads(RESULT.read_text(encoding="utf-8")) if options.only else {"results": []}
    document["results"] = [row for row in document["results"] if row["group"] != options.only]
    for job in jobs(present):
        if options.only not in (None, job.group):
            continue
        command = [sys.executable, "-m", "benchmarks.engine_builds", "--models", str(options.models), "--job", json.dumps(asdict(job))]
        done = subprocess.run(command, capture_output=True, text=True)
        row = (
            json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"errors": [done.stderr[-500:]], "exit": done.returncode}
        )
        model = options.models / job.precision / f"{job.graph}.onnx"
        document["results"].append({**asdict(job), **describe_graph(model), **row})
        shown = {key: row.get(key) for key in ("build_seconds", "peak_mib", "engine_bytes", "activation_bytes", "errors")}
        print(job.group, job.precision, job.graph, job.layout, job.flags, job.gpus, job.level, job.workspace_mib, shown, flush=True)
        document["machine"] = describe()
        document["machine"]["versions"]["tensorrt_rtx"] = version("tensorrt_rtx")
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
