"""The demo's encoder as libraries quantise it, on the held-out questions: exact match by kind, beside ours.

Question: Is the encoder as we quantise it better than as onnxruntime, nvidia-modelopt and NNCF do?
Verdict: as whole tools, ours keeps the image features closer to FP32, because it leaves more layers in floats. With the same layers, the error of
nvidia-modelopt's `max` is 0.0085 and ours is 0.0076. The answers of the demo hardly tell the ways apart: one to nine of 2,000 change.
Ran: 2026-11-24, at commit 37bfea5 (record: benchmarks/results/vision_libraries.json).
Command at that commit: python -m benchmarks.vision_libraries --modelopt PYTHON --nncf PYTHON
Same layers: 2026-11-28, at commit 968b7ce: python -m benchmarks.studies.vision_libraries --same-layers --modelopt PYTHON

INT8 weights a channel and INT8 activations a tensor; the decoder is FP32, so that the encoder alone is judged. The pictures that calibrate
are the same for all. `--modelopt` is the interpreter of an environment with nvidia-modelopt[onnx], `--nncf` of one with nncf and openvino,
such as `make bench-peers` makes (`build/peers/openvino_vision`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine
from benchmarks.studies.quantization_choice import (
    CALIBRATION_SEED,
    DEMO,
    MEASURED,
    Float32,
    asked,
    calibration_pictures,
    demo_scenes,
    encode,
    judge,
)
from benchmarks.studies.vision_quantization import Model, graph_features, others, static_features, write_fp32
from fastvlm_edge.calib.accuracy import score
from fastvlm_edge.calib.encoder.search import VisionSearch, squared_error
from fastvlm_edge.calib.quantizer import DAMAGE
from fastvlm_edge.convert.checkpoint.checkpoint import load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.precision import precision_plan

PICTURES = 128
MODELOPT = """
import sys, numpy
from modelopt.onnx.quantization import quantize
folder, method = sys.argv[1:]
excluded = [line for line in open(folder + "/excluded").read().splitlines() if line]
only = {"nodes_to_exclude": excluded, "op_types_to_quantize": ["Conv", "MatMul"]} if excluded else {}
quantize(folder + "/vision.onnx", quantize_mode="int8", calibration_data=numpy.load(folder + "/seen.npy"), calibration_method=method,
         calibration_eps=["cpu"], output_path=folder + "/int8.onnx", high_precision_dtype="fp32", **only)
"""
NNCF = """
import sys, numpy, nncf, openvino
folder = sys.argv[1]
core = openvino.Core()
seen = numpy.load(folder + "/seen.npy")
model = core.read_model(folder + "/vision.onnx")
model.reshape([1, *seen.shape[1:]])
model = nncf.quantize(model, nncf.Dataset(list(seen[:, None])), subset_size=len(seen))
request = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1}).create_infer_request()
pixels = numpy.load(folder + "/pixels.npy", mmap_mode="r")
numpy.save(folder + "/features.npy", numpy.concatenate([request.infer([picture[None]])[0] for picture in pixels]))
"""


def main() -> int:
    """Quantise, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--modelopt", type=Path)
    parser.add_argument("--same-layers", action="store_true", help="add rows to --out in which libraries quantise what ours does")
    parser.add_argument("--nncf", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "vision_libraries.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers this small only lose time to more
    checkpoint = open_checkpoint(str(DEMO))
    size = checkpoint.image_size
    model = load_vision(checkpoint), load_projector(checkpoint)
    make_scene = demo_scenes().make_scene
    pixels, questions, kinds = asked(make_scene("heldout", CALIBRATION_SEED, index, size=size) for index in range(options.count))
    seen = calibration_pictures(PICTURES, size)
    search = VisionSearch(*model, precision_plan("int8"))
    expected = encode(search, pixels)
    before = score(checkpoint, questions, list(expected), lambda: None)

    def pictures() -> Iterator[Float32]:
        for picture in pixels:
            yield np.ascontiguousarray(picture.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))

    same: set[str] = set()

    def ours() -> Float32:
        search.observe(seen)
        search.measure(seen[:MEASURED])
        result = search.choose(seen, bound=DAMAGE, measured=MEASURED)
        search.apply(result)
        same.update(result.activation_scales)
        return encode(search, pixels)

    ways: dict[str, Callable[[], Float32]] = {"ours": ours}
    if options.same_layers:
        for method in ("MinMax", "Percentile"):
            ways[f"onnxruntime, {method}, the layers of ours"] = lambda method=method: np.concatenate(  # type: ignore[misc]
                static_features(model, size, seen, pictures(), method, same)
            )
        for method in ("max", "entropy"):
            ways[f"modelopt, {method}, the layers of ours"] = lambda method=method: np.concatenate(  # type: ignore[misc]
                modelopt_features(model, size, seen, pictures(), method, options.modelopt, same)
            )
        return measure(
            ways, options.out, json.loads(options.out.read_text(encoding="utf-8")), checkpoint, questions, kinds, before, expected
        )
    for method in ("MinMax", "Entropy", "Percentile"):
        ways[f"onnxruntime, {method}"] = lambda method=method: np.concatenate(  # type: ignore[misc]
            static_features(model, size, seen, pictures(), method)
        )
    for method in ("max", "entropy") if options.modelopt else ():
        ways[f"modelopt, {method}"] = lambda method=method: np.concatenate(  # type: ignore[misc]
            modelopt_features(model, size, seen, pictures(), method, options.modelopt)
        )
    if options.nncf:
        ways["nncf, run by OpenVINO"] = lambda: nncf_features(model, size, seen, pictures(), options.nncf)
    document: dict[str, Any] = {
        "what": __doc__.split("\n\n")[-1].replace("\n", " ").strip(),
        "data": f"{options.count} scenes of the split heldout, seed {CALIBRATION_SEED}",
        "calibration": f"{PICTURES} scenes of the split calibration, seed {CALIBRATION_SEED}",
        "machine": machine.describe(),
        "results": {},
    }
    return measure(ways, options.out, document, checkpoint, questions, kinds, before, expected)


