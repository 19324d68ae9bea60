"""Which context of the decoder runs a call, static engines, and that the fake engines catch what TensorRT documents as wrong.

Stubbed: CUDA by `FakeCuda`, and TensorRT by engines that compute with onnxruntime.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.backends.decoder_contexts import StaticContexts
from fastvlm_edge.backends.engine_files import EngineFiles
from fastvlm_edge.backends.load_engines import load_engines
from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.tensorrt import TensorRTBackend
from fastvlm_edge.model_dir.engine_record import read_record
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.nvidia.cuda import OutOfDeviceMemory
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_engine import CHUNK, FakeContext, FakeEngine, build_engines, fake_gpu
from tests.support.fake_model import IMAGE_SIZE, TOKENS, VOCAB

PIXELS = np.random.default_rng(0).random((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
IDS = [int(token) for token in np.random.default_rng(1).integers(0, VOCAB, 600)]
ROUNDING = 1e-3
CAPACITIES = (128, 512, 2048)


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "model")


@pytest.fixture
def ort(model_dir: Path) -> OrtBackend:
    return OrtBackend(model_dir, read_manifest(model_dir), threads=1)


def load(directory: Path, cuda: FakeCuda, **options: Any) -> TensorRTBackend:
    with fake_gpu(cuda, **options):
        return load_engines(directory, read_manifest(directory))


def logits(backend: Any, ids: list[int], image_features: Any = (), **options: Any) -> Any:
    return backend.step(ids, image_features, want_logits=True, **options).logits.copy()


def assert_same(backend: Any, ort: Any, ids: list[int], mine: Any = (), theirs: Any = (), **options: Any) -> None:
    np.testing.assert_allclose(logits(backend, ids, mine, **options), logits(ort, ids, theirs, **options), atol=ROUNDING)


# Dynamic shapes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profiles", [1, 2])
def test_another_number_of_pictures_does_not_capture_decoding_again(directory: Path, ort: OrtBackend, profiles: int) -> None:
    build_engines(directory, profiles=profiles)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    mine, theirs = ([each.encode(PIXELS * share) for share in (1.0, 0.5)] for each in (backend, ort))
    cuda.log.clear()
    for count in (0, 1, 2, 1):
        for each in (backend, ort):
            each.reset()
        pictures = (tuple(mine[:count]), tuple(theirs[:count]))
        assert_same(backend, ort, [VOCAB + row for row in range(count * TOKENS)] + IDS[:5], *pictures)
        for token in IDS[5:9]:
            assert_same(backend, ort, [token], *pictures)
    assert cuda.log.count("capture") == 1


@pytest.mark.parametrize("profiles", [1, 2])
def test_a_single_id_of_a_picture_is_prefill(directory: Path, ort: OrtBackend, profiles: int) -> None:
    build_engines(directory, profiles=profiles)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    mine, theirs = ((each.encode(PIXELS),) for each in (backend, ort))
    for token in (*IDS[:3], VOCAB + 3, VOCAB + 4, *IDS[3:6], VOCAB + TOKENS - 1):
        assert_same(backend, ort, [token], mine, theirs)
    assert cuda.live()["graphs"] == 1


def test_drafts_take_the_decode_profile_and_leave_its_graph_alone(
    directory: Path, ort: OrtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engines(directory, profiles=2)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    ran: list[int] = []
    enqueue = FakeContext.enqueue
    monkeypatch.setattr(FakeContext, "enqueue", lambda self, stream: (ran.append(self.profile), enqueue(self, stream))[1])
    assert_same(backend, ort, IDS[:20])
    for token in IDS[20:24]:
        assert_same(backend, ort, [token])
    ran.clear()
    at = 24
    for count in (2, 16, 1, 5, 17):
        assert_same(backend, ort, IDS[at : at + count], logit_positions=range(min(count, 16)))
        at += count
    assert ran == [1, 1, 1, 0]  # the single id is a graph
    assert cuda.log.count("capture") == 1


@pytest.mark.parametrize("static", [(), CAPACITIES])
def test_tensorrt_for_rtx_captures_by_itself(directory: Path, ort: OrtBackend, static: tuple[int, ...]) -> None:
    build_engines(directory, library="tensorrt_rtx", static=static)
    cuda = FakeCuda()
    backend = load(directory, cuda, library="tensorrt_rtx")
    for _ in range(3):
        assert np.allclose(backend.encode(PIXELS).numpy(), ort.encode(PIXELS).numpy(), atol=ROUNDING)
    for ids in (IDS[:120], *([token] for token in IDS[120:140])):
        assert_same(backend, ort, ids)
    assert "capture" not in cuda.log


def test_an_engine_that_reads_values_on_the_host_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_engines(directory)
    real = FakeEngine.__init__

    def on_host(self: FakeEngine, path: Path, cuda: FakeCuda) -> None:
        real(self, path, cuda)
        self.on_host = ["logit_positions"] if path.stem == "decoder" else []

    monkeypatch.setattr(FakeEngine, "__init__", on_host)
    cuda = FakeCuda()
    with pytest.raises(FastVLMError, match=r"decoder\.engine reads logit_positions on the host"):
        load(directory, cuda)
    assert not any(cuda.live().values())


# Static engines -----------------------------------------------------------------------------------------------------------------


def test_static_engines_give_the_logits_of_any_call(directory: Path, ort: OrtBackend) -> None:
    """One id at a time, chunks of every kind, drafts, pictures and a cut cache, over all capacities."""
    build_engines(directory, static=CAPACITIES)
    backend = load(directory, FakeCuda())
    mine, theirs = ((each.encode(PIXELS), each.encode(PIXELS * 0.5)) for each in (backend, ort))
    picture = [VOCAB + row for row in range(2 * TOKENS)]
    for each in (backend, ort):
        each.step([*IDS[:7], *picture], mine if each is backend else theirs)
    for ids in ([IDS[7]], IDS[8:10], IDS[10:26], *([token] for token in IDS[26:110]), [VOCAB + 1], IDS[110 : 110 + 3 * CHUNK + 5]):
        assert_same(backend, ort, ids, mine, theirs)
    for each in (backend, ort):
        each.truncate(90)
    assert_same(backend, ort, IDS[200:203], mine, theirs, logit_positions=[0, 1, 2])
    for token in IDS[203:210]:
        assert_same(backend, ort, [token], mine, theirs)
    assert_same(backend, ort, IDS[:500], mine, theirs, logit_positions=[3, 77, 499])
    assert_same(backend, ort, [5], mine, theirs)
    assert backend._decoder.cache.capacity == 2048
    backend.close()


def test_the_last_positions_of_the_context_fit_into_a_static_engine(directory: Path, ort: OrtBackend) -> None:
    build_engines(directory, static=CAPACITIES)
    backend = load(directory, FakeCuda())
    for each in (backend, ort):
        each.step((IDS * 4)[:2040])
    for token in IDS[:8]:
        assert_same(backend, ort, [token])
    with pytest.raises(FastVLMError, match="2049 positions do not fit into the context of 2048"):
        backend.step([5])


def test_only_the_static_engines_of_the_present_capacity_are_loaded(directory: Path) -> None:
    folder = build_engines(directory, static=CAPACITIES, kernels=True)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    assert sorted(backend._contexts.engines()) == ["decoder.decode.128", "decoder.prefill.128"]
    before = cuda.live()["allocations"]
    backend.step(IDS[:120])
    for token in IDS[:20]:
        backend.step([token])
    assert sorted(backend._contexts.engines()) == ["decoder.decode.512", "decoder.prefill.512"]
    assert cuda.live()["allocations"] == before and cuda.live()["graphs"] == 1
    assert (folder / "decoder.decode.128.sm87.kernels").read_bytes() == b"kernels of decoder.onnx"
    backend.close()
    assert not any(cuda.live().values())


def test_static_engines_for_a_longer_conversation_that_do_not_fit_are_explained(directory: Path, ort: OrtBackend) -> None:
    build_engines(directory, static=CAPACITIES)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    for each in (backend, ort):
        each.step(IDS[:140])
    load_part = EngineFiles.load
    tried: list[str] = []

    def refuse(self: EngineFiles, part: str) -> Any:
        if part.endswith(".512"):
            tried.append(part)
            raise OutOfDeviceMemory(1 << 20, 0)
        return load_part(self, part)

    EngineFiles.load = refuse  # type: ignore[method-assign]
    try:
        for _ in range(2):
            with pytest.raises(FastVLMError, match="MiB of GPU memory are needed"):
                backend.step([5])
        assert backend.lengths[0] == 140
        for each in (backend, ort):
            each.truncate(100)  # as a chat whose last question did not fit
        assert_same(backend, ort, [5])
        for _ in range(3):
            tried.clear()
            for each in (backend, ort):
                each.reset()
            assert_same(backend, ort, IDS[:30])
            assert not tried
            backend.step(IDS[30:140])
            with pytest.raises(FastVLMError, match="MiB of GPU memory are needed"):
                backend.step([5])
    finally:
        EngineFiles.load = load_part  # type: ignore[method-assign]
    backend.close()
    assert not any(cuda.live().values())


def test_a_conversation_that_ends_where_the_next_static_engines_do_not_fit_blocks_no_other(
    directory: Path, ort: OrtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last call made the cache grow, and no call has tried the engines of that capacity yet."""
    build_engines(directory, static=CAPACITIES)
    backend = load(directory, FakeCuda())
    backend.step(IDS[:140])
    load_part = EngineFiles.load

    def refuse(self: EngineFiles, part: str) -> Any:
        if part.endswith(".512"):
            raise OutOfDeviceMemory(1 << 20, 0)
        return load_part(self, part)

    monkeypatch.setattr(EngineFiles, "load", refuse)
    backend.reset()
    assert_same(backend, ort, IDS[:30])
    backend.close()


