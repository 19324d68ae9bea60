"""The C library's heap while a model is loaded."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h, see mallopt(3)."""
_LOADING = 1 << 20
_RUNNING = 32 << 20
"""Bytes from which a block is mapped by itself. glibc raises its own threshold up to 32 MiB as such blocks are freed, so running has what
it would have anyway. With the lower one the kernel would take back and clear scratch memory between operators, which takes time."""


@contextmanager
def loading() -> Iterator[None]:
    """Give back to the system what a load frees; elsewhere than on glibc this does nothing.

    onnxruntime transposes and packs the weights and frees each copy before; left alone, glibc keeps most of those until the process ends
    (`benchmarks/settings.py` has figures). A threshold that the user set in the environment stays.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt, trim = None if _set_by_user() else getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LOADING)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _RUNNING)
            mallopt(_M_TRIM_THRESHOLD, 2 * _RUNNING)
        if trim is not None:
            trim(0)


def _set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in os.environ or f"malloc.{name}" in tunables for name in ("mmap_threshold", "trim_threshold"))
