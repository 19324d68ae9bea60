"""The drawings of `fastvlm-edge bench --plot`: which files, what is in them, and what is refused."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from fastvlm_edge import FastVLMError
from fastvlm_edge.bench.plot import accuracy_points, draw, draw_decode, draw_slots, draw_ttft
from fastvlm_edge.bench.record import Samples, document_of, write_json
from fastvlm_edge.cli import main

PARTS = {"preprocess_ms": 20.0, "vision_ms": 1400.0, "prefill_ms": 500.0, "first_sample_ms": 1.0}
WARM = {"warm_prefill_ms": 60.0, "warm_first_sample_ms": 1.0, "ttft_warm_ms": 62.0, "ttft_cold_ms": 1925.0}


def record_of(image_size: int = 1024, precision: str = "int4", speed: float = 80.0) -> dict[str, Any]:
    samples = Samples()
    samples.begin_process()
    for name, value in (PARTS | WARM | {"load_ms": 900.0}).items():
        samples.add(name, value * image_size / 1024)
    for depth in (290, 1024):
        samples.add(f"decode_tokens_per_second@{depth}", speed * 290 / depth)
    facts = {
        "model": {"directory": f"model-{precision}", "precision": precision, "image_size": image_size, "name": "m"},
        "settings": {"threads": 2},
        "machine": {"cpu": "AMD EPYC", "cores": 2, "date": "2026-01-01"},
        "backend": "ort",
    }
    return document_of(samples, facts, partial=False)


def evaluation_of(precision: str, exact_match: float, model: str = "elsewhere") -> dict[str, Any]:
    return {"model": model, "precision": precision, "exact_match": exact_match, "count": 2000}


def test_the_parts_of_the_first_token_are_stacked_by_resolution() -> None:
    figure = Figure()
    draw_ttft(figure, [record_of(1024), record_of(512), record_of(256)])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["256", "512", "1024"]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    cold = [bar for bar in bars if bar.get_x() < 0]  # the bar of 256 px
    assert [round(bar.get_height(), 2) for bar in cold] == [5.0, 350.0, 125.0, 0.25]
    assert [round(bar.get_y(), 2) for bar in cold] == [0.0, 5.0, 355.0, 480.0]


def test_decoding_is_drawn_against_depth_a_line_for_each_record() -> None:
    figure = Figure()
    draw_decode(figure, [record_of(), record_of(precision="int8")])
    lines: list[Any] = [container.lines[0] for container in figure.axes[0].containers if isinstance(container, ErrorbarContainer)]
    assert [list(line.get_xdata()) for line in lines] == [[290, 1024]] * 2
    assert list(lines[0].get_ydata()) == [80.0, pytest.approx(22.66)]


def test_several_conversations_are_drawn_in_all_and_each(tmp_path: Path) -> None:
    def summary(value: float) -> dict[str, Any]:
        return {"median": value, "min": value, "max": value, "samples": [[value]]}

    entries = [{"slots": n, "tokens_per_second": summary(s), "tokens_per_second_each": summary(s / n)} for n, s in ((1, 10.0), (4, 24.0))]
    figure = Figure()
    draw_slots(figure, [record_of() | {"by_slots": [*entries, {"slots": 8}]}])
    lines: list[Any] = figure.axes[0].get_lines()
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in lines] == [([1, 4], [10.0, 24.0]), ([1, 4], [10.0, 6.0])]
    written = draw(tmp_path / "x", [record_of() | {"by_slots": entries}, record_of(precision="int8")])
    assert [path.name for path in written][-2:] == ["x-slots.png", "x-slots.svg"]


def test_png_and_svg_are_written_and_nothing_else(tmp_path: Path) -> None:
    records = [record_of(size, precision) for size in (512, 1024) for precision in ("int4", "int8")]
    written = draw(tmp_path / "x", records, [evaluation_of("int4", 0.992), evaluation_of("int8", 0.993)])
    names = sorted(f"x-{name}.{kind}" for name in ("ttft", "decode", "accuracy") for kind in ("png", "svg"))
    assert sorted(path.name for path in written) == sorted(path.name for path in tmp_path.iterdir()) == names
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    accuracy = (tmp_path / "x-accuracy.svg").read_text()
    assert "int4" in accuracy and "int8" in accuracy and "2000 questions" in accuracy
    again = {path: path.read_bytes() for path in tmp_path.glob("*.svg")}
    draw(tmp_path / "x", records, [evaluation_of("int4", 0.992), evaluation_of("int8", 0.993)])
    assert again == {path: path.read_bytes() for path in tmp_path.glob("*.svg")}, "the same record gives the same file"


def test_an_evaluation_meets_the_record_of_its_directory_before_that_of_its_precision() -> None:
    records = [record_of(speed=10.0) | {"model": {**record_of()["model"], "directory": "other"}}, record_of(speed=80.0)]
    (point,) = accuracy_points(records, [evaluation_of("int4", 0.5, "model-int4")])
    assert point["tokens_per_second"] == 80.0 and point["accuracy"] == 50.0 and point["ttft_ms"] == 1925.0
    with pytest.raises(FastVLMError, match="belongs to none of the measured models"):
        accuracy_points(records, [evaluation_of("fp16", 0.5)])


def test_records_are_drawn_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"prompt_tokens": 290, "engines": [], "power": {"sensor": None, "reason": "none"}, "state": {"before": {}, "after": {}}}
    for size in (512, 1024):
        record = record_of(size) | facts
        record["machine"]["memory_gib"] = 8
        record["settings"] |= {"processes": 1, "runs": 1}
        write_json(tmp_path / f"{size}.json", record)
    (tmp_path / "eval.json").write_text(json.dumps(evaluation_of("int4", 0.9)))
    files = [str(tmp_path / f"{size}.json") for size in (512, 1024)]
    assert main(["bench", *files, "--plot", str(tmp_path / "p"), "--eval", str(tmp_path / "eval.json")]) == 0
    assert len(list(tmp_path.glob("p-*"))) == 6 and str(tmp_path / "p-ttft.png") in capsys.readouterr().err


def test_without_matplotlib_it_is_named_before_anything_is_measured(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name, name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["bench", str(model_dir), "--plot", str(tmp_path / "x")]) == 1
    assert "--plot needs the package matplotlib, which is not installed" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(FastVLMError, match="No space left on device"):
        draw(tmp_path / "x", [record_of()])
    assert list(tmp_path.iterdir()) == []


def test_a_drawing_that_fails_leaves_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    write_json(tmp_path / "a.json", record_of())
    assert main(["bench", str(tmp_path / "a.json"), "--json", "--plot", str(tmp_path / "p")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "fastvlm-edge bench" and "No space left" in report["error"]["message"]


def test_a_prefix_without_a_name_is_one_sentence(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model_dir), "--plot", "."]) == 1
    assert "--plot . is a directory; add a beginning" in capsys.readouterr().err
