"""Scenes of a few coloured shapes, with questions about count, colour, shape and position."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from examples.demo_training.drawing.picture import (
    COLOURS,
    SHAPES,
    Canvas,
    Colour,
    Mark,
    Point,
    Question,
    between,
    pick,
    pick_weighted,
    shade,
)

PAINT: dict[str, Colour] = {
    "red": (212, 32, 36),
    "green": (36, 158, 60),
    "blue": (36, 84, 214),
    "yellow": (242, 214, 30),
    "orange": (244, 126, 20),
    "purple": (134, 46, 170),
}
OBJECT_COUNTS = {1: 0.12, 2: 0.18, 3: 0.22, 4: 0.2, 5: 0.16, 6: 0.12}
MOST_OBJECTS = max(OBJECT_COUNTS)
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
CLEAR_MARGIN = 0.08
"""A shape is left or right, top or bottom, if its centre is at least this share of the side away from the middle."""


def draw_objects(canvas: Canvas) -> list[str]:
    """1 to 6 shapes on a grid of nine places, jittered so that they never touch. Returns their names; places are in `canvas.marks`."""
    rng, side = canvas.rng, canvas.side
    canvas.clutter()
    count = pick_weighted(rng, OBJECT_COUNTS)
    places = rng.permutation(9)[:count].tolist()
    names = []
    for place in places:
        shape, colour = pick(rng, SHAPES), pick(rng, COLOURS)
        radius = between(rng, 0.08, 0.135) * side
        slack = 0.14 * side - radius
        x = canvas.middle[0] + (place % 3 - 1) * 0.29 * side + between(rng, -1, 1) * slack
        y = canvas.middle[1] + (place // 3 - 1) * 0.29 * side + between(rng, -1, 1) * slack
        _draw_shape(canvas, shape, (x, y), radius, shade(rng, PAINT[colour], 16))
        canvas.marks.append(Mark(shape, colour, x, y, 2 * radius, 2 * radius))
        names.append(shape)
    return names


def _draw_shape(canvas: Canvas, shape: str, centre: Point, radius: float, fill: Colour) -> None:
    x, y = centre
    turn = between(canvas.rng, -0.2, 0.2) * canvas.difficulty
    if shape == "circle":
        radius *= 0.9
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
        return
    if shape == "cross":
        arm, thick = radius * 0.97, radius * 0.33
        outline = [
            (-thick, -arm),
            (thick, -arm),
            (thick, -thick),
            (arm, -thick),
            (arm, thick),
            (thick, thick),
            (thick, arm),
            (-thick, arm),
            (-thick, thick),
            (-arm, thick),
            (-arm, -thick),
            (-thick, -thick),
        ]
    else:
        corners, inner = {"square": (4, 0.0), "triangle": (3, 0.0), "star": (5, 0.42)}[shape]
        outline = _ring(corners, radius * (1.08 if shape == "square" else 1.0), inner, math.pi / 4 if shape == "square" else 0.0)
    cos, sin = math.cos(turn), math.sin(turn)
    canvas.polygon([(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in outline], fill)


def _ring(corners: int, radius: float, inner: float, turn: float) -> list[Point]:
    """Corners of a regular polygon, first one up; with `inner`, of a star whose notches lie at that share of the radius."""
    step = math.pi / corners if inner else 2 * math.pi / corners
    points = corners * 2 if inner else corners
    radii = [radius * (inner if inner and index % 2 else 1.0) for index in range(points)]
    return [(r * math.sin(index * step + turn), -r * math.cos(index * step + turn)) for index, r in enumerate(radii)]


def ask_objects(rng: np.random.Generator, marks: list[Mark], width: int, height: int, kind: str, *, narrow: bool = False) -> Question:
    """A question of the given kind about the shapes; a question about the count if the scene has no unambiguous one of that kind.

    `narrow` counts objects of one shape or colour, never all.
    """
    asked = None if kind == "count" else _ASK[kind](rng, marks, width, height)
    return asked or _ask_count(rng, marks, narrow=narrow)


def _ask_count(rng: np.random.Generator, marks: list[Mark], *, narrow: bool) -> Question:
    style = int(rng.integers(2, 4) if narrow else rng.integers(4))
    if style < 2:
        prompt = pick(rng, ("How many objects are there?", "How many shapes can you see?", "Count the objects."))
        return Question(prompt, str(len(marks)), "count")
    present = rng.random() < 0.8
    if style == 2:
        shape = pick(rng, marks).name if present else pick(rng, SHAPES)
        prompt = pick(rng, ("How many {} are there?", "Count the {}.")).format(PLURALS[shape])
        return Question(prompt, str(sum(mark.name == shape for mark in marks)), "count")
    colour = pick(rng, marks).colour if present else pick(rng, COLOURS)
    prompt = pick(rng, ("How many {} objects are there?", "Count the {} objects.")).format(colour)
    return Question(prompt, str(sum(mark.colour == colour for mark in marks)), "count")


def _ask_colour(rng: np.random.Generator, marks: list[Mark], width: int, height: int) -> Question | None:
    mark = _only_one(rng, marks, lambda mark: mark.name)
    if mark is None:
        return None
    prompt = pick(rng, ("What colour is the {}?", "Which colour has the {}?", "What color is the {}?")).format(mark.name)
    return Question(prompt, mark.colour, "colour")


def _ask_shape(rng: np.random.Generator, marks: list[Mark], width: int, height: int) -> Question | None:
    mark = _only_one(rng, marks, lambda mark: mark.colour)
    if mark is None:
        return None
    prompt = pick(rng, ("What shape is {}?", "Which shape is {}?", "What is the shape of the {} object?")).format(mark.colour)
    return Question(prompt, mark.name, "shape")


def _ask_position(rng: np.random.Generator, marks: list[Mark], width: int, height: int) -> Question | None:
    clear = CLEAR_MARGIN * min(width, height)
    names = Counter(mark.name for mark in marks)
    single = [mark for mark in marks if names[mark.name] == 1]
    choices: list[tuple[str, str, str]] = []
    for mark in single:
        across, down = mark.x - width / 2, mark.y - height / 2
        side = ("left" if across < 0 else "right") if abs(across) > clear else ""
        level = ("top" if down < 0 else "bottom") if abs(down) > clear else ""
        if side and level:
            choices.append((mark.name, pick(rng, ("Where is the {}?", "In which corner is the {}?")), f"{level} {side}"))
        if side:
            choices.append((mark.name, "Is the {} on the left or on the right?", side))
        if level:
            choices.append((mark.name, "Is the {} at the top or at the bottom?", level))
    if not choices:
        return None
    name, prompt, answer = pick(rng, choices)
    return Question(prompt.format(name), answer, "position")


def _only_one(rng: np.random.Generator, marks: list[Mark], key: Callable[[Mark], str]) -> Mark | None:
    """A random mark whose `key` no other mark has; None if there is none."""
    counts = Counter(key(mark) for mark in marks)
    single = [mark for mark in marks if counts[key(mark)] == 1]
    return pick(rng, single) if single else None


_ASK: dict[str, Callable[[np.random.Generator, list[Mark], int, int], Question | None]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "position": _ask_position,
}
