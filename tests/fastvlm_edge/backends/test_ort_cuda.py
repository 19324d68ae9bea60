"""`ort-cuda` with host memory as the device and onnxruntime's CPU provider as the GPU: everything but CUDA itself. Not yet run on one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.backends import load_ort_cuda as loader
from fastvlm_edge.backends import ort_session
from fastvlm_edge.backends.load_ort_cuda import EVIDENCE, VERDICT_NAME, describe_device, load_ort_cuda, read_verdict
from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.ort_copy import identities
from fastvlm_edge.backends.ort_device import DeviceArray, DeviceCache, DeviceDecoder
from fastvlm_edge.backends.protocol import Backend
from fastvlm_edge.backends.select import select
from fastvlm_edge.backends.verification.check import check
from fastvlm_edge.backends.verification.reference import Reference
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest
from fastvlm_edge.nvidia.cuda import OutOfDeviceMemory
from fastvlm_edge.progress import SilentProgress
from tests.support.fake_model import build_model
from tests.support.host_as_gpu import DRIVER, GPU, host_as_gpu

ROOT = Path(__file__).resolve().parents[3]
CARD = "NVIDIA GeForce RTX 4060, 580.95.05, 8.9, 8188, 7000, 41\n"


class Notes(SilentProgress):
    """Keeps the notes for the user."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "model")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every check that runs."""
    ran: list[str] = []
    real = check

    def spy(backend: OrtBackend, reference: Reference, manifest: Manifest, progress: Any, name: str) -> Any:
        ran.append(name)
        return real(backend, reference, manifest, progress, name)

    monkeypatch.setattr(loader, "check", spy)
    return ran


def load(model: Path, gpu: str = GPU, driver: str = DRIVER) -> OrtBackend:
    with host_as_gpu(gpu, driver):
        return load_ort_cuda(model, read_manifest(model), threads=1)


def spoil(model: Path) -> None:
    """A GPU that computes keys wrongly: the graph adds one to the first layer's."""
    path = model / "decoder.cuda.onnx"
    graph = onnx.load(path)
    node = next(node for node in graph.graph.node if node.op_type == "ScatterElements")
    one = onnx.numpy_helper.from_array(np.float32(1), "one")
    graph.graph.initializer.append(one)
    wrong = onnx.helper.make_node("Add", [node.input[2], "one"], ["wrong"])
    graph.graph.node.insert([*graph.graph.node].index(node), wrong)
    node.input[2] = "wrong"
    onnx.save(graph, path)


# The check ----------------------------------------------------------------------------------------------------------------------


def test_the_first_load_checks_and_the_next_ones_remember(model: Path, checks: list[str]) -> None:
    load(model).close()
    verdict = read_verdict(model)
    assert verdict is not None and not verdict.faults and verdict.figures["cases"]
    assert (verdict.device, verdict.driver, verdict.onnxruntime) == (GPU, DRIVER, ort.__version__)
    assert set(verdict.files) == {"vision.onnx", "decoder.cuda.onnx"}
    load(model).close()
    assert checks == ["ort-cuda (first load only)"]


@pytest.mark.parametrize("change", ["device", "driver", "version", "files", "damaged", "without a driver"])
def test_another_gpu_driver_version_or_conversion_is_checked_again(
    model: Path, checks: list[str], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model).close()
    if change == "version":
        monkeypatch.setattr(ort, "__version__", "9.9.9")
    if change == "files":
        manifest = json.loads((model / "fastvlm.json").read_text())
        manifest["files"]["decoder.cuda.onnx"]["sha256"] = "0" * 64
        (model / "fastvlm.json").write_text(json.dumps(manifest))
    if change == "damaged":
        (model / VERDICT_NAME).write_text("{")
    if change == "without a driver":  # of an earlier version
        verdict = json.loads((model / VERDICT_NAME).read_text())
        del verdict["driver"]
        (model / VERDICT_NAME).write_text(json.dumps(verdict))
    load(model, "NVIDIA A2 8.6" if change == "device" else GPU, "590.1" if change == "driver" else DRIVER).close()
    assert len(checks) == 2


def test_wrong_answers_are_refused_with_figures_now_and_later(model: Path, checks: list[str]) -> None:
    spoil(model)
    with pytest.raises(
        FastVLMError, match=r"RTX 4060 8.9 disagrees with .*: decoder: .*the results of both are in .*; report this"
    ) as first:
        load(model)
    assert "is accepted" in first.value.what
    assert (model / EVIDENCE / "figures.json").is_file()
    with pytest.raises(FastVLMError, match="at an earlier load"):
        load(model)
    assert len(checks) == 1
    (model / VERDICT_NAME).unlink()
    with pytest.raises(FastVLMError, match="the results of both"):
        load(model)


