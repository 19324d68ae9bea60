"""Machines as small trees of /proc, /sys, /etc and /dev, written from public documentation, whose source stands at each.

A board is its files and what lies outside of files; `lay_out` writes it, `probe_of` gives the doctor's view of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_edge.machine.probe import Probe

RUNTIME = {"numpy": "2.2.6", "pillow": "11.3.0", "tokenizers": "0.22.1", "onnxruntime": "1.23.2"}
"""Distribution -> version of a complete installation of the runtime."""
_MODULES = {
    "numpy": "numpy",
    "pillow": "PIL",
    "tokenizers": "tokenizers",
    "onnxruntime": "onnxruntime",
    "cuda-bindings": "cuda.bindings",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt_rtx",
}


@dataclass(frozen=True)
class Board:
    """One machine."""

    files: dict[str, str]
    """Path below the root -> text. Zeros of device trees are written as they are."""
    architecture: str
    kernel: str
    python: tuple[int, int, int]
    cores: int
    packages: dict[str, str] = field(default_factory=dict)
    """What Python sees: distribution -> version."""
    smi: tuple[str, str] | None = None
    """What nvidia-smi prints: its heading, and a line of the query that the doctor makes; None where there is none."""
    denied: tuple[str, ...] = ()
    """Device files that the user may not open."""
    environment: str | None = None
    environ: dict[str, str] = field(default_factory=dict)
    free_bytes: int = 40 << 30

    def but(self, *, without: Sequence[str] = (), files: dict[str, str] | None = None, **changes: Any) -> Board:
        """The same machine with other files; `without` are beginnings of paths that go."""
        kept = {path: text for path, text in self.files.items() if not path.startswith(tuple(without) or ("\n",))}
        return dataclasses.replace(self, files=kept | (files or {}), **changes)


def lay_out(board: Board, root: Path) -> Path:
    """Write the tree; returns its root."""
    for path, text in board.files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return root


def probe_of(board: Board, root: Path) -> Probe:
    """What the doctor sees of the board laid out at `root`."""
    modules = {_MODULES[name] for name in board.packages if name in _MODULES}

    def run(command: Sequence[str]) -> str | None:
        assert command[0].endswith("nvidia-smi")
        if board.smi is None:
            return None
        return board.smi[1] if len(command) > 1 else board.smi[0]

    return Probe(
        root=lay_out(board, root),
        run=run,
        has_module=lambda name: name in modules,
        package_version=board.packages.get,
        free_bytes=lambda _path: board.free_bytes,
        accessible=lambda path: str(path.relative_to(root)) not in board.denied,
        environ=board.environ,
        architecture=board.architecture,
        kernel=board.kernel,
        cores=board.cores,
        python=board.python,
        environment=board.environment,
        home=Path("/home/user"),
    )
