"""Which JetPack belongs to which Jetson Linux (L4T), and what it brings: the one table of the toolkit.

Sources: NVIDIA's JetPack release pages (developer.nvidia.com/embedded/jetpack-archive), the Jetson AI Lab's `l4t_version.py`
(github.com/dusty-nv/jetson-containers), OE4T/meta-tegra issues 2224 and 2339 (7.2), the TensorRT-Edge-LLM installation guide (7.0, 7.1).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JetPack:
    """A row. `l4t` is the first Jetson Linux that it came with."""

    name: str
    l4t: tuple[int, ...]
    python: tuple[int, int]
    """Of its Ubuntu, which JetPack's own bindings are built for."""
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

CHIPS = {
    "tegra234": ("Orin", (8, 7)),
    "tegra264": ("Thor", (11, 0)),
    "tegra194": ("Xavier", (7, 2)),
    "tegra186": ("TX2", (6, 2)),
    "tegra210": ("Nano, TX1", (5, 3)),
}
"""Last word of the device tree's `compatible` -> name and compute capability (NVIDIA's CUDA GPU list)."""
SUPPORTED = ("tegra234", "tegra264")
"""Chips whose JetPack has a TensorRT that this toolkit knows."""

MODULES = {
    "p3767-0000": "Orin NX 16 GB",
    "p3767-0001": "Orin NX 8 GB",
    "p3767-0003": "Orin Nano 8 GB",
    "p3767-0004": "Orin Nano 4 GB",
    "p3767-0005": "Orin Nano 8 GB (developer kit)",
    "p3701-0000": "AGX Orin (developer kit)",
    "p3701-0004": "AGX Orin 32 GB",
    "p3701-0005": "AGX Orin 64 GB",
    "p3701-0008": "AGX Orin Industrial",
    "p3834-0000": "Thor T4000",
    "p3834-0008": "Thor T5000",
}
"""Part number of the module, in `compatible` -> what it is (Jetson Linux Developer Guide, "Quick Start", table of configurations)."""


def find_jetpack(l4t: tuple[int, ...]) -> JetPack | None:
    """The row of a Jetson Linux such as (36, 4, 3): the last of the same major version that is not newer; None where there is none."""
    fitting = [row for row in JETPACKS if row.l4t[0] == l4t[0] and row.l4t <= l4t]
    return fitting[-1] if fitting else None
