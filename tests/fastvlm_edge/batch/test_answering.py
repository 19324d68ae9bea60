"""Rows to results: the same answers as `generate`, errors by kind, a model that fails, and closing early."""

from __future__ import annotations

import io
import os
import pickle
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm_edge import FastVLM
from fastvlm_edge.backends.protocol import Backend
from fastvlm_edge.batch.answering import RowAnswerer
from fastvlm_edge.batch.job import Job, job_for
from fastvlm_edge.batch.rows import Row
from fastvlm_edge.errors import FastVLMError, PictureError
from fastvlm_edge.evaluation.data import ArchivedPicture
from fastvlm_edge.inputs import preprocess as module
from fastvlm_edge.inputs.preprocess import preprocess as prepared
from tests.support.cascade import LARGE, SIZES, SMALL, build_sizes, with_cascade


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Iterator[FastVLM]:
    with FastVLM.load(model_dir, "ort", threads=1, slots=3) as vlm:
        yield vlm


def job(vlm: FastVLM, **sampling: Any) -> Job:
    return job_for(vlm.manifest, {"max_new_tokens": 6, **sampling})


def picture(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (37 * number % 256, number % 256, 90)).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG that says that it has 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_every_row_has_the_answer_of_generate(model: FastVLM) -> None:
    asked = {f"r{number}": (f"Question {number}?", picture(number)) for number in range(25)}
    rows = [Row(id, image, prompt) for id, (prompt, image) in asked.items()]
    found = {row["id"]: row for row in RowAnswerer(model, job(model)).answer(rows)}
    assert len(found) == 25
    for id, (prompt, image) in asked.items():
        expected = model.generate(prompt, image, max_new_tokens=6).to_json()
        for name in ("text", "stop_reason"):
            assert found[id][name] == expected[name]
        assert found[id]["confidence"] == pytest.approx(expected["confidence"], rel=1e-4)  # other sums
        assert found[id]["timings"].keys() == expected["timings"].keys()
        assert list(found[id]) == ["id", "text", "confidence", "stop_reason", "image_size", "tried_sizes", "timings"]


def test_what_cannot_be_answered_is_an_error_of_its_kind(model: FastVLM, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(picture()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")

    def load() -> bytes:
        raise OSError(5, "Input/output error")

    def row(id: str, image: Any, prompt: str | None = "x", reason: str | None = None) -> Row:
        return Row(id, image, prompt, reason)

    wanted = {
        "incomplete": (row("incomplete", None, None, "no prompt"), "input", "no prompt"),
        "gone": (row("gone", tmp_path / "gone.png"), "missing", "does not exist"),
        "long": (row("long", tmp_path / ("n" * 300 + ".png")), "unreadable", "File name too long"),
        "folder": (row("folder", tmp_path), "not_a_picture", "is not a file"),
        "pipe": (row("pipe", tmp_path / "pipe.png"), "not_a_picture", "is not a file"),
        "text": (row("text", tmp_path / "text.jpg"), "not_a_picture", "is not an image in a format"),
        "cut": (row("cut", tmp_path / "cut.png"), "damaged", "is damaged or truncated"),
        "empty": (row("empty", tmp_path / "empty.png"), "damaged", "is empty"),
        "bomb": (row("bomb", bomb()), "too_large", "is too large"),
        "thin": (row("thin", _thin()), "unsupported", "aspect ratio"),
        "archive": (row("archive", ArchivedPicture("a.tar/b.png", load)), "unreadable", "Input/output error"),
        "words": (row("words", picture(), "word " * 5000), "context", "leaves no room"),
        "surrogate": (row("surrogate", picture(), "\ud800"), "prompt", "not valid Unicode"),
    }
    good = [Row(f"good{number}", picture(number), "x") for number in range(3)]
    rows = [*good[:1], *(row for row, _, _ in wanted.values()), *good[1:]]
    found = {row["id"]: row for row in RowAnswerer(model, job(model)).answer(rows)}
    assert found.keys() == {row.id for row in rows}
    for id, (_, kind, says) in wanted.items():
        assert list(found[id]) == ["id", "error"]
        assert found[id]["error"]["kind"] == kind and says in found[id]["error"]["message"], found[id]
    assert all("text" in found[row.id] for row in good)


def _thin() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2000, 2)).save(file, "PNG")
    return file.getvalue()


