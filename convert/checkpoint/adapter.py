"""A fine-tune that holds only what it changed (`convert BASE --adapter ADAPTER`): a LoRA of PEFT, and the other tensors that it trained.

Every tensor of it must fit the base model. The result stands in place of the base model's tensors, so that all that follows (probes,
calibration, comparison with PyTorch) sees the fine-tune.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastvlm_edge.convert.checkpoint.adapter_config import ALL, MERGE_ELSEWHERE, LoraConfig, read_lora_config
from fastvlm_edge.convert.checkpoint.entries import DTYPES, Entry
from fastvlm_edge.convert.checkpoint.files import read_optional_json
from fastvlm_edge.convert.checkpoint.folder import PICKLES, SAFETENSORS, weight_files
from fastvlm_edge.convert.checkpoint.hub import locate
from fastvlm_edge.convert.checkpoint.lora import Merged, MergedBias, MergedEmbedding
from fastvlm_edge.convert.checkpoint.model_name import name_of
from fastvlm_edge.convert.checkpoint.shards import read_file
from fastvlm_edge.convert.checkpoint.tensor_names import EMBEDDING, HARMLESS, HEAD, PARTS, WRAPPERS, canonical_name, listing
from fastvlm_edge.errors import FastVLMError

CONFIG_NAME = "adapter_config.json"
LORA_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE_NAMES = ("non_lora_trainables.bin", "mm_projector.bin")
"""Whole tensors that LLaVA's trainer saves beside a LoRA, or instead of one."""
TOKEN_FILES = ("added_tokens.json", "tokenizer_config.json")
BEGINNINGS = ("module.", "base_model.model.")
"""What data parallel training and PEFT put before the names of a model."""
LORA_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)((?:\.[^.]+)*)")
WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.(?!\d|weight$|bias$)\w+)?)(?=\.)")
"""What PEFT puts into the name of a tensor that it trained as a whole."""
COUNTERS = ("num_batches_tracked", "position_ids")
LINEAR = re.compile(r"llm\.(layers\.\d+\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj)\.weight")
MERGE_WITH_TOKENIZER = "merge it with PEFT, save the whole model with its tokenizer, and convert that without --adapter"


@dataclass(frozen=True)
class Adapter:
    """A fine-tune in a directory, listed but not read."""

    location: str
    """As the user gave it: a directory or a hub id."""
    name: str
    directory: Path
    files: list[Path]
    config: LoraConfig | None
    """None if nothing in it is a LoRA."""
    updates: dict[str, dict[str, Entry]] = field(repr=False)
    """Module in the trained model -> `lora_A`, `lora_B` and the like."""
    whole: dict[str, Entry] = field(repr=False)
    """Tensors that replace those of the base model, by their stored names."""


def open_adapter(location: str) -> Adapter:
    """Open a directory or a hub id. Raises FastVLMError if it is not a fine-tune, or one of a kind that is not supported."""
    directory = locate(location)
    try:
        files = _find_files(directory)
        config = read_lora_config(directory / CONFIG_NAME) if (directory / CONFIG_NAME).is_file() else None
        updates, whole = _list_tensors([path for path in files if path.suffix != ".json"])
    except OSError as error:
        raise FastVLMError(f"{directory} cannot be read ({error})", "check its permissions and the disk") from None
    return Adapter(location, name_of(directory), directory, files, config, updates, whole)


def _find_files(directory: Path) -> list[Path]:
    """The files of a fine-tune. Raises FastVLMError if some are missing, or if there are weights of another kind as well."""
    config = [path for path in [directory / CONFIG_NAME] if path.is_file()]
    lora = [directory / name for name in LORA_NAMES if (directory / name).is_file()]
    others = [directory / name for name in WHOLE_NAMES if (directory / name).is_file()]
    if config and not lora:
        raise FastVLMError(f"{config[0]} describes an adapter, but there is no {' or '.join(LORA_NAMES)}", "copy or download it as well")
    if lora and not config:
        raise FastVLMError(f"{directory} has {lora[0].name}, but no {CONFIG_NAME}", "copy or download that file as well")
    if len(lora) > 1:
        raise FastVLMError(f"{directory} has two adapters, {lora[0].name} and {lora[1].name}", "move the one that is not wanted elsewhere")
    weights = weight_files(directory, SAFETENSORS) or weight_files(directory, PICKLES)
    if not lora and not others:
        inner = sorted(path.parent for name in (CONFIG_NAME, *WHOLE_NAMES) for path in directory.glob(f"*/{name}"))
        whole = "if it is a whole checkpoint, convert it without --adapter"
        raise FastVLMError(
            f"{directory} is not a fine-tune: it has neither {' nor '.join((*LORA_NAMES, *WHOLE_NAMES))}",
            f"try {inner[-1]}" if inner else whole if weights else "check the path",
        )
    if weights:
        raise FastVLMError(
            f"{directory} has whole weights ({weights[0].name}) beside an adapter, and which of them is the fine-tune cannot be told",
            "move the other files to another directory",
        )
    return [*(path for path in [directory / "config.json"] if path.is_file()), *config, *lora, *others]


