"""The names that `--target` accepts in `build`, `plan` and `bundle`, and what each command needs to know about them.

A Jetson's name may end in its JetPack, `orin-nano-jp6`: `bundle` needs it, and for the other commands it makes no difference.

Sources: NVIDIA's CUDA GPU list (compute capabilities), the TensorRT support matrix (precisions by compute capability; INT4 is weight-only),
the TensorRT for RTX support matrix, the JetPack release notes (TensorRT of each), the Jetson module data sheets (memory).
TensorRT 10.7 on JetPack 6: NVIDIA/TensorRT#4347 (10.8 has no package for it) and `faults.py`. TensorRT 11.4 on JetPack 7.2.2: the migration
guide of 11.4.1 for Jetson, which names AGX Orin and Thor, but neither Orin Nano nor Orin NX.
TensorRT for RTX has no product of FP32 matrices for Turing (1.7.1: "Cannot compile operation ... for Turing (SM75): FP32 GEMM is not
supported"), and every precision has some (docs/precision.md), so only TensorRT itself can build for `sm75`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.boards.chips import CHIPS
from fastvlm_edge.machine.boards.rates import BOARDS, Board
from fastvlm_edge.machine.boards.systems import SYSTEMS, BundleTarget

_ALL = ("fp32", "fp16", "bf16", "int8", "int4")
_NO_BF16 = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class Target:
    """A board, a generation of GPUs, or a computer without a GPU."""

    name: str
    title: str
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    """Of its GPUs; empty for a computer that computes on its CPU, for which `build` has nothing to do."""
    libraries: tuple[str, ...] = ()
    """Libraries that can build its engines, the better one first."""
    versions: str = ""
    """Versions of these libraries, for people."""
    precisions: tuple[str, ...] = _ALL
    """Number types that its GPU computes in."""
    memory: int | None = None
    """Bytes of the smallest board of this name, shared by CPU and GPU: a build must fit on all of them. None for a graphics card, which
    has its own memory. `plan` predicts for the one module that its figures are of (`board`): AGX Orin 64 GB, not 32."""
    listed: bool = True
    """Whether the library's documentation lists these GPUs. If not, a build is an attempt."""
    board: Board | None = None
    """Clocks, bandwidth and power modes; None if `plan` has no figures."""
    systems: tuple[str, ...] = ()
    """Systems in SYSTEMS that it can run; empty if `bundle` has none."""

    @property
    def jetpacks(self) -> tuple[int, ...]:
        """Major versions of JetPack; empty if this is not a Jetson."""
        return tuple(system.jetpack for name in self.systems for system in (SYSTEMS[name],) if system.jetpack is not None)


_RTX, _TENSORRT, _EITHER = ("tensorrt_rtx",), ("tensorrt",), ("tensorrt", "tensorrt_rtx")
_GIB = 1 << 30
_ORIN, _THOR = (CHIPS["tegra234"][1],), (CHIPS["tegra264"][1],)
_ORIN_TENSORRT = "10.3, better 10.7 (JetPack 6.1, 6.2), 10.16 (7.2)"
_ORIN_SYSTEMS, _THOR_SYSTEMS = ("orin-jp6", "orin-jp7"), ("thor",)


def _jetson_orin(name: str, title: str, memory: int, versions: str = _ORIN_TENSORRT) -> Target:
    return Target(
        name,
        title,
        _ORIN,
        _TENSORRT,
        versions,
        memory=memory * _GIB,
        board=BOARDS[name],
        systems=_ORIN_SYSTEMS,
    )


