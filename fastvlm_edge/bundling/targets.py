"""What a bundle can be made for: the machine, Python, glibc and CUDA that wheels must fit.

Sources: the JetPack release notes (Ubuntu release and CUDA of each), Ubuntu's package lists (python3 and libc6 of 22.04 and 24.04).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from fastvlm_edge.errors import FastVLMError


@dataclass(frozen=True)
class BundleTarget:
    """A row of the table."""

    name: str
    title: str
    machine: str
    """As `uname -m` has it."""
    python: tuple[int, int]
    glibc: tuple[int, int]
    """Newest that a wheel may ask for."""
    cuda: int | None
    """Major version of the CUDA binding; None for a machine that computes on its CPU."""


_HERE = sys.version_info[:2]
_JETPACK_6 = ("aarch64", (3, 10), (2, 35), 12)
_JETPACK_7 = ("aarch64", (3, 12), (2, 39), 13)

TARGETS = {
    target.name: target
    for target in (
        BundleTarget("orin-jp6", "Jetson Orin, JetPack 6 (Ubuntu 22.04, CUDA 12.6)", *_JETPACK_6),
        BundleTarget("orin-jp7", "Jetson Orin, JetPack 7 (Ubuntu 24.04, CUDA 13)", *_JETPACK_7),
        BundleTarget("thor", "Jetson Thor, JetPack 7 (Ubuntu 24.04, CUDA 13)", *_JETPACK_7),
        BundleTarget("aarch64", "64-bit Arm, glibc 2.28 or newer, CPU", "aarch64", _HERE, (2, 28), None),
        BundleTarget("x86_64", "x86-64, glibc 2.28 or newer, CPU", "x86_64", _HERE, (2, 28), None),
    )
}


def find_target(name: str, python: tuple[int, int] | None) -> BundleTarget:
    """The row called `name`, for another Python where one is given.

    Raises FastVLMError where there is no such row, or the Python is not the one that JetPack's own TensorRT is built for.
    """
    if name not in TARGETS:
        raise FastVLMError(f"target {name!r} is unknown; use one of: {', '.join(TARGETS)}")
    target = TARGETS[name]
    if python is None or python == target.python:
        return target
    if target.cuda is not None:
        fixed = "{}.{}".format(*target.python)
        raise FastVLMError(f"{name} has Python {fixed}, for which its TensorRT is built; leave --python out")
    if python < (3, 10):
        raise FastVLMError("fastvlm-edge needs Python 3.10 or newer; give --python another one")
    return replace(target, python=python)
