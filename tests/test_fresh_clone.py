"""A fresh clone works as it is: with the packages installed but not the project, and on a bare Python as far as that can go."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_edge.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
WITH_PACKAGES = os.pathsep.join(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
"""As PYTHONPATH and with -S, no .pth file there is read, and so not the one of an editable installation either."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `git clone` would give of this working tree, symbolic links included."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a git working tree")
    directory = tmp_path_factory.mktemp("fresh") / "fastvlm-edge"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, directory / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return directory


def start(clone: Path, arguments: list[str], *, packages: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"PYTHONPATH": packages}
    return subprocess.run([sys.executable, "-S", *arguments], cwd=clone, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(clone: Path) -> Run:
    """`python -m fastvlm_edge ARGUMENTS` in the clone, with the packages of this environment."""
    return lambda *arguments: start(clone, ["-m", "fastvlm_edge", *map(str, arguments)], packages=WITH_PACKAGES)


@pytest.fixture(scope="module")
def bare(clone: Path) -> Run:
    """`python -m fastvlm_edge ARGUMENTS` in the clone, with nothing but the standard library."""
    return lambda *arguments: start(clone, ["-m", "fastvlm_edge", *map(str, arguments)], packages="")


@pytest.fixture(scope="module")
def converted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo checkpoint, converted by the clone, and what that printed."""
    output = tmp_path_factory.mktemp("converted") / "demo"
    done = run("convert", "examples/demo/fastvlm-demo", "-o", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: fastvlm-demo, int8, 192 px")
    return output, done.stdout


@pytest.fixture(scope="module")
def model(converted: tuple[Path, str]) -> Path:
    return converted[0]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (192, 192), "red").save(path)
    return path


@pytest.mark.parametrize("packages", [WITH_PACKAGES, ""])
def test_the_package_is_the_one_in_the_clone(clone: Path, packages: str) -> None:
    program = "import fastvlm_edge, sys; print(fastvlm_edge.__file__, any('editable' in str(finder) for finder in sys.meta_path))"
    assert start(clone, ["-c", program], packages=packages).stdout.split() == [str(clone / "fastvlm_edge" / "__init__.py"), "False"]


def test_all_four_parts_are_the_ones_in_the_clone(clone: Path) -> None:
    program = "import sys, importlib; print(*(importlib.import_module(f'fastvlm_edge.{name}').__path__[0] for name in sys.argv[1:]))"
    done = start(clone, ["-c", program, "convert", "engines", "calib"], packages=WITH_PACKAGES)
    assert [Path(path).resolve() for path in done.stdout.split()] == [clone / name for name in ("convert", "engines", "calib")], done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: fastvlm-edge {command}") and done.stderr == ""


def test_convert_and_run(run: Run, model: Path, image: Path) -> None:
    done = run("run", model, "--image", image, "--prompt", "What colour is this?", "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] and json.loads(done.stdout)["backend"].startswith("ort")


def test_the_command_that_convert_prints_last_runs(clone: Path, converted: tuple[Path, str], image: Path) -> None:
    when, _, command = converted[1].splitlines()[-1].partition(": ")
    assert when in ("next", "then")  # "then" after building engines, on a machine with a GPU
    environment = {**os.environ, "PYTHONPATH": WITH_PACKAGES}
    typed = command.replace("PICTURE", shlex.quote(str(image)))
    done = subprocess.run(typed, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip(), (typed, done.stderr)


def test_the_demo(run: Run) -> None:
    done = run("demo")
    assert done.returncode == 0 and done.stdout.count("  answer ") == 3, done.stderr


def test_make_demo_installs_the_runtime_only(clone: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # these tests run under make
    done = subprocess.run(["make", "--dry-run", "demo"], cwd=clone, env=environment, capture_output=True, text=True, check=True)
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 1 and installs[0].endswith("--editable .") and ".venv" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith("bin/fastvlm-edge demo")


def test_eval_plan_bench_and_doctor(run: Run, model: Path, image: Path) -> None:
    questions = image.with_suffix(".jsonl")
    questions.write_text(json.dumps({"image": image.name, "prompt": "What colour is this?", "answer": "red"}) + "\n")
    for arguments in (
        ("eval", model, "--data", questions, "--json"),
        ("plan", model, "--target", "orin-nano", "--json"),
        ("bench", model, "--processes", "1", "--runs", "1", "--new-tokens", "2", "--depths", "128", "--json"),
        ("doctor", model, "--json"),
    ):
        done = run(*arguments)
        assert "error" not in json.loads(done.stdout), done.stderr
        assert done.returncode == 0 or arguments[0] == "doctor", done.stderr  # which finds what this machine lacks


def test_build_and_bundle_get_as_far_as_their_first_question(run: Run, model: Path, tmp_path: Path) -> None:
    """Both load all of their parts before they refuse a name that does not exist."""
    for arguments in (("build", model, "--target", "toaster"), ("bundle", model, "--target", "toaster", "-o", tmp_path / "bundle")):
        done = run(*arguments)
        assert done.returncode in (1, 2) and "toaster" in done.stderr and "a bug" not in done.stderr


def test_a_bare_python_runs_the_doctor(bare: Run) -> None:
    done = bare("doctor", "--json")
    assert "error" not in json.loads(done.stdout) and done.stderr == ""
    assert bare("doctor").stdout and bare("doctor", "--help").returncode == 0
    assert bare("--version").returncode == bare("--help").returncode == 0


def test_on_an_old_python_only_the_doctor_runs(clone: Path) -> None:
    """JetPack 5 has Python 3.8."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which("python3.8"), *map(str, versions.glob("3.8.*/bin/python"))]
    pythons = [path for path in found if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]
    if not pythons:
        pytest.skip("no Python 3.8 here")
    for command in COMMANDS:
        done = subprocess.run([pythons[0], "-m", "fastvlm_edge", command, "--json"], cwd=clone, capture_output=True, text=True)
        if command == "doctor":
            assert "error" not in json.loads(done.stdout)
        else:
            assert done.returncode == 1 and f"{command} needs Python 3.10 or newer, and this is Python 3.8" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "convert examples/demo/fastvlm-demo -o MODEL",
        "demo",
        "build MODEL",
        "run MODEL --prompt x",
        "eval MODEL --data x.jsonl",
        "plan MODEL --target orin-nano",
        "bench MODEL",
        "bundle MODEL --target orin-jp6 -o x",
    ],
)
def test_on_a_bare_python_every_other_command_names_the_package_and_the_command_that_installs_it(
    clone: Path, bare: Run, model: Path, arguments: str
) -> None:
    done = bare(*(str(model) if word == "MODEL" else word for word in arguments.split()))
    if arguments.startswith("plan"):  # it needs none
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    if arguments.startswith("bundle"):  # pip downloads the packages for the board
        assert done.stderr.startswith("fastvlm-edge: error: bundle needs pip") and "-m ensurepip" in done.stderr
        return
    assert done.stderr.startswith("fastvlm-edge: error: this command needs the package ")
    assert f'which is not installed; run: pip install "{clone}' in done.stderr
