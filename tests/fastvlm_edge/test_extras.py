"""The command that installs a missing package is one that works: in a clone, after installation from a wheel, and in a bundle."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge.bundling import start
from fastvlm_edge.cli import _explain
from fastvlm_edge.commands import convert
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import DISTRIBUTIONS, NEEDED_BY, gpu_extra, install_command, missing_package
from fastvlm_edge.machine import probe
from fastvlm_edge.machine.host import read_jetson
from fastvlm_edge.machine.probe import Probe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The modules that build the command, copied out of the clone."""
    (tmp_path / "fastvlm_edge").mkdir()
    for name in ("__init__", "errors", "extras", "version"):
        shutil.copy(ROOT / "fastvlm_edge" / f"{name}.py", tmp_path / "fastvlm_edge")
    return tmp_path


def command_in(directory: Path, extra: str) -> list[str]:
    program = "import sys; from fastvlm_edge.extras import install_command; print(install_command(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-S", "-c", program, extra], cwd=directory, capture_output=True, text=True, check=True)
    return shlex.split(done.stdout)


def test_in_a_clone_the_clone_is_installed() -> None:
    assert shlex.split(install_command()) == ["pip", "install", str(ROOT)]
    assert shlex.split(install_command("convert")) == ["pip", "install", f"{ROOT}[convert]"]


def test_after_installation_from_a_wheel_the_packages_are_named(elsewhere: Path, project: dict[str, Any]) -> None:
    extras: dict[str, list[str]] = {"": project["dependencies"], **project["optional-dependencies"]}
    needs = [
        f'Requires-Dist: {need}; extra == "{extra}"' if extra else f"Requires-Dist: {need}" for extra in extras for need in extras[extra]
    ]
    info = elsewhere / "fastvlm_edge-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", "Name: fastvlm-edge", "Version: 0.1.0", *needs, ""]))
    for extra, wanted in extras.items():
        assert command_in(elsewhere, extra) == ["pip", "install", *wanted]


def test_in_a_bundle_a_clone_is_named(elsewhere: Path) -> None:
    assert command_in(elsewhere, "convert") == ["pip", "install", ".[convert]"]
    program = "from fastvlm_edge.extras import install_advice; print(install_advice('convert'))"
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert done.stdout == 'in a clone of fastvlm-edge, run: pip install ".[convert]"\n'


@pytest.mark.parametrize("module", NEEDED_BY)
def test_the_extra_installs_the_module(module: str, project: dict[str, Any]) -> None:
    extra = NEEDED_BY[module]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    assert DISTRIBUTIONS.get(module, module) in {requirement.partition(">")[0] for requirement in wanted}


def test_the_gpu_packages_of_a_jetson_leave_out_tensorrt_for_rtx() -> None:
    assert (gpu_extra(jetson=True), gpu_extra(jetson=False)) == ("tensorrt", "rtx")


@pytest.mark.parametrize(
    ("files", "jetson"),
    [
        ({}, False),
        ({"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic"}, True),
        ({"sys/devices/soc0/family": "Tegra\n", "sys/devices/soc0/soc_id": "35\n"}, True),
        ({"sys/devices/soc0/family": "Tegra\n", "sys/devices/soc0/soc_id": "999\n"}, True),  # newer than our table of chips
        ({"sys/devices/soc0/family": "i.MX8\n"}, False),
    ],
)
def test_the_gpu_packages_and_the_doctor_agree_on_what_a_jetson_is(
    files: dict[str, str], jetson: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    here = Probe(tmp_path)
    monkeypatch.setattr(probe, "Probe", lambda: here)
    assert (read_jetson(here) is not None, gpu_extra()) == (jetson, "tensorrt" if jetson else "rtx")


def test_a_package_of_nobody_is_not_explained() -> None:
    assert missing_package("fastvlm_edge.missing") is None
    error = missing_package("torch.nn", "training needs")
    assert error is not None and error.what == "training needs the package torch, which is not installed"
    assert error.mend == f"run: {install_command('convert')}"


def test_a_package_that_is_broken_is_not_called_missing() -> None:
    cause = ImportError("libcublas.so.12: cannot open shared object file", name="torch._C")
    error = _explain(cause)
    assert error.what == "torch is installed but cannot be loaded (libcublas.so.12: cannot open shared object file)"
    assert error.mend == "run: pip install --force-reinstall torch" and error.__cause__ is cause
    assert "not installed" in _explain(ModuleNotFoundError("No module named 'torch'", name="torch")).what


def test_an_accuracy_drop_without_questions_is_told_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(FastVLMError, match="--accuracy-drop needs questions"):
        convert.main(["CHECKPOINT", "-o", "MODEL", "--accuracy-drop", "0.5"])


def test_an_error_of_a_bundle_is_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise start.BundleError("the disk is full", "free some space")

    monkeypatch.setattr(sys, "argv", ["-c", "app", "bench", "--json"])
    assert start.exit_status("app", fail) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"message": "the disk is full", "mend": "free some space"}}
    assert err == "app: error: the disk is full; free some space\n"