def test_a_read_only_directory_is_checked_at_every_load(model: Path, checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(loader, "whole_file", denied)
    for _ in range(2):
        load(model).close()
    assert len(checks) == 2


# auto ---------------------------------------------------------------------------------------------------------------------------


def auto(model: Path) -> tuple[Backend, list[str]]:
    progress = Notes()
    return select("auto", model, read_manifest(model), threads=1, progress=progress), progress.notes


def test_auto_takes_it_where_onnxruntime_has_the_provider(model: Path) -> None:
    with host_as_gpu():
        backend, _ = auto(model)
    assert backend.name == "ort-cuda" and "no TensorRT engines" in backend.description
    backend.close()
    backend, notes = auto(model)
    assert backend.name == "ort" and not notes
    backend.close()


def test_auto_takes_the_cpu_after_wrong_answers_and_says_so(model: Path) -> None:
    spoil(model)
    with host_as_gpu():
        backend, notes = auto(model)
    assert backend.name == "ort"
    assert "disagrees with" in notes[-1] and notes[-1].startswith("not using ort-cuda") and "disagrees" in backend.description
    backend.close()


def test_a_model_without_a_graph_for_it_is_refused_by_name_and_ignored_by_auto(model: Path) -> None:
    manifest = json.loads((model / "fastvlm.json").read_text())
    del manifest["files"]["decoder.cuda.onnx"]
    (model / "fastvlm.json").write_text(json.dumps(manifest))
    with host_as_gpu():
        with pytest.raises(FastVLMError, match=r"has no decoder.cuda.onnx.*--precision int4, int8, fp16 or bf16"):
            select("ort-cuda", model, read_manifest(model))
        backend, notes = auto(model)
    assert backend.name == "ort" and not notes
    backend.close()


def test_a_machine_without_a_gpu_is_an_error_and_not_a_slow_cpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime falls back to its CPU provider in silence if CUDA cannot start, as on this machine."""
    given: list[Any] = []
    real = ort.InferenceSession

    def session(path: str, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
        given.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(FastVLMError, match="could not start CUDAExecutionProvider"):
        select("ort-cuda", model, read_manifest(model))
    assert given[0] == [("CUDAExecutionProvider", ort_session.CUDA_OPTIONS), "CPUExecutionProvider"]
    backend, notes = auto(model)
    assert backend.name == "ort" and "could not start CUDAExecutionProvider" in backend.description and len(notes) == 1
    backend.close()


# The device ---------------------------------------------------------------------------------------------------------------------


def test_a_step_writes_the_new_id_and_its_position_and_nothing_else(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load(model)
    writes: list[list[int]] = []
    allocated: list[list[int]] = []
    write, create = DeviceArray.write, DeviceArray.__init__

    def spy(self: DeviceArray, array: Any) -> None:
        writes.append(self.shape)
        write(self, array)

    def allocate(self: DeviceArray, shape: Any, dtype: str, device: str) -> None:
        allocated.append(list(shape))
        create(self, shape, dtype, device)

    monkeypatch.setattr(DeviceArray, "write", spy)
    monkeypatch.setattr(DeviceArray, "__init__", allocate)
    pictures = (backend.encode(np.full((1, 3, 256, 256), 0.5, np.float32)),)
    backend.step([1, 2, 512, 513], pictures)
    backend.step([3], pictures)
    assert [16, 8] in writes  # the features, once
    writes.clear()
    allocated.clear()
    for token in range(200):
        backend.step([token], pictures)
    assert writes == [[1, 1], [1, 1]] * 200 and not allocated
    backend.close()


def test_a_failed_step_leaves_the_cache_as_it_was(model: Path) -> None:
    backend = load(model)
    backend.step([1, 2, 3])
    with pytest.raises(FastVLMError, match="onnxruntime failed in the decoder graph"):
        backend.step([100_000])  # beyond the embedding and the features
    assert backend.lengths[0] == 3
    with pytest.raises(FastVLMError, match="do not fit into the context of 2048"):
        backend.step([1] * 2046)
    backend.truncate(2)
    assert backend.lengths[0] == 2
    backend.close()


def test_bfloat16_is_bound_as_bfloat16_and_read_back_as_bits() -> None:
    bits = np.array([[0x3F80, 0xC000]], np.uint16)  # 1, -2
    memory = DeviceArray((1, 2), "bfloat16", "cpu")
    memory.write(bits)
    np.testing.assert_array_equal(memory.read(), bits)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT)],
        "cast",
        [value("x", onnx.TensorProto.BFLOAT16, [1, 2])],
        [value("y", onnx.TensorProto.FLOAT, [1, 2])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    memory.bind(binding, input="x")
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], [[1, -2]])


@pytest.mark.parametrize("reason", ["Failed to allocate memory for requested buffer of size 4096", "CUDA failure 2: out of memory ; GPU=0"])
def test_a_cache_that_does_not_fit_says_how_much_is_needed(model: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    fail(monkeypatch, reason)
    with pytest.raises(OutOfDeviceMemory, match=r"MiB of GPU memory are needed.*choose a smaller context"):
        DeviceCache(read_manifest(model).decoder, "cuda")


def test_another_failure_on_the_device_is_not_called_a_lack_of_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "CUDA failure 100: no CUDA-capable device is detected")
    with pytest.raises(FastVLMError, match=r"onnxruntime cannot allocate memory on cuda: CUDA failure 100.*doctor") as caught:
        DeviceCache(read_manifest(model).decoder, "cuda")
    assert not isinstance(caught.value, OutOfDeviceMemory)


def fail(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Let onnxruntime fail to allocate on a device."""

    def allocate(*_: Any) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", allocate)


def test_the_gpu_is_named_by_nvidia_smi_or_the_board(tmp_path: Path) -> None:
    def smi(command: Sequence[str]) -> str | None:
        return CARD if any("--query-gpu" in word for word in command) else None

    assert describe_device(Probe(tmp_path, run=smi, environ={})) == ("NVIDIA GeForce RTX 4060 8.9", "580.95.05")
    visible = Probe(tmp_path, run=smi, environ={"CUDA_VISIBLE_DEVICES": "1"})
    assert describe_device(visible)[0] == "NVIDIA GeForce RTX 4060 8.9, CUDA_VISIBLE_DEVICES=1"
    board = Probe(tmp_path, run=lambda command: None, environ={})
    assert describe_device(board) == ("unknown GPU", "")
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "proc" / "device-tree" / "model").write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    assert describe_device(board) == ("NVIDIA Jetson AGX Orin Developer Kit", "Jetson Linux 36.4.3")


