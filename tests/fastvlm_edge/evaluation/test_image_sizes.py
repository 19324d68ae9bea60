"""`eval --image-size`: one size, all sizes beside each other, and the cascade that is fitted, stored and followed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.cli import main
from fastvlm_edge.commands import eval as command
from fastvlm_edge.evaluation.asking import Answer, AnswerFile
from fastvlm_edge.evaluation.cascade_fit import Answers, follow
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.evaluation.image_sizes import SizeComparison, format_sizes
from fastvlm_edge.evaluation.size_plot import paint_sizes
from fastvlm_edge.evaluation.subject import Subject
from fastvlm_edge.generation.reply import Confidence, Reply
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, Cascade, read_manifest, sha256
from fastvlm_edge.model_dir.verified import remember
from tests.support.fake_model import IMAGE_SIZE, build_model

SIZES = [128, 192, IMAGE_SIZE]
QUESTIONS = 24
LOOSE = "20"
"""Points of a bound that 24 questions can show."""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 questions of two kinds about 12 pictures; what the tiny model says is noise, so every answer is wrong."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(QUESTIONS):
        name = f"{number // 2}.png"
        Image.new("RGB", (64, 48), (20 * (number // 2), 200 - 15 * (number // 2), 90)).save(folder / name)
        rows.append({"image": name, "prompt": f"What is it, {number}?", "answer": "042", "kind": "xy"[number % 2]})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = build_model(tmp_path / "model", other_sizes=SIZES[:-1])
    remember(directory, read_manifest(directory))
    return directory


@pytest.fixture
def subject(model: Path) -> Iterator[Subject]:
    with Subject.load(model, "ort", threads=1, slots=1, image_cache=0) as loaded:
        yield loaded


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size takes what it takes: in a model this small, the measured times are noise."""
    original = SizeComparison.answers

    def answers(self: SizeComparison) -> Answers:
        found = original(self)
        first, whole = (np.tile(times, (len(found), 1)) for times in ([1.0, 3.0, 10.0], [2.0, 4.0, 11.0]))
        return dataclasses.replace(found, first_ms=first, whole_ms=whole)

    monkeypatch.setattr(SizeComparison, "answers", answers)


def arguments(model: Path, questions: Path, *more: str) -> list[str]:
    options = ["--data", str(questions), "--threads", "1", "--backend", "ort", "--max-new-tokens", "4"]
    return ["eval", str(model), *options, *more]


