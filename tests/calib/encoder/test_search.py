"""W8A8 of the encoder: every technique does what it is for, the graph is the simulation, and the plan keeps its bound."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.checkpoints.heavy_tails import add_heavy_tails
from fastvlm_edge.calib.encoder import search as vision
from fastvlm_edge.calib.encoder.cache import ObservationCache, run_watched
from fastvlm_edge.calib.encoder.chain import Decision, Layer
from fastvlm_edge.calib.encoder.histogram import Histogram
from fastvlm_edge.calib.encoder.search import VisionQuantization, VisionSearch, cosine_loss
from fastvlm_edge.convert.fastvithd import FastViTHD, image_tokens
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.vision import build_vision
from fastvlm_edge.convert.precision import PrecisionPlan, precision_plan
from fastvlm_edge.convert.weights.vision import QuantizedLayer, write_vision_weights
from tests.convert.graphs.test_vision import HIDDEN, TINY, random_encoder
from tests.support.parser_of_tensorrt_10_3 import check_graph

SIZE = 128
FP32 = precision_plan("fp32")
Model = tuple[FastViTHD, nn.Sequential]
"""An encoder and its projector."""
Images = list[NDArray[np.float32]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Layers as small as these only lose time to several threads, a lot of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(count: int, seed: int = 0) -> list[Tensor]:
    """Smooth random pictures: neighbouring pixels are alike, as in photographs."""
    torch.manual_seed(seed)
    coarse = torch.rand(count, 3, SIZE // 8, SIZE // 8)
    fine = nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic") + 0.05 * torch.randn(count, 3, SIZE, SIZE)
    return list(fine.clamp(0, 1).split(1))


@pytest.fixture(scope="module")
def images() -> Images:
    return [picture.numpy() for picture in pictures(8)]


@pytest.fixture(scope="module")
def model() -> Model:
    encoder = random_encoder()
    torch.manual_seed(1)
    projector = nn.Sequential(nn.Linear(256, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)).requires_grad_(False)
    return encoder, projector


@pytest.fixture(scope="module")
def heavy(model: Model) -> Model:
    encoder = random_encoder()
    add_heavy_tails(encoder)
    return encoder, model[1]


def loss(search: VisionSearch, decision: Decision, images: Images) -> float:
    """Mean 1 - cosine on `images` with every group in a state, or as near to W8A8 as it may be."""
    with torch.inference_mode():
        for unit in search.units:
            unit.use("wide")
        expected = [search.run(torch.from_numpy(image)) for image in images]
        for unit in search.units:
            unit.use(unit.best if decision == "w8a8" else decision)
        found = [search.run(torch.from_numpy(image)) for image in images]
    return float(np.mean([cosine_loss(a, b) for a, b in zip(found, expected, strict=True)]))


def observed(model: Model, images: Images, plan: PrecisionPlan = FP32) -> VisionSearch:
    search = VisionSearch(*model, plan)
    search.observe(images)
    return search


def quantized(model: Model, images: Images, bound: float, plan: PrecisionPlan = FP32) -> VisionQuantization:
    """The plan of the product's three steps."""
    search = observed(model, images, plan)
    search.measure(images[:2])
    return search.choose(images, bound=bound)


def round_to_nearest(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight / scales[:, None]).round().clamp(-127, 127)


def plainly(model: Model, images: Images) -> VisionSearch:
    """A search whose layers are quantised without any technique: scales by the largest value, weights rounded to nearest, biases kept."""
    search = VisionSearch(*model, FP32)
    layers = [layer for unit in search.units for layer in unit.layers]
    for layer in layers:
        layer.histogram = Histogram()

    def look(layer: Layer, rows: Tensor) -> None:
        assert layer.histogram is not None
        layer.positions = len(rows)
        layer.histogram.add(rows.numpy())

    with torch.inference_mode():
        for image in images:
            x = torch.from_numpy(image)
            for unit in search.units:
                x = run_watched(unit, x, look)
    for layer in layers:
        assert layer.histogram is not None
        layer.clip = layer.histogram.largest
        scales = layer.matrix.abs().amax(1) / 127
        values = round_to_nearest(layer.matrix, scales).to(torch.int8)
        stored = (values.reshape(layer.full_weight.shape) if layer.is_conv else values.T).contiguous().numpy()
        bias = None if layer.full_bias is None else layer.full_bias.numpy()
        layer.options["weights"] = QuantizedLayer(stored, scales.numpy(), bias, None)
        layer.options["w8a8"] = QuantizedLayer(stored, scales.numpy(), bias, layer.clip / 127)
    return search


# Techniques -------------------------------------------------------------------------------------------------------------------------


