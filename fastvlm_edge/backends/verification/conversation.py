"""The stored pictures, and the stored conversations about them that every conversion and every engine is checked with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.kv_cache import next_capacity
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest

PICTURES = ("astronaut.jpg", "coffee.jpg")
"""NASA's portrait of Eileen Collins (public domain) and a coffee cup by Rachel Michetti (CC0), as scikit-image ships them."""
QUESTION = "What do you see in this picture? Answer in one short sentence."
ANSWER = "The picture shows a person or a thing in front of a plain background, in 1 or 2 colours."
LENGTH = 576
"""The passage is at least this long: a prefill chunk of 512 and an answer fit in."""
MOST_ROWS = 16
"""The most logits that one call may ask for: every decoder engine computes that many."""
SINGLE = 8
"""Number of ids that are fed one by one on either side of a border of the cache."""
TAIL = 32
"""Logits are compared at this many positions at the end of the passage."""

Float32 = NDArray[np.float32]


def stored_pictures(image_size: int, geometry: str) -> list[Float32]:
    """pixel_values [1, 3, image_size, image_size] of each picture that comes with the toolkit."""
    folder = Path(str(files("fastvlm_edge"))) / "pictures"
    return [preprocess(folder / name, image_size, geometry) for name in PICTURES]


def stored_conversation(tokenizer: TextTokenizer, manifest: Manifest, rows: int) -> list[int]:
    """Token ids of a question about one picture, which has `rows` visual tokens, and of an answer."""
    template = ChatTemplate(tokenizer, manifest)
    return [*template.opening(), *template.turn(QUESTION, (rows,)), *tokenizer.encode(ANSWER)]


@dataclass(frozen=True)
class Passage:
    """A conversation about two pictures, as ids of the decoder, and the positions whose logits are compared."""

    ids: Sequence[int]
    """At most as long as the context. The id `vocab + k` is row k of both pictures' features, concatenated."""
    turn: int
    """Number of ids of the first question and answer; the second picture comes after them."""
    positions: Sequence[int]
    """In ascending order."""

    @property
    def border(self) -> int:
        """The last length at which the cache has to grow, with at least SINGLE ids after it. The length of `ids` if there is none."""
        return _border(len(self.ids))


def stored_passage(tokenizer: TextTokenizer, manifest: Manifest) -> Passage:
    """The stored conversation, a second turn about the second picture, and the answer repeated until LENGTH is reached."""
    rows, context = manifest.vision.tokens, manifest.decoder.context
    template, answer = ChatTemplate(tokenizer, manifest), tokenizer.encode(ANSWER)
    ids = stored_conversation(tokenizer, manifest, rows)
    turn = len(ids)
    ids += [*template.closing(), *template.turn(QUESTION, (rows,), first_row=rows), *answer]
    while len(ids) < LENGTH:
        ids += answer
    ids = ids[:context]
    turn = min(turn, len(ids))
    return Passage(ids, turn, compared_positions(len(ids), turn))


def compared_positions(length: int, turn: int) -> list[int]:
    """The positions of a passage whose logits are compared: the end of the first turn, around the border of the cache, and the end."""
    border = _border(length)
    windows = ((turn - MOST_ROWS, turn), (border - MOST_ROWS, border + SINGLE), (length - TAIL, length))
    return sorted({position for start, stop in windows for position in range(max(start, 0), min(stop, length))})


def _border(length: int) -> int:
    borders = [size for size in range(1, length - SINGLE + 1) if next_capacity(size) == size]
    return borders[-1] if borders else length
