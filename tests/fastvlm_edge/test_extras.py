"""The command that installs a missing package is one that works: in a clone, after installation from a wheel, and in a bundle."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_edge import extras
from fastvlm_edge.bundling import start
from fastvlm_edge.cli import _explain
from fastvlm_edge.commands import convert
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import (
    DISTRIBUTIONS,
    NEEDED_BY,
    broken_package,
    gpu_extra,
    import_failure,
    install_command,
    missing_package,
)
from fastvlm_edge.machine import probe
from fastvlm_edge.machine.host import read_jetson
from fastvlm_edge.machine.libraries import FILES_GONE, PACKAGES, read_python
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


def test_a_package_of_nobody_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", listed({}))
    assert missing_package("fastvlm_edge.missing") is None
    error = missing_package("torch.nn", "training needs")
    assert error is not None and error.what == "training needs the package torch, which is not installed"
    assert error.mend is not None and error.mend.endswith(f"run: {install_command('convert')}")


def listed(versions: dict[str, str]) -> Callable[[str], str]:
    """`importlib.metadata.version` where pip lists only these."""

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    return version


def test_a_package_that_is_broken_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", listed({}))
    cause = ImportError("libcublas.so.12: cannot open shared object file", name="torch._C")
    error = _explain(cause)
    assert error.what == "torch is installed but cannot be loaded (ImportError: libcublas.so.12: cannot open shared object file)"
    assert error.mend == "run: pip install --force-reinstall torch"
    assert "not installed" in _explain(ModuleNotFoundError("No module named 'torch'", name="torch")).what


def test_the_requirement_of_a_single_package_is_that_of_its_extra(project: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", listed({}))
    error = missing_package("matplotlib")
    (wanted,) = (need for need in project["optional-dependencies"]["bench"] if need.startswith("matplotlib"))
    assert error is not None and error.mend == f'run: pip install "{wanted}"'


@pytest.mark.parametrize(
    ("module", "version", "command"),
    [
        ("onnx", "1.19.0", "pip install --force-reinstall --no-deps onnx==1.19.0"),
        ("PIL", "12.1", "pip install --force-reinstall --no-deps pillow==12.1"),
        ("cuda.bindings", "13.0.3", "pip install --force-reinstall --no-deps cuda-bindings==13.0.3"),
        ("torch", "2.13.0+cpu", "pip install --force-reinstall --no-deps torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"),
        ("torch", "2.13.0", "pip install --force-reinstall --no-deps torch==2.13.0"),  # for CUDA, from PyPI
        ("torch", "2.5.0a0+872d972e41.nv24.8", "pip install --force-reinstall --no-deps torch==2.5.0a0+872d972e41.nv24.8"),
    ],
)
def test_a_package_whose_files_are_gone_is_installed_again_in_the_same_version(
    module: str, version: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip calls it satisfied, so the command that installs an extra does nothing."""
    monkeypatch.setattr(metadata, "version", listed({DISTRIBUTIONS.get(module, module): version}))
    error = missing_package(module)
    monkeypatch.setattr(extras, "find_spec", lambda _name: None)
    assert broken_package(module, FILES_GONE).mend == f"run: {command}"
    if module != "cuda.bindings":
        assert error is not None and error.mend == f"run: {command}"
        assert f"completely: pip lists version {version}, but its files are missing" in error.what


def test_a_broken_pytorch_is_not_replaced_by_its_build_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", listed({"torch": "2.13.0+cpu"}))
    monkeypatch.setattr(extras, "find_spec", lambda _name: ModuleSpec("torch", None, origin="/site-packages/torch/__init__.py"))
    mend = broken_package("torch", "OSError: no").mend
    assert mend == "run: pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cpu"


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


