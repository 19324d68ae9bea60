"""Conversions of FastVLM for MLX: the same tensors as the checkpoint that they were made from; exports that lack something are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm_edge.convert.checkpoint.checkpoint import load_vision, open_checkpoint
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.errors import FastVLMError
from tests.support.checkpoints import write_checkpoint, write_json

VISION = "vision_tower.vision_model."


def refuse(directory: Path, message: str) -> None:
    with pytest.raises(FastVLMError, match=message) as raised:
        open_checkpoint(str(directory))
    assert "\n" not in str(raised.value) and raised.value.mend


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.fixture
def mlx(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "FastVLM-0.5B-bf16", layout="mlx")


def test_names_and_shapes_are_those_that_mlx_vlm_writes(mlx: Path) -> None:
    """As its model's `sanitize` makes them of Apple's: prefixes, channels last, no counters, and no head where it is tied."""
    stored = load_file(mlx / "model.safetensors")
    shapes = {
        f"{VISION}patch_embed.blocks.0.reparam_conv.weight": (16, 3, 3, 3),
        f"{VISION}patch_embed.blocks.1.reparam_conv.weight": (16, 3, 3, 1),
        f"{VISION}network.0.0.layer_scale": (1, 1, 16),
        f"{VISION}network.1.proj.0.lkb_reparam.weight": (32, 7, 7, 1),
        f"{VISION}network.2.0.convffn.conv.conv.weight": (32, 7, 7, 1),
        f"{VISION}network.2.0.convffn.fc1.weight": (128, 1, 1, 32),
        f"{VISION}network.7.0.token_mixer.qkv.weight": (384, 128),
        f"{VISION}network.7.0.layer_scale_2": (1, 1, 128),
        f"{VISION}network.7.0.norm.weight": (128,),
        f"{VISION}conv_exp.se.reduce.weight": (32, 1, 1, 512),
        f"{VISION}head.proj": (512, 128),
        "mm_projector.0.weight": (128, 512),
        "mm_projector.2.bias": (128,),
        "language_model.model.embed_tokens.weight": (640, 128),
        "language_model.model.layers.0.self_attn.q_proj.bias": (128,),
        "language_model.model.norm.weight": (128,),
    }
    assert {name: tuple(stored[name].shape) for name in shapes} == shapes
    assert not any("num_batches_tracked" in name or "lm_head" in name for name in stored)


@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", True), ("float16", False), ("float32", True)])
def test_the_tensors_are_those_of_the_original(tmp_path: Path, dtype: str, tied: bool) -> None:
    apple = open_checkpoint(str(write_checkpoint(tmp_path / "apple", layout="apple", dtype=dtype, tied=tied)))
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "mlx", layout="mlx", dtype=dtype, tied=tied, shards=2)))
    assert checkpoint.layout == "mlx" and checkpoint.notes == [] and checkpoint.text == apple.text
    assert [name for name in apple.names() if not name.endswith("num_batches_tracked")] == list(checkpoint.names())
    for name in checkpoint.names():
        assert checkpoint.shape(name) == apple.shape(name)
        assert checkpoint.tensor(name).tobytes() == apple.tensor(name).tobytes(), name
        rows = (0, 0) if not checkpoint.shape(name) else (1, min(5, checkpoint.shape(name)[0]))
        assert checkpoint.tensor_rows(name, *rows).tobytes() == apple.tensor_rows(name, *rows).tobytes(), name
    with torch.no_grad():
        picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        assert torch.equal(load_vision(checkpoint)(picture), load_vision(apple)(picture))


def test_its_config_may_name_the_model_as_mlx_does(mlx: Path) -> None:
    edit(mlx, model_type="fastvlm", text_config={"model_type": "llava_qwen2"}, vision_config={})
    assert open_checkpoint(str(mlx)).layout == "mlx"


@pytest.mark.parametrize("layout", ["apple", "native"])
def test_metadata_of_mlx_alone_do_not_matter(tmp_path: Path, layout: str) -> None:
    directory = write_checkpoint(tmp_path / "model", layout=layout)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, {"format": "mlx"})
    assert open_checkpoint(str(directory)).layout == layout
    turned = {name: each.permute(0, 2, 3, 1).contiguous() if each.dim() == 4 else each for name, each in tensors.items()}
    save_file(turned, path, {"format": "mlx"})
    refuse(directory, r"wrong shape: .* \[512, 3, 3, 1\] instead of \[512, 1, 3, 3\]")


def test_convolutions_that_are_not_turned(mlx: Path) -> None:
    path = mlx / "model.safetensors"
    turned = {name: each.permute(0, 3, 1, 2).contiguous() if each.dim() == 4 else each for name, each in load_file(path).items()}
    save_file(turned, path)
    refuse(mlx, "wrong shape: ")


CARD = "---\nlicense: apple-amlr\nbase_model: apple/FastVLM-0.5B\ntags:\n- mlx\n---\n"
LISTED = "---\nlibrary_name: mlx\nbase_model:\n- 'someone/FastVLM-meters'\n---\n"


@pytest.mark.parametrize(
    ("card", "hidden", "named"),
    [
        (CARD, 896, r", apple/FastVLM-0\.5B, and quantise it with --precision"),
        (LISTED, 1536, ", someone/FastVLM-meters, and"),
        ("---\nbase_model: /home/me/checkpoints/fastvlm\n---", 1536, r", such as apple/FastVLM-1\.5B, and"),
        (None, 3584, ", such as apple/FastVLM-7B, and"),
        (None, 128, ", and quantise"),
    ],
)
@pytest.mark.parametrize("place", ["config", "tensors"])
def test_quantised_ones_are_refused_with_their_source(mlx: Path, card: str | None, hidden: int, named: str, place: str) -> None:
    if card is not None:
        (mlx / "README.md").write_text(card)
    edit(mlx, hidden_size=hidden, **({"quantization": {"group_size": 64, "bits": 4}} if place == "config" else {}))
    path = mlx / "model.safetensors"
    name = "language_model.model.layers.0.mlp.up_proj"
    packed = {f"{name}.weight": torch.zeros(352, 16, dtype=torch.uint32), f"{name}.scales": torch.ones(352, 2)}
    save_file(load_file(path) | packed | {f"{name}.biases": torch.ones(352, 2)}, path, {"format": "mlx"})
    refuse(mlx, f"is a quantised export; give the checkpoint that it was made from{named}")


def test_the_export_for_apples_app_is_refused_by_name(mlx: Path) -> None:
    """mlx-vlm with Apple's patch: the LLM and the projector, and the encoder as a CoreML package beside them."""
    path = mlx / "model.safetensors"
    tensors = {
        name.replace("mm_projector.", "multi_modal_projector.linear_"): tensor
        for name, tensor in load_file(path).items()
        if not name.startswith("vision_tower.")
    }
    save_file(tensors, path, {"format": "mlx"})
    (mlx / "fastvithd.mlpackage").mkdir()
    edit(mlx, hidden_size=896, image_token_index=151646)
    refuse(
        mlx,
        r"is an export for Apple's app: it holds the LLM only, and the encoder is a CoreML package, fastvithd\.mlpackage; "
        r"give the checkpoint that it was made from, such as apple/FastVLM-0\.5B",
    )