def test_a_long_conversation_leaves_its_static_engines_only_to_the_next_one(directory: Path) -> None:
    build_engines(directory, static=CAPACITIES)
    backend = load(directory, FakeCuda())
    loaded = []
    for length in (600, 600, 100, 100):
        for ids in (IDS[:length], [5]):
            backend.step(ids)
        loaded.append(sorted(backend._contexts.engines())[0].rpartition(".")[2])
        backend.reset()
    assert loaded == ["2048", "2048", "2048", "128"]
    backend.close()


@pytest.mark.parametrize("fails", ["load", "kernels"])
def test_engines_are_released_and_the_first_error_stays_whatever_the_library_raises_for_kernels(
    directory: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Kernels are saved where engines change, not while an error is handled."""
    build_engines(directory, static=CAPACITIES, kernels=True)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    backend.step(IDS[:140])
    load_part = EngineFiles.load

    def refuse(self: EngineFiles, part: str) -> Any:
        if fails == "load" and part == "decoder.decode.512":
            monkeypatch.setattr(FakeEngine, "compiled_kernels", lambda _: 1 / 0)
            raise FastVLMError("the engine failed")
        return load_part(self, part)

    monkeypatch.setattr(EngineFiles, "load", refuse)
    if fails == "kernels":
        monkeypatch.setattr(FakeEngine, "compiled_kernels", lambda _: 1 / 0)
    with pytest.raises(FastVLMError if fails == "load" else ZeroDivisionError):
        backend.step([5])
    assert not backend._contexts.engines()
    del backend
    gc.collect()
    assert not any(cuda.live().values())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FastVLMError("the engine failed")])
def test_every_failure_of_a_call_of_tensorrt_leaves_the_backend_usable(
    directory: Path, ort: OrtBackend, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Each call of a context fails in turn, also while engines change, until one conversation passes without a failure."""
    build_engines(directory, static=CAPACITIES)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    left = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise error
            return real(self, *arguments, **named)

        return call

    for kind, name in ((FakeContext, "set_shape"), (FakeContext, "set_address"), (FakeContext, "enqueue"), (FakeEngine, "context")):
        monkeypatch.setattr(kind, name, failing(getattr(kind, name)))
    failures, at = 0, 1
    while True:
        backend.shrink()
        ort.reset()
        left = at
        try:
            for ids in (IDS[:126], *([token] for token in IDS[126:132])):
                backend.step(ids)
        except type(error):
            failures, at, left = failures + 1, at + 5, 0
            length = backend.lengths[0]
            if length:
                ort.step(IDS[:length])
            assert_same(backend, ort, [9])
            continue
        break
    assert failures > 10
    backend.close()
    assert not any(cuda.live().values())


def test_static_engines_are_verified_like_others(directory: Path) -> None:
    folder = build_engines(directory, static=CAPACITIES, verified=False)
    backend = load(directory, FakeCuda())
    assert read_record(folder).verified and backend.lengths[0] == 0
    backend.close()


def test_a_load_that_fails_leaves_no_static_engine(directory: Path) -> None:
    build_engines(directory, static=CAPACITIES, weights=1 << 20)
    roomy = FakeCuda()
    load(directory, roomy).close()
    for limit in np.linspace(0, roomy.peak_bytes - 1, 17).astype(int):
        cuda = FakeCuda(memory_limit=int(limit))
        with pytest.raises(FastVLMError, match="does not fit on Fake GPU"):
            load(directory, cuda)
        assert not any(cuda.live().values())


# The fake catches what TensorRT documents as wrong ------------------------------------------------------------------------------


@pytest.fixture
def pair(directory: Path) -> tuple[TensorRTBackend, FakeCuda]:
    build_engines(directory, profiles=2)
    cuda = FakeCuda()
    backend = load(directory, cuda)
    backend.step(IDS[:20])
    for token in IDS[20:24]:
        backend.step([token])
    return backend, cuda


def context_of(backend: TensorRTBackend) -> Any:
    return backend._contexts.decode(0, 1).context


VIOLATIONS: dict[str, tuple[Callable[[TensorRTBackend], object], str]] = {
    "scratch memory is too small": (lambda b: engine_of(b).context(0, 4096, 1, 1, captured=False), "bytes of scratch memory"),
    "scratch memory is not aligned": (lambda b: engine_of(b).context(0, 4097, 8192, 1, captured=False), "is not aligned"),
    "a profile that is not there": (lambda b: engine_of(b).context(2, 4096, 8192, 1, captured=False), "there is no profile 2"),
    "a shape above the profile in use": (lambda b: context_of(b).set_shape("input_ids", (1, 17)), "outside profile 1"),
    "a shape below the profile in use": (lambda b: context_of(b).set_shape("input_ids", (1, 0)), "outside profile 1"),
    "a shape of another profile": (lambda b: context_of(b).set_shape("image_features", (2, 8)), "outside profile 1"),
    "another rank": (lambda b: context_of(b).set_shape("input_ids", (1,)), "outside profile 1"),
    "an address that is not aligned": (lambda b: context_of(b).set_address("logits", 4097), "not aligned"),
    "a tensor that is not there": (lambda b: context_of(b).set_address("logit", 4096), "logit"),
    "no shape": (lambda b: (context_of(b).shapes.pop("input_ids"), context_of(b).enqueue(b._stream)), "an input has no shape"),
    "no address": (lambda b: (context_of(b).addresses.pop("kv_new"), context_of(b).enqueue(b._stream)), "a tensor has no address"),
    "a graph after a change of its context": (
        lambda b: (context_of(b).set_shape("input_ids", (1, 2)), b.step([5])),
        "replayed after its context had changed",
    ),
    "a graph after its context was closed": (lambda b: (context_of(b).close(), b.step([5])), "replayed after its context was closed"),
    "a context after it was closed": (lambda b: (context_of(b).close(), context_of(b).enqueue(b._stream)), "the context was closed"),
    "an engine before its contexts": (lambda b: engine_of(b).close(), "before its contexts"),
    "a new shape that is captured before it ran": (
        lambda b: (context_of(b).set_shape("input_ids", (1, 2)), b._cuda.capture(b._stream, lambda: context_of(b).enqueue(b._stream))),
        "captured before it ran once",
    ),
    "a context that is not for graphs": (
        lambda b: b._cuda.capture(b._stream, lambda: b._contexts.prefill.context.enqueue(b._stream)),
        "not made for graphs",
    ),
}


def engine_of(backend: TensorRTBackend) -> Any:
    return backend._contexts.engines()["decoder"]


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_the_fake_engine_catches(pair: tuple[TensorRTBackend, FakeCuda], violation: str) -> None:
    act, says = VIOLATIONS[violation]
    with pytest.raises(AssertionError, match=says):
        act(pair[0])


def test_the_fake_engine_catches_a_capture_of_what_the_library_captures(directory: Path) -> None:
    build_engines(directory, library="tensorrt_rtx")
    backend = load(directory, FakeCuda(), library="tensorrt_rtx")
    backend.step([5])
    with pytest.raises(AssertionError, match="the library captures this work itself"):
        backend._cuda.capture(backend._stream, lambda: context_of(backend).enqueue(backend._stream))


def test_a_static_engine_takes_no_other_shape(directory: Path) -> None:
    build_engines(directory, static=CAPACITIES)
    backend = load(directory, FakeCuda())
    assert isinstance(backend._contexts, StaticContexts)
    with pytest.raises(AssertionError, match="outside profile 0"):
        context_of(backend).set_shape("input_ids", (1, 1))
