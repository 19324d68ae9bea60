"""`fastvlm-edge demo`: right answers without PyTorch, commands that can be typed next, and nothing written into the package."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generate_reference import parsers
from fastvlm_edge.cli import main
from fastvlm_edge.commands import demo

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = "import sys; sys.modules.update(torch=None, onnx=None); from fastvlm_edge.cli import main; sys.exit(main(sys.argv[1:]))"
"""Then `import torch` raises ImportError."""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The demo, run in an empty directory."""
    before = listing()
    found = run("demo", cwd=tmp_path_factory.mktemp("elsewhere"))
    assert found.returncode == 0, found.stderr
    assert listing() == before
    return found


def listing() -> list[tuple[str, int]]:
    """Every file of the packaged demo, and when it changed."""
    return sorted((str(path), path.stat().st_mtime_ns) for path in demo.HOME.rglob("*"))


def commands(text: str) -> list[list[str]]:
    """The arguments of the toolkit's commands that a text tells to type."""
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  fastvlm-edge ")]


def test_three_answers_are_right(done: subprocess.CompletedProcess[str]) -> None:
    rows = [json.loads(line) for line in demo.QUESTIONS.read_text().splitlines()]
    answers = re.findall(r"^(\S+): (.*)\n  answer    (.*)\n  expected  (.*)\n  first token after \d+ ms$", done.stdout, re.MULTILINE)
    assert answers == [(row["image"], row["prompt"], row["answer"], row["answer"]) for row in rows] and len(answers) == 3
    assert done.stderr == ""


def test_what_it_says_to_type_next_can_be_typed(done: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    first, *others = commands(done.stdout)
    asked = run(*first, cwd=tmp_path)
    assert (asked.returncode, asked.stdout) == (0, "purple\n"), asked.stderr
    assert [words[0] for words in others] == ["convert", "run"]
    for command, *words in others:
        parsers(command)[0].parse_args(words)
    assert 'pip install "' in done.stdout  # there is no PyTorch


def test_where_pytorch_is_installed_nothing_is_to_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert main(["demo"]) == 0
    assert "pip install" not in capsys.readouterr().out


def test_a_wrong_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(demo.QUESTIONS.read_text().replace('"17"', '"18"'))
    monkeypatch.setattr(demo, "QUESTIONS", questions)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert "1 of 3 answers are not the expected ones; run: fastvlm-edge doctor " in err and "Next" not in out


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in demo.HOME.rglob("*") if path.is_file()) < 6e6
