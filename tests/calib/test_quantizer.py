"""Calibrated conversion end to end on the demo model, and how the accuracy that it loses is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.backends.verification.compare import compare
from fastvlm_edge.calib import quantizer as module
from fastvlm_edge.calib.accuracy import Question, Score, points_lost, score
from fastvlm_edge.calib.decoder import calibrate_decoder
from fastvlm_edge.calib.encoder.search import VisionSearch
from fastvlm_edge.calib.quantizer import Options, Quantizer
from fastvlm_edge.cli import main
from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.convert.fastvithd import image_tokens
from fastvlm_edge.convert.graphs.placement import check_placement
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.convert.precision import PrecisionRefused, precision_plan
from fastvlm_edge.convert.reference.quantized_decoder import QuantizedDecoder
from fastvlm_edge.evaluation.data import Example
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.engine_record import VISION_GRAPHS
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest, verify_files
from tests.support.checkpoints import write_checkpoint
from tests.support.parser_of_tensorrt_10_3 import check_graph

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "fastvlm-demo"
EXAMPLES = 24


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def data(demo_scenes: Callable[[str, int], Path]) -> str:
    """Questions about EXAMPLES scenes of the split `calibration`."""
    return str(demo_scenes("calibration", EXAMPLES))


@pytest.fixture(scope="module", params=["int8", "int4"])
def model(request: pytest.FixtureRequest, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / request.param
    convert(str(DEMO), output, precision=request.param, calibrate=Quantizer(Options(data, limit=EXAMPLES)).calibrate)
    return output


# Conversion ---------------------------------------------------------------------------------------------------------------------


def test_a_calibrated_model_directory_is_whole_and_answers(model: Path, demo_scenes: Callable[[str, int], Path]) -> None:
    manifest = read_manifest(model)
    verify_files(model, manifest, hashes=True)
    assert {path.name for path in model.iterdir()} == {*manifest.files, "fastvlm.json", "verified.json"}
    assert {"quantization.json", "quantization.html", "vision.cpu.onnx", "decoder.cpu.onnx"} <= set(manifest.files)
    from fastvlm_edge.evaluation.data import open_data

    right = []
    with FastVLM.load(model, "ort") as vlm:
        for example, image in open_data(demo_scenes("heldout", 24)).read():
            assert example.prompt is not None
            right.append(vlm.generate(example.prompt, image, max_new_tokens=16).text == example.answers[0])
    assert sum(right) >= 23


def test_the_encoder_for_a_gpu_computes_most_products_in_int8(model: Path) -> None:
    placement = check_placement(model / "vision.onnx")
    assert placement.share("INT8") > 0.5
    assert check_graph(model / "vision.onnx") == check_graph(model / "decoder.onnx") == []
    reasons = {
        fallback.reason.partition(":")[0] for fallback in placement.fallbacks if fallback.op in ("QuantizeLinear", "DequantizeLinear")
    }
    assert reasons == set()
    assert check_placement(model / "vision.cpu.onnx").share("INT8") == 0


def test_the_other_graphs_of_the_encoder_compute_the_same(model: Path) -> None:
    """They share vision.weights and are for a TensorRT that refuses the first. onnxruntime runs all of them."""
    manifest = read_manifest(model)
    assert set(VISION_GRAPHS) <= set(manifest.files)
    size = manifest.vision.image_size
    pixels = np.random.default_rng(0).random((1, 3, size, size), np.float32)

    def features(name: str) -> NDArray[np.float32]:
        session = onnxruntime.InferenceSession(model / name, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"pixel_values": pixels})[0], np.float32)

    preferred, fp32_scales, float_inputs = map(features, VISION_GRAPHS)
    assert compare(fp32_scales, preferred).cosine > 0.999
    assert compare(float_inputs, features("vision.cpu.onnx")).cosine > 0.99, "a CPU computes some blocks in INT8"
    graph = onnx.load(model / "vision.fp32-scales.onnx", load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL}
    scales = [types[node.input[1]] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(scales) > 20 and set(scales) == {onnx.TensorProto.FLOAT}
    assert check_placement(model / "vision.float-inputs.onnx").share("INT8") == 0


def test_the_figures_of_int8_activations_are_in_the_manifest(model: Path) -> None:
    parity = read_manifest(model).parity
    assert 0.95 <= parity["image_features_w8a8"]["cosine"] < parity["image_features"]["cosine"] <= 1


def test_the_report_says_what_was_decided(model: Path, data: str) -> None:
    report = json.loads((model / "quantization.json").read_text())
    assert report["calibration"]["source"] == data and report["calibration"]["used"] == EXAMPLES
    groups = {group["name"]: group for group in report["vision"]["groups"]}
    assert {group["decision"] for group in groups.values()} >= {"int8", "wide"}
    assert all(group["reason"] for group in groups.values())
    manifest = read_manifest(model)
    matrices = {matrix["name"]: matrix for matrix in report["decoder"]["matrices"]}
    assert len(matrices) == 4 * manifest.decoder.layers + 1
    assert sum(matrix["error"] for matrix in matrices.values()) < sum(matrix["error_rounded"] for matrix in matrices.values())
    assert report["placement"]["vision"]["INT8"] > 0
    assert "<html" in (model / "quantization.html").read_text()[:200].lower()


def test_engines_are_built_from_the_calibrated_graphs(model: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from fastvlm_edge.engines import build as engines

    copy = shutil.copytree(model, model.parent / f"{model.name}-engines", dirs_exist_ok=True)
    record = engines.build(copy, "sm86", engines.Options(report=True, cache=None))
    layers = engines.read_layers(copy / "engines" / record.target)["vision"]
    int8 = [layer for layer in layers if any(tensor.dtype == "Int8" for tensor in layer.inputs) and layer.kind in ("correlation", "gemm")]
    assert len(int8) >= 10


def test_the_encoder_is_calibrated_at_every_size(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of one size may be too small or too coarse for another, so each picture is observed at all sizes."""
    seen: list[list[int]] = []
    observe = VisionSearch.observe

    def spy(self: Any, pictures: Any, **options: Any) -> None:
        seen.append([picture.shape[-1] for picture in pictures])
        observe(self, pictures, **options)

    monkeypatch.setattr(VisionSearch, "observe", spy)
    calibrate = Quantizer(Options(data, limit=EXAMPLES)).calibrate
    manifest = convert(str(DEMO), tmp_path / "model", precision="int8", calibrate=calibrate, image_size="192,128,256")
    assert seen == [[128, 256, 192] * EXAMPLES]
    for suffix in ("", ".128", ".256"):
        assert manifest.parity[f"image_features_w8a8{suffix}"]["cosine"] > 0.99
    report = json.loads((tmp_path / "model" / "quantization.json").read_text())
    single = convert(str(DEMO), tmp_path / "single", precision="int8")
    macs = {name: sum(check_placement(tmp_path / name / "vision.onnx", {"size": 192}).macs.values()) for name in ("model", "single")}
    assert macs["model"] == macs["single"] == sum(report["placement"]["vision"].values())
    assert sum(group["macs"] for group in report["vision"]["groups"]) == pytest.approx(macs["single"], rel=0.1)
    assert manifest.files.keys() >= single.files.keys()


