"""What every peer script has in common: the workload, how it is called, how it is timed, and the one JSON object that it prints.

Imports only numpy, and nothing from the toolkit, because the memory that a peer reports must be its own.
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
DEEP = 1900
"""Positions before a reply at which decoding is timed a second time, on a GPU."""
DECODE = "decode_tokens_per_second"
FIELDS = (
    *("load_ms", "preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms", DECODE, f"{DECODE}@{DEEP}"),
    *("peak_memory_mib", "peak_device_memory_mib"),
)
"""What a peer may report, each a list of samples."""
DEVICES = ("cpu", "gpu")

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Workload:
    """What is measured, the same for all: written once by `workload.prepare`, read in every environment."""

    folder: Path
    size: str
    image_size: int
    visual_tokens: int
    vocab: int
    ids: list[int]
    """The whole prompt. The id `vocab + k` is row k of the image features."""
    new_tokens: int
    """The first comes from prefill."""
    threads: int
    runs: int
    """Timed runs per process, after one warm-up."""
    device: str = "cpu"
    """`cpu` or `gpu`."""

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
        """Ids of text, as many as the whole prompt has positions: for a peer without an encoder."""
        return [int(token) for token in np.random.default_rng(0).integers(0, 500, len(self.ids))]

    def pixels(self) -> Any:
        """pixel_values [pictures, 3, S, S] in 0..1, preprocessed by the toolkit, for calibration and to time an encoder alone."""
        return np.load(self.folder / "pixels.npy")


@dataclass(frozen=True)
class Peer:
    """A script in this directory: which packages it needs, and what it does with them."""

    what: str
    """`all`, `llm` or `vision`: which part of the path from picture to text it covers."""
    variants: tuple[str, ...]
    """On the CPU."""
    measure: Callable[[Workload, str], Samples]
    gpu_variants: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    """For pip. Without any, the peer runs in this very environment."""
    bare: tuple[str, ...] = ()
    """Packages installed without their dependencies."""
    environment: str = ""
    """The module whose environment this one shares; by default it has its own."""
    prepare: Callable[[Workload, str], None] | None = None
    """Make the files of a variant, once."""
    check: Callable[[Workload, str], dict[str, Any]] | None = None
    """On a GPU, before anything is timed: compare a variant's answers with those of the CPU."""

    def variants_on(self, device: str) -> tuple[str, ...]:
        """The variants for `cpu` or `gpu`."""
        return self.gpu_variants if device == "gpu" else self.variants


def read_workload(folder: Path, threads: int, runs: int, device: str = "cpu") -> Workload:
    """Read what `workload.prepare` wrote."""
    document = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    return Workload(folder, **document, threads=threads, runs=runs, device=device)


def main_of(peer: Peer) -> int:
    """The main function of a peer's script: prepare, check or measure one variant; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    for action in ("--prepare", "--check", "--measure"):
        parser.add_argument(action, choices=(*peer.variants, *peer.gpu_variants))
    options = parser.parse_args()
    workload = read_workload(options.work, options.threads, options.runs, options.device)
    if options.prepare and peer.prepare is not None:
        peer.prepare(workload, options.prepare)
    if options.check and peer.check is not None:
        print(json.dumps(peer.check(workload, options.check)))
    if options.measure:
        samples = peer.measure(workload, options.measure)
        samples["peak_memory_mib"] = [peak_host_mib()]
        print(json.dumps({"samples": samples, "versions": versions(peer.packages)}))
    return 0


def time_llm(prefill: Callable[[list[int]], int], decode: Callable[[int], int], reset: Callable[[], None], workload: Workload) -> Samples:
    """Time greedy replies to `runs` prompts, after one warm-up. `prefill` and `decode` return the next id."""
    samples: Samples = {"prefill_ms": [], DECODE: []}
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
            samples[DECODE].append((workload.new_tokens - 1) / (ended - first))
    return samples


def time_vision(encode: Callable[[Any], Any], workload: Workload) -> Samples:
    """Time the encoder on `runs` pictures, after one warm-up. `encode` takes pixel_values [1, 3, S, S] and returns the image features."""
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
    """What `load` returns, and how long it took, as `load_ms`."""
    began = time.perf_counter()
    loaded = load()
    return loaded, {"load_ms": [(time.perf_counter() - began) * 1e3]}


def peak_host_mib() -> float:
    """The largest resident set of this process. The toolkit's module is read by its path: importing the package would load onnxruntime."""
    spec = importlib.util.spec_from_file_location("bench_memory", ROOT / "fastvlm_edge" / "machine" / "peak_memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return float(module.peak_host_mib())


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Version of Python, and of each of `packages` (as for pip) that is installed."""
    wanted = {package.partition("=")[0].partition("[")[0].lower().replace("_", "-") for package in packages}
    found = {(each.metadata["Name"] or "").lower().replace("_", "-"): each.version for each in distributions()}
    return {"python": sys.version.split()[0], **{name: found[name] for name in sorted(wanted) if name in found}}
