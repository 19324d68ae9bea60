"""Checks of what was asked for, against the checkpoint and the disk, before any work: the options of `convert`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint
from fastvlm_edge.convert.precision import FLOAT_TYPES, PrecisionPlan, WeightType, vision_stage
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.limits import DEFAULT_CONTEXT, check_context, check_image_size, image_sizes
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME

GEOMETRIES = ("pad", "crop")


def check_output(output: Path, *, force: bool) -> None:
    """Raise FastVLMError if no model directory can be put at `output`: it is something else, or exists and `force` is not given."""
    if os.path.ismount(output):
        raise FastVLMError(
            f"{output} is a mount point, and a finished model directory cannot be renamed to a mount point",
            f"give a directory inside it: {output / 'model'}",
        )
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        if not (output.is_dir() and (output / MANIFEST_NAME).is_file()):
            raise FastVLMError(f"{output} exists and is not a model directory", "choose another name")
        if not force:
            raise FastVLMError(f"{output} already exists", "add --force to replace it, or choose another name")
    if output.parent.exists() and not os.access(output.parent, os.W_OK):
        raise FastVLMError(f"{output.parent} is not writable", "choose another place for the model directory")


def choose_image_sizes(source: Checkpoint, asked: int | str | Sequence[int] | None) -> list[int]:
    """Pixels on a side, the default first: as asked, or the size that the checkpoint was trained at.

    Raises FastVLMError for an unsupported size, or if one is given twice.
    """
    sizes = image_sizes(asked) or [source.image_size]
    for size in sizes:
        check_image_size(size, source.image_size, source.name)
    return sizes


def choose_context(source: Checkpoint, asked: int | None, largest: int) -> int:
    """Positions of a conversation: as asked, or 4096 if the LLM was trained for that many.

    Raises FastVLMError if the context is longer than the LLM was trained for, or too short for an answer about a picture of `largest`
    pixels on a side.
    """
    longest = source.text.max_positions
    context = min(DEFAULT_CONTEXT, longest) if asked is None else asked
    check_context(context, longest, largest, source.name)
    return context


def check_space(source: Checkpoint, plan: PrecisionPlan, directory: Path) -> None:
    """Raise FastVLMError if the disk of `directory`, which need not exist yet, has too little space for the weights."""
    needed = estimated_bytes(source, plan)
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise FastVLMError(
            f"the model directory needs about {needed / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are free in {directory}",
            "free some space there, or choose another place",
        )


def estimated_bytes(source: Checkpoint, plan: PrecisionPlan) -> int:
    """Size of the weights that the plan makes of a checkpoint, without the padding to pages."""
    total = 0.0
    for name in source.names():
        count = float(np.prod(source.shape(name), dtype=np.float64))
        if name.startswith(("vision.", "projector.")):
            total += count * _bytes_each(plan.vision_weights, plan.vision[vision_stage(name)])
        elif name == "llm.embed_tokens.weight":
            total += count * _bytes_each(plan.embedding, plan.decoder)
            if source.text.tied and plan.head.bits:
                total += count * _bytes_each(plan.head, plan.decoder)
        else:
            total += count * _bytes_each(plan.head if name == "lm_head.weight" else plan.body, plan.decoder)
    return int(total)


def _bytes_each(weights: WeightType, kind: str) -> float:
    """Bytes per weight, with its share of the block's scale."""
    if not weights.bits:
        return np.dtype(FLOAT_TYPES[kind]).itemsize
    return weights.bits / 8 + (np.dtype(FLOAT_TYPES[kind]).itemsize / weights.block if weights.block else 0)
