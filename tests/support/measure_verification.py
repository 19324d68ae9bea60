"""How far a healthy engine is from the reference: the figures behind the bounds of the verification (docs/tensorrt.md).

    python -m tests.support.measure_verification [PRECISION ...]

The demo model (3 layers, trained) and a decoder of 24 layers with random weights are converted, and their graphs for a GPU are run by the
interpreter that rounds every value to its declared type. Prints one JSON object a line. Takes some minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from examples.checkpoints.random_checkpoint import BASE_TOKENS, SIZES, TINY_VISION, Size, write_checkpoint
from fastvlm_edge.backends.verification.cases import all_cases
from fastvlm_edge.backends.verification.check import check
from fastvlm_edge.backends.verification.reference import read_reference
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.progress import SilentProgress
from tests.support.rounded_backend import RoundedBackend

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "fastvlm-demo"
DEEP = Size(TINY_VISION, 24, 256, 4, 2, 64, 1024, 4096, BASE_TOKENS, True, 256)
CASES, CONTEXT = 2, 704


def main(precisions: list[str]) -> None:
    SIZES["24 layers"] = DEEP
    with tempfile.TemporaryDirectory() as folder:
        deep = write_checkpoint(Path(folder) / "deep", layout="native", size="24 layers")
        for name, checkpoint in (("demo", DEMO), ("24 layers", deep)):
            for precision in precisions:
                directory = Path(folder) / f"{name}-{precision}"
                convert(str(checkpoint), directory, precision=precision)
                print(json.dumps({"model": name, "precision": precision, **measure(directory)}), flush=True)


def measure(directory: Path) -> dict[str, float]:
    """The worst figures of the first cases."""
    manifest, reference = read_manifest(directory), read_reference(directory)
    manifest = replace(manifest, decoder=replace(manifest.decoder, context=CONTEXT))
    backend, cases = RoundedBackend(directory, manifest), all_cases(reference.passage, CONTEXT)[:CASES]
    figures = check(backend, reference, manifest, SilentProgress(), "the interpreter", cases=cases).figures
    pictures = figures["image_features"].values()
    worst = {name: max(case[name] for case in figures["cases"]) for name in ("divergence", "drift", "steps", "cache")}
    return {
        "token_loss": 1 - min(picture["worst"] for picture in pictures),
        "median_loss": 1 - min(picture["median"] for picture in pictures),
        **worst,
    }


if __name__ == "__main__":
    main(sys.argv[1:] or ["fp16", "bf16", "int8", "int4"])
