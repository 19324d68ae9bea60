"""What every peer script has in common: the workload, how it is called, how it is timed, and the one JSON object that it prints.

Imports nothing but numpy, and nothing of the toolkit: a peer's memory must be its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("load_ms", "preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms", "decode_tokens_per_second", "peak_memory_mib")
"""What a peer may report, each a list of samples."""

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Workload:
    """The same for all: written once by `workload.prepare`, read in every environment."""

    folder: Path
    size: str
    image_size: int
    visual_tokens: int
    vocab: int
    ids: list[int]
    """The whole prompt; an id of `vocab + k` is row k of the picture."""
    new_tokens: int
    """The first comes from prefill."""
    threads: int
    runs: int
    """Timed runs a process, after one that warms up."""

    @property
    def checkpoint(self) -> Path:
        """FastVLM in transformers' layout, random weights."""
        return self.folder / "checkpoint"

    @property
    def llm(self) -> Path:
        """The LLM of the checkpoint alone, as `Qwen2ForCausalLM`."""
        return self.folder / "qwen2"

    @property
    def text_ids(self) -> list[int]:
        """As many positions as the whole prompt, for a peer that has no encoder."""
        return [int(token) for token in np.random.default_rng(0).integers(0, 500, len(self.ids))]

    def pixels(self) -> Any:
        """pixel_values [pictures, 3, S, S] in 0..1, preprocessed by the toolkit: to calibrate and to time an encoder alone."""
        return np.load(self.folder / "pixels.npy")


@dataclass(frozen=True)
class Peer:
    """A script of this folder: what it installs, and what it does there."""

    what: str
    """`all`, `llm` or `vision`: which part of the way from picture to text it covers."""
    variants: tuple[str, ...]
    packages: tuple[str, ...] = ()
    """For pip; none means this very environment."""
    bare: tuple[str, ...] = ()
    """Installed without what they name as needs."""
    prepare: Callable[[Workload, str], None] | None = None
    """Make files for a variant, once."""
    measure: Callable[[Workload, str], Samples] | None = None


def read_workload(folder: Path, threads: int, runs: int) -> Workload:
    """What `workload.prepare` wrote."""
    document = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    return Workload(folder, **document, threads=threads, runs=runs)


def main_of(peer: Peer) -> int:
    """Be a peer: prepare a variant, or measure it and print one JSON object as the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prepare", choices=peer.variants)
    parser.add_argument("--measure", choices=peer.variants)
    options = parser.parse_args()
    workload = read_workload(options.work, options.threads, options.runs)
    if options.prepare and peer.prepare is not None:
        peer.prepare(workload, options.prepare)
    if options.measure:
        assert peer.measure is not None
        samples = peer.measure(workload, options.measure)
        samples["peak_memory_mib"] = [peak_host_mib()]
        print(json.dumps({"samples": samples, "versions": versions(peer.packages)}))
    return 0


def time_llm(prefill: Callable[[list[int]], int], decode: Callable[[int], int], reset: Callable[[], None], workload: Workload) -> Samples:
    """Greedy: `prefill` and `decode` return the next id. One warm-up, then `runs` prompts, each with its reply."""
    samples: Samples = {"prefill_ms": [], "decode_tokens_per_second": []}
    for number in range(workload.runs + 1):
        reset()
        began = time.perf_counter()
        token = prefill(workload.text_ids)
        first = time.perf_counter()
        for _ in range(workload.new_tokens - 1):
            token = decode(token)
        ended = time.perf_counter()
        if number:
            samples["prefill_ms"].append((first - began) * 1e3)
            samples["decode_tokens_per_second"].append((workload.new_tokens - 1) / (ended - first))
    return samples


def time_vision(encode: Callable[[Any], Any], workload: Workload) -> Samples:
    """`encode` takes pixel_values [1, 3, S, S]. One warm-up, then `runs` pictures."""
    pixels = workload.pixels()
    times = []
    for number in range(workload.runs + 1):
        picture = pixels[number % len(pixels)][None]
        began = time.perf_counter()
        features = np.asarray(encode(picture))
        times.append((time.perf_counter() - began) * 1e3)
        if features.size < workload.visual_tokens or not np.isfinite(features.astype(np.float32)).all():
            raise RuntimeError(f"the encoder gave features of shape {features.shape}, or numbers that are not finite")
    return {"vision_ms": times[1:]}


def timed_load(load: Callable[[], Any]) -> tuple[Any, Samples]:
    """What `load` returns, and its time."""
    began = time.perf_counter()
    loaded = load()
    return loaded, {"load_ms": [(time.perf_counter() - began) * 1e3]}


def peak_host_mib() -> float:
    """The toolkit's own way of measuring it, from its file: importing the package would load onnxruntime into every peer."""
    spec = importlib.util.spec_from_file_location("bench_memory", ROOT / "fastvlm_edge" / "machine" / "peak_memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return float(module.peak_host_mib())


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of the packages that a peer installs, and of this Python."""
    wanted = {package.partition("=")[0].partition("[")[0].lower().replace("_", "-") for package in packages}
    found = {(each.metadata["Name"] or "").lower().replace("_", "-"): each.version for each in distributions()}
    return {"python": sys.version.split()[0], **{name: found[name] for name in sorted(wanted) if name in found}}
