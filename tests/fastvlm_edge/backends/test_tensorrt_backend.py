"""The TensorRT backend: buffers, CUDA graphs, cache, memory, and what it refuses.

Stubbed: CUDA by `FakeCuda`, and TensorRT by engines that compute with onnxruntime. The backend itself is real. test_vlm.py runs on both
backends and so shows that their answers are the same, token for token.
"""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage import data

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.backends import load_engines as module
from fastvlm_edge.backends import tensorrt as tensorrt_module
from fastvlm_edge.backends.device_memory import DeviceCache, aligned
from fastvlm_edge.backends.kv_cache import FIRST_CAPACITY, next_capacity
from fastvlm_edge.backends.load_engines import load_engines
from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.select import select
from fastvlm_edge.backends.tensorrt import TensorRTBackend
from fastvlm_edge.backends.verification import reference as reference_module
from fastvlm_edge.backends.verification.compare import cosines, divergence
from fastvlm_edge.backends.verification.reference import read_reference
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.engine_record import RECORD_NAME, EngineRecord, find_records, read_record
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.nvidia.cuda import CudaError, OutOfDeviceMemory
from fastvlm_edge.progress import SilentProgress, stderr_progress
from tests.support import fake_engine
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_engine import CHUNK, POSITIONS, FakeContext, build_engines, fake_gpu
from tests.support.fake_model import HIDDEN, IMAGE_SIZE, TOKENS, VOCAB, build_model

