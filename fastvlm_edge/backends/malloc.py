"""Thresholds of the C library's heap while a model is loaded. They concern the whole process: only `tune_process` sets them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Option numbers of glibc's malloc.h, see mallopt(3)."""
_LOADING = 1 << 20
_RUNNING = 32 << 20
"""Size in bytes from which malloc maps a block separately, and returns it to the system when it is freed. The low value is for loading.
After that it is 32 MiB, up to which glibc raises its own threshold anyway. With the low value, the kernel would take back and clear
scratch memory between operators, which takes time."""


@contextmanager
def loading() -> Iterator[None]:
    """Return memory that is freed during a load to the system. This has an effect on glibc only.

    onnxruntime transposes and packs the weights, and frees the copies that it no longer needs. By default, glibc keeps most of that memory
    until the process ends (measured by `benchmarks/settings.py`). Thresholds that the user set in the environment are not changed.
    """
    mallopt = None if _set_by_user() else getattr(_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LOADING)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _RUNNING)
            mallopt(_M_TRIM_THRESHOLD, 2 * _RUNNING)
        trim()


def trim() -> None:
    """Return the free memory of the heap to the system, where the C library can."""
    trimmed = getattr(_library(), "malloc_trim", None)
    if trimmed is not None:
        trimmed(0)


def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if os.name == "posix" else None


def _set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in os.environ or f"malloc.{name}" in tunables for name in ("mmap_threshold", "trim_threshold"))
