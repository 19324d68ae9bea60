"""Rows -> rows of results. Threads open pictures and ask, so that all slots of the engine are in use. What fails becomes an error."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlm_edge.batch.job import Job
from fastvlm_edge.batch.rows import Row
from fastvlm_edge.errors import FastVLMError, PictureError, one_line
from fastvlm_edge.evaluation.data import ArchivedPicture
from fastvlm_edge.generation.answer import ContextFull
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.stream import ReplyStream
from fastvlm_edge.generation.vlm import FastVLM
from fastvlm_edge.inputs.preprocess import preprocess, to_pixels

AHEAD = 2
"""Rows whose pictures are opened and encoded while the others are answered."""

DECODED = 2
"""Pictures that a process decodes at a time. The memory that each needs is compared with what is free when it begins."""
_turns = threading.BoundedSemaphore(DECODED)
_alone = threading.Lock()


class RowAnswerer:
    """Answers rows with a model, as many at a time as it has slots."""

    def __init__(self, vlm: FastVLM, job: Job, *, ahead: int | None = None) -> None:
        """`ahead` is how many pictures are prepared while all slots are busy; None means AHEAD."""
        self._vlm, self._job = vlm, job
        self._options = {**job.sampling, "system": job.system}
        self._threads = vlm.slots + (AHEAD if ahead is None else ahead)
        self._lock = threading.Lock()
        self._streams: set[ReplyStream] = set()
        """Those that are read now."""
        self._probing = threading.Lock()

    def answer(self, rows: Iterable[Row]) -> Generator[dict[str, Any], None, None]:
        """The result of each row, as soon as it is known: {id, text, confidence, stop_reason, timings}, or {id, error: {kind, message}}.

        Kinds: those of `PictureError`; `input`, for a row that is not complete; `context`, for a prompt that is too long; `prompt`, for
        another fault of it; `model`, if the model fails for this row and works for another. Closing the iterator cancels what is running.
        Raises FastVLMError if the model no longer works.
        """
        source, stopping = iter(rows), threading.Event()
        running: set[Future[dict[str, Any]]] = set()
        pool = ThreadPoolExecutor(self._threads, "fastvlm-batch")
        try:
            while True:
                while len(running) < 2 * self._threads and (row := next(source, None)) is not None:
                    running.add(pool.submit(self._answer, row, stopping))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            stopping.set()
            for stream in self._reading():
                stream.close()
            pool.shutdown(cancel_futures=True)

    def _reading(self) -> list[ReplyStream]:
        with self._lock:
            return list(self._streams)

    def _answer(self, row: Row, stopping: threading.Event) -> dict[str, Any]:
        if row.reason is not None:
            return _error(row, "input", row.reason)
        try:
            picture, decode_ms = self._decode(row)
            if stopping.is_set():
                return _error(row, "model", "the batch was stopped")
            stream = self._vlm.stream(row.prompt or "", picture, **self._options)
        except PictureError as error:
            return _error(row, error.kind, str(error))
        except ContextFull as error:
            return _error(row, "context", str(error))
        except FastVLMError as error:
            return self._fault(row, error, "prompt", stopping)
        except Exception as error:
            return self._fault(row, error, "model", stopping)
        with self._lock:
            self._streams.add(stream)
        try:
            if stopping.is_set():
                stream.close()
            return _result(row, stream.wait(), decode_ms)
        except PictureError as error:
            return _error(row, error.kind, str(error))
        except Exception as error:
            return self._fault(row, error, "model", stopping)
        finally:
            with self._lock:
                self._streams.discard(stream)

    def _decode(self, row: Row) -> tuple[Image.Image, float]:
        """The picture of a row, as the encoder sees it, and how many ms it took. Raises PictureError.

        A picture for which the memory is too small is tried again alone.
        """
        try:
            with _turns:
                return self._prepare(row)
        except PictureError as error:
            if error.kind != "memory":
                raise
        with _alone, ExitStack() as turns:
            for _ in range(DECODED):
                turns.enter_context(_turns)
            return self._prepare(row)

    def _prepare(self, row: Row) -> tuple[Image.Image, float]:
        began, vlm = time.perf_counter(), self._vlm
        pixel_values = preprocess(_open(row), vlm.manifest.vision.image_size, vlm.geometry, vlm.background)
        return Image.fromarray(to_pixels(pixel_values)), (time.perf_counter() - began) * 1e3

    def _fault(self, row: Row, error: Exception, kind: str, stopping: threading.Event) -> dict[str, Any]:
        """The result of a row that failed, if the model still works. Raises FastVLMError otherwise."""
        message = str(error) if isinstance(error, FastVLMError) else one_line(error)
        if stopping.is_set() or self._works():
            return _error(row, kind, message)
        if isinstance(error, FastVLMError):
            raise FastVLMError(f"the model failed at the row {row.id}: {error.what}", error.mend) from error
        raise FastVLMError(f"the model failed at the row {row.id}: {message}") from error

    def _works(self) -> bool:
        """Whether the model still answers a question about a picture."""
        with self._probing:
            try:
                picture = Image.frombytes("RGB", (16, 16), os.urandom(3 * 16 * 16))  # one that is in no cache
                self._vlm.generate("?", picture, max_new_tokens=1)
            except Exception:
                return False
            return True


def _open(row: Row) -> Path | bytes:
    """The picture of a row, still encoded. Raises PictureError."""
    if isinstance(row.image, ArchivedPicture):
        try:
            data = row.image.load()
        except OSError as error:
            raise PictureError(f"{row.image.name} cannot be read ({error})", "check the archive", "unreadable") from None
        assert isinstance(data, bytes)
        return data
    assert row.image is not None
    if isinstance(row.image, Path) and os.path.exists(row.image) and not os.path.isfile(row.image):  # a named pipe would be waited for
        raise PictureError(f"{row.image} is not a file", "give the path of a picture", "not_a_picture")
    return row.image


def _result(row: Row, reply: Reply, decode_ms: float) -> dict[str, Any]:
    shown = reply.to_json()
    for name in ("preprocess_ms", "ttft_ms"):
        shown["timings"][name] = round(shown["timings"][name] + decode_ms, 3)
    return {"id": row.id, **{name: shown[name] for name in ("text", "confidence", "stop_reason", "timings")}}


def _error(row: Row, kind: str, message: str) -> dict[str, Any]:
    return {"id": row.id, "error": {"kind": kind, "message": message}}
