"""The json files of a checkpoint: which layout it has, what it claims about itself, and whether this toolkit supports it.

The conversion takes from here only what the tensors cannot tell (head count, rotary base, image size, special ids). Widths are claims
that are checked against the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastvlm_edge.convert.checkpoint.files import read_json, read_optional_json
from fastvlm_edge.convert.checkpoint.image_processor import ImageProcessor, read_image_processor
from fastvlm_edge.convert.checkpoint.model_name import made_from
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import STRIDE

APPLE_TYPES = ("llava_qwen2", "fastvlm")
"""Values of model_type with Apple's flat config; the second is mlx-vlm's."""
IMAGE_TOKEN_ID = 151646
IMAGE_SEQ_LENGTH = 576
ROPE_THETA = 10_000.0
DEFAULTS: dict[str, float] = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
"""What transformers' Qwen2 takes for a key that is missing."""
Encoder = tuple[tuple[int, ...], tuple[int, ...]]
"""Blocks and channels of each stage."""
TIMM_ARCHITECTURES: dict[str, Encoder] = {
    "fastvit_mci3": ((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536)),
    "fastvit_mci4": ((2, 12, 24, 4, 4), (128, 256, 512, 1024, 2048)),
}
"""timm's FastViTHD, as Apple released it, and its larger sibling."""
UNUSED_GENERATION = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_new_tokens",
)
"""Keys of generation_config.json that change every answer, also a greedy one, and that the runtime does not use."""
NEUTRAL: tuple[Any, ...] = (None, 0, 1.0, [])
TIMM_ARGUMENTS = {
    "inference_mode",
    "layers",
    "embed_dims",
    "mlp_ratios",
    "cls_ratio",
    "num_classes",
    "global_pool",
    "in_chans",
    "drop_rate",
    "drop_path_rate",
    "proj_drop_rate",
    "layer_scale_init_value",
}
"""Arguments of timm's FastVit that a FastViTHD may set: widths, which the tensors tell as well, and options of training only.
All others (activation, mixers, kernel sizes, strides) change the computation."""


@dataclass(frozen=True)
class Settings:
    """What the json files say; None means that they do not say it. `claims` are sizes for which the tensors have the last word."""

    layout: str
    heads: int
    head_dim: int | None
    rope_theta: float
    rms_norm_eps: float
    max_positions: int
    tied: bool | None
    image_size: int
    geometry: str
    """How the checkpoint's own code makes a picture square: `pad` or `crop`."""
    image_token_id: int | None
    eos_ids: tuple[int, ...]
    claims: dict[str, int]
    encoder: Encoder | None
    notes: list[str] = field(default_factory=list)


def read_settings(directory: Path) -> Settings:
    """Read `config.json` and its companions.

    Raises FastVLMError for another kind of model, a missing or invalid value, or a feature that the released FastVLM does not use.
    """
    path = directory / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in (*APPLE_TYPES, "fast_vlm"):
        raise FastVLMError(
            f"{path} has model_type {kind!r}, which is not a FastVLM",
            "give a checkpoint of type llava_qwen2 (Apple's), fastvlm (of MLX) or fast_vlm (transformers')",
        )
    if config.get("quantization_config") or config.get("quantization"):
        raise quantised(directory)
    try:
        return _native(directory, config) if kind == "fast_vlm" else _apple(directory, config)
    except (TypeError, ValueError, AttributeError) as error:
        raise FastVLMError(f"{path} contains a value of the wrong type ({error})", "copy or download it again") from None


def quantised(directory: Path) -> FastVLMError:
    """The error for an export with quantised weights."""
    return FastVLMError(f"{directory} is a quantised export", f"give {made_from(directory)}, and quantise it with --precision")


