"""The checkpoint with random weights that the benchmarks of real size share."""

from __future__ import annotations

from pathlib import Path


def random_checkpoint(work: Path, size: str = "0.5b") -> Path:
    """`work`/checkpoint in the native layout, written if it does not exist.

    `size` is a key of `examples.checkpoints.random_checkpoint.SIZES`.
    """
    from examples.checkpoints.random_checkpoint import write_checkpoint

    folder = work / "checkpoint"
    if not (folder / "config.json").is_file():
        write_checkpoint(folder, layout="native", size=size)
    return folder
