"""Calibrated quantisation of the decoder: it is GPTQ, it beats rounding to nearest, TensorRT can take it, and a large model fits."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from fastvlm_edge.calib.decoder import RATIOS, Conversation, DecoderQuantization, Solver, calibrate_decoder
from fastvlm_edge.calib.gptq import factorize
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.decoder import build_decoder
from fastvlm_edge.convert.precision import FLOAT_TYPES, INT4_BLOCK, INT8_CHANNEL, PLAIN, PLANS, PrecisionPlan, WeightType, on_cpu
from fastvlm_edge.convert.reference.decoder import reference_logits
from fastvlm_edge.convert.weights.decoder import write_decoder_weights
from fastvlm_edge.convert.weights.round_to_nearest import Quantized, dequantize, quantize_matrix, stored_type
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.progress import SilentProgress
from tests.support.checkpoints import SIZES, write_checkpoint

KINDS = [INT8_CHANNEL, WeightType(4, 32), WeightType(4, 64), WeightType(4, 128)]


def inputs(rows: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Inputs of a layer: few directions carry most of them, and some channels are large. Other seeds give other rows of the same layer."""
    rng = np.random.default_rng(7)
    mixing = rng.standard_normal((width, width)) * np.logspace(0, -2, width)[:, None] * rng.uniform(0.2, 3, width)
    return (np.random.default_rng(seed).standard_normal((rows, width)) @ mixing).astype(np.float32)


def weights(width: int, outputs: int, seed: int = 1) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((width, outputs)) / np.sqrt(width)).astype(np.float32)


def output_error(x: NDArray[np.float32], weight: NDArray[np.float32], quantized: Quantized) -> float:
    return float(np.linalg.norm(x @ (dequantize(quantized) - weight)) / np.linalg.norm(x @ weight))


