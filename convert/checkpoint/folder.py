"""Which files of a directory hold the weights of a checkpoint, and what the directory is if it is not a checkpoint.

Two sets of weights in one directory, or weights beside an adapter, are an error: which of them is meant cannot be told.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastvlm_edge.convert.checkpoint.files import refuse_lfs_pointer
from fastvlm_edge.convert.checkpoint.shards import INDEX_NAME
from fastvlm_edge.convert.checkpoint.tensor_names import listing
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import parse_json
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME

SINGLE_NAME = "model.safetensors"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*", "non_lora_trainables.bin")
EXPORTS = ("*.mlpackage", "*.mlmodelc", "weights.npz", "*.gguf")


def find_weights(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises FastVLMError that says what the directory is if it is not a checkpoint, if it holds two sets of weights or an adapter as well, or
    if a file is missing.
    """
    weights = weight_files(directory)
    adapter = _matches(directory, ADAPTER_FILES)
    if weights and adapter:
        raise FastVLMError(
            f"{directory} has an adapter ({listing(adapter)}) beside its weights, and without it the conversion would lose the fine-tune",
            "merge the adapter into the weights and save the result in a new directory; if that is done, move these files elsewhere",
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
            f"{directory} has a config.json but no safetensors file", f"try {found}" if found else "copy or download the weights as well"
        )
    return weights


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: those that the index lists, or the only one; empty if there are none.

    Raises FastVLMError for a missing shard, a damaged index, two sets of weights, or several files without an index.
    """
    index_path, single = directory / INDEX_NAME, directory / SINGLE_NAME
    found = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if index_path.is_file():
        refuse_lfs_pointer(index_path)
        try:
            weight_map = parse_json(index_path.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({"" + name for name in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FastVLMError(f"{index_path} is damaged ({error})", "copy or download it again") from None
        if single.is_file() and SINGLE_NAME not in names:
            newer = SINGLE_NAME if single.stat().st_mtime > index_path.stat().st_mtime else INDEX_NAME
            raise FastVLMError(
                f"{directory} has two sets of weights: {SINGLE_NAME}, and the shards of {INDEX_NAME} ({newer} is newer)",
                "move the set that is not wanted elsewhere, with its index",
            )
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise FastVLMError(
                f"{directory / missing[0]} is missing ({len(missing)} of {len(names)} shards listed in {INDEX_NAME})",
                "copy or download the missing files",
            )
        return [directory / name for name in names]
    if single.is_file():
        shards = [path.name for path in found if SHARD.fullmatch(path.name)]
        if shards:
            raise FastVLMError(
                f"{directory} has two sets of weights: {SINGLE_NAME}, and shards without an index ({listing(shards)})",
                "move the set that is not wanted elsewhere",
            )
        return [single]
    if len(found) > 1:
        raise FastVLMError(
            f"{directory} has {len(found)} safetensors files but no {INDEX_NAME}, which says which of them belong together",
            "copy or download that file as well",
        )
    return found


def unused_weights(directory: Path, weights: list[Path]) -> list[str]:
    """Names of the files in `directory` that look like weights but are not among `weights`."""
    used = {path.name for path in weights}
    return [name for name in _matches(directory, ("*.safetensors", "pytorch_model*.bin", "mm_projector.bin")) if name not in used]


def _refuse_other_formats(directory: Path, adapter: list[str]) -> None:
    """Raise FastVLMError if a directory without safetensors holds weights in another form."""
    if _matches(directory, EXPORTS):
        raise FastVLMError(
            f"{directory} is an export for CoreML, MLX or llama.cpp, not a checkpoint", "give the checkpoint that it was made from"
        )
    if adapter:
        raise FastVLMError(
            f"{directory} contains only a LoRA adapter ({listing(adapter)})", "merge it into its base model, save that, and give the result"
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
    if _matches(directory, ("pytorch_model*.bin",)):
        raise FastVLMError(
            f"{directory} has its weights in pytorch_model*.bin, a format that can run code when it is opened",
            "convert it to safetensors first: load it with its own code and call save_pretrained(..., safe_serialization=True)",
        )
    if (directory / "mm_projector.bin").is_file():
        raise FastVLMError(f"{directory} contains only a projector (mm_projector.bin)", "give the directory of a whole FastVLM checkpoint")


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
