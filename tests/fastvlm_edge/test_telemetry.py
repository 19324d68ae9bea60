"""onnxruntime's telemetry is off before any module can import onnxruntime, unless the user allows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWITCH = "ORT_DISABLE_TELEMETRY"
PACKAGES = ("fastvlm_edge", "benchmarks", "tests")
"""Each sets the switch when it is imported."""


@pytest.mark.parametrize(("given", "left"), [({}, "1"), ({SWITCH: "0"}, "0"), ({SWITCH: ""}, "")])
@pytest.mark.parametrize("package", PACKAGES)
def test_the_switch_is_set_before_onnxruntime_is_imported(package: str, given: dict[str, str], left: str) -> None:
    code = f"import os, sys, {package}; print([os.environ[{SWITCH!r}], 'onnxruntime' in sys.modules])"
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment | given, capture_output=True, text=True)
    assert done.stdout.strip() == str([left, False]), done.stderr


def test_no_other_package_imports_onnxruntime() -> None:
    inside = {*PACKAGES, "convert", "engines", "calib", "optimum"}  # imported as parts of fastvlm_edge, or by optimum
    files = [path for path in ROOT.glob("*/**/*.py") if path.relative_to(ROOT).parts[0] not in {*inside, "build", ".venv"}]
    assert files
    pattern = re.compile(r"^\s*(import|from) (onnxruntime|optimum)", re.MULTILINE)
    assert [path for path in files if pattern.search(path.read_text(encoding="utf-8"))] == []
