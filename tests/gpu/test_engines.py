"""Engines of the demo model on a real GPU: agreement with the reference, answers, CUDA graphs, cache and memory. Nothing is stubbed."""

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from examples.demo_training.drawing.picture import Scene
from examples.demo_training.scenes import make_scene
from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.backends.kv_cache import FIRST_CAPACITY
from fastvlm_edge.backends.protocol import Backend
from fastvlm_edge.backends.select import select
from fastvlm_edge.backends.verification.compare import compare
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.engines.build import Options, build
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.model_dir.engine_record import ENGINES, engine_folders, find_records
from fastvlm_edge.model_dir.manifest import PRECISIONS, read_manifest
from fastvlm_edge.nvidia.cuda import Cuda
from fastvlm_edge.nvidia.drivers import open_cuda
from fastvlm_edge.nvidia.tensorrt_library import Library, find_library

pytestmark = pytest.mark.gpu

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "fastvlm-demo"
CONTEXT = 1024
QUESTIONS = 16
MAY_DIFFER = 1
"""How many of the answers may differ: the two most likely tokens can be closer than rounding errors. FP32 engines compute in TF32."""
COSINES = {"float32": 0.999, "float16": 0.99, "bfloat16": 0.97}
"""Smallest cosine to the logits of onnxruntime, which quantises activations, by the decoder's type."""
KEPT_BY_LIBRARIES = 32 << 20
"""Bytes of device memory that TensorRT may keep between two loads; the engines and the cache of the demo model take more."""
MEBIBYTES = 1 << 20


@dataclass
class Gpu:
    """The GPU and the library under test."""

    cuda: Cuda
    library: Library


@dataclass
class Built:
    """A model directory with engines."""

    directory: Path
    engines: Path


Models = Callable[[str], Built]
"""Precision -> model directory with engines."""


@pytest.fixture(scope="session")
def gpu() -> Iterator[Gpu]:
    """The GPU and TensorRT of this machine. Skips the tests, and says what is missing, if there is none."""
    try:
        cuda = open_cuda()
    except FastVLMError as error:
        pytest.skip(str(error))
    try:
        library = find_library()
    except FastVLMError as error:
        cuda.close()
        pytest.skip(str(error))
    yield Gpu(cuda, library)
    cuda.close()


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    """Held-out pictures with questions."""
    return [make_scene("heldout", 2026, index) for index in range(QUESTIONS)]


