"""A bundle on 64-bit Arm: a Debian userland under qemu-user, no network inside, the demo model. Run by `make test-arm64`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.commands.demo import HOME, QUESTIONS
from fastvlm_edge.convert.pipeline import convert

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"
SUITES = {"bookworm": "3.11"}
"""Debian release -> its Python. 3.10 and 3.12, JetPack's, are in no Debian release."""

pytestmark = pytest.mark.arm64


@dataclass(frozen=True)
class Asked:
    """A demo question, and the tokens that this machine answers with."""

    picture: Path
    prompt: str
    token_ids: list[int]
    text: str


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("demo") / "model"
    convert(str(DEMO / "fastvlm-demo"), model, precision="fp32")
    return model


@pytest.fixture(scope="session")
def questions(demo_model: Path) -> list[Asked]:
    asked = []
    with FastVLM.load(demo_model, "ort") as vlm:
        for row in map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines()):
            picture = HOME / row["image"]
            reply = vlm.generate(row["prompt"], image=picture, max_new_tokens=16)
            asked.append(Asked(picture, row["prompt"], list(reply.token_ids), reply.text))
    return asked


@dataclass(frozen=True)
class Board:
    """A userland with a bundle in it."""

    root: Path
    python: str

    def run(self, *arguments: str, expect: int = 0) -> str:
        """Run the bundle there with no network and an empty environment, and return what it printed."""
        # No /sys: it describes the x86 processor below, and with it onnxruntime was seen to crash when it loads.
        mounts = 'mount -t proc proc "$0/proc" && exec chroot "$0" /usr/bin/env -i PATH=/usr/bin:/bin "$@"'
        command = ["unshare", "--mount", "--net", "sh", "-c", mounts, str(self.root), "/srv/app", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == expect, done.stderr
        return done.stdout if expect == 0 else done.stderr


@pytest.fixture(scope="session", params=SUITES)
def board(request: pytest.FixtureRequest, demo_model: Path, questions: list[Asked]) -> Board:
    suite = request.param
    root = ROOT / "build" / "arm64" / suite
    made = subprocess.run([str(ROOT / "tests/arm64/userland.sh"), str(root), suite], capture_output=True, text=True)
    assert made.returncode == 0, f"{made.stderr}\n{made.stdout[-2000:]}"
    shutil.rmtree(root / "var/lib/fastvlm-edge", ignore_errors=True)
    python = SUITES[suite]
    bundle = [sys.executable, "-m", "fastvlm_edge", "bundle", str(demo_model), "--target", "aarch64", "--python", python, "--force"]
    subprocess.run([*bundle, "-o", str(root / "srv/app")], check=True)
    for asked in questions:
        shutil.copy(asked.picture, root / "srv")
    return Board(root, python)


def test_the_demo_questions_get_the_same_tokens_as_on_this_machine(board: Board, questions: list[Asked]) -> None:
    for asked in questions:
        said: dict[str, Any] = json.loads(
            board.run("run", "--image", f"/srv/{asked.picture.name}", "--prompt", asked.prompt, "--max-new-tokens", "16", "--json")
        )
        print(f"{os.uname().machine} and aarch64, Python {board.python}: {asked.prompt} {said['text']} {said['token_ids']}")
        assert said["token_ids"] == asked.token_ids
        assert said["text"] == asked.text
        assert said["backend"] == "ort"


def test_the_other_commands_of_a_board_run_there(board: Board) -> None:
    findings = json.loads(board.run("doctor", "--json"))
    assert "aarch64" in json.dumps(findings)
    assert "no engines: onnxruntime answers" in board.run("prepare")
    assert "numpy" in board.run("licenses")
    assert "PyTorch" in board.run("convert", "x", expect=1)
    assert "no GPU" in board.run("build", expect=1)
    assert "written and enabled" in board.run("install", "--root", "/srv/image")


def test_a_tensorrt_where_jetpack_puts_it_is_found(board: Board) -> None:
    package = board.root / f"usr/lib/python{board.python}/dist-packages/tensorrt"
    package.mkdir(parents=True, exist_ok=True)
    try:
        (package / "__init__.py").write_text('__version__ = "9.9"\n')
        said = board.run("build", "--target", "orin", expect=1)
        assert "tensorrt 9.9 is too old" in said
    finally:
        shutil.rmtree(package)
