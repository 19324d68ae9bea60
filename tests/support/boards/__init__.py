"""Machines as small trees of /proc, /sys, /etc and /dev, written from public documentation; each names its sources.

A `Board` is its files and what cannot be told by files; `lay_out` writes the files, `probe_of` gives the view that `doctor` has of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_edge.machine.probe import Probe

RUNTIME = {"numpy": "2.2.6", "pillow": "11.3.0", "tokenizers": "0.22.1", "onnxruntime": "1.23.2"}
"""Distribution -> version, for a complete installation of the runtime."""
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
    """Path below the root -> text, including the zero bytes of device trees."""
    architecture: str
    kernel: str
    python: tuple[int, int, int]
    cores: int
    packages: dict[str, str] = field(default_factory=dict)
    """Installed packages: distribution -> version."""
    smi: tuple[str, str] | None = None
    """What nvidia-smi prints: its heading, and its answer to the query of `doctor`; None if there is no nvidia-smi."""
    denied: tuple[str, ...] = ()
    """Device files that the user has no access to."""
    environment: str | None = None
    environ: dict[str, str] = field(default_factory=dict)
    free_bytes: int = 40 << 30
    broken: dict[str, str] = field(default_factory=dict)
    """Module that is installed but cannot be imported -> why, in one line."""

    def but(self, *, without: Sequence[str] = (), files: dict[str, str] | None = None, **changes: Any) -> Board:
        """The same machine with other files. Paths that begin with one of `without` are removed."""
        kept = {path: text for path, text in self.files.items() if not path.startswith(tuple(without) or ("\n",))}
        return dataclasses.replace(self, files=kept | (files or {}), **changes)


def lay_out(board: Board, root: Path) -> Path:
    """Write the files below `root`, and return it."""
    for path, text in board.files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return root


def probe_of(board: Board, root: Path) -> Probe:
    """Write the board below `root`, and return the view that `doctor` has of it."""
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
        import_error=board.broken.get,
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
