"""Names and structure: what each layout's tensors are called, and what is read off their shapes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest

from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.convert.checkpoint.tensor_names import canonical_name, canonical_names
from fastvlm_edge.errors import FastVLMError
from tests.support.checkpoints import (
    SIZES,
    apple_config,
    native_config,
    native_rows,
    stored_name,
    stored_shapes,
    write_json,
    write_safetensors,
)

# sha256 of the sorted lines "name [shape]" of FastVLM-0.5B with an untied head, listed independently of this code:
# Apple's from a public dump of the released file, the native one from transformers' own module.
RELEASED = {
    "apple": (924, "f43b98d556ac09c49b321ccc262f607fbfbc520b0e2f3e928b45bb257a17de97"),
    "native": (923, "36613ace038a56ff9ffda3ca108b578945cae917d061765787d50b0ba65d406a"),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
PARAMETERS = {
    "0.5b": {"vision": 122_714_208, "projector": 3_557_120, "llm": 357_898_112, "embedding": 136_134_656},
    "1.5b": {"vision": 122_714_208, "projector": 7_080_960, "llm": 1_310_340_608, "embedding": 233_373_696},
    "7b": {"vision": 122_714_208, "projector": 23_862_272, "llm": 6_525_621_760, "embedding": 544_997_376},
}
NATIVE_EMBEDDING = {"0.5b": 136_192_000, "1.5b": 233_472_000, "7b": 545_226_752}


def write_hollow(directory: Path, size: str, layout: str) -> Path:
    """A checkpoint of real shapes whose data is a hole in the file; the head is left out, so that nothing is compared."""
    spec = SIZES[size]
    text = spec.text(native_rows(spec.rows) if layout == "native" else spec.rows, tied=True)
    shapes = {name: shape for name, shape in stored_shapes(spec.vision, text, layout).items() if name != "lm_head.weight"}
    directory.mkdir()
    write_safetensors(directory, shapes, None, layout=layout)
    config = native_config(spec, text, 1024, "bfloat16") if layout == "native" else apple_config(spec, text, 1024, "bfloat16", hub=False)
    write_json(directory / "config.json", config)
    return directory


@pytest.mark.parametrize("layout", ["apple", "native"])
def test_test_checkpoints_have_exactly_the_released_names_and_shapes(layout: str) -> None:
    spec = SIZES["0.5b"]
    text = spec.text(native_rows(spec.rows) if layout == "native" else spec.rows, tied=False)
    lines = sorted(f"{stored_name(name, layout)} {list(shape)}" for name, shape in stored_shapes(spec.vision, text, layout).items())
    digest = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert (len(lines), digest) == RELEASED[layout]


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
@pytest.mark.parametrize("layout", ["apple", "native"])
def test_structure_of_the_real_sizes_comes_from_the_tensors(tmp_path: Path, size: str, layout: str) -> None:
    checkpoint = open_checkpoint(str(write_hollow(tmp_path / "model", size, layout)))
    counts = dict.fromkeys(PARAMETERS[size], 0)
    for name in checkpoint.names():
        if not name.endswith(BUFFERS):
            part = "embedding" if name == "llm.embed_tokens.weight" else name.partition(".")[0]
            counts[part] += math.prod(checkpoint.shape(name))
    expected = dict(PARAMETERS[size])
    if layout == "native":
        expected["embedding"] = NATIVE_EMBEDDING[size]
    assert counts == expected
    assert (checkpoint.vision.depths, checkpoint.vision.dims) == ((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536))
    assert (checkpoint.vision.out_dim, checkpoint.vision.se_dim, checkpoint.vision.mlp_ratio) == (3072, 192, 4)
    spec = SIZES[size]
    assert (checkpoint.text.layers, checkpoint.text.hidden, checkpoint.text.intermediate) == (spec.layers, spec.hidden, spec.intermediate)
    assert (checkpoint.text.heads, checkpoint.text.kv_heads, checkpoint.text.head_dim) == (spec.heads, spec.kv_heads, spec.head_dim)
    assert checkpoint.text.rope_theta == 1e6
    assert checkpoint.image_size == 1024
    assert checkpoint.notes == []


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("patch_embed.0.reparam_conv.weight", "stem.0.reparam_conv.weight"),
        ("network.0.1.layer_scale", "stages.0.blocks.1.layer_scale.gamma"),
        ("network.0.1.token_mixer.layer_scale", "stages.0.blocks.1.token_mixer.layer_scale.gamma"),
        ("network.1.proj.0.lkb_reparam.weight", "stages.1.downsample.proj.0.reparam_conv.weight"),
        ("network.3.proj.0.lkb_origin.conv.weight", "stages.2.downsample.proj.0.large_conv.conv.weight"),
        ("network.4.7.convffn.conv.bn.running_mean", "stages.2.blocks.7.mlp.conv.bn.running_mean"),
        ("network.6.reparam_conv.bias", "stages.3.pos_emb.reparam_conv.bias"),
        ("network.10.0.layer_scale_2", "stages.4.blocks.0.layer_scale_2.gamma"),
        ("conv_exp.se.reduce.weight", "final_conv.se.fc1.weight"),
        ("conv_exp.rbr_scale.bn.weight", "final_conv.conv_scale.bn.weight"),
        ("patch_embed.2.rbr_skip.running_var", "stem.2.identity.running_var"),
        ("network.2.0.token_mixer.mixer.rbr_conv.0.conv.weight", "stages.1.blocks.0.token_mixer.mixer.conv_kxk.0.conv.weight"),
    ],
)
def test_apple_vision_names_become_ours(stored: str, canonical: str) -> None:
    assert canonical_name(f"model.vision_tower.vision_tower.model.{stored}", "apple") == f"vision.{canonical}"


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("model.vision_tower.timm_model.stem.0.reparam_conv.weight", "vision.stem.0.reparam_conv.weight"),
        ("vision_tower.timm_model.stages.3.pos_emb.pos_enc.weight", "vision.stages.3.pos_emb.pe.weight"),
        ("multi_modal_projector.linear_1.bias", "projector.linear_1.bias"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "llm.layers.3.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "llm.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
    ],
)
def test_native_names_are_known_with_older_and_newer_prefixes(stored: str, canonical: str) -> None:
    assert canonical_name(stored, "native") == canonical


def test_harmless_leftovers_are_ignored() -> None:
    names = ["model.embed_tokens.weight", "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.weight"]
    leftovers = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.model.head.proj",
        "model.image_newline",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    ]
    assert list(canonical_names([*names, *leftovers], "apple", "x").values()) == names


def test_two_names_of_one_tensor_are_an_error() -> None:
    with pytest.raises(FastVLMError, match=r"twice, as model\.language_model\.norm\.weight and as language_model\.model\.norm\.weight"):
        canonical_names(["model.language_model.norm.weight", "language_model.model.norm.weight"], "native", "x")


WRAPPED = ("module.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "_orig_mod.{}", "_fsdp_wrapped_module.{}")


@pytest.mark.parametrize("form", WRAPPED)
def test_prefixes_of_wrappers_are_taken_off_and_said(form: str) -> None:
    names = ["model.embed_tokens.weight", "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.weight"]
    notes: list[str] = []
    wrapped = [form.format(name) for name in names]
    assert canonical_names(wrapped, "apple", "x", notes) == dict(zip(canonical_names(names, "apple", "x"), wrapped, strict=True))
    assert len(notes) == 1 and f"2 of 2 tensor names have the prefix of a wrapper: took it off, {wrapped[0]} is {names[0]}" in notes[0]


def test_wrappers_inside_names_are_taken_off_and_others_stay() -> None:
    names = ["model._orig_mod.embed_tokens.weight", "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.weight"]
    notes: list[str] = []
    assert list(canonical_names(names, "apple", "x", notes)) == ["llm.embed_tokens.weight", "vision.stem.0.reparam_conv.weight"]
    assert notes[0].startswith("1 of 2 tensor names")
    with pytest.raises(FastVLMError, match=r"names begin with 'module\.', which does not belong to FastVLM"):
        canonical_names(["module.model.norm.weight", names[1]], "apple", "x")  # only some: not what DataParallel does
    with pytest.raises(FastVLMError, match=r"twice, as model\.norm\.weight and as model\._orig_mod\.norm\.weight"):
        canonical_names(["model.norm.weight", "model._orig_mod.norm.weight"], "apple", "x")


def test_a_long_list_of_unknown_names_is_cut() -> None:
    names = ["model.embed_tokens.weight", "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.weight"]
    with pytest.raises(FastVLMError, match=r"do not belong to FastVLM: odd\.0, odd\.1, odd\.2, odd\.3, odd\.4 and 3 more"):
        canonical_names([*names, *(f"odd.{number}" for number in range(8))], "apple", "x")


def test_older_native_prefixes_open(tmp_path: Path) -> None:
    directory = write_hollow(tmp_path / "model", "tiny", "native")
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    renamed = {
        name.replace("model.language_model.", "language_model.model.").replace("model.vision_tower.", "vision_tower."): value
        for name, value in header.items()
    }
    encoded = json.dumps(renamed).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
    assert open_checkpoint(str(directory)).text.layers == 3
