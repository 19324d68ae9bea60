"""`--image-size` of the commands: what they answer at, sizes that a model lacks, and a cascade that was never fitted."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from pathlib import Path

import pytest

from fastvlm_edge.cli import main
from fastvlm_edge.commands import demo, serve
from fastvlm_edge.commands.environment import parse
from fastvlm_edge.model_dir.manifest import Cascade, read_manifest
from tests.fastvlm_edge.test_run import never_loads  # noqa: F401
from tests.support.cascade import LARGE, MIDDLE, SIZES, SMALL, build_sizes

METER = str(demo.HOME / "meter.jpg")
QUESTION = "What does it read?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_sizes(tmp_path_factory.mktemp("sizes") / "model"))


@pytest.fixture(scope="module")
def fitted(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model, whose first answer never stands."""
    directory = shutil.copytree(model, tmp_path_factory.mktemp("fitted") / "model")
    dataclasses.replace(read_manifest(directory), cascade=Cascade(SIZES, 1.0, "mean")).write(directory)
    return str(directory)


def test_run_answers_at_the_size(model: str, fitted: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted: list[tuple[str, str, int, list[int]]] = [
        (model, str(SMALL), SMALL, []),
        (model, "auto", LARGE, []),
        (fitted, str(MIDDLE), MIDDLE, []),
        (fitted, "auto", LARGE, SIZES),
    ]
    for directory, asked, size, tried in wanted:
        assert main(["run", directory, "--image", METER, QUESTION, "--image-size", asked, "--max-new-tokens", "4", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["image_size"], found["tried_sizes"]) == (size, tried)


def test_a_cascade_that_was_never_fitted_is_said_once(model: str, fitted: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--image", METER, QUESTION, "--image-size", "auto", "--max-new-tokens", "4"]
    assert main(["run", model, *command]) == 0
    said = capsys.readouterr().err
    assert said.count("never fitted") == 1 and f"fastvlm-edge eval {model} --data FILE --image-size auto --accuracy-drop 0.5" in said
    assert main(["run", fitted, *command]) == 0
    said = capsys.readouterr().err
    assert "never fitted" not in said and "; 64, then 128, then 256 px; " in said


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("command", ["run", "chat", "batch", "watch", "bench", "serve"])
def test_a_size_that_the_model_lacks_is_refused_before_it_loads(
    command: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(METER, tmp_path)
    more = {
        "run": ["--image", METER, QUESTION],
        "batch": [str(tmp_path), "-o", str(tmp_path / "out.jsonl"), "--prompt", QUESTION],
        "watch": [str(tmp_path), "--prompt", QUESTION],
        "serve": ["--port", "0"],
    }
    assert main([command, model, *more.get(command, []), "--image-size", "192"]) == 1
    assert "this model takes pictures of 64, 128, 256 px, not 192" in capsys.readouterr().err


def test_batch_goes_on_only_at_the_same_size(model: str, fitted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out.jsonl"
    pictures.mkdir()
    shutil.copy(METER, pictures)
    command = [str(pictures), "-o", str(out), "--prompt", QUESTION, "--max-new-tokens", "4"]
    assert main(["batch", fitted, *command, "--image-size", "auto"]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["image_size"], row["tried_sizes"]) == (LARGE, SIZES)
    assert main(["batch", fitted, *command, "--image-size", "auto"]) == 0
    for other, difference in ((fitted, "the image size"), (model, "the cascade")):
        capsys.readouterr()
        size = [] if other == fitted else ["--image-size", "auto"]
        assert main(["batch", other, *command, *size]) == 1
        assert f"was begun with {difference}" in capsys.readouterr().err


def test_a_line_of_watch_has_the_size(fitted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(METER, tmp_path)
    (tmp_path / "more").mkdir()
    command = ["watch", fitted, str(tmp_path), "--prompt", QUESTION, "--image-size", "auto", "--max-new-tokens", "4", "--max-frames", "1"]

    late = threading.Timer(1, shutil.copy, (METER, tmp_path / "new.jpg"))
    late.start()
    assert main(command) == 0
    late.join()
    found = json.loads(capsys.readouterr().out)
    assert (found["image_size"], found["tried_sizes"]) == (LARGE, SIZES)


def test_bench_measures_one_size(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        model,
        "--image-size",
        str(MIDDLE),
        "--processes",
        "1",
        "--runs",
        "1",
        "--new-tokens",
        "4",
        "--depths",
        "64",
        "--json",
    ]
    assert main([*command, "--backend", "ort"]) == 0
    found = json.loads(capsys.readouterr().out)
    shown = found["model"]
    assert (shown["image_size"], shown["visual_tokens"], shown["image_sizes"]) == (MIDDLE, 4, SIZES)
    assert found["settings"]["image_size"] == MIDDLE


@pytest.mark.parametrize(("environment", "arguments", "size"), [({}, [], "auto"), ({"FASTVLM_EDGE_IMAGE_SIZE": "512"}, [], 512)])
def test_serve_takes_the_size_from_the_environment_too(environment: dict[str, str], arguments: list[str], size: int | str) -> None:
    assert serve.settings_of(parse(serve.parser(), ["model", *arguments], environment)).image_size == size
