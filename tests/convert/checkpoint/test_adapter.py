"""`convert --adapter`: the tensors are those of PEFT's own merge, every tensor of a fine-tune is used, and what does not fit is named."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm_edge.calib.quantizer import _weights_key
from fastvlm_edge.cli import main
from fastvlm_edge.convert.checkpoint import lora
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_edge.convert.checkpoint.tensor_names import EMBEDDING, HEAD, canonical_name
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import read_manifest, sha256
from tests.support.adapters import Tensors, merged, train
from tests.support.checkpoints import write_checkpoint, write_json

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about custom models and tied heads

LLM = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTOR = {"apple": ["mm_projector.0", "mm_projector.2"], "native": ["linear_1", "linear_2"]}
ENCODER = {
    "apple": ["patch_embed.0.reparam_conv", "network.7.0.token_mixer.qkv", "convffn.fc1", "se.expand"],
    "native": ["stem.0.reparam_conv", "stages.3.blocks.0.token_mixer.qkv", "mlp.fc1", "se.fc2"],
}
"""The 3x3 convolution of the stem, a linear layer, and convolutions of 1x1."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every layout, in float32 so that sums can be compared closely; do not write to them."""
    home = tmp_path_factory.mktemp("bases")
    return {layout: write_checkpoint(home / layout, layout=layout, dtype="float32") for layout in ("apple", "hub", "native", "mlx")}


def canonical(stored: str, layout: str) -> str:
    name = canonical_name(stored, layout)
    assert name is not None, stored
    return name


def compare(checkpoint: Checkpoint, expected: Tensors, layout: str, base: Path, tolerance: float = 2e-6) -> set[str]:
    """Every tensor is PEFT's within rounding; returns those that differ from the base model's, which are the only ones that may."""
    plain = open_checkpoint(str(base))
    changed = set()
    names = {canonical(stored, layout): stored for stored in expected}
    for name in checkpoint.names():
        found, reference = checkpoint.tensor(name).astype(np.float32), expected[names[name]].float().numpy()
        assert found.shape == checkpoint.shape(name)
        assert np.abs(found - reference).max() <= tolerance * np.abs(reference).max(), name
        if name not in plain.names() or not np.array_equal(found, plain.tensor(name).astype(np.float32)):
            changed.add(name)
    return changed


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("apple", {"r": 4, "lora_alpha": 16}),
        ("native", {"r": 4, "lora_alpha": 16, "use_rslora": True}),
        ("native", {"r": 4, "lora_alpha": 3, "lora_dropout": 0.1, "fan_in_fan_out": True, "init_lora_weights": "gaussian"}),
        ("apple", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"v_proj": 32, "fc1": 5}}),
        ("apple", {"r": 4, "bias": "all"}),
    ],
    ids=["plain", "rslora", "no effect", "patterns", "bias"],
)
def test_a_lora_on_llm_projector_and_encoder_is_merged_as_by_peft(
    bases: dict[str, Path], tmp_path: Path, layout: str, options: dict[str, Any]
) -> None:
    model = train(bases[layout], target_modules=[*LLM, *PROJECTOR[layout], *ENCODER[layout]], **options)
    model.save_pretrained(str(tmp_path / "tune"))
    checkpoint = open_checkpoint(str(bases[layout]), adapter=str(tmp_path / "tune"))
    changed = compare(checkpoint, merged(model), layout, bases[layout])
    weights = {name for name in changed if name.endswith(".weight")}
    assert len([name for name in weights if name.startswith("llm.layers.")]) == 3 * 7
    assert {"projector.linear_1.weight", "projector.linear_2.weight", "vision.stem.0.reparam_conv.weight"} <= weights
    assert {"vision.stages.3.blocks.0.token_mixer.qkv.weight", "vision.stages.1.blocks.1.mlp.fc1.weight"} <= weights
    assert "vision.final_conv.se.fc2.weight" in weights and EMBEDDING not in weights
    assert (changed == weights) == (options.get("bias") != "all")
    assert checkpoint.notes == [] and checkpoint.text.tied