PROMPT = "What does the meter read?"
PIXELS = np.random.default_rng(0).random((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
ROUNDING = 1e-3
"""Between sums over the whole conversation in other orders: the fake model adds hundreds of values and takes the sine."""
IDS = list(np.random.default_rng(1).integers(0, VOCAB, 400))


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "model")


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def load(directory: Path, cuda: FakeCuda, **options: Any) -> TensorRTBackend:
    with fake_gpu(cuda, **options):
        return load_engines(directory, read_manifest(directory))


@pytest.fixture
def backend(directory: Path, cuda: FakeCuda) -> TensorRTBackend:
    build_engines(directory)
    return load(directory, cuda)


@pytest.fixture
def ort(model_dir: Path) -> OrtBackend:
    return OrtBackend(model_dir, read_manifest(model_dir), threads=1)


def logits(backend: Any, ids: list[int], image_features: Any = (), **options: Any) -> Any:
    output = backend.step(ids, image_features, want_logits=True, **options)
    return output.logits.copy()


# Work that is enqueued ----------------------------------------------------------------------------------------------------------


def test_a_decoded_token_is_one_graph_one_strided_copy_and_one_wait(backend: TensorRTBackend, cuda: FakeCuda) -> None:
    backend.step(IDS[:20])
    for token in IDS[20:22]:
        backend.step([token])
    cuda.log.clear()
    for token in IDS[22:52]:
        backend.step([token])
    assert cuda.log == ["launch", "copy_2d", "synchronize"] * 30


def test_the_first_decoded_token_of_a_shape_runs_and_the_second_is_captured(backend: TensorRTBackend, cuda: FakeCuda) -> None:
    backend.step(IDS[:20])
    seen = []
    for _ in range(4):
        cuda.log.clear()
        backend.step([5])
        seen.append([name for name in cuda.log if name in ("decoder engine", "capture", "launch")])
    assert seen == [["decoder engine"], ["capture", "decoder engine", "launch"], ["launch"], ["launch"]]
    assert cuda.live()["graphs"] == 1


def test_a_picture_is_one_graph_from_the_third_on(backend: TensorRTBackend, cuda: FakeCuda) -> None:
    expected = backend.encode(PIXELS).numpy()
    backend.encode(PIXELS[..., ::-1])
    cuda.log.clear()
    assert np.array_equal(backend.encode(PIXELS).numpy(), expected)
    work = ["launch", "copy", "synchronize"]
    read = ["allocate_pinned", "copy", "synchronize", "free_pinned"]
    assert Counter(cuda.log) == Counter(["free", "allocate", *work, *read])  # the memory of the first picture, whom nobody holds


def test_without_cuda_graphs_it_computes_the_same(directory: Path, ort: OrtBackend) -> None:
    build_engines(directory)
    cuda = FakeCuda(supports_graphs=False)
    backend = load(directory, cuda)
    for step in ([*IDS[:30]], *([token] for token in IDS[30:60])):
        assert np.array_equal(logits(backend, step), logits(ort, step))
    assert "launch" not in cuda.log


def test_a_binding_without_cuda_graphs_says_once_what_that_costs(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_engines(directory)
    cuda = FakeCuda(supports_graphs=False)
    with fake_gpu(cuda):
        backend = load_engines(directory, read_manifest(directory), progress=stderr_progress())
    backend.step(IDS[:20])
    for token in IDS[20:24]:
        backend.step([token])
    said = capsys.readouterr().err
    assert (
        said.count("warning: fake has no CUDA graphs, so the host launches hundreds of kernels per token") == said.count("CUDA graphs") == 1
    )
    assert backend.description.endswith(", no CUDA graphs")


def test_work_that_cannot_be_recorded_runs_as_it_is(
    directory: Path, cuda: FakeCuda, ort: OrtBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_stream: int, _work: Any) -> int:
        raise CudaError("cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed")

    monkeypatch.setattr(cuda, "capture", refuse)
    build_engines(directory)
    with fake_gpu(cuda):
        backend = load_engines(directory, read_manifest(directory), progress=stderr_progress())
    for _ in range(3):
        assert np.allclose(backend.encode(PIXELS).numpy(), ort.encode(PIXELS).numpy(), atol=ROUNDING)
    for each in (backend, ort):
        each.step(IDS[:9])
    for token in IDS[9:14]:
        assert np.allclose(logits(backend, [token]), logits(ort, [token]), atol=ROUNDING)
    assert capsys.readouterr().err.count("without CUDA graphs, which is slower: cuStreamEndCapture failed") == 2  # encoder, decoder


@pytest.mark.parametrize("profiles", [1, 2])
def test_decoding_takes_the_last_profile_and_prefill_the_first(directory: Path, cuda: FakeCuda, ort: OrtBackend, profiles: int) -> None:
    build_engines(directory, profiles=profiles)
    backend = load(directory, cuda)
    contexts = (backend._contexts.prefill.context, backend._contexts.decode(0, 1).context)
    assert [context.profile for context in contexts] == [0, profiles - 1]  # type: ignore[attr-defined]
    for step in ([*IDS[:30]], [IDS[30]], [IDS[31]], [IDS[32]]):
        assert np.array_equal(logits(backend, step), logits(ort, step))


# Cache --------------------------------------------------------------------------------------------------------------------------


def test_the_cache_grows_in_buckets_and_recaptures(backend: TensorRTBackend, cuda: FakeCuda, ort: OrtBackend) -> None:
    """400 ids one by one cross three borders; every row of logits is that of onnxruntime."""
    cuda.log.clear()
    for token in IDS:
        assert np.array_equal(logits(backend, [token]), logits(ort, [token]))
    assert cuda.log.count("capture") == 4
    assert backend._decoder.cache.capacity == next_capacity(400) == 512
    assert cuda.live()["graphs"] == 1


def test_truncate_and_reset_leave_no_trace(backend: TensorRTBackend, ort: OrtBackend) -> None:
    for each in (backend, ort):
        each.step(IDS[:140])
        each.truncate(50)
    assert np.array_equal(logits(backend, IDS[200:230]), logits(ort, IDS[200:230]))
    for each in (backend, ort):
        each.reset()
        assert each.lengths[0] == 0
    assert np.array_equal(logits(backend, IDS[:9]), logits(ort, IDS[:9]))
    with pytest.raises(ValueError, match="outside the 9 positions"):
        backend.truncate(10)


def test_the_context_is_the_limit(directory: Path, cuda: FakeCuda) -> None:
    small = build_model(directory.parent / "small", context=100)
    build_engines(small)
    backend = load(small, cuda)
    backend.step(IDS[:99])
    with pytest.raises(FastVLMError, match="101 positions do not fit into the context of 100"):
        backend.step(IDS[:2])
    assert backend.lengths[0] == 99


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
@pytest.mark.parametrize("positions", [None, [0], [2, 40], "spread"])
def test_calls_longer_than_the_engine_takes(backend: TensorRTBackend, ort: OrtBackend, length: int, positions: Any) -> None:
    asked = list(range(0, length, length // 9)) if positions == "spread" else positions
    found = backend.step(IDS[:length], logit_positions=asked, want_logits=True)
    expected = ort.step(IDS[:length], logit_positions=asked, want_logits=True)
    assert found.logits is not None and expected.logits is not None
    np.testing.assert_allclose(found.logits, expected.logits, atol=ROUNDING)
    np.testing.assert_array_equal(found.top_values, np.take_along_axis(found.logits, found.top_ids, 1))
    np.testing.assert_array_equal(found.top_values, -np.sort(-found.logits)[:, : found.top_ids.shape[1]])
    np.testing.assert_allclose(logits(backend, [7]), logits(ort, [7]), atol=ROUNDING)


def test_too_many_positions_are_refused_before_anything_runs(backend: TensorRTBackend) -> None:
    with pytest.raises(FastVLMError, match=f"logits of {POSITIONS + 1} positions were requested; the engine computes 1 to {POSITIONS}"):
        backend.step(IDS[:30], logit_positions=range(POSITIONS + 1))
    assert backend.lengths[0] == 0


# Slots --------------------------------------------------------------------------------------------------------------------------


def several(directory: Path, cuda: FakeCuda, slots: int = 4, **engines: Any) -> TensorRTBackend:
    return TensorRTBackend(build_engines(directory, **engines), read_manifest(directory), fake_engine.fake_platform(cuda), slots=slots)


def test_decoding_is_one_graph_for_each_number_of_slots(directory: Path, cuda: FakeCuda) -> None:
    backend = several(directory, cuda, profiles=2, max_batch=4)
    for slot in (3, 0, 1, 2):  # the last first, so that no row is added later
        backend.step(IDS[: 20 + slot], slot=slot)
    cuda.log.clear()
    for count in (4, 4, 2, 2, 4, 2, 3, 1, 1, 3, 4, 1):
        backend.decode(IDS[:count])
    assert cuda.log.count("capture") == cuda.live()["graphs"] == 4
    cuda.log.clear()
    backend.decode(IDS[:4])
    assert cuda.log == ["launch", *["copy_2d"] * 8, "synchronize"]  # of each slot, the positions of a head in all layers are one copy
    cuda.log.clear()
    for slot in (0, 3, 0, 3):
        backend.step(IDS[:5], slot=slot)  # a draft
    backend.copy(3, 1, 12)
    saved = backend.save(3)
    assert saved is not None
    backend.restore(saved, 2, 7)
    backend.truncate(3, 0)
    for count in (4, 3, 2, 1):
        backend.decode(IDS[:count])
    assert not {"capture", "decoder engine"} & {*cuda.log[cuda.log.index("allocate") :]}, "drafts and copies change no graph"
    backend.close()
    assert not any(cuda.live().values())


def test_slots_beyond_the_batch_of_the_engine_are_decoded_in_further_calls(directory: Path, cuda: FakeCuda) -> None:
    backend = several(directory, cuda, slots=5, profiles=2, max_batch=2)
    for slot in reversed(range(5)):
        backend.step(IDS[: 20 + slot], slot=slot)
    for _ in range(2):
        backend.decode(IDS[:5])
    cuda.log.clear()
    backend.decode(IDS[:5])
    assert cuda.log.count("launch") == 3 and "capture" not in cuda.log
    context: Any = backend._contexts.decode(0, 2).context
    with pytest.raises(AssertionError, match="outside profile 1"):
        context.set_shape("input_ids", (3, 1))


def test_a_new_slot_or_a_longer_one_captures_again(directory: Path, cuda: FakeCuda) -> None:
    backend = several(directory, cuda, profiles=2, max_batch=4)

    def captures() -> int:
        cuda.log.clear()
        for _ in range(3):
            backend.decode([5])
        return cuda.log.count("capture")

    backend.step(IDS[:50])
    assert (captures(), captures()) == (1, 0)
    backend.step(IDS[:50], slot=2)
    assert (captures(), captures()) == (1, 0)
    backend.step(IDS[:50], slot=1)  # its row is there
    assert captures() == 0
    backend.step(IDS[:100], slot=2)
    assert (captures(), backend._decoder.cache.rows, backend._decoder.cache.capacity) == (1, 3, 256)
    backend.reset(2)
    backend.reset(1)
    assert (captures(), backend._decoder.cache.rows, backend._decoder.cache.capacity) == (1, 1, 128), "one slot needs less"


def test_memory_that_is_short_leaves_every_slot_as_it_was(directory: Path, ort: OrtBackend) -> None:
    """Each allocation fails in turn: of rows, of positions, of copies."""
    build_engines(directory, profiles=2, max_batch=4)
    folder = directory / "engines" / "sm87"
    lengths = (60, 100, 127)

    def expected(ids: list[int]) -> Any:
        ort.reset()
        return logits(ort, ids)[-1]

    calls: dict[str, Any] = {
        "a new slot": lambda b: b.step(IDS[:9], slot=3),
        "a longer slot": lambda b: b.step(IDS[:90], slot=1),
        "decoding past the capacity": lambda b: (b.decode([5, 5, 5]), b.decode([5, 5, 5])),
        "a copy to a new slot": lambda b: b.copy(1, 3, 50),
        "a restored slot": lambda b: b.restore(b.saved, 3, 40),
    }
    for name, call in calls.items():
        cuda = FakeCuda()
        backend = TensorRTBackend(folder, read_manifest(directory), fake_engine.fake_platform(cuda), slots=4)
        for slot, length in enumerate(lengths):
            backend.step(IDS[slot : slot + length], slot=slot)
        held = [IDS[slot : slot + length] for slot, length in enumerate(lengths)] + [[]]
        backend.saved = backend.save(1)  # type: ignore[attr-defined]
        cuda._limit = cuda._limit - cuda.free_bytes() + 1024
        assert backend.save(2) is None
        with pytest.raises(OutOfDeviceMemory):
            call(backend)
        if name.startswith("decoding"):  # the first of the two calls had room
            held[:3] = [[*ids, 5] for ids in held[:3]]
        assert list(backend.lengths) == [len(ids) for ids in held], name
        for slot in range(3):
            found = logits(backend, [7], slot=slot)[0] if len(held[slot]) < 128 else None
            if found is not None:
                np.testing.assert_allclose(found, expected([*held[slot], 7]), atol=ROUNDING)
        cuda._limit = 1 << 34
        call(backend)
        backend.close()
        assert not any(cuda.live().values())


def test_a_call_that_fails_between_groups_of_slots_appends_nothing(
    directory: Path, cuda: FakeCuda, ort: OrtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = several(directory, cuda, profiles=2)
    for slot in range(3):
        backend.step(IDS[slot : slot + 30], slot=slot)
    calls, enqueue = 0, FakeContext.enqueue

    def fail(self: FakeContext, stream: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise FastVLMError("the engine failed")
        enqueue(self, stream)

    monkeypatch.setattr(FakeContext, "enqueue", fail)
    with pytest.raises(FastVLMError, match="the engine failed"):
        backend.decode([5, 6, 7])
    monkeypatch.undo()
    assert list(backend.lengths) == [30, 30, 30, 0]
    found = backend.decode([8, 8, 8], want_logits=True).logits
    assert found is not None
    for slot in range(3):
        ort.reset()
        np.testing.assert_allclose(found[slot], logits(ort, [*IDS[slot : slot + 30], 8])[-1], atol=ROUNDING)


def test_a_saved_slot_that_nobody_holds_is_freed_at_the_next_call(directory: Path, cuda: FakeCuda) -> None:
    backend = several(directory, cuda)
    backend.step(IDS[:50])
    before = cuda.live()["allocations"]
    saved = [backend.save(0) for _ in range(3)]
    assert cuda.live()["allocations"] == before + 3
    thread = threading.Thread(target=saved.clear)  # on any thread: it only notes what to free
    thread.start()
    thread.join()
    assert cuda.live()["allocations"] == before + 3
    backend.step([5])
    assert cuda.live()["allocations"] == before


def test_a_saved_slot_of_another_backend_is_refused(directory: Path) -> None:
    backends = [several(shutil.copytree(directory, directory.parent / name), FakeCuda()) for name in "ab"]
    backends[0].step(IDS[:5])
    saved = backends[0].save(0)
    assert saved is not None
    with pytest.raises(ValueError, match="comes from another backend"):
        backends[1].restore(saved, 0, 5)


# Pictures -----------------------------------------------------------------------------------------------------------------------


def test_features_stay_on_the_device_until_nobody_holds_them(backend: TensorRTBackend, cuda: FakeCuda) -> None:
    before = cuda.live()["allocations"]
    features = [backend.encode(PIXELS * share) for share in (1.0, 0.5, 0.25)]
    assert cuda.live()["allocations"] == before + 3
    assert features[0].numpy().shape == (TOKENS, HIDDEN)
    del features[1:]
    gc.collect()
    backend.step([VOCAB, 3], (features[0],))
    assert cuda.live()["allocations"] == before + 2  # the picture, and the input with the features of all pictures
    features.clear()
    gc.collect()
    backend.step([3])  # no pictures: the backend forgets them too
    backend.step([3])
    assert cuda.live()["allocations"] == before + 1


def test_features_of_another_backend_are_refused(backend: TensorRTBackend, ort: OrtBackend, directory: Path) -> None:
    other = FakeCuda()
    twin = load(directory, other)
    for foreign in (ort.encode(PIXELS), twin.encode(PIXELS)):
        with pytest.raises(FastVLMError, match="come from another model or backend"):
            backend.step([VOCAB, 3], (foreign,))
    twin.close()


def test_pixels_of_another_size_are_refused(backend: TensorRTBackend) -> None:
    with pytest.raises(FastVLMError, match=r"pixel_values have shape \[1, 3, 8, 8\], but this model takes \[1, 3, S, S\] with S = 256"):
        backend.encode(np.zeros((1, 3, 8, 8), np.float32))


# Sizes of pictures --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """A model directory for pictures of three sizes."""
    return build_model(tmp_path / "sizes", other_sizes=[128, 512])


def picture(size: int) -> Any:
    return np.random.default_rng(size).random((1, 3, size, size), np.float32)


def test_each_size_has_its_profile_and_its_graph(sizes: Path, cuda: FakeCuda) -> None:
    build_engines(sizes)
    backend, ort = load(sizes, cuda), OrtBackend(sizes, read_manifest(sizes), threads=1)
    contexts = backend._vision_engine.contexts  # type: ignore[attr-defined]
    assert [context.profile for context in contexts] == [0], "the others are made when they are first used"
    for size in (512, 256, 128):
        for _ in range(3):  # the first runs, the second is captured, the third is launched
            found, expected = backend.encode(picture(size)), ort.encode(picture(size))
            assert found.rows == (size // 64) ** 2
            assert np.array_equal(found.numpy(), expected.numpy())
        ids = [VOCAB, VOCAB + found.rows - 1, 3]
        assert np.allclose(logits(backend, ids, (found,)), logits(ort, ids, (expected,)), atol=ROUNDING)
        for each in (backend, ort):
            each.reset()
    assert [context.profile for context in contexts] == [0, 2, 1]
    assert cuda.live()["graphs"] == 3
    backend.close()
    del found
    gc.collect()
    assert not any(cuda.live().values()), cuda.live()


def test_a_size_that_does_not_fit_leaves_the_others_usable(sizes: Path) -> None:
    build_engines(sizes)
    roomy = FakeCuda()
    backend = load(sizes, roomy)
    for _ in range(2):
        backend.encode(picture(256))
    needed = roomy.peak_bytes
    backend.close()
    tight = FakeCuda(memory_limit=needed + 4 * 3 * 512**2 // 2)
    backend = load(sizes, tight)
    before = backend.encode(picture(256))
    kept = tight.live()
    for _ in range(2):
        with pytest.raises(FastVLMError, match="MiB of GPU memory are needed"):
            backend.encode(picture(512))
        assert tight.live() == kept
    assert np.array_equal(backend.encode(picture(256)).numpy(), before.numpy())
    assert backend.encode(picture(128)).rows == 4
    backend.close()


@pytest.mark.parametrize("size", [128, 512])
def test_the_engine_is_verified_at_every_size(sizes: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(sizes)
    reference_module.compute_reference(sizes, manifest, SilentProgress()).write(sizes)
    folder = build_engines(sizes, verified=False)
    profile = manifest.vision.every_size.index(size)
    with monkeypatch.context() as patch:
        spoil_output(patch, "vision", "image_features", HIDDEN, lambda found: np.roll(found, 1), profile=profile)
        error = fault_in(sizes)
    assert "vision.engine disagrees with onnxruntime" in error and f"visual token 0 of astronaut.jpg at {size} px" in error
    shutil.rmtree(folder)
    build_engines(sizes, verified=False)
    load(sizes, FakeCuda()).close()
    record = read_record(folder)
    assert record.verified
    assert {"image_features", "image_features.128", "image_features.512"} <= record.parity.keys()


# Memory and interruptions -------------------------------------------------------------------------------------------------------


def test_close_gives_everything_back(backend: TensorRTBackend, cuda: FakeCuda) -> None:
    features = backend.encode(PIXELS)
    backend.step([VOCAB, *IDS[:200]], (features,))
    for token in IDS[:5]:
        backend.step([token], (features,))
    backend.close()
    backend.close()
    assert not any(cuda.live().values()), cuda.live()
    with pytest.raises(FastVLMError, match="was closed"):
        backend.encode(PIXELS)


def test_who_forgets_to_close_gets_everything_back(directory: Path) -> None:
    build_engines(directory)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    features = backend.encode(PIXELS)
    backend.step(IDS[:9])
    del backend
    gc.collect()
    assert not any(cuda.live().values())
    with pytest.raises(FastVLMError, match="the model that encoded this picture was closed"):
        features.numpy()


def test_a_question_without_a_picture_survives_a_picture_that_did_not_fit(directory: Path, ort: OrtBackend) -> None:
    build_engines(directory)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    picture = backend.encode(PIXELS)
    allocate, cuda.allocate = cuda.allocate, lambda nbytes: allocate(1 << 40 if nbytes > aligned(4 * HIDDEN) else nbytes)  # type: ignore[method-assign]
    with pytest.raises(FastVLMError, match="MiB of GPU memory are needed"):
        backend.step(IDS[:9], (picture,))
    assert np.allclose(logits(backend, IDS[:9]), logits(ort, IDS[:9]), atol=ROUNDING)


@pytest.mark.parametrize("limits", [5, pytest.param(23, marks=pytest.mark.slow)])
def test_every_shortage_while_loading_is_explained_and_leaves_nothing(directory: Path, limits: int) -> None:
    """Whichever allocation it is that fails."""
    build_engines(directory, weights=1 << 20)
    roomy = FakeCuda()
    backend = load(directory, roomy)
    needed = roomy.peak_bytes
    backend.close()
    for limit in np.linspace(0, needed - 1, limits).astype(int):
        cuda = FakeCuda(memory_limit=int(limit))
        with pytest.raises(FastVLMError, match=r"MiB of GPU memory are needed and .* MiB are free; choose a smaller context"):
            load(directory, cuda)
        gc.collect()
        assert not any(cuda.live().values()), (limit, cuda.live())


def test_a_cache_that_cannot_grow_stays_as_it_was(directory: Path, ort: OrtBackend) -> None:
    build_engines(directory)
    roomy = FakeCuda()
    backend = load(directory, roomy)
    needed = roomy.peak_bytes
    backend.close()
    tight = FakeCuda(memory_limit=needed + 4096)
    backend = load(directory, tight)
    for each in (backend, ort):
        each.step(IDS[:120])
    with pytest.raises(FastVLMError, match="MiB of GPU memory are needed"):
        backend.step(IDS[120:140])
    assert backend.lengths[0] == 120
    assert np.array_equal(logits(backend, [9]), logits(ort, [9]))
    backend.close()
    assert not any(tight.live().values())


@pytest.mark.parametrize("short", [False, True])
def test_a_long_conversation_slows_only_the_next_one(directory: Path, ort: OrtBackend, short: bool) -> None:
    """The cache follows the last conversation, also if no memory is free for the smaller buffer."""
    build_engines(directory)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    capacities = []
    for length in (900, 100, 100):
        for each in (backend, ort):
            each.step(IDS[:1] * length)
        assert np.allclose(logits(backend, [9]), logits(ort, [9]), atol=ROUNDING)
        capacities.append(backend._decoder.cache.capacity)
        cuda._limit = cuda._limit - cuda.free_bytes() if short else cuda._limit
        for each in (backend, ort):
            each.reset()
    assert capacities == [1024, 1024, 1024 if short else 128]
    backend.close()
    assert not any(cuda.live().values())


def test_a_conversation_as_long_as_the_last_one_needs_no_new_memory_and_no_new_graph(backend: TensorRTBackend, cuda: FakeCuda) -> None:
    for conversation in range(3):
        backend.reset()
        for ids in (IDS[:250], *([token] for token in IDS[:20])):
            backend.step(ids)
        if conversation == 0:
            cuda.log.clear()
    assert not {"allocate", "free", "capture"} & {*cuda.log}


def test_reset_waits_for_a_call_of_another_thread(backend: TensorRTBackend) -> None:
    """It may free the memory that the call uses."""
    backend.step(IDS[:300])
    other = threading.Thread(target=backend.reset)
    with backend._working():
        other.start()
        other.join(0.2)
        assert other.is_alive() and backend.lengths[0] == 300
    other.join()
    assert backend.lengths[0] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FastVLMError("the engine failed")])
@pytest.mark.parametrize("call", range(5))
def test_an_interrupted_call_leaves_the_backend_usable(
    backend: TensorRTBackend, ort: OrtBackend, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: int
) -> None:
    for each in (backend, ort):
        each.step(IDS[:100])
    calls = 0
    enqueue = FakeContext.enqueue

    def fail(self: FakeContext, stream: int) -> None:
        nonlocal calls
        calls += 1
        if calls > call:
            raise error
        enqueue(self, stream)

    monkeypatch.setattr(FakeContext, "enqueue", fail)
    with pytest.raises(type(error)):
        backend.step(IDS[100 : 100 + 5 * CHUNK])  # five calls of the engine
    monkeypatch.undo()
    assert backend.lengths[0] == 100
    for token in IDS[:4]:
        assert np.array_equal(logits(backend, [token]), logits(ort, [token]))


# Loading ------------------------------------------------------------------------------------------------------------------------


def test_engines_that_do_not_belong_here_are_refused_in_one_sentence(directory: Path) -> None:
    model = str(directory)
    with pytest.raises(FastVLMError, match=f"{model} has no engines; run: fastvlm-edge build {model}$"):
        load(directory, FakeCuda())
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        r"built with tensorrt 10\.3\.0, but this machine has 10\.16\.2": ({}, {"version": "10.16.2"}),
        "built with tensorrt, but this machine has tensorrt_rtx": ({}, {"library": "tensorrt_rtx"}),
        r"built for compute capability 8\.6, 8\.9, but Fake GPU has 8\.7": ({"compute_capabilities": [[8, 6], [8, 9]]}, {}),
        "built from another conversion of the model": ({"onnx": {"vision.onnx": "0"}}, {}),
    }
    for says, (record, platform) in changes.items():
        shutil.rmtree(directory / "engines", ignore_errors=True)
        build_engines(directory, **record)
        cuda = FakeCuda()
        with pytest.raises(FastVLMError, match=rf"{says}; run: fastvlm-edge build {model} --force$") as caught:
            load(directory, cuda, **platform)
        assert "\n" not in str(caught.value)
        assert not any(cuda.live().values())


def test_the_pair_that_runs_here_is_found_among_several(directory: Path, cuda: FakeCuda) -> None:
    build_engines(directory, target="rtx", library="tensorrt_rtx", compute_capabilities=[[8, 6]])
    build_engines(directory, target="orin")
    backend = load(directory, cuda)
    assert backend._files._directory.name == "orin"


def test_a_damaged_record_does_not_hide_another_pair(directory: Path, cuda: FakeCuda) -> None:
    (build_engines(directory, target="agx") / RECORD_NAME).write_text("{")
    build_engines(directory, target="orin")
    assert load(directory, cuda)._files._directory.name == "orin"
    assert [record.target for record in find_records(directory)] == ["orin"]


def test_engines_that_cannot_be_loaded_leave_no_context(directory: Path, cuda: FakeCuda) -> None:
    (build_engines(directory) / "decoder.engine").unlink()
    with pytest.raises(FastVLMError, match=r"decoder\.engine is missing"):
        load(directory, cuda)
    assert cuda._closed


@pytest.mark.parametrize("damage", ["missing", "short", "record", "type", "schema"])
def test_damaged_engines_are_named(directory: Path, cuda: FakeCuda, damage: str) -> None:
    folder = build_engines(directory)
    path = folder / ("decoder.engine" if damage in ("missing", "short") else RECORD_NAME)
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "record":
        path.write_text(path.read_text()[:-9])
    elif damage == "type":
        path.write_text(json.dumps({**json.loads(path.read_text()), "compute_capabilities": 86}))
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(FastVLMError, match=rf"{path} (is missing|has \d+ bytes|is damaged|has schema 99).*; run: fastvlm-edge build"):
        load(directory, cuda)


def test_an_engine_of_other_tensors_is_refused(directory: Path, cuda: FakeCuda) -> None:
    half = build_model(directory.parent / "half", dtype="float16")
    folder = build_engines(directory)
    shutil.copy(half / "decoder.onnx", directory / "other.onnx")
    engine = json.loads((folder / "decoder.engine").read_text())
    (folder / "decoder.engine").write_text(json.dumps({**engine, "onnx": "other.onnx"}))
    size = (folder / "decoder.engine").stat().st_size
    record = read_record(folder)
    files = {**record.files, "decoder.engine": replace(record.files["decoder.engine"], bytes=size)}
    replace(record, files=files).write(folder)
    with pytest.raises(FastVLMError, match="tensor image_features is float16, expected float32"):
        load(directory, cuda)
    gc.collect()
    assert not any(cuda.live().values())


def test_kernels_that_were_compiled_are_kept_for_the_next_start(directory: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_engines(directory, kernels=True)
    first = load(directory, cuda)
    assert first._contexts.engines()["decoder"].restored == b""  # type: ignore[attr-defined]
    first.close()
    second = load(directory, FakeCuda())
    kept = (folder / "vision.sm87.kernels").read_bytes()
    assert second._vision_engine.restored == kept == b"kernels of vision.onnx"  # type: ignore[attr-defined]
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    (folder / "decoder.sm87.kernels").unlink()
    second.close()
    assert not list(folder.glob("*decoder.sm87*"))


# Verification -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def referenced(directory: Path) -> Path:
    """A model directory with unverified engines."""
    build_engines(directory, verified=False, profiles=2)
    return directory


def fault_in(directory: Path) -> str:
    """The error with which the engines are refused."""
    cuda = FakeCuda()
    with pytest.raises(FastVLMError) as caught:
        load(directory, cuda)
    gc.collect()
    assert not any(cuda.live().values())
    assert not read_record(directory / "engines" / "sm87").verified
    assert "(the results of both are in" in str(caught.value)
    return str(caught.value)


def test_unverified_engines_are_compared_once_and_then_believed(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = referenced / "engines" / "sm87"
    assert not read_record(folder).verified
    monkeypatch.setattr(reference_module, "OrtBackend", None)  # the stored answers are enough
    backend = load(referenced, FakeCuda())
    assert backend.lengths[0] == 0 and backend._decoder.cache.capacity == FIRST_CAPACITY
    record = read_record(folder)
    assert record.verified and record.parity["device"] == "Fake GPU"
    assert len(record.parity["cases"]) == 9 and record.parity["positions"] == 2048
    assert all(case["divergence"] < 1e-4 and case["greedy_agreement"] == 1 for case in record.parity["cases"])
    assert all(figures["worst"] > 0.9999 for figures in record.parity["image_features"].values())
    monkeypatch.setattr(module, "verify_engines", None)
    load(referenced, FakeCuda()).close()


@pytest.mark.parametrize("fault", ["is damaged", "is missing", "has format 9, but this toolkit reads format 1"])
def test_a_reference_that_cannot_be_used_is_refused_and_the_gpu_released(referenced: Path, fault: str) -> None:
    path = referenced / "reference.npz"
    if "format" in fault:
        with np.load(path) as stored:
            np.savez(path, **{**stored, "format": np.int32(9)})
    elif "damaged" in fault:
        path.write_bytes(b"no zip")
    else:
        path.unlink()
    cuda = FakeCuda()
    with pytest.raises(FastVLMError, match=rf"reference\.npz {fault}.*convert the checkpoint again$"):
        load(referenced, cuda)
    gc.collect()
    assert not any(cuda.live().values())


def test_engines_of_tensorrt_for_rtx_are_verified_on_every_card(directory: Path) -> None:
    """Their kernels are compiled on the card. Engines of TensorRT proper have theirs from the build."""

    def verified_again(**another: Any) -> bool:
        folder = directory / "engines" / "sm87"
        before = read_record(folder)
        cuda, serving = FakeCuda(), FakeCuda()
        cuda.device = serving.device = replace(cuda.device, **another)
        with pytest.MonkeyPatch.context() as patch:
            platforms = iter(fake_engine.fake_platform(each, library=before.library) for each in (cuda, serving))
            patch.setattr(module, "open_platform", lambda _: next(platforms))
            load_engines(directory, read_manifest(directory)).close()
        record = read_record(folder)
        assert record.verified
        assert not any({**cuda.live(), **serving.live()}.values())
        if record != before:
            assert (record.parity["device"], record.parity["compute_capability"]) == (
                cuda.device.name,
                list(cuda.device.compute_capability),
            )
        return record != before

    cards: list[list[int]] = [[8, 7], [8, 9]]
    build_engines(directory, library="tensorrt_rtx", compute_capabilities=cards)
    assert not verified_again()
    for another in ({"name": "Another GPU"}, {"name": "Another GPU", "compute_capability": (8, 9)}):
        assert verified_again(**another)
        assert not verified_again(**another)
    shutil.rmtree(directory / "engines")
    build_engines(directory, compute_capabilities=cards)
    assert not verified_again(name="Another GPU")


def test_tensorrt_for_rtx_is_verified_with_the_kernels_that_it_uses_later(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the verification it waits for the kernels of a shape; the backend that answers does not, and has them from there."""
    folder = build_engines(directory, library="tensorrt_rtx", verified=False, kernels=True)
    waited: list[bool] = []
    enqueue = FakeContext.enqueue

    def spy(self: FakeContext, stream: int) -> None:
        waited.append(self.waits_for_kernels)
        enqueue(self, stream)

    monkeypatch.setattr(FakeContext, "enqueue", spy)
    checking, serving = FakeCuda(), FakeCuda()
    platforms = iter(fake_engine.fake_platform(each, library="tensorrt_rtx") for each in (checking, serving))
    monkeypatch.setattr(module, "open_platform", lambda _: next(platforms))
    backend = load_engines(directory, read_manifest(directory))
    assert len(waited) > 100 and all(waited)
    assert checking._closed and not any(checking.live().values())
    waited.clear()
    backend.encode(PIXELS)
    backend.step(IDS[:20])
    backend.step([5])
    assert waited == [False] * 3
    assert backend._vision_engine.restored == (folder / "vision.sm87.kernels").read_bytes()  # type: ignore[attr-defined]
    backend.close()


def test_refused_engines_are_refused_at_once_until_something_changes(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil_output(patch, "decoder", "top_values", 1, lambda found: found + 1)
        first = fault_in(referenced)
        folder = referenced / "engines" / "sm87"
        kept = f"(the results of both are in {folder}.mismatch)"
        assert kept in first and first.endswith(f"run: fastvlm-edge build {referenced} --target sm87 --force")
        with monkeypatch.context() as unchecked:
            unchecked.setattr(module, "verify_engines", None)
            cuda = FakeCuda()
            with pytest.raises(FastVLMError) as caught:
                load(referenced, cuda)
        assert str(caught.value) == first.replace(kept, "(at an earlier load)")
        assert cuda._closed
        fallback = select("auto", referenced, read_manifest(referenced))
        assert fallback.name == "ort"
    record = read_record(folder)
    assert record.faults and record.parity["device"] == "Fake GPU" and not record.verified
    another = FakeCuda()
    another.device = replace(another.device, name="Another GPU")
    load(referenced, another).close()
    assert read_record(folder).verified, "it was not checked on another GPU"


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_an_engine_that_computes_something_else_is_refused_and_the_evidence_kept(
    referenced: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, values = ("image_features", TOKENS * HIDDEN) if part == "vision" else ("logits", VOCAB)
    spoil_output(monkeypatch, part, name, values, lambda found: found[::-1].copy())
    error = fault_in(referenced)
    assert f"{part}.engine disagrees with onnxruntime" in error
    folder = referenced / "engines" / "sm87.mismatch"
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["faults"][0]["part"] == part and figures["faults"][0]["text"] in error
    evidence, reference = np.load(folder / "answers.npz"), read_reference(folder)
    assert reference.passage == read_reference(referenced).passage
    if part == "vision":
        assert cosines(evidence["features"][0], reference.features[0]).min() < 0.9
    else:
        row = list(reference.passage.positions).index(int(evidence["position"][0]))
        assert divergence(evidence["first_faulty_logits"], reference.rows[row]) > 0.1


def spoil_output(monkeypatch: pytest.MonkeyPatch, part: str, name: str, values: int, change: Any, profile: int | None = None) -> None:
    """Every run of an engine, or of one of its profiles, changes the first `values` numbers of an output."""
    enqueue = FakeContext.enqueue

    def spoiled(self: FakeContext, stream: int) -> None:
        enqueue(self, stream)
        if self.engine.path.stem == part and profile in (None, self.profile):
            address, cuda = self.addresses[name], self.engine.cuda

            def spoil() -> None:
                found = cuda.memory(address, 4 * values).view(np.float32)
                found[:] = change(found)

            cuda.enqueue(stream, spoil, uses=[(address, 4 * values)])

    monkeypatch.setattr(FakeContext, "enqueue", spoiled)


def test_one_wrong_visual_token_is_enough(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_output(monkeypatch, "vision", "image_features", HIDDEN, lambda found: np.roll(found, 1))
    assert "visual token 0 of astronaut.jpg" in fault_in(referenced)


def test_one_wrong_row_of_logits_is_enough(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one row of a prefill of 512 ids is wrong, in the two cases that have one: it has the logits of the row before."""
    step = TensorRTBackend.step

    def wrong(self: TensorRTBackend, input_ids: Any, *given: Any, **options: Any) -> Any:
        output = step(self, input_ids, *given, **options)
        if self.lengths[0] == 512 and len(input_ids) == 512 and output.logits is not None:
            output.logits[7] = output.logits[6]
        return output

    monkeypatch.setattr(TensorRTBackend, "step", wrong)
    error = fault_in(referenced)
    assert "'chunks of 512', the row of position 503 has a KL divergence" in error
    assert "2 figures in all are out of bounds" in error


def test_a_position_that_the_cache_loses_when_it_grows_is_found(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_cache = DeviceCache._replace

    def losing(self: DeviceCache, rows: int, capacity: int) -> None:
        self.lengths[0] = max(self.lengths[0] - 1, 0)
        replace_cache(self, rows, capacity)
        self.lengths[0] += 1 if self.lengths[0] else 0

    monkeypatch.setattr(DeviceCache, "_replace", losing)
    assert "decoder.engine disagrees" in fault_in(referenced)


@pytest.mark.parametrize("lost", [0, 700])
def test_a_position_that_is_lost_where_only_a_long_conversation_grows_is_found(
    referenced: Path, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_cache = DeviceCache._replace

    def losing(self: DeviceCache, rows: int, capacity: int) -> None:
        replace_cache(self, rows, capacity)
        if capacity == 1536:
            at = self.part(0, 0, 0) + lost * self._position_bytes
            self._cuda.zero(at, self._position_bytes, self._stream)
            self._cuda.synchronize(self._stream)

    monkeypatch.setattr(DeviceCache, "_replace", losing)
    assert f"'the whole context in the cache', keys or values of position {lost} changed while later ids were fed" in fault_in(referenced)


def test_features_that_stay_from_another_picture_are_found(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of rows is the same, so nothing but the answer tells them apart."""
    features = tensorrt_module._Decoder.set_image_features

    def stale(self: Any, pictures: Any, store: Any) -> None:
        if sum(picture.rows for picture in pictures) != self._rows or not self._image_features:
            features(self, pictures, store)

    monkeypatch.setattr(tensorrt_module._Decoder, "set_image_features", stale)
    assert "'after a question about another picture'" in fault_in(referenced)


def test_other_candidates_than_the_logits_say_are_found(referenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_output(monkeypatch, "decoder", "top_values", 1, lambda found: found + 1)
    assert "top_values are not the 64 largest logits" in fault_in(referenced)


def test_a_gpu_without_memory_for_the_whole_context_is_verified_up_to_there(
    referenced: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resize = DeviceCache.resize

    def short(self: DeviceCache, slots: int, positions: int) -> None:
        if positions > 1024:
            raise OutOfDeviceMemory(1 << 30, 1 << 20)
        resize(self, slots, positions)

    monkeypatch.setattr(DeviceCache, "resize", short)
    with fake_gpu(FakeCuda()):
        load_engines(referenced, read_manifest(referenced), progress=stderr_progress())
    assert "warning: not verified with the whole context in the cache: " in capsys.readouterr().err
    parity = read_record(referenced / "engines" / "sm87").parity
    assert len(parity["cases"]) == 8 and 576 <= parity["positions"] <= 1024


def test_a_read_only_model_directory_is_compared_each_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_engines(directory, verified=False)
    monkeypatch.setattr(EngineRecord, "write", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    for _ in range(2):
        load(directory, FakeCuda()).close()


# Which backend ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    """A machine with a fake GPU."""
    cuda = FakeCuda()
    with fake_gpu(cuda):
        yield cuda


def test_auto_takes_the_engines_where_they_run(directory: Path, gpu: FakeCuda) -> None:
    build_engines(directory)
    with FastVLM.load(directory) as vlm:
        assert (vlm.backend.name, vlm.backend.description) == ("tensorrt", f"tensorrt {fake_engine.VERSION}, Fake GPU (auto)")
        assert vlm.generate(PROMPT, data.coffee(), max_new_tokens=3).backend == "tensorrt"
    assert not any(gpu.live().values())


def test_auto_says_why_it_took_something_else(directory: Path, gpu: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(directory)
    assert select("auto", directory, manifest).description.endswith("(auto: no TensorRT engines)")
    build_engines(directory, compute_capabilities=[[8, 6]])
    backend = select("auto", directory, manifest)
    assert backend.name == "ort"
    assert r"built for compute capability 8.6, but Fake GPU has 8.7" in backend.description


def test_the_api_loads_engines_by_name(directory: Path, gpu: FakeCuda) -> None:
    build_engines(directory)
    with FastVLM.load(directory, "tensorrt") as vlm, FastVLM.load(directory, "ort", threads=1) as expected:
        asked = (PROMPT, [data.coffee(), data.astronaut()])
        assert vlm.generate(*asked, max_new_tokens=40).token_ids == expected.generate(*asked, max_new_tokens=40).token_ids
        assert TextTokenizer(directory / "tokenizer.json")
