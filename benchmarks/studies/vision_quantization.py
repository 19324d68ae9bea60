"""W8A8 of the encoder: observers, each technique in turn, plans for several bounds, and onnxruntime's own quantiser beside them.

Question: What does each technique of the encoder's W8A8 calibration contribute, and which bound on the loss is worth its price?
Verdict: on the demo all techniques together halve the loss of plain rounding (1 - cosine 0.96e-4 against 2.08e-4); the correction of
the bias brings most of it. The observers max and MSE are near each other, percentile is worse and entropy much worse. A bound of 0.001
keeps 96 % of the multiply-accumulates of the random 0.5B in INT8. The product uses all techniques, the MSE observer and this bound.
Ran: 2026-11-21, at commit d4acf53 (record: benchmarks/results/vision_quantization.json).
Command at that commit: python -m benchmarks.vision_quantization demo random plan onnxruntime

The demo has trained weights. The 0.5B has random ones with heavy-tailed activations (`add_heavy_tails`) that carry no redundancy: it shows
the depth of the real size. Losses are 1 - cosine of the image features on pictures that calibration did not see, against FP32.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.common.checkpoint import random_checkpoint
from benchmarks.studies.recipes import OBSERVERS, Recipe, RecipeSearch
from examples.checkpoints.heavy_tails import add_heavy_tails
from fastvlm_edge.backends.verification.conversation import stored_pictures
from fastvlm_edge.calib.encoder.search import VisionQuantization, VisionSearch, cosine_loss, squared_error
from fastvlm_edge.convert.checkpoint.checkpoint import load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.vision import build_vision
from fastvlm_edge.convert.precision import precision_plan
from fastvlm_edge.convert.fastvithd import FastViTHD, image_tokens
from fastvlm_edge.convert.weights.vision import write_vision_weights
from fastvlm_edge.inputs.preprocess import preprocess

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "vision_quantization.json"
DEMO = ROOT / "examples" / "demo" / "fastvlm-demo"
SEED = 7
BOUNDS = (1e-3, 5e-4, 2e-4, 1e-4)
PLAIN = Recipe(OBSERVERS["max"], equalize=False, shift_behind_gelu=False, rounding="nearest", clip_weights=False, correct_bias=False)
LADDER = {
    "plain: largest value, nearest": PLAIN,
    "+ MSE observer": (step := replace(PLAIN, observer=OBSERVERS["mse"])),
    "+ equalisation": (step := replace(step, equalize=True)),
    "+ scale and shift behind GELU": (step := replace(step, shift_behind_gelu=True)),
    "+ bias correction": (step := replace(step, correct_bias=True)),
    "+ weights clipped": (step := replace(step, clip_weights=True)),
    "+ rounding to data: all": Recipe(),
}
OBSERVED = {f"all, {name} observer": replace(Recipe(), observer=observer) for name, observer in OBSERVERS.items()}
Float32 = npt.NDArray[np.float32]
Model = tuple[FastViTHD, nn.Sequential]


def main() -> None:
    """Run the parts that are named, all by default, and write each into the record."""
    from benchmarks.common import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["demo", "random", "plan", "onnxruntime"])
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where the random checkpoint is kept")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    document = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    document |= {"what": __doc__.split("\n\n")[-1].replace("\n", " "), "machine": machine.describe()}
    for part in options.parts:
        began = time.perf_counter()
        found = PARTS[part](options.work)
        if RESULT.is_file():  # another part may have run beside this one
            document |= json.loads(RESULT.read_text(encoding="utf-8"))
        document[part] = found | {"seconds": round(time.perf_counter() - began), "peak_memory_mb": peak_memory()}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def peak_memory() -> int:
    """Of this process so far; a part run alone has its own."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def demo(_work: Path) -> dict[str, Any]:
    """Every recipe on the demo's encoder, and plans."""
    torch.set_num_threads(1)  # layers this small only lose time to more
    model = demo_model()
    seen, heldout = scenes("calibration", 32, 192), scenes("heldout", 32, 192)
    plan = precision_plan("int8")
    search = VisionSearch(*model, plan)
    search.observe(seen)
    search.measure(seen[:8])
    every = LADDER | {name: recipe for name, recipe in (OBSERVED | plain_observers()).items() if recipe not in LADDER.values()}
    return {
        "image_size": 192,
        "pictures": {"calibration": len(seen), "heldout": len(heldout)},
        "recipes": {name: compare(model, recipe, seen, heldout) for name, recipe in every.items()},
        "plans": [describe(search, search.choose(seen, bound=bound, measured=8), heldout) for bound in BOUNDS],
    }