def test_accuracy_bounds_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_scenes: Callable[[str, int], Path]) -> None:
    """If every quantised encoder loses too much, it stays in floats; if none loses anything, it gets the cheapest plan."""
    shares = {}
    monkeypatch.setattr(module, "DAMAGES", (0.05, 0.0))
    for name, losses in (("nothing", [0.0]), ("everything", [9.0, 0.5])):
        left = iter([*losses, losses[-1]])  # the last one is measured on this CPU
        monkeypatch.setattr(module, "points_lost", lambda *_, left=left: next(left))
        options = Options(str(demo_scenes("calibration", 32)), limit=EXAMPLES, accuracy_drop=0.5, cache=tmp_path / "cache")
        calibrate = Quantizer(options).calibrate
        convert(str(DEMO), tmp_path / name, precision="int8", calibrate=calibrate)
        shares[name] = check_placement(tmp_path / name / "vision.onnx").share("INT8")
        evaluation = json.loads((tmp_path / name / "quantization.json").read_text())["evaluation"]
        assert (evaluation["points_lost"], evaluation["points_allowed"]) == (losses[-1], 0.5)
        assert (evaluation["cpu_points_lost"], evaluation["cpu_exact_match_before"]) == (losses[-1], evaluation["exact_match_before"])
    assert shares["everything"] == 0 < 0.7 < shares["nothing"]
    left = iter([0.0, 9.0])
    monkeypatch.setattr(module, "points_lost", lambda *_: next(left))
    with pytest.raises(
        PrecisionRefused, match=r"with onnxruntime .*, CPU, .* loses 9\.00 points \(limit: 0\.5\), though a GPU would lose 0\.00"
    ):
        convert(str(DEMO), tmp_path / "never", precision="int8", calibrate=calibrate)
    monkeypatch.setattr(module, "points_lost", lambda *_: 9.0)
    with pytest.raises(FastVLMError, match=r"decoder alone loses 9\.00 points \(limit: 0\.5\), even with a floating-point encoder"):
        convert(str(DEMO), tmp_path / "never", precision="int4", calibrate=calibrate)
    assert not (tmp_path / "never").exists()


