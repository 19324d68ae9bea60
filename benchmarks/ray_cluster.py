"""Does Ray cost throughput, and does the memory of its driver grow with the rows?

    python -m benchmarks.ray_cluster MODEL [--workers 2] [--rows 1500] [--rounds 5] [--out benchmarks/results/ray_cluster.json]

Needs the extra `ray`. The same rows, each with a picture of its own, are answered by as many processes with a plain loop over their part
(`RowAnswerer`), and by as many actors of a Ray cluster on this machine (`Workers`), in turn. Every process has one thread. Then the whole
command reads and writes 100,000 rows, with actors that answer at once. `--rounds 0` does only that.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

import fastvlm_edge.ray
from benchmarks.peers.protocol import ROOT
from fastvlm_edge import FastVLM
from fastvlm_edge.batch.answering import RowAnswerer
from fastvlm_edge.batch.job import Job, job_for
from fastvlm_edge.batch.results import Results
from fastvlm_edge.batch.rows import Row
from fastvlm_edge.bench.record import digits, summary, write_json
from fastvlm_edge.commands import batch
from fastvlm_edge.commands.demo import MODEL as DEMO
from fastvlm_edge.machine.description import describe
from fastvlm_edge.model_dir.manifest import read_manifest

PROMPT = "What is in this picture?"
TOKENS = 32
SIZE = 256
"""Pixels per side of the pictures."""
WARM = 0.2
"""The first part of the rows that is not measured: processes start and load the model at different times."""
SETTLE = 20.0
"""Seconds that the processes of a new cluster are given to start."""
MANY = 100_000
STEP = 20_000
"""Rows between two looks at the memory."""


def measured_rows(folder: Path, count: int) -> list[Row]:
    """Rows with a picture each, of random fields, as JPEG files."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        path = folder / f"{index}.jpg"
        fields = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        fields.resize((SIZE, SIZE), Image.Resampling.NEAREST).save(path, quality=90)
        rows.append(Row(str(index), path, PROMPT))
    return rows


@dataclass(frozen=True)
class Speed:
    rows_per_second: float
    cpu_ms_per_row: float
    """Of all processes, those of Ray included. Other programs on the machine change it less than `rows_per_second`."""
    overhead: float = 0.0
    """The part of it that is not of the processes with a model: the driver and Ray's own processes."""


