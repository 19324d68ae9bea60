"""The results of a batch: one JSON object per line, appended and synced, so that a job that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from fastvlm_edge.batch.job import Job, check_job, read_job, sidecar, write_job
from fastvlm_edge.batch.rows import Row
from fastvlm_edge.batch.summary import Summary
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.json_record import parse_json

SYNC_SECONDS = 1.0
"""A row is on the disk at most this long after it was written. Before, only a power cut can lose it: a killed process does not."""

_FAILED = 100
"""So many failures in a row without an answer between them stop a batch."""
_OUTSIDE = ("missing", "unreadable", "memory", "model", "worker")
"""Errors that all rows have when a disk, the network or the machine fails."""

_EARLIER, _CLAIMED, _WRITTEN = range(3)


class Results:
    """A file of results that this process alone may write. Rows have unique ids; their order is free."""

    def __init__(self, path: Path, job: Job, *, retry_errors: bool = False) -> None:
        """Open the file, or begin it. A line that was not written completely is removed, and with `retry_errors` all rows with an error.

        Raises FastVLMError if another process writes it, if it was begun for another job, or if it is not a file of results. With
        `retry_errors`, a file with nothing but errors may begin another job.
        """
        self.path, self.job = path, job
        self.rows = 0
        """Number of rows in the file."""
        self.errors: Counter[str] = Counter()
        """How many of them have an error, by its kind."""
        self._ids: dict[str, int] = {}
        self._asked: dict[str, str] = {}
        """What was asked, of rows of an earlier run until they are claimed, and of claimed ones until they are written."""
        self._lock = threading.Lock()
        """Held while the file is written or synced."""
        self._dirty = False
        self._failure: OSError | None = None
        """Of a sync in the background."""
        self._wake = threading.Event()
        try:
            self._file = _locked(path)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            self._begin(job, retry_errors=retry_errors)
        except OSError as error:
            os.close(self._file)
            raise _unwritable(path, error) from None
        except BaseException:
            os.close(self._file)
            raise
        self._thread = threading.Thread(target=self._sync_often, name="fastvlm-results", daemon=True)
        self._thread.start()

    def claim(self, id: str, asked: str | None = None) -> Literal["new", "done", "twice"]:
        """What to do with the next row of the input: `done` if the file has it since before, `twice` if its id was claimed already.

        `asked` is `Row.asked()`, which is written with the answer. Raises FastVLMError if the file has the answer of another question.
        """
        state = self._ids.get(id)
        if state in (_CLAIMED, _WRITTEN):
            return "twice"
        before = self._asked.pop(id, None)
        if before is not None and asked is not None and before != asked:
            what = f"the row {id} of {self.path} is the answer about another picture or prompt than the input now has for this id"
            raise FastVLMError(what, "give another file with -o, or remove the line of the row to ask again")
        if state is None and asked is not None:
            self._asked[id] = asked
        self._ids[id] = _CLAIMED if state is None else _WRITTEN
        return "new" if state is None else "done"

    def write(self, row: dict[str, Any]) -> bool:
        """Append a row, which has an `id`. False if the file already has a row with this id, which then stays as it is.

        After it returns, a process that is killed does not lose the row. Raises FastVLMError if the disk is full or fails; the row is then
        not in the file, and all earlier rows are.
        """
        asked = None if "error" in row else self._asked.get(row["id"])
        line = _line(row if asked is None else {**row, "asked": asked})
        with self._lock:
            if self._failure is not None:
                raise _unwritable(self.path, self._failure)
            if self._ids.get(row["id"]) in (_EARLIER, _WRITTEN):
                return False
            try:
                self._append(line)
            except OSError as error:
                raise _unwritable(self.path, error) from None
            self._count(row, _WRITTEN)
            self._asked.pop(row["id"], None)
            self._dirty = True
        return True

    def sync(self) -> None:
        """Wait until all rows are on the disk. Raises FastVLMError if that fails."""
        with self._lock:
            try:
                if self._failure is not None:
                    raise self._failure
                self._sync()
            except OSError as error:
                raise _unwritable(self.path, error) from None

    def close(self) -> None:
        """Sync, and let others write the file. May be called twice."""
        if self._wake.is_set():
            return
        self._wake.set()
        self._thread.join()
        try:
            self.sync()
        finally:
            os.close(self._file)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _begin(self, job: Job, *, retry_errors: bool) -> None:
        if os.fstat(self._file).st_size == 0:
            write_job(self.path, job)
            _sync_folder(self.path)
            return
        before = read_job(self.path)
        if not retry_errors or any("error" not in row for _, row in _read(self.path)):
            check_job(self.path, before, job)
        end = 0
        for line, row in _read(self.path):
            end += len(line)
            self._count(row, _EARLIER)
            if isinstance(row.get("asked"), str):
                self._asked[row["id"]] = row["asked"]
        if os.fstat(self._file).st_size > end:
            os.ftruncate(self._file, end)
            os.fsync(self._file)
        if retry_errors and self.errors:
            self._drop_errors()
        if not self.rows:
            write_job(self.path, job)

    def _drop_errors(self) -> None:
        """Replace the file by one without the rows with an error. Whoever waits for the old one sees that it was replaced."""
        with whole_file(self.path) as partial:
            file = _locked(partial)
            try:
                self._ids.clear()
                self.errors.clear()
                self.rows = 0
                for line, row in _read(self.path):
                    if "error" not in row:
                        _write_all(file, line)
                        self._count(row, _EARLIER)
                os.fsync(file)
            except BaseException:
                os.close(file)
                raise
        os.close(self._file)
        self._file = file
        _sync_folder(self.path)

    def _count(self, row: dict[str, Any], state: int) -> None:
        self._ids[row["id"]] = state
        self.rows += 1
        if "error" in row:
            self.errors[str(row["error"].get("kind"))] += 1

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            _write_all(self._file, line)
        except BaseException:
            with contextlib.suppress(OSError):  # otherwise the next start removes what is there of the line
                os.ftruncate(self._file, size)
            raise

    def _sync(self) -> None:
        if self._dirty:
            os.fsync(self._file)
            self._dirty = False

    def _sync_often(self) -> None:
        while not self._wake.wait(SYNC_SECONDS):
            with self._lock:
                try:
                    self._sync()
                except OSError as error:
                    self._failure = error
                    return


def not_done(rows: Iterable[Row], results: Results, summary: Summary) -> Iterator[Row]:
    """The rows that the file does not have yet. Those left out are counted: rows that are done, and rows with the id of an earlier one."""
    for row in rows:
        state = results.claim(row.id, None if row.reason is not None else row.asked())
        if state == "new":
            yield row
        elif state == "done":
            summary.done_before += 1
        else:
            summary.add_twice(row.id)


def while_it_works(answered: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same results. Raises FastVLMError if `_FAILED` in a row have such errors as when a disk or the network is gone: without them."""
    held = list[dict[str, Any]]()
    for row in answered:
        error = row.get("error")
        if error is not None and error["kind"] in _OUTSIDE:
            held.append(row)
            if len(held) >= _FAILED:
                what = f"{_FAILED} rows in a row failed, {held[0]['id']} to {row['id']}; the last error is: {error['message']}"
                mend = "check the disk and the network, or leave these rows out of the input, and run the same command again"
                raise FastVLMError(what, mend)
        else:
            yield from held
            held.clear()
            yield row
    yield from held


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # the name of a file that is not UTF-8
        return json.dumps(row).encode() + b"\n"


