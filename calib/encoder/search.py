"""W8A8 of the encoder and projector: folded PyTorch modules and calibration pictures -> `VisionQuantization`, which `convert` writes.

The encoder is a chain of units (chain.py), each of which is one group of the plan. The search for the plan has three steps:

    observe     unit by unit over all pictures: ranges of each input channel; then, equalised, histogram and samples -> clip, integers, bias
    measure     group by group: the damage to the image features when only this group is quantised
    choose      the cheapest plan whose damages add up to at most the bound; the whole plan is measured, and the bound tightened if needed
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastvlm_edge.calib.encoder.cache import Activations, ObservationCache, run_watched
from fastvlm_edge.calib.encoder.chain import Decision, Float32, Layer, Ranges, Unit, build_chain
from fastvlm_edge.calib.encoder.histogram import Histogram
from fastvlm_edge.calib.encoder.quantize_layer import equalize_layer, quantize_layer
from fastvlm_edge.convert.fastvithd import FastViTHD
from fastvlm_edge.convert.precision import FLOAT_TYPES, PrecisionPlan, vision_stage
from fastvlm_edge.convert.weights.vision import VisionIntegers
from fastvlm_edge.progress import Progress, SilentProgress

SAMPLES = 8192
"""Positions, of all pictures together, whose second moments a layer's inputs get."""
ORDER: tuple[Decision, ...] = ("w8a8", "weights", "wide")
"""From the cheapest to the most expensive."""
SMALL = 0.25
"""Share of the weights in a group's squared error below which their damage is estimated, not measured."""
DISPROPORTION = 5.0
"""A group whose share of the damage is this many times its share of the work gets no INT8 activations, whatever the bound."""
ROUNDS = 5
"""Attempts to meet the bound; the last one leaves all groups in floats."""
TECHNIQUES = "least squared error, equalised, shifted behind GELU, weights clipped, GPTQ, bias corrected, outlier channels moved"
"""Part of the cache's key: change it whenever other integers come out of the same observation."""


@dataclass(frozen=True)
class LayerRecord:
    """One layer of the encoder and what was decided, for the report."""

    name: str
    kind: str
    group: str
    macs: int
    """Multiply-accumulates per picture."""
    weight_bytes: int
    decision: Decision
    reason: str
    largest: float = 0.0
    """Largest magnitude of the input, after equalisation."""
    clip: float = 0.0
    """The input's clip value, after equalisation."""
    strength: float = 0.0
    """alpha of the equalisation."""
    cosine_loss: float = 0.0
    """1 - cosine of the image features when only this layer's group is W8A8: mean over the measured pictures."""
    squared_error: float = 0.0
    """Squared error of these image features over their squares: mean over the measured pictures."""


@dataclass(frozen=True)
class VisionQuantization(VisionIntegers):
    """A plan: its integers, which `convert` writes, and what is known about it."""

    records: list[LayerRecord]
    bound: float
    """Largest accepted 1 - cosine of the image features."""
    loss: float
    """1 - cosine of the image features with the whole plan, of the worst measured picture."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Step -> wall time."""

    def share(self, decision: Decision = "w8a8") -> float:
        """Share of all multiply-accumulates whose layers have this decision."""
        return sum(record.macs for record in self.records if record.decision == decision) / sum(record.macs for record in self.records)