def _list_tensors(files: list[Path]) -> tuple[dict[str, dict[str, Entry]], dict[str, Entry]]:
    """The updates and the whole tensors in some files, as in `Adapter`."""
    updates: dict[str, dict[str, Entry]] = defaultdict(dict)
    whole: dict[str, Entry] = {}
    for path in files:
        for name, entry in read_file(path).items():
            if entry.kind not in DTYPES or (entry.kind == "I64" and not name.endswith(COUNTERS)) or 0 in entry.shape:
                raise FastVLMError(
                    f"{path} has the tensor {name} {list(entry.shape)} of type {entry.kind}, not values in float32, float16 or bfloat16",
                    "save the adapter again, with gathered weights if it was trained with DeepSpeed",
                )
            match = LORA_PART.fullmatch(_plain(name))
            if match is None:
                _put(whole, WRAPPED.sub("", _plain(name)), entry, path)
            else:
                bias = ".bias" if match[3].endswith(".bias") else ""
                _put(updates[match[1]], f"{match[2]}{bias}", entry, path, f"{match[1]}.")
    return dict(updates), whole


def merge(adapter: Adapter, tensors: dict[str, Entry], base: Path, notes: list[str], *, tied: bool) -> bool:
    """Put the fine-tune into `tensors` (canonical name -> entry) of the base model, and return whether the head is still tied.

    With `tied`, `tensors` has no head. Raises FastVLMError that names the first tensor that does not fit.
    """
    whole, updates = _whole_tensors(adapter, tensors, base), _updates(adapter, tensors, base)
    changed = {*whole, *(f"{module}.weight" for module, _, _ in updates)}
    if tied and changed & {EMBEDDING, HEAD}:
        tensors[HEAD] = tensors[EMBEDDING]
        tied = False
        if not {EMBEDDING, HEAD} <= changed:
            one, other = (EMBEDDING, HEAD) if EMBEDDING in changed else (HEAD, EMBEDDING)
            if one in whole and whole[one].path.name in WHOLE_NAMES:
                raise FastVLMError(
                    f"{whole[one].path} replaces {one}, which {base} ties to {other}, and does not say what that became", MERGE_ELSEWHERE
                )
            notes.append(f"the adapter changes {one} and not {other}, which the base model ties to it: the model has both now")
    for name, entry in whole.items():
        if entry.shape != tensors[name].shape:
            raise _misfit(entry.path, name, entry.shape, tensors[name].shape)
        tensors[name] = entry
    for module, source, parts in updates:
        _add_update(adapter, tensors, module, source, parts)
    if any(name.endswith(".bn.weight") for name in whole) and not any(name.endswith(".bn.running_mean") for name in whole):
        notes.append("the fine-tune trained batch norms of the encoder, but has not saved their means and variances: used the base model's")
    _compare_base(adapter, base, notes)
    _compare_tokens(adapter, base, notes, trained=EMBEDDING in changed)
    return tied


def _plain(name: str) -> str:
    """A stored name as it is in the model that was trained."""
    name = WRAPPERS.sub("", name)
    for beginning in BEGINNINGS:
        name = name.removeprefix(beginning)
    return name


def _put(table: dict[str, Entry], key: str, entry: Entry, path: Path, before: str = "") -> None:
    """Add a tensor. Raises FastVLMError if there is another of that name; LLaVA saves trained biases in two files, which are the same."""
    known = table.get(key)
    if known is not None and (known.shape != entry.shape or (known.read(key).astype("f4") != entry.read(key).astype("f4")).any()):
        raise FastVLMError(f"{path.parent} contains {before}{key} twice, with different values", "remove one of them")
    table[key] = entry