@pytest.mark.parametrize("naming", ["apple", "native"])
def test_an_adapter_of_either_naming_fits_every_layout(bases: dict[str, Path], tmp_path: Path, naming: str) -> None:
    model = train(bases[naming], r=4, target_modules=[*LLM, *PROJECTOR[naming], *ENCODER[naming]])
    model.save_pretrained(str(tmp_path / "tune"))
    same = open_checkpoint(str(bases[naming]), adapter=str(tmp_path / "tune"))
    others = [open_checkpoint(str(base), adapter=str(tmp_path / "tune")) for layout, base in bases.items() if layout != naming]
    for name in same.names():
        if name != EMBEDDING and not name.endswith("num_batches_tracked"):
            expected = same.tensor(name)
            assert all(np.array_equal(other.tensor(name), expected) for other in others), name


def test_dora_is_merged_as_by_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj", "linear_1", "stem.0.reparam_conv", "stages.3.blocks.0.token_mixer.qkv", "se.fc2"]
    model = train(bases["native"], r=4, use_dora=True, target_modules=targets)
    model.save_pretrained(str(tmp_path / "tune"))
    checkpoint = open_checkpoint(str(bases["native"]), adapter=str(tmp_path / "tune"))
    assert len(compare(checkpoint, merged(model), "native", bases["native"])) == 3 + 3 + 4
    name = "vision.stem.0.reparam_conv.weight"
    assert np.allclose(checkpoint.tensor_rows(name, 3, 7), checkpoint.tensor(name)[3:7], atol=1e-6)


def test_names_of_parts_and_of_wrappers(bases: dict[str, Path], tmp_path: Path) -> None:
    """A LoRA on the LLM alone, with the names that its class gives, or those that savers leave in."""
    model = train(bases["apple"], r=4, target_modules=LLM)
    model.save_pretrained(str(tmp_path / "tune"))
    name = "llm.layers.1.self_attn.v_proj.weight"
    expected = open_checkpoint(str(bases["apple"]), adapter=str(tmp_path / "tune")).tensor(name)
    path = tmp_path / "tune" / "adapter_model.safetensors"
    tensors = load_file(path)
    for old, new in (
        ("base_model.model.model.", "base_model.model."),
        ("base_model.model.model.", "model."),
        ("base_model.model.model.", "module.base_model.model.model."),
        ("base_model.model.model.", "base_model.model._orig_mod.model.language_model."),
        (".lora_A.weight", ".lora_A.default.weight"),
    ):
        save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, path)
        checkpoint = open_checkpoint(str(bases["native"]), adapter=str(tmp_path / "tune"))
        assert np.array_equal(checkpoint.tensor(name), expected), new


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"target_modules": r".*layers\.[02]\.self_attn\.[qv]_proj"}, 4),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}, 4),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, 1),
        ({"target_modules": LLM, "exclude_modules": ["mlp.gate_proj", "model.layers.0.mlp.up_proj"]}, 17),
        ({"target_modules": LLM, "exclude_modules": r".*mlp.*"}, 12),
    ],
)
def test_which_modules_are_meant_is_as_in_peft(bases: dict[str, Path], tmp_path: Path, options: dict[str, Any], count: int) -> None:
    model = train(bases["apple"], r=2, **options)
    model.save_pretrained(str(tmp_path / "tune"))
    checkpoint = open_checkpoint(str(bases["apple"]), adapter=str(tmp_path / "tune"))
    assert len(compare(checkpoint, merged(model), "apple", bases["apple"])) == count


def test_a_bias_of_the_update(bases: dict[str, Path], tmp_path: Path) -> None:
    model = train(bases["native"], r=4, lora_bias=True, target_modules=["q_proj", "linear_1", "stem.2.reparam_conv"])
    model.save_pretrained(str(tmp_path / "tune"))
    checkpoint = open_checkpoint(str(bases["native"]), adapter=str(tmp_path / "tune"))
    changed = compare(checkpoint, merged(model), "native", bases["native"])
    assert {"llm.layers.0.self_attn.q_proj.bias", "projector.linear_1.bias", "vision.stem.2.reparam_conv.bias"} <= changed


