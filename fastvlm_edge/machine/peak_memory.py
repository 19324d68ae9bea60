"""The most memory that a process, and a model on the GPU, took so far."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def peak_host_mib(status: Path = Path("/proc/self/status")) -> float:
    """Largest resident set of this process so far: VmHWM of proc(5), which, unlike `ru_maxrss`, does not count what started it."""
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
    """The most device memory seen at any `look`, beyond what a bare CUDA context takes. Caching allocators do not give back, so a look
    behind every run sees their peak. Only true while nothing else uses the GPU; on a Jetson, host memory counts too."""

    def __init__(self, free: Callable[[], int]) -> None:
        """`free` gives the bytes that are free now."""
        self._free = free
        self._before = free()
        self._least = self._before

    def look(self) -> int:
        """MiB at the most so far."""
        self._least = min(self._least, self._free())
        return (self._before - self._least) >> 20
