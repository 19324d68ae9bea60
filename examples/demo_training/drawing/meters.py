"""Instruments: seven-segment displays, mechanical counters and round gauges."""

from __future__ import annotations

import math

import numpy as np

from examples.demo_training.drawing.picture import DIGITS, Canvas, Colour, Mark, Point, Question, between, mix, pick, pick_weighted, shade

# Segments lit for each digit: a top, b upper right, c lower right, d bottom, e lower left, f upper left, g middle.
SEGMENTS = {
    "0": "abcdef",
    "1": "bc",
    "2": "abged",
    "3": "abgcd",
    "4": "fgbc",
    "5": "afgcd",
    "6": "afgedc",
    "7": "abc",
    "8": "abcdefg",
    "9": "abcdfg",
}
READING_PROMPTS = ("What does the meter read?", "What is the reading?", "Read the display.", "What number is shown?")
DIAL_PROMPTS = ("What value does the gauge show?", "What does the dial show?", "Where does the pointer stand?")
LENGTHS = {1: 0.16, 2: 0.22, 3: 0.28, 4: 0.34}
LED_COLOURS: tuple[Colour, ...] = ((255, 60, 40), (60, 240, 90), (255, 180, 40), (70, 170, 255), (240, 240, 250))
LCD_PAIRS: tuple[tuple[Colour, Colour], ...] = (
    ((168, 184, 150), (28, 34, 30)),
    ((190, 198, 186), (30, 34, 40)),
    ((150, 170, 190), (20, 26, 46)),
)
CASES: tuple[Colour, ...] = ((60, 62, 66), (110, 112, 116), (200, 200, 196), (40, 60, 90), (150, 132, 96), (92, 60, 52), (60, 92, 74))


def draw_meter(canvas: Canvas, max_digits: int) -> tuple[str, list[Question]]:
    """A display of 1 to `max_digits` digits. Returns what it shows and the questions about it."""
    rng = canvas.rng
    length = pick_weighted(rng, {n: w for n, w in LENGTHS.items() if n <= max_digits})
    text = "".join(DIGITS[d] for d in rng.integers(0, 10, length))
    canvas.clutter()
    (_draw_segment_display if rng.random() < 0.62 else _draw_counter)(canvas, text)
    return text, [Question(pick(rng, READING_PROMPTS), text, "reading")]


def _place_display(canvas: Canvas, length: int, aspect: float, pitch: float) -> tuple[float, float, float, float]:
    """Digit height and width, and the left and the middle of the row, so that the display with its frame is inside the picture."""
    rng, side = canvas.rng, canvas.side
    widest = 0.80 * side / (length * aspect * pitch)
    tallest = min(0.46 * side, widest)
    height = between(rng, max(0.17 * side, 0.55 * tallest), tallest)
    width = height * aspect
    total = length * width * pitch
    free_x, free_y = 0.84 * side - total, 0.76 * side - height
    x = canvas.middle[0] - total / 2 + between(rng, -0.5, 0.5) * free_x
    y = canvas.middle[1] + between(rng, -0.5, 0.5) * free_y
    return height, width, x, y


def _draw_segment_display(canvas: Canvas, text: str) -> None:
    rng = canvas.rng
    aspect, pitch = between(rng, 0.48, 0.6), between(rng, 1.25, 1.42)
    height, width, x, y = _place_display(canvas, len(text), aspect, pitch)
    if rng.random() < 0.5:
        panel, lit = pick(rng, LCD_PAIRS)
        panel, lit = shade(rng, panel, 18), shade(rng, lit, 14)
        unlit = mix(panel, lit, between(rng, 0.0, 0.1))
    else:
        panel = shade(rng, (22, 20, 22), 14)
        lit = shade(rng, pick(rng, LED_COLOURS), 20)
        unlit = mix(panel, lit, between(rng, 0.0, 0.12))
    total = len(text) * width * pitch
    pad_x, pad_y = between(rng, 0.1, 0.3) * width, between(rng, 0.12, 0.3) * height
    frame = pad_y * between(rng, 0.2, 1.0)
    case = shade(rng, pick(rng, CASES), 20)
    box = (x - pad_x, y - height / 2 - pad_y, x + total + pad_x, y + height / 2 + pad_y)
    canvas.rectangle((box[0] - frame, box[1] - frame, box[2] + frame, box[3] + frame), case, radius=between(rng, 0, 6))
    canvas.rectangle(box, panel)
    slant = between(rng, 0.0, 0.12) if rng.random() < 0.6 else 0.0
    thick = height * between(rng, 0.09, 0.15)
    gap = between(rng, 0.0, 0.12) * thick
    for index, digit in enumerate(text):
        left = x + width * pitch * index + width * (pitch - 1) / 2
        _draw_digit(canvas, digit, (left, y - height / 2), width, height, thick, gap, slant, lit, unlit)
        canvas.marks.append(Mark(digit, "", left + width / 2, y, width * 1.1, height))