@pytest.mark.parametrize(("dtype", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-10)])
def test_half_precision_is_as_close_as_its_rounding(tmp_path: Path, dtype: str, rounding: float) -> None:
    """PEFT rounds the sum to the type of the base model; here it stays in float32."""
    base = write_checkpoint(tmp_path / "base", layout="native", dtype=dtype)
    model = train(base, r=4, target_modules=["q_proj", "up_proj", "linear_1", "stem.0.reparam_conv"])
    model.save_pretrained(str(tmp_path / "tune"))
    checkpoint = open_checkpoint(str(base), adapter=str(tmp_path / "tune"))
    compare(checkpoint, merged(model), "native", base, tolerance=rounding)
    assert checkpoint.dtype("llm.layers.0.mlp.up_proj.weight") == np.float32
    assert checkpoint.dtype("llm.norm.weight").name == dtype


@pytest.mark.parametrize("untied", [True, False])
def test_the_embedding_and_the_head(tmp_path: Path, untied: bool) -> None:
    base = write_checkpoint(tmp_path / "base", dtype="float32", tied=not untied)
    model = train(base, r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])
    model.save_pretrained(str(tmp_path / "tune"))
    checkpoint = open_checkpoint(str(base), adapter=str(tmp_path / "tune"))
    changed = compare(checkpoint, merged(model), "apple", base)
    assert {EMBEDDING, HEAD} <= changed and not checkpoint.text.tied and checkpoint.head_name == HEAD
    for name in (EMBEDDING, HEAD):
        assert np.allclose(checkpoint.tensor_rows(name, 100, 107), checkpoint.tensor(name)[100:107], atol=1e-6)
    before = checkpoint.tensor(EMBEDDING)
    path = tmp_path / "tune" / "adapter_model.safetensors"
    stored = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(load_file(path) | {"base_model.model.model.embed_tokens.base_layer.weight": stored + 1}, path)  # as PEFT saves it with one
    again = open_checkpoint(str(base), adapter=str(tmp_path / "tune"))
    assert np.allclose(again.tensor(EMBEDDING), before + 1, atol=1e-6)


@pytest.mark.parametrize("layout", ["apple", "native"])
@pytest.mark.parametrize(("target", "other"), [("lm_head", EMBEDDING), ("embed_tokens", HEAD)])
def test_half_of_a_tied_pair_unties_it(bases: dict[str, Path], tmp_path: Path, layout: str, target: str, other: str) -> None:
    """Training changes what one of them computes, and the other computes as before; one table for both would be another model."""
    train(bases[layout], r=4, target_modules=[target]).save_pretrained(str(tmp_path / "tune"))
    checkpoint = open_checkpoint(str(bases[layout]), adapter=str(tmp_path / "tune"))
    plain = open_checkpoint(str(bases[layout]))
    assert plain.text.tied and not checkpoint.text.tied
    assert np.array_equal(checkpoint.tensor(other), plain.tensor(EMBEDDING))
    assert not np.array_equal(checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING))
    (note,) = checkpoint.notes
    assert f"the adapter changes {HEAD if other == EMBEDDING else EMBEDDING} and not {other}" in note


def test_modules_to_save_replace_those_of_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    model = train(
        bases["apple"], r=4, target_modules=["q_proj"], modules_to_save=["mm_projector.0", "mm_projector.2", "lm_head", "embed_tokens"]
    )
    model.save_pretrained(str(tmp_path / "tune"))
    checkpoint = open_checkpoint(str(bases["apple"]), adapter=str(tmp_path / "tune"))
    changed = compare(checkpoint, merged(model), "apple", bases["apple"])
    assert {"projector.linear_1.weight", "projector.linear_2.bias", HEAD, EMBEDDING} <= changed


@pytest.fixture
def llava(bases: dict[str, Path], tmp_path: Path) -> tuple[Path, Tensors]:
    """What LLaVA's trainer leaves: a LoRA on the LLM, and projector and encoder whole, with PEFT's prefix in their names."""
    model = train(bases["apple"], r=4, target_modules=LLM)
    directory = tmp_path / "llava-tune"
    model.save_pretrained(str(directory), safe_serialization=False)
    generator = torch.Generator().manual_seed(1)
    vision = "model.vision_tower.vision_tower.model."
    names = ["model.mm_projector.0.weight", "model.mm_projector.2.bias", f"{vision}network.0.0.layer_scale", f"{vision}head.proj"]
    stored = load_file(bases["apple"] / "model.safetensors")
    new = {name: torch.randn(stored[name].shape, generator=generator) for name in names}
    torch.save({f"base_model.model.{name}": tensor for name, tensor in new.items()}, directory / "non_lora_trainables.bin")
    (directory / "config.json").write_text((bases["apple"] / "config.json").read_text())
    (directory / "trainer_state.json").write_text("{}")
    return directory, merged(model) | new


