"""FastVLM in transformers (`fast_vlm`, whose encoder is timm's `fastvit_mci3`): the independent implementation to compare with.

timm imports torchvision at its top without needing it for this model. Where torchvision is not installed, or its operators do not
fit this build of PyTorch, empty modules stand in for it while timm is imported; they are taken away again afterwards, so that
nobody mistakes them for the real thing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class _AnyClass(type):
    """A class that has every attribute, each an object of its own (timm builds tables of interpolation modes)."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = object()
        setattr(cls, name, value)
        return value


class _StandIn(ModuleType):
    """A module that has every attribute, each an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _AnyClass(name, (), {})
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for `torchvision` and everything below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def import_timm() -> ModuleType:
    """timm, with torchvision when that works and without it otherwise."""
    if "timm" in sys.modules:
        return sys.modules["timm"]
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: compiled for another PyTorch
        return _import_without_torchvision()
    return importlib.import_module("timm")


def _import_without_torchvision() -> ModuleType:
    import transformers.utils.import_utils as availability

    _forget_torchvision()
    looked = availability.is_torchvision_available
    looked()  # transformers asks once and remembers: there is no torchvision for it to use
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        timm = importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        _forget_torchvision()
    # transformers offers its timm wrapper only where torchvision is; it remembers this answer too
    availability.is_timm_available.cache_clear()
    availability.is_torchvision_available = lambda: True
    try:
        availability.is_timm_available()
    finally:
        availability.is_torchvision_available = looked
    return timm


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def load_reference(directory: Path) -> Any:
    """`FastVlmForConditionalGeneration` of a native checkpoint in float32, eval mode.

    Raises AssertionError when a tensor is missing, unexpected or of another shape.
    """
    import_timm()
    import torch
    from transformers import FastVlmForConditionalGeneration

    loaded: Any = FastVlmForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    problems = {key: value for key, value in report.items() if value}
    assert not problems, problems
    return model.eval()