def random(work: Path) -> dict[str, Any]:
    """Every recipe on the 0.5B's encoder, at 256 px."""
    model = random_model(work)
    seen, heldout = photographs(8, 256), photographs(4, 256, first=8)
    every = LADDER | {name: recipe for name, recipe in OBSERVED.items() if recipe not in LADDER.values()}
    return {
        "image_size": 256,
        "pictures": {"calibration": len(seen), "heldout": len(heldout)},
        "recipes": {name: compare(model, recipe, seen, heldout) for name, recipe in every.items()},
    }


def plan(work: Path) -> dict[str, Any]:
    """Plans for the 0.5B's encoder, at 512 px."""
    model = random_model(work)
    seen, heldout = photographs(8, 512), [*photographs(2, 512, first=8), *stored_pictures(512, "pad")]
    search = VisionSearch(*model, precision_plan("int8"))
    search.observe(seen)
    search.measure(seen[:1])
    return {
        "image_size": 512,
        "pictures": {"calibration": len(seen), "heldout": len(heldout)},
        "plans": [describe(search, search.choose(seen, bound=bound, measured=1), heldout) for bound in BOUNDS],
    }


def onnxruntime(work: Path) -> dict[str, Any]:
    """`onnxruntime.quantization.quantize_static` on the FP32 graphs, as TensorRT takes it: symmetric, per channel, Conv and MatMul."""
    rows: dict[str, Any] = {}
    for name, model, size, seen, heldout, methods in (
        ("demo", demo_model(), 192, scenes("calibration", 16, 192), scenes("heldout", 32, 192), ("MinMax", "Entropy", "Percentile")),
        ("random", random_model(work), 256, photographs(4, 256), photographs(4, 256, first=8), ("MinMax",)),
    ):
        for method in methods:
            rows[f"{name}, {method}"] = static(model, size, seen, heldout, method)
            print(name, method, rows[f"{name}, {method}"], flush=True)
    return {"rows": rows}


def static(model: Model, size: int, seen: Sequence[Float32], heldout: Sequence[Float32], method: str) -> dict[str, Any]:
    """One run of onnxruntime's quantiser."""
    encoder, projector = model
    began = time.perf_counter()
    found = [torch.from_numpy(row) for row in static_features(model, size, seen, heldout, method)]
    with torch.no_grad():
        expected = [projector(image_tokens(encoder(torch.from_numpy(picture)))) for picture in heldout]
    return {**losses(found, expected), "seconds": round(time.perf_counter() - began, 1)}


def others(graph: Path, layers: set[str]) -> list[str]:
    """The Conv and MatMul nodes of a graph that do not belong to these layers."""
    import onnx

    nodes = [node for node in onnx.load(str(graph), load_external_data=False).graph.node if node.op_type in ("Conv", "MatMul")]
    found = [node.name for node in nodes if node.input[1].removesuffix(".weight") not in layers]
    if len(nodes) - len(found) != len(layers):
        raise RuntimeError(f"{len(nodes) - len(found)} nodes for {len(layers)} layers")
    return found


def static_features(
    model: Model, size: int, seen: Sequence[Float32], pictures: Iterable[Float32], method: str, same: set[str] | None = None
) -> list[Float32]:
    """Image features of `pictures` by onnxruntime's quantiser, calibrated with `seen`. With `same`, only these layers are INT8."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.items: Iterator[Float32] = iter(seen)

        def get_next(self) -> dict[str, Float32] | None:
            item = next(self.items, None)
            return None if item is None else {"pixel_values": item}

    with tempfile.TemporaryDirectory() as folder:
        write_fp32(model, size, Path(folder))
        quantize_static(
            f"{folder}/vision.onnx",
            f"{folder}/int8.onnx",
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul"],
            nodes_to_exclude=others(Path(folder) / "vision.onnx", same) if same else None,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
            use_external_data_format=True,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        return graph_features(Path(folder) / "int8.onnx", pictures)


def write_fp32(model: Model, size: int, folder: Path) -> None:
    """vision.onnx and vision.weights."""
    encoder, projector = model
    hidden = projector[2].out_features
    assert isinstance(hidden, int)
    weights = WeightsFile(folder / "vision.weights")
    write_vision_weights(encoder, projector, precision_plan("fp32"), weights, lambda: None)
    weights.close()
    graph = GraphBuilder("vision", weights)
    build_vision(graph, encoder.config, hidden, size, precision_plan("fp32"))
    graph.save(folder / "vision.onnx")


def graph_features(path: Path, pictures: Iterable[Float32]) -> list[Float32]:
    """Image features by a graph as it stands: onnxruntime 1.31.1, when it moves a Q through a Reshape, gives it a wrong zero point."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return [session.run(None, {"pixel_values": picture})[0] for picture in pictures]