def _canonical(name: str) -> str | None:
    """The canonical form of a name in a trained model, which may have any layout, or be a part of one."""
    for candidate in (name, f"model.{name}", name.removeprefix("model.")):
        for layout in PARTS:
            if found := canonical_name(candidate, layout):
                return found
    return None


def _whole_tensors(adapter: Adapter, tensors: dict[str, Entry], base: Path) -> dict[str, Entry]:
    """Canonical name -> tensor that replaces the base model's."""
    found: dict[str, Entry] = {}
    unknown = []
    for stored, entry in adapter.whole.items():
        name = _canonical(stored)
        if HARMLESS.fullmatch(name or stored):
            continue
        if name is None or (name not in tensors and name != HEAD):
            unknown.append(stored)
        elif name in found:
            raise FastVLMError(f"{adapter.directory} contains {name} twice, the second time as {stored}", "remove one of them")
        else:
            found[name] = entry
    if unknown:
        raise FastVLMError(
            f"{adapter.directory} contains tensors that {base} does not have: {listing(unknown)}", "give the model that it was trained on"
        )
    return found


def _updates(adapter: Adapter, tensors: dict[str, Entry], base: Path) -> list[tuple[str, str, dict[str, Entry]]]:
    """Canonical module, its name in the trained model, and the parts of its update.

    Raises FastVLMError for a module that the base model lacks, one that the configuration does not mean, or one without an update.
    """
    if adapter.config is None:
        if adapter.updates:
            raise FastVLMError(f"{adapter.directory} has updates of modules, but no {CONFIG_NAME}", "copy or download that file as well")
        return []
    found: dict[str, tuple[str, dict[str, Entry]]] = {}
    for module, parts in adapter.updates.items():
        name = (_canonical(f"{module}.weight") or "").removesuffix(".weight")
        if f"{name}.weight" not in tensors and f"{name}.weight" != HEAD:
            raise FastVLMError(f"{adapter.directory} changes {module}, which {base} does not have", "give the model that it was trained on")
        if name in found:
            raise FastVLMError(f"{adapter.directory} changes {name} twice, as {found[name][0]} and as {module}", "remove one of them")
        if not adapter.config.is_target(module):
            raise FastVLMError(
                f"{adapter.directory} changes {module}, but its {CONFIG_NAME} does not name that module", "use the files of one save"
            )
        found[name] = module, parts
    if not found:
        raise FastVLMError(f"{adapter.directory} contains no update of any module", "save the adapter again")
    missing = [module for name, module in _meant(adapter.config, found, tensors) if name not in found]
    if missing:
        raise FastVLMError(
            f"{adapter.directory} has no update of {listing(missing, 3)}, which its {CONFIG_NAME} names", "save or copy the adapter again"
        )
    return [(name, module, parts) for name, (module, parts) in found.items()]


def _meant(config: LoraConfig, found: dict[str, tuple[str, dict[str, Entry]]], tensors: dict[str, Entry]) -> Iterator[tuple[str, str]]:
    """Every matrix of the LLM's layers that the configuration means: canonical module, and its name in the trained model."""
    before = next((module[: module.index("layers.")] for name, (module, _) in found.items() if name.startswith("llm.layers.")), None)
    if before is None or config.targets in ALL:
        return
    for name in tensors:
        if (match := LINEAR.fullmatch(name)) and config.is_target(before + match[1]):
            yield f"llm.{match[1]}", before + match[1]