TARGETS = {
    target.name: target
    for target in (
        Target("rtx", "any GeForce RTX 30, 40 or 50", ((8, 6), (8, 9), (12, 0)), _RTX, "RTX 1.2 or newer"),
        _jetson_orin("orin-nano", "Jetson Orin Nano 8 GB", memory=8),
        _jetson_orin("orin-nx", "Jetson Orin NX 16 GB", memory=16),
        _jetson_orin("orin", "Jetson AGX Orin 32 or 64 GB", memory=32, versions=f"{_ORIN_TENSORRT}, 11.4 (7.2.2)"),
        Target(
            "thor",
            "Jetson AGX Thor 128 GB",
            _THOR,
            _TENSORRT,
            "10.13 (JetPack 7.0, 7.1), 10.16 (7.2), 11.4 (7.2.2)",
            memory=128 * _GIB,
            board=BOARDS["thor"],
            systems=_THOR_SYSTEMS,
        ),
        Target("sm75", "Turing: RTX 20, T4", ((7, 5),), _TENSORRT, "10.3 or newer", _NO_BF16),
        Target("sm80", "Ampere: A100, A30", ((8, 0),), _EITHER, "10.3 or newer, RTX 1.4 or newer"),
        Target("sm86", "Ampere: RTX 30, A10, A40", ((8, 6),), _EITHER, "10.3 or newer, RTX 1.2 or newer"),
        Target("sm87", "Jetson Orin, any", _ORIN, _TENSORRT, "10.3 or newer", systems=_ORIN_SYSTEMS),
        Target("sm89", "Ada: RTX 40, L4, L40", ((8, 9),), _EITHER, "10.3 or newer, RTX 1.2 or newer"),
        Target("sm90", "Hopper: H100, H200", ((9, 0),), _TENSORRT, "10.3 or newer"),
        Target("sm110", "Jetson Thor, any", _THOR, _TENSORRT, "10.13 or newer", systems=_THOR_SYSTEMS),
        Target("sm120", "Blackwell: RTX 50, RTX PRO", ((12, 0),), _EITHER, "10.8 or newer, RTX 1.2 or newer"),
        Target("sm121", "Blackwell: GB10 (DGX Spark)", ((12, 1),), _EITHER, "10.14 or newer, RTX 1.5 or newer"),
        Target("aarch64", "64-bit Arm, CPU", systems=("aarch64",)),
        Target("x86_64", "x86-64, CPU", systems=("x86_64",)),
    )
}

RTX_GPUS = frozenset(
    numbers for target in TARGETS.values() if "tensorrt_rtx" in target.libraries for numbers in target.compute_capabilities
)
"""Compute capabilities that TensorRT for RTX can build for."""
BUILD_NAMES = tuple(target.name for target in TARGETS.values() if target.compute_capabilities)
"""Targets that `build` can serve."""
PLAN_NAMES = tuple(target.name for target in TARGETS.values() if target.board is not None)
"""Targets that `plan` can serve."""
BUNDLE_NAMES = tuple(
    f"{name}-jp{jetpack}" if jetpack is not None and len(target.systems) > 1 else name
    for name, target in TARGETS.items()
    for jetpack in (SYSTEMS[system].jetpack for system in target.systems)
)
"""Targets that `bundle` can serve, with their JetPack if there are several."""


# One function for each command --------------------------------------------------------------------------------------------------


def build_target(name: str) -> Target:
    """The target that `build` calls `name`. Raises FastVLMError, with the names that it can serve, for all others."""
    target, _ = _find(name, ("auto", *BUILD_NAMES))
    if not target.compute_capabilities:
        raise FastVLMError(
            f"target {name!r} is a computer without a GPU, and TensorRT engines need one (onnxruntime runs the model directory as it is)",
            f"use one of: auto, {', '.join(BUILD_NAMES)}",
        )
    return target


def plan_board(name: str) -> Board:
    """The board that `plan` calls `name`. Raises FastVLMError, with the names that it can serve, for all others."""
    target, _ = _find(name, PLAN_NAMES)
    if target.board is None:
        raise FastVLMError(
            f"plan has no clocks, bandwidth and power modes for target {name!r} ({target.title})", f"use one of: {', '.join(PLAN_NAMES)}"
        )
    return target.board