def report_of(model: Path, questions: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(arguments(model, questions, "--json", *more)) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_one_size_is_evaluated_as_it_is_answered(model: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "answers.jsonl"
    report = report_of(model, questions, capsys, "--image-size", "128", "--save", str(saved), "--limit", "3")
    assert report["image_size"] == 128 and report["count"] == 3 and report["perplexity"] > 1
    with FastVLM.load(model, "ort", threads=1) as vlm:
        for row in map(json.loads, saved.read_text().splitlines()):
            reply = vlm.generate(row["prompt"], row["image"], image_size=128, max_new_tokens=4)
            assert row["answer"] == reply.text and row["image_size"] == 128
            assert reply.confidence is not None and row["confidence"] == pytest.approx(dataclasses.asdict(reply.confidence))
    assert report_of(model, questions, capsys, "--limit", "1")["image_size"] == IMAGE_SIZE


def test_every_question_is_answered_at_every_size(subject: Subject, questions: Path) -> None:
    comparison = SizeComparison(subject, open_data(str(questions)), max_new_tokens=4)
    given: list[Answer] = []
    comparison.run(on_answer=given.append)
    answers = comparison.answers()
    assert [answer.image_size for answer in given] == SIZES * QUESTIONS and answers.sizes == SIZES
    assert answers.pictures.tolist() == [number // 2 for number in range(QUESTIONS)]
    assert (answers.first_ms > 0).all() and (answers.whole_ms > answers.first_ms).all()
    for at, (example, image) in enumerate(open_data(str(questions), limit=None).read()):
        for column, size in enumerate(SIZES):
            reply = subject.vlm.generate(str(example.prompt), image, image_size=size, max_new_tokens=4)
            assert given[3 * at + column].reply.token_ids == reply.token_ids
            assert reply.confidence is not None
            assert (answers.mean[at, column], answers.least[at, column]) == pytest.approx((reply.confidence.mean, reply.confidence.least))


@pytest.mark.parametrize("kind", ["mean", "least"])
def test_the_cascade_that_is_computed_is_the_one_that_runs(model: Path, questions: Path, kind: Any) -> None:
    """At a threshold in the middle of what occurs, so that every size answers something."""
    with Subject.load(model, "ort", threads=1, slots=1) as subject:
        comparison = SizeComparison(subject, open_data(str(questions)), max_new_tokens=4)
        given: list[Answer] = []
        comparison.run(on_answer=given.append)
    answers = comparison.answers()
    cascade = Cascade(SIZES, float(np.median(answers.confidence(kind))), kind)
    outcome = follow(answers, cascade)
    assert set(outcome.sizes) == set(SIZES)
    dataclasses.replace(read_manifest(model), cascade=cascade).write(model)
    with FastVLM.load(model, "ort", threads=1) as vlm:
        for at, (example, image) in enumerate(open_data(str(questions)).read()):
            reply = vlm.generate(str(example.prompt), image, image_size="auto", max_new_tokens=4)
            assert reply.image_size is not None and reply.image_size == outcome.sizes[at]
            assert reply.text == given[3 * at + SIZES.index(reply.image_size)].reply.text


@pytest.mark.usefixtures("clock")
def test_a_fitted_cascade_is_written_and_then_evaluated(model: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All answers are wrong at all sizes, so the smallest is enough."""
    assert report_of(model, questions, capsys, "--image-size", "auto")["cascade"] is None
    fitted = report_of(model, questions, capsys, "--image-size", "auto", "--accuracy-drop", LOOSE)
    cascade = read_manifest(model).cascade
    assert cascade is not None and (cascade.sizes, cascade.threshold, cascade.confidence) == ([128], 0.0, "mean")
    assert fitted["cascade"]["held_out"] and fitted["cascade"]["accuracy_drop"] == 20
    assert fitted["cascade"]["answered_at"] == {"128": 1, "192": 0, "256": 0}
    assert [half["sizes"] for half in fitted["cascade"]["halves"]] == [[128], [128]]
    figures = cascade.figures
    assert (figures["data"], figures["data_sha256"], figures["count"]) == (questions.name, sha256(questions), QUESTIONS)
    assert {"toolkit_version", "backend", "date", "machine", "metric"} <= set(figures)
    assert figures["cascade"]["lost_points"] == fitted["cascade"]["lost_points"] and list(figures["sizes"]) == ["128", "192", "256"]
    assert fitted["cascade"]["lost_points_fitted"]["high"] <= 20

    stored = report_of(model, questions, capsys, "--image-size", "auto")
    assert stored["cascade"]["sizes"] == [128] and not stored["cascade"]["held_out"] and "halves" not in stored["cascade"]
    assert stored["count"] == QUESTIONS and set(stored["by_kind"]) == {"x", "y"}
    kind = stored["by_kind"]["x"]
    assert kind["count"] == QUESTIONS / 2 and kind["cascade"]["first_token_share"] == 0.1
    assert kind["sizes"]["192"] == {"accuracy": 0, "first_token_ms": {"mean": 3, "p95": 3}, "answer_ms": 4}
    assert read_manifest(model).cascade == cascade


@pytest.mark.usefixtures("clock")
def test_a_cascade_that_tells_right_from_wrong_is_found(subject: Subject, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest size is right and sure about three pictures of four, and the largest is always right."""
    original = subject.answer

    def answer(prompt: str, source: Path, *about: Any, size: int, **options: Any) -> Reply:
        right = size == IMAGE_SIZE or (size == 128 and int(source.stem) % 4 > 0)
        reply = original(prompt, source, *about, size=size, **options)
        assert reply.logprobs is not None
        sure = [dataclasses.replace(token, logprob=-0.01 if right else -2) for token in reply.logprobs]
        return dataclasses.replace(reply, text="042" if right else "no", confidence=Confidence(*[0.9 if right else 0.2] * 2), logprobs=sure)

    monkeypatch.setattr(subject, "answer", answer)
    comparison = SizeComparison(subject, open_data(str(questions)), max_new_tokens=4)
    comparison.run()
    judged = comparison.fit(20)
    assert judged.cascade.sizes == [128, 256] and judged.cascade.confidence == "least"
    report = comparison.report(judged)
    assert report["cascade"]["answered_at"] == {"128": 0.75, "192": 0, "256": 0.25} and report["cascade"]["accuracy"] == 1
    assert report["sizes"]["128"]["accuracy"] == 0.75
    assert report["cascade"]["first_token_ms"]["mean"] == pytest.approx(0.75 * 2 + 0.25 * (1 + 10))
    text = format_sizes(report)
    under = (math.exp(-0.01) + math.exp(-2)) / 2
    assert f"128 px while the least probability of the answer is under {under:.6g}, then 256 px" in text
    assert "against 256 px, on the halves that it was not fitted to: +0.00 points" in text and "42 % of the mean time" in text
    assert "bound: -20 points" in text

    figure = Figure()
    paint_sizes(figure, report)
    left, right = figure.axes
    assert [each.get_text() for each in left.texts] == ["128 px", "192 px", "256 px", "auto"]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["x", "y"]


def test_too_few_questions_are_an_error_with_the_figures_and_the_number_needed(
    model: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (model / MANIFEST_NAME).read_bytes()
    assert main(arguments(model, questions, "--image-size", "auto", "--accuracy-drop", "0.5", "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert "24 questions do not show" in report["error"]["message"] and "about 555 like these" in report["error"]["message"]
    assert report["count"] == QUESTIONS and report["cascade"] is None and len(report["sizes"]) == 3
    assert (model / MANIFEST_NAME).read_bytes() == before
    assert main(arguments(model, questions, "--image-size", "auto", "--accuracy-drop", "0.5")) == 1
    out, err = capsys.readouterr()
    assert "256 px" in out and "about 555 like these would be enough; auto was not fitted; give more questions" in err


def test_halves_that_contradict_each_other_are_an_error(subject: Subject, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = SizeComparison(subject, open_data(str(questions)), max_new_tokens=1)
    comparison.run()
    for asked in comparison._asked:
        asked.scores[-1] = 1.0
    answers = comparison.answers()
    monkeypatch.setattr("fastvlm_edge.evaluation.image_sizes.fit", lambda *_: Cascade([128], 0.0, "mean"))
    outcome = follow(answers, Cascade([128], 0.0, "mean"))
    monkeypatch.setattr("fastvlm_edge.evaluation.image_sizes.held_out", lambda *_: (outcome, []))
    with pytest.raises(FastVLMError, match=r"loses 100\.00 points on the other, more than 20 points"):
        comparison.fit(20)


def test_ctrl_c_prints_what_there_is_and_fits_nothing(
    model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Answer] = []

    def add(_: AnswerFile, answer: Answer) -> None:
        seen.append(answer)
        if len(seen) == 8:  # within the third question
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "add", add)
    before = (model / MANIFEST_NAME).read_bytes()
    more = ["--image-size", "auto", "--accuracy-drop", LOOSE, "--save", str(tmp_path / "answers.jsonl"), "--json"]
    assert main(arguments(model, questions, *more)) == 130
    report = json.loads(capsys.readouterr().out)
    assert (report["count"], report["partial"], report["cascade"]) == (2, True, None)
    assert (model / MANIFEST_NAME).read_bytes() == before


@pytest.mark.usefixtures("clock")
def test_a_manifest_that_cannot_be_written_loses_no_figure(
    model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise FastVLMError("fastvlm.json cannot be written (No space left on device), and is as it was")

    monkeypatch.setattr(command, "write_cascade", full)
    assert main(arguments(model, questions, "--image-size", "auto", "--accuracy-drop", LOOSE, "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["cascade"]["sizes"] == [128] and "No space left" in report["error"]["message"]


@pytest.mark.usefixtures("clock")
def test_the_table_and_the_drawing_of_the_command(model: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, questions, "--image-size", "auto", "--plot", str(tmp_path / "p"))) == 0
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [["128", "px"], ["192", "px"], ["256", "px"]]
    assert "auto was never fitted, so it takes the default size, 256 px; --accuracy-drop POINTS fits it" in out
    assert sorted(path.name for path in tmp_path.glob("p-*")) == ["p-sizes.png", "p-sizes.svg"] and str(tmp_path / "p-sizes.png") in err
    assert main(arguments(model, questions, "--image-size", "auto", "--accuracy-drop", LOOSE)) == 0
    out = capsys.readouterr().out
    assert "auto: always 128 px" in out and f"{model / MANIFEST_NAME} has this cascade now" in out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--accuracy-drop", "1"], "--accuracy-drop is for --image-size auto"),
        (["--image-size", "128", "--plot", "p"], "--plot is for --image-size auto"),
        (["--image-size", "auto", "--reference", "{model}"], "--reference compares the answers at one size"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_the_model_loads(
    model: Path, questions: Path, more: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Subject, "load", lambda *_, **__: pytest.fail("nothing may be loaded"))
    assert main(arguments(model, questions, *[part.format(model=model) for part in more])) == 1
    out, err = capsys.readouterr()
    assert out == "" and says in err


def test_a_size_that_the_model_does_not_have(model: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, questions, "--image-size", "320")) == 1
    assert "this model takes pictures of 128, 192, 256 px, not 320" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--image-size", "auto", "--accuracy-drop", "-1"], ["--image-size", "large"], ["--image-size", "0"]])
def test_wrong_usage(model: Path, questions: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, questions, *more)) == 2
    assert "argument --" in capsys.readouterr().err


def test_a_model_with_one_size_has_nothing_to_choose_from(model_dir: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model_dir, questions, "--image-size", "auto")) == 1
    assert "has one size of pictures, 256 px, so there is nothing to choose from; convert with several" in capsys.readouterr().err
