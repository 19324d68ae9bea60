"""Slots of every backend: random calls give what a model says that computes every conversation anew.

The fake model makes every error in a cache visible. CUDA is stubbed by `FakeCuda`, or is host memory; engines compute with onnxruntime.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastvlm_edge import FastVLMError
from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.ort_device import DeviceDecoder
from fastvlm_edge.backends.protocol import Backend, ImageFeatures, SavedSlot
from fastvlm_edge.backends.tensorrt import TensorRTBackend
from fastvlm_edge.model_dir.manifest import read_manifest
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_engine import build_engines, fake_platform
from tests.support.fake_model import IMAGE_SIZE, TOKENS, VOCAB, build_model
from tests.support.host_as_gpu import host_as_gpu

SLOTS, CONTEXT = 4, 512
ROUNDING = 2e-3
"""Between sums over a whole conversation in other orders: the fake model adds hundreds of values and takes the sine."""
PICTURES = [np.random.default_rng(seed).random((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32) for seed in (1, 2)]

Ids = list[int]
"""A conversation: `VOCAB + k` is row k of the features of both pictures, whichever of them a call got."""
Load = Callable[[Path], tuple[Backend, Callable[[], None]]]
"""Takes a model directory, and returns a backend and what has to be true after it was closed."""


def on_cpu(model: Path) -> tuple[Backend, Callable[[], None]]:
    return OrtBackend(model, read_manifest(model), threads=1, slots=SLOTS), lambda: None


def on_device(model: Path) -> tuple[Backend, Callable[[], None]]:
    with host_as_gpu():
        return OrtBackend(model, read_manifest(model), threads=1, slots=SLOTS, cuda=True, load_decoder=DeviceDecoder), lambda: None


def on_tensorrt(graphs: bool = True, **engines: Any) -> Load:
    def load(model: Path) -> tuple[Backend, Callable[[], None]]:
        folder, cuda = build_engines(model, **engines), FakeCuda(supports_graphs=graphs)

        def check() -> None:
            assert not any(cuda.live().values()), cuda.live()

        return TensorRTBackend(folder, read_manifest(model), fake_platform(cuda), slots=SLOTS), check

    return load


BACKENDS: dict[str, Load] = {
    "ort": on_cpu,
    "ort-cuda": on_device,
    "tensorrt": on_tensorrt(profiles=2, max_batch=4),
    "tensorrt, one profile": on_tensorrt(profiles=1, max_batch=8),
    "tensorrt, three at a time": on_tensorrt(profiles=2, max_batch=3),
    "tensorrt, one at a time": on_tensorrt(profiles=2),
    "tensorrt, without graphs": on_tensorrt(profiles=2, max_batch=4, graphs=False),
    "tensorrt, static": on_tensorrt(static=(128, CONTEXT)),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    loaded, check = BACKENDS[request.param](build_model(tmp_path / "model", context=CONTEXT))
    yield loaded
    loaded.close()
    check()


class Reference:
    """Computes every conversation from its first id on."""

    def __init__(self, directory: Path) -> None:
        model = build_model(directory, context=CONTEXT)
        self.backend = OrtBackend(model, read_manifest(model), threads=1)
        self.pictures = tuple(self.backend.encode(pixels) for pixels in PICTURES)

    def logits(self, ids: Ids, rows: int) -> NDArray[np.float32]:
        """Of the last `rows` ids."""
        self.backend.reset()
        positions = range(len(ids) - rows, len(ids))
        output = self.backend.step(ids, self.pictures, logit_positions=positions, want_logits=True)
        assert output.logits is not None
        return output.logits.copy()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference") / "model")


class Conversations:
    """Drives a backend with random calls, and knows what each slot holds."""

    def __init__(self, backend: Backend, reference: Reference, seed: int) -> None:
        self.backend, self.reference, self.random = backend, reference, random.Random(seed)
        self.pictures: tuple[ImageFeatures, ...] = tuple(backend.encode(pixels) for pixels in PICTURES)
        self.slots: list[Ids] = [[] for _ in range(SLOTS)]
        self.saved: list[tuple[SavedSlot, Ids]] = []

    def slot(self) -> int:
        return self.random.randrange(SLOTS)

    def text(self, count: int) -> Ids:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def step(self) -> None:
        slot, ids = self.slot(), self.text(self.random.choice([1, 1, 2, 5, 16, 17, 49, 130]))
        which = self.random.choice([(), (), (0,), (1,), (0, 1)])
        for picture in which:
            at = self.random.randrange(len(ids) + 1)
            ids[at:at] = range(VOCAB + picture * TOKENS, VOCAB + (picture + 1) * TOKENS)
        shift = TOKENS if which == (1,) else 0  # the call gets the second picture only, whose rows are then the first
        call = [each - shift if each >= VOCAB else each for each in ids]
        features = tuple(self.pictures[picture] for picture in which)
        rows = self.random.randint(1, min(len(ids), 9))
        positions = range(len(ids) - rows, len(ids))
        if len(self.slots[slot]) + len(ids) > CONTEXT:
            with pytest.raises(FastVLMError, match=f"do not fit into the context of {CONTEXT}"):
                self.backend.step(call, features, slot=slot)
            return
        output = self.backend.step(call, features, slot=slot, logit_positions=positions, want_logits=True)
        self.slots[slot] += ids
        self.compare(output, self.reference.logits(self.slots[slot], rows))

    def decode(self) -> None:
        ids = self.text(self.random.randint(1, SLOTS))
        if any(len(self.slots[slot]) == CONTEXT for slot in range(len(ids))):
            with pytest.raises(FastVLMError, match="do not fit into the context"):
                self.backend.decode(ids)
            return
        want = self.random.random() < 0.7
        output = self.backend.decode(ids, want_logits=want)
        assert want or output.logits is None
        for slot, token in enumerate(ids):
            self.slots[slot].append(token)
        self.compare(output, np.concatenate([self.reference.logits(self.slots[slot], 1) for slot in range(len(ids))]))

    def decode_on(self) -> None:
        """Several calls for the same slots, of which some are graphs."""
        count = self.random.randint(1, SLOTS)
        for _ in range(self.random.randint(2, 5)):
            if max(len(ids) for ids in self.slots[:count]) < CONTEXT:
                ids = self.text(count)
                output = self.backend.decode(ids)
                for slot, token in enumerate(ids):
                    self.slots[slot].append(token)
        self.compare(output, np.concatenate([self.reference.logits(self.slots[slot], 1) for slot in range(count)]))

    def truncate(self) -> None:
        slot = self.slot()
        length = self.random.randint(0, len(self.slots[slot]))
        self.backend.truncate(length, slot)
        del self.slots[slot][length:]

    def copy(self) -> None:
        source, target = self.slot(), self.slot()
        length = self.random.randint(0, len(self.slots[source]))
        self.backend.copy(source, target, length)
        self.slots[target] = self.slots[source][:length]

    def save(self) -> None:
        slot = self.slot()
        saved = self.backend.save(slot)
        assert saved is not None and saved.length == len(self.slots[slot])
        assert saved.nbytes >= 3 * 2 * 2 * saved.length * 4 * 4  # layers, keys and values, heads, positions, head_dim, float32
        self.saved.append((saved, self.slots[slot].copy()))

    def restore(self) -> None:
        if self.saved:
            slot, (saved, ids) = self.slot(), self.random.choice(self.saved)
            length = self.random.randint(0, len(ids))
            self.backend.restore(saved, slot, length)
            self.slots[slot] = ids[:length]

    def drop(self) -> None:
        if self.saved:
            del self.saved[self.random.randrange(len(self.saved))]

    def reset(self) -> None:
        slot = self.slot()
        self.backend.reset(slot)
        self.slots[slot] = []

    def compare(self, output: Any, expected: NDArray[np.float32]) -> None:
        if output.logits is not None:
            np.testing.assert_allclose(output.logits, expected, atol=ROUNDING)
        best = -np.sort(-expected)[:, : output.top_values.shape[1]]
        np.testing.assert_allclose(output.top_values, best, atol=ROUNDING)
        np.testing.assert_allclose(np.take_along_axis(expected, output.top_ids, 1), best, atol=ROUNDING)
        np.testing.assert_allclose(output.log_normalizer, np.log(np.exp(expected.astype(np.float64)).sum(1)), atol=ROUNDING)

    def check(self) -> None:
        assert list(self.backend.lengths) == [len(ids) for ids in self.slots]

    def check_all(self) -> None:
        """One token of each slot says whether it holds what it should."""
        for slot, ids in enumerate(self.slots):
            if len(ids) == CONTEXT:
                self.backend.truncate(CONTEXT - 1, slot)
                ids.pop()
        ids = self.text(SLOTS)
        output = self.backend.decode(ids, want_logits=True)
        for slot, token in enumerate(ids):
            self.slots[slot].append(token)
        self.compare(output, np.concatenate([self.reference.logits(each, 1) for each in self.slots]))


KINDS = ["step"] * 6 + ["decode"] * 4 + ["decode_on"] * 2 + ["truncate", "copy", "copy", "save", "restore", "restore", "drop", "reset"]


@pytest.mark.parametrize("seed", range(3))
def test_random_calls_give_what_computing_everything_anew_gives(backend: Backend, reference: Reference, seed: int) -> None:
    conversations = Conversations(backend, reference, seed)
    log: list[str] = []
    try:
        for _ in range(60):
            log.append(conversations.random.choice(KINDS))
            getattr(conversations, log[-1])()
            conversations.check()
        conversations.check_all()
    except Exception as error:
        raise AssertionError(f"after {', '.join(log)}") from error


def test_lengths_outside_a_slot_or_a_copy_are_refused(backend: Backend) -> None:
    backend.step([1, 2, 3], slot=1)
    saved = backend.save(1)
    assert saved is not None
    for call in (lambda: backend.truncate(4, 1), lambda: backend.copy(1, 0, 4), lambda: backend.restore(saved, 2, 4)):
        with pytest.raises(ValueError, match="length 4 is outside the 3 positions"):
            call()
    assert list(backend.lengths) == [0, 3, 0, 0]


def test_a_saved_slot_outlives_its_slot_and_others(backend: Backend, reference: Reference) -> None:
    ids = list(range(200))
    backend.step(ids, slot=3)
    saved = backend.save(3)
    assert saved is not None
    for slot in range(SLOTS):
        backend.reset(slot)
        backend.step([7] * 300, slot=slot)
    backend.restore(saved, 0, 150)
    output = backend.step([5], want_logits=True)
    assert output.logits is not None
    np.testing.assert_allclose(output.logits, reference.logits([*ids[:150], 5], 1), atol=ROUNDING)


@pytest.mark.parametrize("name", BACKENDS)
def test_closing_with_saved_slots_alive_gives_everything_back(name: str, tmp_path: Path) -> None:
    backend, check = BACKENDS[name](build_model(tmp_path / "model", context=CONTEXT))
    backend.step([1, 2, 3], slot=2)
    kept = [backend.save(2) for _ in range(3)]
    del kept[0]
    backend.close()
    check()
    assert all(saved is not None and saved.length == 3 for saved in kept)
