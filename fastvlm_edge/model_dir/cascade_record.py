"""The cascade in the manifest: the only thing of a model directory that changes after its conversion."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.json_record import parse_json
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, Cascade, Manifest, read_manifest

_PACKAGE = Path(__file__).resolve().parents[1]
_COPY = "copy the model directory with `cp -rL`, and give the copy"


def check_changeable(directory: Path) -> None:
    """Raise FastVLMError if the manifest must not or cannot be changed, before minutes are spent on questions."""
    path = directory / MANIFEST_NAME
    if _PACKAGE in directory.resolve().parents:
        raise FastVLMError(f"{directory} belongs to the installed package, which is not changed", _COPY)
    if path.is_symlink():  # as in the cache of a hub, which knows its files by their hashes
        raise FastVLMError(f"{path} is a link to {os.readlink(path)}, which is not changed because others may use it", _COPY)
    if not os.access(directory, os.W_OK):
        raise FastVLMError(f"{directory} is not writable, so a cascade cannot be kept there", _COPY)


def write_cascade(directory: Path, manifest: Manifest, cascade: Cascade) -> None:
    """Put a cascade into `fastvlm.json`, completely or not at all. Everything else in it stays as it is.

    The hashes of engines, verified files, jobs and pictures do not depend on it. Raises FastVLMError if the directory is not that of
    `manifest` any more, or cannot be written to.
    """
    path = directory / MANIFEST_NAME
    if read_manifest(directory).files != manifest.files:
        raise FastVLMError(f"{directory} was converted again meanwhile, so the cascade does not belong to it", "run the command again")
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        document["cascade"] = dataclasses.asdict(cascade)
        with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
            shutil.copymode(path, partial)
    except OSError as error:
        mend = "free some space, or see to it that the directory is writable"
        raise FastVLMError(f"{path} cannot be written ({error.strerror}), and is as it was", mend) from None