# The demo model -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_demo_passes_the_check_and_answers_as_on_the_cpu(precision: str, tmp_path: Path) -> None:
    model = tmp_path / precision
    convert(str(ROOT / "examples" / "demo" / "fastvlm-demo"), model, precision=precision, context=704)
    with host_as_gpu():
        on_device = FastVLM.load(model, "ort-cuda", threads=2)
    picture, question = ROOT / "fastvlm_edge" / "pictures" / "coffee.jpg", "How many red circles are there?"
    with on_device as vlm, FastVLM.load(model, "ort", threads=2) as cpu:
        assert vlm.generate(question, picture, max_new_tokens=8).text == cpu.generate(question, picture, max_new_tokens=8).text
    verdict = read_verdict(model)
    assert verdict is not None and not verdict.faults
    compare_slots(model)


def compare_slots(model: Path) -> None:
    """Three conversations in one call, one of them copied and one restored, against each alone: log probabilities of the candidates."""
    with host_as_gpu():
        backends = [OrtBackend(model, read_manifest(model), threads=2, slots=n, cuda=True, load_decoder=DeviceDecoder) for n in (3, 1)]
    together, alone = backends
    ids = [list(range(40, 60)), list(range(40, 75)), list(range(90, 97))]
    together.step(ids[1], slot=0)
    together.copy(0, 1, 35)
    together.step(ids[2], slot=0)  # is forgotten again
    saved = together.save(1)
    assert saved is not None
    together.restore(saved, 0, 20)
    together.step(ids[2], slot=2)
    for step in range(4):
        found = together.decode([100 + step, 200 + step, 300 + step])
        for slot in range(3):
            ids[slot].append(100 * (slot + 1) + step)
            alone.reset()
            alone.step(ids[slot][:-1])
            expected = alone.step(ids[slot][-1:], want_logits=True)
            assert expected.logits is not None
            np.testing.assert_allclose(found.top_values[slot], expected.logits[0][found.top_ids[slot]], atol=0.05)
            np.testing.assert_allclose(found.log_normalizer[slot], expected.log_normalizer[0], atol=0.05)
    for backend in backends:
        backend.close()


def test_a_copy_for_which_there_is_no_memory_is_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with host_as_gpu():
        backend = OrtBackend(model, read_manifest(model), threads=1, slots=2, cuda=True, load_decoder=DeviceDecoder)
    backend.step([1, 2, 3], slot=1)
    with monkeypatch.context() as patch:
        fail(patch, "Failed to allocate memory for requested buffer of size 4096")
        assert backend.save(1) is None
    assert backend.lengths == [0, 3] and backend.save(1) is not None
    backend.close()


@pytest.mark.parametrize("kind", [onnx.TensorProto.UINT16, onnx.TensorProto.UINT32])
def test_the_graph_that_copies_is_a_valid_model(kind: int) -> None:
    graph = onnx.load_from_string(identities(200, kind))
    onnx.checker.check_model(graph, full_check=True)
    assert [(node.op_type, *node.input, *node.output) for node in graph.graph.node] == [("Identity", f"x{n}", f"y{n}") for n in range(200)]
    assert {value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)} == {kind}


def test_features_of_the_gpu_do_not_fit_another_type(model: Path, tmp_path: Path) -> None:
    backend = load(model)
    other = build_model(tmp_path / "half", dtype="float16")
    half = OrtBackend(other, read_manifest(other), threads=1)
    with pytest.raises(FastVLMError, match="another model or backend"):
        backend.step([512], (half.upload(np.zeros((1, 8), np.float32)),))
    half.close()
    backend.close()
