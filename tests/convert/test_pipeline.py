"""The whole conversion: what it writes, what it refuses, and that it leaves nothing behind."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from examples.checkpoints.planted_faults import plant, read_tensors, write_tensors
from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.backends.verification.compare import compare
from fastvlm_edge.cli import main
from fastvlm_edge.convert import parity
from fastvlm_edge.convert import pipeline as module
from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
from fastvlm_edge.convert.checkpoint.structure import TextConfig
from fastvlm_edge.convert.conversion import Conversion
from fastvlm_edge.convert.parity import BOUNDS, probe_activations
from fastvlm_edge.convert.pipeline import DEFAULT_PRECISIONS, convert
from fastvlm_edge.convert.precision import FP16_MAX, PLANS, VISION_STAGES, PrecisionPlan, PrecisionRefused, precision_plan
from fastvlm_edge.convert.reference.decoder import reference_logits
from fastvlm_edge.convert.request import estimated_bytes
from fastvlm_edge.convert.weights import decoder
from fastvlm_edge.model_dir.manifest import PRECISIONS, read_manifest, verify_files
from fastvlm_edge.progress import SilentProgress
from tests.support.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny-fastvlm", layout="native")


@pytest.fixture(scope="module", params=PRECISIONS)
def model(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / request.param
    convert(str(checkpoint), output, precision=request.param)
    return output


def test_a_model_directory_is_whole_and_runs(model: Path) -> None:
    manifest = read_manifest(model)
    verify_files(model, manifest, hashes=True)
    assert set(manifest.files) | {"fastvlm.json", "verified.json"} == {path.name for path in model.iterdir()}
    assert manifest.name == "tiny-fastvlm"
    assert manifest.source.layout == "native"
    assert "model.safetensors" in manifest.source.files
    with FastVLM.load(model, threads=1) as vlm:
        reply = vlm.generate("What is this?", image=np.zeros((40, 60, 3), np.uint8), max_new_tokens=4)
    assert len(reply.token_ids) == 4 or reply.stop_reason == "stop"


def test_the_inputs_and_outputs_have_the_types_that_the_manifest_names(model: Path) -> None:
    """As in docs/graphs.md: pixel_values is always float32, everything else that is not an id or a logit has the decoder's type."""
    dtype = read_manifest(model).decoder.dtype
    for file in sorted(model.glob("*.onnx")):
        graph = onnx.load(file, load_external_data=False).graph
        values = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        types = {name: onnx.helper.tensor_dtype_to_np_dtype(kind).name for name, kind in values.items()}
        expected = "float32" if file.name.endswith(".cpu.onnx") else dtype
        integers = {"input_ids", "position_ids", "logit_positions", "top_ids"}
        always_float32 = {"pixel_values", "logits", "top_values", "log_normalizer"}
        for name, found in types.items():
            assert found == ("int64" if name in integers else "float32" if name in always_float32 else expected), (file.name, name)


def test_the_manifest_has_the_figures_of_the_check(model: Path) -> None:
    manifest = read_manifest(model)
    bounds = BOUNDS[manifest.precision]
    assert bounds.features <= manifest.parity["image_features"]["cosine"] <= 1.0000001
    assert bounds.logits <= manifest.parity["logits"]["cosine"] <= 1.0000001
    if bounds.stored is None:
        assert "logits_stored_weights" not in manifest.parity
    else:
        stored = manifest.parity["logits_stored_weights"]["cosine"]
        assert max(bounds.stored, manifest.parity["logits"]["cosine"]) < stored <= 1.0000001
    assert set(manifest.activations["largest"]) == set(VISION_STAGES)
    assert all(value > 0 for value in manifest.activations["largest"].values())


