"""What TensorRT for RTX makes of the decoder and what its build costs, by size, precision and profiles, beside an earlier graph if given.

    python -m benchmarks.engine_builds [--work build/engine_builds] [--before FOLDER]

Shapes are those of `engines/profiles.py`, weights are random. Every build runs in a process of its own, so that its memory is its own. No
GPU is needed. The 7B has two layers of the true shape and its true embedding and head: all 28 do not fit into the memory of the machine.

The recorded `before` is the graph of commit c039fd2. Its FOLDER was written there by a copy of `examples/checkpoints/random_decoder.py`,
without the arguments that this commit did not have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from benchmarks.common.machine import describe
from examples.checkpoints.random_checkpoint import SIZES
from examples.checkpoints.random_decoder import describe as describe_decoder
from examples.checkpoints.random_decoder import write_decoder
from fastvlm_edge.engines.layers import parse_listing
from fastvlm_edge.engines.profiles import decoder_profiles
from fastvlm_edge.nvidia.tensorrt_library import BuildSettings, Profile, find_library

RESULT = Path(__file__).resolve().parent / "results" / "engine_builds.json"
SM86 = (8, 6)
"""The kernels of SM89 and SM120 are the same (`tests/engines/test_kernel_budgets.py`)."""
ONE_ROW = "two profiles, the second for one row"
"""How decoding was built at commit c039fd2, and why it is not any more."""
CASES = {("0.5b", 24): ("int4", "int8", "fp16", "bf16", "fp32"), ("7b", 2): ("int4", "int8", "fp16")}
"""(Size, layers): precisions."""


@dataclass(frozen=True)
class Job:
    """One build."""

    graph: str
    """`before` or `after`."""
    precision: str
    profiles: str
    folder: str
    size: str
    layers: int


def jobs(work: Path, before: Path | None) -> list[Job]:
    """All builds, in the order of the record."""
    every = []
    for (size, layers), precisions in CASES.items():
        for precision in precisions:
            name = f"{size}-{layers}-{precision}"
            if before is not None:
                job = Job("before", precision, "one profile", str(before / name), size, layers)
                every += [job, replace(job, profiles=ONE_ROW)]
            job = Job("after", precision, "one profile", str(work / name), size, layers)
            every += [job, replace(job, profiles="two profiles")]
            every += [replace(job, profiles=ONE_ROW)] if (size, precision) == ("0.5b", "int8") else []
    return every


def profiles_of(job: Job) -> tuple[Profile, ...]:
    """The profiles of the product, or those of commit c039fd2."""
    spec = SIZES[job.size]
    text = replace(spec.text(spec.rows, tied=spec.tied), layers=job.layers)
    manifest = describe_decoder(job.size, job.precision, text)
    if job.profiles != ONE_ROW:
        return decoder_profiles(manifest, separate=job.profiles == "two profiles")
    prefill, decode = decoder_profiles(manifest, separate=True)
    rows = dict.fromkeys(("input_ids", "position_ids", "logit_positions"), ((1, 1), (1, 1), (1, 1)))
    return prefill, {**decode, **rows}


def build(job: Job) -> dict[str, Any]:
    """Run one build in this process and return what it cost and what is in the engine.

    Time is that of the processor, all cores together, because other programs may run on the machine.
    """
    library, settings = find_library(("tensorrt_rtx",)), BuildSettings(profiles=profiles_of(job), compute_capabilities=(SM86,))
    path = Path(job.folder) / "decoder.onnx"
    began = time.process_time()
    with AnonymousPeak() as anonymous:
        built = library.build(path, settings)
    seconds = time.process_time() - began
    kernels = [layer for layer in parse_listing(built.listing) if layer.kind not in ("shape_call", "signal", "wait")]
    return {
        "onnx_weight_bytes": stored_bytes(path),
        "kernels": len(kernels),
        "attentions": sum("mha" in layer.name for layer in kernels),
        "written_out": sum(layer.widens_weights for layer in kernels),
        "scratch_bytes": built.scratch_bytes,
        "engine_bytes": len(memoryview(built.plan)),
        "cpu_seconds": round(seconds, 1),
        "peak_anonymous_mib": anonymous.mib,
    }


def stored_bytes(path: Path) -> int:
    """Bytes of the weights file that belong to tensors of a graph."""
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    return sum(int({entry.key: entry.value for entry in tensor.external_data}.get("length", "0")) for tensor in tensors)


class AnonymousPeak:
    """The most anonymous memory that a block adds to this process, sampled every 20 ms. The resident peak counts mapped weights too."""

    def __enter__(self) -> AnonymousPeak:
        self.mib, self._before = 0, anonymous_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.mib = max(self.mib, anonymous_mib() - self._before)


def anonymous_mib() -> int:
    """Anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))


def measure(job: Job) -> dict[str, Any]:
    """Build in another process. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "benchmarks.engine_builds", "--job", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed: {done.stderr[-500:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Run all builds and write the record after each; or be the process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/engine_builds"), help="where the graphs are written")
    parser.add_argument("--before", type=Path, help="graphs of an earlier commit, in folders named like those of --work")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(build(Job(**json.loads(options.job)))))
        return
    document: dict[str, Any] = {"machine": describe(), "results": []}
    document["machine"]["versions"]["tensorrt_rtx"] = version("tensorrt_rtx")
    for job in jobs(options.work, options.before):
        folder = Path(job.folder)
        if job.graph == "after" and not (folder / "decoder.onnx").is_file():
            write_decoder(folder, job.precision, size=job.size, layers=job.layers)
        row = {name: value for name, value in asdict(job).items() if name != "folder"} | measure(job)
        print(row, flush=True)
        document["results"].append(row)
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
