"""Observing the encoder: the rows that enter each layer, and the files that hold what was observed.

Activations go from unit to unit through temporary files, one per picture. The results stay in a cache for the next conversion.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastvlm_edge.calib.encoder.chain import Decision, Layer, Ranges, Unit
from fastvlm_edge.calib.encoder.histogram import Histogram
from fastvlm_edge.convert.weights.vision import QuantizedLayer
from fastvlm_edge.model_dir.atomic import whole_file

OPTIONS: tuple[Decision, ...] = ("weights", "w8a8")
PARTS = tuple(field.name for field in fields(QuantizedLayer))


def run_watched(unit: Unit, x: Tensor, look: Callable[[Layer, Tensor], None]) -> Tensor:
    """Run a unit; `look` gets the rows that enter each of its layers, [positions, channels]."""

    def hook(layer: Layer) -> Callable[[nn.Module, tuple[Tensor], Any], None]:
        return lambda _module, inputs, _output: look(layer, _rows(layer, inputs[0]))

    handles = [layer.module.register_forward_hook(hook(layer)) for layer in unit.layers]
    try:
        return unit.forward(x)
    finally:
        for handle in handles:
            handle.remove()


def _rows(layer: Layer, x: Tensor) -> Tensor:
    """A layer's input as [positions, channels]."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1) if layer.is_conv else x.flatten(0, -2)


class Activations:
    """The output of a unit for every picture, in files of a folder, so that memory holds one picture only."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def __setitem__(self, index: int, value: Tensor) -> None:
        np.save(self._folder / f"{self._name}-{index}.npy", value.numpy())

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.load(self._folder / f"{self._name}-{index}.npy"))


class ObservationCache:
    """Results of observation and measurement in one file: ranges and histograms, the integers of every option, damages of the groups.

    `key` names the weights, the pictures and the techniques. A second run reads the file and only searches the plan.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, hashlib.sha256(key.encode()).hexdigest()
        self._arrays: dict[str, Any] = {}
        if path.is_file():
            try:
                with np.load(path) as stored:
                    if str(stored["key"]) == self.key:
                        self._arrays = {name: stored[name] for name in stored.files}
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                self._arrays = {}  # damaged, or written by another version: observe again

    def knows(self, units: Iterable[Unit]) -> bool:
        """Whether the file has every layer of the chain."""
        return bool(self._arrays) and all(f"{layer.name}/counts" in self._arrays for unit in units for layer in unit.layers)

    def read_ranges(self, layer: Layer) -> None:
        """Set the ranges and the histogram of a layer, as observed before it was equalised."""
        part = {name: self._arrays[f"{layer.name}/{name}"] for name in ("counts", "range", "channels", "seen")}
        layer.histogram = Histogram.from_state(part)
        least, largest, total, square = (torch.from_numpy(row) for row in part["channels"])
        layer.ranges = Ranges(least.float(), largest.float(), total, square, int(part["seen"]))
        layer.positions = int(self._arrays[f"{layer.name}/positions"])

    def read_options(self, layer: Layer) -> None:
        """Set the options of a layer, after it was equalised."""
        layer.clip = float(self._arrays[f"{layer.name}/clip"])
        if layer.offset is not None:
            layer.offset = layer.offset - layer.clip
        for decision in OPTIONS:
            part = {name: self._arrays.get(f"{layer.name}/{decision}/{name}") for name in PARTS}
            if part["values"] is None:
                part["values"] = self._arrays[f"{layer.name}/{OPTIONS[0]}/values"]
            scale = part.pop("activation_scale")
            layer.options[decision] = QuantizedLayer(**part, activation_scale=None if scale is None else float(scale))  # type: ignore[arg-type]

    def read_damage(self, units: Iterable[Unit], pictures: int) -> bool:
        """Set the damages of all groups; False if they were measured on another number of pictures."""
        if int(self._arrays.get("measured", 0)) != pictures:
            return False
        for unit in (unit for unit in units if unit.layers):
            found = self._arrays[f"{unit.name}/damage"]
            for decision, (loss, squared) in zip(OPTIONS, found.tolist(), strict=True):
                unit.loss[decision], unit.squared[decision] = loss, squared
        return True

    def write_options(self, units: Iterable[Unit]) -> None:
        """Save ranges, histograms and options, in place of the file's former content."""
        self._arrays = {"key": np.array(self.key)}
        for layer in (layer for unit in units for layer in unit.layers):
            assert layer.histogram is not None and layer.ranges is not None
            ranges = layer.ranges
            channels = torch.stack([ranges.least.double(), ranges.largest.double(), ranges.total, ranges.square]).numpy()
            state = {**layer.histogram.state(), "channels": channels, "seen": np.array(ranges.count)}
            state |= {"positions": np.array(layer.positions), "clip": np.array(layer.clip)}
            for decision in OPTIONS:
                option = layer.options[decision]
                shared = decision != OPTIONS[0] and option.values is layer.options[OPTIONS[0]].values
                values = {name: getattr(option, name) for name in PARTS if not (shared and name == "values")}
                state |= {f"{decision}/{name}": np.asarray(value) for name, value in values.items() if value is not None}
            self._arrays.update({f"{layer.name}/{name}": value for name, value in state.items()})
        self._save()

    def write_damage(self, units: Iterable[Unit], pictures: int) -> None:
        """Add the damages of all groups to the file."""
        self._arrays["measured"] = np.array(pictures)
        for unit in (unit for unit in units if unit.layers):
            self._arrays[f"{unit.name}/damage"] = np.array([(unit.loss[decision], unit.squared[decision]) for decision in OPTIONS])
        self._save()

    def _save(self) -> None:
        _keep(self.path, lambda file: np.savez(file, **self._arrays))


class FeatureCache:
    """Image features of calibration pictures, one file per picture, so that an interrupted run resumes."""

    def __init__(self, folder: Path) -> None:
        """`folder` belongs to one set of weights."""
        self.folder = folder

    def read(self, picture: str) -> npt.NDArray[np.float32] | None:
        """Features [tokens, hidden] of a picture by its digest; None if there are none, or their file is damaged."""
        try:
            features: npt.NDArray[np.float32] = np.load(self.folder / f"{picture}.npy")
        except (OSError, ValueError, EOFError):
            return None
        return features

    def write(self, picture: str, features: npt.NDArray[np.float32]) -> None:
        """Store the features [tokens, hidden] of a picture."""
        _keep(self.folder / f"{picture}.npy", lambda file: np.save(file, features))


def _keep(path: Path, save: Callable[[BinaryIO], None]) -> None:
    """Write a file of the cache, whole or not at all. A failure is ignored: only the next run takes longer."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, partial.open("wb") as file:
            save(file)
