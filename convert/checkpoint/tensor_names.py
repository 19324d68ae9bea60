"""Names and shapes of a checkpoint: each layout's tensor names become one canonical set, and the structure is read off the shapes.

Canonical names are `vision.<FastViTHD state dict>`, `projector.linear_{1,2}.*`, `llm.{embed_tokens,layers.N,norm}.*` and `lm_head.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastvlm_edge.convert.checkpoint.configs import Settings
from fastvlm_edge.convert.checkpoint.shards import weight_files
from fastvlm_edge.convert.reference.fastvithd import FastViTHD, FastViTHDConfig
from fastvlm_edge.errors import FastVLMError

Shapes = Mapping[str, tuple[int, ...]]

APPLE_PARTS = (
    ("model.vision_tower.vision_tower.model.", "vision."),
    ("model.mm_projector.0.", "projector.linear_1."),
    ("model.mm_projector.2.", "projector.linear_2."),
    ("lm_head.", "lm_head."),
    ("model.embed_tokens.", "llm.embed_tokens."),
    ("model.layers.", "llm.layers."),
    ("model.norm.", "llm.norm."),
)
NATIVE_PARTS = (
    ("model.vision_tower.timm_model.", "vision."),
    ("vision_tower.timm_model.", "vision."),
    ("model.multi_modal_projector.", "projector."),
    ("multi_modal_projector.", "projector."),
    ("lm_head.", "lm_head."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "llm."),
    ("language_model.model.", "llm."),
)
APPLE_TOP = {
    "patch_embed": "stem",
    "conv_exp": "final_conv",
    "network.0": "stages.0.blocks",
    "network.1": "stages.1.downsample",
    "network.2": "stages.1.blocks",
    "network.3": "stages.2.downsample",
    "network.4": "stages.2.blocks",
    "network.5": "stages.3.downsample",
    "network.6": "stages.3.pos_emb",
    "network.7": "stages.3.blocks",
    "network.8": "stages.4.downsample",
    "network.9": "stages.4.pos_emb",
    "network.10": "stages.4.blocks",
}
APPLE_INNER = {
    "convffn": "mlp",
    "lkb_reparam": "reparam_conv",
    "lkb_origin": "large_conv",
    "rbr_conv": "conv_kxk",
    "rbr_scale": "conv_scale",
    "rbr_skip": "identity",
    "reduce": "fc1",
    "expand": "fc2",
}
LAYER_SCALE = re.compile(r"(.*\.layer_scale(?:_[12])?)")
HARMLESS = re.compile(r".*(rotary_emb\.inv_freq|position_ids|image_newline)|vision\.head\..*")
"""Buffers that follow from the config, LLaVA's newline token that `flat` never uses, and the CLIP head."""
TRAIN_BRANCHES = re.compile(r"vision\..*\.(conv_kxk|conv_scale|identity|large_conv|small_conv|mixer|pe)\..*")
OPTIONAL = re.compile(r"vision\.(.*\.num_batches_tracked|stem\.[01]\.conv_scale\..*)")
"""A counter that inference never reads, and the branch that FastViTHD's stem was trained without."""


