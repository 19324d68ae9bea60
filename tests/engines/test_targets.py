"""Every pair of target and precision that the tables offer is built: for TensorRT for RTX, which needs no GPU, with two layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.engines.build import Options, build
from fastvlm_edge.machine.boards.targets import BUILD_NAMES, TARGETS
from fastvlm_edge.model_dir.engine_record import PARTS
from fastvlm_edge.model_dir.manifest import PRECISIONS
from tests.support.checkpoints import write_checkpoint

pytest.importorskip("tensorrt_rtx")
OFFERED = [name for name in BUILD_NAMES if "tensorrt_rtx" in TARGETS[name].libraries]
PAIRS = [(target, precision) for target in OFFERED for precision in PRECISIONS if precision in TARGETS[target].precisions]
QUICK = {(target, PRECISIONS[index % len(PRECISIONS)]) for index, target in enumerate(OFFERED)}
"""Every target and every precision at least once."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Precision -> model directory."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("source") / "tiny-fastvlm", layout="native")
    folder = tmp_path_factory.mktemp("models")
    for precision in PRECISIONS:
        convert(str(checkpoint), folder / precision, precision=precision, context=512)
    return {precision: folder / precision for precision in PRECISIONS}


@pytest.mark.parametrize(
    ("target", "precision"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow, id="-".join(pair)) for pair in PAIRS]
)
def test_what_is_offered_can_be_built(target: str, precision: str, models: dict[str, Path]) -> None:
    record = build(models[precision], target, Options(cache=None, verify=False))
    assert {f"{part}.engine" for part in PARTS} <= record.files.keys()
    assert [tuple(numbers) for numbers in record.compute_capabilities] == list(TARGETS[target].compute_capabilities)
