"""The random checkpoint that benchmarks of real size share."""

from __future__ import annotations

from pathlib import Path


def random_checkpoint(work: Path, size: str = "0.5b") -> Path:
    """`work`/checkpoint in the layout of transformers, written if it does not exist; `size` is one of `tests.support.checkpoints.SIZES`."""
    from tests.support.checkpoints import write_checkpoint

    folder = work / "checkpoint"
    if not (folder / "config.json").is_file():
        write_checkpoint(folder, layout="native", size=size)
    return folder
