"""How the encoder's calibration was set up: observers, pictures, bounds, what is spared; judged on development questions of the demo.

Question: Which observer, how many pictures and which bound should the encoder's calibration use, and which groups should it spare?
Verdict: the MSE observer, a bound of 0.001, and groups spared whose share of the damage is five times their share of the work. With 128
pictures no answer of 2,400 development questions changes, and the error of the features is half of that with nothing spared.
Ran: 2026-11-24, at commit 35efffe (record: benchmarks/results/quantization_choice.json).
Command at that commit: python -m benchmarks.quantization_choice

Development questions are of the split `calibration` with a seed of their own, as many of every kind; none calibrates, and none is among
those of quantization.json. Only the encoder is quantised, in PyTorch; the decoder is FP32. `changed` counts answers that are right with one
of the two encoders alone, `lost` those that the quantised one gets wrong, less those that it alone gets right.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import machine
from benchmarks.studies.recipes import OBSERVERS, Recipe, RecipeSearch
from fastvlm_edge.calib.accuracy import Question, score
from fastvlm_edge.calib.encoder.search import DISPROPORTION, VisionSearch, squared_error
from fastvlm_edge.convert.checkpoint.checkpoint import load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.convert.precision import precision_plan
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo" / "fastvlm-demo"
CALIBRATION_SEED, DEVELOPMENT_SEED = 2026, 4051
MEASURED = 8
BATCH = 10
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Variant:
    """One way to calibrate."""

    observer: str
    pictures: int
    bound: float = 1e-3
    disproportion: float = DISPROPORTION

    @property
    def name(self) -> str:
        spared = "" if self.disproportion == DISPROPORTION else f", disproportion {self.disproportion:g}"
        return f"{self.observer}, {self.pictures} pictures, bound {self.bound:g}{spared}"


VARIANTS = tuple(
    [
        variant
        for pictures in (32, 128, 512)
        for observer in ("mse", "max", "percentile")
        for variant in (Variant(observer, pictures, disproportion=float("inf")), Variant(observer, pictures))
    ]
    + [Variant("mse", 128, disproportion=value) for value in (10.0, 3.0, 2.0)]
    + [Variant("mse", 128, bound) for bound in (3e-5, 2e-5, 1e-5, 5e-6, 2e-6)]
)


def main() -> int:
    """Draw, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=300, help="development questions of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "quantization_choice.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers this small only lose time to more
    checkpoint = open_checkpoint(str(DEMO))
    pixels, questions, kinds = asked(development(options.each, checkpoint.image_size))
    document: dict[str, Any] = {
        "what": __doc__.split("\n\n")[-1].replace("\n", " "),
        "questions": len(questions),
        "each_kind": options.each,
        "machine": machine.describe(),
        "results": {},
    }
    searches: dict[tuple[str, int], tuple[VisionSearch, Sequence[Float32]]] = {}
    expected, before = None, None
    for variant in VARIANTS:
        at = (variant.observer, variant.pictures)
        if at not in searches:
            searches.clear()
            searches[at] = calibrated(checkpoint, variant)
        search, seen = searches[at]
        if expected is None:
            for unit in search.units:
                unit.use("wide")
            expected = encode(search, pixels)
            before = score(checkpoint, questions, list(expected), lambda: None)
        result = search.choose(seen, bound=variant.bound, measured=MEASURED, disproportion=variant.disproportion)
        search.apply(result)
        found = encode(search, pixels)
        after = score(checkpoint, questions, list(found), lambda: None)
        row: dict[str, Any] = {
            "int8_share": round(result.share(), 4),
            "not_int8": len({record.group for record in result.records if record.group and record.decision != "w8a8"}),
            "loss_on_measured": float(f"{result.loss:.3g}"),
            "development": judge(questions, kinds, before, after)
            | {"relative_error": float(f"{squared_error(torch.from_numpy(found), torch.from_numpy(expected)) ** 0.5:.3g}")},
        }
        document["results"][variant.name] = row
        print(variant.name, json.dumps(row), flush=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def development(each: int, size: int) -> Iterator[Any]:
    """Scenes of the split `calibration` that nothing else draws, kind after kind."""
    scenes = demo_scenes()
    for index in range(each * len(scenes.KINDS)):
        yield scenes.make_scene("calibration", DEVELOPMENT_SEED, index, size=size, kind=scenes.KINDS[index % len(scenes.KINDS)])


def demo_scenes() -> Any:
    """The module that draws them."""
    return importlib.import_module("examples.demo_training.scenes")


def asked(scenes: Iterable[Any]) -> tuple[npt.NDArray[np.uint8], list[Question], list[str]]:
    """Pictures [count, size, size, 3] with their first question and its answer, and the questions' kinds."""
    with tempfile.TemporaryDirectory() as folder:  # only for the chat template and the tokenizer
        convert(str(DEMO), Path(folder) / "model", precision="fp32")
        template = ChatTemplate(
            tokenizer := TextTokenizer(Path(folder) / "model" / "tokenizer.json"), manifest := read_manifest(Path(folder) / "model")
        )
        pixels, questions, kinds = [], [], []
        for scene in scenes:
            first = scene.questions[0]
            prompt = [*template.opening(), *template.turn(first.prompt, (manifest.vision.tokens,))]
            pixels.append(np.asarray(scene.image))
            questions.append(Question([*prompt, *tokenizer.encode(first.answer), template.closing()[0]], len(prompt), True))
            kinds.append(first.kind)
    return np.stack(pixels), questions, kinds


def calibrated(checkpoint: Any, variant: Variant) -> tuple[VisionSearch, list[Float32]]:
    """The demo's encoder, observed on the variant's pictures."""
    seen = calibration_pictures(variant.pictures, checkpoint.image_size)
    recipe = replace(Recipe(), observer=OBSERVERS[variant.observer])
    search = RecipeSearch(load_vision(checkpoint), load_projector(checkpoint), precision_plan("int8"), recipe)
    search.observe(seen)
    search.measure(seen[:MEASURED])
    return search, seen


def calibration_pictures(count: int, size: int) -> list[Float32]:
    """The first pictures of the split `calibration`."""
    make_scene = demo_scenes().make_scene
    return [preprocess(make_scene("calibration", CALIBRATION_SEED, index, size=size).image, size, "pad") for index in range(count)]


@torch.inference_mode()
def encode(search: VisionSearch, pixels: npt.NDArray[np.uint8]) -> Float32:
    """Image features [pictures, tokens, hidden]."""
    batches = []
    for start in range(0, len(pixels), BATCH):
        batch = torch.from_numpy(pixels[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255
        batches.append(search.run(batch).numpy().copy())
    return np.concatenate(batches)


def judge(questions: Sequence[Question], kinds: Sequence[str], before: Any, after: Any) -> dict[str, Any]:
    """Answers changed and lost, by kind and together."""

    def right(result: Any) -> npt.NDArray[np.bool_]:
        return np.array([bool((chosen == q.ids[q.answer :]).all()) for chosen, q in zip(result.choices, questions, strict=True)])

    was, now, of = right(before), right(after), np.array(kinds)
    by_kind = {
        kind: {
            "right_in_fp32": int(was[of == kind].sum()),
            "changed": int((was != now)[of == kind].sum()),
            "lost": int(was[of == kind].sum() - now[of == kind].sum()),
        }
        for kind in sorted(set(kinds))
    }
    return {
        "changed": int((was != now).sum()),
        "lost": int(was.sum() - now.sum()),
        "ids_agree": round(before.agreement(after), 6),
        "by_kind": by_kind,
    }


if __name__ == "__main__":
    sys.exit(main())
