"""Memory of the machine, from /proc."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from fastvlm_edge.machine.probe import Probe


@dataclass(frozen=True)
class Memory:
    """All sizes in bytes. CMA is the contiguous memory that some GPU allocations need; None if the kernel has none."""

    total: int
    """0 if the system does not report its memory."""
    available: int
    cma_total: int | None
    cma_free: int | None
    cma_argument: str | None
    """`cma=` on the kernel's command line, such as `950M`."""
    swap_total: int
    swap_free: int
    swap_zram: int
    """The part of `swap_total` that is compressed memory."""


def read_memory(probe: Probe) -> Memory:
    """From /proc/meminfo, /proc/swaps and /proc/cmdline."""
    table = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", probe.text("proc/meminfo") or "", re.MULTILINE)}
    cma = re.search(r"(?:^|\s)cma=(\S+)", probe.text("proc/cmdline") or "")
    zram = re.findall(r"^/dev/zram\d+\s+\S+\s+(\d+)", probe.text("proc/swaps") or "", re.MULTILINE)
    total_cma = table.get("CmaTotal")
    return Memory(
        total=table.get("MemTotal", 0),
        available=table.get("MemAvailable", table.get("MemFree", 0)),
        cma_total=total_cma or None,
        cma_free=table.get("CmaFree") if total_cma else None,
        cma_argument=cma.group(1) if cma else None,
        swap_total=table.get("SwapTotal", 0),
        swap_free=table.get("SwapFree", 0),
        swap_zram=sum(int(kib) << 10 for kib in zram),
    )


def total_bytes() -> int:
    """Memory of this machine, on every POSIX system, also without /proc."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
