"""How much faster is `fastvlm-edge batch` than a plain loop over `FastVLM.generate`?

    python -m benchmarks.batch [MODEL ...] [--pictures 24] [--tokens 32] [--slots 4,8] [--rounds 5] [--out benchmarks/results/batch.json]

MODEL is a model directory, such as a converted random checkpoint of the 0.5B size at 256 px (examples/checkpoints/random_checkpoint.py,
`fastvlm-edge convert --image-size 256`). The demo model is always measured too. Both sides answer the same question about the same JPEG
files, which no cache knows, and every reply has `--tokens` tokens. The batch writes its file and syncs it. In every round the loop and the
batches with each number of slots take turns; loading is not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import machine
from benchmarks.peers.protocol import ROOT
from fastvlm_edge import FastVLM
from fastvlm_edge.batch.answering import RowAnswerer
from fastvlm_edge.batch.job import job_for
from fastvlm_edge.batch.results import Results
from fastvlm_edge.batch.rows import open_rows
from fastvlm_edge.bench.record import digits, write_json
from fastvlm_edge.bench.workload import Pictures
from fastvlm_edge.generation.engine import Engine
from fastvlm_edge.generation.vlm import load_parts
from fastvlm_edge.progress import stderr_progress

DEMO = ROOT / "fastvlm_edge" / "demo" / "model"
QUESTION = "Describe this picture."


def load(directory: Path, slots: int, threads: int | None) -> FastVLM:
    """A model whose replies end at their length only."""
    manifest, tokenizer, backend = load_parts(directory, "ort", threads=threads, slots=slots, tune_process=True)
    endless = replace(manifest, text=replace(manifest.text, stop_ids=[]))
    return FastVLM(endless, tokenizer, Engine(backend, manifest.decoder))


def loop(vlm: FastVLM, folder: Path, tokens: int) -> float:
    """Seconds of a loop over the pictures of a folder."""
    began = time.perf_counter()
    for path in sorted(folder.iterdir()):
        reply = vlm.generate(QUESTION, path, max_new_tokens=tokens)
        if reply.timings.new_tokens != tokens or reply.timings.cached_images:
            raise RuntimeError(f"{reply.timings.new_tokens} tokens, not {tokens}, or the picture was known")
    return time.perf_counter() - began


def batch(vlm: FastVLM, folder: Path, tokens: int, out: Path) -> float:
    """Seconds of a batch over the same pictures."""
    job = job_for(vlm.manifest, {"max_new_tokens": tokens}, prompt=QUESTION)
    began = time.perf_counter()
    with Results(out, job) as results:
        for row in RowAnswerer(vlm, job).answer(open_rows(folder, prompt=QUESTION)):
            if row["timings"]["new_tokens"] != tokens or row["timings"]["cached_images"]:
                raise RuntimeError(f"{row['timings']['new_tokens']} tokens, not {tokens}, or the picture was known")
            results.write(row)
    return time.perf_counter() - began


def measure(directory: Path, options: argparse.Namespace, pictures: Pictures) -> dict[str, Any]:
    """Seconds of the loop, and of a batch by its slots, in each round; the first round is a warm-up."""
    sides = ["loop", *options.slots]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with ExitStack() as stack:
        models = {side: stack.enter_context(load(directory, 1 if side == "loop" else int(side), options.threads)) for side in sides}
        for turn in range(options.rounds + 1):
            with tempfile.TemporaryDirectory() as work:
                folder = Path(work, "pictures")
                folder.mkdir()
                for number in range(options.pictures if turn else 4):
                    (folder / f"{number:04}.jpg").write_bytes(pictures.new())
                for side in sides if turn % 2 else reversed(sides):
                    if side == "loop":
                        taken = loop(models[side], folder, options.tokens)
                    else:
                        taken = batch(models[side], folder, options.tokens, Path(work, f"{side}.jsonl"))
                    if turn:
                        seconds[side].append(taken)
        manifest = models["loop"].manifest
    model = {"name": manifest.name, "precision": manifest.precision, "image_size": manifest.vision.image_size}
    rounded = {side: [digits(value) for value in each] for side, each in seconds.items()}
    return {"model": model, "visual_tokens": manifest.vision.tokens, "seconds": rounded}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every model, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", type=Path)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--slots", type=lambda text: text.split(","), default=["4", "8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "batch.json")
    options = parser.parse_args(arguments)
    progress, pictures, results = stderr_progress(), Pictures(), []
    for directory in (DEMO, *options.models):
        progress.stage(f"measuring {directory}")
        results.append(measure(directory, options, pictures))
    progress.done()
    settings = {name: getattr(options, name) for name in ("pictures", "tokens", "slots", "threads")}
    write_json(options.out, {"what": "pictures/s of a loop and of a batch", "machine": machine.describe(), **settings, "models": results})
    for found in results:
        speeds = {side: options.pictures / median(each) for side, each in found["seconds"].items()}
        shown = ", ".join(f"{side}: {speed:.2f} ({speed / speeds['loop']:.2f} times)" for side, speed in speeds.items())
        print(f"{found['model']}, pictures/s by slots: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
