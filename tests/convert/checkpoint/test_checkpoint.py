"""Reading a checkpoint: the layouts agree, tensors come lazily and right, the encoder equals an independent one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm_edge.convert.checkpoint.checkpoint import load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.checkpoint.structure import expected_shapes
from fastvlm_edge.convert.fastvithd import FastViTHD, image_tokens
from fastvlm_edge.errors import FastVLMError
from tests.support.checkpoints import SIZES, apple_config, native_config, native_rows, write_checkpoint, write_json, write_safetensors
from tests.support.timm_reference import import_timm, load_reference


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny checkpoint a layout, same size and seed; do not write to them."""
    base = tmp_path_factory.mktemp("checkpoints")
    return {layout: write_checkpoint(base / layout, layout=layout) for layout in ("apple", "hub", "native")}


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    write_json(path, json.loads(path.read_text()) | changes)


def picture(size: int) -> torch.Tensor:
    """Something with large and small structure, [1, 3, size, size] in 0..1."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=generator), size=(size, size), mode="bilinear")
    return (coarse + 0.1 * torch.rand(1, 3, size, size, generator=generator)).clamp(0, 1)


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def test_three_layouts_give_the_same_tensors(folders: dict[str, Path]) -> None:
    apple, hub, native = (open_checkpoint(str(folders[layout])) for layout in ("apple", "hub", "native"))
    assert [checkpoint.layout for checkpoint in (apple, hub, native)] == ["apple", "hub", "native"]
    assert apple.names() == hub.names() == native.names()
    assert apple.vision == native.vision
    for name in apple.names():
        ours = apple.tensor(name)
        assert np.array_equal(ours, hub.tensor(name)), name
        assert np.array_equal(ours, native.tensor(name)[: len(ours)] if name == "llm.embed_tokens.weight" else native.tensor(name)), name
    assert (apple.image_token_id, native.image_token_id) == (None, 515)
    assert native.text.vocab == native_rows(apple.text.vocab) == 704


def test_names_follow_the_data_path_and_types_are_the_stored_ones(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(folders["apple"]))
    names = checkpoint.names()
    assert names[0] == "vision.stem.0.reparam_conv.weight"
    places = [names.index(name) for name in ("projector.linear_1.weight", "llm.embed_tokens.weight", "llm.layers.2.mlp.up_proj.weight")]
    assert places == sorted(places)
    assert names[-1] == "llm.norm.weight"
    assert checkpoint.shape("llm.embed_tokens.weight") == (640, 128)
    assert checkpoint.dtype("llm.embed_tokens.weight") == ml_dtypes.bfloat16
    assert checkpoint.dtype("vision.stages.0.blocks.0.mlp.conv.bn.num_batches_tracked") == np.int64
    assert checkpoint.tensor("vision.stages.0.blocks.0.mlp.conv.bn.num_batches_tracked") == 1000
    assert checkpoint.tensor("vision.stages.0.blocks.0.layer_scale.gamma").shape == (16, 1, 1)


def test_tensors_equal_those_of_the_safetensors_library(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(folders["native"]))
    stored = load_file(folders["native"] / "model.safetensors")
    pairs = {
        "llm.layers.1.mlp.down_proj.weight": "model.language_model.layers.1.mlp.down_proj.weight",
        "vision.stages.4.pos_emb.reparam_conv.weight": "model.vision_tower.timm_model.stages.4.pos_emb.reparam_conv.weight",
    }
    for ours, theirs in pairs.items():
        assert np.array_equal(checkpoint.tensor(ours).astype(np.float32), stored[theirs].float().numpy())


def test_rows_are_slices_of_the_tensor(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(folders["apple"]))
    name = "llm.embed_tokens.weight"
    assert np.array_equal(checkpoint.tensor_rows(name, 100, 107), checkpoint.tensor(name)[100:107])
    with pytest.raises(IndexError):
        checkpoint.tensor_rows(name, 600, 641)


def test_shards_read_like_a_single_file(tmp_path: Path, folders: dict[str, Path]) -> None:
    sharded = open_checkpoint(str(write_checkpoint(tmp_path / "sharded", layout="apple", shards=3)))
    single = open_checkpoint(str(folders["apple"]))
    assert len(sharded.weights) == 3
    assert sharded.names() == single.names()
    assert all(np.array_equal(sharded.tensor(name), single.tensor(name)) for name in single.names())


@pytest.mark.parametrize(("dtype", "expected"), [("float32", np.float32), ("float16", np.float16)])
def test_other_float_types(tmp_path: Path, dtype: str, expected: type) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "model", layout="native", dtype=dtype)))
    assert checkpoint.tensor("llm.norm.weight").dtype == expected


def test_a_bit_equal_head_is_tied_and_another_is_not(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert "lm_head.weight" in load_file(folders["apple"] / "model.safetensors")
    tied = open_checkpoint(str(folders["apple"]))
    assert tied.text.tied and tied.head_name == "llm.embed_tokens.weight"
    assert open_checkpoint(str(folders["native"])).text.tied
    for layout in ("apple", "native"):
        untied = open_checkpoint(str(write_checkpoint(tmp_path / layout, layout=layout, tied=False)))
        assert not untied.text.tied and untied.head_name == "lm_head.weight"
        assert untied.names()[-1] == "lm_head.weight"
        assert not np.array_equal(untied.tensor("lm_head.weight"), untied.tensor("llm.embed_tokens.weight"))


def test_tensors_win_over_the_config_and_a_note_says_so(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="apple", tied=False)
    edit_config(directory, vocab_size=151936, tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(directory))
    assert (checkpoint.text.vocab, checkpoint.text.tied) == (640, False)
    assert len(checkpoint.notes) == 2
    assert any("gives 151936 for vocab, but the tensors have 640: used 640" in note for note in checkpoint.notes)
    assert any("lm_head.weight is different from the embedding" in note for note in checkpoint.notes)


def test_image_size_of_each_layout(tmp_path: Path) -> None:
    apple = write_checkpoint(tmp_path / "apple", layout="apple", image_size=512)
    assert open_checkpoint(str(apple)).image_size == 512
    native = write_checkpoint(tmp_path / "native", layout="native", image_size=384)
    assert open_checkpoint(str(native)).image_size == 384
    (native / "preprocessor_config.json").unlink()
    assert open_checkpoint(str(native)).image_size == 384
    write_json(native / "processor_config.json", {"image_processor": {"crop_size": {"height": 320, "width": 320}}})
    checkpoint = open_checkpoint(str(native))
    assert checkpoint.image_size == 320
    assert any("image_seq_length 36 means 384 px, but the image processor crops to 320 px" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("tower", "size"),
    [
        ("mobileclip_l_1024_ft", 1024),
        ("mobileclip_l_512_v2", 512),
        ("mobileclip_l_512_2", 512),
        ("/data/run_2048/mobileclip_l_384_ft/", 384),
        ("mobileclip-l-640.pt", 640),
    ],
)
def test_the_image_size_in_the_name_of_the_encoder(tmp_path: Path, tower: str, size: int) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="apple", image_size=size)
    edit_config(directory, mm_vision_tower=tower)
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.image_size == size
    assert checkpoint.notes == [f"mm_vision_tower is {tower!r}, which does not end in the image size: used {size} px"]


@pytest.mark.parametrize("tower", ["mobileclip_l", "mobileclip_l_512_1024", "mobileclip_l_ft"])
def test_a_name_without_one_image_size(tmp_path: Path, tower: str) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="apple")
    edit_config(directory, mm_vision_tower=tower)
    with pytest.raises(FastVLMError, match=f"mm_vision_tower '{tower}', which is not supported"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("layout", "aspect", "geometry", "notes"),
    [
        ("apple", "pad", "pad", 0),
        ("apple", "square", "crop", 0),
        ("hub", "square", "crop", 0),
        ("apple", None, "crop", 1),
        ("native", None, "pad", 0),
        ("native", "square", "crop", 0),
    ],
)
def test_geometry_is_that_of_the_config(tmp_path: Path, layout: str, aspect: str | None, geometry: str, notes: int) -> None:
    directory = write_checkpoint(tmp_path / "model", layout=layout)
    edit_config(directory, image_aspect_ratio=aspect)
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.geometry == geometry
    assert len(checkpoint.notes) == notes and all(
        "there is no image_aspect_ratio: pictures are cropped" in note for note in checkpoint.notes
    )


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"rope_theta": None}, "there is no rope_theta: used transformers' default, 10000"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters give a rope_theta of 500000, but there is another, 1e+06: used 500000"),
        ({"rms_norm_eps": None}, "there is no rms_norm_eps: used transformers' default, 1e-06"),
        ({"max_position_embeddings": None}, "there is no max_position_embeddings: used transformers' default, 32768"),
        (
            {"num_hidden_layers": None},
            "there is no num_hidden_layers, so whether layers are missing cannot be told: used those that are there",
        ),
    ],
)
def test_what_the_config_leaves_out_is_said(tmp_path: Path, changes: dict[str, Any], note: str) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="apple")
    edit_config(directory, **changes)
    assert open_checkpoint(str(directory)).notes == [note]


def test_an_image_processor_that_differs_is_said(tmp_path: Path) -> None:
    """Apple's code does not read its file; transformers does, but the pictures are still resized as FastVLM's."""
    for layout, extra in (("apple", ["image_mean [0.5, 0.5, 0.5]", "a crop to 320 px"]), ("native", [])):
        directory = write_checkpoint(tmp_path / layout, layout=layout)
        path = directory / "preprocessor_config.json"
        document = json.loads(path.read_text()) | {"resample": 2, "size": {"shortest_edge": 288}}
        write_json(path, document | ({"image_mean": [0.5] * 3, "crop_size": {"height": 320, "width": 320}} if extra else {}))
        (note,) = open_checkpoint(str(directory)).notes
        assert "preprocessor_config.json has " in note and "ignored" in note and "resample 2 instead of bicubic" in note
        assert "size 288 px before a crop to" in note and all(part in note for part in extra)


def test_an_image_processor_that_does_not_normalise_has_no_mean(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="native")
    path = directory / "preprocessor_config.json"
    write_json(path, json.loads(path.read_text()) | {"do_normalize": False, "image_mean": [0.5] * 3})
    assert open_checkpoint(str(directory)).notes == []
    document = json.loads(path.read_text()) | {"do_normalize": True}
    del document["image_mean"]
    write_json(path, document)
    assert open_checkpoint(str(directory)).notes == ["preprocessor_config.json gives no image_mean: FastVLM takes pixels in 0..1"]


def test_penalties_of_the_generation_config_are_said(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="apple")
    edit = json.loads((directory / "generation_config.json").read_text()) | {"repetition_penalty": 1.05, "no_repeat_ngram_size": 0}
    write_json(directory / "generation_config.json", edit)
    assert open_checkpoint(str(directory)).notes == ["generation_config.json has repetition_penalty 1.05: not used"]


def test_a_head_that_stands_for_the_embedding(tmp_path: Path, folders: dict[str, Path]) -> None:
    """safetensors keeps only one of two tensors that share their memory, and it may be the head."""
    directory = write_checkpoint(tmp_path / "model", layout="apple")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, path)
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.text.tied and len(checkpoint.notes) == 1 and "used it for both" in checkpoint.notes[0]
    name = "llm.embed_tokens.weight"
    assert np.array_equal(checkpoint.tensor(name), open_checkpoint(str(folders["apple"])).tensor(name))
    edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(FastVLMError, match=r"lacks a tensor llm\.embed_tokens\.weight"):
        open_checkpoint(str(directory))


def test_rope_base_of_transformers_4_and_5(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="apple")
    edit_config(directory, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0})
    assert open_checkpoint(str(directory)).text.rope_theta == 50_000.0


def test_stop_ids_are_gathered_from_both_configs(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="apple")
    edit_config(directory, eos_token_id=[7, 8])
    assert open_checkpoint(str(directory)).eos_ids == (7, 8, 512, 514)


def test_hashes_cover_weights_and_text_files_with_progress(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="apple", shards=2)
    (directory / "README.md").write_text("not read")
    checkpoint = open_checkpoint(str(directory))
    seen: list[tuple[int, int]] = []
    hashes = checkpoint.hash_files(lambda done, total: seen.append((done, total)))
    assert set(hashes) == {path.name for path in directory.iterdir()} - {"README.md"}
    assert all(hashlib.sha256((directory / name).read_bytes()).hexdigest() == value for name, value in hashes.items())
    assert seen[-1][0] == seen[-1][1] == sum((directory / name).stat().st_size for name in hashes)
    shutil.rmtree(directory)
    assert checkpoint.hash_files() == hashes  # kept, not read again


def test_transformers_loads_the_native_layout_and_its_features_are_ours(folders: dict[str, Path]) -> None:
    reference = load_reference(folders["native"])
    checkpoint = open_checkpoint(str(folders["native"]))
    encoder, projector = load_vision(checkpoint), load_projector(checkpoint)
    assert encoder.config == SIZES["tiny"].vision and not encoder.training
    with torch.no_grad():
        pixels = picture(256)
        ours = encoder(pixels)
        assert relative(ours, reference.model.vision_tower(pixels).last_hidden_state) <= 1e-4
        assert relative(projector(image_tokens(ours)), reference.get_image_features(pixels).pooler_output) <= 1e-4


def test_train_form_of_timm_is_merged(tmp_path: Path) -> None:
    spec = SIZES["tiny"]
    config = native_config(spec, spec.text(704, tied=True), 256, "float32")
    config["vision_config"]["model_args"]["inference_mode"] = False
    torch.manual_seed(0)
    timm_model = import_timm().create_model("fastvit_mci3", num_classes=0, **config["vision_config"]["model_args"]).eval()
    for name, tensor in timm_model.state_dict().items():
        if name.endswith("running_mean") or name.endswith("bn.bias"):
            tensor.normal_(0, 0.1)
        elif name.endswith(("running_var", "gamma")):
            tensor.uniform_(0.3, 1.0)
    directory = write_checkpoint(tmp_path / "model", layout="native", dtype="float32")
    tensors = {name: tensor for name, tensor in load_file(directory / "model.safetensors").items() if ".vision_tower." not in name}
    vision = {f"model.vision_tower.timm_model.{name}": tensor for name, tensor in timm_model.state_dict().items()}
    save_file(tensors | vision, directory / "model.safetensors")
    write_json(directory / "config.json", config)
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.train_form
    with torch.no_grad():
        assert relative(load_vision(checkpoint)(picture(128)), timm_model.forward_features(picture(128))) <= 1e-4


def test_train_form_with_apple_names_is_merged(tmp_path: Path) -> None:
    spec = SIZES["tiny"]
    text = spec.text(spec.rows, tied=True)
    torch.manual_seed(0)
    train = FastViTHD(spec.vision, train_form=True).eval()
    state = train.state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_var", "gamma")):
            tensor.uniform_(0.3, 1.0)
    shapes = expected_shapes(spec.vision, text, train_form=True)
    del shapes["lm_head.weight"]
    write_safetensors(
        tmp_path,
        shapes,
        lambda name: iter(
            [
                state[name[len("vision.") :]].numpy().reshape(-1)
                if name.startswith("vision.")
                else np.ones(shapes[name], np.float32).reshape(-1)
            ]
        ),
        layout="apple",
        dtype="float32",
    )
    write_json(tmp_path / "config.json", apple_config(spec, text, 256, "float32", hub=False))
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.vision_tower.vision_tower.model.network.0.0.token_mixer.mixer.rbr_conv.0.conv.weight" in stored
    assert "model.vision_tower.vision_tower.model.network.6.pe.weight" in stored
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.train_form
    with torch.no_grad():
        assert relative(load_vision(checkpoint)(picture(128)), train(picture(128))) <= 1e-4


@pytest.mark.slow
def test_real_width_features_are_those_of_timm(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", layout="native", size="0.5b")
    reference = load_reference(directory).model.vision_tower
    with torch.no_grad():
        expected = reference(picture(256)).last_hidden_state
        assert relative(load_vision(open_checkpoint(str(directory)))(picture(256)), expected) <= 1e-4
