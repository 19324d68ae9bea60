"""Planted faults: the exact ones leave FP32 as it was, all of them make activations that were not there, and widening changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from examples.checkpoints.planted_faults import FAULTS, SCALES, plant, read_tensors, widen
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.fastvithd import image_tokens
from fastvlm_edge.convert.reference.decoder import Watch, reference_logits
from tests.support.checkpoints import write_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "fastvlm-demo"
LAST = 24
"""Positions whose logits are compared."""
Float32 = npt.NDArray[np.float32]


@dataclass
class Largest(Watch):
    """The largest magnitude of every input channel of every product, and of queries and keys."""

    seen: dict[str, Tensor] = field(default_factory=dict)

    def see(self, name: str, magnitudes: Tensor) -> None:
        """magnitudes: [channels]"""
        self.seen[name] = torch.maximum(magnitudes, self.seen.get(name, torch.zeros_like(magnitudes)))

    def product(self, name: str, x: Tensor, weight: Tensor, out: Tensor) -> None:
        self.see(name, x.abs().amax(0))

    def heads(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        for kind, values in (("queries", queries), ("keys", keys)):
            self.see(f"llm.layers.{layer}.{kind}", values.abs().amax(1).flatten())

    @contextmanager
    def encoder(self, module: nn.Module) -> Iterator[None]:
        """Watch the encoder as well."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def see(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                x = arguments[0].abs()
                self.see(f"vision.{name}", x.amax((0, 2, 3)) if x.ndim == 4 else x.flatten(0, -2).amax(0))

            return see

        products = [(name, part) for name, part in module.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
        handles = [part.register_forward_pre_hook(hook(name)) for name, part in products]
        yield
        for handle in handles:
            handle.remove()


def compute(checkpoint: Checkpoint, ids: list[int]) -> tuple[Float32, dict[str, Tensor]]:
    """Logits [LAST, vocab] of the whole model about a picture in FP32, and the largest magnitudes."""
    watch, encoder = Largest(), load_vision(checkpoint)
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), watch.encoder(encoder):
        features = load_projector(checkpoint)(image_tokens(encoder(pixels)))[0].numpy()
    picture = [checkpoint.text.vocab + row for row in range(len(features))]
    whole = [*ids[:8], *picture, *ids[8:]]
    logits, _ = reference_logits(checkpoint, whole, features, range(len(whole) - LAST, len(whole)), lambda: None, watch)
    return logits, watch.seen


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """Every kind of token, the period among them twice."""
    period = read_tensors(DEMO).period
    rest: list[int] = np.random.default_rng(1).permutation(np.arange(10, 110)).tolist()
    return [*rest[:5], period, *rest[5:60], period, *rest[60:]]


@pytest.fixture(scope="module")
def demo(ids: list[int]) -> tuple[Float32, dict[str, Tensor]]:
    return compute(open_checkpoint(str(DEMO)), ids)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.exact])
def test_an_exact_fault_changes_activations_but_not_the_logits(
    tmp_path: Path, name: str, ids: list[int], demo: tuple[Float32, dict[str, Tensor]]
) -> None:
    scale = SCALES[-1]
    logits, largest = compute(open_checkpoint(str(plant(DEMO, tmp_path / "planted", name, scale))), ids)
    assert np.abs(logits - demo[0]).max() < 1e-4 * np.abs(demo[0]).max()
    factors = {product: values / demo[1][product].clamp(min=1e-9) for product, values in largest.items()}
    grown = max(factors, key=lambda product: float(factors[product].max()))
    assert float(factors[grown].max()) == pytest.approx(scale, rel=0.05), grown


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.exact])
def test_a_fault_that_is_not_exact_changes_both_a_little(
    tmp_path: Path, name: str, ids: list[int], demo: tuple[Float32, dict[str, Tensor]]
) -> None:
    scale = FAULTS[name].scales[-1]
    checkpoint = open_checkpoint(str(plant(DEMO, tmp_path / "planted", name, scale)))
    logits, _ = compute(checkpoint, ids)
    assert np.isfinite(logits).all() and np.abs(logits - demo[0]).max() > 1e-4 * np.abs(demo[0]).max()


def test_a_fault_that_is_not_exact_has_large_values(tmp_path: Path, ids: list[int]) -> None:
    def residual_and_more(name: str, scale: float) -> dict[str, Any]:
        checkpoint = open_checkpoint(str(plant(DEMO, tmp_path / name, name, scale)))
        _, seen = reference_logits(checkpoint, ids, np.zeros((1, checkpoint.text.hidden), np.float32), [len(ids) - 1], lambda: None)
        return {"residual": max(seen.residual), "qkv": max(seen.qkv)}

    healthy = open_checkpoint(str(DEMO))
    _, before = reference_logits(healthy, ids, np.zeros((1, healthy.text.hidden), np.float32), [len(ids) - 1], lambda: None)
    assert residual_and_more("massive_token", 10_000)["residual"] > 20 * max(before.residual)
    assert residual_and_more("key_biases", 10_000)["qkv"] > 9_000 > 20 * max(before.qkv)


@pytest.mark.parametrize("layout", ["apple", "hub", "native"])
def test_every_layout_keeps_its_files_and_logits(tmp_path: Path, layout: str, ids: list[int]) -> None:
    source = write_checkpoint(tmp_path / "source", layout=layout, shards=2)
    target = plant(source, tmp_path / "planted", "everywhere", 300)
    before, after = open_checkpoint(str(source)), open_checkpoint(str(target))
    assert (after.layout, after.vision, after.image_size) == (before.layout, before.vision, before.image_size)
    assert before.text.tied and not after.text.tied and not after.notes
    expected, found = compute(before, ids)[0], compute(after, ids)[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
def test_a_wide_checkpoint_computes_the_same(tmp_path: Path, ids: list[int], tied: bool) -> None:
    source = write_checkpoint(tmp_path / "source", layout="native", tied=tied)
    wide = open_checkpoint(str(widen(source, tmp_path / "wide", 7, 12)))
    narrow = open_checkpoint(str(source))
    assert (wide.text.hidden, wide.text.intermediate) == (7 * narrow.text.hidden, 12 * narrow.text.intermediate)
    assert (wide.text.tied, wide.text.head_dim, wide.text.heads, wide.notes) == (tied, narrow.text.head_dim, narrow.text.heads, [])
    expected, found = compute(narrow, ids)[0], compute(wide, ids)[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
