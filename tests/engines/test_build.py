"""Building engines on a machine without a GPU: what is written, kept and refused, and that nothing is left behind.

The real TensorRT for RTX builds; only free memory, free disk space and failures are stubbed. No engine runs.
"""

from __future__ import annotations

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

import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.calib.quantizer import Options as QuantizerOptions
from fastvlm_edge.calib.quantizer import Quantizer
from fastvlm_edge.cli import main
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.engines.build import Options, build, read_layers
from fastvlm_edge.engines.engine_cache import EngineCache
from fastvlm_edge.engines.layers import count_kinds
from fastvlm_edge.machine.boards.faults import FAULTS, Fault
from fastvlm_edge.model_dir.engine_record import PARTS, RECORD_NAME, VISION_GRAPHS, read_record
from fastvlm_edge.model_dir.manifest import read_manifest, sha256
from fastvlm_edge.model_dir.verified import remember
from fastvlm_edge.nvidia.tensorrt_library import BuildSettings, Built, GraphRefusedError, Library
from tests.support.checkpoints import write_checkpoint
from tests.support.fake_cuda import FakeCuda

pytest.importorskip("tensorrt_rtx")
DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "fastvlm-demo"


class Notes:
    """A progress that records its calls."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.steps = 0

    def stage(self, name: str, total: int | None = None, *, speed: bool = False) -> None:
        self.stages.append(name)

    def advance(self, amount: int = 1) -> None:
        self.steps += amount

    def note(self, text: str) -> None:
        self.notes.append(text)

    def done(self) -> None:
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's own cache."""
    monkeypatch.setenv("FASTVLM_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("source") / "tiny-fastvlm", layout="native")
    output = tmp_path_factory.mktemp("models") / "tiny"
    convert(str(checkpoint), output, precision="int4", context=512)
    return output


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    directory = shutil.copytree(tiny, tmp_path / "model")
    remember(directory, read_manifest(directory))
    return directory


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The demo model, as CI builds it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp16", "int8", "int4"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / request.param
    convert(str(DEMO), output, precision=request.param)
    return output


@pytest.mark.parametrize("target", ["sm86", pytest.param("sm89", marks=pytest.mark.slow), pytest.param("sm120", marks=pytest.mark.slow)])
def test_engines_of_the_demo_model(demo: Path, target: str) -> None:
    record = build(demo, target, Options(report=True))
    folder = demo / "engines" / target
    assert record == read_record(folder)
    assert left_in(folder) == [RECORD_NAME, "decoder.engine", "layers.json", "vision.engine"]
    assert {name: (sha256(folder / name), (folder / name).stat().st_size) for name in record.files} == {
        name: (entry.sha256, entry.bytes) for name, entry in record.files.items()
    }
    assert not record.verified
    layers = read_layers(folder)
    manifest = read_manifest(demo)
    for part in PARTS:
        assert any(kind in ("gemm", "runtime_fusion", "correlation") for kind, _, _ in count_kinds(layers[part]))
    nodes = {node for layer in layers["decoder"] for node in layer.nodes}
    assert {f"/layers.{layer}/mlp/down/MatMul" for layer in range(manifest.decoder.layers)} <= nodes
    stored = {constant.dtype for layer in layers["decoder"] for constant in layer.constants if constant.values > 10_000}
    assert {"fp16": {"Half"}, "int8": {"Int8"}, "int4": {"Int8", "Int4"}}[manifest.precision] <= stored


# Several sizes of pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_one_engine_has_the_weights_once_and_a_profile_for_each_size(tmp_path: Path, precision: str) -> None:
    """Each profile has as many kernels as the engine for that size alone."""
    checkpoint = write_checkpoint(tmp_path / "tiny-fastvlm", layout="native")
    bytes_of, kernels = {}, {}
    for sizes in ((256,), (128,), (256, 128)):
        model = tmp_path / "-".join(map(str, sizes))
        convert(str(checkpoint), model, precision=precision, context=512, image_size=sizes)
        record = build(model, "sm86", Options(report=True))
        assert [*record.files] == ["vision.engine", "decoder.engine"]
        assert record.profiles["vision"] == [{"pixel_values": [[1, 3, size, size]] * 3} for size in sizes]
        bytes_of[sizes] = record.files["vision.engine"].bytes
        layers = read_layers(model / "engines" / "sm86")["vision"]
        kernels[sizes] = sum(layer.kind not in ("shape_call", "signal", "wait") for layer in layers)
        notes = Notes()
        assert build(model, "sm86", Options(report=True), progress=notes) == record and "is up to date" in notes.notes[-1]
    assert kernels[256, 128] == pytest.approx(kernels[256,] + kernels[128,], abs=4)
    weights = (tmp_path / "256" / "vision.weights").stat().st_size
    assert bytes_of[256, 128] < bytes_of[256,] + bytes_of[128,] - weights / 2


# What is kept and built again ---------------------------------------------------------------------------------------------------


def test_engines_that_are_up_to_date_are_not_built_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(model, "sm86")
    notes = Notes()
    with monkeypatch.context() as patched:
        patched.setattr(Library, "build", None)
        assert build(model, "sm86", progress=notes) == first
    assert any("is up to date" in note for note in notes.notes)
    parity = {"device": "GPU", "faults": [{"part": "decoder", "text": "a row is wrong"}]}
    replace(first, parity=parity).write(model / "engines" / "sm86")
    assert not build(model, "sm86").faults, "refused engines are up to date"
    (model / "engines" / "sm86" / "vision.engine").write_bytes(b"short")
    again = build(model, "sm86")
    assert (model / "engines" / "sm86" / "vision.engine").stat().st_size == again.files["vision.engine"].bytes > 1e6


def test_another_model_directory_of_the_same_graphs_gets_its_engines_from_the_cache(
    model: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(model, "sm86")
    shutil.rmtree(model)
    other = shutil.copytree(tiny, tmp_path / "other")

    def build_anew(*_given: Any, **_options: Any) -> Built:
        raise LookupError("nothing of the cache fits")

    monkeypatch.setattr(Library, "build", build_anew)
    again = build(other, "sm86")
    assert again.files == first.files
    assert again.build["decoder"]["cached"]
    for target, options in (("sm89", None), ("sm86", Options(workspace=1 << 28)), ("sm86", Options(separate_profiles=True))):
        with pytest.raises(LookupError):
            build(other, target, options)


def test_the_cache_forgets_what_was_unused_for_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_edge.engines.engine_cache.LIMIT", 250)
    cache = EngineCache(tmp_path / "cache")
    engine = tmp_path / "engine"
    for number in range(4):
        engine.write_bytes(bytes([number]) * 100)
        cache.keep(f"key{number}", engine)
        engine.unlink()
        os.utime(tmp_path / "cache" / f"key{number}.engine", (number, number))
    kept = [cache.fetch(f"key{number}", tmp_path / f"copy{number}") for number in range(4)]
    assert kept == [False, False, True, True]
    assert (tmp_path / "copy3").read_bytes() == b"\3" * 100


def test_a_cache_that_cannot_be_written_costs_only_time(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    record = build(model, "sm86", Options(cache=tmp_path / "file"))
    assert not record.build["vision"]["cached"]
    assert build(model, "sm86", Options(cache=None, force=True)).files.keys() == record.files.keys()


# What is refused ----------------------------------------------------------------------------------------------------------------


def test_wrong_targets_and_precisions_are_refused_before_anything_is_built(model: Path, tmp_path: Path) -> None:
    no_gpu = r"there is no GPU to build for \(.*\); choose a target with --target"
    for target, says in (
        ("orin9", r"target 'orin9' is unknown; use one of: auto, rtx, orin-nano"),
        ("auto", no_gpu),
        ("orin", "TensorRT is not installed; install tensorrt, or on a Jetson that of JetPack"),
    ):
        with pytest.raises(FastVLMError, match=says):
            build(model, target)
    bf16 = tmp_path / "bf16"
    convert(str(DEMO), bf16, precision="bf16")
    with pytest.raises(FastVLMError, match=r"Turing.* \(sm75\) has no BF16, which --precision bf16 computes in; convert with"):
        build(bf16, "sm75")
    with pytest.raises(FastVLMError, match="TensorRT is not installed; install tensorrt"):
        build(model, "sm75")  # TensorRT for RTX has no FP32 products for it
    with pytest.raises(FastVLMError, match="has only strongly typed networks; build without --weakly-typed"):
        build(model, "sm86", Options(weakly_typed=True))
    assert not (model / "engines").exists() or not any((model / "engines").iterdir())


def test_an_early_manifest_without_sizes_is_still_built(model: Path) -> None:
    manifest = read_manifest(model)
    replace(manifest, decoder=replace(manifest.decoder, heads=0)).write(model)
    assert build(model, "sm86").files


def test_too_little_memory_is_predicted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_edge.engines.memory.available_memory", lambda: (100 << 20, 8 << 20))
    says = (
        r"vision.engine needs about 3\d\d MiB of memory, but only 100 MiB of memory and 8 MiB of swap are free; close .*, add 1 GiB of swap"
    )
    with pytest.raises(FastVLMError, match=says):
        build(model, "sm86")
    assert build(model, "sm86", Options(check_memory=False)).files


def test_too_little_disk_is_said_before_any_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(FastVLMError, match=r"the engines need about \d MB, but the disk of .* has only 0 MB free; free some space"):
        build(model, "sm86")


def test_a_graph_that_tensorrt_refuses_is_explained(model: Path) -> None:
    graph = model / "decoder.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"Sigmoid", b"Sigmoix"))
    remember(model, read_manifest(model))  # otherwise it is a damaged file
    with pytest.raises(FastVLMError, match=r"tensorrt_rtx 1\.[\d.]+ does not accept .*decoder\.onnx: .*Sigmoix"):
        build(model, "sm86")
    assert not (model / "engines").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("something")])
def test_nothing_is_left_behind_and_what_was_there_stays(model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    before = build(model, "sm86")
    real = Library.build

    def fail(self: Library, graph: Path, settings: Any, **options: Any) -> Any:
        if graph.name == "decoder.onnx":
            raise error
        return real(self, graph, settings, **options)

    monkeypatch.setattr(Library, "build", fail)
    with pytest.raises(FastVLMError if isinstance(error, OSError) else type(error)) as caught:
        build(model, "sm86", Options(force=True))
    if isinstance(error, OSError):
        assert "is full; nothing was left there" in str(caught.value)
    assert left_in(model / "engines") == ["sm86"]
    assert read_record(model / "engines" / "sm86") == before
    assert all((model / "engines" / "sm86" / name).stat().st_size == entry.bytes for name, entry in before.files.items())


def test_ctrl_c_in_the_middle_of_a_build(model: Path) -> None:
    """The monitor is called from within TensorRT; the exception comes out on this side."""

    class Impatient(Notes):
        def advance(self, amount: int = 1) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, "sm86", progress=Impatient())
    assert not (model / "engines").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command(model: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "fastvlm_edge", "build", str(model), "--target", "sm86"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(model.glob("engines/.sm86.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert not (model / "engines").exists()


# A machine with a GPU -----------------------------------------------------------------------------------------------------------


class Seen:
    """What a build gave to the library."""

    def __init__(self) -> None:
        self.settings: list[BuildSettings] = []
        self.inspected = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """A GPU that shares the memory of the host, and a builder whose log lists no layers."""
    seen, real = Seen(), Library.build

    def unlisted(self: Library, graph: Path, settings: BuildSettings, **options: Any) -> Built:
        seen.settings.append(settings)
        return replace(real(self, graph, settings, **options), listing="")

    def inspect(self: Library, plan: Any) -> str:
        seen.inspected += 1
        return (Path(__file__).with_name("listings") / "tensorrt_10.json").read_text(encoding="utf-8")

    monkeypatch.setattr(Library, "build", unlisted)
    monkeypatch.setattr(Library, "inspect", inspect)
    monkeypatch.setattr("fastvlm_edge.engines.build.open_cuda", lambda: FakeCuda(integrated=True))
    return seen


def test_a_plan_is_loaded_to_list_its_layers_only_for_a_report(model: Path, seen: Seen) -> None:
    notes = Notes()
    build(model, "sm86", progress=notes)
    assert seen.inspected == 0
    build(model, "sm86", Options(report=True), progress=notes)
    assert seen.inspected == len(PARTS)
    assert sum("converts 1 integer matrices to floats" in note for note in notes.notes) == len(PARTS)
    assert len(read_layers(model / "engines" / "sm86")["vision"]) == 7


@pytest.mark.parametrize(("wanted", "given"), [(None, 1 << 30), (1 << 28, 1 << 28)])
def test_scratch_memory_has_a_limit_where_gpu_and_host_share_it(model: Path, seen: Seen, wanted: int | None, given: int) -> None:
    record = build(model, "sm86", Options(workspace=wanted))
    assert {settings.workspace for settings in seen.settings} == {record.flags["workspace"]} == {given}


def test_a_graphics_card_has_no_limit(model: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_edge.engines.build.open_cuda", FakeCuda)
    build(model, "sm86")
    assert {settings.workspace for settings in seen.settings} == {None}


def test_the_gpu_that_built_engines_is_in_their_record(model: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(integrated=True)
    cuda.device = replace(cuda.device, multiprocessors=8)
    monkeypatch.setattr("fastvlm_edge.engines.build.open_cuda", lambda: cuda)
    record = build(model, "sm86")
    assert (record.device, record.multiprocessors, record.memory_bytes) == ("Fake GPU", 8, cuda.device.total_bytes)


def test_known_faults_of_the_library_are_said(model: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault((1,), (2,), "wrong on Mondays", "wait a day", "issue 1")
    monkeypatch.setitem(FAULTS, "tensorrt_rtx", (fault,))
    notes = Notes()
    build(model, "sm86", progress=notes)
    says = re.compile(r"warning: tensorrt_rtx 1\.[\d.]+: wrong on Mondays; wait a day \(issue 1\)$")
    assert any(says.match(note) for note in notes.notes)
    monkeypatch.setitem(FAULTS, "tensorrt_rtx", (replace(fault, only_dynamic=True),))
    for static in (False, True):
        notes = Notes()
        build(model, "sm86", Options(static=static), progress=notes)
        assert any(says.match(note) for note in notes.notes) != static, "fixed shapes are the remedy"
    several = convert(
        str(write_checkpoint(model.parent / "ck", layout="native")), model.parent / "several", context=512, image_size=[256, 128]
    )
    assert several.vision.other_sizes
    notes = Notes()
    build(model.parent / "several", "sm86", Options(static=True), progress=notes)
    assert any(says.match(note) for note in notes.notes), "an encoder for several sizes has no fixed shapes"


# INT8 activations that the builder refuses --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, demo_scenes: Callable[[str, int], Path]) -> Path:
    output = tmp_path_factory.mktemp("calibrated") / "int8"
    quantizer = Quantizer(QuantizerOptions(str(demo_scenes("calibration", 16)), limit=16))
    convert(str(DEMO), output, precision="int8", calibrate=quantizer.calibrate)
    return output


def refuse(monkeypatch: pytest.MonkeyPatch, *graphs: str, reason: str = "No matching rules for dequantize") -> list[str]:
    """Let the builder refuse these graphs. Returns the list of all graphs that it gets."""
    real, tried = Library.build, list[str]()

    def build_or_refuse(self: Library, graph: Path, settings: BuildSettings, **options: Any) -> Built:
        tried.append(graph.name)
        if graph.name in graphs:
            raise GraphRefusedError(f"it could not build {graph.name}: {reason}")
        return real(self, graph, settings, **options)

    monkeypatch.setattr(Library, "build", build_or_refuse)
    return tried


@pytest.mark.parametrize("refused", range(3))
def test_another_graph_of_the_encoder_is_built_if_the_first_is_refused(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: int
) -> None:
    model, graphs = shutil.copytree(calibrated, tmp_path / "model"), list(VISION_GRAPHS)
    tried = refuse(monkeypatch, *graphs[:refused])
    notes = Notes()
    record = build(model, "sm86", Options(report=True), progress=notes)
    assert tried == [*graphs[: refused + 1], "decoder.onnx"]
    assert record.build["vision"]["graph"] == graphs[refused]
    assert ("refused" in record.build["vision"]) == (refused > 0)
    said = [note for note in notes.notes if "trying the encoder" in note]
    assert len(said) == refused and all("No matching rules for dequantize" in note for note in said)
    layers = read_layers(model / "engines" / "sm86")["vision"]
    int8 = [layer for layer in layers if any(tensor.dtype == "Int8" for tensor in layer.inputs) and layer.kind in ("correlation", "gemm")]
    assert (len(int8) >= 10) == (refused < 2), "the real builder computes INT8 products from both graphs with activation scales"
    assert main(["build", str(model), "--target", "sm86"]) == 0
    out = capsys.readouterr().out
    assert (f"vision.engine was built from {graphs[refused]}: it could not build vision.onnx" in out) == (refused > 0)


def test_a_refused_graph_is_not_tried_again_while_the_cache_has_the_other(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(calibrated, tmp_path / "model")
    tried = refuse(monkeypatch, "vision.onnx")
    first = build(model, "sm86")
    shutil.rmtree(model / "engines")
    tried.clear()
    again = build(model, "sm86")
    assert tried == [] and again.files == first.files and again.build["vision"]["graph"] == "vision.fp32-scales.onnx"


def test_if_every_graph_is_refused_the_last_reason_is_the_error(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(calibrated, tmp_path / "model")
    refuse(monkeypatch, *VISION_GRAPHS)
    with pytest.raises(FastVLMError, match=r"could not build vision\.float-inputs\.onnx"):
        build(model, "sm86")
    assert not (model / "engines").exists()


def test_a_model_that_was_not_calibrated_has_one_graph_of_the_encoder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = refuse(monkeypatch, "vision.onnx")
    with pytest.raises(FastVLMError, match=r"could not build vision\.onnx"):
        build(model, "sm86")
    assert tried == ["vision.onnx"]


# The command --------------------------------------------------------------------------------------------------------------------


def test_the_command_builds_reports_and_prints(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(model), "--target", "rtx", "--report", "--workspace", "256"]) == 0
    out, err = capsys.readouterr()
    assert "vision.engine: " in out and "decoder.engine: " in out and "runtime_fusion" in out
    assert out.splitlines()[-1].startswith(f"{model}/engines/rtx: tensorrt_rtx 1.")
    assert "compute capability 8.6, 8.9, 12.0" in out and "not yet verified" in out
    assert "converts 20 integer matrices to floats in memory at every run" in err
    assert "were not verified (this machine has no GPU for them)" in err
    document = json.loads((model / "engines" / "rtx" / RECORD_NAME).read_text())
    assert document["flags"]["workspace"] == 256 << 20
    (model / "engines" / "rtx" / "layers.json").unlink()
    assert main(["build", str(model), "--target", "rtx", "--report", "--workspace", "256"]) == 0, "up to date, but for its report"
    assert "runtime_fusion" in capsys.readouterr().out
    assert document["profiles"]["decoder"][0]["input_ids"] == [[1, 1], [1, 1], [1, 512]]


def test_the_command_lists_targets_and_wants_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--list-targets"]) == 0
    out = capsys.readouterr().out
    assert "orin-nano  8.7" in out and "Jetson Orin Nano 8 GB" in out and "8 GiB" in out
    assert main(["build"]) == 2
    assert main(["build", "gone", "--target", "sm86"]) == 1
    assert "is not a model directory" in capsys.readouterr().err
