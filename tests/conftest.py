"""Fixtures that several folders share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

from fastvlm_edge import FastVLM
from fastvlm_edge.backends.load_engines import load_engines
from fastvlm_edge.backends.verification.reference import REFERENCE_NAME, compute_reference
from fastvlm_edge.generation.engine import Engine
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.machine.probe import usable_cores
from fastvlm_edge.model_dir.manifest import FileRecord, read_manifest, sha256
from fastvlm_edge.model_dir.verified import remember
from fastvlm_edge.progress import SilentProgress
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_engine import build_engines, fake_gpu
from tests.support.fake_libcuda import Libcuda, compiler, machine_with_libcuda
from tests.support.fake_model import build_model
from tests.support.host_as_gpu import host_as_gpu

# Several workers of pytest-xdist share the cores. PyTorch's threads would otherwise wait for each other in loops that use them up.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

settings.register_profile("fastvlm-edge", deadline=None)  # a loaded machine may pause at any time
settings.load_profile("fastvlm-edge")

# A shell's job in the background ignores it, and so would the processes that the tests of Ctrl-C start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory; do not write to it."""
    directory = build_model(tmp_path_factory.mktemp("fake") / "model")
    manifest = read_manifest(directory)
    compute_reference(directory, manifest, SilentProgress(), threads=1).write(directory)
    path = directory / REFERENCE_NAME
    files = {**manifest.files, path.name: FileRecord(sha256(path), path.stat().st_size)}
    manifest = replace(manifest, files=files)
    manifest.write(directory)
    remember(directory, manifest)
    return directory


@pytest.fixture(scope="session", params=["ort", "ort-cuda", "tensorrt"])
def vlm(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastVLM]:
    """The tiny model, loaded, on onnxruntime, also with host memory as a GPU, and on TensorRT over a fake GPU; do not close it."""
    if request.param == "ort":
        with FastVLM.load(model_dir, "ort", threads=1) as loaded:
            yield loaded
        return
    if request.param == "ort-cuda":
        directory = shutil.copytree(model_dir, tmp_path_factory.mktemp("ort-cuda") / "model")
        with host_as_gpu():
            on_device = FastVLM.load(directory, "ort-cuda", threads=1)
        with on_device as loaded:
            yield loaded
        return
    cuda = FakeCuda()
    directory = shutil.copytree(model_dir, tmp_path_factory.mktemp("engines") / "model")
    build_engines(directory)
    manifest = read_manifest(directory)
    with fake_gpu(cuda):
        backend = load_engines(directory, manifest)
    with FastVLM(manifest, TextTokenizer(directory / "tokenizer.json"), Engine(backend, manifest.decoder)) as loaded:
        yield loaded
    assert not any(cuda.live().values())


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libcuda]:
    """A machine whose driver is the stand-in for libcuda.so.1."""
    pytest.importorskip("cuda.bindings.driver")
    if compiler() is None:
        pytest.skip("there is no C compiler, which the stand-in for libcuda.so.1 needs")
    with machine_with_libcuda(tmp_path_factory.mktemp("libcuda")) as machine:
        yield machine


@pytest.fixture(scope="session")
def demo_scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """(split, count) -> `questions.jsonl` of the demo's first scenes of that split, drawn once a session; do not write beside it."""
    folder = tmp_path_factory.mktemp("scenes")

    def questions(split: str, count: int) -> Path:
        from examples.demo_training.scenes import scene_questions  # it draws with matplotlib's fonts

        return scene_questions(folder, split, count)

    return questions
