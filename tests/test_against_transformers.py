"""The whole path against an independent implementation: transformers' `fast_vlm` with timm's encoder, both in FP32 on the same weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from fastvlm_edge import FastVLM
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.inputs.preprocess import preprocess
from tests.support.checkpoints import write_checkpoint
from tests.support.timm_reference import load_reference

STEPS = 24
PROMPT = "What does the meter read? Answer briefly."
PICTURES = {"square": skimage.data.astronaut, "wide": skimage.data.coffee, "tall": lambda: np.rot90(skimage.data.chelsea()).copy()}


def reference_reply(model: Any, tokenizer: Tokenizer, pixels: NDArray[np.float32]) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy ids of transformers, and its image features [tokens, hidden], for the prompt that FastVLM was trained with."""
    image_id = model.config.image_token_id
    text = (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{{}}\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )
    before, after = (tokenizer.encode(part, add_special_tokens=False).ids for part in text.split("{}"))
    with torch.inference_mode():
        features = model.model.get_image_features(torch.from_numpy(pixels))
        features = torch.as_tensor(getattr(features, "pooler_output", features)[0]).reshape(-1, model.config.text_config.hidden_size)
        ids = torch.tensor([before + [image_id] * len(features) + after])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(pixels),
            max_new_tokens=STEPS,
            do_sample=False,
        )
    return out[0, ids.shape[1] :].tolist(), features.numpy()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Path, Any]:
    directory = write_checkpoint(tmp_path_factory.mktemp("native") / "ck", layout="native", tied=request.param, image_size=256)
    return request.param, directory, load_reference(directory)


@pytest.fixture(scope="module", params=["apple", "native"])
def both(
    request: pytest.FixtureRequest, reference: tuple[bool, Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, FastVLM, Tokenizer]]:
    tied, native, model = reference
    source = native
    if request.param == "apple":
        source = write_checkpoint(tmp_path_factory.mktemp("apple") / "ck", layout="apple", tied=tied, image_size=256)
    output = tmp_path_factory.mktemp("model") / "model"
    convert(str(source), output, precision="fp32", context=512)
    with FastVLM.load(output, threads=2) as vlm:
        yield model, vlm, Tokenizer.from_file(str(output / "tokenizer.json"))


@pytest.mark.parametrize("shape", PICTURES)
def test_the_same_tokens_and_features(both: tuple[Any, FastVLM, Tokenizer], shape: str) -> None:
    model, vlm, tokenizer = both
    picture = PICTURES[shape]()
    expected, expected_features = reference_reply(model, tokenizer, preprocess(picture, 256, "pad"))
    features = vlm.encode_image(picture).numpy()
    assert np.abs(features - expected_features).max() / np.abs(expected_features).max() < 1e-4
    reply = vlm.generate(PROMPT, image=picture, max_new_tokens=STEPS)
    assert len(expected) == STEPS
    assert reply.token_ids == expected
    assert len(set(expected)) > 3, "the weights carry no signal: every token is the same"


@pytest.mark.parametrize("geometry", ["pad", "crop"])
@pytest.mark.parametrize("shape", PICTURES)
def test_preprocessing_is_that_of_the_reference(shape: str, geometry: str) -> None:
    """Apple pads to a black square and lets CLIP's processor do the rest; the hub's snippet uses the processor alone."""
    from transformers import CLIPImageProcessorPil

    picture = Image.fromarray(PICTURES[shape]())
    source = picture
    if geometry == "pad":
        side = max(picture.size)
        source = Image.new("RGB", (side, side))
        source.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 256, "width": 256}, image_mean=[0, 0, 0], image_std=[1, 1, 1], resample=3
    )
    expected = processor(source, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(preprocess(picture, 256, geometry), expected, atol=1e-6)
