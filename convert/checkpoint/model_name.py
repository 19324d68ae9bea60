"""What a converted model is called: after its hub repository or directory, not after a placeholder such as CHECKPOINT or a hash."""

from __future__ import annotations

import re
from pathlib import Path

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import parse_json

_SAYS_NOTHING = re.compile(
    r"(?i)(?:hf[-_])?(?:checkpoints?|ckpts?|models?|weights|snapshots?|outputs?|merged|final|best|latest|main|tmp.*|[0-9a-f]{8,64}|[\W\d_]*)"
)
_TRAINING_STEP = re.compile(r"(?i)(?:checkpoint|step|epoch)[-_]?\d+")
LONGEST = 100
_BASE_MODEL = re.compile(r"^base_model:\s*(?:\n?\s*-\s*)?[\"']?([\w.-]+/[\w.-]+)[\"']?\s*$", re.MULTILINE)
_RELEASED = {896: "apple/FastVLM-0.5B", 1536: "apple/FastVLM-1.5B", 3584: "apple/FastVLM-7B"}
"""By the width of the LLM."""


def name_of(directory: Path) -> str:
    """The name of the checkpoint in a directory.

    It is the repository in a hub cache (`models--org--name/snapshots/<commit>`), or the directory, with the one above it for a step of a
    training. If that says nothing, it is what config.json was saved from (`_name_or_path`), and otherwise "FastVLM".
    """
    directory = directory.resolve()
    parent = directory.parent.name
    repository = directory.parents[1].name if len(directory.parents) > 1 else ""
    if parent == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    if _TRAINING_STEP.fullmatch(directory.name):
        return directory.name if _SAYS_NOTHING.fullmatch(parent) else f"{parent}-{directory.name}"
    origin = _saved_from(directory)
    return next((name for name in (directory.name, origin) if not _SAYS_NOTHING.fullmatch(name)), "FastVLM")


def check_name(name: str) -> str:
    """Raise FastVLMError for a name that does not fit on a line."""
    if not name.strip() or not name.isprintable() or len(name) > LONGEST:
        raise FastVLMError(f"the name {name[:LONGEST]!r} is not usable", f"give 1 to {LONGEST} printable characters")
    return name


def made_from(directory: Path) -> str:
    """What an export was made from, for an error: the `base_model` of its model card, or the released FastVLM of its width."""
    try:
        card = _BASE_MODEL.search((directory / "README.md").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        card = None
    if card:
        return f"the checkpoint that it was made from, {card[1]}"
    try:
        width = parse_json((directory / "config.json").read_text(encoding="utf-8")).get("hidden_size")
    except (OSError, ValueError, AttributeError):
        width = None
    released = _RELEASED.get(width) if isinstance(width, int) else None
    return f"the checkpoint that it was made from, such as {released}" if released else "the checkpoint that it was made from"


def _saved_from(directory: Path) -> str:
    """The last part of `_name_or_path` in config.json, or ""."""
    try:
        origin = parse_json((directory / "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return re.split(r"[/\\]", origin.rstrip("/\\"))[-1][:LONGEST] if isinstance(origin, str) and origin.isprintable() else ""