def test_a_faulty_graph_is_distinguished_from_coarse_weights(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With wrong frequencies the logits are still as close to the checkpoint's as INT4 allows; the check finds the fault all the same."""
    real = decoder.rotary_tables

    def wrong(text: TextConfig, context: int) -> dict[str, Any]:
        return real(replace(text, rope_theta=text.rope_theta / 2), context)

    monkeypatch.setattr(decoder, "rotary_tables", wrong)
    with pytest.raises(FastVLMError, match=r"at position \d+ of the stored passage the KL divergence is"):
        convert(str(checkpoint), tmp_path / "model", precision="int4")
    assert not any(tmp_path.iterdir())


def test_the_user_is_told_what_the_integers_cost(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision, count in (("int4", 1), ("fp16", 0)):
        assert main(["convert", str(checkpoint), "-o", str(tmp_path / precision), "--precision", precision]) == 0
        assert capsys.readouterr().err.count("of greedy tokens are unchanged; calibration (--calib DATA) may preserve more") == count


def test_contradictions_in_the_checkpoint_reach_the_user_and_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "contradictory", layout="native")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["vocab_size"] = 24
    (source / "config.json").write_text(json.dumps(config))
    (source / "chat_template.jinja").write_text("USER: {{ messages[0].content }}")
    expected = [
        "config.json gives 24 for vocab, but the tensors have 704: used 704",
        "the chat template writes another conversation ('USER: <image>\\nWhat is this?'): ignored it, conversations are those of FastVLM, "
        "with the system text 'You are a helpful assistant.'",
    ]

    assert main(["convert", str(source), "-o", str(tmp_path / "model"), "--precision", "fp32"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [lines.count(note) for note in expected] == [1, 1]
    assert lines[-2:] == [f"note: {note}" for note in expected]  # again at the end, where they are read
    assert lines.index(expected[0]) < next(index for index, line in enumerate(lines) if line.startswith("probe vision"))
    assert read_manifest(tmp_path / "model").notes == expected


def test_the_geometry_is_that_of_the_checkpoint_unless_it_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "cropped", layout="apple")
    config = json.loads((source / "config.json").read_text()) | {"image_aspect_ratio": "square"}
    (source / "config.json").write_text(json.dumps(config))
    for asked, geometry in ((None, "crop"), ("pad", "pad")):
        manifest = convert(str(source), tmp_path / "model", precision="fp32", geometry=asked, context=512, force=True)
        assert manifest.vision.geometry == read_manifest(tmp_path / "model").vision.geometry == geometry


def test_a_consistent_checkpoint_has_no_notes_and_older_manifests_are_read(model: Path, tmp_path: Path) -> None:
    assert read_manifest(model).notes == []
    document = json.loads((model / "fastvlm.json").read_text())
    del document["notes"]
    (tmp_path / "fastvlm.json").write_text(json.dumps(document))
    assert read_manifest(tmp_path) == read_manifest(model)


def test_every_precision_has_a_plan_and_bounds() -> None:
    assert set(PLANS) == set(BOUNDS) == set(PRECISIONS)


def test_the_estimate_of_the_size_is_close(checkpoint: Path, model: Path) -> None:
    manifest = read_manifest(model)
    weights = sum(record.bytes for name, record in manifest.files.items() if name.endswith(".weights"))
    needed = estimated_bytes(open_checkpoint(str(checkpoint)), precision_plan(manifest.precision))
    assert needed < weights < needed + 4096 * 400  # each tensor begins at a page


@pytest.mark.parametrize("layout", ["apple", "hub"])
def test_both_public_layouts_give_the_same_model(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    other = write_checkpoint(tmp_path / layout, layout=layout)
    kwargs: dict[str, Any] = {"precision": "fp32", "image_size": 256, "context": 512}
    logits = []
    for number, source in enumerate((checkpoint, other)):
        output = tmp_path / f"model{number}"
        convert(str(source), output, **kwargs)
        with FastVLM.load(output, threads=1) as vlm:
            logits.append(vlm.generate("Describe it.", image=np.full((8, 8, 3), 99, np.uint8), max_new_tokens=24).token_ids)
    assert logits[0] == logits[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'; choose one of fp32, fp16"),
        ({"image_size": 300}, "image size 300 is not supported; choose 128 to 1536 in steps of 64"),
        ({"image_size": 1600}, "image size 1600 is not supported"),
        ({"geometry": "stretch"}, "unknown geometry 'stretch'; choose pad or crop"),
        ({"context": 20}, "a context of 20 is too short for a picture of 16 tokens"),
        ({"context": 10**6}, "a context of 1000000 is longer than the 32768 positions"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(checkpoint: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FastVLMError, match=message):
        convert(str(checkpoint), tmp_path / "model", **arguments)
    assert not any(tmp_path.iterdir())


def test_a_directory_with_other_files_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(FastVLMError, match="exists and is not a model directory"):
            convert(str(checkpoint), tmp_path / "mine", force=force)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_model_directory_is_replaced_only_with_force(checkpoint: Path, tmp_path: Path) -> None:
    convert(str(checkpoint), tmp_path / "model", precision="fp32")
    with pytest.raises(FastVLMError, match="add --force"):
        convert(str(checkpoint), tmp_path / "model", precision="int8")
    assert read_manifest(tmp_path / "model").precision == "fp32"
    convert(str(checkpoint), tmp_path / "model", precision="int8", force=True)
    assert read_manifest(tmp_path / "model").precision == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), FastVLMError),
        (RuntimeError("something else"), RuntimeError),
    ],
)
@pytest.mark.parametrize("stage", ["write_vision_weights", "write_decoder_weights", "check_parity"])
def test_nothing_is_left_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type[BaseException], stage: str
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(module, stage, fail)
    with pytest.raises(expected) as caught:
        convert(str(checkpoint), tmp_path / "model", precision="fp32")
    assert not any(tmp_path.iterdir())
    if expected is FastVLMError:
        assert "is full" in str(caught.value)


def test_an_output_behind_a_link_is_written_where_the_link_points(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for precision in ("fp32", "int8"):  # the empty folder, then a model that is there
        convert(str(checkpoint), tmp_path / "link", precision=precision, force=True)
        assert read_manifest(tmp_path / "link").precision == precision
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_a_place_that_cannot_be_written_is_an_error_in_one_sentence(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    with pytest.raises(FastVLMError, match=r"mounted is a mount point.*give a directory inside it: .*mounted/model"):
        convert(str(checkpoint), tmp_path / "mounted")

    def busy(self: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(FastVLMError, match=r"could not be written .*Device or resource busy"):
        convert(str(checkpoint), tmp_path / "model", precision="fp32")
    assert not any((tmp_path / "mounted").iterdir()) and [path.name for path in tmp_path.iterdir()] == ["mounted"]


def test_a_failed_replacement_keeps_the_old_model(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(str(checkpoint), tmp_path / "model", precision="fp32")
    monkeypatch.setattr(module, "check_parity", lambda *_, **__: (_ for _ in ()).throw(FastVLMError("do not agree")))
    with pytest.raises(FastVLMError, match="do not agree"):
        convert(str(checkpoint), tmp_path / "model", precision="int4", force=True)
    verify_files(tmp_path / "model", read_manifest(tmp_path / "model"), hashes=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_too_little_disk_space_is_refused_before_any_work(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(FastVLMError, match=r"needs about 8 MB, but only 0 MB are free in .*; free some space"):
        convert(str(checkpoint), tmp_path / "model", precision="fp32")


def test_the_next_conversion_removes_what_a_killed_one_left(checkpoint: Path, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".model.partial-{gone.pid}").mkdir()
    mine = tmp_path / f".model.partial-{os.getppid()}"
    mine.mkdir()
    convert(str(checkpoint), tmp_path / "model", precision="fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, "model"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_and_leaves_nothing(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "fastvlm_edge", "convert", str(checkpoint), "-o", str(tmp_path / "model")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert not any(tmp_path.iterdir())


def test_a_graph_that_disagrees_is_not_published(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real fault: the rotary base is read wrongly. The check must find it."""
    real = decoder.rotary_tables

    def wrong(text: TextConfig, context: int) -> dict[str, Any]:
        return real(replace(text, rope_theta=100.0), context)

    monkeypatch.setattr(decoder, "rotary_tables", wrong)
    with pytest.raises(FastVLMError, match=r"would give other answers .*; report it"):
        convert(str(checkpoint), tmp_path / "model", precision="fp32")
    assert not any(tmp_path.iterdir())


def test_int8_is_the_default(checkpoint: Path, tmp_path: Path) -> None:
    manifest = convert(str(checkpoint), tmp_path / "model")
    assert manifest.precision == DEFAULT_PRECISIONS[0] == "int8"
    assert manifest.notes == []


def refuse_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, the comparison with PyTorch asks of `int8` what no graph can reach."""
    monkeypatch.setitem(BOUNDS, "int8", replace(BOUNDS["int8"], logits=1.5))


def exceed_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, the probe finds activations that FP16 cannot hold."""

    def large(*args: Any, **options: Any) -> Any:
        logits, magnitudes = reference_logits(*args, **options)
        return logits, replace(magnitudes, gate=[100_000.0, *magnitudes.gate[1:]])

    monkeypatch.setattr(parity, "reference_logits", large)


@pytest.mark.parametrize(
    ("fault", "reasons", "becomes"),
    [
        (refuse_int8, {"int8": "the int8 graphs do not agree with PyTorch: the cosine of the logits is"}, "fp16"),
        (exceed_fp16, dict.fromkeys(("int8", "fp16"), "layer 0 of the LLM computes 100,000 (gate); FP16 ends at 65,504"), "bf16"),
    ],
)
def test_the_default_falls_back_and_says_why(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[pytest.MonkeyPatch], None],
    reasons: dict[str, str],
    becomes: str,
) -> None:
    fault(monkeypatch)
    assert main(["convert", str(checkpoint), "-o", str(tmp_path / "model")]) == 0
    out, err = capsys.readouterr()
    assert f", {becomes}, " in out.splitlines()[0]
    manifest = read_manifest(tmp_path / "model")
    verify_files(tmp_path / "model", manifest, hashes=True)
    assert manifest.precision == becomes and "model.safetensors" in manifest.source.files
    assert len(manifest.notes) == len(reasons)
    for note, following, (precision, reason) in zip(manifest.notes, [*list(reasons)[1:], becomes], reasons.items(), strict=True):
        assert note.startswith(f"{precision} was refused: {reason}")
        assert f"{note}; trying {following}\n" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_moves_for_one_precision_do_not_reach_the_next(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outlier channels are moved for int8; fp16 keeps the head as it is."""
    planted = plant(checkpoint, tmp_path / "planted", "everywhere", 300)
    moved = convert(str(planted), tmp_path / "int8", precision="int8").activations["moved_channels"]
    assert "llm.head" in moved and "llm.layers.0.qkv" in moved
    direct = convert(str(planted), tmp_path / "fp16", precision="fp16")
    assert not {"llm.head", *(name for name in moved if name.startswith("vision"))} & direct.activations["moved_channels"].keys()
    refuse_int8(monkeypatch)
    after = convert(str(planted), tmp_path / "model")
    assert after.precision == "fp16" and after.files == direct.files


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_mlp_beyond_fp16_is_divided_and_certified(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    tensors = read_tensors(checkpoint)
    tensors.rows("llm.layers.1.mlp.up_proj.weight", [5], 2.0**18)
    manifest = convert(str(write_tensors(tensors, checkpoint, tmp_path / "large")), tmp_path / "model", precision=precision)
    assert max(manifest.activations["decoder"]["product"]) > FP16_MAX
    assert [*manifest.activations["up_shifts"]] == ["1"]
    assert manifest.parity["rows_on_gpu"]["divergence"] < 0.01


def test_a_named_precision_is_never_replaced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_int8(monkeypatch)
    assert main(["convert", str(checkpoint), "-o", str(tmp_path / "model"), "--precision", "int8"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "the int8 graphs do not agree with PyTorch" in err and "trying" not in err
    assert not any(tmp_path.iterdir())


def test_the_checkpoint_is_opened_once_and_the_last_refusal_is_the_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, tried = list[str](), list[str]()

    def fit(plan: PrecisionPlan, *_: Any) -> PrecisionPlan:
        tried.append(plan.name)
        raise PrecisionRefused(f"{plan.name} will not do")

    def count(location: str, **options: Any) -> Any:
        opened.append(location)
        return open_checkpoint(location, **options)

    monkeypatch.setattr(module, "fit", fit)
    monkeypatch.setattr(module, "open_checkpoint", count)
    with pytest.raises(PrecisionRefused, match="fp32 will not do"):
        convert(str(checkpoint), tmp_path / "model")
    assert tried == list(DEFAULT_PRECISIONS) and opened == [str(checkpoint)]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [FastVLMError("a tensor is damaged"), OSError(errno.ENOSPC, "No space left on device")])
def test_other_errors_are_no_reason_for_another_precision(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried = list[str]()

    def fail(plan: PrecisionPlan, *_: Any) -> PrecisionPlan:
        tried.append(plan.name)
        raise error

    monkeypatch.setattr(module, "fit", fail)
    with pytest.raises(FastVLMError):
        convert(str(checkpoint), tmp_path / "model")
    assert tried == ["int8"] and not any(tmp_path.iterdir())


def test_with_calibration_the_default_is_int8_alone(checkpoint: Path, tmp_path: Path) -> None:
    tried = list[str]()

    def calibrate(conversion: Conversion, *_: Any) -> Any:
        tried.append(conversion.plan.name)
        raise PrecisionRefused("INT8 loses 3 points")

    with pytest.raises(PrecisionRefused, match="INT8 loses 3 points"):
        convert(str(checkpoint), tmp_path / "model", calibrate=calibrate)
    assert tried == ["int8"] and not any(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_model_that_does_not_fit_fp16_gets_wider_types(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """As if the checkpoint had large activations: the graphs with wider types are complete and agree with PyTorch."""
    real = probe_activations

    def probe(*args: Any) -> Any:
        largest, features = real(*args)
        return {**largest, "stage3": 20_000.0}, features

    def large(*args: Any, **options: Any) -> Any:
        logits, magnitudes = reference_logits(*args, **options)
        layers = len(magnitudes.scores)
        return logits, replace(magnitudes, scores=[40.0, *magnitudes.scores[1:]], mlp=[100_000.0] * layers)

    monkeypatch.setattr(module, "probe_activations", probe)
    monkeypatch.setattr(parity, "reference_logits", large)
    progress, notes = SilentProgress(), list[str]()
    monkeypatch.setattr(progress, "note", notes.append)
    manifest = convert(str(checkpoint), tmp_path / "model", precision=precision, progress=progress)
    (note,) = (note for note in notes if note.startswith("LLM, "))
    layers = manifest.decoder.layers
    assert re.search(
        rf"largest attention score of each layer: 40( [\d,]+){{{layers - 1}}}; largest residual stream:( [\d,]+){{{layers}}};", note
    )
    assert f"scores in FP32 in 1 of {manifest.decoder.layers} layers; MLP divided in layers 0, 1" in note
    assert manifest.plan["vision.stage2"].endswith("fp16")
    assert manifest.plan["vision.stage3"].endswith("fp32")
    assert manifest.decoder.dtype == "float16"
    assert manifest.activations["fp32_scores"] == [0]
    assert set(manifest.activations["up_shifts"].values()) == {3}
    with FastVLM.load(tmp_path / "model", threads=1) as vlm:
        assert vlm.generate("What is this?", image=np.zeros((40, 60, 3), np.uint8), max_new_tokens=4).token_ids


def test_the_manifest_says_how_large_every_layer_gets(model: Path) -> None:
    seen = read_manifest(model).activations["decoder"]
    layers = read_manifest(model).decoder.layers
    assert set(seen) == {"qkv", "scores", "attention", "gate", "product", "mlp", "residual"}
    assert all(len(values) == layers and min(values) > 0 for values in seen.values())


def test_compare_knows_the_same_from_the_opposite() -> None:
    a = np.arange(6, dtype=np.float32)
    assert compare(a, a).cosine == pytest.approx(1)
    assert compare(a, a).relative == 0
    assert compare(-a, a).cosine == pytest.approx(-1)
    assert compare(a + 1, a).largest == pytest.approx(1)


def test_the_manifest_is_plain_json(model: Path) -> None:
    document = json.loads((model / "fastvlm.json").read_text())
    assert document["schema"] == 3
    assert document["plan"]["decoder.body"]


@pytest.mark.parametrize("image_size", [320, 1536])
def test_image_sizes_in_steps_of_64(checkpoint: Path, tmp_path: Path, image_size: int) -> None:
    manifest = convert(str(checkpoint), tmp_path / "model", precision="fp32", image_size=image_size)
    assert manifest.vision.tokens == (image_size // 64) ** 2
    assert manifest.parity["image_features"]["cosine"] > BOUNDS["fp32"].features
    with FastVLM.load(tmp_path / "model") as vlm:
        assert vlm.encode_image(np.zeros((50, 90, 3), np.uint8)).numpy().shape == (manifest.vision.tokens, manifest.vision.hidden)


def test_the_command_takes_the_size_that_the_checkpoint_was_trained_at(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "ck", layout="native", image_size=192)
    assert main(["convert", str(source), "-o", str(tmp_path / "model"), "--image-size", "192", "--precision", "fp32"]) == 0
    assert read_manifest(tmp_path / "model").vision.image_size == 192
    assert main(["convert", str(source), "-o", str(tmp_path / "other"), "--image-size", "64"]) == 1
