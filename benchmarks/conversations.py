"""What do slots, kept beginnings, kept pictures and guessed tokens save?

    python -m benchmarks.conversations MODEL [--slots 1,2,4,8] [--tokens 64] [--rounds 3] [--out benchmarks/results/conversations.json]

MODEL is a model directory, such as a converted random checkpoint of the 0.5B size (examples/checkpoints/random_checkpoint.py). In every
round all figures are measured once, in turns, so that noise of the machine affects all of them. No token ends a reply, so that every
reply has the same length. Guesses are measured with and without them, in turns: on the readings of the demo model, whose answers are real,
and with MODEL on a JSON answer, whose keys a grammar forces, on a reply that copies nothing, and on one that copies the
text in its prompt with a few changes. No random weights would do that: the decoder computes, then `Dictating` replaces its candidates.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, cast

from benchmarks.common import machine
from benchmarks.peers.protocol import ROOT
from examples.demo_training.scenes import scene_questions
from fastvlm_edge import FastVLM
from fastvlm_edge.backends.protocol import Backend, StepOutput
from fastvlm_edge.bench.plot import draw
from fastvlm_edge.bench.record import digits, write_json
from fastvlm_edge.bench.workload import Pictures
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.generation.engine import Engine
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.vlm import load_parts
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.progress import stderr_progress

QUESTION = "Describe this picture in as much detail as you can, from left to right and from top to bottom, and name all colours."
BARE_POSITIONS, BARE_STEPS = 400, 9
FOLLOW_UP = "And what is in the background?"
READING_TOKENS = 16
PLAIN_TOKENS = 128
PASSAGE = (
    "The meter hangs in the cellar, on the wall beside the boiler. It has five black wheels and three red ones. Read the "
    "black ones only, from left to right, and write down every digit that is fully visible. If a wheel stands between two "
    "digits, take the smaller one. The number under the wheels is the serial number of the meter, which must be equal to the "
    "one on the sheet. Take a photograph from the front, with the lamp to the side, so that the glass does not reflect it. If "
    "the glass is dirty, clean it with the dry cloth before you take the photograph. Send the photograph and the digits "
    "together, and keep both until the bill for the year has come. If the new number is smaller than the one of last year, "
    "look at the serial number again, because somebody may have put in a new meter in the meantime."
)
THING = {
    "type": "object",
    "properties": {
        "name": {"enum": ["meter", "sign", "cup", "person", "animal"]},
        "colour": {"enum": ["red", "green", "blue", "black", "white"]},
        "is_in_the_foreground": {"type": "boolean"},
        "number_of_things_like_it": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["name", "colour", "is_in_the_foreground", "number_of_things_like_it"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": THING, "minItems": 3, "maxItems": 3}


class Subject:
    """A model whose replies end at their length only."""

    def __init__(self, directory: Path, counts: Sequence[int], threads: int | None) -> None:
        manifest, tokenizer, backend = load_parts(directory, "ort", threads=threads, slots=max(counts), tune_process=True)
        self._parts, self.backend, self.counts = (manifest, tokenizer), Dictating(backend), counts
        self.pictures = Pictures(None)
        self._start_engine()

    def _start_engine(self) -> None:
        manifest, tokenizer = self._parts
        self.engine = Engine(cast(Backend, self.backend), manifest.decoder)
        endless = replace(manifest, text=replace(manifest.text, stop_ids=[]))
        self.vlm = FastVLM(endless, tokenizer, self.engine, speculate=False)
        self.endless = (self.vlm, FastVLM(endless, tokenizer, self.engine, speculate=True))
        plain = FastVLM(manifest, tokenizer, self.engine, speculate=False)
        self.ending = (plain, FastVLM(manifest, tokenizer, self.engine, speculate=True))

    def bare(self) -> dict[int, list[float]]:
        """Number of conversations -> seconds of decode steps without the engine: what the machine and the graph allow.

        The engine begins anew afterwards, since it does not know what the slots hold then.
        """
        backend = self.backend
        for slot in range(max(self.counts)):
            backend.reset(slot)
        backend.step([each % 100 for each in range(BARE_POSITIONS)])
        for slot in range(1, max(self.counts)):
            backend.copy(0, slot, BARE_POSITIONS)
        seconds: dict[int, list[float]] = {count: [] for count in self.counts}
        for _ in range(BARE_STEPS):
            for count in self.counts:
                for slot in range(count):
                    backend.truncate(BARE_POSITIONS, slot)
                began = time.perf_counter()
                backend.decode(range(count))
                seconds[count].append(time.perf_counter() - began)
        for slot in range(max(self.counts)):
            backend.reset(slot)
        self._start_engine()
        return {count: each[1:] for count, each in seconds.items()}

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

    def guesses(self, rounds: int) -> dict[str, Any]:
        """Decoding with and without guesses, in turns; the first turn of each is not counted."""
        image = self.vlm.encode_image(self.pictures.new())
        prompt = f"Correct the mistakes in this text.\n{PASSAGE}"
        found = {
            "json": in_turns(self.ending, rounds, lambda vlm: vlm.generate(QUESTION, image, json_schema=SCHEMA)),
            "no_copy": in_turns(self.endless, 3 * rounds, lambda vlm: vlm.generate(QUESTION, image, max_new_tokens=PLAIN_TOKENS)),
        }
        self.backend.dictate(self.vlm, prompt, corrected(PASSAGE))
        found["copy"] = in_turns(self.ending, rounds, lambda vlm: vlm.generate(prompt, max_new_tokens=1000))
        return found


class Dictating:
    """A backend whose decoder computes every call, and then puts the ids first that it is told: a model that copies text."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._said: dict[int, int] = {}
        """Position -> the id there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def dictate(self, vlm: FastVLM, prompt: str, reply: str) -> None:
        """From now on `prompt`, without a picture, is answered with `reply`."""
        template = ChatTemplate(vlm._tokenizer, vlm.manifest)
        start = len(template.opening()) + len(template.turn(prompt))
        self._said = dict(enumerate([*vlm._tokenizer.encode(reply), vlm._tokenizer.control_id("<|im_end|>")], start))

    def step(self, input_ids: Sequence[int], *images: Any, slot: int = 0, logit_positions: Any = None, **options: Any) -> StepOutput:
        before = self._backend.lengths[slot]
        output = self._backend.step(input_ids, *images, slot=slot, logit_positions=logit_positions, **options)
        asked = [len(input_ids) - 1] if logit_positions is None else logit_positions
        return self._say(output, [before + position + 1 for position in asked])

    def decode(self, input_ids: Sequence[int], **options: Any) -> StepOutput:
        output = self._backend.decode(input_ids, **options)
        return self._say(output, self._backend.lengths[: len(input_ids)])

    def _say(self, output: StepOutput, positions: Sequence[int]) -> StepOutput:
        for row, position in enumerate(positions):
            if position in self._said:
                output.top_ids[row, 0] = self._said[position]
        return output


def corrected(text: str) -> str:
    """The text with every twelfth word replaced."""
    words = text.split(" ")
    words[6::12] = ["corrected"] * len(words[6::12])
    return " ".join(words)


def in_turns(sides: tuple[FastVLM, FastVLM], rounds: int, ask: Callable[[FastVLM], Reply]) -> dict[str, Any]:
    """Tokens per second of the same reply without and with guesses."""
    without, guessing = sides
    speeds: dict[str, list[float]] = {"without": [], "with": []}
    drafted = accepted = 0
    texts = set()
    both = (("without", without), ("with", guessing))
    for turn in range(rounds + 1):
        for name, vlm in both if turn % 2 else reversed(both):
            before = vlm.counters()
            reply = ask(vlm)
            after = vlm.counters()
            if turn:
                texts.add(reply.text)
                speeds[name].append(reply.timings.decode_tokens_per_second)
            if turn and name == "with":
                drafted += after.drafted_tokens - before.drafted_tokens
                accepted += after.accepted_tokens - before.accepted_tokens
    return {
        "tokens": reply.timings.new_tokens,
        "different_answers": len(texts),
        "tokens_per_second": {name: [digits(value) for value in values] for name, values in speeds.items()},
        "drafted_tokens": drafted // rounds,
        "accepted_tokens": accepted // rounds,
    }


def readings(directory: Path, questions: Path, threads: int | None, rounds: int) -> dict[str, Any]:
    """Decoding speed on the demo's questions with and without guesses, in turns."""
    sides = {name: FastVLM.load(directory, "ort", threads=threads, speculate=name == "with") for name in ("without", "with")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    texts: dict[str, list[str]] = {}
    examples = [(example.prompt or "", image) for example, image in open_data(questions).read()]
    for turn in range(rounds + 1):
        for name, vlm in sides.items() if turn % 2 else reversed(sides.items()):
            began = time.perf_counter()
            texts[name] = [vlm.generate(prompt, image, max_new_tokens=READING_TOKENS).text for prompt, image in examples]
            seconds[name].append(time.perf_counter() - began)
    counters = sides["with"].counters()
    for vlm in sides.values():
        vlm.close()
    return {
        "questions": len(examples),
        "tokens": counters.new_tokens // (rounds + 1),
        "same_answers": sum(one == other for one, other in zip(texts["without"], texts["with"], strict=True)),
        "seconds_without": digits(median(seconds["without"][1:])),
        "seconds_with": digits(median(seconds["with"][1:])),
        "drafted_tokens": counters.drafted_tokens // (rounds + 1),
        "accepted_tokens": counters.accepted_tokens // (rounds + 1),
    }


def drawable(document: dict[str, Any]) -> dict[str, Any]:
    """The record in the form that `fastvlm-edge bench --slots` has, for its drawing."""
    speeds = {int(count): median(values) for count, values in document["tokens_per_second"].items()}
    by_slots = [
        {"slots": count, "tokens_per_second": {"median": speed}, "tokens_per_second_each": {"median": speed / count}}
        for count, speed in speeds.items()
    ]
    settings = {"threads": document["threads"]}
    model = document["model"]
    return {"by_slots": by_slots, "model": model, "machine": document["machine"], "backend": "ort", "settings": settings}


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
    parser.add_argument("--plot", type=Path, metavar="PREFIX", help="draw PREFIX-slots.png and .svg from the record instead of measuring")
    options = parser.parse_args(arguments)
    if options.plot:
        draw(options.plot, [drawable(json.loads(options.out.read_text(encoding="utf-8")))])
        return 0
    counts = [int(count) for count in options.slots.split(",")]
    progress = stderr_progress()
    subject = Subject(options.model, counts, options.threads)
    speeds: dict[int, list[float]] = {count: [] for count in counts}
    times: dict[str, list[float]] = {}
    alone: dict[int, list[float]] = {count: [] for count in counts}
    subject.together(1, 8)  # warm-up
    progress.stage("measuring", options.rounds * (len(counts) + 2))
    for _ in range(options.rounds):
        for count, seconds in subject.bare().items():
            alone[count] += seconds
        progress.advance()
        for count in counts:
            speeds[count].append(subject.together(count, options.tokens))
            progress.advance()
        for name, value in subject.questions().items():
            times.setdefault(name, []).append(value)
        progress.advance()
    progress.done()
    guesses = subject.guesses(options.rounds)
    manifest = subject.vlm.manifest
    subject.vlm.close()
    questions = scene_questions(options.work, "heldout", options.readings)
    document = {
        "what": "tokens/s of conversations together, and times to the first token, by onnxruntime on a CPU",
        "machine": machine.describe(),
        "model": {"name": manifest.name, "precision": manifest.precision, "image_size": manifest.vision.image_size},
        "threads": options.threads,
        "tokens_per_second": {str(count): [digits(value) for value in values] for count, values in speeds.items()},
        "bare_step_ms": {str(count): [digits(1e3 * value) for value in values] for count, values in alone.items()},
        "first_token_ms": {name: [digits(value) for value in values] for name, values in times.items()},
        "guesses": guesses,
        "demo_readings": readings(ROOT / "fastvlm_edge" / "demo" / "model", questions, options.threads, 10 * options.rounds),
    }
    write_json(options.out, document)
    for count, values in speeds.items():
        print(f"{count} together: {median(values):7.1f} tokens/s, {median(values) / median(speeds[counts[0]]):.2f} times as fast")
    for name, values in times.items():
        print(f"{name}: {median(values):.1f} ms")
    for name, found in guesses.items():
        print(name, found)
    print(document["demo_readings"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