@dataclass(frozen=True)
class TextConfig:
    """Structure of the Qwen2 decoder. `vocab` counts the rows of the embedding, padding rows included."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rope_theta: float
    rms_norm_eps: float
    max_positions: int
    attention_bias: bool
    """Whether q, k and v have biases (they do in every Qwen2)."""
    tied: bool
    """Whether the head is the embedding: it is absent, or bit-equal."""


def find_weights(directory: Path) -> list[Path]:
    """The safetensors files of a folder that looks like a checkpoint. Raises FastVLMError that says what the folder is instead."""
    weights = weight_files(directory)
    exported = any(directory.glob("*.mlpackage")) or any(directory.glob("*.mlmodelc")) or (directory / "weights.npz").is_file()
    if not weights and exported:
        raise FastVLMError(f"{directory} is an export for CoreML or MLX, not a checkpoint; give the checkpoint that it was made from")
    if not weights and ((directory / "adapter_config.json").is_file() or any(directory.glob("adapter_model.*"))):
        raise FastVLMError(f"{directory} holds a LoRA adapter only; merge it into its base model, save that, and give the result")
    if not weights and any(directory.glob("pytorch_model*.bin")):
        raise FastVLMError(
            f"{directory} has its weights in pytorch_model*.bin, which can run code when opened; convert it to safetensors "
            "first: load it with its own code and save_pretrained(..., safe_serialization=True)"
        )
    if not weights and (directory / "mm_projector.bin").is_file():
        raise FastVLMError(f"{directory} holds only a projector (mm_projector.bin); give the folder of a whole FastVLM checkpoint")
    if not (directory / "config.json").is_file():
        inner = sorted(path.parent for path in directory.glob("*/config.json"))
        zipped = sorted(directory.glob("*.zip"))
        hint = f"did you mean {inner[0]}?" if inner else f"unpack {zipped[0].name} first" if zipped else "check the path"
        raise FastVLMError(f"{directory} is no checkpoint: it has no config.json; {hint}")
    if not weights:
        raise FastVLMError(f"{directory} has a config.json but no safetensors file; download the whole checkpoint again")
    return weights


def canonical_name(name: str, layout: str) -> str | None:
    """The canonical form of a stored name, None for one that belongs to no part of a FastVLM checkpoint."""
    for stored, canonical in NATIVE_PARTS if layout == "native" else APPLE_PARTS:
        if name.startswith(stored):
            rest = name[len(stored) :]
            if canonical == "vision.":
                rest = re.sub(r"\.pos_enc\.", ".pe.", rest) if layout == "native" else _apple_vision_name(rest)
            return canonical + rest
    return None


def _apple_vision_name(name: str) -> str:
    parts = name.split(".")
    depth = 2 if parts[0] == "network" else 1
    top = ".".join(parts[:depth])
    inner = [APPLE_INNER.get(part, part) for part in parts[depth:]]
    renamed = ".".join([APPLE_TOP.get(top, top), *inner])
    return f"{renamed}.gamma" if LAYER_SCALE.fullmatch(renamed) else renamed


def canonical_names(stored: Iterable[str], layout: str, where: str) -> dict[str, str]:
    """Canonical name -> stored name, harmless leftovers left out.

    Raises FastVLMError for names that belong to nothing, names that mean the same tensor, or a missing part of the model.
    """
    names: dict[str, str] = {}
    unknown = []
    for name in stored:
        canonical = canonical_name(name, layout)
        if HARMLESS.fullmatch(canonical or name):
            continue
        if canonical is None:
            unknown.append(name)
        elif canonical in names:
            raise FastVLMError(
                f"{where} holds the same tensor twice, as {names[canonical]} and as {name}; remove one, or download it again"
            )
        else:
            names[canonical] = name
    parts = {name.partition(".")[0] for name in names}
    if any(name.endswith(("lora_A.weight", "lora_B.weight")) for name in unknown):
        raise FastVLMError(f"{where} holds LoRA tensors ({listing(unknown)}); merge the adapter into its base model first")
    if any(name.endswith((".scales", ".weight_scale", ".weight_scale_inv", ".qweight")) for name in (*unknown, *names)):
        raise FastVLMError(f"{where} is a quantised export (it has scales beside the weights); start from the bfloat16 checkpoint")
    if "vision" not in parts:
        raise FastVLMError(
            f"{where} has no vision tower in its weights, only {listing(sorted(parts) or unknown)}; a FastVLM checkpoint "
            "holds the encoder, the projector and the language model (an MLX export does not)"
        )
    if "llm" not in parts:
        raise FastVLMError(
            f"{where} has no language model in its weights, only {listing(sorted(parts))}; give the whole FastVLM checkpoint"
        )
    if unknown:
        raise FastVLMError(f"{where} holds tensors that are no part of FastVLM: {listing(unknown)}")
    return names


def is_train_form(names: Iterable[str]) -> bool:
    """Whether the encoder still has its train-time branches."""
    return any(TRAIN_BRANCHES.fullmatch(name) for name in names)


def vision_structure(shapes: Shapes, where: str) -> FastViTHDConfig:
    """Depths and widths of the encoder. Raises FastVLMError when a tensor that tells them is missing or they fit no FastViTHD."""

    def rows(*candidates: str) -> int:
        name = next((f"vision.{name}" for name in candidates if f"vision.{name}" in shapes), None)
        if name is None or not shapes[name]:
            raise FastVLMError(f"{where} lacks tensor vision.{candidates[0]}; download the checkpoint again")
        return shapes[name][0]

    pattern = re.compile(r"vision\.stages\.(\d+)\.blocks\.(\d+)\..*")
    found = {(int(match[1]), int(match[2])) for match in map(pattern.fullmatch, shapes) if match}
    depths = tuple(sum(stage == index for stage, _ in found) for index in range(1 + max((stage for stage, _ in found), default=0)))
    first = [rows(f"stages.{stage}.blocks.0.mlp.fc1.weight") for stage in range(len(depths))]
    dims = tuple(rows(f"stages.{stage}.blocks.0.mlp.fc2.weight") for stage in range(len(depths)))
    ratios = {wide / dim for wide, dim in zip(first, dims, strict=True)}
    if len(ratios) != 1 or not ratios.copy().pop().is_integer():
        raise FastVLMError(f"{where} has an encoder whose MLPs widen {dims} to {tuple(first)}; one whole ratio in every stage is supported")
    try:
        return FastViTHDConfig(
            depths,
            dims,
            int(ratios.pop()),
            rows("final_conv.reparam_conv.weight", "final_conv.conv_kxk.0.conv.weight"),
            rows("final_conv.se.fc1.weight"),
        )
    except ValueError as error:
        raise FastVLMError(f"{where} has an encoder that is no FastViTHD: {error}") from None


def text_structure(shapes: Shapes, settings: Settings, where: str) -> TextConfig:
    """Sizes of the decoder; `tied` is left False, since that is a question of values.

    Raises FastVLMError when the head count of the config does not fit the q, k and v projections.
    """

    def shape(name: str) -> tuple[int, int]:
        found = shapes.get(name)
        if found is None or len(found) != 2:
            raise FastVLMError(f"{where} lacks tensor {name} with two dimensions (found {found}); download the checkpoint again")
        return found[0], found[1]

    layers = 1 + max((int(name.split(".")[2]) for name in shapes if re.match(r"llm\.layers\.\d+\.", name)), default=-1)
    vocab, hidden = shape("llm.embed_tokens.weight")
    (q_rows, _), (k_rows, _) = (shape(f"llm.layers.0.self_attn.{part}_proj.weight") for part in "qk")
    heads = settings.heads
    head_dim = settings.head_dim or hidden // max(heads, 1)
    kv_heads = k_rows // max(head_dim, 1)
    if heads * head_dim != q_rows or kv_heads * head_dim != k_rows or not kv_heads or heads % kv_heads:
        raise FastVLMError(
            f"{where} says {heads} attention heads of {head_dim}, but the q and k projections have {q_rows} and {k_rows} "
            "rows; correct num_attention_heads (and head_dim) in config.json"
        )
    if settings.claims.get("kv_heads", kv_heads) != kv_heads:
        raise FastVLMError(
            f"{where} says {settings.claims['kv_heads']} key-value heads, but {k_rows} rows of k at {head_dim} a head make "
            f"{kv_heads}; correct num_attention_heads and num_key_value_heads in config.json"
        )
    return TextConfig(
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        shape("llm.layers.0.mlp.gate_proj.weight")[0],
        vocab,
        settings.rope_theta,
        settings.rms_norm_eps,
        settings.max_positions,
        "llm.layers.0.self_attn.q_proj.bias" in shapes,
        tied=False,
    )


def expected_shapes(vision: FastViTHDConfig, text: TextConfig, *, train_form: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a checkpoint by canonical name, in the order of the data path; `lm_head.weight` last."""
    with torch.device("meta"):
        encoder = FastViTHD(vision, train_form=train_form)
    shapes = {f"vision.{name}": tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    for index, width in ((1, vision.out_dim), (2, text.hidden)):
        shapes |= {f"projector.linear_{index}.weight": (text.hidden, width), f"projector.linear_{index}.bias": (text.hidden,)}
    shapes["llm.embed_tokens.weight"] = (text.vocab, text.hidden)
    query, key = text.heads * text.head_dim, text.kv_heads * text.head_dim
    for index in range(text.layers):
        layer = f"llm.layers.{index}."
        shapes[f"{layer}input_layernorm.weight"] = (text.hidden,)
        for part, rows in (("q", query), ("k", key), ("v", key)):
            shapes[f"{layer}self_attn.{part}_proj.weight"] = (rows, text.hidden)
            if text.attention_bias:
                shapes[f"{layer}self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (text.hidden, query)
        shapes[f"{layer}post_attention_layernorm.weight"] = (text.hidden,)
        shapes |= {f"{layer}mlp.{part}_proj.weight": (text.intermediate, text.hidden) for part in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (text.hidden, text.intermediate)
    shapes["llm.norm.weight"] = (text.hidden,)
    shapes["lm_head.weight"] = (text.vocab, text.hidden)
    return shapes


def check_shapes(found: Shapes, expected: Shapes, stored: Mapping[str, str], where: str) -> None:
    """Raise FastVLMError that lists, by stored name where there is one, what is unknown, missing or of another shape.

    `lm_head.weight` may be missing here: whether it may is a question of tying.
    """
    unknown = [stored[name] for name in found if name not in expected]
    missing = [name for name in expected if name not in found and name != "lm_head.weight" and not OPTIONAL.fullmatch(name)]
    wrong = [
        f"{stored[name]} {list(shape)} instead of {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    problems = [
        f"{what}: {listing(names)}" for what, names in (("missing", missing), ("of the wrong shape", wrong), ("unknown", unknown)) if names
    ]
    if problems:
        raise FastVLMError(f"{where} does not hold the tensors of a FastVLM; {'; '.join(problems)}; download the checkpoint again")


def listing(names: Iterable[str], limit: int = 5) -> str:
    """Up to five names, then how many more."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