def test_folding_and_equalising_change_nothing_in_floats(heavy: Model, images: Images) -> None:
    encoder, projector = heavy
    search = observed(heavy, images)
    assert any(layer.strength for unit in search.units for layer in unit.layers)
    x = torch.from_numpy(images[0])
    for unit in search.units:
        unit.use("w8a8")
        unit.use("wide")
    with torch.inference_mode():
        found, expected = search.run(x), projector(image_tokens(encoder(x)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_bias_correction_takes_the_mean_error_away(heavy: Model, images: Images) -> None:
    """Of one layer on the pictures it was made with; the samples are all positions at this size."""
    search = observed(heavy, images)
    layer = next(unit for unit in search.units if unit.name == "vision.stages.1.blocks.0.mlp").layers[1]
    option = layer.options["w8a8"]
    assert layer.factor is not None and layer.full_bias is not None and layer.offset is not None
    uncorrected = layer.full_bias - (layer.matrix / layer.factor) @ layer.offset
    rows = []
    handle = layer.module.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0]))
    errors = []
    with torch.inference_mode():
        for image in images:
            search.run(torch.from_numpy(image))
        handle.remove()
        wide = torch.cat([layer.module(x) for x in rows])
        for bias in (uncorrected.numpy(), option.bias):
            layer.use(replace(option, bias=bias))
            difference = torch.cat([layer.module(x) for x in rows]) - wide
            errors.append(float(difference.mean((0, 2, 3)).norm() / difference.square().mean((0, 2, 3)).sqrt().norm()))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("name", ["model", "heavy"])
def test_the_techniques_together_lose_far_less_than_plain_rounding(name: str, images: Images, request: pytest.FixtureRequest) -> None:
    model, heldout = request.getfixturevalue(name), [picture.numpy() for picture in pictures(4, seed=5)]
    plain = loss(plainly(model, images), "w8a8", heldout)
    whole = loss(observed(model, images), "w8a8", heldout)
    assert whole < plain / (10 if name == "heavy" else 2)


# Plans ------------------------------------------------------------------------------------------------------------------------------


def test_the_plan_meets_its_bound_and_widens_what_hurts_most(heavy: Model, images: Images) -> None:
    search = plainly(heavy, images)
    search.measure(images[:2])
    found = {bound: search.choose(images, bound=bound, disproportion=float("inf")) for bound in (1.0, 1e-5, 3e-6, 1e-6, 0.0)}
    for bound, result in found.items():
        assert result.loss <= bound + 1e-12
    shares = [result.share() for result in found.values()]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[2] > shares[-1] == 0
    middle = [record for record in found[3e-6].records if record.group and record.group != "projector"]
    kept = [record.cosine_loss / record.macs for record in middle if record.decision != "w8a8"]
    taken = [record.cosine_loss / record.macs for record in middle if record.decision == "w8a8"]
    assert np.median(kept) > np.median(taken)
    assert all(record.reason for record in found[3e-6].records)


def test_what_harms_most_for_little_work_is_spared_whatever_the_bound(heavy: Model, images: Images) -> None:
    search = plainly(heavy, images[:2])
    search.measure(images[:1])
    candidates = [unit for unit in search.units if unit.layers and unit.best == "w8a8"]
    for unit in candidates:
        unit.loss["w8a8"] = 1e-9 * sum(layer.macs for layer in unit.layers)
    search.choose(images, bound=1.0)
    assert all(unit.decision == "w8a8" for unit in candidates)
    first, second, third, *_ = candidates
    first.loss["w8a8"] *= 1000  # hides the next one, as long as it is among them
    second.loss["w8a8"] *= 50
    third.loss["w8a8"] *= 2
    found = search.choose(images, bound=1.0)
    spared = {record.group for record in found.records if "so little work" in record.reason}
    assert spared == {first.name, second.name}
    assert {unit.decision for unit in (first, second)} == {"weights"} and third.decision == "w8a8"
    first.loss["weights"] = first.loss["w8a8"] / 2  # then it is the weights that harm
    search.choose(images, bound=1.0)
    assert (first.decision, second.decision, third.decision) == ("wide", "weights", "w8a8")


def test_damage_of_weights_alone_is_measured_where_it_is_much(heavy: Model, images: Images) -> None:
    search = plainly(heavy, images[:2])
    search.measure(images[:1])
    x = torch.from_numpy(images[0])
    measured, estimated = 0, 0
    with torch.inference_mode():
        expected = search.run(x)
        for unit in (unit for unit in search.units if unit.layers):
            unit.use("weights")
            actual = cosine_loss(search.run(x), expected)
            unit.use("wide")
            if unit.loss["weights"] == pytest.approx(actual, rel=1e-3, abs=1e-12):
                measured += 1
            else:
                estimated += 1
                assert unit.loss["weights"] < vision.SMALL * unit.loss["w8a8"]
    assert measured and estimated