def with_pictures_of(directory: Path, settings: Settings, notes: list[str]) -> Settings:
    """The settings of a base model with the image size and the geometry that a fine-tune of it was trained with, and a note if they differ.

    LLaVA's trainer saves them in a `config.json` beside the adapter, and its loader uses that file.
    """
    path = directory / "config.json"
    config = read_optional_json(path)
    if config.get("model_type") not in APPLE_TYPES:
        return settings
    tower = str(config.get("mm_vision_tower") or "")
    size = _tower_size(path, tower, notes) if tower else settings.image_size
    geometry = settings.geometry if config.get("image_aspect_ratio") is None else _geometry(path, config, settings.geometry, notes)
    for what, new, old in (("image size", size, settings.image_size), ("geometry", geometry, settings.geometry)):
        if new != old:
            notes.append(f"the fine-tune has the {what} {new}, and the base model {old}: used {new}")
    return replace(settings, image_size=size, geometry=geometry)


def _apple(directory: Path, config: Mapping[str, Any]) -> Settings:
    path = directory / "config.json"
    notes: list[str] = []
    tower = str(config.get("mm_vision_tower") or "")
    if not tower:
        raise FastVLMError(
            f"{path} has no mm_vision_tower: this is a language model without an encoder", "give the whole FastVLM checkpoint"
        )
    image_size = _tower_size(path, tower, notes)
    _require(path, config, "mm_projector_type", ("mlp2x_gelu",))
    _require(path, config, "mm_use_im_start_end", (False,))
    _require(path, config, "mm_patch_merge_type", ("flat",))
    processor = read_image_processor(directory)
    if processor is not None:
        unused = [*processor.pixels, *processor.geometry]
        if processor.crop not in (None, image_size):
            unused.append(f"a crop to {processor.crop} px")
        if unused:
            notes.append(f"{processor.path.name} has {', '.join(unused)}: ignored, as in Apple's code, which does not read that file")
    claims = {"mm_hidden_size": "out_dim", **TEXT_CLAIMS}
    return _settings(
        path,
        config,
        layout="hub" if "auto_map" in config else "apple",
        tied=config.get("tie_word_embeddings"),
        image_size=image_size,
        geometry=_geometry(path, config, "crop", notes),
        image_token_id=None,
        eos=(config,),
        claims={ours: config[key] for key, ours in claims.items() if config.get(key) is not None},
        encoder=None,
        notes=notes,
    )


def _tower_size(path: Path, tower: str, notes: list[str]) -> int:
    """Pixels on a side, from the name of the encoder: its last field, or the only one that can be a size (`mobileclip_l_1024_ft`).

    Raises FastVLMError for another encoder, and for a name without a size or with several.
    """
    fields = re.split(r"[_.-]", tower.rstrip("/").rpartition("/")[2])
    numbers = [int(part) for part in fields if part.isdecimal()]
    sizes = numbers if len(numbers) < 2 else [number for number in numbers if number >= STRIDE and number % STRIDE == 0]
    if "mobileclip" not in tower or len(sizes) != 1:
        raise FastVLMError(
            f"{path} has mm_vision_tower {tower!r}, which is not supported",
            "give a checkpoint with FastViTHD, whose name ends in the image size, such as mobileclip_l_1024",
        )
    if fields[-1] != str(sizes[0]):
        notes.append(f"mm_vision_tower is {tower!r}, which does not end in the image size: used {sizes[0]} px")
    return sizes[0]


def _geometry(path: Path, config: Mapping[str, Any], default: str, notes: list[str]) -> str:
    """`pad` or `crop`, from image_aspect_ratio. Apple's code pads for `pad` only, and crops for every other value and for none.

    Raises FastVLMError for pictures that are cut into tiles.
    """
    aspect = config.get("image_aspect_ratio")
    if aspect is None:
        if default == "crop":
            notes.append("there is no image_aspect_ratio: pictures are cropped, as by Apple's code (--geometry pad pads them)")
        return default
    if "anyres" in aspect or "highres" in aspect:
        raise FastVLMError(
            f"{path} has image_aspect_ratio {aspect!r}: pictures that are cut into tiles are not supported",
            "give a checkpoint that was trained with 'pad' or 'square'",
        )
    return "pad" if aspect == "pad" else "crop"


