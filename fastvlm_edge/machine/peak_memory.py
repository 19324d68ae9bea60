"""Peak memory of this process, and of a model on the GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def peak_host_mib(status: Path = Path("/proc/self/status")) -> float:
    """Largest resident set of this process so far, in MiB: VmHWM of proc(5). Unlike `ru_maxrss` it does not include the parent process."""
    try:
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


class DeviceMemory:
    """Peak device memory over all calls of `look`, beyond what a bare CUDA context takes.

    Caching allocators keep their memory, so one look after every run sees their peak. The figure is only right while nothing else uses the
    GPU. On a Jetson it includes host memory.
    """

    def __init__(self, free: Callable[[], int]) -> None:
        """`free` returns the bytes that are free now."""
        self._free = free
        self._before = free()
        self._least = self._before

    def look(self) -> int:
        """Peak so far, in MiB."""
        self._least = min(self._least, self._free())
        return (self._before - self._least) >> 20