def quantize_gptq(
    weight: NDArray[np.float32],
    moments: NDArray[np.float32],
    kind: WeightType,
    scale_type: npt.DTypeLike = np.float32,
    ratios: tuple[float, ...] = RATIOS,
) -> Quantized:
    """A whole matrix [inputs, outputs] at once, as `Quantized`."""
    solver = Solver(stored_type(kind, len(weight)), np.dtype(scale_type), factorize(torch.from_numpy(moments).clone()), ratios)
    found = solver.quantize(torch.from_numpy(weight))
    values = found.values.numpy()
    return Quantized(values.astype(ml_dtypes.int4) if solver.kind.bits == 4 else values, found.scales.numpy())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale_type", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest(kind: WeightType, scale_type: npt.DTypeLike) -> None:
    weight = weights(256, 40)
    nearest = quantize_matrix(weight, kind, scale_type)
    found = quantize_gptq(weight, np.eye(256, dtype=np.float32), kind, scale_type, ratios=(1.0,))
    np.testing.assert_array_equal(found.scales, nearest.scales)
    np.testing.assert_array_equal(found.values, nearest.values)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_searched_scales_are_no_worse_than_those_that_clip_nothing(kind: WeightType) -> None:
    weight = weights(256, 40)
    errors = [
        np.linalg.norm(dequantize(quantized) - weight, axis=0)
        for quantized in (quantize_gptq(weight, np.eye(256, dtype=np.float32), kind), quantize_matrix(weight, kind))
    ]
    assert np.all(errors[0] <= errors[1] * 1.0001)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_outputs_change_a_third_as_much_as_by_rounding_to_nearest(kind: WeightType) -> None:
    x, unseen = inputs(1024, 256), inputs(256, 256, seed=1)
    weight = weights(256, 64)
    quantized = quantize_gptq(weight, x.T @ x / len(x), kind)
    nearest = quantize_matrix(weight, kind)
    assert output_error(unseen, weight, quantized) < output_error(unseen, weight, nearest) / 3


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale_type", [np.float16, ml_dtypes.bfloat16])
def test_types_are_those_that_tensorrt_takes(kind: WeightType, scale_type: npt.DTypeLike) -> None:
    x, weight = inputs(300, 256), weights(256, 48)
    quantized = quantize_gptq(weight, x.T @ x, kind, scale_type)
    nearest = quantize_matrix(weight, kind, scale_type)
    assert quantized.values.dtype == nearest.values.dtype
    assert quantized.values.shape == weight.shape
    assert quantized.scales.shape == nearest.scales.shape == ((256 // kind.block, 48) if kind.block else (48,))
    assert quantized.scales.dtype == np.float32
    np.testing.assert_array_equal(quantized.scales.astype(scale_type).astype(np.float32), quantized.scales)
    assert np.all(quantized.scales > 0)
    values = quantized.values.astype(np.int32)
    assert values.min() >= (-8 if kind.bits == 4 else -127)
    assert values.max() <= (7 if kind.bits == 4 else 127)


def test_inputs_that_no_block_divides_get_int8() -> None:
    x, weight = inputs(100, 40), weights(40, 8)
    quantized = quantize_gptq(weight, x.T @ x, INT4_BLOCK)
    assert quantized.values.dtype == np.int8
    assert quantized.scales.shape == (8,)


def test_inputs_that_are_always_zero_and_weights_that_are_zero_do_no_harm() -> None:
    x, weight = inputs(100, 64), weights(64, 8)
    x[:, 5] = 0
    weight[:, 3] = 0
    for moments in (x.T @ x, np.zeros((64, 64), np.float32)):
        found = dequantize(quantize_gptq(weight, moments, INT4_BLOCK))
        assert np.isfinite(found).all()
        assert not found[:, 3].any()


# The whole decoder --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="apple")))


def conversations(source: Checkpoint, count: int, seed: int = 0) -> Iterator[Conversation]:
    """Pictures of 4 rows, each before 40 ids: all about the same few things, as real ones are."""
    rng, text = np.random.default_rng(seed), source.text
    things = np.random.default_rng(7).standard_normal((6, text.hidden)) / 2
    for _ in range(count):
        ids = [*(text.vocab + row for row in range(4)), *(8 * rng.integers(0, 24, 40))]
        yield [int(token) for token in ids], (rng.standard_normal((4, 6)) @ things).astype(np.float32)


def decoder_logits(
    source: Checkpoint, plan: PrecisionPlan, quantized: DecoderQuantization | None, folder: Path, asked: list[Conversation]
) -> NDArray[np.float32]:
    """Logits of every position of the conversations, by onnxruntime."""
    text = source.text
    weights = WeightsFile(folder / "decoder.weights")
    write_decoder_weights(source, plan, weights, lambda: None, quantized, context=128)
    weights.close()
    graph = GraphBuilder("decoder", weights)
    build_decoder(graph, text, on_cpu(plan))
    graph.save(folder / "decoder.onnx")
    session = ort.InferenceSession(folder / "decoder.onnx", providers=["CPUExecutionProvider"])
    past = np.zeros((1, text.kv_heads, 0, text.head_dim), np.float32)
    caches = {f"past_key_values.{i}.{part}": past for i in range(text.layers) for part in ("key", "value")}
    logits = []
    for ids, features in asked:
        positions = np.arange(len(ids))[None]
        feeds = {"input_ids": np.array([ids]), "position_ids": positions, "image_features": features, "logit_positions": positions}
        logits.append(session.run(["logits"], {**feeds, **caches})[0][0])
    return np.concatenate(logits)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_graph_is_nearer_to_pytorch_than_by_rounding_to_nearest(source: Checkpoint, tmp_path: Path, precision: str) -> None:
    plan = replace(PLANS[precision], embedding=PLAIN)  # which is rounded the same way in both
    asked = list(conversations(source, 4, seed=1))
    expected = np.concatenate([reference_logits(source, ids, features, range(len(ids)), lambda: None)[0] for ids, features in asked])
    errors = []
    with calibrate_decoder(source, conversations(source, 48), plan) as calibrated:
        assert max(calibrated.errors.values()) < (0.1 if precision == "int4" else 0.01)
        assert all(calibrated.errors[name] < calibrated.rounded[name] for name in calibrated.names())
        for name, quantized in (("calibrated", calibrated), ("nearest", None)):
            (tmp_path / name).mkdir()
            logits = decoder_logits(source, plan, quantized, tmp_path / name, asked)
            errors.append(np.linalg.norm(logits - expected))
    assert errors[0] < 0.8 * errors[1]


def test_every_matrix_has_the_shape_and_type_that_rounding_to_nearest_gives_it(source: Checkpoint, tmp_path: Path) -> None:
    plan = replace(PLANS["int4"], decoder="bf16")
    with calibrate_decoder(source, conversations(source, 4), plan) as calibrated:
        files = [WeightsFile(tmp_path / name) for name in ("calibrated", "nearest")]
        for file, quantized in zip(files, (calibrated, None), strict=True):
            write_decoder_weights(source, plan, file, lambda: None, quantized, context=128)
            file.close()
    entries = [{name: (entry.dtype, entry.shape) for name, entry in file.entries.items()} for file in files]
    assert entries[0] == entries[1]
    scales = {entry[0] for name, entry in entries[0].items() if name.endswith(".scale")}
    assert scales == {np.dtype(FLOAT_TYPES["bf16"])}


def test_calibrating_twice_gives_the_same_integers(source: Checkpoint) -> None:
    with (
        calibrate_decoder(source, conversations(source, 6), PLANS["int4"]) as first,
        calibrate_decoder(source, conversations(source, 6), PLANS["int4"]) as second,
    ):
        assert first.names() == second.names()
        for name in first.names():
            np.testing.assert_array_equal(first.matrix(name).values, second.matrix(name).values)
            np.testing.assert_array_equal(first.matrix(name).scales, second.matrix(name).scales)
        assert first.errors == second.errors


def test_scales_of_another_type_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    with calibrate_decoder(source, conversations(source, 2), PLANS["int8"]) as calibrated:
        weights = WeightsFile(tmp_path / "decoder.weights")
        with pytest.raises(ValueError, match="calibrate with the same plan"):
            write_decoder_weights(source, replace(PLANS["int8"], decoder="bf16"), weights, lambda: None, calibrated, context=128)
        weights.close()


def test_no_conversation_is_refused_and_nothing_is_left(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match="no conversations"):
        calibrate_decoder(source, [], PLANS["int8"], directory=tmp_path)
    assert not any(tmp_path.iterdir())


def test_activations_that_are_not_finite_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    ids, features = next(conversations(source, 1))
    features[2, 7] = np.inf
    with pytest.raises(FastVLMError, match=r"inputs of llm\.layers\.0\.qkv are not finite"):
        calibrate_decoder(source, [(ids, features)], PLANS["int8"], directory=tmp_path)
    assert not any(tmp_path.iterdir())


def test_progress_counts_every_matrix_and_the_folder_goes_when_closed(source: Checkpoint, tmp_path: Path) -> None:
    class Watch(SilentProgress):
        stages: list[tuple[str, int | None]] = []  # noqa: RUF012
        count = 0

        def stage(self, name: str, total: int | None = None, *, speed: bool = False) -> None:
            self.stages.append((name, total))

        def advance(self, amount: int = 1) -> None:
            self.count += amount

    progress = Watch()
    with calibrate_decoder(source, conversations(source, 2), PLANS["int4"], progress=progress, directory=tmp_path) as calibrated:
        assert len(calibrated.names()) == 4 * source.text.layers + 1
        assert len(list(tmp_path.iterdir())) == 1
    assert progress.stages == [("calibrate decoder", progress.count)]
    assert not any(tmp_path.iterdir())


MEASURED = """
import json, resource, sys
import numpy as np, torch
torch.set_num_threads(1)
from fastvlm_edge.calib.decoder import calibrate_decoder
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_edge.convert.precision import PLANS
checkpoint = open_checkpoint(sys.argv[1])
talk = [(list(range(16)), np.zeros((0, checkpoint.text.hidden), np.float32))] * 2
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with calibrate_decoder(checkpoint, talk, PLANS["int4"]):
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10))
"""


def test_memory_does_not_grow_with_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(SIZES["tiny"], hidden=512, heads=8, kv_heads=2, head_dim=64, intermediate=1024)
    peaks = []
    for layers in (2, 8):
        monkeypatch.setitem(SIZES, "wide", replace(wide, layers=layers))
        folder = write_checkpoint(tmp_path / str(layers), size="wide")
        result = subprocess.run([sys.executable, "-c", MEASURED, str(folder)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        peaks.append(json.loads(result.stdout))
    assert peaks[1] - peaks[0] < 12, peaks  # MiB; six layers more are 52 MiB in FP32