def _draw_digit(
    canvas: Canvas,
    digit: str,
    corner: Point,
    width: float,
    height: float,
    thick: float,
    gap: float,
    slant: float,
    lit: Colour,
    unlit: Colour,
) -> None:
    """One digit in the box whose upper left is `corner`; `slant` leans its top to the right."""
    half = thick / 2
    nodes = {
        "tl": (half, half),
        "tr": (width - half, half),
        "ml": (half, height / 2),
        "mr": (width - half, height / 2),
        "bl": (half, height - half),
        "br": (width - half, height - half),
    }
    ends = {
        "a": ("tl", "tr"),
        "b": ("tr", "mr"),
        "c": ("mr", "br"),
        "d": ("bl", "br"),
        "e": ("ml", "bl"),
        "f": ("tl", "ml"),
        "g": ("ml", "mr"),
    }
    for name in sorted(ends, key=lambda segment: segment in SEGMENTS[digit]):
        (x0, y0), (x1, y1) = (nodes[end] for end in ends[name])
        along_x, along_y = (1.0, 0.0) if y0 == y1 else (0.0, 1.0)
        x0, y0, x1, y1 = x0 + gap * along_x, y0 + gap * along_y, x1 - gap * along_x, y1 - gap * along_y
        bar = [
            (x0, y0),
            (x0 + half * (along_x + along_y), y0 + half * (along_y - along_x)),
            (x1 - half * (along_x - along_y), y1 - half * (along_y + along_x)),
            (x1, y1),
            (x1 - half * (along_x + along_y), y1 + half * (along_x - along_y)),
            (x0 + half * (along_x - along_y), y0 + half * (along_x + along_y)),
        ]
        canvas.polygon(
            [(corner[0] + px + slant * (height / 2 - py), corner[1] + py) for px, py in bar], lit if name in SEGMENTS[digit] else unlit
        )


def _draw_counter(canvas: Canvas, text: str) -> None:
    """Printed digits on drums behind small windows."""
    rng = canvas.rng
    aspect, pitch = between(rng, 0.62, 0.75), between(rng, 1.02, 1.25)
    height, width, x, y = _place_display(canvas, len(text), aspect, pitch)
    face = pick(rng, ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "pillow"))
    dark = rng.random() < 0.6
    drum, ink = (shade(rng, (28, 28, 30), 20), shade(rng, (235, 235, 228), 18))
    if not dark:
        drum, ink = ink, drum
    total, frame = len(text) * width * pitch, between(rng, 0.08, 0.25) * height
    case = shade(rng, pick(rng, CASES), 20)
    canvas.rectangle((x - frame, y - height / 2 - frame, x + total + frame, y + height / 2 + frame), case, radius=between(rng, 0, 8))
    red_last = len(text) > 1 and rng.random() < 0.3
    for index, digit in enumerate(text):
        left = x + width * pitch * index + width * (pitch - 1) / 2
        drum_colour = shade(rng, (176, 32, 30), 16) if red_last and index == len(text) - 1 else drum
        ink_colour = (240, 236, 230) if drum_colour is not drum else ink
        canvas.rectangle((left, y - height / 2, left + width, y + height / 2), drum_colour)
        wobble = between(rng, -0.05, 0.05) * height * canvas.difficulty
        canvas.text((left + width / 2, y + wobble), digit, face, height * between(rng, 0.84, 0.96), ink_colour)


def draw_dial(canvas: Canvas) -> tuple[str, list[Question]]:
    """A round gauge whose pointer is on one of eleven ticks, 0..10 or 0..100. Returns the value and the questions about it."""
    rng, side = canvas.rng, canvas.side
    canvas.clutter()
    radius = between(rng, 0.36, 0.47) * side
    cx, cy = (middle + between(rng, -1, 1) * (0.49 * side - radius) for middle in canvas.middle)
    step = pick(rng, (1, 10))
    tick = int(rng.integers(11))
    light = rng.random() < 0.65
    face, ink = shade(rng, (238, 238, 230), 14), shade(rng, (26, 26, 30), 18)
    if not light:
        face, ink = ink, face
    rim = shade(rng, pick(rng, CASES), 20)
    canvas.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), face, outline=rim, width=radius * between(rng, 0.05, 0.1))
    sweep = pick(rng, (240, 270, 270))
    start = 90 + (360 - sweep) / 2

    def at(position: float, share: float) -> Point:
        angle = math.radians(start + sweep * position / 10)
        return cx + radius * share * math.cos(angle), cy + radius * share * math.sin(angle)

    every = pick(rng, (1, 2, 5)) if step == 1 else pick(rng, (2, 5))
    font, size = pick(rng, ("DejaVuSans", "DejaVuSans-Bold", "pillow")), radius * (0.2 if step == 1 else 0.17)
    for index in range(11):
        canvas.line([at(index, 0.78), at(index, 0.88)], ink, radius * 0.025)
        if index % every == 0:
            canvas.text(at(index, 0.6), str(index * step), font, size, ink, mark=False)
    needle = shade(rng, (200, 30, 30), 20) if rng.random() < 0.6 else ink
    stand = tick + between(rng, -0.12, 0.12) * canvas.difficulty
    tip, tail = at(stand, between(rng, 0.72, 0.8)), at(stand + 5 * 360 / sweep, 0.18)
    nx, ny = (tip[1] - cy) / radius * 0.07 * radius, -(tip[0] - cx) / radius * 0.07 * radius
    canvas.polygon([tip, (cx + nx, cy + ny), tail, (cx - nx, cy - ny)], needle)
    hub = radius * 0.08
    canvas.ellipse((cx - hub, cy - hub, cx + hub, cy + hub), mix(needle, rim, 0.4))
    text = str(tick * step)
    return text, [Question(pick(rng, DIAL_PROMPTS), text, "dial")]


def dial_values() -> list[str]:
    """All possible answers about a dial."""
    return [str(value) for value in sorted({int(tick * step) for step in (1, 10) for tick in np.arange(11)})]
