"""What a release uploads: the sdist and the wheel are whole, pass twine's checks, and work in an empty environment. No network is used."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from fastvlm_edge.version import __version__
from tests.support.wheels import wheel_of_installed

pytest.importorskip("build")
pytest.importorskip("twine")

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("calib", "convert", "engines")
"""Links in `fastvlm_edge/` to the directories of the same name beside it."""


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that succeeds."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def files_of_the_repository() -> list[Path]:
    """Tracked files, and new ones that are not ignored, relative to ROOT."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    return sorted({Path(name) for name in names if name and (ROOT / name).exists()})


@dataclass(frozen=True)
class Release:
    source: Path
    """A clean copy of the repository."""
    sdist: Path
    wheel: Path
    """Built from the sdist."""
    direct: Path
    """The wheel built from `source` instead."""
    environment: Path
    """A virtual environment in which only `wheel` is installed."""

    def run(self, *arguments: str | Path, packages: bool = True) -> subprocess.CompletedProcess[str]:
        """The installed command, in a directory that is not the clone; with or without the packages that the tests run with."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        if packages:
            env["PYTHONPATH"] = sysconfig.get_path("purelib")  # holds numpy and the like; its own links to the clone are not followed
        command = [str(self.environment / "bin" / "fastvlm-edge"), *map(str, arguments)]
        return subprocess.run(command, cwd=self.environment, env=env, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    work = tmp_path_factory.mktemp("release")
    source = work / "source"
    for name in files_of_the_repository():
        if name.parts[0] not in ("benchmarks", "docs", "examples"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", work / "dist", source)  # the sdist, and the wheel from it
    run(*build, "--wheel", "--outdir", work / "direct", source)
    (sdist,), (wheel,), (direct,) = (list(work.glob(pattern)) for pattern in ("dist/*.tar.gz", "dist/*.whl", "direct/*.whl"))
    run(sys.executable, "-m", "venv", "--without-pip", work / "environment")
    pip = (sys.executable, "-m", "pip", "--python", work / "environment", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel)
    return Release(source, sdist, wheel, direct, work / "environment")


def contents(wheel: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: hashlib.sha256(archive.read(info)).hexdigest() for info in archive.infolist() if not info.is_dir()}


def is_installed(distribution: str) -> bool:
    return any(importlib.metadata.distributions(name=distribution))


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"fastvlm_edge-{__version__}.dist-info/METADATA").decode())


def installed_name(path: Path) -> str | None:
    """Where a file of the repository is in the wheel; None if it does not belong there."""
    if path.parts[0] in LINKS:
        path = "fastvlm_edge" / path
    is_link = len(path.parts) == 2 and path.name in LINKS
    return path.as_posix() if path.parts[0] in ("fastvlm_edge", "optimum") and not is_link else None


def test_the_three_links_are_links() -> None:
    files_of_the_repository()
    stored = run("git", "ls-files", "--stage", *(f"fastvlm_edge/{name}" for name in LINKS), cwd=ROOT)
    assert [line.split()[0] for line in stored.splitlines()] == ["120000"] * len(LINKS)
    for name in LINKS:
        assert os.readlink(ROOT / "fastvlm_edge" / name) == f"../{name}"


def test_the_wheel_holds_the_package_and_nothing_else(release: Release) -> None:
    expected = {name for path in files_of_the_repository() if (name := installed_name(path))}
    assert {
        "fastvlm_edge/py.typed",
        "fastvlm_edge/pictures/coffee.jpg",
        "fastvlm_edge/convert/pipeline.py",
        "fastvlm_edge/demo/model/vision.weights",
        "optimum/commands/register/fastvlm_edge.py",
    } <= expected
    dist_info = f"fastvlm_edge-{__version__}.dist-info/"
    found = contents(release.wheel)
    assert {name for name in found if not name.startswith(dist_info)} == expected
    assert f"{dist_info}licenses/LICENSE" in found


def test_the_wheel_holds_files_where_the_clone_has_links(release: Release) -> None:
    with zipfile.ZipFile(release.wheel) as archive:
        assert not [info.filename for info in archive.infolist() if stat.S_ISLNK(info.external_attr >> 16)]
        assert archive.read("fastvlm_edge/engines/build.py") == (ROOT / "engines" / "build.py").read_bytes()


def test_the_sdist_builds_the_same_wheel_as_the_clone(release: Release) -> None:
    assert contents(release.wheel) == contents(release.direct)


def test_the_sdist_is_complete(release: Release) -> None:
    with tarfile.open(release.sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith("tests")}


def test_the_wheel_is_small(release: Release) -> None:
    assert release.wheel.stat().st_size < 8e6


def test_twine_accepts_both(release: Release) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", release.sdist, release.wheel)


def test_the_metadata_say_what_people_filter_by(release: Release) -> None:
    told = metadata(release.wheel)
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == ">=3.10"
    assert told["Author"] == "fastvlm-edge developers"
    classifiers = told.get_all("Classifier", [])
    minors = sorted(int(found[1]) for line in classifiers if (found := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line)))
    assert minors[0] == 10 and minors == list(range(10, minors[-1] + 1))
    runtime = [need for need in told.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(re.split(r"[<>=]", need)[0] for need in runtime) == ["numpy", "onnxruntime", "pillow", "tokenizers"]


def test_the_installed_command_needs_nothing_to_say_what_is_missing(release: Release) -> None:
    assert release.run("--version", packages=False).stdout == f"fastvlm-edge {__version__}\n"
    doctor = release.run("doctor", "--json", packages=False)
    packages = next(finding for finding in json.loads(doctor.stdout)["findings"] if finding["topic"] == "packages")
    assert doctor.returncode == 1 and packages["text"].startswith("numpy, pillow, tokenizers, onnxruntime missing")
    ran = release.run("run", "model", "--image", "a.jpg", "--prompt", "Why?", packages=False)
    assert ran.returncode == 1 and re.search(r'run: pip install .*"numpy>=', ran.stderr), ran.stderr


def test_the_installed_command_converts_and_answers(release: Release) -> None:
    def ran(*arguments: str | Path) -> str:
        done = release.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import fastvlm_edge.calib; print(fastvlm_edge.calib.__file__)"
    found = run(release.environment / "bin" / "python", "-c", where, cwd=release.environment)
    assert Path(found.strip()).is_relative_to(release.environment)
    assert json.loads(ran("doctor", "--json"))["status"] in ("ok", "warning")
    assert ran("demo").count("  answer ") == 3
    assert not list(release.environment.rglob("verified.json"))  # pip would not remove it
    ran("convert", ROOT / "examples" / "demo" / "fastvlm-demo", "-o", "model")
    reply = json.loads(
        ran("run", "model", "--image", ROOT / "fastvlm_edge/pictures/coffee.jpg", "--prompt", "How many circles are there?", "--json")
    )
    assert reply["text"] and reply["backend"] == "ort"


@pytest.mark.parametrize(
    "installed", ["wheel", pytest.param("editable", marks=pytest.mark.slow), pytest.param("editable with a path", marks=pytest.mark.slow)]
)
def test_optimum_finds_its_command(release: Release, installed: str, tmp_path: Path) -> None:
    """Where both are installed: from the wheel, and as an editable install that finds the clone with an import hook or with a path."""
    if not is_installed("optimum"):
        pytest.skip("optimum is not installed; the extra test has it")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment")
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    pip = (sys.executable, "-m", "pip", "--python", tmp_path / "environment", "--disable-pip-version-check", "install", "--no-index")
    ours: list[str | Path] = [release.wheel] if installed == "wheel" else ["--no-build-isolation", "--editable", release.source]
    ours += ["--config-settings", "editable_mode=compat"] if installed == "editable with a path" else []
    for packages in ([wheel_of_installed("optimum", tmp_path)], ours):
        run(*pip, "--quiet", "--no-deps", "--ignore-installed", *packages, env=environment)
    optimum = tmp_path / "environment" / "bin" / "optimum-cli"
    assert "--accuracy-drop POINTS" in run(optimum, "export", "fastvlm", "--help", env=environment, cwd=tmp_path)
    assert "fastvlm" in run(optimum, "export", "--help", env=environment, cwd=tmp_path)


def test_optimum_converts(tmp_path: Path) -> None:
    """With the options and errors of `fastvlm-edge convert`."""
    if not is_installed("optimum"):
        pytest.skip("optimum is not installed; the extra test has it")
    start = "import sys; from optimum.commands.optimum_cli import main; sys.argv[0] = 'optimum-cli'; main()"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # optimum would find us twice
    export = (sys.executable, "-c", start, "export", "fastvlm")
    demo = ROOT / "examples" / "demo" / "fastvlm-demo"
    told = run(*export, demo, "model", "--precision", "int4", "--context", "512", env=environment, cwd=tmp_path)
    assert told.startswith("model: fastvlm-demo, int4, 192 px") and "next: fastvlm-edge " in told
    refused = subprocess.run([*export, demo, "model"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1 and refused.stderr.endswith("model already exists; add --force to replace it, or choose another name\n")


def test_optimum_starts_without_anything_of_ours(tmp_path: Path) -> None:
    """Its help, and the other commands, load neither our package nor PyTorch because of us."""
    if not is_installed("optimum"):
        pytest.skip("optimum is not installed; the extra test has it")
    start = (
        "import sys; from optimum.commands.optimum_cli import main; sys.argv[1:] = ['export', '--help']\n"
        "try: main()\n"
        "finally: print('loaded', sorted(name for name in sys.modules if name.partition('.')[0] in ('fastvlm_edge', 'numpy', 'torch')))"
    )
    said = run(sys.executable, "-c", start, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert "fastvlm" in said.partition("loaded")[0]
    assert "fastvlm_edge" not in said.partition("loaded")[2]


def test_the_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(__version__)}$", citation, re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1] == __version__


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("citation-file-format", "CITATION.cff"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-workflows", ".github/workflows/*.yml"),
    ],
)
def test_files_that_github_reads_fit_their_schema(schema: str, pattern: str) -> None:
    pytest.importorskip("check_jsonschema")
    files = sorted(ROOT.glob(pattern))
    assert files
    run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files)


def test_pre_commit_runs_the_pinned_ruff() -> None:
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert pinned and f"ruff-pre-commit\n    rev: v{pinned[1]}\n" in config
