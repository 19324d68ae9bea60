"""From what the user typed (a folder or a hub id) to a folder on this machine: the first step of `convert`.

Downloads go through huggingface_hub with its own cache and token. Only weights and text files are fetched, and no remote code is ever run.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from fastvlm_edge.errors import FastVLMError

HUB_FILES = ["*.safetensors", "*.json", "*.txt"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(location: str, *, revision: str | None = None) -> Path:
    """The folder that holds the checkpoint: `location` itself, or the snapshot of the hub id `org/name` in the local cache.

    `revision` is a branch, tag or commit of the hub repository and means nothing for a folder.
    Raises FastVLMError where `location` is neither, or where the hub does not give it.
    """
    path = Path(location).expanduser()
    if location and path.is_dir():
        return path
    if path.is_file():
        raise FastVLMError(_about_file(path))
    if HUB_ID.fullmatch(location) is None or location.endswith((".zip", ".safetensors", ".bin")):
        raise FastVLMError(f"{location!r} is neither a folder on this machine nor a hub id such as apple/FastVLM-0.5B; check the path")
    return _download(location, revision)


def _about_file(path: Path) -> str:
    if zipfile.is_zipfile(path) and path.suffix != ".bin":
        return f"{path} is a zip file; unpack it and give the folder that it makes"
    if path.name == "mm_projector.bin":
        return f"{path} holds only a projector; give the folder of a whole FastVLM checkpoint"
    return f"{path} is a file, not a checkpoint; give the folder that it stands in ({path.parent})"


def _download(name: str, revision: str | None) -> Path:
    """Fetch the top-level weights and text files of a hub repository; with no network, the cached snapshot if it is complete."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise FastVLMError(
            f"{name} is not a folder here, and a hub id needs huggingface_hub: pip install 'fastvlm-edge[convert]'"
        ) from None
    where = name if revision is None else f"{name} at revision {revision}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError:
        raise FastVLMError(
            f"{where} is gated on the hub: accept its conditions on its page there, then log in with: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise FastVLMError(
            f"{name} is no folder here and no public hub repository; check the name, or, if it is private, run: hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise FastVLMError(f"{name} has no revision {revision!r} on the hub; check the branch, tag or commit") from None
    except LocalEntryNotFoundError:
        if _offline():
            raise FastVLMError(
                f"{where} is not complete in the local hub cache and HF_HUB_OFFLINE forbids a download; unset it, or give a folder"
            ) from None
        raise FastVLMError(
            f"{name} is no folder here, the hub cannot be reached, and the local cache does not hold all of it; check the "
            "network, or give a folder"
        ) from None
    except HfHubHTTPError as error:
        raise FastVLMError(f"the hub refused {where} ({_first_line(error)}); try again, or give a folder") from None
    except Exception as error:  # the hub client raises whatever its HTTP library of the day raises: a user never sees a traceback
        raise FastVLMError(
            f"{where} cannot be downloaded ({type(error).__name__}: {_first_line(error)}); check the network and the space "
            "on disk, or give a folder"
        ) from None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
