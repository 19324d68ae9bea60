"""The sha256 of a checkpoint's files, computed in a background thread, because reading 15 GB takes a while."""

from __future__ import annotations

import threading
from types import TracebackType

from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint


class BackgroundHashes:
    """Hashes while its `with` block runs. Leaving the block ends the thread, whether or not it has finished."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._hashes: dict[str, str] = {}
        self._error: Exception | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> BackgroundHashes:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped = True
        self._thread.join()

    def result(self) -> dict[str, str]:
        """File name -> sha256; waits until all files are read. Raises FastVLMError if a file cannot be read."""
        self._thread.join()
        if self._error:
            raise self._error
        return self._hashes

    def _run(self) -> None:
        try:
            self._hashes = self._source.hash_files(self._watch)
        except Exception as error:
            self._error = error

    def _watch(self, _done: int, _total: int) -> None:
        if self._stopped:
            raise InterruptedError
