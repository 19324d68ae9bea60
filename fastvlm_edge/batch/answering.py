"""Rows -> rows of results. Threads open pictures and ask, so that all slots of the engine are in use. What fails becomes an error."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
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

_SHOWN = ("text", "confidence", "stop_reason", "image_size", "tried_sizes", "timings")
"""Of a reply."""
AHEAD = 2
"""Rows whose pictures are opened and encoded while the others are answered."""


@dataclass(eq=False)
class _Call:
    """What the threads of one call of `RowAnswerer.answer` share."""

    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    streams: set[ReplyStream] = field(default_factory=set)
    """Those that are read now."""

    def stop(self) -> None:
        """End what is running; nothing else begins."""
        self.stopping.set()
        with self.lock:
            streams = list(self.streams)
        for stream in streams:
            stream.close()


class RowAnswerer:
    """Answers rows with a model, as many at a time as it has slots."""

    def __init__(self, vlm: FastVLM, job: Job, *, ahead: int | None = None) -> None:
        """`ahead` is how many pictures are prepared while all slots are busy; None means AHEAD."""
        self._vlm = vlm
        self._options = {**job.sampling, "system": job.system, "image_size": job.image_size}
        self._threads = vlm.slots + (AHEAD if ahead is None else ahead)
        self._probing = threading.Lock()

    def answer(self, rows: Iterable[Row]) -> Generator[dict[str, Any], None, None]:
        """The result of each row, as soon as it is known.

        It is {id, text, confidence, stop_reason, image_size, tried_sizes, timings}, or {id, error: {kind, message}}.
        Kinds: those of `PictureError`; `input`, for a row that is not complete; `context`, for a prompt that is too long; `prompt`, for
        another fault of it; `model`, if the model fails for this row and works for another. Closing the iterator cancels what is running.
        Raises FastVLMError if the model no longer works.
        """
        source, call = iter(rows), _Call()
        running: set[Future[dict[str, Any]]] = set()
        pool = ThreadPoolExecutor(self._threads, "fastvlm-batch")
        try:
            while True:
                while len(running) < 2 * self._threads and (row := next(source, None)) is not None:
                    running.add(pool.submit(self._answer, row, call))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            call.stop()
            pool.shutdown(cancel_futures=True)

    def _answer(self, row: Row, call: _Call) -> dict[str, Any]:
        if row.reason is not None:
            return _error(row, "input", row.reason)
        try:
            stream = self._vlm.stream(row.prompt or "", _open(row), **self._options)
        except PictureError as error:
            return _error(row, error.kind, str(error))
        except ContextFull as error:
            return _error(row, "context", str(error))
        except FastVLMError as error:
            return self._fault(row, error, "prompt", call)
        except Exception as error:
            return self._fault(row, error, "model", call)
        with call.lock:
            call.streams.add(stream)
        try:
            if call.stopping.is_set():
                stream.close()
            return _result(row, stream.wait())
        except PictureError as error:
            return _error(row, error.kind, str(error))
        except Exception as error:
            return self._fault(row, error, "model", call)
        finally:
            with call.lock:
                call.streams.discard(stream)

    def _fault(self, row: Row, error: Exception, kind: str, call: _Call) -> dict[str, Any]:
        """The result of a row that failed, if the model still works. Raises FastVLMError otherwise."""
        message = str(error) if isinstance(error, FastVLMError) else one_line(error)
        if call.stopping.is_set() or self._works():
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


def _result(row: Row, reply: Reply) -> dict[str, Any]:
    shown = reply.to_json()
    return {"id": row.id, **{name: shown[name] for name in _SHOWN}}


def _error(row: Row, kind: str, message: str) -> dict[str, Any]:
    return {"id": row.id, "error": {"kind": kind, "message": message}}