def measure(
    ways: dict[str, Callable[[], Float32]],
    out: Path,
    document: dict[str, Any],
    checkpoint: Any,
    questions: Any,
    kinds: list[str],
    before: Any,
    expected: Float32,
) -> int:
    """Judge every way and put it into the record."""
    for name, way in ways.items():
        try:
            found = way()
        except Exception as error:  # a library's failure is a finding
            document["results"][name] = {"failed": (str(error).strip().splitlines() or [repr(error)])[-1][:300]}
            print(name, document["results"][name], flush=True)
            continue
        after = score(checkpoint, questions, list(found), lambda: None)
        figures = judge(questions, kinds, before, after)
        points = {kind: 100 * row["lost"] / kinds.count(kind) for kind, row in figures["by_kind"].items()}
        document["results"][name] = {
            "exact_match": round(sum(row["right_in_fp32"] - row["lost"] for row in figures["by_kind"].values()) / len(questions), 4),
            "worst_kind_loses_points": round(max(points.values()), 2),
            "relative_error": float(f"{squared_error(torch.from_numpy(found), torch.from_numpy(expected)) ** 0.5:.3g}"),
            **figures,
        }
        print(name, json.dumps({key: value for key, value in document["results"][name].items() if key != "by_kind"}), flush=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def modelopt_features(
    model: Model, size: int, seen: list[Float32], pictures: Iterator[Float32], method: str, python: Path, same: set[str] | None = None
) -> list[Float32]:
    """Image features by the graph that nvidia-modelopt's PTQ makes, in its own environment. With `same`, only these layers are INT8."""
    with tempfile.TemporaryDirectory() as folder:
        write_fp32(model, size, Path(folder))
        (Path(folder) / "excluded").write_text("\n".join(others(Path(folder) / "vision.onnx", same) if same else []), encoding="utf-8")
        np.save(Path(folder) / "seen.npy", np.concatenate(seen))
        in_its_environment(python, MODELOPT, folder, method)
        return graph_features(Path(folder) / "int8.onnx", pictures)


def nncf_features(model: Model, size: int, seen: list[Float32], pictures: Iterator[Float32], python: Path) -> Float32:
    """Image features by the graph that NNCF's PTQ makes, computed by OpenVINO, both in their own environment."""
    with tempfile.TemporaryDirectory() as folder:
        write_fp32(model, size, Path(folder))
        np.save(Path(folder) / "seen.npy", np.concatenate(seen))
        np.save(Path(folder) / "pixels.npy", np.concatenate(list(pictures)))
        in_its_environment(python, NNCF, folder)
        return np.asarray(np.load(Path(folder) / "features.npy"))


def in_its_environment(python: Path, program: str, *arguments: str) -> None:
    """Run `program` there. Raises RuntimeError with what it said."""
    result = subprocess.run([str(python), "-c", program, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)


if __name__ == "__main__":
    sys.exit(main())
