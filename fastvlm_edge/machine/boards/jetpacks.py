"""Which JetPack belongs to which Jetson Linux (L4T), and what it brings.

Sources: NVIDIA's JetPack release pages (developer.nvidia.com/embedded/jetpack-archive), the Jetson AI Lab's `l4t_version.py`
(github.com/dusty-nv/jetson-containers), OE4T/meta-tegra issues 2224 and 2339 (7.2), the TensorRT-Edge-LLM installation guide (7.0, 7.1).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JetPack:
    """One release of JetPack. All versions are (major, minor)."""

    name: str
    l4t: tuple[int, ...]
    """The first Jetson Linux that it came with."""
    python: tuple[int, int]
    """Python of its Ubuntu, which NVIDIA builds the TensorRT bindings for."""
    cuda: tuple[int, int]
    tensorrt: tuple[int, int]
    chips: tuple[str, ...]


_ORIN, _THOR = "tegra234", "tegra264"

JETPACKS = (
    JetPack("5", (35, 1), (3, 8), (11, 4), (8, 5), ("tegra194", _ORIN)),
    JetPack("6.0", (36, 2), (3, 10), (12, 2), (8, 6), (_ORIN,)),
    JetPack("6.1", (36, 4), (3, 10), (12, 6), (10, 3), (_ORIN,)),
    JetPack("6.2", (36, 4, 3), (3, 10), (12, 6), (10, 3), (_ORIN,)),
    JetPack("6.2.1", (36, 4, 4), (3, 10), (12, 6), (10, 3), (_ORIN,)),
    JetPack("6.2.2", (36, 5), (3, 10), (12, 6), (10, 3), (_ORIN,)),
    JetPack("7.0", (38, 2), (3, 12), (13, 0), (10, 13), (_THOR,)),
    JetPack("7.1", (38, 4), (3, 12), (13, 0), (10, 13), (_THOR,)),
    JetPack("7.2", (39, 2), (3, 12), (13, 2), (10, 16), (_ORIN, _THOR)),
    JetPack("7.2.1", (39, 2, 1), (3, 12), (13, 2), (10, 16), (_ORIN, _THOR)),
)


def find_jetpack(l4t: tuple[int, ...]) -> JetPack | None:
    """The JetPack of a Jetson Linux such as (36, 4, 3): the newest of the same major version that is not newer; None if there is none."""
    fitting = [row for row in JETPACKS if row.l4t[0] == l4t[0] and row.l4t <= l4t]
    return fitting[-1] if fitting else None
