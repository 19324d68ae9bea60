"""W8A8 of the encoder and projector: folded PyTorch modules and calibration pictures -> `VisionQuantization`, which `convert` writes.

The encoder is a chain of units (chain.py); quantize_layer.py has the techniques, and here is the search for the plan, in three steps:

    observe     unit by unit over all pictures: ranges of each input channel, then equalised: histogram and samples -> clip, integers, bias
    measure     one group at a time: what it alone does to the image features
    choose      the cheapest plan whose damages add up to less than the bound; one look at the whole, and a tighter bound if need be
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastvlm_edge.calib.encoder.cache import Activations, ObservationCache, run_watched
from fastvlm_edge.calib.encoder.chain import Decision, Float32, Layer, Ranges, Unit, build_chain
from fastvlm_edge.calib.encoder.histogram import Histogram
from fastvlm_edge.calib.encoder.quantize_layer import Recipe, equalize_layer, quantize_layer
from fastvlm_edge.convert.precision import FLOAT_TYPES, PrecisionPlan, vision_stage
from fastvlm_edge.convert.reference.fastvithd import FastViTHD
from fastvlm_edge.convert.weights.vision import QuantizedLayer
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.progress import Progress, SilentProgress

SAMPLES = 8192
"""Positions of all pictures together from which the second moments of a layer's inputs are taken."""
ORDER: tuple[Decision, ...] = ("w8a8", "weights", "wide")
"""From cheap to dear."""
SMALL = 0.25
"""Share of the weights in a group's squared error below which their damage is estimated, not measured."""
DISPROPORTION = 5.0
"""A group whose share of the damage is so many times its share of the work is not worth its INT8, whatever the bound allows."""


@dataclass(frozen=True)
class LayerRecord:
    """One line of the report."""

    name: str
    kind: str
    group: str
    macs: int
    """Of one picture."""
    weight_bytes: int
    decision: Decision
    reason: str
    largest: float = 0.0
    """Of the input, after equalisation."""
    clip: float = 0.0
    strength: float = 0.0
    """alpha of the equalisation"""
    affine: bool = False
    cosine_loss: float = 0.0
    """1 - cosine of the image features when only this layer's group is W8A8, mean over the pictures that were measured."""
    squared_error: float = 0.0
    """The relative squared error, likewise."""


