"""What the doctor says of onnxruntime-gpu: alone, beside onnxruntime, and on GPUs that its wheels have no kernels for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_edge.doctor.check_onnxruntime import INSTALL_CPU, INSTALL_GPU, check_onnxruntime, has_kernels
from fastvlm_edge.doctor.facts import read_facts
from fastvlm_edge.doctor.findings import Finding
from tests.support.boards import RUNTIME, Board, probe_of
from tests.support.boards.computers import cpu_box, rtx_desktop
from tests.support.boards.jetsons import agx_orin, orin_nano, thor

BOTH = RUNTIME | {"onnxruntime-gpu": "1.31.1"}
ALONE = {name: version for name, version in BOTH.items() if name != "onnxruntime"}


def findings(board: Board, root: Path) -> list[Finding]:
    return check_onnxruntime(read_facts(probe_of(board, root)))


def test_nothing_is_said_where_onnxruntime_alone_is_right(tmp_path: Path) -> None:
    assert findings(cpu_box(), tmp_path / "cpu") == []
    assert findings(rtx_desktop(), tmp_path / "rtx") == []


@pytest.mark.parametrize("make", [orin_nano, agx_orin, thor])
def test_a_jetson_is_told_that_the_wheels_have_no_kernels_for_it(make: Callable[[], Board], tmp_path: Path) -> None:
    board = make()
    capability = "11.0" if make is thor else "8.7"
    (found,) = findings(board, tmp_path)
    assert found.status == "ok" and f"no kernels for compute capability {capability}" in found.text


@pytest.mark.parametrize(("make", "mend"), [(rtx_desktop, INSTALL_GPU), (cpu_box, INSTALL_CPU), (orin_nano, INSTALL_CPU)])
def test_both_packages_side_by_side(make: Callable[[], Board], mend: str, tmp_path: Path) -> None:
    board = make()
    (found,) = findings(board.but(packages=board.packages | BOTH), tmp_path)
    assert (found.status, found.mend) == ("warning", mend)
    assert f"onnxruntime {BOTH['onnxruntime']} and onnxruntime-gpu 1.31.1 are both installed" in found.text


def test_onnxruntime_gpu_alone(tmp_path: Path) -> None:
    def only_gpu(board: Board) -> Board:
        return board.but(packages={name: version for name, version in (board.packages | ALONE).items() if name != "onnxruntime"})

    (found,) = findings(only_gpu(rtx_desktop()), tmp_path / "rtx")
    assert (found.status, found.text) == ("ok", "onnxruntime-gpu 1.31.1")
    (found,) = findings(only_gpu(orin_nano()), tmp_path / "orin")
    assert found.status == "warning" and "built for this GPU" in found.text


@pytest.mark.parametrize(("version", "slow"), [("1.23.2", True), ("1.24.4", True), ("1.25.0", False), ("1.31.1", False)])
def test_onnxruntime_gpu_that_does_not_join_products(version: str, slow: bool, tmp_path: Path) -> None:
    board = rtx_desktop()
    packages = {name: value for name, value in board.packages.items() if name != "onnxruntime"} | {"onnxruntime-gpu": version}
    (found,) = findings(board.but(packages=packages), tmp_path)
    assert found.status == ("warning" if slow else "ok")
    assert ("makes floats of all INT8 and INT4 weights in every step" in found.text) is slow


@pytest.mark.parametrize(
    ("architecture", "capability", "jetson", "runs"),
    [
        ("x86_64", (8, 6), False, True),
        ("x86_64", (12, 1), False, True),  # a later minor version
        ("x86_64", (10, 0), False, False),
        ("x86_64", (7, 0), False, False),  # an earlier one
        ("aarch64", (8, 7), True, False),
        ("aarch64", (11, 0), True, False),
        ("aarch64", (12, 1), False, True),  # DGX Spark
        ("aarch64", (8, 6), False, False),
        ("riscv64", (8, 9), False, False),
    ],
)
def test_kernels_run_on_later_minor_versions_except_on_a_jetson(
    architecture: str, capability: tuple[int, int], jetson: bool, runs: bool
) -> None:
    assert has_kernels(architecture, capability, jetson=jetson) is runs