def same_model(tmp_path: Path, size: str) -> None:
    """The conversions of a checkpoint and of the same for MLX are the same files, but for the manifest and what follows from it."""
    for layout in ("hub", "mlx"):
        source = write_checkpoint(tmp_path / layout, layout=layout, size=size)
        convert(str(source), tmp_path / f"model-{layout}", precision="fp16", image_size=256, context=512)
        for path in source.glob("*.safetensors"):
            path.unlink()
    names = {path.name for path in (tmp_path / "model-hub").iterdir()} - {"fastvlm.json", "verified.json"}
    assert {"vision.weights", "decoder.weights", "vision.onnx", "decoder.onnx", "reference.npz", "tokenizer.json"} <= names
    for name in sorted(names):
        if name != "reference.npz":
            assert (tmp_path / "model-mlx" / name).read_bytes() == (tmp_path / "model-hub" / name).read_bytes(), name
    with np.load(tmp_path / "model-mlx" / "reference.npz") as ours, np.load(tmp_path / "model-hub" / "reference.npz") as theirs:
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs.files) and ours.files == theirs.files


def test_a_conversion_is_that_of_the_original(tmp_path: Path) -> None:
    same_model(tmp_path, "tiny")


@pytest.mark.slow
def test_a_conversion_at_0_5b_is_that_of_the_original(tmp_path: Path) -> None:
    same_model(tmp_path, "0.5b")
