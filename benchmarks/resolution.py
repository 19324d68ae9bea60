"""What does the size of pictures cost, and what does the cascade over sizes save?

    python -m benchmarks.resolution [DEMO] [--large MODEL] [--count 2000] [--fit 6000] [--rounds 7] [--plot docs/images/resolution]

DEMO is the demo checkpoint, MODEL one of a released size, such as a random checkpoint of the 0.5B size
(examples/checkpoints/random_checkpoint.py); both converted with several sizes, as by `fastvlm-edge convert --image-size 256,192,128`. What
is not given is not measured, and stays in the record as it is.

DEMO: a cascade is fitted to questions of the calibration split, with a bound of half a point, and judged on held-out ones, for pictures
that are drawn with 192 and with 384 px on a side. Then it answers the held-out questions, in turns with the largest size, and the time to
the first text is measured outside of the runtime.

MODEL: each size in processes of its own, in turns. Then the cost of the cascade itself: one that accepts every answer of the smallest size,
against the smallest size, in turns and with the same engine, from the question to the end of the answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import numpy as np

from benchmarks.common import machine
from benchmarks.common.rounds import figures, take_turns
from benchmarks.peers.protocol import ROOT, Samples
from examples.demo_training.scenes import SEED, write_scenes
from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.bench.measure import Settings
from fastvlm_edge.bench.processes import Measurement
from fastvlm_edge.bench.record import digits, write_json
from fastvlm_edge.bench.workload import Pictures
from fastvlm_edge.evaluation.cascade_fit import follow, largest_only
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.evaluation.image_sizes import Judged, SizeComparison, format_sizes
from fastvlm_edge.evaluation.size_plot import draw_sizes
from fastvlm_edge.evaluation.subject import Subject
from fastvlm_edge.generation.engine import Engine
from fastvlm_edge.generation.vlm import load_parts
from fastvlm_edge.model_dir.manifest import Cascade, read_manifest
from fastvlm_edge.progress import SilentProgress, stderr_progress

BOUND = 0.5
"""Points that the cascade may lose to the largest size."""
DRAWN = (192, 384)
FIT_SEED = SEED + 1
TOKENS = 16
FIELDS = ("ttft_cold_ms", "preprocess_ms", "vision_ms", "prefill_ms", "peak_memory_mib")
QUESTION = "Describe this picture."


def demo(directory: Path, drawn: int, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Accuracy and times by size and of the cascade, for pictures of `drawn` pixels."""
    fit_to = write_scenes(work / f"fit-{drawn}", split="calibration", count=options.fit, seed=FIT_SEED, size=drawn)
    held_out = write_scenes(work / f"held-out-{drawn}", split="heldout", count=options.count, size=drawn)
    progress = stderr_progress()
    with Subject.load(directory, "ort", threads=options.threads, slots=1, image_cache=0) as subject:
        fitted = SizeComparison(subject, open_data(str(fit_to)), max_new_tokens=TOKENS)
        fitted.run(progress=progress)
        try:
            found = fitted.fit(BOUND)
        except FastVLMError as error:  # then auto is the largest size
            largest = largest_only(fitted.answers())
            found = Judged(largest, follow(fitted.answers(), largest), {"why_not": error.what})
        comparison = SizeComparison(subject, open_data(str(held_out)), max_new_tokens=TOKENS)
        comparison.run(progress=progress)
        outcome = follow(comparison.answers(), found.cascade)
        report = comparison.report(Judged(found.cascade, outcome, {}))
    report |= {"model": directory.name, "data": f"{options.count} of the heldout split, seed {SEED}"}
    report["cascade"]["fitted_to"] = {"questions": options.fit, "split": "calibration", "seed": FIT_SEED, **found.fitted}
    return {"drawn": drawn, **report, "run": run_cascade(directory, found.cascade, outcome.sizes, held_out, options)}


