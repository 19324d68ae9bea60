"""Operating systems that a bundle can be made for: the machine, Python, glibc and CUDA that its wheels must fit.

Sources: the JetPack release notes (Ubuntu release and CUDA of each), Ubuntu's package lists (python3 and libc6 of 22.04 and 24.04).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class BundleTarget:
    """One system. All boards with the same system take the same bundle."""

    name: str
    title: str
    machine: str
    """As `uname -m` prints it."""
    python: tuple[int, int]
    glibc: tuple[int, int]
    """The newest glibc that a wheel may need."""
    cuda: int | None
    """Major version of the CUDA bindings; None if the bundle computes on the CPU."""
    jetpack: int | None = None
    """Major version of JetPack; None if the system is not a Jetson's."""


_HERE = sys.version_info[:2]
_JETPACK_6 = ("aarch64", (3, 10), (2, 35), 12, 6)
_JETPACK_7 = ("aarch64", (3, 12), (2, 39), 13, 7)

SYSTEMS = {
    system.name: system
    for system in (
        BundleTarget("orin-jp6", "Jetson Orin, JetPack 6 (Ubuntu 22.04, CUDA 12.6)", *_JETPACK_6),
        BundleTarget("orin-jp7", "Jetson Orin, JetPack 7 (Ubuntu 24.04, CUDA 13)", *_JETPACK_7),
        BundleTarget("thor", "Jetson Thor, JetPack 7 (Ubuntu 24.04, CUDA 13)", *_JETPACK_7),
        BundleTarget("aarch64", "64-bit Arm, glibc 2.28 or newer, CPU", "aarch64", _HERE, (2, 28), None),
        BundleTarget("x86_64", "x86-64, glibc 2.28 or newer, CPU", "x86_64", _HERE, (2, 28), None),
    )
}
"""Name of the system -> system. The Python of the last two is the one that runs this, unless the user names another."""