def test_the_projector_never_gets_int8_inputs(heavy: Model, images: Images) -> None:
    result = quantized(heavy, images, bound=1.0)
    assert result.share("weights") > 0
    assert all(name not in result.activation_scales for name in ("projector.linear_1", "projector.linear_2"))


def test_depthwise_and_squeeze_excite_stay_wide(model: Model, images: Images) -> None:
    result = quantized(model, images, bound=1.0)
    by_kind = {
        kind: {record.decision for record in result.records if record.kind == kind} for kind in ("grouped", "squeeze-excite", "first")
    }
    assert by_kind == {kind: {"wide"} for kind in by_kind}
    convolutions = [module for module in model[0].modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(result.records) == len(convolutions) + 2
    assert len({record.name for record in result.records}) == len(result.records)


def test_a_known_observation_is_not_made_again(heavy: Model, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(key: str) -> VisionQuantization:
        search = VisionSearch(*heavy, FP32)
        search.observe(images[:2], cache=ObservationCache(tmp_path / "cache" / "vision.npz", f"{key} {search.key()}"))
        search.measure(images[:2])
        return search.choose(images[:2], bound=0.001)

    first = run("weights and pictures")
    monkeypatch.setattr(Histogram, "add", lambda *_: pytest.fail("observed again"))
    monkeypatch.setattr(vision, "quantize_layer", lambda *_: pytest.fail("rounded again"))
    monkeypatch.setattr(vision, "squared_error", lambda *_: pytest.fail("measured again"))
    second = run("weights and pictures")
    assert first.activation_scales == second.activation_scales and first.loss == second.loss and first.records == second.records
    for name, layer in first.layers.items():
        for field in dataclasses.fields(layer):
            np.testing.assert_array_equal(getattr(layer, field.name), getattr(second.layers[name], field.name))
    with pytest.raises(pytest.fail.Exception, match="observed again"):
        run("other pictures")
    monkeypatch.undo()
    (tmp_path / "cache" / "vision.npz").write_bytes(b"damaged")
    assert run("weights and pictures").loss == first.loss


# Graphs -----------------------------------------------------------------------------------------------------------------------------


def write_graph(
    folder: Path, model: Model, result: VisionQuantization, plan: PrecisionPlan, *, activations: bool = True, size: int = SIZE
) -> tuple[Path, GraphBuilder]:
    weights = WeightsFile(folder / "vision.weights")
    write_vision_weights(*model, plan, weights, lambda: None, result)
    weights.close()
    graph = GraphBuilder("vision", weights)
    build_vision(graph, TINY, HIDDEN, size, plan, result.activation_scales if activations else None)
    graph.save(folder / "vision.onnx")
    return folder / "vision.onnx", graph


@pytest.mark.parametrize(("make", "bound"), [(plainly, 1.0), (observed, 1.0), (observed, 1e-4)])
def test_the_graph_computes_what_the_simulation_does(
    tmp_path: Path, heavy: Model, images: Images, make: Callable[[Model, Images], VisionSearch], bound: float
) -> None:
    search = make(heavy, images)
    search.measure(images[:1])
    result = search.choose(images[:2], bound=bound)
    path, graph = write_graph(tmp_path, heavy, result, FP32)
    pairs = [node.op_type for node in graph.nodes].count("QuantizeLinear")
    assert pairs == len(result.activation_scales) > 0
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        for unit in search.units:
            for layer in unit.layers:
                layer.use(result.layers.get(layer.name))
        for image in images[:2]:
            expected = search.run(torch.from_numpy(image)).numpy()
            (found,) = session.run(None, {"pixel_values": image})
            assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


def test_a_graph_without_activations_is_the_same_model(tmp_path: Path, heavy: Model, images: Images) -> None:
    result = quantized(heavy, images, bound=1.0)
    path, graph = write_graph(tmp_path, heavy, result, FP32, activations=False)
    operators = [node.op_type for node in graph.nodes]
    assert "QuantizeLinear" not in operators and operators.count("DequantizeLinear") == len(result.layers)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": images[0]})
    expected = heavy[1](image_tokens(heavy[0](torch.from_numpy(images[0])))).numpy()
    assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)


def test_tensorrt_takes_the_graph(tmp_path: Path, model: Model, images: Images) -> None:
    """The parser of 10.3 by its table; TensorRT for RTX by building an engine for an RTX 30 without having one."""
    trt = pytest.importorskip("tensorrt_rtx")
    plan = precision_plan("int8")
    result = quantized(model, images[:2], bound=1.0, plan=plan)
    path, _ = write_graph(tmp_path, model, result, plan)
    assert check_graph(path) == []
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("pixel_values", *[(1, 3, SIZE, SIZE)] * 3)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    assert builder.build_serialized_network(network, config) is not None