def test_a_folder_of_llavas_trainer(bases: dict[str, Path], llava: tuple[Path, Tensors]) -> None:
    directory, expected = llava
    assert (directory / "adapter_model.bin").is_file()
    checkpoint = open_checkpoint(str(bases["apple"]), adapter=str(directory))
    changed = compare(checkpoint, expected, "apple", bases["apple"])
    assert {"projector.linear_1.weight", "projector.linear_2.bias", "vision.stages.0.blocks.0.layer_scale.gamma"} <= changed
    assert checkpoint.name == "apple+llava-tune"
    hashes = checkpoint.hash_files()
    assert {name for name in hashes if name.startswith("adapter/")} == {
        "adapter/adapter_config.json",
        "adapter/config.json",
        "adapter/adapter_model.bin",
        "adapter/non_lora_trainables.bin",
    }
    assert hashes["adapter/adapter_model.bin"] == sha256(directory / "adapter_model.bin")


def test_the_pictures_of_the_fine_tune_count(bases: dict[str, Path], llava: tuple[Path, Tensors]) -> None:
    """LLaVA's loader reads the config.json that its trainer wrote; that of a QLoRA has the quantisation of the training in it."""
    config = json.loads((llava[0] / "config.json").read_text())
    changes = {"mm_vision_tower": "mobileclip_l_512", "image_aspect_ratio": "square", "quantization_config": {"load_in_4bit": True}}
    write_json(llava[0] / "config.json", config | changes)
    checkpoint = open_checkpoint(str(bases["apple"]), adapter=str(llava[0]))
    assert (checkpoint.image_size, checkpoint.geometry) == (512, "crop")
    assert checkpoint.notes == [
        "the fine-tune has the image size 512, and the base model 256: used 512",
        "the fine-tune has the geometry crop, and the base model pad: used crop",
    ]


@pytest.mark.parametrize(
    ("name", "form"), [("non_lora_trainables.bin", "base_model.model.{}"), ("mm_projector.bin", "{}"), ("mm_projector.bin", "model.{}")]
)
@pytest.mark.parametrize("layout", ["apple", "native", "mlx"])
def test_a_projector_alone(bases: dict[str, Path], tmp_path: Path, layout: str, name: str, form: str) -> None:
    new = torch.randn(128, 512)
    torch.save({form.format("mm_projector.0.weight"): new}, tmp_path / name)
    checkpoint = open_checkpoint(str(bases[layout]), adapter=str(tmp_path))
    assert np.array_equal(checkpoint.tensor("projector.linear_1.weight"), new.numpy())
    assert checkpoint.adapter is not None and checkpoint.adapter.files == [tmp_path / name]


def test_biases_that_llava_saves_twice_may_agree(bases: dict[str, Path], tmp_path: Path) -> None:
    model = train(bases["apple"], r=4, bias="all", target_modules=["q_proj"])
    model.save_pretrained(str(tmp_path / "tune"))
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    bias = load_file(tmp_path / "tune" / "adapter_model.safetensors")[name]
    torch.save({name: bias}, tmp_path / "tune" / "non_lora_trainables.bin")
    open_checkpoint(str(bases["apple"]), adapter=str(tmp_path / "tune"))
    torch.save({name: bias + 1}, tmp_path / "tune" / "non_lora_trainables.bin")
    with pytest.raises(FastVLMError, match=r"contains model\.layers\.0\.self_attn\.q_proj\.bias twice, with different values"):
        open_checkpoint(str(bases["apple"]), adapter=str(tmp_path / "tune"))


