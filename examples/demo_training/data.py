"""Training batches, drawn on the fly: pictures, packed questions, and targets of the auxiliary heads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.demo_training.drawing.objects import CLEAR_MARGIN
from examples.demo_training.drawing.picture import COLOURS, SHAPES, Mark, Scene, pick_weighted
from examples.demo_training.language import Prompter, stack_rows
from examples.demo_training.model import CHARACTERS, DENSE_STRIDE, GLYPHS, MOST, SLOTS, TINTS, Packed
from examples.demo_training.scenes import OBJECT_KINDS, make_scene
from fastvlm_edge.inputs.preprocess import pad_and_resize
from fastvlm_edge.model_dir.manifest import STRIDE

Ints = npt.NDArray[np.int64]

GLYPH_INDEX = {name: index for index, name in enumerate(GLYPHS)}
TINT_INDEX = {name: index for index, name in enumerate(TINTS)}
CHARACTER_INDEX = {name: index for index, name in enumerate(CHARACTERS)}
QUESTIONS_PER_PICTURE = 8
TRAINING_WEIGHTS = {
    "reading": 0.2,
    "dial": 0.05,
    "sign": 0.03,
    "label": 0.17,
    "count": 0.2,
    "colour": 0.09,
    "shape": 0.09,
    "position": 0.17,
}
"""Kind -> share in training. Kinds that are learned last have larger shares; held-out pictures follow `scenes.KIND_WEIGHTS`."""
WARM_UP_PICTURES = 30_000
"""Number of pictures over which distortions grow to their full strength."""
DRAWN_WEIGHTS = {0: 0.25, 192: 0.45, 384: 0.3}
"""Size at which a picture is drawn -> share, in training at several image sizes; 0 stands for the size at which it is seen."""


@dataclass
class Batch:
    """One step. Shapes: pixels [n, 3, H, W] uint8, glyphs and tints [n, H/16, W/16], slots [n, SLOTS], counts [n, COUNTED]."""

    pixels: Tensor
    packed: list[tuple[Tensor, Packed]]
    """Question rows with the pictures [rows] they are about; short and long rows apart, so that little is spent on padding."""
    glyphs: Tensor
    tints: Tensor
    slots: Tensor
    counts: Tensor
    """-1 for pictures to be read, where there is nothing to count."""
    relations: Tensor
    """[n, RELATIONS]; -1 unless there is exactly one such object."""
    place_shapes: Tensor
    """[n, H/64, W/64]: 0 nothing, else 1 + index into SHAPES; -1 where two objects meet."""
    place_tints: Tensor


def cell_targets(marks: list[Mark], rows: int, columns: int) -> tuple[Ints, Ints]:
    """Character or shape, and colour, [rows, columns] each.

    A mark is in every cell whose centre lies in its box, and in the cell of its own centre.
    """
    glyphs, tints = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.int64)
    for mark in marks:
        top, bottom = (round((mark.y + half * mark.height) / DENSE_STRIDE) for half in (-0.42, 0.42))
        left, right = (round((mark.x + half * mark.width) / DENSE_STRIDE) for half in (-0.42, 0.42))
        row, column = int(mark.y // DENSE_STRIDE), int(mark.x // DENSE_STRIDE)
        for area in (
            np.s_[max(0, top) : max(0, bottom), max(0, left) : max(0, right)],
            np.s_[max(0, row) : max(0, row + 1), max(0, column) : max(0, column + 1)],
        ):
            glyphs[area] = GLYPH_INDEX[mark.name]
            tints[area] = TINT_INDEX[mark.colour]
    return glyphs, tints


def slot_targets(text: str) -> Ints:
    """Classes of the text's characters in order, [SLOTS], filled up with 0."""
    slots = np.zeros(SLOTS, dtype=np.int64)
    for index, character in enumerate(text[:SLOTS]):
        slots[index] = CHARACTER_INDEX[character]
    return slots


def count_targets(scene: Scene) -> Ints:
    """Number of objects of each shape, of each colour, and in total, [COUNTED]; -1 for pictures to be read."""
    if scene.kind not in OBJECT_KINDS:
        return np.full(len(SHAPES) + len(COLOURS) + 1, -1, dtype=np.int64)
    names, colours = [mark.name for mark in scene.marks], [mark.colour for mark in scene.marks]
    counts = [*(names.count(shape) for shape in SHAPES), *(colours.count(colour) for colour in COLOURS), len(names)]
    return np.minimum(np.array(counts, dtype=np.int64), MOST - 1)


def relation_targets(scene: Scene) -> Ints:
    """For each shape its colour, side (left 0, right 1) and level (top 0, bottom 1); then for each colour its shape: [RELATIONS].

    -1 for shapes and colours that do not occur exactly once, or are too near to the middle to tell the side.
    """
    colour, side, level, shape = (np.full(count, -1, dtype=np.int64) for count in (*[len(SHAPES)] * 3, len(COLOURS)))
    if scene.kind in OBJECT_KINDS:
        width, height = scene.image.size
        clear = CLEAR_MARGIN * min(width, height)
        for index, name in enumerate(SHAPES):
            marks = [mark for mark in scene.marks if mark.name == name]
            if len(marks) == 1:
                across, down = marks[0].x - width / 2, marks[0].y - height / 2
                colour[index] = COLOURS.index(marks[0].colour)
                side[index] = int(across > 0) if abs(across) > clear else -1
                level[index] = int(down > 0) if abs(down) > clear else -1
        for index, name in enumerate(COLOURS):
            marks = [mark for mark in scene.marks if mark.colour == name]
            if len(marks) == 1:
                shape[index] = SHAPES.index(marks[0].name)
    return np.concatenate([colour, side, level, shape])