BROKEN = {
    "a shared library is missing": (
        "raise ImportError('libfoo.so.1: cannot open shared object file')",
        "(ImportError: libfoo.so.1: cannot open shared object file)",
    ),
    "a symbol is missing": ("raise OSError('undefined symbol: foo')", "(OSError: undefined symbol: foo)"),
    "built for another numpy": ("raise AttributeError('_ARRAY_API not found')", "(AttributeError: _ARRAY_API not found)"),
    "explained at length": (
        "raise RuntimeError('IMPORTANT\\n\\nOriginal error was: no SSE\\n')",
        "(RuntimeError: Original error was: no SSE)",
    ),
    "explained first": (
        "raise ImportError('libfoo.so.1: no such file\\nSee the page on errors.')",
        "(ImportError: libfoo.so.1: no such file See",
    ),
    "explained last": (
        "raise ImportError('Loading failed:\\n' + 'x\\n' * 999 + 'no libfoo.so.1')",
        "(ImportError: Loading failed: ... no libfoo.so.1)",
    ),
    "ends the program": ("import sys; sys.exit(3)", "(SystemExit: 3)"),
    "ends the program in silence": ("raise SystemExit", "(SystemExit)"),
    "a dependency is missing": ("import no_such_package", "(ModuleNotFoundError: No module named 'no_such_package')"),
    "a part is missing": ("import onnx._part", "(ModuleNotFoundError: No module named 'onnx._part')"),
    "cut off": ("def (", "(SyntaxError: invalid syntax (__init__.py, line 1))"),
    "zeros after a crash": ("x = 1\0", "null bytes"),
    "too old for a name": ("", "(ImportError: cannot import name 'helper' from 'onnx'"),
}
"""A package that is there and broken: its `__init__.py`, and the reason in the error."""


@pytest.mark.parametrize("kind", BROKEN)
def test_every_kind_of_broken_package_is_one_sentence(kind: str, tmp_path: Path) -> None:
    text, why = BROKEN[kind]
    package = tmp_path / "site-packages" / "onnx"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    program = """
        from fastvlm_edge.extras import package_errors
        try:
            with package_errors():
                from onnx import helper
        except ImportError as error:
            print(type(error).__name__, error.what, "|", error.mend)
    """
    said = run_with(package.parent, program)
    assert said.startswith("PackageError onnx is installed but cannot be loaded ") and why in said
    assert said.endswith("| run: pip install --force-reinstall onnx\n")


def test_an_empty_package_is_broken(tmp_path: Path) -> None:
    """Where pip has lost most files of a package, what is left can still be imported."""
    package = tmp_path / "site-packages" / "onnx"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    program = """
        from fastvlm_edge.cli import _explain
        import onnx
        try:
            onnx.load("x")
        except AttributeError as error:
            print(_explain(error))
    """
    assert run_with(package.parent, program).startswith("onnx is installed but cannot be loaded (AttributeError: ")


