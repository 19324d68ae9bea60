"""fastvlm-edge among its peers: the whole way from picture to text, or its decoder alone beside those that have no encoder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.protocol import Peer, Samples, Workload, main_of, time_llm, timed_load

if TYPE_CHECKING:
    from fastvlm_edge.bench.measure import Settings

ALONE = "-llm"
NAMES = {"ttft_cold_ms": "ttft_ms"}


def measure(workload: Workload, variant: str) -> Samples:
    """`fp32`, `int8`, `int4`, or one of them with the decoder alone."""
    if variant.endswith(ALONE):
        return measure_llm(workload, variant.removesuffix(ALONE))
    from fastvlm_edge.bench.measure import Settings

    settings = Settings("ort", workload.threads, workload.runs, new_tokens=workload.new_tokens, depths=())
    return samples_of(workload.folder / variant, settings)


def samples_of(directory: Path, settings: Settings) -> Samples:
    """What one process of `fastvlm-edge bench` measures, under the names of the peers' record."""
    from fastvlm_edge.bench.measure import measure

    samples: Samples = {}
    for line in measure(directory, settings):
        if "figure" in line:
            name = line["figure"].partition("@")[0]
            samples.setdefault(NAMES.get(name, name), []).append(line["value"])
    return samples


def measure_llm(workload: Workload, precision: str) -> Samples:
    """The decoder alone, through the backend that answers questions."""
    from fastvlm_edge.backends import malloc
    from fastvlm_edge.backends.ort import OrtDecoder
    from fastvlm_edge.backends.ort_session import on_device, share_arena
    from fastvlm_edge.model_dir.manifest import read_manifest

    directory = workload.folder / precision

    def load() -> OrtDecoder:
        share_arena()
        with malloc.loading():
            return OrtDecoder(on_device(directory, read_manifest(directory), threads=workload.threads))

    decoder, samples = timed_load(load)

    def feed(ids: list[int]) -> int:
        return int(decoder.step(ids).top_ids[-1, 0])

    return samples | time_llm(feed, lambda token: feed([token]), decoder.reset, workload)


PEER = Peer("all", ("int4", "int8", "fp32", "int4-llm", "int8-llm"), measure=measure)

if __name__ == "__main__":
    sys.exit(main_of(PEER))
