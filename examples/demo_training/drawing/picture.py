"""The parts of a drawn scene, and its canvas: antialiasing, fonts, light, blur, noise and perspective.

Everything that a question may be about is recorded while the picture is drawn, so answers and training targets are exact.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
OVERSAMPLING = 2
"""Factor by which the canvas is larger than the picture; the perspective warp samples the centre of four of its pixels."""

POOL_SIDE = 640
MOST_NOISE = 9
STRAIGHT = 0.35
"""Share of the pictures without perspective."""

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]
Font = ImageFont.FreeTypeFont
T = TypeVar("T")

DEJAVU_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
)
FACES = (*DEJAVU_FACES, "pillow")


@dataclass(frozen=True)
class Mark:
    """One character or shape of the picture: its name ("7", "A", "star"), colour name ("" for characters), centre and size in pixels."""

    name: str
    colour: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Question:
    """A question about a picture, with the only right answer."""

    prompt: str
    answer: str
    kind: str


@dataclass
class Scene:
    """A finished picture and everything known about it. `text` is its text, for kinds that are read."""

    image: Image.Image
    kind: str
    text: str
    marks: list[Mark]
    questions: list[Question]


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of `items`, all equally likely (a tenth of the cost of `Generator.choice`)."""
    return items[int(rng.integers(len(items)))]


def pick_weighted(rng: np.random.Generator, weights: dict[T, float]) -> T:
    """One of the keys of `weights`, in proportion to the values."""
    left = rng.random() * sum(weights.values())
    for item, weight in weights.items():
        left -= weight
        if left < 0:
            return item
    return item


def between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def shade(rng: np.random.Generator, colour: Colour, spread: int) -> Colour:
    """`colour` with every component moved by up to `spread`."""
    moved = rng.integers(-spread, spread + 1, 3).tolist()
    red, green, blue = (min(255, max(0, part + by)) for part, by in zip(colour, moved, strict=True))
    return red, green, blue


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the way from `first` to `second`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


