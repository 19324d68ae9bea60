"""Which files of a directory hold the weights of a checkpoint, and what the directory is if it is not a checkpoint.

Two sets of weights in one directory, or weights beside an adapter, are an error: which of them is meant cannot be told.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastvlm_edge.convert.checkpoint.files import refuse_lfs_pointer
from fastvlm_edge.convert.checkpoint.shards import INDEX_NAMES
from fastvlm_edge.convert.checkpoint.tensor_names import listing
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import parse_json
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Form:
    """How files of weights are named."""

    single: str
    """The name of the only file."""
    shard: re.Pattern[str]
    files: str
    """A pattern of all names."""
    index: str
    """Lists the shards."""


SAFETENSORS = Form("model.safetensors", re.compile(r"model-\d+-of-\d+\.safetensors"), "*.safetensors", INDEX_NAMES[".safetensors"])
PICKLES = Form("pytorch_model.bin", re.compile(r"pytorch_model-\d+-of-\d+\.bin"), "pytorch_model*.bin", INDEX_NAMES[".bin"])
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*", "non_lora_trainables.bin")
EXPORTS = ("*.mlpackage", "*.mlmodelc", "weights.npz", "*.gguf")


def find_weights(directory: Path) -> list[Path]:
    """The files of a checkpoint's weights: safetensors, or pickles of PyTorch if there are none.

    Raises FastVLMError that says what the directory is if it is not a checkpoint, if it holds two sets of weights or an adapter as well, or
    if a file is missing.
    """
    weights = weight_files(directory, SAFETENSORS) or weight_files(directory, PICKLES)
    adapter = _matches(directory, ADAPTER_FILES)
    if weights and adapter:
        raise FastVLMError(
            f"{directory} has an adapter ({listing(adapter)}) beside its weights, and without it the conversion would lose the fine-tune",
            "move the adapter to a directory of its own, and give that with --adapter; if it is merged already, move its files elsewhere",
        )
    if not weights:
        _refuse_other_formats(directory, adapter)
    if not (directory / "config.json").is_file():
        if (directory / MANIFEST_NAME).is_file():
            raise FastVLMError(f"{directory} is a model directory, which is already converted", "give it to `run`, or give a checkpoint")
        found = _inside(directory)
        zipped = sorted(directory.glob("*.zip"))
        hint = f"try {found}" if found else f"unpack {zipped[0].name} first" if zipped else "check the path"
        raise FastVLMError(f"{directory} is not a checkpoint: config.json is missing", hint)
    if not weights:
        found = _inside(directory)
        raise FastVLMError(
            f"{directory} has a config.json but no weights (*.safetensors or pytorch_model*.bin)",
            f"try {found}" if found else "copy or download the weights as well",
        )
    return weights


def weight_files(directory: Path, form: Form) -> list[Path]:
    """The weights of a directory in one form: the files that the index lists, or the only one; empty if there are none.

    Raises FastVLMError for a missing shard, a damaged index, two sets of weights, or several files without an index.
    """
    index_path, single = directory / form.index, directory / form.single
    found = sorted(path for path in directory.glob(form.files) if path.is_file() and not path.name.startswith("adapter_"))
    if index_path.is_file():
        refuse_lfs_pointer(index_path)
        try:
            weight_map = parse_json(index_path.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({"" + name for name in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FastVLMError(f"{index_path} is damaged ({error})", "copy or download it again") from None
        if single.is_file() and form.single not in names:
            newer = form.single if single.stat().st_mtime > index_path.stat().st_mtime else form.index
            raise FastVLMError(
                f"{directory} has two sets of weights: {form.single}, and the shards of {form.index} ({newer} is newer)",
                "move the set that is not wanted elsewhere, with its index",
            )
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise FastVLMError(
                f"{directory / missing[0]} is missing ({len(missing)} of {len(names)} shards listed in {form.index})",
                "copy or download the missing files",
            )
        return [directory / name for name in names]
    if single.is_file():
        shards = [path.name for path in found if form.shard.fullmatch(path.name)]
        if shards:
            raise FastVLMError(
                f"{directory} has two sets of weights: {form.single}, and shards without an index ({listing(shards)})",
                "move the set that is not wanted elsewhere",
            )
        return [single]
    if len(found) > 1:
        raise FastVLMError(
            f"{directory} has {len(found)} files {form.files} but no {form.index}, which says which of them belong together",
            "copy or download that file as well",
        )
    return found


def unused_weights(directory: Path, weights: list[Path]) -> list[str]:
    """Names of the files in `directory` that look like weights but are not among `weights`."""
    used = {path.name for path in weights}
    return [name for name in _matches(directory, ("*.safetensors", "pytorch_model*.bin", "mm_projector.bin")) if name not in used]


def _refuse_other_formats(directory: Path, adapter: list[str]) -> None:
    """Raise FastVLMError if a directory without weights of a checkpoint holds some in another form."""
    if _matches(directory, EXPORTS):
        raise FastVLMError(
            f"{directory} is an export for CoreML, MLX or llama.cpp, not a checkpoint", "give the checkpoint that it was made from"
        )
    if adapter:
        raise FastVLMError(
            f"{directory} contains only a fine-tune ({listing(adapter)})", "give its base model, and this directory with --adapter"
        )
    if _matches(directory, ("zero_to_fp32.py", "global_step*")):
        raise FastVLMError(
            f"{directory} is a DeepSpeed checkpoint, whose weights are spread over the training processes",
            "run in it: python zero_to_fp32.py . MERGED --safe_serialization; then copy its json files to MERGED and give that",
        )
    if _matches(directory, ("pytorch_model_fsdp_*", "*.distcp")):
        raise FastVLMError(
            f"{directory} is an FSDP checkpoint, whose weights are spread over the training processes",
            "run: accelerate merge-weights DIRECTORY MERGED; then copy its json files to MERGED and give that",
        )
    if (directory / "mm_projector.bin").is_file():
        raise FastVLMError(
            f"{directory} contains only a projector (mm_projector.bin)", "give its base model, and this directory with --adapter"
        )


def _inside(directory: Path) -> Path | None:
    """The directory below this one that is most likely meant: a snapshot of a hub cache, the last checkpoint of a training, or another."""
    snapshots = directory / "snapshots"
    if snapshots.is_dir():
        main = directory / "refs" / "main"
        current = snapshots / main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else snapshots
        return current if (current / "config.json").is_file() else _inside(snapshots)
    inner = sorted(path.parent for path in directory.glob("*/config.json"))
    if inner:
        return max(inner, key=lambda path: (_training_step(path), -inner.index(path)))
    for repository in sorted(directory.glob("models--*")):
        found = _inside(repository)
        if found:
            return found
    return None


def _training_step(path: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def _matches(directory: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in directory.glob(pattern)})