def place_targets(scene: Scene) -> tuple[Ints, Ints]:
    """Shape and colour of the object whose centre is in the square of each visual token, [H/64, W/64] each."""
    rows, columns = scene.image.height // STRIDE, scene.image.width // STRIDE
    shapes, tints = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.int64)
    if scene.kind in OBJECT_KINDS:
        for mark in scene.marks:
            row, column = (int(np.clip(at // STRIDE, 0, most - 1)) for at, most in ((mark.y, rows), (mark.x, columns)))
            taken = shapes[row, column] != 0
            shapes[row, column] = -1 if taken else 1 + SHAPES.index(mark.name)
            tints[row, column] = -1 if taken else TINT_INDEX[mark.colour]
    return shapes, tints


def _pack_rows(rows: Sequence[Ints], pictures: list[int]) -> tuple[Tensor, Packed]:
    stacked = torch.from_numpy(stack_rows([rows[index] for index in pictures]))
    return torch.tensor(pictures), Packed(*stacked.unbind(1))


def collate(scenes: list[Scene], prompter: Prompter) -> Batch:
    """The batch of some scenes, with all their targets."""
    cells = [cell_targets(scene.marks, scene.image.height // DENSE_STRIDE, scene.image.width // DENSE_STRIDE) for scene in scenes]
    places = [place_targets(scene) for scene in scenes]
    rows = [prompter.pack(scene.questions) for scene in scenes]
    short = [index for index, scene in enumerate(scenes) if len(scene.questions) == 1]
    long = [index for index, scene in enumerate(scenes) if len(scene.questions) > 1]
    return Batch(
        pixels=torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).permute(0, 3, 1, 2),
        packed=[_pack_rows(rows, pictures) for pictures in (short, long) if pictures],
        glyphs=torch.from_numpy(np.stack([glyphs for glyphs, _ in cells])),
        tints=torch.from_numpy(np.stack([tints for _, tints in cells])),
        slots=torch.from_numpy(np.stack([slot_targets(scene.text) for scene in scenes])),
        counts=torch.from_numpy(np.stack([count_targets(scene) for scene in scenes])),
        relations=torch.from_numpy(np.stack([relation_targets(scene) for scene in scenes])),
        place_shapes=torch.from_numpy(np.stack([shapes for shapes, _ in places])),
        place_tints=torch.from_numpy(np.stack([tints for _, tints in places])),
    )


def resize_scene(scene: Scene, size: int) -> Scene:
    """The square scene as the model sees it at `size`: resized as in the runtime, with its marks."""
    if scene.image.width == size:
        return scene
    scale = size / scene.image.width
    marks = [
        replace(mark, x=scale * mark.x, y=scale * mark.y, width=scale * mark.width, height=scale * mark.height) for mark in scene.marks
    ]
    return replace(scene, image=pad_and_resize(scene.image, size), marks=marks)


def training_kind(seed: int, picture: int) -> str:
    """Kind of a training picture, from a random stream that nothing else uses."""
    return pick_weighted(np.random.default_rng([seed, picture]), TRAINING_WEIGHTS)


def seen_size(seed: int, first: int, sizes: Sequence[int]) -> int:
    """Image size of the batch that begins with picture `first`, the larger the likelier, from a random stream of its own."""
    return pick_weighted(np.random.default_rng([seed, first, 1]), {size: float(size) for size in sizes})


def drawn_size(seed: int, picture: int, seen: int) -> int:
    """Size at which a picture that is seen at another one is drawn, from a random stream of its own."""
    return pick_weighted(np.random.default_rng([seed, picture, 2]), DRAWN_WEIGHTS) or seen


def draw_batches(
    tokenizer: Tokenizer,
    *,
    seed: int,
    start: int,
    batch: int,
    rank: int,
    ranks: int,
    image_sizes: Sequence[int],
    warm_up: int = WARM_UP_PICTURES,
) -> Iterator[Batch]:
    """This rank's share of the training batches from picture `start` on, endless; the ranks take the pictures of a batch in turn.

    A batch has one of `image_sizes`. With a single one, every picture is drawn at it. Distortions grow over the first `warm_up` pictures.
    """
    prompters = {size: Prompter(tokenizer, (size // STRIDE) ** 2) for size in image_sizes}
    for first in itertools.count(start, batch):
        size = seen_size(seed, first, image_sizes)
        scenes = [
            make_scene(
                "train",
                seed,
                picture,
                size=drawn_size(seed, picture, size) if len(image_sizes) > 1 else size,
                difficulty=0.3 + 0.7 * picture / warm_up if picture < warm_up else 1.0,
                kind=training_kind(seed, picture),
                questions=QUESTIONS_PER_PICTURE,
            )
            for picture in range(first + rank, first + batch, ranks)
        ]
        yield collate([resize_scene(scene, size) for scene in scenes], prompters[size])