def test_a_name_that_a_whole_package_lacks_is_a_bug_of_ours() -> None:
    with pytest.raises(AttributeError) as caught:
        np.no_such_name  # type: ignore[attr-defined]  # noqa: B018
    assert import_failure(caught.value) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [("import os; os._exit(1)", "its import ends the process with status 1"), ("raise OSError('no')", "OSError: no"), ("", None)],
)
def test_an_import_that_ends_its_process_is_named(text: str, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert Probe().import_error("a_package") == says


def test_a_directory_without_init_is_no_package(tmp_path: Path) -> None:
    """Such as a folder `onnx` with models, where the command runs."""
    (tmp_path / "onnx").mkdir()
    program = """
        from fastvlm_edge.cli import _explain
        try:
            import onnx
            onnx.helper
        except AttributeError as error:
            print(_explain(error))
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert "needs the package onnx, which is not installed" in done.stdout


def test_a_file_of_the_user_with_the_name_of_a_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("x = 1\n")
    said = run_with(
        tmp_path, "import fastvlm_edge\ntry:\n  fastvlm_edge.FastVLM\nexcept fastvlm_edge.FastVLMError as error:\n  print(error)"
    )
    assert said.startswith("numpy is installed but cannot be loaded") and f"rename {tmp_path / 'numpy.py'} if it is not" in said


def test_an_error_of_the_project_is_still_a_bug(tmp_path: Path) -> None:
    (tmp_path / "onnx.py").write_text("def call(function):\n    function()\n")
    program = """
        from fastvlm_edge.cli import _explain
        import onnx
        try:
            onnx.call(lambda: 1 / 0)
        except ZeroDivisionError as error:
            print(_explain(error))
    """
    assert "a bug in fastvlm-edge" in run_with(tmp_path, program)


def run_with(folder: Path, program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    (folder / "program.py").write_text(textwrap.dedent(program))
    command = [sys.executable, str(folder / "program.py")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def test_a_package_that_ends_the_program_is_not_silent(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit")
    command = [sys.executable, "-m", "fastvlm_edge", "run", "MODEL", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 1 and "error: numpy is installed but cannot be loaded (SystemExit)" in done.stderr


@pytest.mark.parametrize(
    "arguments", ["run MODEL --prompt x", "bench MODEL", "eval MODEL --data MODEL", "build MODEL", "convert MODEL -o OUT"]
)
def test_a_broken_package_is_one_sentence_in_every_command(arguments: str, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("raise OSError('libfoo.so.1: cannot open shared object file')")
    places = {"MODEL": str(model_dir), "OUT": str(tmp_path / "out")}
    command = [sys.executable, "-m", "fastvlm_edge", *(places.get(word, word) for word in arguments.split())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: numpy is installed but cannot be loaded (OSError: libfoo.so.1" in done.stderr.splitlines()[-1]


def test_the_doctor_imports_every_package(tmp_path: Path) -> None:
    """In processes of their own, since a package built for another processor ends its process."""
    for name, text in {"PIL": "raise OSError('libjpeg.so.8: no such file')", "tokenizers": "import os; os.kill(os.getpid(), 4)"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    program = "from fastvlm_edge.cli import main; raise SystemExit(0 if main(['doctor', '--json']) == 1 else 2)"
    report = json.loads(run_with(tmp_path, program))
    broken = [finding for finding in report["findings"] if "cannot be loaded" in finding["text"]]
    assert [finding["status"] for finding in broken] == ["problem", "problem"]
    assert "OSError: libjpeg.so.8" in broken[0]["text"] and broken[0]["mend"].endswith("pip install --force-reinstall pillow")
    assert "its import ends the process: Illegal instruction" in broken[1]["text"]
    assert all("pillow" not in finding["text"] for finding in report["findings"] if finding["status"] == "ok")


@pytest.mark.parametrize("text", ["", "raise SystemExit", "raise ImportError('no libfoo')"])
def test_the_doctor_names_the_root_cause_only(text: str, tmp_path: Path) -> None:
    """onnxruntime and most optional packages need numpy, and an empty numpy can be imported."""
    (tmp_path / "numpy.py").write_text(text)
    program = "from fastvlm_edge.cli import main; raise SystemExit(0 if main(['doctor', '--json']) == 1 else 2)"
    findings = json.loads(run_with(tmp_path, program))["findings"]
    (broken,) = (finding["text"] for finding in findings if "cannot be loaded" in finding["text"])
    assert broken.startswith("numpy is installed but cannot be loaded")


@pytest.mark.parametrize(
    ("whole", "fails", "accused"),
    [
        ([], "onnxruntime", []),
        (["numpy"], "onnxruntime", ["onnxruntime"]),
        ([*PACKAGES], "onnx", []),
        ([*PACKAGES, "ml_dtypes"], "onnx", ["onnx"]),
        (["numpy", "PIL"], "torch", []),
    ],
)
def test_what_needs_a_missing_package_is_not_accused(whole: list[str], fails: str, accused: list[str]) -> None:
    python = read_python(
        Probe(
            has_module=lambda name: name in whole or name == fails,
            import_error=lambda name: "no" if name == fails else None,
            package_version=lambda _name: None,
        )
    )
    assert [*python.broken] == accused


@pytest.mark.parametrize("gone", ["numpy", "torch"])
def test_files_that_are_gone_are_found_by_the_doctor(gone: str) -> None:
    """Of a runtime that is otherwise whole."""
    python = read_python(
        Probe(
            has_module=lambda name: name in PACKAGES and name != gone,
            import_error=lambda _name: None,
            package_version=lambda _name: "1.0",
        )
    )
    assert python.broken.get(gone) == FILES_GONE


@pytest.mark.parametrize(("cores", "most"), [(1, 1), (64, 4)])
def test_few_packages_are_imported_at_once(cores: int, most: int) -> None:
    lock, running, seen = threading.Lock(), 0, 0

    def try_import(_name: str) -> None:
        nonlocal running, seen
        with lock:
            running += 1
            seen = max(seen, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    read_python(Probe(has_module=lambda _name: True, import_error=try_import, package_version=lambda _name: "1.0", cores=cores))
    assert seen == most


def test_an_import_that_does_not_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless.py").write_text("while True: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(probe, "_IMPORT_SECONDS", 1)
    assert Probe().import_error("endless") == "its import takes longer than 1 s"
    assert Probe().import_error("json") is None
