"""Versions of TensorRT with known faults that concern these engines: what goes wrong, and what helps.

Sources are public issues and release notes. Faults of features that the engines do not use are left out: 10.15 with NVFP4 weights
(release notes of TensorRT-Edge-LLM 0.6.0), 10.16 and 11.0 with the `Attention` operator (NVIDIA/TensorRT-Model-Connect#245, #955). The
refusal of INT8 activations by 10.16 on Orin (NVIDIA/TensorRT#4832) needs no advice: `build` then takes another graph of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault of the versions from `first` to before `fixed`."""

    first: tuple[int, ...]
    fixed: tuple[int, ...]
    what: str
    """For a sentence that begins with the version."""
    mend: str
    sources: str
    """Public issues."""
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    """GPUs that it is known of; empty for all."""
    only_dynamic: bool = False
    """Whether engines of fixed shapes do not have it."""


_EDGE_LLM = "NVIDIA/TensorRT-Edge-LLM"

FAULTS = {
    "tensorrt": (
        Fault(
            (10, 3),
            (10, 5),
            "reported to compute transformers with dynamic shapes wrongly",
            "fastvlm-edge build MODEL --static (or install TensorRT 10.7 for L4T, see docs/jetpack-6.md)",
            "NVIDIA/TensorRT#4419, #4330",
            only_dynamic=True,
        ),
        Fault(
            (10, 3),
            (10, 8),
            "reported to compute other results with dynamic shapes than with fixed ones, and less exact ones with several profiles",
            "fastvlm-edge build MODEL --static (--profiles 1 may be enough)",
            "NVIDIA/TensorRT#4250",
            only_dynamic=True,
        ),
        Fault(
            (10, 13),
            (10, 15),
            "reported to compute products that share their input wrongly on Thor, if the batch is 1",
            "sdkmanager (on another computer, the board in recovery mode): JetPack 7.2, which has TensorRT 10.16",
            f"{_EDGE_LLM}#151, #105",
            ((11, 0),),
        ),
        Fault(
            (11, 2),
            (11, 3),
            "reported to crash when a program ends",
            "pip install --upgrade tensorrt",
            "NVIDIA/TensorRT-Model-Connect#428",
        ),
    )
}
"""Library -> its faults."""


def find_faults(library: str, version: str, compute_capability: tuple[int, int] | None) -> list[Fault]:
    """The faults of a version such as "10.3.0.30" on a GPU; those that are known of some GPUs only count if this is one of them."""
    numbers = tuple(int(part) for part in version.split(".") if part.isdigit())
    return [
        fault
        for fault in FAULTS.get(library, ())
        if fault.first <= numbers < fault.fixed and (not fault.compute_capabilities or compute_capability in fault.compute_capabilities)
    ]