def test_an_accuracy_drop_needs_held_out_examples(demo_scenes: Callable[[str, int], Path]) -> None:
    ten = str(demo_scenes("calibration", 10))
    with pytest.raises(FastVLMError, match="has 10 examples, but calibration with --accuracy-drop needs at least 11"):
        Quantizer(Options(ten, limit=8, accuracy_drop=0.5))
    Quantizer(Options(ten, limit=8))


def test_a_folder_of_pictures_is_enough_and_bad_ones_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", layout="native")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 255, (70, 90, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    Image.new("1", (5_000, 50)).save(folder / "strip.png")
    command = ["convert", str(checkpoint), "-o", str(tmp_path / "model"), "--calib", str(folder)]  # int8 is the default here, too
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "broken.jpg" in err and "strip.png" in err
    report = json.loads((tmp_path / "model" / "quantization.json").read_text())
    assert read_manifest(tmp_path / "model").precision == "int8"
    assert report["calibration"]["used"] == 12 and "broken.jpg" in report["calibration"]["skipped"][0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--precision", "fp16", "--calib", "{data}"], "--precision fp16 has no integers to calibrate; choose int8 or int4"),
        (["--precision", "int8", "--accuracy-drop", "0.5"], "--accuracy-drop needs questions to measure the accuracy; add --calib DATA"),
        (["--precision", "int8", "--calib", "{few}"], "has 4 examples, but calibration needs at least 8"),
        (["--precision", "int8", "--calib", "{data}", "--calib-limit", "3"], "3 calibration examples are too few; give at least 8"),
        (
            ["--precision", "int8", "--calib", "{data}", "--accuracy-drop", "-1"],
            "--accuracy-drop must be greater than 0 (got -1); give a larger number",
        ),
    ],
)
def test_what_cannot_work_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_scenes: Callable[[str, int], Path], data: str, arguments: list[str], says: str
) -> None:
    arguments = [part.format(data=data, few=demo_scenes("calibration", 4)) for part in arguments]
    assert main(["convert", str(DEMO), "-o", str(tmp_path / "model"), *arguments]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_the_command_passes_everything_on(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    seen: dict[str, Any] = {}

    def convert(*_: Any, **options: Any) -> Manifest:
        seen.update(options)
        return read_manifest(model_dir)

    monkeypatch.setattr("fastvlm_edge.convert.pipeline.convert", convert)
    images = Path(data).parent
    options = f"--precision int8 --calib {data} --calib-limit 9 --accuracy-drop 1.5 --images {images} --special-tokens"
    assert main(["convert", str(DEMO), "-o", str(tmp_path / "model"), *options.split()]) == 0
    quantizer = seen["calibrate"].__self__
    assert isinstance(quantizer, Quantizer)
    cache = tmp_path / "cache" / "calibration"
    assert quantizer.options == Options(data, images, limit=9, accuracy_drop=1.5, cache=cache, special_tokens=True)


def test_special_tokens_of_the_data_are_read_if_asked_for(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.add_special_tokens(["<loc_12>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer(tmp_path / "tokenizer.json")
    example = Example("1", tmp_path / "1.png", "What is at <loc_12>?", ("a sign at <loc_12>",))
    literal, read = (module._question(example, read_manifest(model_dir), ours, special_tokens=each) for each in (False, True))
    token = ours.control_id("<loc_12>")
    assert token not in literal.ids
    assert read.ids[: read.answer].count(token) == read.ids[read.answer :].count(token) == 1
    assert len(read.positions) < len(literal.positions)


def test_special_tokens_without_data_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(DEMO), "-o", str(tmp_path / "model"), "--special-tokens"]) == 1
    assert "--special-tokens is for the questions of --calib" in capsys.readouterr().err


def test_the_cache_knows_pictures_by_their_pixels_not_by_where_they_lie(tmp_path: Path) -> None:
    digests = []
    for seed, folder in enumerate("aba"):
        (tmp_path / f"{seed}").mkdir()
        pictures = module._Pictures(tmp_path / f"{seed}")
        pictures.add(np.full((1, 3, 8, 8), {"a": 0.25, "b": 0.5}[folder], np.float32))
        pictures.add(np.zeros((1, 3, 8, 8), np.float32))
        digests.append([pictures.digest(0), pictures.digest(1)])
    assert digests[0] == digests[2]
    assert digests[0][0] != digests[1][0] and digests[0][1] == digests[1][1]


def test_a_run_that_was_broken_off_goes_on_with_what_it_had_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    encoded: list[Tensor] = []

    def encode(x: Tensor) -> Tensor:
        if len(encoded) == 15:
            raise KeyboardInterrupt
        encoded.append(x)
        return image_tokens(x)

    def cached() -> Any:
        return Quantizer(Options(data, limit=EXAMPLES, cache=tmp_path / "cache")).calibrate

    monkeypatch.setattr(module, "image_tokens", encode)
    with pytest.raises(KeyboardInterrupt):
        convert(str(DEMO), tmp_path / "model", precision="int4", calibrate=cached())
    (folder,) = (tmp_path / "cache").iterdir()
    kept = sorted(folder.iterdir())
    assert len(kept) == 15
    kept[3].write_bytes(kept[3].read_bytes()[:100])
    kept[5].write_bytes(b"")
    encoded.clear()
    convert(str(DEMO), tmp_path / "model", precision="int4", calibrate=cached())
    assert len(encoded) == EXAMPLES - 15 + 2
    monkeypatch.setattr(module, "image_tokens", lambda _x: pytest.fail("encoded again"))
    convert(str(DEMO), tmp_path / "again", precision="int4", calibrate=cached())
    for name in ("vision.weights", "decoder.weights", "vision.onnx"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_cache_that_cannot_be_written_does_not_stop_the_calibration(tmp_path: Path, data: str) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    calibrate = Quantizer(Options(data, limit=EXAMPLES, cache=tmp_path / "file")).calibrate
    convert(str(DEMO), tmp_path / "model", precision="int8", calibrate=calibrate)
    verify_files(tmp_path / "model", read_manifest(tmp_path / "model"), hashes=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


# Accuracy ----------------------------------------------------------------------------------------------------------------------


def test_points_are_of_exact_match_where_answers_are_known() -> None:
    before = Score([np.array([1, 2]), np.array([3])], 1.0)
    after = Score([np.array([1, 9]), np.array([3])], 0.5)
    assert points_lost(before, after) == 50
    assert before.agreement(after) == pytest.approx(2 / 3)
    assert points_lost(Score(before.choices, None), Score(after.choices, None)) == pytest.approx(100 / 3)
    assert points_lost(Score(before.choices, 0.0), after) == pytest.approx(100 / 3), "a model that knows no answer can lose none"


@pytest.mark.parametrize("tied", [True, False])
def test_accuracy_is_measured_with_the_weights_that_the_graph_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """Against onnxruntime on the written graph, in FP32: by default onnxruntime rounds the inputs of INT4 products to INT8."""
    import onnxruntime

    from fastvlm_edge.backends import ort_session
    from fastvlm_edge.backends.ort import HostFeatures, OrtDecoder
    from fastvlm_edge.backends.ort_session import on_device

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    monkeypatch.setattr("fastvlm_edge.convert.graphs.decoder.ACCURACY_LEVEL", 1)
    monkeypatch.setattr(ort_session, "session_options", lambda *_: options)

    source = open_checkpoint(str(write_checkpoint(tmp_path / "tiny", layout="native", tied=tied)))
    plan = precision_plan("int4")
    random = np.random.default_rng(0)
    features = random.standard_normal((6, source.text.hidden)).astype(np.float32)
    vocab = source.text.vocab
    ids = [*random.integers(0, vocab, 9).tolist(), *range(vocab, vocab + 6), *random.integers(0, vocab, 40).tolist()]
    question = Question(ids, 20, known=True)
    convert(str(tmp_path / "tiny"), tmp_path / "model", precision="int4")
    with calibrate_decoder(source, [(ids, features)], plan, directory=tmp_path) as quantized:
        found = score(QuantizedDecoder(source, quantized, plan), [question], [features], lambda: None)
        plain = score(source, [question], [features], lambda: None)
        from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
        from fastvlm_edge.convert.graphs.decoder import build_decoder
        from fastvlm_edge.convert.precision import on_cpu
        from fastvlm_edge.convert.weights.decoder import write_decoder_weights

        weights = WeightsFile(tmp_path / "model" / "decoder.weights")
        write_decoder_weights(source, plan, weights, lambda: None, quantized, context=4096)
        weights.close()
        graph = GraphBuilder("decoder", weights)
        build_decoder(graph, source.text, on_cpu(plan), provider="cpu")
        graph.save(tmp_path / "model" / "decoder.cpu.onnx")
    manifest = read_manifest(tmp_path / "model")
    out = OrtDecoder(on_device(tmp_path / "model", manifest)).step(
        ids, (HostFeatures(features, "float32"),), logit_positions=list(question.positions), want_logits=True
    )
    assert out.logits is not None
    np.testing.assert_array_equal(out.logits.argmax(1), found.choices[0])
    assert found.agreement(plain) < 1, "INT4 changes something"
