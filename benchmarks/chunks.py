"""How far are logits apart if a prompt is prefilled in one call, and in chunks?

    python -m benchmarks.chunks [--work build/bench-versions] [--threads 2] [--out benchmarks/results/chunks.json]

The stored passage about two pictures, 576 positions or more, with the demo model and with a random model of 0.5B's width with four layers,
on a CPU. Logits of its last 32 positions are compared. Integer products round their inputs to 8 bits, and the kernels for one position and
for several add up in another order, so that now and then a value is rounded to the other side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine
from benchmarks.onnxruntime_versions import PRECISIONS, SIZE, prepare
from benchmarks.peers.protocol import ROOT
from fastvlm_edge.backends.ort import HostFeatures, OrtDecoder, OrtVision
from fastvlm_edge.backends.ort_session import on_device
from fastvlm_edge.backends.verification.conversation import TAIL, stored_passage, stored_pictures
from fastvlm_edge.bench.record import digits, write_json
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.progress import stderr_progress

CHUNKS = (1, 7, 16, 100)
DEMO = ROOT / "examples" / "demo" / "fastvlm-demo"

Float32 = NDArray[np.float32]


def main() -> int:
    """Measure both models in every precision and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench-versions"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chunks.json")
    options = parser.parse_args()
    prepare(options.work)
    demo = options.work / "demo"
    convert_demo(demo)
    results: dict[str, dict[str, Any]] = {}
    for name, folder in (("demo", demo), (SIZE, options.work)):
        results[name] = {precision: differences(folder / precision, options.threads) for precision in PRECISIONS}
        print(name, results[name])
    document = {
        "what": f"logits of the last {TAIL} positions of the stored passage, prefilled in one call and in chunks",
        "machine": machine.describe(),
        "threads": options.threads,
        "results": results,
    }
    write_json(options.out, document)
    return 0


def convert_demo(folder: Path) -> None:
    """Convert the demo checkpoint anew, which takes seconds."""
    from fastvlm_edge.convert.pipeline import convert

    for precision in PRECISIONS:
        convert(str(DEMO), folder / precision, precision=precision, force=True, progress=stderr_progress())


def differences(directory: Path, threads: int) -> dict[str, Any]:
    """The figures of a model directory, for each length of the chunks."""
    manifest = read_manifest(directory)
    setup = on_device(directory, manifest, threads=threads)
    vision, decoder = OrtVision(setup), OrtDecoder(setup)
    pictures = tuple(vision.encode(pixels) for pixels in stored_pictures(manifest.vision.image_size, manifest.vision.geometry))
    ids = stored_passage(TextTokenizer(directory / "tokenizer.json"), manifest).ids
    whole = logits_of(decoder, ids, pictures, len(ids))
    top = np.sort(whole, axis=1)
    margins = top[:, -1] - top[:, -2]
    found: dict[str, Any] = {"positions": len(ids), "largest_logit": digits(float(np.abs(whole).max())), "chunks": {}}
    for chunk in CHUNKS:
        rows = logits_of(decoder, ids, pictures, chunk)
        other = rows.argmax(1) != whole.argmax(1)
        found["chunks"][str(chunk)] = {
            "largest_difference": digits(float(np.abs(rows - whole).max())),
            "other_greedy_tokens": int(other.sum()),
            "largest_margin_of_these": digits(float(margins[other].max())) if other.any() else None,
        }
    return found


def logits_of(decoder: OrtDecoder, ids: Sequence[int], pictures: tuple[HostFeatures, ...], chunk: int) -> Float32:
    """[TAIL, vocab]: the logits of the last positions, with `chunk` ids in a call."""
    decoder.reset()
    rows = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        wanted = [at for at in range(len(part)) if start + at >= len(ids) - TAIL]
        out = decoder.step(part, pictures, logit_positions=wanted or None, want_logits=bool(wanted))
        if out.logits is not None:
            rows.append(out.logits.copy())
    return np.concatenate(rows)


if __name__ == "__main__":
    sys.exit(main())