def cpu_seconds() -> tuple[float, float]:
    """CPU time of this process and of all that descend from it and still run; and how much of it is not of actors."""
    parents, ticks, actors = dict[int, int](), dict[int, int](), set[int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            actor = path.with_name("cmdline").read_bytes().startswith(b"ray::_Actor")
        except OSError:
            continue  # it has just ended
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
        actors |= {pid} if actor else set()
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    second = os.sysconf("SC_CLK_TCK")
    return sum(ticks[pid] for pid in ours) / second, sum(ticks[pid] for pid in ours - actors) / second


def rate(times: Sequence[float]) -> float:
    """Rows per second, from when each was finished, without the first of them."""
    ordered = sorted(times)
    first = int(len(ordered) * WARM)
    return (len(ordered) - first - 1) / (ordered[-1] - ordered[first])


def plain_loop(model: Path, job: Job, rows: Sequence[Row], all_ready: Any, times: Queue[list[float]]) -> None:
    """Answer rows in this process, once all processes are ready."""
    with FastVLM.load(model, "ort", threads=1) as vlm:
        all_ready.wait()
        times.put([time.monotonic() for _ in RowAnswerer(vlm, job).answer(rows)])
        all_ready.wait()


def with_plain_loops(model: Path, job: Job, rows: Sequence[Row], count: int) -> Speed:
    """`count` processes."""
    context = multiprocessing.get_context("spawn")
    times: Queue[list[float]] = context.Queue()
    all_ready = context.Barrier(count + 1)
    loops = [context.Process(target=plain_loop, args=(model, job, rows[index::count], all_ready, times)) for index in range(count)]
    for loop in loops:
        loop.start()
    all_ready.wait()
    before, _ = cpu_seconds()
    finished = [moment for _ in loops for moment in times.get()]
    used = cpu_seconds()[0] - before
    all_ready.wait()
    for loop in loops:
        loop.join()
    return Speed(rate(finished), 1e3 * used / len(rows))


def with_ray(model: Path, job: Job, rows: Sequence[Row], count: int) -> Speed:
    """`count` actors."""
    started: list[str] = []
    before = (0.0, 0.0)
    settled = time.monotonic() + SETTLE

    def when_all_have_started() -> Iterator[Row]:
        """Rows that are answered until all actors are there and the cluster has nothing else to do, and then those that are measured."""
        number = 0
        while len(started) < count or time.monotonic() < settled:
            yield Row(f"early {number}", rows[number % len(rows)].image, PROMPT)
            number += 1
        nonlocal before
        before = cpu_seconds()
        yield from rows

    with fastvlm_edge.ray.Workers(model, job, address="local", actors=count, threads=1, backend="ort", tell=started.append) as workers:
        answered = workers.answer(when_all_have_started())
        finished = [time.monotonic() for row in answered if not row["id"].startswith("early")]
        used, others = (after - start for after, start in zip(cpu_seconds(), before, strict=True))
    return Speed(rate(finished), 1e3 * used / len(rows), others / used)


class AtOnce:
    """An actor without a model, whose results have the size of real ones."""

    def load(self, version: str, model: str, job: Job, options: dict[str, Any]) -> tuple[str, str]:
        """As of the real actor."""
        return "this machine", "nothing"

    def answer(self, rows: list[Row]) -> list[dict[str, Any]]:
        """As of the real actor."""
        timings = dict.fromkeys(("preprocess_ms", "vision_ms", "queue_ms", "prefill_ms", "ttft_ms", "decode_tokens_per_second"), 1.5)
        same = {"confidence": {"mean": 0.5, "least": 0.25}, "stop_reason": "stop", "timings": {**timings, "new_tokens": 40}}
        return [{"id": row.id, "text": "a text that is as long as an answer " * 4, **same} for row in rows]


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def driver(address: str, count: int) -> dict[str, Any]:
    """Rows per second of the driver alone, and its memory after every STEP rows, for `count` rows from a file to a file."""
    memory: dict[int, int] = {}
    write, real = Results.write, fastvlm_edge.ray._Actor

    def watched(self: Results, row: dict[str, Any]) -> bool:
        written = write(self, row)
        if self.rows % STEP == 0:
            memory[self.rows] = resident_bytes()
        return written

    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "rows.jsonl"), Path(folder, "out.jsonl")
        with source.open("w", encoding="utf-8") as file:
            for index in range(count):
                file.write(json.dumps({"id": f"picture-{index:08}", "image": str(DEMO.parent / "meter.jpg"), "prompt": PROMPT}) + "\n")
        options = ["--engine", "ray", "--address", address, "--workers", "2", "--threads", "1", "--quiet"]
        began = time.monotonic()
        try:
            Results.write = watched  # type: ignore[method-assign]
            fastvlm_edge.ray._Actor = AtOnce  # type: ignore[misc, assignment]
            status = batch.main([str(DEMO), str(source), "-o", str(output), *options])
        finally:
            Results.write, fastvlm_edge.ray._Actor = write, real  # type: ignore[method-assign, misc]
        seconds = time.monotonic() - began
        ids = {json.loads(line)["id"] for line in io.BytesIO(output.read_bytes())}
    assert status == 0 and len(ids) == count
    first, last = min(memory), max(memory)
    return {
        "rows": count,
        "rows_per_second": digits(count / seconds),
        "mib_after": {str(rows): round(size / (1 << 20), 1) for rows, size in memory.items()},
        "bytes_per_row": digits((memory[last] - memory[first]) / (last - first)),
    }


def figures(speeds: Sequence[Speed]) -> dict[str, Any]:
    """Median, minimum and maximum of both figures."""
    return {name: summary(getattr(speed, name) for speed in speeds) for name in ("rows_per_second", "cpu_ms_per_row", "overhead")}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ray_cluster.json")
    options = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as the plain loops; Ray's default is 15
    manifest = read_manifest(options.model)
    job = job_for(manifest, {"max_new_tokens": TOKENS}, prompt=PROMPT)
    loops, actors = list[Speed](), list[Speed]()
    with tempfile.TemporaryDirectory() as folder:
        rows = measured_rows(Path(folder), options.rows)
        for turn in range(options.rounds):
            loops.append(with_plain_loops(options.model, job, rows, options.workers))
            actors.append(with_ray(options.model, job, rows, options.workers))
            print(f"round {turn + 1}: plain loops {loops[-1]}, Ray {actors[-1]}", flush=True)
    found = driver("local", MANY)
    print(found)
    record: dict[str, Any] = {"machine": describe(("ray", "onnxruntime", "numpy")), "driver": found}
    if loops:
        record |= {
            "model": f"{manifest.name} {manifest.precision}",
            "workers": options.workers,
            "rows": options.rows,
            "new_tokens": TOKENS,
            "plain_loops": figures(loops),
            "ray": figures(actors),
            "ratio": digits(median(ray.rows_per_second / loop.rows_per_second for ray, loop in zip(actors, loops, strict=True))),
            "cpu_ratio": digits(median(loop.cpu_ms_per_row / ray.cpu_ms_per_row for ray, loop in zip(actors, loops, strict=True))),
        }
    write_json(options.out, record)


if __name__ == "__main__":
    main()
