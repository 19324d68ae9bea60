"""The scripts of examples/, each run as a user runs it, with the demo model and pictures that the model has never seen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.cli import main
from fastvlm_edge.convert.pipeline import convert

pytest.importorskip("matplotlib")  # draws the pictures

from examples.demo_training.scenes import make_scene

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "__init__.py")


def run(script: str, *arguments: str | Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, input=typed, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the demo model in two precisions, `fp32` and `int4`."""
    directory = tmp_path_factory.mktemp("models")
    for precision in ("fp32", "int4"):
        convert(str(EXAMPLES / "demo" / "fastvlm-demo"), directory / precision, precision=precision)
    return directory


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A picture of a meter, a question about it, and the answer. `fastvlm-edge demo` asks the same."""
    scene = make_scene("heldout", 0, 3, kind="reading")
    path = tmp_path_factory.mktemp("pictures") / "meter.png"
    scene.image.save(path)
    return path, scene.questions[0].prompt, scene.questions[0].answer


def test_ask(models: Path, asked: tuple[Path, str, str]) -> None:
    picture, question, answer = asked
    done = run("ask.py", models / "fp32", picture, question)
    assert (done.returncode, done.stdout) == (0, f"{answer}\n"), done.stderr
    assert re.fullmatch(r"\d+ ms to the first token; \d tokens\n", done.stderr)


def test_stream(models: Path, asked: tuple[Path, str, str]) -> None:
    picture, question, answer = asked
    done = run("stream.py", models / "fp32", picture, question)
    assert (done.returncode, done.stdout) == (0, f"{answer}\n"), done.stderr
    assert re.fullmatch(r"\d+ ms to the first token, then \d+\.\d tokens/s\n", done.stderr)


def test_chat_with_picture(models: Path, asked: tuple[Path, str, str]) -> None:
    picture, question, answer = asked
    done = run("chat_with_picture.py", models / "fp32", picture, typed=f"{question}\n{question}\n\nnever asked\n")
    assert (done.returncode, done.stderr) == (0, "")
    turns = re.findall(r"^> (.*)\n\[(\d+) of \d+ positions used\]$", done.stdout, re.MULTILINE)
    assert len(turns) == 2
    assert turns[0][0] == answer
    assert int(turns[1][1]) > int(turns[0][1])


def test_a_full_context_begins_a_new_conversation(models: Path, asked: tuple[Path, str, str]) -> None:
    picture, question, answer = asked
    done = run("chat_with_picture.py", models / "fp32", picture, typed=f"{'word ' * 5000}\n{question}\n")
    assert done.returncode == 0 and "starting a new conversation" in done.stderr
    assert answer in done.stdout


def test_the_command_batch_gives_the_answers_of_generate(models: Path, asked: tuple[Path, str, str], tmp_path: Path) -> None:
    """In FP32, with several answers generated together."""
    rows = [(f"{number}", str(asked[0]), f"{number}. {asked[1]}") for number in range(18)]
    lines = [json.dumps(dict(zip(("id", "image", "prompt"), row, strict=True))) for row in rows]
    (tmp_path / "q.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert main(["batch", str(models / "fp32"), str(tmp_path / "q.jsonl"), "-o", str(out), "--slots", "3", "--quiet"]) == 0
    found = {row["id"]: (row["text"], row["stop_reason"]) for row in map(json.loads, out.read_bytes().splitlines())}
    with FastVLM.load(models / "fp32", slots=1) as vlm:
        replies = {id: vlm.generate(prompt, image) for id, image, prompt in rows}
    assert found == {id: (reply.text, reply.stop_reason) for id, reply in replies.items()}


def test_compare_two_precisions(models: Path, asked: tuple[Path, str, str]) -> None:
    picture, question, answer = asked
    done = run("compare_two_precisions.py", models / "fp32", models / "int4", picture, question)
    assert done.returncode == 0, done.stderr
    _, first, second, verdict = done.stdout.splitlines()
    for row, precision in ((first, "fp32"), (second, "int4")):
        assert re.fullmatch(rf"{precision} +{precision} +\d+\.\d +\d+ +\d+\.\d  {answer}", row)
    assert verdict == "the same tokens"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_that_is_missing_is_one_line(script: str, asked: tuple[Path, str, str], tmp_path: Path) -> None:
    picture, question, _ = asked
    others: dict[str, list[str | Path]] = {"chat_with_picture.py": [picture]}
    models = [tmp_path / "missing"] * (2 if script.startswith("compare") else 1)
    done = run(script, *models, *others.get(script, [picture, question]))
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*{tmp_path}/missing.*\n", done.stderr)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_is_short_and_listed(script: str) -> None:
    assert script in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) <= 50
    assert f"def test_{script.removesuffix('.py')}(" in Path(__file__).read_text(encoding="utf-8")
