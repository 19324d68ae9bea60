"""From what the user typed (a directory or a hub id) to a directory on this machine: the first step of `convert`.

Downloads go through huggingface_hub with its own cache and token. Only weights and text files are fetched, pickles only where a repository
has no safetensors; code of a repository is never run.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import package_errors
from fastvlm_edge.model_dir.mistaken import HUB_ID, hub_id_of, is_address, shortened

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "README.md"]
PICKLED_FILES = ["pytorch_model*.bin", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin"]


def locate(location: str, *, revision: str | None = None, quiet: bool = False) -> Path:
    """The directory of a checkpoint or adapter: `location` itself, or the snapshot of the hub id `org/name` in the local cache.

    `revision` is a branch, tag or commit of the hub repository; it is ignored for a directory. With `quiet`, a download has no bars.
    Raises FastVLMError if `location` is neither, or if the download fails.
    """
    path = Path(location).expanduser()
    if location and path.is_dir():
        return path
    if path.is_file():
        raise _about_file(path)
    if HUB_ID.fullmatch(location) is None or location.endswith((".zip", ".safetensors", ".bin")):
        if hub_id := hub_id_of(location):
            raise FastVLMError(f"{shortened(location)} is an address, not a hub id", f"give the hub id: {hub_id}")
        what = f"{shortened(location)!r} is neither a local directory nor a hub id such as apple/FastVLM-0.5B"
        raise FastVLMError(what, "download the checkpoint, and give its directory" if is_address(location) else "check the path")
    with _without_bars() if quiet else contextlib.nullcontext():
        return _download(location, revision)


def _about_file(path: Path) -> FastVLMError:
    """The error for a file where a directory is expected."""
    if zipfile.is_zipfile(path) and path.suffix != ".bin":
        return FastVLMError(f"{path} is a zip file", "unpack it and give the directory that was unpacked")
    if path.name == "mm_projector.bin":
        return FastVLMError(f"{path} contains only a projector", "give a whole checkpoint, and the directory of this file with --adapter")
    return FastVLMError(f"{path} is a file, not a checkpoint", f"give the directory that contains it: {path.parent}")


def _download(name: str, revision: str | None) -> Path:
    """Fetch the top-level weights and text files of a hub repository; without a network, use the cached snapshot if it is complete."""
    with package_errors(f"{name} is not a local directory, and to download it from the hub needs"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    where = name if revision is None else f"{name} at revision {revision}"

    def download(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))

    try:
        directory = download(HUB_FILES)
        whole = any(directory.glob("*.safetensors")) and not (directory / "adapter_config.json").is_file()
        return directory if whole else download([*HUB_FILES, *PICKLED_FILES])
    except GatedRepoError:
        raise FastVLMError(f"{where} is gated on the hub", "accept its conditions on its page there, then run: hf auth login") from None
    except RepositoryNotFoundError:
        raise FastVLMError(
            f"{name} is neither a local directory nor a public hub repository",
            "check the name, or run `hf auth login` if the repository is private",
        ) from None
    except RevisionNotFoundError:
        raise FastVLMError(f"{name} has no revision {revision!r} on the hub", "check the branch, tag or commit") from None
    except LocalEntryNotFoundError:
        if _offline():
            raise FastVLMError(
                f"{where} is not complete in the local hub cache, and HF_HUB_OFFLINE forbids a download", "unset it, or give a directory"
            ) from None
        raise FastVLMError(
            f"{name} is not a local directory, the hub cannot be reached, and the copy in the local cache is not complete",
            "check the network, or give a directory",
        ) from None
    except HfHubHTTPError as error:
        raise FastVLMError(f"the hub refused {where} ({_first_line(error)})", "try again later, or give a directory") from None
    except Exception as error:  # the hub client passes on the errors of its HTTP library, whichever that is
        raise FastVLMError(
            f"{where} cannot be downloaded ({type(error).__name__}: {_first_line(error)})",
            "check the network and the free disk space, or give a directory",
        ) from None


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Switch the progress bars of huggingface_hub off, which is only possible for the whole process."""
    with package_errors("a download from the hub needs"):
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