def _add_update(adapter: Adapter, tensors: dict[str, Entry], module: str, source: str, parts: dict[str, Entry]) -> None:
    """Replace the weight of a module by its sum with the update, and the bias likewise. Raises FastVLMError if a shape does not fit."""
    config = adapter.config
    assert config is not None
    name = f"{module}.weight"
    weight = tensors[name]
    embedding = name == EMBEDDING
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    optional = {"lora_B.bias"} if embedding else {"lora_B.bias", "lora_magnitude_vector"}
    for part in (first, second, *(["lora_magnitude_vector"] if config.dora and not embedding else [])):
        if part not in parts:
            raise FastVLMError(f"{adapter.directory} has no {source}.{part}", "save or copy the adapter again")
    surplus = parts.keys() - {first, second} - optional
    if surplus or ("lora_magnitude_vector" in parts and not config.dora):
        what = min(surplus or {"lora_magnitude_vector"})
        raise FastVLMError(f"{adapter.directory} has {source}.{what}, which is not supported there", MERGE_ELSEWHERE)
    down, up, scale = parts[first], parts[second], config.scale(source)
    rank = config.rank_of(source)
    if down.shape[:1] != (rank,):
        raise FastVLMError(
            f"{source}.{first} of {adapter.directory} is {list(down.shape)}, but its {CONFIG_NAME} gives rank {rank}",
            "use the files of one save",
        )
    expected: tuple[tuple[int, ...], tuple[int, ...]]
    if embedding:
        expected = (rank, weight.shape[0]), (weight.shape[1], rank)
    else:
        expected = (rank, *weight.shape[1:]), (weight.shape[0], rank, *[1] * (len(weight.shape) - 2))
        if len(weight.shape) == 4 and down.shape[1:2] != weight.shape[1:2] and down.shape[2:] == weight.shape[2:]:
            raise FastVLMError(
                f"{adapter.directory} changes {source}, a convolution in groups, whose update cannot be added to the weights",
                "train an adapter without that module",
            )
    for part, entry, shape in ((first, down, expected[0]), (second, up, expected[1])):
        if entry.shape != shape:
            raise _misfit(entry.path, f"{source}.{part}", entry.shape, shape)
    if embedding:
        tensors[name] = MergedEmbedding(down.path, weight.shape, "F32", weight, down, up, scale)
    else:
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude is not None and math.prod(magnitude.shape) != weight.shape[0]:
            raise _misfit(magnitude.path, f"{source}.lora_magnitude_vector", magnitude.shape, weight.shape[:1])
        tensors[name] = Merged(down.path, weight.shape, "F32", weight, down, up, scale, magnitude)
    if bias := parts.get("lora_B.bias"):
        old = tensors.get(f"{module}.bias")
        if old is None:
            raise FastVLMError(f"{adapter.directory} has a bias for {source}, which has none in the base model", MERGE_ELSEWHERE)
        if bias.shape != old.shape:
            raise _misfit(bias.path, f"{source}.lora_B.bias", bias.shape, old.shape)
        tensors[f"{module}.bias"] = MergedBias(bias.path, old.shape, "F32", old, bias, scale)


def _misfit(path: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> FastVLMError:
    if name in (EMBEDDING, HEAD) and shape[1:] == expected[1:]:
        return FastVLMError(
            f"{path} has {shape[0]} rows for {name} instead of {expected[0]}: the fine-tune added tokens, which is not supported",
            MERGE_WITH_TOKENIZER,
        )
    return FastVLMError(f"{path} has {name} {list(shape)} instead of {list(expected)}", "give the model that it was trained on")


def _compare_base(adapter: Adapter, base: Path, notes: list[str]) -> None:
    """Add a note if the adapter says that it was trained on a model of another name."""
    trained_on = adapter.config.base if adapter.config else ""
    name = re.split(r"[/\\]", trained_on.rstrip("/\\"))[-1]
    if name and name.lower() not in (name_of(base).lower(), base.name.lower()):
        notes.append(f"the adapter was trained on {trained_on!r}: merged it into {base}")


def _compare_tokens(adapter: Adapter, base: Path, notes: list[str], *, trained: bool) -> None:
    """Add a note if a tokenizer saved with the adapter has tokens that the base model's lacks. Raises FastVLMError if they were trained."""
    known = _added_tokens(base)
    new = sorted(_added_tokens(adapter.directory) - known - {"<image>"}) if known else []
    if not new:
        return
    what = f"the tokenizer of {adapter.directory} has tokens that the one of {base} lacks ({listing(new)})"
    if trained:
        raise FastVLMError(f"{what}, and the adapter trained the embedding, which is not supported", MERGE_WITH_TOKENIZER)
    notes.append(f"{what}: used the base model's tokenizer")


def _added_tokens(directory: Path) -> set[str]:
    """The contents of the added tokens that the small files of a tokenizer list."""
    tokens: set[str] = set()
    for name in TOKEN_FILES:
        document = read_optional_json(directory / name)
        if name == "added_tokens.json":
            tokens |= document.keys()
        else:
            listed = document.get("added_tokens_decoder") or {}
            tokens |= {str(each.get("content")) for each in listed.values() if isinstance(each, dict)}
    return tokens