TEXT_CLAIMS = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "intermediate_size": "intermediate",
    "vocab_size": "vocab",
    "num_key_value_heads": "kv_heads",
}


def _native(directory: Path, config: Mapping[str, Any]) -> Settings:
    path = directory / "config.json"
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, dict):
        raise FastVLMError(f"{path} has no text_config", "copy or download it again")
    if not isinstance(vision, dict):
        raise FastVLMError(f"{path} has no vision_config: this is a language model without an encoder", "give the whole FastVLM checkpoint")
    _require(path, text, "model_type", ("qwen2",))
    _require(path, vision, "model_type", ("timm_wrapper",))
    _require(path, vision, "architecture", tuple(TIMM_ARCHITECTURES))
    arguments = vision.get("model_args") or {}
    for key in sorted(set(arguments) - TIMM_ARGUMENTS):
        raise FastVLMError(
            f"{path} sets vision_config.model_args.{key} to {arguments[key]!r}: that encoder is not a FastViTHD",
            "give a checkpoint whose encoder is FastViTHD",
        )
    _require(path, arguments, "in_chans", (3,))
    _require(path, config, "projector_hidden_act", ("gelu",))
    _require(path, config, "multimodal_projector_bias", (True,))
    _require(path, config, "vision_feature_layer", (-1,))
    _require(path, config, "vision_feature_select_strategy", ("full",))
    ties = [part["tie_word_embeddings"] for part in (config, text) if part.get("tie_word_embeddings") is not None]
    notes: list[str] = []
    token = config.get("image_token_index", config.get("image_token_id"))
    claims = {ours: text[key] for key, ours in TEXT_CLAIMS.items() if text.get(key) is not None}
    if vision.get("hidden_size") is not None:
        claims["out_dim"] = vision["hidden_size"]
    blocks, channels = TIMM_ARCHITECTURES[str(vision.get("architecture") or "fastvit_mci3")]
    return _settings(
        path,
        text,
        layout="native",
        tied=any(ties) if ties else None,
        image_size=_native_image_size(path, config, read_image_processor(directory), notes),
        geometry=_geometry(path, config, "pad", notes),
        image_token_id=IMAGE_TOKEN_ID if token is None else int(token),
        eos=(config, text),
        claims=claims,
        encoder=(tuple(arguments.get("layers") or blocks), tuple(arguments.get("embed_dims") or channels)),
        notes=notes,
    )


def _native_image_size(path: Path, config: Mapping[str, Any], processor: ImageProcessor | None, notes: list[str]) -> int:
    """Pixels on a side: the crop of the image processor, which decides how many image tokens a prompt gets, or from image_seq_length.

    Raises FastVLMError for an image processor that gives the encoder other values than pixels in 0..1.
    """
    length = int(config.get("image_seq_length", IMAGE_SEQ_LENGTH))
    from_length = math.isqrt(length) * STRIDE
    if processor is not None and processor.pixels:
        raise FastVLMError(
            f"{processor.path} has {', '.join(processor.pixels)}, but FastVLM takes pixels in 0..1",
            "if the model was trained with pixels in 0..1, as Apple's are, set image_mean to [0, 0, 0], image_std to [1, 1, 1] and "
            "rescale_factor to 1/255 there; with others it cannot be converted",
        )
    if processor is not None and processor.missing:
        notes.append(f"{processor.path.name} gives no {' and no '.join(processor.missing)}: FastVLM takes pixels in 0..1")
    if processor is not None and processor.geometry:
        notes.append(
            f"{processor.path.name} has {', '.join(processor.geometry)}: ignored, pictures are resized to the image size (bicubic)"
        )
    if processor is not None and processor.crop is not None:
        crop = processor.crop
        if "image_seq_length" in config and crop != from_length:
            notes.append(f"image_seq_length {length} means {from_length} px, but the image processor crops to {crop} px: used {crop} px")
        return crop
    if "image_seq_length" not in config:
        notes.append(f"there is neither an image size nor image_seq_length: used transformers' default, {from_length} px")
    elif math.isqrt(length) ** 2 != length:
        raise FastVLMError(f"{path} has image_seq_length {length}, which is not a square number", "correct it")
    return from_length