def test_batch_norms_without_their_statistics_are_said(bases: dict[str, Path], tmp_path: Path) -> None:
    name = "model.vision_tower.vision_tower.model.network.0.0.convffn.conv.bn.weight"
    torch.save({name: torch.ones(16)}, tmp_path / "non_lora_trainables.bin")
    (note,) = open_checkpoint(str(bases["apple"]), adapter=str(tmp_path)).notes
    assert "trained batch norms of the encoder, but has not saved their means and variances" in note


class Tune:
    """A small adapter that a test may damage."""

    def __init__(self, directory: Path, base: Path) -> None:
        self.directory, self.base = directory, base
        self.config, self.weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"

    def set(self, **changes: Any) -> None:
        write_json(self.config, json.loads(self.config.read_text()) | changes)

    def edit(self, change: Callable[[Tensors], Any]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights)

    def refuse(self, message: str) -> None:
        with pytest.raises(FastVLMError, match=message) as raised:
            open_checkpoint(str(self.base), adapter=str(self.directory))
        assert "\n" not in str(raised.value) and raised.value.mend


@pytest.fixture(scope="module")
def saved(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "tune"
    train(bases["apple"], r=4, target_modules=["q_proj", "v_proj", "mm_projector.0", "patch_embed.0.reparam_conv"]).save_pretrained(
        str(directory)
    )
    return directory


@pytest.fixture
def tune(saved: Path, bases: dict[str, Path], tmp_path: Path) -> Tune:
    return Tune(Path(shutil.copytree(saved, tmp_path / "tune")), bases["apple"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA"}, "is a ADALORA adapter, and only LORA is supported; merge it with PEFT"),
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"peft_type": None}, "has no peft_type: it is not PEFT's"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication, which is not supported"),
        ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"),
        ({"target_parameters": ["x"]}, "sets target_parameters"),
        ({"some_later_feature": {"x": 1}}, "sets some_later_feature"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', with which training changes the weights of the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"r": 8}, r"q_proj\.lora_A of .* is \[4, 128\], but its adapter_config\.json gives rank 8"),
        ({"rank_pattern": {"v_proj": 2}}, r"v_proj\.lora_A of .* is \[4, 128\], .* gives rank 2"),
        ({"r": 0}, "contains a value of the wrong kind"),
        ({"r": "many"}, "contains a value of the wrong kind"),
        ({"alpha_pattern": {"(": 2}}, "contains a value of the wrong kind"),
        ({"target_modules": "("}, "contains a value of the wrong kind"),
        ({"target_modules": ["v_proj"]}, r"changes \S+, but its adapter_config\.json does not name that module"),
        ({"target_modules": r".*layers\.0\..*"}, r"changes \S+, but its adapter_config\.json does not name that module"),
        (
            {"target_modules": ["q_proj", "v_proj", "o_proj", "mm_projector.0", "reparam_conv"]},
            r"has no update of model\.layers\.0\.self_attn\.o_proj",
        ),
        ({"use_dora": True}, r"has no \S+\.lora_magnitude_vector"),
    ],
)
def test_what_a_configuration_asks_for_and_is_not_supported(tune: Tune, changes: dict[str, Any], message: str) -> None:
    tune.set(**changes)
    tune.refuse(message)


QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(4, 127)}), r"q_proj\.lora_A \[4, 127\] instead of \[4, 128\]"),
        (lambda t: t.update({f"{QUERY}.lora_B.weight": torch.ones(64, 4)}), r"q_proj\.lora_B \[64, 4\] instead of \[128, 4\]"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.tensor(1.0)}), r"q_proj\.lora_A of .* is \[\], but"),
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), r"has no model\.layers\.1\.self_attn\.q_proj\.lora_B"),
        (
            lambda t: [t.pop(f"{QUERY}.lora_{part}.weight") for part in "AB"],
            r"has no update of model\.layers\.1\.self_attn\.q_proj, which its adapter_config\.json names",
        ),
        (lambda t: t.update({f"{QUERY}.lora_B.bias": torch.ones(127)}), r"lora_B\.bias \[127\] instead of \[128\]"),
        (lambda t: t.update({f"{QUERY}.lora_embedding_A": torch.ones(4, 4)}), "q_proj.lora_embedding_A, which is not supported there"),
        (lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(128)}), "lora_magnitude_vector, which is not supported there"),
        (
            lambda t: t.update({f"base_model.model.model.layers.3.self_attn.q_proj.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}),
            r"changes model\.layers\.3\.self_attn\.q_proj, which .* does not have; give the model that it was trained on",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.0.mlp.experts.weight": torch.ones(1)}),
            r"contains tensors that .* does not have: model\.layers\.0\.mlp\.experts\.weight",
        ),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(127)}), r"has llm\.norm\.weight \[127\] instead of \[128\]"),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(128, dtype=torch.int8)}),
            "of type I8, not values in float32",
        ),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(0)}), r"norm\.weight \[0\].*gathered weights"),
        (
            lambda t: t.update({f"base_model.model.{name}.weight": torch.ones(650, 128) for name in ("lm_head", "model.embed_tokens")}),
            r"has 650 rows for (llm\.embed_tokens|lm_head)\.weight instead of 640: the fine-tune added tokens, which is not supported",
        ),
        (lambda t: t.update({f"{QUERY}.lora_A.other.weight": torch.ones(4, 128)}), r"q_proj\.lora_A twice, with different values"),
        (lambda t: t.update({f"{QUERY}.lora_B.weight": torch.full((128, 4), float("nan"))}), ""),
    ],
)
def test_tensors_that_do_not_fit(tune: Tune, change: Callable[[Tensors], Any], message: str) -> None:
    tune.edit(change)
    if message:
        tune.refuse(message)
        return
    checkpoint = open_checkpoint(str(tune.base), adapter=str(tune.directory))
    with pytest.raises(
        FastVLMError, match=rf"llm\.layers\.1\.self_attn\.q_proj\.weight of {tune.base} with the adapter {tune.directory} contains nan"
    ):
        checkpoint.tensor("llm.layers.1.self_attn.q_proj.weight")


