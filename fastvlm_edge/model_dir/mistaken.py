"""What a path is that is not a model directory: a checkpoint, a hub id, an address or a picture, each with the command that was meant."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import parse_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_URL = re.compile(
    r"(?:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)|hf:)/+(?!datasets/|spaces/|docs/)([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic")
_CHECKPOINTS_INSIDE = ("*/config.json", "snapshots/*/config.json")
_SHOWN = 80


def is_regular_file(path: Path) -> bool:
    """Like `Path.is_file`, which raises OSError if the name is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def hub_id_of(text: str) -> str | None:
    """`org/name` in the address of a hub repository, such as https://huggingface.co/org/name/tree/main; None if it is none."""
    found = _HUB_URL.match(text)
    return found.group(1) if found else None


def is_address(text: str) -> bool:
    """Whether a text is a URL or a `data:` address. A `Path` of it has one slash where the URL has two."""
    return text.startswith("data:") or _URL.match(text) is not None


def looks_like_picture(text: str) -> bool:
    """Whether a text ends like the name of a picture."""
    return text.lower().endswith(_PICTURES)


def shortened(text: str) -> str:
    """A text for an error: an address can have megabytes."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def not_a_model_directory(directory: Path, manifest_name: str) -> FastVLMError:
    """The error for a directory, or what was given instead of one, that has no manifest."""
    try:
        return _explain(directory, manifest_name)
    except (OSError, ValueError):  # a name that is too long, or has a null character; no permission
        return FastVLMError(f"{shortened(str(directory))!r} is not a model directory, or cannot be read", "check the path")


def _explain(directory: Path, manifest_name: str) -> FastVLMError:
    text = str(directory)
    if is_address(text) or hub_id_of(text):
        shown = shortened(re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/+", r"\1://", text))
        repository = hub_id_of(text)
        if repository:
            return FastVLMError(f"{shown} is the address of a checkpoint, not a model directory", _convert(repository))
        return FastVLMError(f"{shown} is an address, not a model directory", "give a directory on this machine that `convert` wrote")
    if directory.is_file():
        return _about_file(directory, manifest_name)
    if not directory.is_dir():
        if HUB_ID.fullmatch(text) and not directory.parent.exists():
            return FastVLMError(f"{text} is not a model directory here; if it is a hub id, it must be converted first", _convert(text))
        return FastVLMError(
            f"{directory} is not a model directory: it does not exist",
            f"check the path, or run: fastvlm-edge convert CHECKPOINT -o {directory}",
        )
    inside = sorted(path.parent for path in directory.glob(f"*/{manifest_name}"))
    if inside:
        return FastVLMError(f"{directory} is not a model directory, but contains {len(inside)}", f"give one of them, such as {inside[0]}")
    above = [parent for parent in directory.resolve().parents[:2] if (parent / manifest_name).is_file()]
    if above:
        return FastVLMError(f"{directory} is a part of a model directory", f"give {above[0]}")
    if _is_config(directory / "config.json") or any(directory.glob("*.safetensors")):
        return FastVLMError(f"{directory} is a checkpoint, not a model directory", _convert(text))
    if any(_is_config(path) for pattern in _CHECKPOINTS_INSIDE for path in directory.glob(pattern)):
        return FastVLMError(f"{directory} has a checkpoint in it, and is not a model directory", _convert(text))
    return FastVLMError(
        f"{directory} is not a model directory: it has no {manifest_name}", f"run: fastvlm-edge convert CHECKPOINT -o {directory}"
    )


def _about_file(path: Path, manifest_name: str) -> FastVLMError:
    if (path.parent / manifest_name).is_file():
        return FastVLMError(f"{path} is a file of a model directory", f"give the directory: {path.parent}")
    if looks_like_picture(path.name):
        return FastVLMError(f"{path} is a picture, not a model directory", f"give the model directory first, and then --image {path}")
    return FastVLMError(f"{path} is a file, not a model directory", "give a directory that `fastvlm-edge convert` wrote")


def _is_config(path: Path) -> bool:
    """Whether a file is the `config.json` of a checkpoint, and not of any other program."""
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _convert(checkpoint: str) -> str:
    return f"run: fastvlm-edge convert {shlex.quote(checkpoint)} -o model"