class VisionSearch:
    """Searches the plan of one encoder: `observe`, `measure`, then `choose`, once or for several bounds."""

    def __init__(
        self,
        encoder: FastViTHD,
        projector: nn.Sequential,
        plan: PrecisionPlan,
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`encoder` in inference form. `plan` has the float type of every stage. Nothing is computed yet.

        Activations go to a temporary folder in `folder`: about 0.1 KB per pixel and picture.
        """
        self.units = build_chain(encoder, projector)
        self.plan, self.folder = plan, folder
        self.progress = progress or SilentProgress()
        self.seconds: dict[str, float] = {}
        self._cache: ObservationCache | None = None
        self._encoder = encoder

    def run(self, pixels: Tensor) -> Tensor:
        """Image features of pixel_values [batch, 3, H, W], with every layer in its present state."""
        for unit in self.units:
            pixels = unit.forward(pixels)
        return pixels

    def key(self) -> str:
        """What the options depend on besides weights and pictures: part of the cache's key."""
        return f"{TECHNIQUES} {sorted(self.plan.vision.items())}"

    def apply(self, result: VisionQuantization) -> None:
        """Put the layers into the state in which `run` computes what `result` will."""
        for layer in (layer for unit in self.units for layer in unit.layers):
            layer.use(result.layers.get(layer.name))

    @torch.no_grad()
    def observe(self, pictures: Sequence[Float32], *, cache: ObservationCache | None = None) -> None:
        """Observe each unit's inputs on all pictures, equalise, and make both options of every layer; or read all this from `cache`."""
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
                self._quantize(unit)
                self.progress.advance()

    def _equalize(self, unit: Unit) -> None:
        """Equalise the layers of a unit; `layer.ranges` stay as observed."""
        measured = [layer.ranges for layer in unit.layers]
        for layer in reversed(unit.layers):  # the projection changes the weights of the values before it
            equalize_layer(layer)
        for layer, ranges in zip(unit.layers, measured, strict=True):
            layer.keep_full()
            layer.ranges = ranges

    def _quantize(self, unit: Unit) -> None:
        for layer in unit.layers:
            quantize_layer(layer, FLOAT_TYPES[self.plan.vision[unit.stage]])

    def _look(self, index: int, count: int) -> Callable[[Layer, Tensor], None]:
        generator = torch.Generator().manual_seed(index)

        def look(layer: Layer, rows: Tensor) -> None:
            assert layer.histogram is not None
            layer.positions = rows.shape[0]  # of the last picture, which has the default size
            moved = rows if layer.factor is None or layer.offset is None else rows * layer.factor + layer.offset
            layer.histogram.add(moved.numpy())
            share = max(SAMPLES // count, 1)
            chosen = rows if len(rows) <= share else rows[torch.randperm(len(rows), generator=generator)[:share]]
            layer.samples.append(chosen.clone())

        return look

    @torch.no_grad()
    def measure(self, pictures: Sequence[Float32]) -> None:
        """Measure the damage to the image features when each group alone is quantised.

        W8A8 runs to the end of the encoder. So does INT8 of the weights alone, if the weights make at least the share SMALL of the error at
        the unit's output. Otherwise its damage is estimated from this share; with heavy tails such an estimate is several times too low.
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
        measured: int = 2,
        disproportion: float = DISPROPORTION,
    ) -> VisionQuantization:
        """The cheapest plan with a 1 - cosine of at most `bound` on each of the first `measured` pictures; tightened until it holds.

        Groups above `disproportion` never get INT8 activations. The last of ROUNDS attempts leaves all groups in floats.
        """
        began = time.perf_counter()
        for unit in self.units:
            unit.use("wide")
        expected = [self.run(torch.from_numpy(picture)) for picture in pictures[:measured]]
        self._exempt(disproportion)
        aim = bound
        loss = 0.0
        for attempt in range(ROUNDS):
            self._decide(aim if attempt < ROUNDS - 1 else 0.0)
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
        """Take INT8 activations from the group with the most damage per work, as long as that is out of proportion to the other groups.

        It keeps its INT8 weights if they do little of the damage.
        """
        for unit in self.units:
            unit.cheapest = unit.best
        units = [unit for unit in self.units if unit.layers and unit.best == "w8a8"]
        while units:
            damage, work = sum(unit.loss["w8a8"] for unit in units), sum(unit.macs for unit in units)
            worst = max(units, key=lambda unit: unit.loss["w8a8"] / unit.macs)
            if not worst.loss["w8a8"] * work > disproportion * worst.macs * damage:
                break
            worst.cheapest = "weights" if disproportion * worst.loss["weights"] <= worst.loss["w8a8"] else "wide"
            units.remove(worst)

    def _decide(self, aim: float) -> None:
        """Widen the group that removes the most damage for its price, until the sum of damages is at most `aim`.

        Then take back widenings that were not needed, the most expensive first.
        """
        units = [unit for unit in self.units if unit.layers]
        whole = [sum(unit.cost("wide", self.plan)[part] for unit in units) for part in (0, 1)]

        def price(unit: Unit, decision: Decision) -> float:
            spent, stored = (value / total for value, total in zip(unit.cost(decision, self.plan), whole, strict=True))
            return spent + 0.01 * stored

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
        return VisionQuantization(layers, floats, records, bound, loss, dict(self.seconds))

    def _record(self, unit: Unit, layer: Layer) -> LayerRecord:
        assert layer.histogram is not None
        kind = self.plan.vision[unit.stage]
        width = 1 if unit.decision != "wide" else np.dtype(FLOAT_TYPES[kind]).itemsize
        return LayerRecord(
            layer.name,
            "pointwise" if layer.is_conv else "linear",
            unit.name,
            layer.macs,
            layer.matrix.numel() * width,
            unit.decision,
            _reason(unit),
            layer.histogram.largest,
            layer.clip,
            layer.strength,
            unit.loss.get("w8a8", 0.0),
            unit.squared.get("w8a8", 0.0),
        )

    def _fixed(self) -> list[LayerRecord]:
        """Records of the convolutions that are not candidates."""
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
            count = 1 if kind == "squeeze-excite" else at[stage] * (4 if kind == "first" else 1)  # the stem halves height and width twice
            reason = {
                "squeeze-excite": "one position per picture: nothing to gain",
                "grouped": "TensorRT pads the groups of INT8 convolutions",
                "first": "three channels: nothing to gain",
            }[kind]
            width = np.dtype(FLOAT_TYPES[self.plan.vision[stage]]).itemsize
            records.append(LayerRecord(name, kind, "", module.weight.numel() * count, module.weight.numel() * width, "wide", reason))
        return records


def _reason(unit: Unit) -> str:
    """Why a group has its decision, for the report."""
    if unit.decision == "w8a8":
        return "within the bound"
    if unit.decision == "weights":
        if unit.best != "w8a8":
            return "no later layer averages out the noise of the last layers, and they are little work"
        if unit.cheapest != "w8a8":
            return "INT8 inputs would cost more accuracy than so little work is worth"
        return "INT8 inputs would cost more accuracy than the bound allows"
    if unit.cheapest == "wide":
        return "INT8 would cost more accuracy than so little work is worth, even for the weights alone"
    return "INT8 would cost more accuracy than the bound allows"


def cosine_loss(found: Tensor, expected: Tensor) -> float:
    """1 - cosine of two tensors, in double precision."""
    a, b = found.double().flatten(), expected.double().flatten()
    return 1.0 - float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))


def squared_error(found: Tensor, expected: Tensor) -> float:
    """Squared norm of the difference over that of `expected`."""
    a, b = found.double().flatten(), expected.double().flatten()
    return float((a - b).square().sum() / b.square().sum().clamp_min(1e-300))
