"""Clocks, bandwidth and memory of Jetson modules by power mode, each figure with its source. `plan` predicts from them."""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm_edge.errors import FastVLMError

_GIB = 1 << 30


@dataclass(frozen=True)
class Mode:
    """A power mode of nvpmodel."""

    name: str
    watts: float
    """Power budget of the module."""
    gpu_mhz: float
    """Highest clock of the GPU in this mode."""
    bandwidth: float
    """Bytes/s of the memory: its clock times its width."""


@dataclass(frozen=True)
class Board:
    """A Jetson module; `name` is its target."""

    name: str
    title: str
    memory: int
    """Bytes."""
    multiprocessors: int
    fp16_per_clock: int
    """Dense FP16 operations of the tensor cores, per clock and multiprocessor."""
    modes: tuple[Mode, ...]
    """The fastest mode is the last."""
    source: str

    def fp16_rate(self, mode: Mode) -> float:
        """Dense FP16 operations/s; in INT8 there are twice as many."""
        return self.multiprocessors * self.fp16_per_clock * mode.gpu_mhz * 1e6

    def mode(self, name: str | None) -> Mode:
        """The mode called `name`, or the fastest for None. Raises FastVLMError, with the names that exist, if there is no such mode."""
        if name is None:
            return self.modes[-1]
        for mode in self.modes:
            if mode.name.lower() == name.lower():
                return mode
        names = ", ".join(mode.name for mode in self.modes)
        raise FastVLMError(f"plan has no figures for power mode {name!r} of {self.title}", f"use one of: {names}")


_ORIN = 2048
"""170 sparse INT8 TOPS of AGX Orin's GPU at 1.3 GHz (Jetson AGX Orin technical brief) are 42.5 dense FP16 TFLOPS: 2,043 a clock and SM."""

BOARDS = {
    board.name: board
    for board in (
        Board(
            "orin-nano",
            "Jetson Orin Nano 8 GB",
            8 * _GIB,
            8,
            _ORIN,
            (Mode("15W", 15, 625, 68e9), Mode("25W", 25, 918, 102e9), Mode("MAXN_SUPER", 25, 1020, 102e9)),
            "Orin Nano data sheet (625 MHz, 68 GB/s, 15 W); JetPack 6.2 release, Super modes (918 and 1020 MHz, 102 GB/s); MAXN_SUPER is "
            "without a limit, 25 W are assumed for its energy",
        ),
        Board(
            "orin-nx",
            "Jetson Orin NX 16 GB",
            16 * _GIB,
            8,
            _ORIN,
            (Mode("25W", 25, 408, 102.4e9), Mode("MAXN", 25, 918, 102.4e9), Mode("MAXN_SUPER", 40, 1173, 102.4e9)),
            "Orin NX data sheet (918 MHz, 102.4 GB/s); Jetson Linux Developer Guide, power modes; JetPack 6.2 release (1173 MHz, 40 W)",
        ),
        Board(
            "orin",
            "Jetson AGX Orin 64 GB",
            64 * _GIB,
            16,
            _ORIN,
            (Mode("MAXN", 60, 1300.5, 204.8e9),),
            "AGX Orin data sheet (1.3 GHz, 204.8 GB/s, 60 W); the clocks of its other modes were not found in a public source",
        ),
        Board(
            "thor",
            "Jetson AGX Thor 128 GB (T5000)",
            128 * _GIB,
            20,
            8192,
            (Mode("MAXN", 130, 1575, 273e9),),
            "Jetson Thor data sheet (2,070 sparse FP4 TFLOPS at 1.57 GHz are 258 dense FP16, 273 GB/s, 130 W)",
        ),
    )
}
