"""Signs with a word, and labels with a short code."""

from __future__ import annotations

from examples.demo_training.drawing.picture import DIGITS, FACES, LETTERS, Canvas, Colour, Question, between, pick, pick_weighted, shade

WORDS = (
    "ON",
    "OFF",
    "STOP",
    "EXIT",
    "PUMP",
    "VALVE",
    "OPEN",
    "FAN",
    "MAIN",
    "TANK",
    "GAS",
    "OIL",
    "HOT",
    "COLD",
    "WATER",
    "MOTOR",
    "POWER",
    "ALARM",
    "START",
    "RESET",
    "DOOR",
    "FIRE",
    "HIGH",
    "LOW",
    "AIR",
    "TEST",
    "FUSE",
    "PUSH",
    "PULL",
    "DANGER",
)
CODE_CHARACTERS = "".join(c for c in LETTERS + DIGITS if c not in "OIQ")
"""Codes have no letters that look like digits, as part numbers do not."""
SIGN_PROMPTS = ("What does the sign say?", "Read the sign.", "What word is on the sign?")
LABEL_PROMPTS = ("What is written on the label?", "Read the label.", "What code is on the label?")
SIGN_COLOURS: tuple[tuple[Colour, Colour], ...] = (
    ((190, 28, 30), (248, 246, 240)),
    ((24, 120, 60), (245, 248, 240)),
    ((28, 70, 160), (245, 246, 250)),
    ((244, 200, 30), (24, 22, 20)),
    ((245, 244, 238), (30, 30, 34)),
    ((34, 34, 38), (244, 240, 230)),
    ((236, 120, 24), (20, 18, 16)),
    ((246, 244, 240), (186, 26, 28)),
)
LABEL_COLOURS: tuple[tuple[Colour, Colour], ...] = (
    ((246, 246, 242), (26, 26, 30)),
    ((246, 226, 120), (24, 24, 24)),
    ((200, 206, 212), (22, 26, 40)),
    ((214, 232, 216), (16, 44, 28)),
    ((40, 44, 50), (238, 238, 232)),
)


def draw_sign(canvas: Canvas) -> tuple[str, list[Question]]:
    """A board with one word. Returns the word and the questions about it."""
    rng = canvas.rng
    word = pick(rng, WORDS)
    _draw_board(canvas, word, pick(rng, SIGN_COLOURS), border=rng.random() < 0.5, bars=False)
    return word, [Question(pick(rng, SIGN_PROMPTS), word, "sign")]


def draw_label(canvas: Canvas) -> tuple[str, list[Question]]:
    """A sticker with a code of 2 to 4 capital letters and digits. Returns the code and the questions about it."""
    rng = canvas.rng
    length = pick_weighted(rng, {2: 0.3, 3: 0.35, 4: 0.35})
    code = "".join(CODE_CHARACTERS[i] for i in rng.integers(0, len(CODE_CHARACTERS), length))
    _draw_board(canvas, code, pick(rng, LABEL_COLOURS), border=rng.random() < 0.3, bars=rng.random() < 0.4)
    return code, [Question(pick(rng, LABEL_PROMPTS), code, "label")]


def _draw_board(canvas: Canvas, text: str, colours: tuple[Colour, Colour], *, border: bool, bars: bool) -> None:
    """`text` on a board just larger than it; `bars` adds a strip like a bar code below."""
    rng, side = canvas.rng, canvas.side
    canvas.clutter()
    board, ink = (shade(rng, colour, 14) for colour in colours)
    face = pick(rng, FACES)
    size = 0.25 * side
    width = canvas.text_width(text, face, size)
    fit = 0.78 * side / width
    size *= min(fit, between(rng, 0.72, 1.0) * max(fit, 0.75), 1.5)
    width = canvas.text_width(text, face, size)
    pad_x, pad_y = between(rng, 0.03, 0.09) * side, between(rng, 0.15, 0.4) * size
    half_w, half_h = width / 2 + pad_x, size * 0.4 + pad_y
    below = size * between(rng, 0.3, 0.5) if bars else 0.0
    cx = canvas.middle[0] + between(rng, -1, 1) * max(0.0, 0.47 * side - half_w)
    cy = canvas.middle[1] + between(rng, -1, 1) * max(0.0, 0.44 * side - half_h - below / 2) - below / 2
    box = (cx - half_w, cy - half_h, cx + half_w, cy + half_h + below)
    canvas.rectangle(box, board, radius=between(rng, 0, 9), outline=ink if border else None, width=between(rng, 1, 2.5))
    canvas.text((cx, cy), text, face, size, ink)
    if bars:
        x = cx - half_w * 0.8
        while x < cx + half_w * 0.75:
            thick = between(rng, 0.7, 2.4)
            canvas.rectangle((x, cy + half_h * 0.95, x + thick, cy + half_h + below * 0.7), ink)
            x += thick + between(rng, 1.0, 3.0)