def test_pictures_of_all_sources_are_the_same(model: FastVLM, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(5))
    images: list[Any] = [picture(5), tmp_path / "a.png", ArchivedPicture("x", lambda: picture(5))]
    found = list(RowAnswerer(model, job(model)).answer(Row(str(number), image, "x") for number, image in enumerate(images)))
    assert len({row["text"] for row in found}) == 1 and len(found) == 3


class Failing:
    """A backend whose vision encoder raises as `fails` says, and whose steps take `seconds` longer."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.fails: Any = lambda pixel_values: False
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, pixel_values: Any) -> Any:
        if self.fails(pixel_values):
            raise FastVLMError("the device is lost", "restart it")
        return self._backend.encode(pixel_values)

    def decode(self, *ids: Any, **options: Any) -> Any:
        time.sleep(self.seconds)
        return self._backend.decode(*ids, **options)


@pytest.fixture
def failing(model: FastVLM, monkeypatch: pytest.MonkeyPatch) -> Failing:
    backend = Failing(model._engine.backend)
    monkeypatch.setattr(model._engine, "backend", backend)
    return backend


def test_a_row_for_which_the_model_fails_is_an_error(model: FastVLM, failing: Failing) -> None:
    # Never the random picture that tries whether the model still works: these are of one colour.
    failing.fails = lambda pixel_values: np.ptp(pixel_values[0, 0, 120:136, 120:136]) < 1e-3 and pixel_values[0, 0, 128, 128] > 0.5
    rows = [Row(str(number), picture(number + 300), "x") for number in range(12)]
    found = {row["id"]: row for row in RowAnswerer(model, job(model)).answer(rows)}
    bad = {id for id, row in found.items() if "error" in row}
    assert bad == {str(number) for number in range(12) if 37 * (number + 300) % 256 > 127}
    assert all(found[id]["error"] == {"kind": "model", "message": "the device is lost; restart it"} for id in bad)


def test_a_model_that_no_longer_works_ends_the_batch(model: FastVLM, failing: Failing) -> None:
    failing.fails = lambda pixel_values: True
    with pytest.raises(FastVLMError, match=r"the model failed at the row r4\d\d: the device is lost; restart it"):
        list(RowAnswerer(model, job(model)).answer(Row(f"r{number}", picture(number), "x") for number in range(400, 500)))


def test_few_rows_are_taken_ahead_and_all_slots_are_used(model: FastVLM) -> None:
    taken, most = 0, 0

    def rows() -> Iterator[Row]:
        nonlocal taken
        for number in range(60):
            taken += 1
            yield Row(str(number), picture(number), "x")

    answerer = RowAnswerer(model, job(model, max_new_tokens=40))
    busy: list[int] = []
    for given, _ in enumerate(answerer.answer(rows()), start=1):
        busy.append(len(model._engine.running()))
        most = max(most, taken - given)
    assert taken == 60
    assert most <= 2 * (3 + 2)
    assert max(busy) == 3


def test_closing_early_cancels_what_is_running(model: FastVLM, failing: Failing) -> None:
    failing.seconds = 0.1
    rows = [Row("first", None, None, "an error, which is known at once"), *(Row(str(n), picture(n), "x") for n in range(100))]
    answered = RowAnswerer(model, job(model, max_new_tokens=100)).answer(rows)
    assert next(answered)["id"] == "first"
    deadline = time.monotonic() + 20
    while len(model._engine.running()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    answered.close()
    assert time.monotonic() - began < 5  # the answers take 10 s
    assert not any(thread.name.startswith("fastvlm-batch") for thread in threading.enumerate())
    while model.counters().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert model.counters().running == model.counters().waiting == 0


def test_closing_early_encodes_no_picture_that_still_waits(model: FastVLM, failing: Failing) -> None:
    encoded, first = list[int](), threading.Event()

    def slow(pixel_values: Any) -> bool:
        encoded.append(1)
        first.set()
        time.sleep(0.5)
        return False

    failing.fails = slow
    rows = [Row("first", None, None, "an error, which is known at once"), *(Row(str(n), picture(n + 700), "x") for n in range(20))]
    answered = RowAnswerer(model, job(model)).answer(rows)
    next(answered)
    assert first.wait(20)
    time.sleep(0.2)  # the others wait for the encoder
    answered.close()
    assert len(encoded) == 1


def test_any_exception_before_a_row_is_asked_is_an_error_of_the_row(model: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model.stream

    def stream(prompt: str, *arguments: Any, **options: Any) -> Any:
        if prompt == "bad":
            raise RuntimeError("broken")
        return original(prompt, *arguments, **options)

    monkeypatch.setattr(model, "stream", stream)
    rows = [Row(str(n), picture(n), "bad" if n == 1 else "x") for n in range(3)]
    found = {row["id"]: row for row in RowAnswerer(model, job(model)).answer(rows)}
    assert found["1"]["error"]["kind"] == "model" and "broken" in found["1"]["error"]["message"]
    assert "text" in found["0"] and "text" in found["2"]


@pytest.mark.parametrize("geometry", ["pad", "crop"])
def test_the_encoder_sees_the_same_picture_as_in_generate(model_dir: Path, geometry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    noise = Image.frombytes("RGBA", (70, 50), os.urandom(4 * 70 * 50))
    noise.save(file, "PNG")
    with FastVLM.load(model_dir, "ort", threads=1, geometry=geometry, background="red") as vlm:
        backend = Failing(vlm._engine.backend)
        seen = list[Any]()
        backend.fails = lambda pixel_values: seen.append(pixel_values.copy())
        monkeypatch.setattr(vlm._engine, "backend", backend)
        (found,) = RowAnswerer(vlm, job(vlm)).answer([Row("a", file.getvalue(), "x")])
        assert vlm.generate("x", file.getvalue(), max_new_tokens=6).timings.cached_images == 1  # found by its content
    assert len(seen) == 1
    assert 0 < found["timings"]["preprocess_ms"] < found["timings"]["ttft_ms"]


def test_two_pictures_are_decoded_at_a_time_and_one_without_memory_again_alone(model: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    active, counts, alone = 0, list[int](), list[int]()

    def preprocess(image: Any, *arguments: Any) -> Any:
        nonlocal active
        with lock:
            active += 1
            counts.append(active)
        try:
            time.sleep(0.02)
            if image == hungry and counts.count(-1) == 0:
                counts.append(-1)
                raise PictureError("only 1 MiB is free", "close other programs", "memory")
            if image == hungry:
                with lock:
                    alone.append(active)
            if image == hopeless:
                raise PictureError("only 2 MiB are free", "close other programs", "memory")
            return prepared(image, *arguments)
        finally:
            with lock:
                active -= 1

    hungry, hopeless = picture(811), picture(812)
    monkeypatch.setattr(module, "preprocess", preprocess)
    rows = [Row(str(number), picture(number), "x") for number in range(801, 820)]
    found = {row["id"]: row for row in RowAnswerer(model, job(model)).answer(rows)}
    assert max(counts) == 2 and alone == [1]
    assert [id for id, row in found.items() if "error" in row] == ["812"]
    assert found["812"]["error"]["kind"] == "memory" and "2 MiB" in found["812"]["error"]["message"]


def test_rows_are_answered_at_the_size_of_the_job(tmp_path: Path) -> None:
    with FastVLM.load(build_sizes(tmp_path / "model"), "ort", threads=1, slots=3) as sized:
        auto = with_cascade(sized, 1.0)
        for vlm, asked, size, tried in ((sized, SMALL, SMALL, []), (sized, "auto", LARGE, []), (auto, "auto", LARGE, SIZES)):
            rows = [Row(str(number), picture(number), "x") for number in range(6)]
            chosen = job_for(vlm.manifest, {"max_new_tokens": 6}, image_size=asked)  # type: ignore[arg-type]
            for row in RowAnswerer(vlm, chosen).answer(rows):
                assert row["text"] == sized.generate("x", picture(int(row["id"])), image_size=size, max_new_tokens=6).text
                assert (row["image_size"], row["tried_sizes"]) == (size, tried)


def test_an_error_about_a_picture_keeps_its_kind_in_another_process() -> None:
    error = pickle.loads(pickle.dumps(PictureError("a.jpg has 9 pixels", "take another", "too_large")))
    assert (error.what, error.mend, error.kind) == ("a.jpg has 9 pixels", "take another", "too_large")
