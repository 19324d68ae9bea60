"""What do slots, kept beginnings, kept pictures and guessed tokens save?

    python -m benchmarks.conversations MODEL [--slots 1,2,4,8] [--tokens 64] [--rounds 3] [--out benchmarks/results/conversations.json]

MODEL is a model directory, such as a converted random checkpoint of the 0.5B size (examples/checkpoints/random_checkpoint.py). In every
round all figures are measured once, in turns, so that noise of the machine affects all of them. No token ends a reply, so that every
reply has the same length. Guesses are measured on the readings of the demo model, whose answers are real, with and without them.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import machine
from benchmarks.peers.protocol import ROOT
from examples.demo_training.scenes import scene_questions
from fastvlm_edge import FastVLM
from fastvlm_edge.bench.record import digits, write_json
from fastvlm_edge.bench.workload import Pictures
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.generation.engine import Engine
from fastvlm_edge.generation.vlm import load_parts
from fastvlm_edge.progress import stderr_progress

QUESTION = "Describe this picture in as much detail as you can, from left to right and from top to bottom, and name all colours."
FOLLOW_UP = "And what is in the background?"
READING_TOKENS = 16


class Subject:
    """A model whose replies end at their length only."""

    def __init__(self, directory: Path, slots: int, threads: int | None) -> None:
        manifest, tokenizer, backend = load_parts(directory, "ort", threads=threads, slots=slots, tune_process=True)
        self.engine = Engine(backend, manifest.decoder)
        endless = replace(manifest, text=replace(manifest.text, stop_ids=[]))
        self.vlm = FastVLM(endless, tokenizer, self.engine, speculate=False)
        self.pictures = Pictures(None)

    def together(self, count: int, tokens: int) -> float:
        """Tokens per second in all, while `count` conversations about as many pictures are generating."""
        images = [self.vlm.encode_image(self.pictures.new()) for _ in range(count)]
        streams = [self.vlm.stream(f"{number}. {QUESTION}", image, max_new_tokens=4 * tokens + 200) for number, image in enumerate(images)]
        threads = [threading.Thread(target=lambda stream=stream: list(stream)) for stream in streams]
        for thread in threads:
            thread.start()
        while len(works := self.engine.running()) < count:
            if not any(thread.is_alive() for thread in threads):
                raise RuntimeError("the replies ended before all were generating: give more --tokens")
            time.sleep(0.002)
        before, began = sum(len(work.token_ids) for work in works), time.perf_counter()
        while sum(len(work.token_ids) for work in works) - before < tokens * count:
            time.sleep(0.002)
        done, seconds = sum(len(work.token_ids) for work in works) - before, time.perf_counter() - began
        for stream in streams:
            stream.close()
        for thread in threads:
            thread.join()
        return done / seconds

    def questions(self) -> dict[str, float]:
        """Time to the first token of a first question, of a follow-up, and of another question about the same picture, in ms."""
        picture = self.pictures.new()
        chat = self.vlm.chat()
        first = chat.ask(QUESTION, picture, max_new_tokens=2).timings
        follow = chat.ask(FOLLOW_UP, max_new_tokens=2).timings
        repeated = self.vlm.generate("What is this?", picture, max_new_tokens=2).timings
        if not repeated.cached_images:
            raise RuntimeError("the picture was not found")
        return {
            "first_question": first.ttft_ms,
            "follow_up": follow.ttft_ms,
            "repeated_picture": repeated.ttft_ms,
            "vision_of_repeated_picture": repeated.vision_ms,
        }


def readings(directory: Path, questions: Path, threads: int | None, rounds: int) -> dict[str, Any]:
    """Decoding speed on the demo's questions with and without guesses, in turns."""
    sides = {name: FastVLM.load(directory, "ort", threads=threads, speculate=name == "with") for name in ("without", "with")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    texts: dict[str, list[str]] = {}
    examples = [(example.prompt or "", image) for example, image in open_data(questions).read()]
    for _ in range(rounds + 1):
        for name, vlm in sides.items():
            began = time.perf_counter()
            texts[name] = [vlm.generate(prompt, image, max_new_tokens=READING_TOKENS).text for prompt, image in examples]
            seconds[name].append(time.perf_counter() - began)
    counters = sides["with"].counters()
    for vlm in sides.values():
        vlm.close()
    return {
        "questions": len(examples),
        "same_answers": sum(one == other for one, other in zip(texts["without"], texts["with"], strict=True)),
        "seconds_without": digits(median(seconds["without"][1:])),
        "seconds_with": digits(median(seconds["with"][1:])),
        "drafted_tokens": counters.drafted_tokens,
        "accepted_tokens": counters.accepted_tokens,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--slots", default="1,2,4,8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--readings", type=int, default=100, help="questions of the demo; default %(default)s")
    parser.add_argument("--work", type=Path, default=Path("build/conversations"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "conversations.json")
    options = parser.parse_args(arguments)
    counts = [int(count) for count in options.slots.split(",")]
    progress = stderr_progress()
    subject = Subject(options.model, max(counts), options.threads)
    speeds: dict[int, list[float]] = {count: [] for count in counts}
    times: dict[str, list[float]] = {}
    subject.together(1, 8)  # warm-up
    progress.stage("measuring", options.rounds * (len(counts) + 1))
    for _ in range(options.rounds):
        for count in counts:
            speeds[count].append(subject.together(count, options.tokens))
            progress.advance()
        for name, value in subject.questions().items():
            times.setdefault(name, []).append(value)
        progress.advance()
    progress.done()
    manifest = subject.vlm.manifest
    subject.vlm.close()
    questions = scene_questions(options.work, "heldout", options.readings)
    document = {
        "what": "tokens/s of conversations together, and times to the first token, by onnxruntime on a CPU",
        "machine": machine.describe(),
        "model": {"name": manifest.name, "precision": manifest.precision, "visual_tokens": manifest.vision.tokens},
        "tokens_per_second": {str(count): [digits(value) for value in values] for count, values in speeds.items()},
        "first_token_ms": {name: [digits(value) for value in values] for name, values in times.items()},
        "demo_readings": readings(ROOT / "fastvlm_edge" / "demo" / "model", questions, options.threads, options.rounds),
    }
    write_json(options.out, document)
    for count, values in speeds.items():
        print(f"{count} together: {median(values):7.1f} tokens/s, {median(values) / median(speeds[counts[0]]):.2f} times as fast")
    for name, values in times.items():
        print(f"{name}: {median(values):.1f} ms")
    print(document["demo_readings"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
