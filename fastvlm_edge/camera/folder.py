"""New pictures of a directory, once they are written completely."""

from __future__ import annotations

import os
import stat
import threading
from functools import partial

from fastvlm_edge.camera.frame import Frame, SourceError
from fastvlm_edge.inputs.image_input import load_rgb
from fastvlm_edge.model_dir.mistaken import looks_like_picture

POLL_SECONDS = 0.25
SETTLED_POLLS = 2
"""A file that did not change between this many polls and the one before them is finished."""


class FolderReader:
    """The pictures that come into a directory or change in it from now on, by the time at which they were written.

    Names that begin with a dot, or do not end like that of a picture, are left out: programs write to those first, and rename them.
    """

    def __init__(self, directory: str) -> None:
        """Raises SourceError if the directory cannot be read."""
        self._directory = directory
        self._closed = threading.Event()
        self._known = self._look()
        """Name -> (size, time, inode) of what was there at the beginning or has been given out."""
        self._seen: dict[str, tuple[tuple[int, int, int], int]] = {}
        """Name -> state and the number of polls that found it, of what may still be growing."""
        self._waiting: list[str] = []

    def read(self) -> Frame | None:
        while not self._waiting:
            if self._closed.wait(POLL_SECONDS):
                return None
            self._poll()
        name = self._waiting.pop(0)
        return Frame(partial(load_rgb, os.path.join(self._directory, name)), file=name, time=self._known[name][1] / 1e9)

    def close(self) -> None:
        self._closed.set()

    def _poll(self) -> None:
        found = self._look()
        self._known = {name: state for name, state in self._known.items() if name in found}
        fresh = {name: state for name, state in found.items() if self._known.get(name) != state}
        before = self._seen
        self._seen = {name: (state, before[name][1] + 1 if before.get(name, (None, 0))[0] == state else 0) for name, state in fresh.items()}
        finished = [name for name, (state, polls) in self._seen.items() if polls >= SETTLED_POLLS and state[0] > 0]
        for name in sorted(finished, key=lambda name: (fresh[name][1], name)):
            self._known[name] = self._seen.pop(name)[0]
            self._waiting.append(name)

    def _look(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        try:
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or not looks_like_picture(entry.name):
                        continue
                    try:
                        status = entry.stat()
                    except OSError:  # it has just been removed
                        continue
                    if stat.S_ISREG(status.st_mode):
                        found[entry.name] = (status.st_size, status.st_mtime_ns, status.st_ino)
        except OSError as error:
            raise SourceError(f"{self._directory} cannot be read: {error.strerror or error}") from None
        return found
