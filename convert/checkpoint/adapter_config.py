"""`adapter_config.json` of PEFT: how large the updates of an adapter are, and which modules it was meant for.

What would change the result and is not supported is refused by its name, also keys that later versions of PEFT may add.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_edge.convert.checkpoint.files import read_json
from fastvlm_edge.errors import FastVLMError

USED = {
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
}
WITHOUT_EFFECT = {
    "auto_mapping",
    "bias",
    "corda_config",
    "ephemeral_gpu_offload",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "parent_library",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""Keys of training, or of what the tensors tell. `fan_in_fan_out` is for GPT-2's Conv1D; PEFT turns it off for other layers."""
NEUTRAL: tuple[Any, ...] = (None, False, "", [], {})
UNCHANGED_BASE: tuple[Any, ...] = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the weights of the base model as they are."""
ALL: tuple[Any, ...] = ((), "all-linear")
"""Values of target_modules that name no module."""
MERGE_ELSEWHERE = "merge it with PEFT (merge_and_unload), save the result, and convert that without --adapter"


@dataclass(frozen=True)
class LoraConfig:
    """What of the file decides the merged weights. Defaults are those of PEFT."""

    path: Path
    base: str
    """What the adapter was trained on, as its trainer named it; it may be empty."""
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    saved: tuple[str, ...]
    layers: tuple[int, ...]
    layer_lists: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of the update of a module, by its name in the trained model."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale(self, module: str) -> float:
        """What the product of both matrices is multiplied by."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def is_target(self, module: str) -> bool:
        """Whether PEFT gives this module an update, by its name in the trained model."""
        if _named(self.excluded, module) or any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if self.targets in ALL:
            return True
        if not _named(self.targets, module):
            return False
        if not self.layers or isinstance(self.targets, str) or module in self.targets:
            return True
        patterns = [rf".*?\.{name}\.(\d+)\." for name in self.layer_lists] or [r".*?\.[^.]*\.(\d+)\."]
        match = next(filter(None, (re.match(pattern, module) for pattern in patterns)), None)
        return match is not None and int(match[1]) in self.layers


def read_lora_config(path: Path) -> LoraConfig:
    """Read and check `adapter_config.json`. Raises FastVLMError for another kind of adapter, and for what is not supported."""
    config = read_json(path)
    kind = config.get("peft_type")
    if kind is None:
        raise FastVLMError(f"{path} has no peft_type: it is not PEFT's", "merge it where it was trained, and convert the result")
    if kind != "LORA":
        raise FastVLMError(f"{path} is a {kind} adapter, and only LORA is supported", MERGE_ELSEWHERE)
    unknown = sorted(key for key, value in config.items() if key not in USED | WITHOUT_EFFECT and value not in NEUTRAL)
    if unknown:
        raise FastVLMError(f"{path} sets {', '.join(unknown)}, which is not supported", MERGE_ELSEWHERE)
    start = config.get("init_lora_weights", True)
    if start not in UNCHANGED_BASE:
        raise FastVLMError(
            f"{path} has init_lora_weights {start!r}, with which training changes the weights of the base model as well", MERGE_ELSEWHERE
        )
    try:
        found = LoraConfig(
            path=path,
            base=str(config.get("base_model_name_or_path") or ""),
            rank=int(config.get("r", 8)),
            alpha=float(config.get("lora_alpha", 8)),
            rank_pattern={key: int(value) for key, value in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            targets=_names(config.get("target_modules")),
            excluded=_names(config.get("exclude_modules")),
            saved=tuple(_listed(config.get("modules_to_save"))),
            layers=tuple(int(each) for each in _listed(config.get("layers_to_transform"))),
            layer_lists=tuple(_listed(config.get("layers_pattern"))),
        )
        if min([found.rank, *found.rank_pattern.values()]) < 1:
            raise ValueError("r is not positive")
        for pattern in (*found.rank_pattern, *found.alpha_pattern, *found.saved, *found.layer_lists):
            re.compile(pattern)
        for names in (found.targets, found.excluded):
            re.compile(names if isinstance(names, str) else "")
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise FastVLMError(f"{path} contains a value of the wrong kind ({error})", "save the adapter again, or copy it again") from None
    return found


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that the end of the name matches, as in PEFT."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _named(names: str | tuple[str, ...], module: str) -> bool:
    """Whether an expression matches the name, or whether the name ends in one of several."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(_listed(value))


def _listed(value: Any) -> Iterable[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