def bundle_target(name: str, python: tuple[int, int] | None = None) -> BundleTarget:
    """The system that `bundle` calls `name`, with another Python if one is given.

    Raises FastVLMError if `bundle` has no such system, `name` leaves open which of several it is, or `python` is not the version that
    JetPack's TensorRT is built for.
    """
    target, jetpack = _find(name, BUNDLE_NAMES)
    if not target.systems:
        raise FastVLMError(
            f"target {name!r} is a GPU ({target.title}), and bundles for computers run on the CPU", "use x86_64, or aarch64 for 64-bit Arm"
        )
    fitting = [SYSTEMS[system] for system in target.systems if jetpack in (None, SYSTEMS[system].jetpack)]
    if len(fitting) > 1:
        choices = " or ".join(f"{name}-jp{system.jetpack}" for system in fitting)
        raise FastVLMError(
            f"target {name!r} does not say which JetPack the board has, and a bundle fits only one",
            f"use {choices} (on the board, fastvlm-edge doctor prints its JetPack)",
        )
    (system,) = fitting
    if python is None or python == system.python:
        return system
    if system.cuda is not None:
        fixed = "{}.{}".format(*system.python)
        raise FastVLMError(f"{name} has Python {fixed}, which its TensorRT is built for", "leave --python out")
    if python < (3, 10):
        raise FastVLMError("fastvlm-edge needs Python 3.10 or newer, and --python is {}.{}".format(*python), "give a newer --python")
    return replace(system, python=python)


def _find(name: str, usable: Iterable[str]) -> tuple[Target, int | None]:
    """The row of a name, and the JetPack that the name ends in. `usable` are the names that the command can serve."""
    found = re.fullmatch(r"(.+)-jp(\d+)", name)
    base, jetpack = (found.group(1), int(found.group(2))) if found else (name, None)
    if base not in TARGETS:
        raise FastVLMError(f"target {name!r} is unknown", f"use one of: {', '.join(usable)}")
    target = TARGETS[base]
    if jetpack is not None and jetpack not in target.jetpacks:
        if not target.jetpacks:
            raise FastVLMError(f"target {name!r} is unknown: {base} ({target.title}) is not a Jetson", f"use {base}")
        known = " or ".join(f"{base}-jp{each}" for each in target.jetpacks)
        raise FastVLMError(f"target {name!r} is unknown: fastvlm-edge does not support JetPack {jetpack} on {target.title}", f"use {known}")
    return target, jetpack


# Engines ------------------------------------------------------------------------------------------------------------------------


def target_of_device(compute_capability: tuple[int, int], libraries: Sequence[str]) -> Target:
    """The target `smXY` of the GPU in this machine; `libraries` are those that are installed.

    A GPU that has no row gets an unlisted target: TensorRT may be able to build for it. Raises FastVLMError if another library is needed.
    """
    name = "sm{}{}".format(*compute_capability)
    if name in TARGETS:
        target = TARGETS[name]
        if libraries and not set(target.libraries) & set(libraries):
            what = f"{target.title} ({name}) needs {' or '.join(target.libraries)} {target.versions}, and only {libraries[0]} is installed"
            raise FastVLMError(
                what, f"run: {'sudo apt install nvidia-jetpack' if target.jetpacks else f'pip install {target.libraries[0]}'}"
            )
        return target
    title = "this GPU of compute capability {}.{}".format(*compute_capability)
    return Target(name, title, (compute_capability,), tuple(libraries) or _EITHER, "not documented", listed=False)


def check_precision(target: Target, kinds: Sequence[str], precision: str) -> None:
    """Raise FastVLMError if a model uses a number type that the target cannot compute in; `kinds` are the types of the model's stages."""
    for kind in kinds:
        if kind not in target.precisions:
            others = " or ".join(other for other in ("fp16", "int8", "int4") if other != precision)
            raise FastVLMError(
                f"{target.title} ({target.name}) has no {kind.upper()}, which --precision {precision} computes in",
                f"convert with --precision {others}",
            )
