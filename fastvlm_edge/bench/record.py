"""The record of a measurement: samples of each process, their medians, and everything that a figure depends on."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.atomic import file_to_replace, whole_file
from fastvlm_edge.model_dir.json_record import from_json, parse_json

SCHEMA = 1
KIND = "fastvlm-edge bench"
DECODE = "decode_tokens_per_second"
TOGETHER, EACH, UNDER_LOAD = "decode_together_tokens_per_second", "decode_each_tokens_per_second", "ttft_under_load_ms"
BY_SLOTS = {TOGETHER: "tokens_per_second", EACH: "tokens_per_second_each", UNDER_LOAD: "ttft_under_load_ms"}
"""Figures of several conversations at once -> their names in `by_slots`."""
_PARTS: dict[str, dict[str, type]] = {
    "model": {"name": str, "precision": str, "image_size": int},
    "machine": {},
    "settings": {},
}
FIGURES = {
    "ttft_cold_ms": "first token, new picture",
    "preprocess_ms": "  preprocess",
    "vision_ms": "  vision",
    "prefill_ms": "  prefill",
    "first_sample_ms": "  first sample",
    "ttft_features_ms": "first token, features kept",
    "ttft_warm_ms": "first token, picture in the cache",
    "warm_prefill_ms": "  prefill",
    "warm_first_sample_ms": "  first sample",
    "ttft_first_question_ms": "first token, first question",
    DECODE: "decode",
    TOGETHER: "decode",
    EACH: "  each of them",
    UNDER_LOAD: "  first token, new picture",
    "ttft_repeated_picture_ms": "first token, picture asked about before",
    "ttft_follow_up_ms": "first token, follow-up question",
    "load_ms": "load",
    "peak_memory_mib": "peak host memory",
    "peak_memory_deepest_mib": "  at the deepest context",
    "peak_device_memory_mib": "peak device memory",
    "joules_per_picture": "energy, first token of a picture",
    "joules_per_token": "energy, one decoded token",
}
"""Name of a figure -> its title in tables. Decoding is measured at several depths, `decode_tokens_per_second@2048`, and the figures of
`BY_SLOTS` with several conversations at once, `decode_together_tokens_per_second@4`."""


def unit(figure: str) -> str:
    """Unit of a figure, from its name."""
    if figure.startswith("decode"):
        return "tokens/s"
    return "ms" if figure.partition("@")[0].endswith("_ms") else "MiB" if figure.endswith("_mib") else "J"


def more_is_better(figure: str) -> bool:
    """Whether a larger value of the figure is better."""
    return unit(figure) == "tokens/s"


def digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum, with four digits each."""
    numbers = list(values)
    return {"median": digits(statistics.median(numbers)), "min": digits(min(numbers)), "max": digits(max(numbers))}


@dataclass
class Samples:
    """Samples of every figure, grouped by process, because processes differ by more than the noise of their runs."""

    figures: dict[str, list[list[float]]] = field(default_factory=dict)
    processes: int = 0

    def begin_process(self) -> None:
        """Group the samples that follow under a new process."""
        self.processes += 1

    def add(self, figure: str, value: float) -> None:
        """Add one measured value."""
        groups = self.figures.setdefault(figure, [])
        while len(groups) < self.processes:
            groups.append([])
        groups[-1].append(value)

    def summaries(self) -> dict[str, dict[str, Any]]:
        """`{"median", "min", "max", "samples"}` of every figure; `samples` has one list for each process."""
        return {name: self.summary(name) for name in self.figures}

    def summary(self, name: str) -> dict[str, Any]:
        """The same for one figure."""
        groups = [group for group in self.figures[name] if group]
        shown = [[digits(value) for value in group] for group in groups]
        return {**summary(value for group in groups for value in group), "samples": shown}


def document_of(samples: Samples, facts: dict[str, Any], *, partial: bool) -> dict[str, Any]:
    """The record as a JSON object: first the figures, then `decode_by_depth` and `by_slots`, then what they depend on."""
    found = samples.summaries()
    depths = sorted((int(name.partition("@")[2]), name) for name in found if name.startswith(f"{DECODE}@"))
    document: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "partial": partial}
    document |= {name: found[name] for name in FIGURES if name in found}
    if depths:
        document[DECODE] = found[depths[0][1]]
        document["decode_by_depth"] = [{"depth": depth, "tokens_per_second": found[name]} for depth, name in depths]
    numbers = sorted({int(name.partition("@")[2]) for name in found if name.partition("@")[0] in BY_SLOTS})
    if numbers:
        document["by_slots"] = [
            {"slots": number, **{key: found[f"{name}@{number}"] for name, key in BY_SLOTS.items() if f"{name}@{number}" in found}}
            for number in numbers
        ]
    return document | facts