def run_cascade(directory: Path, cascade: Cascade, expected: Any, questions: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first text, by the clock, of the cascade and of the largest size, and how often it answers at another size."""
    manifest, tokenizer, backend = load_parts(directory, "ort", threads=options.threads)
    engine = Engine(backend, manifest.decoder)
    with FastVLM(replace(manifest, cascade=cascade), tokenizer, engine, image_cache=0) as vlm:
        taken: dict[Any, list[float]] = {"auto": [], manifest.vision.sizes[-1]: []}
        sizes = []
        for number, (example, image) in enumerate(open_data(str(questions)).read()):
            for size in taken if number % 2 else reversed(taken):
                began = time.perf_counter()
                stream = vlm.stream(str(example.prompt), image, image_size=size, max_new_tokens=TOKENS)
                next(stream, None)
                taken[size].append((time.perf_counter() - began) * 1e3)
                reply = stream.wait()
                if size == "auto":
                    sizes.append(reply.image_size)
    auto, largest = (np.array(values) for values in taken.values())
    return {
        "first_text_ms": {
            name: {"mean": digits(values.mean()), "p95": digits(float(np.percentile(values, 95)))}
            for name, values in (("auto", auto), ("largest", largest))
        },
        "share": round(float(auto.mean() / largest.mean()), 4),
        "answered_at_another_size": int((np.array(sizes) != expected).sum()),
    }


def by_size(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of `fastvlm-edge bench` at each size, in turns, each in a new process."""
    sizes = read_manifest(directory).vision.sizes

    def measure(size: str) -> Samples:
        settings = Settings("ort", options.threads, runs=3, depths=(), image_size=int(size))
        measurement = Measurement(directory, settings, 1)
        for _ in measurement.run(SilentProgress()):
            pass
        record = measurement.document()
        return {name: record[name]["samples"][0] for name in FIELDS}

    rounds = take_turns([str(size) for size in sizes], options.rounds, measure, rotate=True)
    return {size: figures(found, FIELDS) for size, found in rounds.items()}


def overhead(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of whole answers at the smallest size, and of a cascade that accepts all of them; every answer has `TOKENS` tokens."""
    manifest, tokenizer, backend = load_parts(directory, "ort", threads=options.threads)
    text, cascade = replace(manifest.text, stop_ids=[]), Cascade(manifest.vision.sizes, 0.0, "mean")
    pictures, smallest = Pictures(), manifest.vision.sizes[0]
    taken: dict[Literal["auto"] | int, list[float]] = {"auto": [], smallest: []}
    with FastVLM(replace(manifest, text=text, cascade=cascade), tokenizer, Engine(backend, manifest.decoder), image_cache=0) as vlm:
        for number in range(10 * options.rounds + 2):
            picture = pictures.new()
            for size in taken if number % 2 else reversed(taken):
                began = time.perf_counter()
                reply = vlm.generate(QUESTION, picture, image_size=size, max_new_tokens=TOKENS)
                if number > 1:  # the first two are a warm-up
                    taken[size].append((time.perf_counter() - began) * 1e3)
                if (reply.image_size, len(reply.token_ids)) != (smallest, TOKENS):
                    raise RuntimeError(f"answered at {reply.image_size} px with {len(reply.token_ids)} tokens")
    ratios = [auto / alone for auto, alone in zip(*taken.values(), strict=True)]
    shown = {"auto": taken["auto"], "smallest": taken[smallest]}
    return {
        **{f"{name}_ms": [digits(value) for value in values] for name, values in shown.items()},
        "overhead": round(median(ratios) - 1, 4),
        "overhead_of_means": round(fmean(taken["auto"]) / fmean(taken[smallest]) - 1, 4),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was given, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", metavar="DEMO", nargs="?", type=Path)
    parser.add_argument("--large", metavar="MODEL", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--fit", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "resolution.json")
    parser.add_argument("--plot", metavar="PREFIX", type=Path, help="draw DEMO's figures of pictures with 384 px")
    options = parser.parse_args(arguments)
    document: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    document["what"] = "the size of pictures: accuracy, times and memory by size, and of the cascade"
    if options.demo is not None:
        with tempfile.TemporaryDirectory() as work:
            results = [demo(options.demo, drawn, options, Path(work)) for drawn in DRAWN]
        document["demo"] = {"machine": machine.describe(), "threads": options.threads, "bound": BOUND, "results": results}
    if options.large is not None:
        manifest = read_manifest(options.large)
        document["large"] = {
            "machine": machine.describe(),
            "threads": options.threads,
            "rounds": options.rounds,
            "model": {"name": manifest.name, "precision": manifest.precision, "default_size": manifest.vision.image_size},
            "sizes": by_size(options.large, options),
            "overhead": {"tokens": TOKENS, **overhead(options.large, options)},
        }
    write_json(options.out, document)
    for result in document.get("demo", {}).get("results", ()):
        print(f"pictures of {result['drawn']} px\n{format_sizes(result)}\n{result['run']}\n")
    if "large" in document:
        for size, found in document["large"]["sizes"].items():
            print(f"{size} px: " + ", ".join(f"{name} {found[name]['median']}" for name in FIELDS))
        print(f"overhead of the cascade: {100 * document['large']['overhead']['overhead']:.2f} %")
    if options.plot is not None:
        draw_sizes(options.plot, document["demo"]["results"][-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
