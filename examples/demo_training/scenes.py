"""Scene generator of the demo: pictures of what edge devices look at, with questions whose answers are known.

Training, calibration and evaluation use it; the three splits never share a random stream. As a command it writes a folder of pictures:

    python -m examples.demo_training.scenes --split heldout --count 2000 --out scenes
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from examples.demo_training.drawing.meters import draw_dial, draw_meter
from examples.demo_training.drawing.objects import ask_objects, draw_objects
from examples.demo_training.drawing.picture import Canvas, Colour, Question, Scene, pick_weighted
from examples.demo_training.drawing.signs import draw_label, draw_sign

SIZE = 192
"""Pixels of a side: what the demo model sees."""
SEED = 2026
"""The series that recorded figures are measured on; training checks itself on another one."""
SPLITS = ("train", "calibration", "heldout")
KIND_WEIGHTS = {"reading": 0.44, "dial": 0.07, "sign": 0.06, "label": 0.07, "count": 0.12, "colour": 0.08, "shape": 0.08, "position": 0.08}
KINDS = tuple(KIND_WEIGHTS)
OBJECT_KINDS = ("count", "colour", "shape", "position")
FURTHER_KINDS = ("count", "position", "count", "colour", "count", "position", "count", "shape")


def scene_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """The random stream of one picture. The split's name is part of the entropy, so equal seeds of two splits are unrelated.

    Raises ValueError for an unknown split or a negative number.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got seed {seed} and index {index}")
    return np.random.default_rng([zlib.crc32(split.encode()), seed, index])


def make_scene(
    split: str,
    seed: int,
    index: int,
    *,
    size: int | tuple[int, int] = SIZE,
    kind: str | None = None,
    difficulty: float = 1.0,
    max_digits: int = 4,
    questions: int = 1,
) -> Scene:
    """Draw picture `index` of a split and ask up to `questions` different questions about it.

    Args:
        size: pixels of the square picture, or (width, height), at least 64 each.
        kind: one of KINDS; drawn by KIND_WEIGHTS when None.
        difficulty: 0..1, scales blur, noise, light and perspective; below 1 only for the start of training.
        max_digits: longest reading, for the start of training.
        questions: only scenes of shapes have more than one; the first question is of the scene's own kind.
    """
    rng = scene_rng(split, seed, index)
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 64:
        raise ValueError(f"pictures are at least 64 px wide and high, got {width} x {height}")
    if kind is not None and kind not in KIND_WEIGHTS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    kind = pick_weighted(rng, KIND_WEIGHTS) if kind is None else kind
    canvas = Canvas(rng, width, height, _background(rng, kind), difficulty)
    if kind in OBJECT_KINDS:
        draw_objects(canvas)
        image = canvas.finish()
        asked = _ask_several(rng, canvas, kind, questions)
        return Scene(image, asked[0].kind, "", canvas.marks, asked)
    if kind == "reading":
        text, asked = draw_meter(canvas, max_digits)
    else:
        text, asked = {"dial": draw_dial, "sign": draw_sign, "label": draw_label}[kind](canvas)
    return Scene(canvas.finish(), kind, text, canvas.marks, asked)


def _background(rng: np.random.Generator, kind: str) -> Colour:
    """A muted colour; behind shapes it is light or dark grey, so that each of their colours stands out."""
    if kind in OBJECT_KINDS:
        level = rng.integers(198, 238) if rng.random() < 0.7 else rng.integers(22, 62)
        spread = 10
    else:
        level, spread = rng.integers(30, 225), 32
    return tuple(int(part) for part in np.clip(level + rng.integers(-spread, spread + 1, 3), 0, 255))  # type: ignore[return-value]


def _ask_several(rng: np.random.Generator, canvas: Canvas, kind: str, questions: int) -> list[Question]:
    """Questions about shapes, the first of the given kind, the others mostly of the two that are learned last, none twice."""
    asked: dict[str, Question] = {}
    for turn in range(questions):
        following = kind if turn == 0 else FURTHER_KINDS[turn % len(FURTHER_KINDS)]
        question = ask_objects(rng, canvas.marks, canvas.width, canvas.height, following, narrow=turn > 0)
        asked.setdefault(question.prompt, question)
    return list(asked.values())


def write_scenes(
    out: Path,
    *,
    split: str,
    count: int,
    seed: int = SEED,
    size: int | tuple[int, int] = SIZE,
    advance: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write `count` PNG files and `questions.jsonl` (`image`, `prompt`, `answer`, `kind`) into the folder `out`.

    Returns the path of `questions.jsonl`, which `eval --data` and `convert --calib` take. `advance` gets the number of pictures so far.
    """
    out.mkdir(parents=True, exist_ok=True)
    digits = max(5, len(str(count)))
    with open(out / "questions.jsonl", "w", encoding="utf-8") as lines:
        for index in range(count):
            scene = make_scene(split, seed, index, size=size)
            name = f"{index:0{digits}d}.png"
            scene.image.save(out / name, compress_level=4)
            question = scene.questions[0]
            row = {"image": name, "prompt": question.prompt, "answer": question.answer, "kind": question.kind}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            advance(index + 1)
    return out / "questions.jsonl"


def scene_questions(folder: Path, split: str, count: int, seed: int = SEED) -> Path:
    """`questions.jsonl` of the first `count` scenes of a series, written below `folder` unless they are there already."""
    out = folder / f"{split}-{seed}-{count}"
    if out.is_dir():
        return out / "questions.jsonl"
    beside = folder / f".{out.name}"
    write_scenes(beside, split=split, count=count, seed=seed)
    beside.rename(out)
    return out / "questions.jsonl"


def parse_size(text: str) -> int | tuple[int, int]:
    """`192` or `256x192` (width x height)."""
    parts = [int(part) for part in text.lower().split("x")]
    if len(parts) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a size like 192 nor one like 256x192")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw scenes with questions and answers.")
    parser.add_argument("--seed", type=int, default=SEED, help="number of the series, the same on every machine; default: %(default)s")
    parser.add_argument("--count", type=int, required=True, help="number of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files and questions.jsonl")
    parser.add_argument("--split", choices=SPLITS, default="heldout", help="default: %(default)s")
    parser.add_argument("--size", type=parse_size, default=SIZE, help="pixels, as 192 or 256x192; default: %(default)s")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count must be at least 1, got {args.count}")

    def advance(done: int) -> None:
        if done % 100 == 0 or done == args.count:
            print(f"\r{done}/{args.count} pictures", end="" if done < args.count else "\n", file=sys.stderr, flush=True)

    try:
        write_scenes(args.out, split=args.split, seed=args.seed, count=args.count, size=args.size, advance=advance)
    except (OSError, ValueError) as error:
        print(f"scenes: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