def figures_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> summary of every figure in a record. Decoding appears once for each depth and number of conversations."""
    found: dict[str, dict[str, Any]] = {}
    for name in FIGURES:
        if name == DECODE:
            found |= {f"{DECODE}@{entry['depth']}": entry["tokens_per_second"] for entry in document.get("decode_by_depth", ())}
        elif name == TOGETHER:  # all of one number, then all of the next
            for entry in document.get("by_slots", ()):
                found |= {f"{each}@{entry['slots']}": entry[key] for each, key in BY_SLOTS.items() if entry.get(key) is not None}
        elif name in document and name not in BY_SLOTS:
            found[name] = document[name]
    return found


def title_of(figure: str) -> str:
    """Title of a figure of `figures_of`, for tables."""
    name, _, number = figure.partition("@")
    if name == TOGETHER:
        return f"{FIGURES[name]}, {number} conversation{'' if number == '1' else 's'} at once"
    return f"{FIGURES[name]} at {number} positions" if name == DECODE and number else FIGURES[name]


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a record, completely or not at all. Raises FastVLMError if the disk is full or not writable."""
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FastVLMError(f"{path} cannot be written ({error.strerror})", "choose another place with -o") from None


def check_writable(path: Path) -> None:
    """Raise FastVLMError if a file at `path` could not be written, before minutes are spent on measurements."""
    try:
        folder = file_to_replace(path).parent
    except OSError as error:
        what = "is a directory" if isinstance(error, IsADirectoryError) else f"cannot be written ({error.strerror})"
        raise FastVLMError(f"{path} {what}", "give the name of a file") from None
    if not folder.is_dir():
        raise FastVLMError(f"{folder} does not exist", "create this directory first, or choose another place")
    if not os.access(folder, os.W_OK):
        raise FastVLMError(f"{folder} is not writable", "choose another place")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises FastVLMError if there is none."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FastVLMError(f"{path} cannot be read ({error.strerror})", "check the name of the file") from None
    except ValueError as error:
        raise FastVLMError(f"{path} is not JSON ({error})", "give a file that fastvlm-edge wrote with --json or -o") from None
    if not isinstance(document, dict):
        raise FastVLMError(
            f"{path} contains a {type(document).__name__}, not a JSON object", "give a file that fastvlm-edge wrote with --json or -o"
        )
    return document


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file that `bench` wrote, one for each model. Raises FastVLMError if it is not such a file."""
    document = read_json(path)
    found: Sequence[Any] = document["results"] if isinstance(document.get("results"), list) else [document]
    for each in found:
        if not isinstance(each, dict) or each.get("kind") != KIND:
            raise FastVLMError(f"{path} is not a record of fastvlm-edge bench", f"run: fastvlm-edge bench MODEL -o {path.name}")
        if each.get("schema") != SCHEMA:
            raise FastVLMError(
                f"{path} has schema {each.get('schema')}, and this version reads {SCHEMA}", "measure again with this version"
            )
        try:
            _check_values(each)
        except ValueError as error:
            raise FastVLMError(f"{path} is damaged ({error})", "measure again") from None
    return list(found)


@dataclass(frozen=True)
class _Summary:
    median: float
    min: float
    max: float
    samples: list[list[float]]


@dataclass(frozen=True)
class _Depth:
    depth: int
    tokens_per_second: _Summary


@dataclass(frozen=True)
class _Slots:
    slots: int
    tokens_per_second: _Summary | None = None
    tokens_per_second_each: _Summary | None = None
    ttft_under_load_ms: _Summary | None = None


def _check_values(document: dict[str, Any]) -> None:
    """Raise ValueError for the first value that no measurement writes."""
    for part, keys in _PARTS.items():
        if not isinstance(document.get(part), dict):
            raise ValueError(f"{part} is not an object")
        for key, kind in keys.items():
            if not isinstance(document[part].get(key), kind):
                raise ValueError(f"{key} of {part} is {str(document[part].get(key))[:40]!r}, not of type {kind.__name__}")
    from_json(list[_Depth], document.get("decode_by_depth", []), "decode_by_depth")
    from_json(list[_Slots], document.get("by_slots", []), "by_slots")
    from_json(list[int], document["settings"].get("slots", []), "slots of settings")
    from_json(int, document.get("slots", 1), "slots")
    for name, figure in figures_of(document).items():
        summary: _Summary = from_json(_Summary, figure, name)
        values = [value for group in summary.samples for value in group]
        if not values or not all(0 <= value < math.inf for value in (*values, summary.median, summary.min, summary.max)):
            raise ValueError(f"{name} has no samples, or one that is not a positive number")
