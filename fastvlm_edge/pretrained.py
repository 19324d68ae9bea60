"""From a checkpoint to a model directory in the cache: converted at its first use, and found there afterwards.

For `FastVLM.from_pretrained`, and for commands that are given a hub id instead of a model directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import package_errors
from fastvlm_edge.machine.cache_dir import cache_dir
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.json_record import parse_json
from fastvlm_edge.model_dir.limits import image_sizes
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, SCHEMA, Manifest, read_manifest, verify_files
from fastvlm_edge.model_dir.mistaken import HUB_ID, is_regular_file, not_a_model_directory
from fastvlm_edge.progress import Progress, SilentProgress, stderr_progress

_READ = (".safetensors", ".bin", ".json", ".txt", ".jinja")
"""Endings of the files of a checkpoint that a conversion may read."""
_KEY = 12
"""Characters of the hash in the name of a model directory."""


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, such as apple/FastVLM-0.5B, and neither it nor the directory before its slash exists."""
    return HUB_ID.fullmatch(text) is not None and not os.path.lexists(text) and not os.path.lexists(os.path.dirname(text))


def converted(
    checkpoint: str | os.PathLike[str],
    *,
    revision: str | None = None,
    precision: str | None = None,
    image_size: int | str | Sequence[int] | None = None,
    context: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """The model directory of a checkpoint: a directory or a hub id, which is converted at its first use. A model directory is itself.

    `revision` is a branch, tag or commit of the hub repository; the others are the options of `convert`. The result is in `models` in the
    cache, with a record beside it. Of a directory it has names, sizes, times and inodes of the files, so that a change leads to a new
    conversion; of a hub repository the commit, which stays the same until the result is removed. Only a conversion uses the network. Two
    processes never convert at the same time. If a conversion fails, nothing is left behind. The `image_size` of a model directory is not
    looked at: loading it does that.

    `progress` None tells on stderr that a conversion takes place, and nothing otherwise. Raises FastVLMError as `convert` does, if the
    packages of its extra are missing, or if the cache cannot be written.
    """
    checkpoint = os.fspath(checkpoint)
    folder = Path(checkpoint).expanduser()
    sizes = image_sizes(image_size)
    asked = sizes if len(sizes) > 1 else next(iter(sizes), None)  # one size as in the names of earlier conversions
    options = {"revision": revision, "precision": precision, "image_size": asked, "context": context}
    if is_regular_file(folder / MANIFEST_NAME):
        if isinstance(image_size, int):
            del options["image_size"]  # `load` judges it
        if given := [name for name, value in options.items() if value is not None]:
            what = f"{folder} is a model directory, which is already converted: {', '.join(given)} would change nothing"
            raise FastVLMError(what, "leave that out, or give the checkpoint")
        return folder
    local = checkpoint != "" and folder.is_dir()
    source = str(folder.resolve()) if local else checkpoint
    place = cache_dir() / "models" / _name(source, options)
    if (known := _find(place, source, local=local)) is not None:
        (progress or SilentProgress()).note(f"{checkpoint} is already converted: {place}, {_size(known)}")
        return place
    if find_spec("fastvlm_edge.convert") is None:  # a bundle
        raise not_a_model_directory(folder, MANIFEST_NAME)
    with package_errors(f"{checkpoint} must be converted first, which needs"):
        convert = import_module("fastvlm_edge.convert.pipeline").convert
    locate = import_module("fastvlm_edge.convert.checkpoint.hub").locate
    progress = progress or stderr_progress()
    with _one_at_a_time(place.parent, progress):
        if (known := _find(place, source, local=local)) is not None:  # by the process that was waited for
            progress.note(f"{checkpoint} was converted by another process: {place}, {_size(known)}")
            return place
        began = time.monotonic()
        progress.note(f"{checkpoint} is {'' if local else 'downloaded and '}converted once, to {place}")
        commit = None if local else locate(checkpoint, revision=revision, quiet=isinstance(progress, SilentProgress)).name
        state = _state(folder) if local else commit
        manifest = convert(
            source,
            place,
            precision=precision,
            image_size=asked,
            context=context,
            revision=commit,
            progress=progress,
            force=is_regular_file(place / MANIFEST_NAME),
        )
        with contextlib.suppress(OSError), whole_file(_record(place)) as partial:  # without it, it is converted again at its next use
            partial.write_text(json.dumps({"checkpoint": source, **options, "schema": SCHEMA, "state": state}) + "\n", encoding="utf-8")
        progress.note(f"converted in {time.monotonic() - began:.0f} s: {_size(manifest)}; to free them, remove {place}")
    return place


def _name(source: str, options: dict[str, Any]) -> str:
    """The name of a model directory: readable, with a hash of what was asked for."""
    key = hashlib.sha256(json.dumps([source, options], sort_keys=True).encode()).hexdigest()[:_KEY]
    label = re.sub(r"[^\w.-]+", "-", "--".join(source.split("/")[-2:]).lstrip(".-"))
    return "-".join(filter(None, (label[:60], options["precision"], key)))


def _record(place: Path) -> Path:
    return place.with_name(f"{place.name}.json")


def _find(place: Path, source: str, *, local: bool) -> Manifest | None:
    """The manifest of a model directory that is there, can be read by this version, and was made of the files that are there now."""
    try:
        record = parse_json(_record(place).read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA or (local and record["state"] != _state(Path(source))):
            return None
        manifest = read_manifest(place)
        verify_files(place, manifest)
    except (OSError, ValueError, KeyError, TypeError, FastVLMError):
        return None
    return manifest


def _state(folder: Path) -> dict[str, list[int]]:
    """File name -> what changes whenever the file is written, copied or replaced."""
    states = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.suffix in _READ and path.is_file()}
    return {name: [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino] for name, status in states.items()}


def _size(manifest: Manifest) -> str:
    return f"{sum(record.bytes for record in manifest.files.values()) / 1e6:,.0f} MB"


@contextlib.contextmanager
def _one_at_a_time(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of the cache; wait for it if another process converts. Raises FastVLMError if the cache cannot be written."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        what = f"{folder} cannot hold the converted model ({error.strerror})"
        raise FastVLMError(what, "set FASTVLM_EDGE_CACHE to a directory that this user can write") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            progress.note("waiting for another process that is converting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