@pytest.fixture(scope="session")
def models(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Precision -> model directory with engines for the local GPU, built once."""
    made: dict[str, Built | FastVLMError] = {}

    def make(precision: str) -> Built:
        if precision not in made:
            directory = tmp_path_factory.mktemp(precision) / "model"
            convert(str(CHECKPOINT), directory, precision=precision, context=CONTEXT)
            try:
                record = build(directory, "auto", Options(cache=None))
                made[precision] = Built(directory, directory / ENGINES / record.target)
            except FastVLMError as error:
                made[precision] = error
        found = made[precision]
        if isinstance(found, FastVLMError):
            if f"has no {precision.upper()}" in str(found):  # such as BF16 on Turing
                pytest.skip(str(found))
            raise found
        return found

    return make


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fp16(models: Models) -> Built:
    """The model directory that most tests use."""
    return models("fp16")


@pytest.fixture
def vlm(fp16: Built) -> Iterator[FastVLM]:
    with FastVLM.load(fp16.directory, "tensorrt") as loaded:
        yield loaded


def without_end(vlm: FastVLM) -> FastVLM:
    """The same model without stop ids, so that every reply has max_new_tokens tokens."""
    vlm.manifest = replace(vlm.manifest, text=replace(vlm.manifest.text, stop_ids=[]))
    return vlm


def texts(vlm: FastVLM, scenes: list[Scene]) -> list[str]:
    return [vlm.generate(scene.questions[0].prompt, image=scene.image, max_new_tokens=16).text for scene in scenes]


def test_engines_are_built_and_agree_with_the_reference(gpu: Gpu, models: Models, precision: str) -> None:
    built = models(precision)
    (record,) = find_records(built.directory)
    assert engine_folders(built.directory) == [built.engines]
    assert (record.library, record.version) == (gpu.library.name, gpu.library.version)
    assert list(gpu.cuda.device.compute_capability) in record.compute_capabilities
    assert record.verified, "build did not compare the engines although their GPU is here"
    assert record.parity["device"] == gpu.cuda.device.name
    assert record.parity["reference"] == "PyTorch", "the stored reference answers were not used"
    print(precision, record.parity)
    assert len(record.parity["cases"]) == 9
    assert all(case["greedy_agreement"] >= 0.9 for case in record.parity["cases"])
    assert not list(built.directory.glob(f"{ENGINES}/.*")), "a half-built folder was left"


def test_a_second_build_finds_everything_up_to_date(fp16: Built) -> None:
    before = (fp16.engines / "build.json").stat().st_mtime_ns
    began = time.perf_counter()
    build(fp16.directory, "auto", Options(cache=None))
    assert (fp16.engines / "build.json").stat().st_mtime_ns == before
    assert time.perf_counter() - began < 10


def test_the_answers_are_those_of_onnxruntime(models: Models, precision: str, scenes: list[Scene]) -> None:
    directory = models(precision).directory
    with FastVLM.load(directory, "ort") as reference:
        expected = texts(reference, scenes)
    with FastVLM.load(directory, "tensorrt") as vlm:
        assert vlm.backend.name == "tensorrt"
        found = texts(vlm, scenes)
        assert texts(vlm, scenes) == found, "the answers differ the second time, when CUDA graphs are launched"
    differ = [(ours, theirs) for ours, theirs in zip(found, expected, strict=True) if ours != theirs]
    assert len(differ) <= MAY_DIFFER, differ
    right = sum(text == scene.questions[0].answer for text, scene in zip(found, scenes, strict=True))
    assert right >= QUESTIONS - 2, "the demo model answers 99 % of these questions"


def test_auto_takes_the_engines(fp16: Built) -> None:
    with FastVLM.load(fp16.directory) as vlm:
        assert vlm.backend.name == "tensorrt" and vlm.backend.description.endswith("(auto)")


def test_decoding_replays_a_cuda_graph_and_gives_the_tokens_of_decoding_without(
    vlm: FastVLM, scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda: Any = vars(vlm._engine.backend)["_cuda"]
    if not cuda.supports_graphs:
        pytest.skip(f"{cuda.binding} has no CUDA graphs")
    captures: list[Any] = []
    launches: list[Any] = []
    capture, launch = cuda.capture, cuda.launch
    monkeypatch.setattr(cuda, "capture", lambda *given: captures.append(given) or capture(*given))
    monkeypatch.setattr(cuda, "launch", lambda *given: launches.append(given) or launch(*given))
    without_end(vlm)
    scene = scenes[0]

    def ask() -> list[int]:
        return vlm.generate(scene.questions[0].prompt, image=scene.image, max_new_tokens=50).token_ids

    first, again = ask(), ask()
    assert captures and len(launches) > 2 * 40, "decode steps did not go through a graph"
    assert len(captures) <= 6, f"{len(captures)} graphs were captured for one shape of decoding and one of encoding"
    monkeypatch.setattr(cuda, "supports_graphs", False)
    count = len(launches)
    plain = ask()
    assert len(launches) == count
    assert first == again == plain


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_the_cache_grows_over_its_buckets_and_keeps_what_it_held(models: Models, precision: str, scenes: list[Scene]) -> None:
    """Prefill in unequal chunks, then single ids across two borders; logits against onnxruntime at every place."""
    directory = models(precision).directory
    manifest = read_manifest(directory)
    pixel_values = preprocess(scenes[0].image, manifest.vision.image_size, manifest.vision.geometry)
    tokens, vocab = manifest.vision.tokens, manifest.decoder.vocab
    text = np.random.default_rng(0).integers(5, manifest.text.token_count, 6 * FIRST_CAPACITY).tolist()
    ids = [*text[:7], *range(vocab, vocab + tokens), *text][: 5 * FIRST_CAPACITY + 20]
    chunks, at = [], 0
    for size in (50, 60, *[1] * 30, 100, 3, 120, *[1] * 40):  # single ids over 128 and 384, chunks over 256 and all that is left
        chunks.append((at, at + size))
        at += size
    chunks.append((at, len(ids)))

    def logits(name: str) -> list[NDArray[np.float32]]:
        backend = select(name, directory, manifest)
        try:
            image_features = (backend.encode(pixel_values),)
            rows = []
            for start, stop in chunks:
                output = backend.step(ids[start:stop], image_features, want_logits=True)
                assert output.logits is not None
                rows.append(output.logits[-1].copy())
                assert backend.lengths[0] == stop
            return rows
        finally:
            backend.close()

    expected, found = logits("ort"), logits("tensorrt")
    bound = COSINES[manifest.decoder.dtype]
    for (start, stop), ours, theirs in zip(chunks, found, expected, strict=True):
        assert compare(ours, theirs).cosine >= bound, f"positions {start} to {stop}"


def test_truncated_positions_are_forgotten(vlm: FastVLM) -> None:
    backend: Any = vlm._engine.backend
    ids = [5 + index % 300 for index in range(200)]
    backend.reset()
    backend.step(ids[:150])
    expected = backend.step(ids[150:151], want_logits=True).logits.copy()
    backend.truncate(150)
    backend.step(ids[160:190])
    backend.truncate(150)
    found = backend.step(ids[150:151], want_logits=True).logits
    assert compare(found, expected).cosine > 0.9999


def test_a_chat_computes_only_what_is_new_and_says_what_onnxruntime_says(fp16: Built, vlm: FastVLM, scenes: list[Scene]) -> None:
    scene = scenes[0]
    prompts = [scene.questions[0].prompt, "What does the sign say?", "How many?"]
    with FastVLM.load(fp16.directory, "ort") as reference:
        theirs = reference.chat()
        expected = [theirs.ask(prompt, scene.image if index == 0 else None, max_new_tokens=8) for index, prompt in enumerate(prompts)]
    chat = vlm.chat()
    replies = [chat.ask(prompt, scene.image if index == 0 else None, max_new_tokens=8) for index, prompt in enumerate(prompts)]
    assert replies[0].text == expected[0].text
    for reply in replies[1:]:
        assert 0 < reply.timings.prefilled_tokens < reply.timings.prompt_tokens / 2
    vlm.generate("Something else entirely.", image=scenes[1].image, max_new_tokens=3)  # takes the cache over
    again = vlm.chat()
    fresh = [again.ask(prompt, scene.image if index == 0 else None, max_new_tokens=8) for index, prompt in enumerate(prompts)]
    assert [reply.text for reply in fresh] == [reply.text for reply in replies]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_pictures_in_one_question(models: Models, precision: str, scenes: list[Scene]) -> None:
    directory = models(precision).directory
    manifest = read_manifest(directory)
    tokens, vocab = manifest.vision.tokens, manifest.decoder.vocab
    ids = [*range(5, 15), *range(vocab, vocab + tokens), *range(15, 25), *range(vocab + tokens, vocab + 2 * tokens), *range(25, 35)]
    pixel_values = [preprocess(scene.image, manifest.vision.image_size, manifest.vision.geometry) for scene in scenes[:2]]

    def last_logits(backend: Backend, *order: int) -> NDArray[np.float32]:
        image_features = tuple(backend.encode(pixel_values[index]) for index in order)
        backend.reset()
        logits = backend.step(ids, image_features, want_logits=True).logits
        assert logits is not None
        return logits[-1].copy()

    reference, backend = select("ort", directory, manifest), select("tensorrt", directory, manifest)
    try:
        bound = COSINES[manifest.decoder.dtype]
        found = {order: last_logits(backend, *order) for order in ((0, 1), (1, 0))}
        for order, ours in found.items():
            assert compare(ours, last_logits(reference, *order)).cosine >= bound, order
        assert np.abs(found[0, 1] - found[1, 0]).max() > 0.01, "the order of the pictures changes nothing"
    finally:
        reference.close()
        backend.close()


def test_close_gives_all_device_memory_back(gpu: Gpu, fp16: Built, scenes: list[Scene]) -> None:
    def use() -> int:
        with FastVLM.load(fp16.directory, "tensorrt") as vlm:
            texts(vlm, scenes[:2])
            without_end(vlm).generate("a " * 400, image=scenes[0].image, max_new_tokens=40)  # the cache grows
            least = gpu.cuda.free_bytes()
        gc.collect()
        return least

    use()  # what libraries load once is not released
    before = gpu.cuda.free_bytes()
    during = [use() for _ in range(3)]
    after = gpu.cuda.free_bytes()
    lost = before - after
    if gpu.cuda.device.integrated:  # memory is shared with the host, where other programs allocate and free
        assert lost < 8 * KEPT_BY_LIBRARIES, f"{lost / MEBIBYTES:.0f} MiB were not released"
    else:
        assert min(during) < before
        assert lost < KEPT_BY_LIBRARIES, f"{lost / MEBIBYTES:.0f} MiB were not released"


def kept_kernels(engines: Path) -> list[Path]:
    return [path for path in engines.glob("*.kernels") if path.stat().st_size]


def test_loading_again_uses_the_kernels_that_were_compiled(gpu: Gpu, fp16: Built, scenes: list[Scene], tmp_path: Path) -> None:
    if not gpu.library.is_rtx:
        pytest.skip(f"{gpu.library.name} compiles when it builds, there is nothing to keep")
    assert len(kept_kernels(fp16.engines)) == 2, "build compared the engines and kept no compiled kernels"
    directory = Path(shutil.copytree(fp16.directory, tmp_path / "model"))
    engines = directory / ENGINES / fp16.engines.name
    for kernels in kept_kernels(engines):
        kernels.unlink()

    def seconds() -> float:
        began = time.perf_counter()
        with FastVLM.load(directory, "tensorrt") as vlm:
            texts(vlm, scenes[:1])
            return time.perf_counter() - began

    cold, warm = seconds(), seconds()
    assert len(kept_kernels(engines)) == 2
    assert warm < cold, f"{warm:.2f} s with compiled kernels, {cold:.2f} s without"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "0.0.0"}, r"do not run here: they were built with \w+ 0\.0\.0, but this machine has .*; run: .*build .* --force"),
        ({"compute_capabilities": [[1, 0]]}, r"they were built for compute capability 1\.0, but .* has \d"),
        ({"onnx": {}}, "they were built from another conversion of the model"),
    ],
)
def test_engines_that_are_not_for_this_machine_are_refused(fp16: Built, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    directory = Path(shutil.copytree(fp16.directory, tmp_path / "model"))
    (folder,) = engine_folders(directory)
    (record,) = find_records(directory)
    replace(record, **change).write(folder)
    with pytest.raises(FastVLMError, match=says):
        FastVLM.load(directory, "tensorrt")


def test_a_missing_engine_is_refused(fp16: Built, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(fp16.directory, tmp_path / "model"))
    (directory / ENGINES / fp16.engines.name / "decoder.engine").unlink()
    with pytest.raises(FastVLMError, match=r"decoder\.engine is missing; run: fastvlm-edge build .* --force"):
        FastVLM.load(directory, "tensorrt")


def test_auto_goes_on_without_engines_that_are_refused(fp16: Built, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(fp16.directory, tmp_path / "model"))
    (folder,) = engine_folders(directory)
    (record,) = find_records(directory)
    replace(record, version="0.0.0").write(folder)
    with FastVLM.load(directory) as vlm:
        assert vlm.backend.name == "ort" and "0.0.0" in vlm.backend.description
