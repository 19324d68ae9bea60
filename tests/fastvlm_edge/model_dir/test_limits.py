"""Image sizes that are asked for, in every form, and those that are refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.model_dir.limits import IMAGE_SIZES, check_image_size, image_sizes


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, []), (512, [512]), ("512", [512]), ("1024,512,256", [1024, 512, 256]), ((256, 1024), [256, 1024]), ([], [])],
)
def test_the_first_size_is_the_default_one(asked: int | str | Sequence[int] | None, expected: list[int]) -> None:
    assert image_sizes(asked) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("512,large", "image size 'large' is not an integer; choose 128 to 1536 in steps of 64, several with commas between"),
        ("512,", "image size '' is not an integer"),
        ([512, 256, 512], "image size 512 is given twice; give each size once"),
    ],
)
def test_what_is_no_list_of_sizes_is_refused(asked: str | list[int], message: str) -> None:
    with pytest.raises(FastVLMError, match=message):
        image_sizes(asked)


def test_the_trained_size_is_always_supported() -> None:
    for size in (*IMAGE_SIZES, 64):
        check_image_size(size, 64, "tiny")
    for size in (64, 100, 1600, 0, -128):
        with pytest.raises(FastVLMError, match=rf"image size {size} is not supported; choose 128 .* \(large was trained at 1024\)"):
            check_image_size(size, 1024, "large")
