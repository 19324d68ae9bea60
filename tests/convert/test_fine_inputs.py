"""Products with 16-bit inputs on a CPU: which ones are chosen, and that they do what they are for."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from fastvlm_edge import FastVLM
from fastvlm_edge.convert import pipeline
from fastvlm_edge.convert.fine_inputs import UNUSUAL, NoiseWatch, Trial, choose_fine_inputs
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.convert.precision import precision_plan
from fastvlm_edge.convert.weights.round_to_nearest import dequantize, quantize_matrix
from fastvlm_edge.model_dir.manifest import read_manifest
from tests.support.checkpoints import write_checkpoint


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 7, 50, 96, 97])
def test_as_few_products_as_possible(needed: int) -> None:
    products = [f"product {index}" for index in range(97)]
    runs = []

    def run(fine: frozenset[str]) -> Trial:
        runs.append(fine)
        return Trial(error=0.5 if len(fine) < needed else 0.001, step_ms=10 + len(fine))

    chosen = choose_fine_inputs(products, run, bound=0.01)
    assert chosen.products == sorted(products[:needed])
    assert runs[-1] == set(chosen.products) and runs[0] == set()
    assert len(runs) <= 15
    assert chosen.slower == pytest.approx(needed / 10)


def test_without_candidates_nothing_is_tried() -> None:
    chosen = choose_fine_inputs([], lambda fine: Trial(0.03 + len(fine), 1.0), bound=0.01)
    assert chosen.products == [] and chosen.candidates == 0 and chosen.before == chosen.after == Trial(0.03, 1.0)


def test_if_even_all_products_are_not_enough_all_are_taken() -> None:
    chosen = choose_fine_inputs(["a", "b", "c"], lambda fine: Trial(1.0, 1.0), bound=0.01)
    assert chosen.products == ["a", "b", "c"] and chosen.after.error == 1.0


def watched(products: dict[str, tuple[torch.Tensor, torch.Tensor]], precision: str = "int8") -> NoiseWatch:
    watch = NoiseWatch(precision_plan(precision))
    for name, (x, weight) in products.items():
        watch.product(name, x, weight, x @ weight.T)
    return watch


def test_the_noisiest_inputs_are_those_with_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 200, generator=generator), torch.randn(30, 200, generator=generator)
    outlier, blind = x.clone(), weight.clone()
    outlier[3, 150], blind[:, 150] = 1000, 0
    watch = watched({"plain": (x, weight), "outlier": (outlier, blind)})
    assert watch.noisiest_inputs() == ["outlier", "plain"]
    assert watch.noisiest_inputs(UNUSUAL) == ["outlier"]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_expected_noise_is_what_rounding_makes(precision: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(20, 256, generator=generator), torch.randn(30, 256, generator=generator)
    watch = watched({"one": (x, weight)}, precision)
    steps = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) / 127 for part in x.split(128, 1)], 1)
    measured = (((x / steps).round() * steps - x) @ weight.T).square().sum(1)
    assert float(watch.products["one"].inputs.sum() / measured.sum()) == pytest.approx(1, rel=0.2)
    rounded = torch.from_numpy(dequantize(quantize_matrix(weight.T.contiguous().numpy(), precision_plan(precision).body)))
    measured = (x @ (rounded - weight.T)).square().sum(1)
    assert float(watch.products["one"].weights.sum() / measured.sum()) == pytest.approx(1, rel=0.3)
    halves = NoiseWatch(precision_plan(precision))
    for part in weight.split(10):
        halves.product("one", x, part, x @ part.T)
    torch.testing.assert_close(halves.products["one"].inputs, watch.products["one"].inputs)
    torch.testing.assert_close(halves.products["one"].weights, watch.products["one"].weights)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_products_with_fine_inputs_are_nearly_exact(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that only few products would not meet, to see what each of the two graphs computes."""
    checkpoint = write_checkpoint(tmp_path / "tiny", layout="native")
    monkeypatch.setattr(pipeline, "CPU_AIM", 0.0)
    monkeypatch.setattr(pipeline, "UNUSUAL", 0.0)
    convert(str(checkpoint), tmp_path / "model", precision=precision)
    manifest = read_manifest(tmp_path / "model")
    found = manifest.activations["fine_inputs_on_cpu"]
    assert len(found["products"]) == found["candidates"] == 4 * manifest.decoder.layers + 1
    assert 0 <= found["after"]["error"] < found["before"]["error"] / 20
    assert manifest.parity["rows_on_cpu"]["divergence"] == found["after"]["error"]
    graph = onnx.load(tmp_path / "model" / "decoder.cpu.onnx", load_external_data=False).graph
    assert sum(node.name.endswith("/halves/Split") for node in graph.node) == found["candidates"]
    with FastVLM.load(tmp_path / "model", "ort", threads=1) as vlm:
        assert vlm.generate("What is this?", max_new_tokens=4).token_ids


def test_without_outliers_no_product_is_fine(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", layout="native")
    for precision in ("int8", "int4"):
        convert(str(checkpoint), tmp_path / precision, precision=precision)
        found = read_manifest(tmp_path / precision).activations["fine_inputs_on_cpu"]
        assert found["products"] == [] and found["candidates"] == 0
