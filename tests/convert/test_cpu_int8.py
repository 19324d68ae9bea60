"""INT8 activations in the encoder of a CPU: as many blocks as the features bear, and the graph computes what was chosen."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fastvlm_edge.backends.verification.compare import compare
from fastvlm_edge.convert.cpu_int8 import TRIES, Noise, choose_blocks, watch_blocks
from fastvlm_edge.convert.fastvithd import image_tokens
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.vision import build_vision
from fastvlm_edge.convert.precision import on_cpu, precision_plan
from fastvlm_edge.convert.weights.vision import write_vision_weights
from tests.convert.graphs.test_vision import HIDDEN, TINY, random_encoder


def noises(*damages: float) -> list[Noise]:
    return [Noise((f"{index}.fc1", f"{index}.fc2"), damage, 1.0) for index, damage in enumerate(damages)]


def noisy_run(losses: Sequence[float]) -> tuple[Callable[[frozenset[str]], list[NDArray[np.float32]]], list[frozenset[str]]]:
    """Features whose 1 - cosine is about the sum of the losses of the blocks that are on; and the calls made."""
    calls: list[frozenset[str]] = []

    def run(layers: frozenset[str]) -> list[NDArray[np.float32]]:
        calls.append(layers)
        angle = np.sqrt(2 * sum(loss for index, loss in enumerate(losses) if f"{index}.fc1" in layers))
        return [np.array([[np.cos(angle), np.sin(angle)]], np.float32)]

    return run, calls


def test_all_blocks_are_taken_where_the_features_hold() -> None:
    run, calls = noisy_run([1e-4] * 3)
    chosen = choose_blocks(noises(1, 2, 3), run, bound=0.001)
    assert chosen.layers == {"0.fc1", "0.fc2", "1.fc1", "1.fc2", "2.fc1", "2.fc2"}
    assert (chosen.blocks, chosen.candidates, len(calls)) == (3, 3, 2)
    assert chosen.loss == pytest.approx(3e-4, rel=0.02)


def test_the_noisiest_blocks_stay_floats() -> None:
    run, _ = noisy_run([1e-4, 5e-2, 1e-4, 1e-4])
    chosen = choose_blocks(noises(1.0, 500.0, 1.2, 0.9), run, bound=0.001)
    assert chosen.blocks == 3
    assert not any(layer.startswith("1.") for layer in chosen.layers)
    assert chosen.loss <= 0.001


def test_nothing_is_taken_where_nothing_holds() -> None:
    run, calls = noisy_run([1e-1] * 8)
    chosen = choose_blocks(noises(*[1.0] * 8), run, bound=1e-6)
    assert not chosen.layers and chosen.blocks == 0
    assert len(calls) <= TRIES + 1


def test_features_that_are_no_numbers_are_a_loss() -> None:
    def run(layers: frozenset[str]) -> list[NDArray[np.float32]]:
        return [np.full((1, 2), np.nan if layers else 1.0, np.float32)]

    assert not choose_blocks(noises(1.0, 2.0), run).layers


def test_an_outlier_makes_its_block_the_noisiest() -> None:
    encoder = random_encoder()
    with torch.no_grad():
        encoder.get_parameter("stages.2.blocks.1.mlp.conv.bn.bias")[3] = 500.0
    with watch_blocks(encoder) as found, torch.inference_mode():
        encoder(torch.rand(1, 3, 128, 128))
    assert len(found) == sum((1, 2, 2)) + 2 * sum((1, 1))
    assert max(found, key=lambda noise: noise.damage).layers[0] == "vision.stages.2.blocks.1.mlp.fc1"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_graph_with_int8_inputs_is_near_the_module_and_one_kernel_a_product(tmp_path: Path, threads: int) -> None:
    encoder = random_encoder()
    projector = nn.Sequential(nn.Linear(256, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)).requires_grad_(False)
    plan = precision_plan("int8")
    weights = WeightsFile(tmp_path / "vision.weights")
    write_vision_weights(encoder, projector, plan, weights, lambda: None)
    weights.close()
    pixels = torch.rand(1, 3, 256, 256)
    with watch_blocks(encoder) as found:
        expected = projector(image_tokens(encoder(pixels))).numpy()
    layers = frozenset(layer for noise in found for layer in noise.layers)
    results = {}
    for name, integer_inputs in (("floats", frozenset()), ("integers", layers)):
        graph = GraphBuilder("vision", weights)
        build_vision(graph, TINY, HIDDEN, 256, on_cpu(plan), integer_inputs=integer_inputs)
        graph.save(tmp_path / f"{name}.onnx")
        onnx.checker.check_model(str(tmp_path / f"{name}.onnx"))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.optimized_model_filepath = str(tmp_path / f"{name}.optimized.onnx")
        session = ort.InferenceSession(str(tmp_path / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
        (results[name],) = session.run(None, {"pixel_values": pixels.numpy()})
        kinds = [node.op_type for node in onnx.load(tmp_path / f"{name}.optimized.onnx", load_external_data=False).graph.node]
        assert kinds.count("DynamicQuantizeMatMul") == len(integer_inputs)
        assert "MatMulInteger" not in kinds
    assert compare(results["floats"], expected).cosine > 0.998
    assert not np.array_equal(results["integers"], results["floats"])
    assert compare(results["integers"], results["floats"]).cosine > 0.998
