"""Everything that can be wrong with a checkpoint is named in one line, with what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm_edge.convert.checkpoint.checkpoint import load_vision, open_checkpoint
from fastvlm_edge.errors import FastVLMError
from tests.support.checkpoints import write_checkpoint, write_json

Tensors = dict[str, torch.Tensor]
VISION = "model.vision_tower.vision_tower.model."


def refuse(directory: Path, message: str) -> None:
    """Opening fails with one line that matches and says what to do."""
    with pytest.raises(FastVLMError, match=message) as raised:
        open_checkpoint(str(directory))
    assert "\n" not in str(raised.value) and raised.value.mend


def edit_tensors(directory: Path, change: Callable[[Tensors], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture
def apple(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "apple", layout="apple")


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "native", layout="native")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
            r"contains only a fine-tune \(adapter_config\.json, adapter_model\.safetensors\); give its base model, and this",
        ),
        ({"config.json": "{}", "mm_projector.bin": ""}, "contains only a projector"),
        ({"config.json": "{}", "fastvithd.mlpackage": ""}, "export for CoreML, MLX or llama"),
        ({"config.json": "{}", "weights.npz": ""}, "export for CoreML, MLX or llama"),
        ({"config.json": "{}"}, r"has a config\.json but no weights"),
        ({"llava-fastvithd_0.5b_stage3.zip": ""}, r"config\.json is missing; unpack llava-fastvithd_0\.5b_stage3\.zip first"),
        ({"llava-fastvithd_0.5b_stage3/config.json": "{}"}, "config\\.json is missing; try .*llava-fastvithd_0.5b_stage3"),
        ({"notes.txt": ""}, r"is not a checkpoint: config\.json is missing; check the path"),
        ({"config.json": "{", "model.safetensors": ""}, r"config\.json is damaged"),
        ({"config.json": '{"model_type": "qwen2"}', "model.safetensors": ""}, "model_type 'qwen2', which is not a FastVLM"),
        (
            {"config.json": '{"model_type": "llava_qwen2"}', "model.safetensors": ""},
            "no mm_vision_tower: this is a language model without an encoder",
        ),
        (
            {"config.json": "{}", "a.safetensors": "", "b.safetensors": ""},
            r"2 files \*\.safetensors but no model\.safetensors\.index\.json",
        ),
    ],
)
def test_directories_that_are_not_checkpoints(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    refuse(tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear', which is not supported; give a checkpoint with 'mlp2x_gelu'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres': pictures that are cut into tiles"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad'"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rotary scaling of type 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
        (
            {"mm_vision_tower": "openai/clip-vit-large-patch14-336"},
            "not supported; give a checkpoint with FastViTHD, whose name ends in the image size, such as mobileclip_l_1024",
        ),
        ({"mm_vision_tower": "mobileclip_l_1000"}, "an image size of 1000 px, but FastViTHD takes multiples of 64"),
        ({"quantization_config": {"bits": 4}}, "is a quantised export; give the checkpoint that it was made from, and quantise it"),
        ({"num_attention_heads": 3}, "gives 3 attention heads of size 42, but the q and k projections have 128 and 64 rows"),
        ({"num_attention_heads": 2}, "gives 2 key-value heads of size 64, but the k projection has 64 rows"),
        ({"num_attention_heads": None}, "has no num_attention_heads, which the tensors cannot tell; add it"),
        ({"rms_norm_eps": "small"}, "value of the wrong type"),
    ],
)
def test_unsupported_settings_of_apple_are_named(apple: Path, changes: dict[str, Any], message: str) -> None:
    write_json(apple / "config.json", json.loads((apple / "config.json").read_text()) | changes)
    refuse(apple, message)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"architecture": "resnet50"}, "architecture 'resnet50'"),
        ("vision_config", {"model_args": {"lkc_use_act": False}}, r"model_args\.lkc_use_act to False"),
        ("text_config", {"model_type": "llama"}, "model_type 'llama'"),
        ("text_config", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ("", {"projector_hidden_act": "gelu_pytorch_tanh"}, "projector_hidden_act 'gelu_pytorch_tanh'"),
        ("", {"vision_config": None}, "has no vision_config"),
        ("", {"image_token_index": 704}, "image token 704, but the embedding has only 704 rows"),
    ],
)
def test_unsupported_settings_of_native_are_named(native: Path, part: str, changes: dict[str, Any], message: str) -> None:
    config = json.loads((native / "config.json").read_text())
    (config[part] if part else config).update(changes)
    write_json(native / "config.json", config)
    refuse(native, message)


def test_an_absent_head_that_is_not_tied(native: Path) -> None:
    config = json.loads((native / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    write_json(native / "config.json", config)
    refuse(native, r"lacks tensor lm_head\.weight.*not tied")


def test_unknown_missing_and_misshapen_tensors_are_named(apple: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(32)
        tensors[f"{VISION}patch_embed.1.reparam_conv.bias"] = torch.ones(15)

    edit_tensors(apple, change)
    refuse(
        apple,
        r"missing: llm\.layers\.1\.mlp\.up_proj\.weight; wrong shape: model\.vision_tower.*patch_embed\.1\.reparam_conv\."
        r"bias \[15\] instead of \[16\]; unknown: model\.layers\.1\.self_attn\.q_norm\.weight",
    )


def test_a_language_model_without_the_encoder(apple: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(VISION)]:
            del tensors[name]

    edit_tensors(apple, remove)
    refuse(apple, "contains no vision tower, only llm, lm_head, projector")


def test_an_encoder_without_the_language_model(apple: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".vision_tower." not in name]:
            del tensors[name]

    edit_tensors(apple, remove)
    refuse(apple, "contains no language model, only vision")


def test_an_encoder_of_another_structure(apple: Path) -> None:
    def drop_last_stage(tensors: Tensors) -> None:
        for name in list(tensors):
            if ".network.10." in name:
                del tensors[name]

    edit_tensors(apple, drop_last_stage)
    refuse(apple, "is not a FastViTHD: FastViTHD has five stages")


def test_an_unmerged_adapter(apple: Path) -> None:
    edit_tensors(apple, lambda tensors: tensors.update({"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)}))
    refuse(apple, r"an adapter that is not merged.*\(base_model\.model\.layers\.0\.q_proj\.lora_A\.weight\); save the adapter alone")


@pytest.mark.parametrize(
    "suffix", ["base_layer.weight", "lora_A.default.weight", "lora_magnitude_vector.default", "modules_to_save.default.weight"]
)
def test_tensors_of_peft_between_known_names(apple: Path, suffix: str) -> None:
    edit_tensors(apple, lambda tensors: tensors.update({f"model.layers.0.self_attn.q_proj.{suffix}": torch.ones(2, 2)}))
    refuse(apple, "an adapter that is not merged.*; save the adapter alone")


def test_tensors_that_zero_3_did_not_gather(apple: Path) -> None:
    def empty(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith((f"{VISION}network.0.", "model.layers.1.")):
                tensors[name] = torch.empty(0)

    edit_tensors(apple, empty)
    refuse(apple, r"tensors without values \(model\.layers\.1\.\S+ \[0\], .*and \d+ more\), as DeepSpeed ZeRO-3 .*; gather")


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_lost_biases_of_attention(apple: Path, layers: tuple[int, ...]) -> None:
    def remove(tensors: Tensors) -> None:
        for name in [f"model.layers.{layer}.self_attn.{part}_proj.bias" for layer in layers for part in "qkv"]:
            del tensors[name]

    edit_tensors(apple, remove)
    refuse(apple, rf"has lost {3 * len(layers)} biases of q, k and v.*; merge or save it again with a model class that has")


def test_missing_layers_at_the_end(apple: Path) -> None:
    """Their absence shows only in config.json: with two layers instead of three, the model is whole in itself."""

    def remove(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    edit_tensors(apple, remove)
    refuse(apple, "gives 3 for num_hidden_layers, but the tensors have 2: part of the model is missing")


@pytest.mark.parametrize(
    ("key", "value", "actual"),
    [("num_hidden_layers", 2, 3), ("intermediate_size", 353, 352), ("hidden_size", 64, 128), ("mm_hidden_size", 3072, 512)],
)
def test_sizes_that_contradict_the_tensors(apple: Path, key: str, value: int, actual: int) -> None:
    write_json(apple / "config.json", json.loads((apple / "config.json").read_text()) | {key: value})
    refuse(apple, f"gives {value} for .*, but the tensors have {actual}.*correct config.json")


def test_missing_blocks_of_the_encoder(native: Path) -> None:
    def remove(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".stages.2.blocks.1." in name]:
            del tensors[name]

    edit_tensors(native, remove)
    refuse(native, r"has \(1, 2, 1, 1, 1\) blocks .* but its config\.json means \(1, 2, 2, 1, 1\) blocks")


def test_names_behind_a_prefix_that_is_not_certain(apple: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"base_model.model.{name}"] = tensors.pop(name)

    edit_tensors(apple, rename)
    refuse(apple, "names begin with 'base_model.model.', which does not belong to FastVLM")


def test_the_config_of_the_other_layout(apple: Path, native: Path) -> None:
    (apple / "config.json").write_text((native / "config.json").read_text())
    refuse(apple, "has tensors with the names of Apple's layout.*but config.json is that of transformers' layout")


def test_a_crop_that_is_not_square(native: Path) -> None:
    path = native / "preprocessor_config.json"
    write_json(path, json.loads(path.read_text()) | {"crop_size": {"height": 256, "width": 320}})
    refuse(native, "crops pictures to 256 x 320 px, which is not a square")


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": [0.2, 0.2, 0.2]},
        {"image_mean": 0.5},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_an_image_processor_with_other_pixels(native: Path, change: dict[str, Any]) -> None:
    path = native / "preprocessor_config.json"
    write_json(path, json.loads(path.read_text()) | change)
    refuse(native, rf"preprocessor_config\.json has {next(iter(change))} .*, but FastVLM takes pixels in 0\.\.1; if the model was trained")


def test_no_remedy_is_a_download_if_nothing_was_damaged(apple: Path) -> None:
    """A second download gives the same files, so it is no remedy for weights that were saved or merged wrongly."""

    def remove(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    edit_tensors(apple, remove)
    with pytest.raises(FastVLMError) as raised:
        open_checkpoint(str(apple))
    assert raised.value.mend and "download" not in raised.value.mend


def test_quantised_tensors(apple: Path) -> None:
    edit_tensors(apple, lambda tensors: tensors.update({"model.norm.weight": torch.ones(128, dtype=torch.int8)}))
    refuse(apple, r"tensors of unsupported types: model\.norm\.weight \(I8\)")


def test_a_missing_shard(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    refuse(directory, r"model-00002-of-00003\.safetensors is missing \(1 of 3 shards")


def test_an_index_that_lies(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", shards=2)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    write_json(path, index)
    refuse(directory, r"lists tensor model\.extra in model-00001-of-00002\.safetensors, but it is not there")
    path.write_text('{"weight_map": 3}')
    refuse(directory, r"index\.json is damaged")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", shards=2)
    edited = directory / "model-00002-of-00002.safetensors"
    first = next(iter(load_file(directory / "model-00001-of-00002.safetensors").items()))
    save_file(load_file(edited) | {first[0]: first[1]}, edited)
    refuse(directory, f"tensor {first[0]} appears in both model-00001")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (5, "is truncated or not a safetensors file: it has 5 bytes"),
        (1000, "is truncated or not a safetensors file: it has 1000 bytes"),
        (-1, "is truncated: .* but tensor .* ends at byte"),
    ],
)
def test_truncated_files(apple: Path, keep: int, message: str) -> None:
    path = apple / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(apple, message)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{}x", "header of .* is damaged"),
        ("[1]", "header of .* is damaged"),
        ('{"a": {"dtype": "F32"}}', "header of .* is damaged"),
        ('{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}', "header of .* is damaged"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', r"a \[1\] is stored at bytes -4 to 0"),
        ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}', r"a \[3\] F32 cannot have 4 bytes"),
        (
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            "tensor a appears twice in the header",
        ),
    ],
)
def test_damaged_headers(apple: Path, header: str, message: str) -> None:
    (apple / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    refuse(apple, message)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_git_lfs_pointers(apple: Path, name: str) -> None:
    (apple / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refuse(apple, f"{name} is a git-LFS pointer")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_named_with_their_place(tmp_path: Path, dtype: str, value: float) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype=dtype)

    def spoil(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][600, 5] = value
        tensors["model.embed_tokens.weight"][601, 1] = value
        tensors[f"{VISION}conv_exp.se.reduce.bias"][3] = value

    edit_tensors(directory, spoil)
    checkpoint = open_checkpoint(str(directory))
    with pytest.raises(FastVLMError, match=rf"llm\.embed_tokens\.weight .* contains {value} at \[600, 5\]"):
        checkpoint.tensor("llm.embed_tokens.weight")
    with pytest.raises(FastVLMError, match=r"\[601, 1\]"):
        checkpoint.tensor_rows("llm.embed_tokens.weight", 601, 640)
    checkpoint.tensor_rows("llm.embed_tokens.weight", 0, 600)
    with pytest.raises(FastVLMError, match=r"vision\.final_conv\.se\.fc1\.bias .* at \[3\]"):
        load_vision(checkpoint)


def test_a_core_ml_export_beside_the_weights_does_no_harm(apple: Path) -> None:
    (apple / "fastvithd.mlpackage").mkdir()
    assert open_checkpoint(str(apple)).layout == "apple"


def test_a_file_that_goes_after_opening(apple: Path) -> None:
    checkpoint = open_checkpoint(str(apple))
    (apple / "model.safetensors").unlink()
    with pytest.raises(FastVLMError, match=r"model\.safetensors cannot be read"):
        checkpoint.tensor("llm.norm.weight")


def test_a_file_that_shrinks_after_opening(apple: Path) -> None:
    checkpoint = open_checkpoint(str(apple))
    path = apple / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(FastVLMError, match=r"ends inside tensor llm\.norm\.weight"):
        checkpoint.tensor("llm.norm.weight")
