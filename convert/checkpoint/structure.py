"""The structure of a checkpoint, read off the shapes of its tensors, and the tensors that such a structure must have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fastvlm_edge.convert.checkpoint.configs import Settings
from fastvlm_edge.convert.checkpoint.tensor_names import listing
from fastvlm_edge.convert.fastvithd import FastViTHD, FastViTHDConfig
from fastvlm_edge.errors import FastVLMError

Shapes = Mapping[str, tuple[int, ...]]

NOT_WHOLE = "save the whole model again, or start from the checkpoint that it was made from"
AS_SAVED = "give a checkpoint as it was released or saved"
ATTENTION_BIAS = re.compile(r"llm\.layers\.\d+\.self_attn\.[qkv]_proj\.bias")
TRAIN_BRANCHES = re.compile(r"vision\..*\.(conv_kxk|conv_scale|identity|large_conv|small_conv|mixer|pe)\..*")
OPTIONAL = re.compile(r"vision\.(.*\.num_batches_tracked|stem\.[01]\.conv_scale\..*)")
"""Tensors that may be missing: a counter that inference never reads, and a branch that the released stem was trained without."""


@dataclass(frozen=True)
class TextConfig:
    """Structure of the Qwen2 decoder. `vocab` is the number of rows of the embedding, including padding rows."""

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
    tied: bool
    """Whether the head is the embedding: absent from the file, or bit-equal."""


def is_train_form(names: Iterable[str]) -> bool:
    """Whether the encoder still has its train-time branches."""
    return any(TRAIN_BRANCHES.fullmatch(name) for name in names)


def vision_structure(shapes: Shapes, where: str) -> FastViTHDConfig:
    """Depths and widths of the encoder. Raises FastVLMError if a tensor that tells them is missing, or if they do not fit FastViTHD."""

    def rows(*candidates: str) -> int:
        name = next((f"vision.{name}" for name in candidates if f"vision.{name}" in shapes), None)
        if name is None or not shapes[name]:
            raise FastVLMError(f"{where} lacks tensor vision.{candidates[0]}", NOT_WHOLE)
        return shapes[name][0]

    pattern = re.compile(r"vision\.stages\.(\d+)\.blocks\.(\d+)\..*")
    found = {(int(match[1]), int(match[2])) for match in map(pattern.fullmatch, shapes) if match}
    depths = tuple(sum(stage == index for stage, _ in found) for index in range(1 + max((stage for stage, _ in found), default=0)))
    first = [rows(f"stages.{stage}.blocks.0.mlp.fc1.weight") for stage in range(len(depths))]
    dims = tuple(rows(f"stages.{stage}.blocks.0.mlp.fc2.weight") for stage in range(len(depths)))
    ratios = {wide / dim for wide, dim in zip(first, dims, strict=True)}
    if len(ratios) != 1 or not ratios.copy().pop().is_integer():
        raise FastVLMError(
            f"the MLP expansion ratio of the encoder in {where} must be the same integer in every stage "
            f"(found {tuple(first)} hidden channels for {dims})",
            "give a checkpoint whose encoder is FastViTHD",
        )
    try:
        return FastViTHDConfig(
            depths,
            dims,
            int(ratios.pop()),
            rows("final_conv.reparam_conv.weight", "final_conv.conv_kxk.0.conv.weight"),
            rows("final_conv.se.fc1.weight"),
        )
    except ValueError as error:
        raise FastVLMError(f"the encoder in {where} is not a FastViTHD: {error}", "give a checkpoint whose encoder is FastViTHD") from None


def text_structure(shapes: Shapes, settings: Settings, where: str) -> TextConfig:
    """Sizes of the decoder. `tied` is left False here, because it depends on values.

    Raises FastVLMError if the head counts of config.json do not fit the q, k and v projections.
    """

    def shape(name: str) -> tuple[int, int]:
        found = shapes.get(name)
        if found is None or len(found) != 2:
            raise FastVLMError(f"{where} lacks a tensor {name} with two dimensions (found {found})", NOT_WHOLE)
        return found[0], found[1]

    layers = 1 + max((int(name.split(".")[2]) for name in shapes if re.match(r"llm\.layers\.\d+\.", name)), default=-1)
    vocab, hidden = shape("llm.embed_tokens.weight")
    (q_rows, _), (k_rows, _) = (shape(f"llm.layers.0.self_attn.{part}_proj.weight") for part in "qk")
    heads = settings.heads
    head_dim = settings.head_dim or hidden // max(heads, 1)
    kv_heads = k_rows // max(head_dim, 1)
    if heads * head_dim != q_rows or kv_heads * head_dim != k_rows or not kv_heads or heads % kv_heads:
        raise FastVLMError(
            f"config.json of {where} gives {heads} attention heads of size {head_dim}, "
            f"but the q and k projections have {q_rows} and {k_rows} rows",
            "correct num_attention_heads (and head_dim) in config.json",
        )
    if settings.claims.get("kv_heads", kv_heads) != kv_heads:
        raise FastVLMError(
            f"config.json of {where} gives {settings.claims['kv_heads']} key-value heads of size {head_dim}, "
            f"but the k projection has {k_rows} rows",
            "correct num_attention_heads and num_key_value_heads in config.json",
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
        tied=False,
    )


def expected_shapes(vision: FastViTHDConfig, text: TextConfig, *, train_form: bool) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of such a checkpoint, in the order of the data path; `lm_head.weight` comes last."""
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
            shapes[f"{layer}self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (text.hidden, query)
        shapes[f"{layer}post_attention_layernorm.weight"] = (text.hidden,)
        shapes |= {f"{layer}mlp.{part}_proj.weight": (text.intermediate, text.hidden) for part in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (text.hidden, text.intermediate)
    shapes["llm.norm.weight"] = (text.hidden,)
    shapes["lm_head.weight"] = (text.vocab, text.hidden)
    return shapes


def check_shapes(found: Shapes, expected: Shapes, stored: Mapping[str, str], where: str) -> None:
    """Raise FastVLMError that lists missing, unknown and misshapen tensors, by their stored names if they have one.

    `lm_head.weight` may be missing: whether the head is tied is checked later.
    """
    unknown = [stored[name] for name in found if name not in expected]
    missing = [name for name in expected if name not in found and name != "lm_head.weight" and not OPTIONAL.fullmatch(name)]
    wrong = [
        f"{stored[name]} {list(shape)} instead of {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    if missing and all(map(ATTENTION_BIAS.fullmatch, missing)) and not (wrong or unknown):
        raise FastVLMError(
            f"{where} has lost {len(missing)} biases of q, k and v, which every Qwen2 has ({listing(missing, 3)})",
            "merge or save it again with a model class that has these biases, such as transformers' Qwen2",
        )
    kinds = (("missing", missing), ("wrong shape", wrong), ("unknown", unknown))
    problems = [f"{kind}: {listing(names)}" for kind, names in kinds if names]
    if problems:
        raise FastVLMError(
            f"{where} does not have the tensors of a FastVLM ({'; '.join(problems)})", NOT_WHOLE if missing or wrong else AS_SAVED
        )
