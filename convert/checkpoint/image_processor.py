"""The image processor's file of a checkpoint, compared with what the runtime does with a picture (`fastvlm_edge.inputs.preprocess`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_edge.convert.checkpoint.files import read_optional_json
from fastvlm_edge.errors import FastVLMError

BICUBIC = 3


@dataclass(frozen=True)
class ImageProcessor:
    """What the file says."""

    path: Path
    crop: int | None
    """Pixels on a side; None if the file does not say."""
    pixels: list[str]
    """What gives a pixel another value than its colour / 255, as FastVLM takes it."""
    missing: list[str]
    """Keys that decide the values of pixels and are not there."""
    geometry: list[str]
    """What shows the encoder another part of the picture, or at another scale, than the runtime does."""


def read_image_processor(directory: Path) -> ImageProcessor | None:
    """Read `processor_config.json` if it holds an image processor, else `preprocessor_config.json`, as transformers does; None without one.

    Raises FastVLMError if the file is damaged, or if the crop is not a square.
    """
    path = directory / "processor_config.json"
    document = read_optional_json(path).get("image_processor")
    if document is None:
        path = directory / "preprocessor_config.json"
        document = read_optional_json(path)
    if not document:
        return None
    try:
        sides = _sides(document.get("crop_size"))
        if len(sides) > 1:
            raise FastVLMError(
                f"{path} crops pictures to {' x '.join(map(str, sorted(sides)))} px, which is not a square", "give a square crop_size"
            )
        crop = next(iter(sides), None)
        normalizes = document.get("do_normalize", True)
        missing = [key for key in ("image_mean", "image_std") if normalizes and document.get(key) is None]
        return ImageProcessor(path, crop, _pixel_differences(document), missing, _geometry_differences(document, crop))
    except (TypeError, ValueError, AttributeError) as error:
        raise FastVLMError(f"{path} contains a value of the wrong type ({error})", "correct it") from None


def _sides(size: object) -> set[int]:
    """Pixels on each side that a `size` or `crop_size` gives."""
    if isinstance(size, Mapping):
        return {int(size[key]) for key in ("height", "width", "shortest_edge") if size.get(key) is not None}
    return set() if size is None else {int(str(size))}


def _pixel_differences(document: Mapping[str, Any]) -> list[str]:
    found = []
    if document.get("do_normalize", True):
        for key, neutral in (("image_mean", 0), ("image_std", 1)):
            value = document.get(key)
            values = [] if value is None else value if isinstance(value, list) else [value]
            if any(float(number) != neutral for number in values):
                found.append(f"{key} {value}")
    if document.get("do_rescale") is False:
        found.append("do_rescale false")
    elif not math.isclose(float(document.get("rescale_factor", 1 / 255)), 1 / 255, rel_tol=1e-3):
        found.append(f"rescale_factor {document['rescale_factor']}")
    return found


def _geometry_differences(document: Mapping[str, Any], crop: int | None) -> list[str]:
    found = []
    if document.get("do_resize") is False:
        found.append("do_resize false")
    size = document.get("size")
    sides = _sides(size)
    if isinstance(size, Mapping) and size.get("shortest_edge") is None and sides:
        found.append(f"size {dict(size)}, which stretches pictures")
    elif crop is not None and sides and sides != {crop}:
        found.append(f"size {sides.pop()} px before a crop to {crop} px")
    if document.get("resample", BICUBIC) not in (BICUBIC, "bicubic"):
        found.append(f"resample {document['resample']} instead of bicubic")
    return found