PARTS = {"demo": demo, "random": random, "plan": plan, "onnxruntime": onnxruntime}


def compare(model: Model, recipe: Recipe, seen: Sequence[Float32], heldout: Sequence[Float32]) -> dict[str, Any]:
    """What a recipe loses with every candidate in INT8, and with weights alone."""
    began = time.perf_counter()
    search = RecipeSearch(*model, precision_plan("int8"), recipe)
    search.observe(seen)
    observed = time.perf_counter() - began
    expected = run(search, heldout)
    row: dict[str, Any] = {"observe_seconds": round(observed, 1)}
    for decision in ("w8a8", "weights"):
        for unit in search.units:
            unit.use(unit.best if decision == "w8a8" else "weights")
        row[decision] = losses(run(search, heldout), expected)
    print(recipe, row, flush=True)
    return row


def plain_observers() -> dict[str, Recipe]:
    """Nothing but an observer."""
    return {f"plain, {name} observer": replace(PLAIN, observer=observer) for name, observer in OBSERVERS.items()}


def describe(search: VisionSearch, result: VisionQuantization, heldout: Sequence[Float32]) -> dict[str, Any]:
    """A plan, and what it loses on pictures that were not seen."""
    for unit in search.units:
        unit.use("wide")
    expected = run(search, heldout)
    for unit in search.units:
        for layer in unit.layers:
            layer.use(result.layers.get(layer.name))
    found = losses(run(search, heldout), expected)
    for unit in search.units:
        unit.use("wide")
    row = {
        "bound": result.bound,
        "predicted_loss": round_digits(sum(unit.loss[unit.decision] for unit in search.units)),
        "loss_on_measured": round_digits(result.loss),
        "heldout": found,
        "share_of_macs": {kind: round(result.share(kind), 4) for kind in ("w8a8", "weights", "wide")},  # type: ignore[arg-type]
        "weight_mb": round(sum(record.weight_bytes for record in result.records) / 1e6, 1),
        "not_w8a8": sorted({record.group for record in result.records if record.group and record.decision != "w8a8"}),
        "seconds": {name: round(value, 1) for name, value in result.seconds.items()},
    }
    print(row, flush=True)
    return row


@torch.no_grad()
def run(search: VisionSearch, pictures: Sequence[Float32]) -> list[torch.Tensor]:
    """Image features with the layers as they are."""
    return [search.run(torch.from_numpy(picture)) for picture in pictures]


def losses(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean and worst over the pictures."""
    cosine = [cosine_loss(a, b) for a, b in zip(found, expected, strict=True)]
    relative = [squared_error(a, b) ** 0.5 for a, b in zip(found, expected, strict=True)]
    return {
        "mean_loss": round_digits(float(np.mean(cosine))),
        "worst_loss": round_digits(max(cosine)),
        "relative_error": round_digits(float(np.mean(relative))),
    }


def round_digits(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


def demo_model() -> Model:
    """The trained demo."""
    checkpoint = open_checkpoint(str(DEMO))
    return load_vision(checkpoint), load_projector(checkpoint)


def random_model(work: Path) -> Model:
    """The 0.5B size with random weights and heavy tails."""
    checkpoint = open_checkpoint(str(random_checkpoint(work)))
    encoder = load_vision(checkpoint)
    add_heavy_tails(encoder)
    return encoder, load_projector(checkpoint)


def scenes(split: str, count: int, size: int) -> list[Float32]:
    """Pictures of the demo."""
    from examples.demo_training.scenes import make_scene

    return [preprocess(make_scene(split, SEED, index, size=size).image, size, "pad") for index in range(count)]


def photographs(count: int, size: int, first: int = 0) -> list[Float32]:
    """Squares cut from scikit-image's photographs, and scenes of the demo between them."""
    from PIL import Image
    from skimage import data

    sources = [data.chelsea(), data.rocket(), data.camera(), data.page(), data.cat() if hasattr(data, "cat") else data.coins()]
    out = scenes("calibration", first + count, size)[first:]
    for index in range(0, count, 2):
        image = Image.fromarray(sources[(first + index) // 2 % len(sources)]).convert("RGB")
        if first:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(20)
        out[index] = preprocess(image, size, "pad")
    return out


if __name__ == "__main__":
    main()
