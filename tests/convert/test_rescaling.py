"""Outlier channels are moved out of the inputs of products: exactly, and only where they are outliers on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, Factors, load_vision, open_checkpoint
from fastvlm_edge.convert.precision import PrecisionPlan, precision_plan
from fastvlm_edge.convert.reference.decoder import reference_logits
from fastvlm_edge.convert.rescaling import (
    LARGEST_MOVE,
    Channels,
    ChannelWatch,
    Moves,
    exponents_of,
    find_moves,
    move_in_encoder,
    watch_encoder,
)
from tests.support.checkpoints import write_checkpoint

IDS = [*range(40, 90)]
LAYER = "llm.layers.1"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", layout="native", tied=True)


def channels(largest: list[float], weights: list[float]) -> Channels:
    return Channels(torch.tensor(largest), torch.tensor(weights).square())


def test_only_channels_that_are_far_from_the_others_on_both_sides_move() -> None:
    inputs, weights = [1.0] * 20, [1.0] * 20
    assert not exponents_of(channels(inputs, weights)).any()
    inputs[2], weights[2] = 256.0, 1 / 256  # large inputs, small weights
    inputs[3], weights[3] = 1 / 64, 64.0  # the other way round
    inputs[4] = 500.0  # the weights need it
    weights[5] = 0.01
    inputs[6], weights[6] = 1000.0, 1 / 16  # as far as the weights allow
    inputs[7], weights[7] = 3.0, 1 / 300  # hardly larger than the others
    assert exponents_of(channels(inputs, weights)).tolist() == [0, 0, 8, -6, 0, 0, 4, 0] + [0] * 12


def test_a_channel_that_no_norm_bounds_never_grows() -> None:
    inputs, weights = [1.0] * 9, [1.0] * 9
    inputs[0], weights[0] = 256.0, 1 / 256
    inputs[1], weights[1] = 1 / 256, 256.0  # may be silent in the probe only
    assert exponents_of(channels(inputs, weights), bounded=False).tolist() == [8, 0, 0, 0, 0, 0, 0, 0, 0]


def test_moves_have_an_end() -> None:
    far = channels([2.0**40, 2.0**-40, *[1.0] * 9], [2.0**-40, 2.0**40, *[1.0] * 9])
    assert exponents_of(far).tolist() == [LARGEST_MOVE, -LARGEST_MOVE, *[0] * 9]


def test_unused_channels_do_not_move() -> None:
    assert not exponents_of(channels([0.0, 1.0, 1.0, 512.0], [512.0, 1.0, 1.0, 0.0])).any()
    assert not exponents_of(channels([0.0] * 4, [1.0] * 4)).any()


def moves_of(checkpoint: Checkpoint, plan: PrecisionPlan) -> tuple[Moves, np.ndarray[Any, Any]]:
    seen = ChannelWatch()
    logits, _ = reference_logits(checkpoint, IDS, np.zeros((1, checkpoint.text.hidden), np.float32), [len(IDS) - 1], lambda: None, seen)
    return find_moves(seen, checkpoint.text, plan), logits


def planted(source: Path, target: Path, factor: float) -> Checkpoint:
    """One channel of everything that can be moved, times `factor` or divided by it, in the layer."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    opened = open_checkpoint(str(source))
    text, stored = opened.text, load_file(source / "model.safetensors")
    tensors = {name: array.astype(np.float32) for name, array in stored.items()}
    names = {name.rpartition("layers.1.")[2]: name for name in tensors if "language_model" in name and "layers.1." in name}
    group, dim = text.heads // text.kv_heads, text.head_dim

    def rows(name: str, index: Any, by: float) -> None:
        tensors[names[name]][index] *= np.float32(by)

    def columns(name: str, index: Any, by: float) -> None:
        tensors[names[name]][:, index] *= np.float32(by)

    rows("input_layernorm.weight", 7, factor)
    for part in "qkv":
        columns(f"self_attn.{part}_proj.weight", 7, 1 / factor)
    rows("post_attention_layernorm.weight", 9, factor)
    for part in ("gate", "up"):
        columns(f"mlp.{part}_proj.weight", 9, 1 / factor)
    rows("mlp.up_proj.weight", 11, factor)
    columns("mlp.down_proj.weight", 11, 1 / factor)
    rows("self_attn.v_proj.weight", 3, factor)
    rows("self_attn.v_proj.bias", 3, factor)
    columns("self_attn.o_proj.weight", [head * dim + 3 for head in range(group)], 1 / factor)
    for kind in ("weight", "bias"):
        pair = [5, 5 + dim // 2]
        rows(f"self_attn.k_proj.{kind}", pair, 1e4)
        rows(f"self_attn.q_proj.{kind}", [head * dim + channel for head in range(group) for channel in pair], 1e-4)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(str(target))


@pytest.mark.parametrize("factor", [256.0, 300.0])
def test_planted_outliers_are_found_and_moved_back(plain: Path, tmp_path: Path, factor: float) -> None:
    original, checkpoint = open_checkpoint(str(plain)), planted(plain, tmp_path / "planted", factor)
    plan = precision_plan("int8")
    moves, before = moves_of(checkpoint, plan)
    assert moves.channels == {
        f"{LAYER}.qkv": [7],
        f"{LAYER}.gate_up": [9],
        f"{LAYER}.down": [11],
        f"{LAYER}.o_proj": [3],
        f"{LAYER}.keys": [5, 5 + checkpoint.text.head_dim // 2],
    }
    moved = checkpoint.rescaled(moves.factors)
    again, after = moves_of(moved, plan)
    assert not again.factors
    np.testing.assert_array_equal(after, before)  # powers of two round nothing
    for name in moves.factors:
        tensor, wanted = moved.tensor(name), original.tensor(name).astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            continue  # balanced: they need not be as they were
        ratios = np.log2(np.abs(tensor[wanted != 0] / wanted[wanted != 0]))
        assert np.abs(ratios).max() < 1.3, "what is left is less than the next power of two or so"
    queries, keys = (moved.tensor(f"{LAYER}.self_attn.{part}_proj.weight") for part in "qk")
    assert np.abs(keys).max() < 500 * np.abs(queries).max() < 1e6 * np.abs(keys).max()
    name = f"{LAYER}.self_attn.v_proj.weight"
    np.testing.assert_array_equal(moved.tensor_rows(name, 2, 6), moved.tensor(name)[2:6])


def test_a_tied_head_with_outliers_is_untied(plain: Path) -> None:
    checkpoint = open_checkpoint(str(plain))
    factors = np.ones(checkpoint.text.hidden, np.float32)
    factors[1] = 8
    untied = checkpoint.rescaled({"lm_head.weight": Factors(columns=factors)})
    with pytest.raises(ValueError, match="has factors already"):
        untied.rescaled({"lm_head.weight": Factors(columns=factors)})
    assert checkpoint.text.tied and checkpoint.head_name == "llm.embed_tokens.weight"
    assert not untied.text.tied and untied.head_name == "lm_head.weight"
    embedding = untied.tensor("llm.embed_tokens.weight").astype(np.float32)
    np.testing.assert_array_equal(untied.tensor_rows("lm_head.weight", 3, 9), embedding[3:9] * factors)


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16", "bf16", "fp32"])
def test_where_no_outliers_are_nothing_changes(plain: Path, precision: str) -> None:
    demo = Path(__file__).resolve().parents[2] / "examples" / "demo" / "fastvlm-demo"
    for path in (plain, demo):
        moves, _ = moves_of(open_checkpoint(str(path)), precision_plan(precision))
        assert moves == Moves({}, {})


def test_outliers_of_the_encoder_move_and_it_computes_the_same(plain: Path) -> None:
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    original, encoder = (load_vision(open_checkpoint(str(plain))) for _ in range(2))

    def moved() -> dict[str, list[int]]:
        with torch.inference_mode(), watch_encoder(encoder) as seen:
            encoder(pixels)
        return move_in_encoder(encoder, seen)

    assert moved() == {}
    stages: Any = encoder.stages
    block, attention = stages[0].blocks[0], stages[3].blocks[0]
    dim = attention.norm.weight.numel()
    with torch.no_grad():
        block.mlp.conv.bn.weight.data[2] *= 512
        block.mlp.conv.bn.bias.data[2] *= 512
        block.mlp.fc1.weight.data[:, 2] /= 512
        attention.norm.weight.data[4] *= 512
        attention.norm.bias.data[4] *= 512
        attention.token_mixer.qkv.weight.data[:, 4] /= 512
        attention.token_mixer.qkv.weight.data[2 * dim + 6] *= 512
        attention.token_mixer.proj.weight.data[:, 6] /= 512
    assert moved() == {
        "vision.stages.0.blocks.0.mlp.fc1": [2],
        "vision.stages.3.blocks.0.token_mixer.qkv": [4],
        "vision.stages.3.blocks.0.token_mixer.proj": [6],
    }
    assert moved() == {}
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels), original(pixels), rtol=1e-5, atol=1e-6)