@functools.cache
def font_folder() -> Path:
    """The folder of matplotlib's DejaVu fonts, found without importing matplotlib.

    Raises FileNotFoundError when matplotlib is not installed: without its fonts the same seed would draw other pictures.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("scenes are drawn with the DejaVu fonts of matplotlib, which is not installed; run: pip install matplotlib")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


@functools.lru_cache(maxsize=1024)
def load_font(face: str, size: int) -> Font:
    """The face at `size` canvas pixels."""
    if face == "pillow":
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    return ImageFont.truetype(str(font_folder() / f"{face}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def noise_pool(sigma: int) -> Image.Image:
    """Grey level 128 with normal noise, 640 px square, of which pictures take random windows: fresh noise would double their time."""
    noise = np.random.default_rng([20240229, sigma]).standard_normal((POOL_SIDE, POOL_SIDE, 3), dtype=np.float32)
    return Image.fromarray(np.clip(np.rint(noise * sigma + 128), 0, 255).astype(np.uint8))


@functools.cache
def ramp_pool() -> Image.Image:
    """A plane that rises from 0 at the left to 255 at the right, 256 px square."""
    return Image.fromarray(np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3)).copy())


@dataclass
class Canvas:
    """A surface in output pixels. `difficulty` in 0..1 scales every distortion; 1 is what held-out pictures have."""

    rng: np.random.Generator
    width: int
    height: int
    background: Colour
    difficulty: float = 1.0
    marks: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._image = Image.new("RGB", (self.width * OVERSAMPLING, self.height * OVERSAMPLING), self.background)
        self._draw = ImageDraw.Draw(self._image)

    @property
    def side(self) -> float:
        """Side of the square field that scenes are laid out in; it is centred on the canvas."""
        return min(self.width, self.height)

    @property
    def middle(self) -> Point:
        return self.width / 2, self.height / 2

    def rectangle(self, box: Box, fill: Colour, *, radius: float = 0.0, outline: Colour | None = None, width: float = 0.0) -> None:
        scaled = [value * OVERSAMPLING for value in box]
        stroke = max(1, round(width * OVERSAMPLING)) if outline else 1
        if radius:
            self._draw.rounded_rectangle(scaled, radius * OVERSAMPLING, fill, outline, stroke)
        else:
            self._draw.rectangle(scaled, fill, outline, stroke)

    def ellipse(self, box: Box, fill: Colour, *, outline: Colour | None = None, width: float = 0.0) -> None:
        stroke = max(1, round(width * OVERSAMPLING)) if outline else 1
        self._draw.ellipse([value * OVERSAMPLING for value in box], fill, outline, stroke)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self._draw.polygon([(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points], fill)

    def line(self, points: Sequence[Point], fill: Colour, width: float) -> None:
        self._draw.line([(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points], fill, max(1, round(width * OVERSAMPLING)))

    def text(self, centre: Point, text: str, face: str, size: float, fill: Colour, *, mark: bool = True) -> None:
        """Write `text` centred on `centre`; `size` is the font size in output pixels. Adds one mark per character if `mark`."""
        font = load_font(face, max(6, round(size * OVERSAMPLING)))
        left, top, right, bottom = (value / OVERSAMPLING for value in font.getbbox(text))
        x, y = centre[0] - (left + right) / 2, centre[1] - (top + bottom) / 2
        self._draw.text((x * OVERSAMPLING, y * OVERSAMPLING), text, fill, font)
        if not mark:
            return
        begin = 0.0
        for index, character in enumerate(text):
            end = font.getlength(text[: index + 1]) / OVERSAMPLING
            self.marks.append(Mark(character, "", x + (begin + end) / 2, centre[1], end - begin, bottom - top))
            begin = end

    def text_width(self, text: str, face: str, size: float) -> float:
        return load_font(face, max(6, round(size * OVERSAMPLING))).getlength(text) / OVERSAMPLING

    def clutter(self) -> None:
        """Add a second area, a band or a few lines to the background, close to its colour."""
        style = int(self.rng.integers(5))
        if style == 0:
            edge = between(self.rng, 0.25, 0.75) * self.height
            self.rectangle((0, edge, self.width, self.height), shade(self.rng, self.background, 30))
        elif style == 1:
            edge = between(self.rng, 0.1, 0.9) * self.width
            self.rectangle((edge, 0, edge + self.side * 0.3, self.height), shade(self.rng, self.background, 30))
        elif style == 2:
            tint = shade(self.rng, self.background, 30)
            for step in np.linspace(0, self.height, int(self.rng.integers(4, 9)))[1:-1]:
                self.line([(0, float(step)), (self.width, float(step))], tint, between(self.rng, 0.5, 2.5))

    def finish(self) -> Image.Image:
        """Warp, blur, light and noise, scaled down to the output size. Moves `marks` along with the warp."""
        rng, amount = self.rng, self.difficulty
        if rng.random() < STRAIGHT:
            image = self._image.reduce(OVERSAMPLING)
        else:
            matrix = self._warp_matrix(amount)
            coefficients = (matrix / matrix[2, 2]).reshape(9)[:8].tolist()
            image = self._image.transform(
                (self.width, self.height), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR, fillcolor=self.background
            )
            self.marks = _move_marks(self.marks, matrix)
        blur = between(rng, -0.6, 1.1) * amount * self.side / 192
        if blur > 0.1:
            image = image.filter(ImageFilter.BoxBlur(blur))
        return self._light(image, amount)

    def _warp_matrix(self, amount: float) -> npt.NDArray[np.float64]:
        """Output pixel -> canvas pixel, a projective map [3, 3] about the middle of the picture."""
        rng = self.rng
        angle = math.radians(between(rng, -7, 7) * amount)
        zoom = 1 + between(rng, -0.06, 0.06) * amount
        shear = between(rng, -0.08, 0.08) * amount
        tilt_x, tilt_y = (between(rng, -0.14, 0.14) * amount / self.side for _ in range(2))
        to_middle = np.array([[1, 0, -self.width / 2], [0, 1, -self.height / 2], [0, 0, 1]])
        turn = np.array([[math.cos(angle), -math.sin(angle) + shear, 0], [math.sin(angle), math.cos(angle), 0], [tilt_x, tilt_y, zoom]])
        to_canvas = np.array(
            [[OVERSAMPLING, 0, self.width / 2 * OVERSAMPLING], [0, OVERSAMPLING, self.height / 2 * OVERSAMPLING], [0, 0, 1]]
        )
        return to_canvas @ turn @ to_middle

    def _light(self, image: Image.Image, amount: float) -> Image.Image:
        """Exposure, a tint, light that falls off across the picture, and sensor noise; in 8 bits throughout, for speed."""
        rng = self.rng
        gain = 1 + between(rng, -0.35, 0.2) * amount
        offset = between(rng, -8, 14) * amount
        levels = np.arange(256, dtype=np.float32)
        tables = [np.clip(levels * (gain * (1 + between(rng, -0.05, 0.05) * amount)) + offset, 0, 255) for _ in range(3)]
        image = image.point(np.concatenate(tables).astype(np.uint8).tolist())
        fall = between(rng, 0, 0.4) * amount
        if fall > 0.1:
            image = ImageChops.multiply(image, self._falling_light(fall))
        sigma = round(between(rng, 0, MOST_NOISE) * amount)
        if sigma:
            left, top = (int(rng.integers(max(1, POOL_SIDE - length + 1))) for length in (self.width, self.height))
            noise = noise_pool(sigma)
            if self.width > POOL_SIDE or self.height > POOL_SIDE:
                noise = noise.resize((max(POOL_SIDE, self.width), max(POOL_SIDE, self.height)), Image.Resampling.NEAREST)
            noise = noise.crop((left, top, left + self.width, top + self.height))
            image = ImageChops.add(image, noise, 1.0, -128)
        return image

    def _falling_light(self, fall: float) -> Image.Image:
        """White on one side of the picture, darker by the share `fall` on the other, in a random direction."""
        angle = between(self.rng, 0, 2 * math.pi)
        cos, sin = math.cos(angle) / 1.42, math.sin(angle) / 1.42
        scale_x, scale_y = 256 / self.width, 256 / self.height
        table = (255 - fall * np.arange(256)).astype(np.uint8).tolist() * 3
        turned = (cos * scale_x, sin * scale_y, 128 - 128 * (cos + sin), 0.0, 0.0, 128.0)
        return ramp_pool().transform((self.width, self.height), Image.Transform.AFFINE, turned, Image.Resampling.NEAREST).point(table)


def _move_marks(marks: list[Mark], matrix: npt.NDArray[np.float64]) -> list[Mark]:
    """Marks from canvas to output coordinates; sizes stay, because the warp hardly changes them."""
    if not marks:
        return []
    points = np.array([(mark.x * OVERSAMPLING, mark.y * OVERSAMPLING, 1.0) for mark in marks])
    moved = points @ np.linalg.inv(matrix).T
    moved = moved[:, :2] / moved[:, 2:]
    return [Mark(mark.name, mark.colour, float(x), float(y), mark.width, mark.height) for mark, (x, y) in zip(marks, moved, strict=True)]
