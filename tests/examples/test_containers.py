"""The Containerfiles without a container engine: their COPY and RUN lines build an environment in a folder, and their command starts there.

The base images, `apt-get` and users are not tested. Packages come from wheels of what is installed here, so no network is used.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastvlm_edge.commands.demo import MODEL
from tests.support.wheels import tiny_wheel, wheel_of_installed

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ROOT / "examples" / "containers"
FILES = sorted(path.name for path in CONTAINERS.glob("Containerfile.*"))
QUICK = "Containerfile.x86-64"
"""The one that `make test` carries out, which takes 20 seconds."""
BEGINNINGS = ("pillow", "tokenizers", "onnxruntime", "llguidance", "starlette", "uvicorn", "msgspec", "prometheus_client", "setuptools")


@dataclass
class Image:
    """What a Containerfile has made below a folder, and how it starts."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def inside(self, text: str) -> str:
        """A command line or variable with the folders of the image below `folder`."""
        return re.sub(r"(?<![\w.])/(?=src\b|opt\b)", f"{self.folder}/", text)


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Containerfile; continued lines are joined."""
    text = (CONTAINERS / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


def build(name: str, folder: Path, environment: dict[str, str]) -> Image:
    """Carry out the instructions. Raises AssertionError for one that this test does not know, or that fails."""
    image = Image(folder)
    for instruction, words in instructions(name):
        if instruction == "COPY":
            if "--from=" not in words:
                _copy(*shlex.split(words), folder=folder)
        elif instruction == "RUN":
            if not words.startswith("apt-get "):
                done = subprocess.run(["/bin/sh", "-c", image.inside(words)], env=environment, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        elif instruction == "ENV":
            variable, _, value = words.partition("=")
            image.environment[variable] = image.inside(value)
        elif instruction == "HEALTHCHECK":
            image.health = json.loads(words.partition("CMD ")[2])
        elif instruction in ("ENTRYPOINT", "CMD"):
            setattr(image, "entry" if instruction == "ENTRYPOINT" else "command", json.loads(words))
        else:
            assert instruction in ("FROM", "USER", "EXPOSE"), instruction
    return image


def _copy(*words: str, folder: Path) -> None:
    *sources, target = words
    for source in sources:
        path = folder / target.lstrip("/")
        path = path / source if target.endswith("/") else path
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, path, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, path)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of everything that the server and the build need, and small ones for the packages of a GPU."""
    folder = tmp_path_factory.mktemp("index")
    waiting, seen = list(BEGINNINGS), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        wheel_of_installed(name, folder)
        needed = (Requirement(text) for text in metadata.requires(name) or ())
        waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    tiny_wheel(folder, "cuda_bindings", "12.9.0")
    tiny_wheel(folder, "nvidia_ml_py", "12.570.86")
    return folder


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in FILES])
def test_the_steps_build_an_environment_in_which_the_server_answers(name: str, index: Path, tmp_path: Path) -> None:
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    image = build(name, tmp_path, {"PATH": path, "HOME": str(tmp_path), **pip})
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    environment = {**image.environment, "FASTVLM_EDGE_PORT": str(port), "FASTVLM_EDGE_HOST": "127.0.0.1"}
    assert image.environment["FASTVLM_EDGE_HOST"] == "0.0.0.0" and image.command[-1] == "/model"
    command = [f"{tmp_path}/opt/fastvlm-edge/bin/{image.entry[0]}", *image.entry[1:], *image.command[:-1], str(MODEL)]
    health = [sys.executable, *[word.replace(":8000", f":{port}") for word in image.health[1:]]]
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(health, capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        python = f"{tmp_path}/opt/fastvlm-edge/bin/python3"
        code = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/').read().decode()[:15])"
        assert subprocess.run([python, "-c", code], capture_output=True, text=True).stdout == "<!doctype html>\n"
    finally:
        server.terminate()
        server.wait(timeout=30)