def _read(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The complete rows of a file, up to a line that was not written completely.

    Raises FastVLMError if more rows follow such a line.
    """
    torn = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            row = _row(line)
            if row is None:
                torn = torn or number
            elif torn:
                raise FastVLMError(f"{path}, line {torn} is not a row of results", "remove the line, or give another file with -o")
            else:
                yield line, row


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = parse_json(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("error", {}), dict)
    return row if whole else None


def _locked(path: Path) -> int:
    """Open a file, and lock it for this process. Raises FastVLMError if another one has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise FastVLMError(f"{path} is not a file", "give the name of a file, to which rows are added")
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            os.close(file)
            raise FastVLMError(f"another process is writing {path}", "wait until it ends, or give another file with -o") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # it was replaced between the two calls


def _write_all(file: int, data: bytes) -> None:
    """One call, but for a disk that is almost full."""
    written = os.write(file, data)
    while written < len(data):
        written += os.write(file, data[written:])


def _sync_folder(path: Path) -> None:
    """So that the file is still there after a power cut."""
    folder = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _unwritable(path: Path, error: OSError) -> FastVLMError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        mend = "free some space, and run the same command again: it goes on where the file ends"
        return FastVLMError(f"the disk of {path} is full, or the file may not grow", mend)
    return FastVLMError(f"{path} cannot be written ({error.strerror or error})", f"check its folder, and {sidecar(path).name} beside it")
