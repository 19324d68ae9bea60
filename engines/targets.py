"""The table of targets: what `--target` may be, and what there is on each.

Sources: NVIDIA's CUDA GPU list (compute capabilities), the TensorRT support matrix (precisions by compute capability; INT4 is weight-only),
the TensorRT for RTX support matrix, the JetPack release notes (TensorRT of each), the Jetson module data sheets (memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.engine_record import capability
from fastvlm_edge.nvidia.tensorrt_library import LIBRARIES

_ALL = ("fp32", "fp16", "bf16", "int8", "int4")
_NO_BF16 = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class Target:
    """A row of the table."""

    name: str
    title: str
    compute_capabilities: tuple[tuple[int, int], ...]
    libraries: tuple[str, ...]
    """Which may build for it, the better first."""
    versions: str
    """Of TensorRT, for a person to read."""
    precisions: tuple[str, ...] = _ALL
    memory: int | None = None
    """Bytes of the board, shared by CPU and GPU; None for a card of its own."""

    listed: bool = True
    """Whether the library's documentation lists these GPUs; False is an attempt."""


_RTX, _PROPER, _EITHER = ("tensorrt_rtx",), ("tensorrt",), ("tensorrt", "tensorrt_rtx")
_GIB = 1 << 30

TARGETS = {
    target.name: target
    for target in (
        Target("rtx", "any GeForce RTX 30, 40 or 50", ((8, 6), (8, 9), (12, 0)), _RTX, "RTX 1.2 or newer"),
        Target("orin-nano", "Jetson Orin Nano 8 GB", ((8, 7),), _PROPER, "10.3 (JetPack 6.1, 6.2), 10.16 (7.2)", memory=8 * _GIB),
        Target("orin-nx", "Jetson Orin NX 16 GB", ((8, 7),), _PROPER, "10.3 (JetPack 6.1, 6.2), 10.16 (7.2)", memory=16 * _GIB),
        Target("orin", "Jetson AGX Orin 32 or 64 GB", ((8, 7),), _PROPER, "10.3 (JetPack 6.1, 6.2), 10.16 (7.2)", memory=32 * _GIB),
        Target("thor", "Jetson AGX Thor 128 GB", ((11, 0),), _PROPER, "10.13 (JetPack 7.0, 7.1), 10.16 (7.2)", memory=128 * _GIB),
        Target("sm75", "Turing: RTX 20, T4", ((7, 5),), _EITHER, "10.3 or newer, RTX 1.2 or newer", _NO_BF16),
        Target("sm80", "Ampere: A100, A30", ((8, 0),), _EITHER, "10.3 or newer, RTX 1.4 or newer"),
        Target("sm86", "Ampere: RTX 30, A10, A40", ((8, 6),), _EITHER, "10.3 or newer, RTX 1.2 or newer"),
        Target("sm87", "Jetson Orin, any", ((8, 7),), _PROPER, "10.3 or newer"),
        Target("sm89", "Ada: RTX 40, L4, L40", ((8, 9),), _EITHER, "10.3 or newer, RTX 1.2 or newer"),
        Target("sm90", "Hopper: H100, H200", ((9, 0),), _PROPER, "10.3 or newer"),
        Target("sm110", "Jetson Thor, any", ((11, 0),), _PROPER, "10.13 or newer"),
        Target("sm120", "Blackwell: RTX 50, RTX PRO", ((12, 0),), _EITHER, "10.8 or newer, RTX 1.2 or newer"),
        Target("sm121", "Blackwell: GB10 (DGX Spark)", ((12, 1),), _EITHER, "10.14 or newer, RTX 1.5 or newer"),
    )
}


def find_target(name: str) -> Target:
    """The row called `name`. Raises FastVLMError with the names there are."""
    if name not in TARGETS:
        raise FastVLMError(f"target {name!r} is unknown; use auto or one of: {', '.join(TARGETS)}")
    return TARGETS[name]


def target_of_device(compute_capability: tuple[int, int], libraries: Sequence[str]) -> Target:
    """The row for the GPU at hand: `smXY`, which says nothing of a board; `libraries` are those installed.

    A GPU that has no row, or whose own library is not there, gets an unlisted one: TensorRT may well build for it.
    """
    name = "sm{}{}".format(*compute_capability)
    if name in TARGETS and set(TARGETS[name].libraries) & set(libraries):
        return TARGETS[name]
    title = f"this GPU of compute capability {capability(compute_capability)}"
    return Target(name, title, (compute_capability,), tuple(libraries) or LIBRARIES, "not documented", listed=False)


def check_precision(target: Target, kinds: Sequence[str], precision: str) -> None:
    """Refuse a plan with a type that the target cannot compute in; `kinds` are the types of its stages. Raises FastVLMError."""
    for kind in kinds:
        if kind not in target.precisions:
            raise FastVLMError(
                f"{target.title} ({target.name}) has no {kind.upper()}, which --precision {precision} computes in; "
                f"convert with --precision {' or '.join(other for other in ('fp16', 'int8', 'int4') if other != precision)}"
            )