def _settings(
    path: Path,
    text: Mapping[str, Any],
    *,
    layout: str,
    tied: bool | None,
    image_size: int,
    geometry: str,
    image_token_id: int | None,
    eos: tuple[Mapping[str, Any], ...],
    claims: dict[str, int],
    encoder: Encoder | None,
    notes: list[str],
) -> Settings:
    """The settings that all layouts share. `text` holds the keys of Qwen2."""
    _require(path, text, "hidden_act", ("silu",))
    if text.get("use_sliding_window") or "sliding_attention" in (text.get("layer_types") or ()):
        raise FastVLMError(
            f"{path} turns on sliding window attention, which is not supported",
            "give a checkpoint without it; the released FastVLM does not use it",
        )
    if text.get("num_attention_heads") is None:
        raise FastVLMError(f"{path} has no num_attention_heads, which the tensors cannot tell", "add it")
    if image_size < STRIDE or image_size % STRIDE:
        raise FastVLMError(f"{path} gives an image size of {image_size} px, but FastViTHD takes multiples of {STRIDE}", "correct it")
    generation = read_optional_json(path.parent / "generation_config.json")
    unused = [f"{key} {generation[key]}" for key in UNUSED_GENERATION if generation.get(key) not in NEUTRAL]
    if unused:
        notes.append(f"generation_config.json has {', '.join(unused)}: not used")
    missing = {key: value for key, value in DEFAULTS.items() if text.get(key) is None}
    notes += [f"there is no {key}: used transformers' default, {value:g}" for key, value in missing.items()]
    if "layers" not in claims:
        notes.append("there is no num_hidden_layers, so whether layers are missing cannot be told: used those that are there")
    ids: list[int] = []
    for document in (*eos, generation):
        value = document.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return Settings(
        layout=layout,
        heads=int(text["num_attention_heads"]),
        head_dim=None if text.get("head_dim") is None else int(text["head_dim"]),
        rope_theta=_rope_theta(path, text, notes),
        rms_norm_eps=float({**text, **missing}["rms_norm_eps"]),
        max_positions=int({**text, **missing}["max_position_embeddings"]),
        tied=tied,
        image_size=image_size,
        geometry=geometry,
        image_token_id=image_token_id,
        eos_ids=tuple(sorted({int(value) for value in ids})),
        claims={key: int(value) for key, value in claims.items()},
        encoder=encoder,
        notes=notes,
    )


def _rope_theta(path: Path, text: Mapping[str, Any], notes: list[str]) -> float:
    """The rotary base: `rope_theta` before transformers 5, `rope_parameters` since. Raises FastVLMError for scaled variants."""
    rope = text.get("rope_parameters") or {}
    for block in (rope, text.get("rope_scaling") or {}):
        kind = block.get("rope_type", block.get("type", "default"))
        if kind != "default":
            raise FastVLMError(
                f"{path} has rotary scaling of type {kind!r}, which is not supported",
                "give a checkpoint without it; the released FastVLM does not use it",
            )
    theta = rope.get("rope_theta", text.get("rope_theta"))
    both = (rope.get("rope_theta"), text.get("rope_theta"))
    if None not in both and both[0] != both[1]:
        notes.append(f"rope_parameters give a rope_theta of {both[0]:g}, but there is another, {both[1]:g}: used {both[0]:g}")
    if theta is None:
        notes.append(f"there is no rope_theta: used transformers' default, {ROPE_THETA:g}")
    return float(ROPE_THETA if theta is None else theta)


def _require(path: Path, config: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    """Raise FastVLMError if `key` is given with a value that is not supported."""
    value = config.get(key)
    if value is not None and value not in allowed:
        expected = " or ".join(repr(item) for item in allowed)
        raise FastVLMError(f"{path} has {key} {value!r}, which is not supported", f"give a checkpoint with {expected}")