def test_a_convolution_in_groups_is_refused_as_by_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    model = train(bases["native"], r=16, target_modules=["stem.1.reparam_conv"])
    model.save_pretrained(str(tmp_path))
    Tune(tmp_path, bases["native"]).refuse(r"changes \S+stem\.1\.reparam_conv, a convolution in groups")
    with pytest.raises(NotImplementedError, match="groups"):
        merged(model)


def test_another_base_model_is_said(tune: Tune) -> None:
    tune.set(base_model_name_or_path=f"/somewhere/{tune.base.name}/")
    assert open_checkpoint(str(tune.base), adapter=str(tune.directory)).notes == []
    tune.set(base_model_name_or_path="apple/FastVLM-7B")
    (note,) = open_checkpoint(str(tune.base), adapter=str(tune.directory)).notes
    assert note == f"the adapter was trained on 'apple/FastVLM-7B': merged it into {tune.base}"


def test_tokens_that_the_base_model_lacks(tune: Tune) -> None:
    config = json.loads((tune.base / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["515"] = {"content": "<image>"}
    config["added_tokens_decoder"]["516"] = {"content": "<part>"}
    write_json(tune.directory / "tokenizer_config.json", config)
    (note,) = open_checkpoint(str(tune.base), adapter=str(tune.directory)).notes
    assert "has tokens that the one of" in note and "(<part>): used the base model's tokenizer" in note
    tune.edit(lambda t: t.update({f"base_model.model.{name}.weight": torch.ones(640, 128) for name in ("lm_head", "model.embed_tokens")}))
    tune.refuse(r"lacks \(<part>\), and the adapter trained the embedding, which is not supported")


def test_a_replaced_embedding_of_a_tied_model_outside_of_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    torch.save({"model.embed_tokens.weight": torch.ones(640, 128)}, tmp_path / "non_lora_trainables.bin")
    Tune(tmp_path, bases["apple"]).refuse(r"replaces llm\.embed_tokens\.weight, which .* ties to lm_head\.weight, and does not say")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a fine-tune: it has neither adapter_model.safetensors nor .*; check the path"),
        ({"model.safetensors": b""}, "is not a fine-tune: .*; if it is a whole checkpoint, convert it without --adapter"),
        ({"checkpoint-9/adapter_config.json": b"{}"}, "is not a fine-tune: .*; try .*checkpoint-9"),
        ({"adapter_config.json": b"{}"}, "describes an adapter, but there is no adapter_model.safetensors or adapter_model.bin"),
        ({"adapter_model.bin": b""}, "has adapter_model.bin, but no adapter_config.json"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"", "adapter_model.safetensors": b""}, "has two adapters"),
        ({"non_lora_trainables.bin": b"", "model.safetensors": b""}, r"has whole weights \(model\.safetensors\) beside an adapter"),
    ],
)
def test_directories_that_are_not_fine_tunes(bases: dict[str, Path], tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    Tune(tmp_path, bases["apple"]).refuse(message)


def test_a_fine_tune_in_the_place_of_the_checkpoint_says_how(llava: tuple[Path, Tensors]) -> None:
    with pytest.raises(FastVLMError, match=r"contains only a fine-tune .*; give its base model, and this directory with --adapter"):
        open_checkpoint(str(llava[0]))


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_command_in_a_fine_tune_is_named_and_not_run(bases: dict[str, Path], llava: tuple[Path, Tensors], tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "non_lora_trainables.bin"):
        path = llava[0] / name
        whole = path.read_bytes()
        torch.save({"x": Malicious(tmp_path / "was_run")}, path)
        Tune(llava[0], bases["apple"]).refuse(rf"{name} asks for (posix|nt)\.system")
        path.write_bytes(whole)
    assert not (tmp_path / "was_run").exists()


def test_a_product_in_blocks_is_the_product(monkeypatch: pytest.MonkeyPatch, bases: dict[str, Path], saved: Path) -> None:
    checkpoint, name = open_checkpoint(str(bases["apple"]), adapter=str(saved)), "llm.layers.0.self_attn.q_proj.weight"
    whole = checkpoint.tensor(name)
    monkeypatch.setattr(lora, "BLOCK", 1000)  # 7 rows of 128
    assert np.allclose(checkpoint.tensor(name), whole, atol=1e-6)


def test_one_tensor_is_in_memory_at_a_time(bases: dict[str, Path], saved: Path) -> None:
    checkpoint = open_checkpoint(str(bases["apple"]), adapter=str(saved))
    sizes = [4 * int(np.prod(checkpoint.shape(name))) for name in checkpoint.names()]
    tracemalloc.start()
    try:
        for name in checkpoint.names():
            checkpoint.tensor(name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * max(sizes) < sum(sizes) / 2


def test_the_cache_of_calibration_knows_the_fine_tune(bases: dict[str, Path], tune: Tune) -> None:
    merged_key = _weights_key(open_checkpoint(str(bases["apple"]), adapter=str(tune.directory)))
    assert merged_key != _weights_key(open_checkpoint(str(bases["apple"])))
    os.utime(tune.weights, (0, 0))
    assert merged_key != _weights_key(open_checkpoint(str(bases["apple"]), adapter=str(tune.directory)))


def test_a_conversion_is_that_of_the_merged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, against the conversion of what PEFT merged and saved: the same weights within rounding, and the same notes."""
    base = write_checkpoint(tmp_path / "tiny", layout="native", dtype="float32")
    model = train(base, r=4, lora_alpha=16, target_modules=[*LLM, "linear_1", "mlp.fc1"])
    model.save_pretrained(str(tmp_path / "meters"))
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    save_file({name: tensor.contiguous() for name, tensor in merged(model).items()}, whole / "model.safetensors", {"format": "pt"})
    for arguments, name in (([str(base), "--adapter", str(tmp_path / "meters")], "a"), ([str(whole)], "b")):
        assert main(["convert", *arguments, "-o", str(tmp_path / name), "--precision", "fp32", "--context", "512"]) == 0
    manifest = read_manifest(tmp_path / "a")
    assert (manifest.name, manifest.source.checkpoint, manifest.source.adapter) == ("tiny+meters", str(base), str(tmp_path / "meters"))
    assert manifest.source.files["adapter/adapter_model.safetensors"] == sha256(tmp_path / "meters" / "adapter_model.safetensors")
    assert read_manifest(tmp_path / "b").source.adapter == ""
    for file in ("vision.weights", "decoder.weights"):
        a, b = (np.fromfile(tmp_path / name / file, np.float32) for name in "ab")
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    for file in ("vision.onnx", "decoder.onnx"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
