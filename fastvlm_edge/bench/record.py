"""The record of a measurement: samples by process, their medians and spread, and everything that a figure depends on."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.atomic import whole_file

SCHEMA = 1
KIND = "fastvlm-edge bench"
DECODE = "decode_tokens_per_second"
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
    "load_ms": "load",
    "peak_memory_mib": "peak host memory",
    "peak_memory_deepest_mib": "  at the deepest context",
    "peak_device_memory_mib": "peak device memory",
    "joules_per_picture": "energy, first token of a picture",
    "joules_per_token": "energy, one decoded token",
}
"""Name of a figure -> what a person reads. `decode_tokens_per_second` is measured at every depth, `decode_tokens_per_second@2048`."""


def unit(figure: str) -> str:
    """What a figure counts in, from its name."""
    if figure.startswith("decode"):
        return "tokens/s"
    return "ms" if figure.endswith("_ms") else "MiB" if figure.endswith("_mib") else "J"


def more_is_better(figure: str) -> bool:
    """Whether a larger value is the good news."""
    return unit(figure) == "tokens/s"


def digits(value: float) -> float:
    """Four of them."""
    return float(f"{value:.4g}")


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most, four digits each."""
    numbers = list(values)
    return {"median": digits(statistics.median(numbers)), "min": digits(min(numbers)), "max": digits(max(numbers))}


@dataclass
class Samples:
    """Values by figure, and for each figure by process: one process may differ from the next in more than noise."""

    figures: dict[str, list[list[float]]] = field(default_factory=dict)
    processes: int = 0

    def begin_process(self) -> None:
        """What is added from now on comes from a new process."""
        self.processes += 1

    def add(self, figure: str, value: float) -> None:
        """One measured value."""
        groups = self.figures.setdefault(figure, [])
        while len(groups) < self.processes:
            groups.append([])
        groups[-1].append(value)

    def summaries(self) -> dict[str, dict[str, Any]]:
        """`{"median", "min", "max", "samples"}` of every figure; samples are lists by process."""
        return {name: self.summary(name) for name in self.figures}

    def summary(self, name: str) -> dict[str, Any]:
        """Of one figure."""
        groups = [group for group in self.figures[name] if group]
        shown = [[digits(value) for value in group] for group in groups]
        return {**summary(value for group in groups for value in group), "samples": shown}


def document_of(samples: Samples, facts: dict[str, Any], *, partial: bool) -> dict[str, Any]:
    """The JSON object: figures on top, then `decode_by_depth`, then what they depend on."""
    found = samples.summaries()
    depths = sorted((int(name.partition("@")[2]), name) for name in found if name.startswith(f"{DECODE}@"))
    document: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "partial": partial}
    document |= {name: found[name] for name in FIGURES if name in found}
    if depths:
        document[DECODE] = found[depths[0][1]]
        document["decode_by_depth"] = [{"depth": depth, "tokens_per_second": found[name]} for depth, name in depths]
    return document | facts


def figures_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> summary of everything that a record measured, decoding by depth in place of the one figure for it."""
    found: dict[str, dict[str, Any]] = {}
    for name in FIGURES:
        if name == DECODE:
            found |= {f"{DECODE}@{entry['depth']}": entry["tokens_per_second"] for entry in document.get("decode_by_depth", ())}
        elif name in document:
            found[name] = document[name]
    return found


def title_of(figure: str) -> str:
    """What a person reads for a figure of `figures_of`."""
    name, _, depth = figure.partition("@")
    return f"{FIGURES[name]} at {depth} positions" if depth else FIGURES[name]


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a record, whole or not at all. Raises FastVLMError where the disk is full or not writable."""
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FastVLMError(f"{path} cannot be written ({error.strerror}); choose another place with -o") from None


def check_writable(path: Path) -> None:
    """Raise FastVLMError where a file at `path` could not be written, before minutes are spent on measuring."""
    if path.is_dir():
        raise FastVLMError(f"{path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise FastVLMError(f"{path.absolute().parent} does not exist; make the folder first, or choose another place")
    if not os.access(path.absolute().parent, os.W_OK):
        raise FastVLMError(f"{path.absolute().parent} is not writable; choose another place")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FastVLMError where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FastVLMError(f"{path} cannot be read ({error.strerror}); check the name of the file") from None
    except ValueError as error:
        raise FastVLMError(f"{path} is no JSON ({error}); give what fastvlm-edge wrote with --json or -o") from None
    if not isinstance(document, dict):
        raise FastVLMError(f"{path} holds a {type(document).__name__}, not one JSON object; give what fastvlm-edge wrote with --json or -o")
    return document


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file that `bench` wrote: one, or those of several models. Raises FastVLMError where it is no such file."""
    document = read_json(path)
    found: Sequence[Any] = document["results"] if isinstance(document.get("results"), list) else [document]
    for each in found:
        if not isinstance(each, dict) or each.get("kind") != KIND:
            raise FastVLMError(f"{path} is no record of fastvlm-edge bench; make one with: fastvlm-edge bench MODEL -o {path.name}")
        if each.get("schema") != SCHEMA:
            raise FastVLMError(f"{path} has schema {each.get('schema')}, this toolkit reads {SCHEMA}; measure again with this version")
    return list(found)