@dataclass(frozen=True)
class VisionQuantization:
    """The result: layers by the names of convert/weights/vision.py, and float tensors that equalisation changed."""

    layers: dict[str, QuantizedLayer]
    floats: dict[str, Float32]
    records: list[LayerRecord]
    bound: float
    predicted_loss: float
    """Sum of the groups' 1 - cosine."""
    loss: float
    """1 - cosine of the image features of the whole plan, of the worst picture that was measured."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def activation_scales(self) -> dict[str, float]:
        """Layer -> scale of its input, for `build_vision`."""
        return {name: layer.activation_scale for name, layer in self.layers.items() if layer.activation_scale is not None}

    def share(self, decision: Decision = "w8a8") -> float:
        """The share of all multiply-accumulates that got a decision."""
        return sum(record.macs for record in self.records if record.decision == decision) / sum(record.macs for record in self.records)


@torch.no_grad()
def quantize_vision(
    encoder: FastViTHD,
    projector: nn.Sequential,
    pictures: Sequence[Float32],
    plan: PrecisionPlan,
    *,
    bound: float = 0.001,
    objective: Literal["time", "bytes"] = "time",
    recipe: Recipe = Recipe(),
    measured: int = 2,
    cache: Path | None = None,
    cache_key: str = "",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> VisionQuantization:
    """Quantise `encoder` (inference form) and `projector` so that 1 - cosine of the image features stays within `bound`.

    `pictures` are pixel_values [1, 3, size, size], read one at a time; the first `measured` of them measure damage. `plan` has the float
    type of every stage. `cache` keeps what was observed under `cache_key`, which must name weights, pictures and image size. Activations
    go to a temporary folder in `folder`: about 0.1 KB a pixel and picture. Raises FastVLMError without pictures.
    """
    if not len(pictures):
        raise FastVLMError("calibration needs pictures and there are none; give some with --calib")
    search = VisionSearch(encoder, projector, plan, recipe, folder=folder, progress=progress)
    search.observe(pictures, cache=None if cache is None else ObservationCache(cache, f"{cache_key} {search.key()}"))
    search.measure(pictures[: max(measured, 1)])
    return search.choose(pictures, bound=bound, objective=objective, measured=max(measured, 1))


class VisionSearch:
    """The steps of `quantize_vision` one by one, for several bounds from one observation."""

    def __init__(
        self,
        encoder: FastViTHD,
        projector: nn.Sequential,
        plan: PrecisionPlan,
        recipe: Recipe = Recipe(),
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`plan` has the float type of every stage; nothing is computed yet."""
        self.units = build_chain(encoder, projector)
        self.plan, self.recipe, self.folder = plan, recipe, folder
        self.progress = progress or SilentProgress()
        self.seconds: dict[str, float] = {}
        self._cache: ObservationCache | None = None
        self._encoder = encoder

    def run(self, pixels: Tensor) -> Tensor:
        """Image features with the layers in the state they are in."""
        for unit in self.units:
            pixels = unit.forward(pixels)
        return pixels

    def key(self) -> str:
        """What decides, beside weights and pictures, over the options: it belongs into the key of a cache."""
        return f"{self.recipe} {sorted(self.plan.vision.items())}"

    def apply(self, result: VisionQuantization) -> None:
        """Let `run` compute as `result` will."""
        for layer in (layer for unit in self.units for layer in unit.layers):
            layer.use(result.layers.get(layer.name))

    @torch.no_grad()
    def observe(self, pictures: Sequence[Float32], *, cache: ObservationCache | None = None) -> None:
        """See each unit's inputs on all pictures, equalise, prepare both options of every layer; `cache` has them from the last time."""
        began = time.perf_counter()
        self.progress.stage("observe vision", len(self.units))
        self._cache = cache
        if cache is not None and cache.knows(self.units):
            self._recall(cache)
        else:
            self._observe(pictures)
            if cache is not None:
                cache.write_options(self.units)
        self.seconds["observe"] = time.perf_counter() - began

    def _recall(self, cache: ObservationCache) -> None:
        for unit in self.units:
            for layer in unit.layers:
                cache.read_ranges(layer)
            self._equalize(unit)
            for layer in unit.layers:
                cache.read_options(layer)
            self.progress.advance()

    def _observe(self, pictures: Sequence[Float32]) -> None:
        count = len(pictures)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="calibration-") as folder:
            between = Activations(Path(folder), "float")
            for index, picture in enumerate(pictures):
                between[index] = torch.from_numpy(picture)
            for unit in self.units:
                for layer in unit.layers:
                    layer.ranges, layer.histogram = Ranges.empty(layer.matrix.shape[1]), Histogram()
                for index in range(count if unit.layers else 0):
                    run_watched(unit, between[index], lambda layer, rows: layer.ranges.add(rows))  # type: ignore[union-attr]
                self._equalize(unit)
                for index in range(count):
                    between[index] = run_watched(unit, between[index], self._look(index, count))
                for layer in unit.layers:
                    quantize_layer(layer, self.recipe, FLOAT_TYPES[self.plan.vision[unit.stage]])
                self.progress.advance()

    def _equalize(self, unit: Unit) -> None:
        """Leaves the ranges as they were observed."""
        measured = [layer.ranges for layer in unit.layers]
        for layer in reversed(unit.layers):  # the projection changes the weights of the values before it
            equalize_layer(layer, self.recipe)
        for layer, ranges in zip(unit.layers, measured, strict=True):
            layer.keep_full()
            layer.ranges = ranges

    def _look(self, index: int, count: int) -> Callable[[Layer, Tensor], None]:
        generator = torch.Generator().manual_seed(index)

        def look(layer: Layer, rows: Tensor) -> None:
            assert layer.histogram is not None
            layer.positions = rows.shape[0]
            moved = rows if layer.factor is None or layer.offset is None else rows * layer.factor + layer.offset
            layer.histogram.add(moved.numpy())
            share = max(SAMPLES // count, 1)
            chosen = rows if len(rows) <= share else rows[torch.randperm(len(rows), generator=generator)[:share]]
            layer.samples.append(chosen.clone())

        return look

    @torch.no_grad()
    def measure(self, pictures: Sequence[Float32]) -> None:
        """What each group does to the image features when it alone is quantised.

        W8A8 runs to the end of the encoder, and so do the weights alone where much of its error is theirs. Where less than SMALL is, their
        damage is estimated from the errors of the two behind the unit; with heavy tails such an estimate is several times too low.
        """
        began = time.perf_counter()
        self.progress.stage("measure vision", len(self.units) * len(pictures))
        if self._cache is not None and self._cache.read_damage(self.units, len(pictures)):
            return
        for unit in self.units:
            unit.use("wide")
            unit.loss, unit.squared = {"wide": 0.0}, {"wide": 0.0}
        for picture in pictures:
            x = torch.from_numpy(picture)
            expected = self.run(x)
            for index, unit in enumerate(self.units):
                y = unit.forward(x)
                if unit.layers:
                    ends: dict[Decision, Tensor] = {}
                    errors: dict[Decision, float] = {}
                    for decision in ORDER[:2]:
                        unit.use(decision)
                        ends[decision] = unit.forward(x)
                        errors[decision] = float((ends[decision] - y).square().sum())
                    unit.use("wide")
                    share = errors["weights"] / max(errors["w8a8"], 1e-30)
                    for decision in ORDER[: 1 if share < SMALL else 2]:
                        for later in self.units[index + 1 :]:
                            ends[decision] = later.forward(ends[decision])
                    for part, measure in ((unit.loss, cosine_loss), (unit.squared, squared_error)):
                        found: dict[Decision, float] = {"w8a8": measure(ends["w8a8"], expected)}
                        found["weights"] = found["w8a8"] * share if share < SMALL else measure(ends["weights"], expected)
                        for decision, value in found.items():
                            part[decision] = part.get(decision, 0.0) + value / len(pictures)
                x = y
                self.progress.advance()
        if self._cache is not None:
            self._cache.write_damage(self.units, len(pictures))
        self.seconds["measure"] = time.perf_counter() - began

    @torch.no_grad()
    def choose(
        self,
        pictures: Sequence[Float32],
        *,
        bound: float,
        objective: Literal["time", "bytes"] = "time",
        measured: int = 2,
        rounds: int = 5,
        disproportion: float = DISPROPORTION,
    ) -> VisionQuantization:
        """The cheapest plan that keeps 1 - cosine of the first `measured` pictures within `bound`, checked and tightened until it does.

        Groups of more than `disproportion` never get INT8 activations. The last round, should no other do, leaves all wide.
        """
        began = time.perf_counter()
        for unit in self.units:
            unit.use("wide")
        expected = [self.run(torch.from_numpy(picture)) for picture in pictures[:measured]]
        self._exempt(disproportion)
        aim = bound
        loss = 0.0
        for attempt in range(rounds):
            self._decide(aim if attempt < rounds - 1 else 0.0, objective)
            for unit in self.units:
                unit.use(unit.decision)
            found = [self.run(torch.from_numpy(picture)) for picture in pictures[:measured]]
            loss = max(cosine_loss(a, b) for a, b in zip(found, expected, strict=True))
            if loss <= bound:
                break
            predicted = sum(unit.loss[unit.decision] for unit in self.units)
            aim = min(aim, predicted) * min(0.9, bound / loss)
        self.seconds["choose"] = time.perf_counter() - began
        return self._result(bound, loss)

    def _exempt(self, disproportion: float) -> None:
        """Take INT8 activations from the group that does most harm for its work, while that is out of proportion to what is left.

        It keeps its INT8 weights where they do little of the harm.
        """
        for unit in self.units:
            unit.cheapest = unit.best
        units = [unit for unit in self.units if unit.layers and unit.best == "w8a8"]
        while units:
            harm, work = sum(unit.loss["w8a8"] for unit in units), sum(unit.macs for unit in units)
            worst = max(units, key=lambda unit: unit.loss["w8a8"] / unit.macs)
            if not worst.loss["w8a8"] * work > disproportion * worst.macs * harm:
                break
            worst.cheapest = "weights" if disproportion * worst.loss["weights"] <= worst.loss["w8a8"] else "wide"
            units.remove(worst)

    def _decide(self, aim: float, objective: Literal["time", "bytes"]) -> None:
        """Widen, of all groups, the one that takes away most damage for what it costs, until the sum is within `aim`; then take back
        what was not needed, the dearest first."""
        units = [unit for unit in self.units if unit.layers]
        whole = [sum(unit.cost("wide", self.plan)[part] for unit in units) for part in (0, 1)]

        def price(unit: Unit, decision: Decision) -> float:
            spent, stored = (value / total for value, total in zip(unit.cost(decision, self.plan), whole, strict=True))
            return spent + 0.01 * stored if objective == "time" else stored + 0.01 * spent

        for unit in units:
            unit.decision = unit.cheapest
        total = sum(unit.loss[unit.decision] for unit in units)
        while total > aim:
            steps = []
            for unit in units:
                for decision in ORDER[ORDER.index(unit.decision) + 1 :]:
                    gain = unit.loss[unit.decision] - unit.loss[decision]
                    more = max(price(unit, decision) - price(unit, unit.decision), 1e-12)
                    steps.append((gain / more, unit, decision, gain))
            if not steps:
                break
            _, unit, decision, gain = max(steps, key=lambda step: step[0])
            unit.decision = decision
            total -= gain
        for unit in sorted(units, key=lambda unit: price(unit, unit.cheapest) - price(unit, unit.decision)):
            for decision in ORDER[ORDER.index(unit.cheapest) :]:
                more = unit.loss[decision] - unit.loss[unit.decision]
                if price(unit, decision) < price(unit, unit.decision) and total + more <= aim:
                    unit.decision, total = decision, total + more

    def _result(self, bound: float, loss: float) -> VisionQuantization:
        layers, floats = {}, {}
        for unit in self.units:
            if unit.decision == "wide":
                continue
            layers.update({layer.name: layer.options[unit.decision] for layer in unit.layers})
            for name, module in unit.floats.items():
                for part in ("weight", "bias"):
                    floats[f"{name}.{part}"] = getattr(module, part).numpy()
        records = [self._record(unit, layer) for unit in self.units for layer in unit.layers] + self._fixed()
        predicted = sum(unit.loss[unit.decision] for unit in self.units)
        return VisionQuantization(layers, floats, records, bound, predicted, loss, dict(self.seconds))

    def _record(self, unit: Unit, layer: Layer) -> LayerRecord:
        assert layer.histogram is not None
        kind = self.plan.vision[unit.stage]
        reasons: Mapping[Decision, str] = {
            "w8a8": "within the bound",
            "weights": "nothing averages the noise of the last layers, and they are little work"
            if unit.best != "w8a8"
            else "its inputs in INT8 cost more accuracy than so little work is worth"
            if unit.cheapest != "w8a8"
            else "its inputs in INT8 cost more accuracy than the bound allows",
            "wide": "costs more accuracy than the bound allows"
            if unit.cheapest != "wide"
            else "costs more accuracy than so little work is worth, and so do its weights in INT8",
        }
        width = 1 if unit.decision != "wide" else np.dtype(FLOAT_TYPES[kind]).itemsize
        return LayerRecord(
            layer.name,
            "pointwise" if layer.is_conv else "linear",
            unit.name,
            layer.macs,
            layer.matrix.numel() * width,
            unit.decision,
            reasons[unit.decision],
            layer.histogram.largest,
            layer.clip,
            layer.strength,
            layer.factor is not None and unit.decision == "w8a8",
            unit.loss.get("w8a8", 0.0),
            unit.squared.get("w8a8", 0.0),
        )

    def _fixed(self) -> list[LayerRecord]:
        """The convolutions that are no candidates."""
        positions = {layer.name: layer.positions for unit in self.units for layer in unit.layers}
        at = {f"stage{i + 1}": positions[f"vision.stages.{i}.blocks.0.mlp.fc1"] for i in range(5)}
        at = {"stem": positions["vision.stem.2"], **at, "final_conv": at["stage5"]}
        records = []
        for path, module in self._encoder.named_modules():
            if not isinstance(module, nn.Conv2d) or (module.groups == 1 and module.kernel_size == (1, 1) and ".se." not in path):
                continue
            name = "vision." + path.removesuffix(".reparam_conv").removesuffix(".conv.conv")
            name += ".conv" if path.endswith(".conv.conv") else ""
            stage = vision_stage(name)
            kind = "squeeze-excite" if ".se." in path else "grouped" if module.groups > 1 else "first"
            count = 1 if kind == "squeeze-excite" else at[stage] * (4 if kind == "first" else 1)  # the stem halves the map twice
            reason = {
                "squeeze-excite": "one position a picture: nothing to gain",
                "grouped": "TensorRT pads the groups of INT8 convolutions",
                "first": "three channels: nothing to gain",
            }[kind]
            width = np.dtype(FLOAT_TYPES[self.plan.vision[stage]]).itemsize
            records.append(LayerRecord(name, kind, "", module.weight.numel() * count, module.weight.numel() * width, "wide", reason))
        return records


def cosine_loss(found: Tensor, expected: Tensor) -> float:
    """1 - cosine of two tensors, in double precision."""
    a, b = found.double().flatten(), expected.double().flatten()
    return 1.0 - float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))


def squared_error(found: Tensor, expected: Tensor) -> float:
    """Squared norm of the difference over that of `expected`."""
    a, b = found.double().flatten(), expected.double().flatten()
    return float((a - b).square().sum() / b.square().sum().clamp_min(1e-300))
