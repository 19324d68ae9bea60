"""FastViTHD: re-parameterisation and folding change nothing but the speed; the graph is the module."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from fastvlm_edge.convert.fastvithd import FastViTHD, FastViTHDConfig, LayerScale, image_tokens
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.vision import build_vision
from fastvlm_edge.convert.precision import on_cpu, precision_plan
from fastvlm_edge.convert.weights.vision import write_vision_weights
from tests.support.graph_interpreter import Interpreter

TINY = FastViTHDConfig((1, 2, 2, 1, 1), (16, 32, 64, 64, 128), out_dim=256, se_dim=16)
HIDDEN = 48


def random_encoder(*, train_form: bool = False, config: FastViTHDConfig = TINY) -> FastViTHD:
    torch.manual_seed(0)
    encoder = FastViTHD(config, train_form=train_form)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
        if isinstance(module, LayerScale):
            module.gamma.data.uniform_(0.2, 1)
    return encoder.eval().requires_grad_(False)


def test_reparameterised_branches_compute_the_same() -> None:
    encoder = random_encoder(train_form=True)
    pixels = torch.rand(2, 3, 128, 192)
    before = encoder(pixels)
    names = set(random_encoder().state_dict())
    assert set(encoder.state_dict()) != names
    encoder.reparameterize()
    assert set(encoder.state_dict()) == names
    torch.testing.assert_close(encoder(pixels), before, rtol=1e-4, atol=1e-4)


def test_the_released_size_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in FastViTHD().parameters()) == 122_714_208


@pytest.mark.parametrize("dims", [(16, 24, 48, 64, 128), (16, 32, 64, 80, 160)])
def test_widths_that_cannot_be_built_are_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple"):
        FastViTHDConfig((1, 1, 1, 1, 1), dims, out_dim=320)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp16", 5e-3), ("bf16", 3e-2), ("int8", 5e-2)])
@pytest.mark.parametrize("image_size", [128, 256])
def test_the_graph_computes_what_the_module_does(tmp_path: Path, precision: str, bound: float, image_size: int) -> None:
    encoder = random_encoder()
    projector = nn.Sequential(nn.Linear(256, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)).requires_grad_(False)
    plan = precision_plan(precision)
    weights = WeightsFile(tmp_path / "vision.weights")
    write_vision_weights(encoder, projector, plan, weights, lambda: None)
    weights.close()
    graph = GraphBuilder("vision", weights)
    build_vision(graph, TINY, HIDDEN, image_size, on_cpu(plan))
    graph.save(tmp_path / "vision.onnx")
    pixels = torch.rand(2, 3, image_size, image_size)
    session = ort.InferenceSession(str(tmp_path / "vision.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": pixels.numpy()})
    expected = projector(image_tokens(encoder(pixels))).numpy()
    assert found.shape == (2, (image_size // 64) ** 2, HIDDEN)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < bound


def test_channels_far_from_zero_survive_the_norm_in_fp16(tmp_path: Path) -> None:
    """A channel at 400 squares to more than FP16 holds: a norm computed in FP16 would silently return its bias."""
    encoder = random_encoder()
    with torch.no_grad():
        encoder.get_parameter("stages.3.pos_emb.reparam_conv.bias")[0] = 2000.0
    projector = nn.Sequential(nn.Linear(256, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)).requires_grad_(False)
    weights = WeightsFile(tmp_path / "vision.weights")
    write_vision_weights(encoder, projector, precision_plan("fp16"), weights, lambda: None)
    weights.close()
    graph = GraphBuilder("vision", weights)
    build_vision(graph, TINY, HIDDEN, 128, precision_plan("fp16"))
    graph.save(tmp_path / "vision.onnx")
    pixels = torch.rand(1, 3, 128, 128)
    session = ort.InferenceSession(str(tmp_path / "vision.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": pixels.numpy()})
    expected = projector(image_tokens(encoder(pixels))).numpy()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-2


@pytest.mark.parametrize("ignored", [False, True], ids=["asked", "ignored"])
def test_sums_of_stage_4_may_exceed_fp16_on_the_way(tmp_path: Path, ignored: bool) -> None:
    """Two channels of 6,000 cancel in a product whose terms reach 120,000; a library that ignores the casts to FP32 gets no number."""
    encoder = random_encoder()
    block = "stages.3.blocks.0"
    with torch.no_grad():
        encoder.get_parameter(f"{block}.mlp.fc1.weight")[[0, 100]] = 0
        encoder.get_parameter(f"{block}.mlp.fc1.bias")[[0, 100]] = 6000
        down, gamma = encoder.get_parameter(f"{block}.mlp.fc2.weight"), encoder.get_parameter(f"{block}.layer_scale_2.gamma")
        down[:, [0, 100]] = 0
        down[3, [0, 100], 0, 0] = torch.tensor([20, -20 + 2**-6]) / gamma[3, 0, 0]
    projector = nn.Sequential(nn.Linear(256, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)).requires_grad_(False)
    weights = WeightsFile(tmp_path / "vision.weights")
    write_vision_weights(encoder, projector, precision_plan("fp16"), weights, lambda: None)
    weights.close()
    graph = GraphBuilder("vision", weights)
    build_vision(graph, TINY, HIDDEN, 64, precision_plan("fp16"))
    graph.save(tmp_path / "vision.onnx")
    pixels = {"pixel_values": np.random.default_rng(0).random((1, 3, 64, 64), np.float32)}
    exact = Interpreter(tmp_path / "vision.onnx", exact=True).run(pixels)["image_features"]
    narrow_sums = "all" if ignored else "declared"  # in FP16 wherever the graph does not ask for more
    found = Interpreter(tmp_path / "vision.onnx", narrow_sums=narrow_sums).run(pixels)["image_features"].astype(np.float64)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert np.isnan(error) if ignored else error < 1e-2
