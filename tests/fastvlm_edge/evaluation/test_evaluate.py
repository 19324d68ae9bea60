"""What `eval` measures, on a tiny model whose numbers are checked one step at a time, and on the demo model, which knows its answers."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.cli import main
from fastvlm_edge.evaluation import asking
from fastvlm_edge.evaluation.asking import SHORT_ANSWER, Answer, AnswerFile
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.evaluation.evaluate import Evaluation
from fastvlm_edge.evaluation.metrics import kl_divergence, log_softmax
from fastvlm_edge.evaluation.subject import Subject, check_same_vocabulary
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, sha256
from tests.support.fake_model import TOKEN_COUNT

QUESTION = "What does the meter read?"
CHECKPOINT = Path(__file__).resolve().parents[3] / "examples" / "demo" / "fastvlm-demo"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, name in enumerate(("a", "b", "c", "d", "e")):
        Image.new("RGB", (64, 48), (40 * index, 200 - 30 * index, 90)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def questions(pictures: Path) -> Path:
    """Five, of which `a` is asked about twice; what the tiny model says is noise, so every answer is wrong."""
    rows = [
        {"image": f"{name}.png", "prompt": QUESTION, "answer": "042", "kind": kind} for name, kind in zip("aabcd", "xyxyx", strict=True)
    ]
    path = pictures / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from fastvlm_edge.convert.pipeline import convert

    output = tmp_path_factory.mktemp("demo") / "fp32"
    convert(str(CHECKPOINT), output, precision="fp32")
    return output


@pytest.fixture
def subject(vlm: FastVLM, model_dir: Path) -> Subject:
    return Subject(model_dir, vlm)


def one_by_one(subject: Subject, prompt: str, image: Image.Image, answer: list[int]) -> np.ndarray:
    """Whole rows of logits along an answer, from single decode steps after a prefill of the whole prompt."""
    backend, encoded = subject.vlm._engine.backend, subject.vlm.encode_image(image)
    backend.reset()
    rows = []
    for part in (subject._prompt_ids(prompt, encoded.rows), *[[token] for token in answer[:-1]]):
        logits = backend.step(part, (encoded.image_features,), want_logits=True).logits
        assert logits is not None
        rows.append(np.array(logits[0]))
    return np.stack(rows)


def test_logits_along_an_answer_are_those_of_decoding_it(subject: Subject, pictures: Path) -> None:
    """Also for an answer of more positions than a call takes, and for one after the other on the same cache."""
    image = Image.open(pictures / "a.png")
    reply = subject.answer(QUESTION, pictures / "a.png", image, max_new_tokens=37)
    assert len(reply.token_ids) == 37
    along = np.concatenate(list(subject.logits_along(reply.token_ids)))
    assert along.shape == (37, TOKEN_COUNT)
    assert along.argmax(axis=-1).tolist() == reply.token_ids
    gold = subject.with_end(subject.tokenizer.encode("It reads 042."))
    second = np.concatenate(list(subject.logits_along(gold)))
    np.testing.assert_allclose(second, one_by_one(subject, QUESTION, image, gold)[:, :TOKEN_COUNT], atol=1e-4)
    np.testing.assert_allclose(along, one_by_one(subject, QUESTION, image, reply.token_ids)[:, :TOKEN_COUNT], atol=1e-4)


def test_a_model_is_its_own_equal(subject: Subject, questions: Path) -> None:
    evaluation = Evaluation(subject, open_data(str(questions)), reference=subject, max_new_tokens=20)
    evaluation.run()
    report = evaluation.report()
    assert (report["token_agreement"], report["kl_divergence"], report["compared_tokens"]) == (1, 0, 100)
    assert report["exact_match"] == 0 and report["count"] == 5 and not report["partial"]


def test_perplexity_is_that_of_the_answers_with_their_end(subject: Subject, questions: Path, pictures: Path) -> None:
    evaluation = Evaluation(subject, open_data(str(questions), limit=2), max_new_tokens=3)
    evaluation.run()
    gold = subject.with_end(subject.tokenizer.encode("042"))
    assert gold[-1] == subject.vlm.manifest.text.stop_ids[0] and len(gold) > 1
    nats = []
    for example, image in open_data(str(questions), limit=2).read():
        assert example.prompt is not None
        logits = one_by_one(subject, example.prompt, image, gold)
        nats += (-log_softmax(logits)[np.arange(len(gold)), gold]).tolist()
    assert evaluation.report()["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)


def test_agreement_and_divergence_run_along_the_answer_of_the_reference(
    model_dir: Path, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model whose logits lean to another token at every third position."""
    with Subject.load(model_dir, "ort", threads=1) as reference, Subject.load(model_dir, "ort", threads=1) as model:
        original = model.logits_along
        seen: list[list[int]] = []
        divergences: list[float] = []

        def lean(answer: list[int]) -> Iterator[np.ndarray]:
            (logits,) = original(answer)
            seen.append(list(answer))
            leaning = logits.copy()
            leaning[::3, 7] = logits.max(axis=-1)[::3] + 2
            if len(answer) == 12:
                divergences.extend(kl_divergence(logits, leaning))
            yield leaning

        monkeypatch.setattr(model, "logits_along", lean)
        evaluation = Evaluation(model, open_data(str(questions)), reference=reference, max_new_tokens=12)
        evaluation.run()
        replies = [
            reference.vlm.generate(QUESTION, cast(Any, e.image), max_new_tokens=12).token_ids for e, _ in open_data(str(questions)).read()
        ]
    assert [answer for answer in seen if len(answer) == 12] == replies
    report = evaluation.report()
    assert report["token_agreement"] == pytest.approx(8 / 12)
    assert report["kl_divergence"] == pytest.approx(np.mean(divergences), abs=1e-5)
    assert np.mean(divergences) > 0.1


def test_a_picture_asked_about_twice_in_a_row_is_encoded_once(subject: Subject, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = subject.vlm.encode_image
    monkeypatch.setattr(subject.vlm, "encode_image", lambda image, **size: calls.append(image) or original(image, **size))
    Evaluation(subject, open_data(str(questions)), max_new_tokens=2).run()
    assert len(calls) == 4


def test_scores_by_kind_and_the_metric_of_a_published_set(subject: Subject, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"imgname": "a.png", "query": "How many?", "label": "100"}, {"imgname": "b.png", "query": "How many?", "label": "7"}]
    (pictures / "val_human.json").write_text(json.dumps(rows))
    asked: list[str] = []

    original = subject.answer

    def answer(prompt: str, *about: Any, **options: Any) -> Reply:
        asked.append(prompt)
        return dataclasses.replace(original(prompt, *about, **options), text="97")

    monkeypatch.setattr(subject, "answer", answer)
    evaluation = Evaluation(subject, open_data(str(pictures / "val_human.json")), max_new_tokens=2)
    evaluation.run()
    report = evaluation.report()
    assert asked == ["How many?" + SHORT_ANSWER] * 2 and report["suffix"] == SHORT_ANSWER
    assert report["metric"] == "relaxed_accuracy" and report["relaxed_accuracy"] == 0.5  # 97 is within 5 % of 100
    assert report["exact_match"] == 0 and report["by_kind"]["human"]["relaxed_accuracy"] == 0.5


def test_what_cannot_be_asked_is_skipped(subject: Subject, pictures: Path) -> None:
    good = {"image": "a.png", "prompt": QUESTION, "answer": "1"}
    rows = [good] * 5 + [
        {"image": "a.png", "prompt": QUESTION},
        {"image": "a.png", "answer": "1"},
        {"image": "gone.png", "prompt": QUESTION, "answer": "1"},
        {"image": "a.png", "prompt": "word " * 3000, "answer": "1"},
    ]
    (pictures / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = Evaluation(subject, open_data(str(pictures / "some.jsonl")), max_new_tokens=2)
    evaluation.run()
    report = evaluation.report()
    assert (report["count"], report["skipped"]) == (5, 4)
    reasons = [item["reason"] for item in report["skipped_examples"]]
    assert reasons[:2] == ["no answer", "no question"]
    assert "gone.png does not exist" in reasons[2] and "leaves no room" in reasons[3]


def other_vocabulary(model_dir: Path, target: Path, change: Callable[[dict[str, Any], Path], None]) -> Path:
    shutil.copytree(model_dir, target)
    document = json.loads((target / MANIFEST_NAME).read_text())
    change(document, target)
    (target / MANIFEST_NAME).write_text(json.dumps(document))
    return target


def test_a_reference_of_another_vocabulary_is_refused(model_dir: Path, tmp_path: Path) -> None:
    def fewer(document: dict[str, Any], _: Path) -> None:
        document["text"]["token_count"] -= 1

    def renamed(document: dict[str, Any], directory: Path) -> None:
        path = directory / "tokenizer.json"
        path.write_text(path.read_text().replace("<unused0>", "<unusedX>"))
        document["files"]["tokenizer.json"] = {"sha256": sha256(path), "bytes": path.stat().st_size}

    def reformatted(document: dict[str, Any], directory: Path) -> None:
        path = directory / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text())))
        document["files"]["tokenizer.json"] = {"sha256": sha256(path), "bytes": path.stat().st_size}

    with Subject.load(model_dir, "ort", threads=1) as model:
        for name, change, says in (("fewer", fewer, "has 499 tokens and .* has 500"), ("renamed", renamed, "different tokenizers")):
            other = other_vocabulary(model_dir, tmp_path / name, change)
            with Subject.load(other, "ort", threads=1) as reference, pytest.raises(FastVLMError, match=says):
                check_same_vocabulary(reference, model)
        with Subject.load(other_vocabulary(model_dir, tmp_path / "same", reformatted), "ort", threads=1) as reference:
            check_same_vocabulary(reference, model)


# The command line


def arguments(model: Path, questions: Path, *more: str) -> list[str]:
    return ["eval", str(model), "--data", str(questions), "--threads", "1", "--backend", "ort", "--max-new-tokens", "4", *more]


def test_the_demo_model_is_right_about_the_demo(
    demo_model: Path, demo_scenes: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(demo_scenes("heldout", 12))
    assert main(["eval", str(demo_model), "--data", data, "--reference", str(demo_model), "--threads", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == "" and out.count("\n") == 1
    assert report["exact_match"] >= 0.9 and report["count"] == 12 and report["skipped"] == 0
    assert sum(scores["count"] for scores in report["by_kind"].values()) == 12
    assert all(0 <= scores["exact_match"] <= 1 for scores in report["by_kind"].values())
    assert 1 <= report["perplexity"] < 1.5 and report["token_agreement"] == 1
    assert report["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert {key: report[key] for key in ("model", "precision", "backend", "format", "metric", "partial")} == {
        "model": str(demo_model),
        "precision": "fp32",
        "backend": "ort",
        "format": "jsonl",
        "metric": "exact_match",
        "partial": False,
    }


def test_a_table_for_people_and_progress_beside_it(model_dir: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model_dir, questions, "--reference", str(model_dir))) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["count", "exact", "match", "anls"]
    assert [row[:2] for row in rows[1:4]] == [["x", "3"], ["y", "2"], ["all", "5"]]
    assert "equal tokens  100.00 %" in out and "5 of 5 questions" in out and "partial" not in out
    assert "answering 5 examples of" in err


def test_every_answer_is_saved(model_dir: Path, questions: Path, tmp_path: Path, vlm: FastVLM, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "answers.jsonl"
    assert main(arguments(model_dir, questions, "--save", str(saved), "--json")) == 0
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(rows) == 5 and json.loads(capsys.readouterr().out)["count"] == 5
    reply = vlm.generate(QUESTION, image=rows[0]["image"], max_new_tokens=4)
    assert (rows[0]["answer"], rows[0]["token_ids"], rows[0]["answers"], rows[0]["kind"]) == (reply.text, reply.token_ids, ["042"], "x")
    assert rows[0]["exact_match"] == 0 and rows[0]["prompt"] == QUESTION
    assert main(arguments(model_dir, questions, "--save", str(saved))) == 1
    assert "already exists and is never overwritten" in capsys.readouterr().err
    assert len(saved.read_text().splitlines()) == 5


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interruption_prints_what_there_is(
    model_dir: Path,
    questions: Path,
    as_json: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Answer] = []

    def add(_: AnswerFile, answer: Answer) -> None:
        answers.append(answer)
        if len(answers) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "add", add)
    saved = str(tmp_path / "answers.jsonl")
    assert main(arguments(model_dir, questions, "--save", saved, *(["--json"] if as_json else []))) == 130
    out = capsys.readouterr().out
    if as_json:
        report = json.loads(out)
        assert (report["count"], report["partial"], report["examples"]) == (2, True, 5)
    else:
        assert "2 of 5 questions; partial: the run was stopped before the end" in out


def test_extreme_examples_do_not_end_the_evaluation(
    model_dir: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("1", (5_000, 50)).save(tmp_path / "strip.png")
    good = {"image": [str(pictures / "a.png")], "prompt": QUESTION, "answer": "042"}
    bad = [{"image": "strip.png"}, {"id": "\ud800", "prompt": "\ud800"}, {"id": "long", "prompt": "a " * 100_000}]
    source = tmp_path / "questions.jsonl"
    source.write_text("".join(json.dumps(good | row) + "\n" for row in [{}, *bad, {}, {}]))
    assert main(arguments(model_dir, source, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["count"], report["skipped"], report["partial"]) == (3, 3, False)
    assert [item["id"] for item in report["skipped_examples"]] == ["line 2", "?", "long"]
    assert "strip.png has 5000 x 50 pixels; its aspect ratio" in report["skipped_examples"][0]["reason"]


def test_an_error_on_the_way_prints_what_there_is(
    model_dir: Path, questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = Subject.answer, []

    def answer(self: Subject, *about: Any, **options: Any) -> Reply:
        asked.append(about)
        if len(asked) == 4:
            raise FastVLMError("the model's output is not finite")
        return original(self, *about, **options)

    monkeypatch.setattr(Subject, "answer", answer)
    assert main(arguments(model_dir, questions, "--json")) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["count"] == 3 and report["partial"] and "not finite" in err
    assert report["error"] == {"message": "the model's output is not finite", "mend": None}


def test_ctrl_c_loses_no_answer(model_dir: Path, pictures: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text(20_000 * (json.dumps({"image": str(pictures / "a.png"), "prompt": QUESTION, "answer": "042"}) + "\n"))
    saved = tmp_path / "answers.jsonl"
    more = [str(many), "--json", "--max-new-tokens", "2", "--threads", "1", "--save", str(saved)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_edge", "eval", str(model_dir), "--data", *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (saved.exists() and saved.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    report = json.loads(out)
    assert process.returncode == 130 and b"Traceback" not in err
    assert report["partial"] and report["count"] in (len(lines := saved.read_text().splitlines()), len(lines) - 1)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--data", "gone.jsonl"], "gone.jsonl does not exist; give a folder of pictures"),
        (["--data", "{folder}"], "has no questions with answers, which eval needs; give a file of questions"),
        (["--images", "gone"], "gone is not a folder; give the folder of the pictures with --images DIR"),
        (["--limit", "0"], "the limit is 0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--reference", "gone"], "gone is not a model directory"),
        (["--save", "{folder}/none/a.jsonl"], "none does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(
    model_dir: Path, questions: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [part.format(folder=questions.parent) for part in more]
    assert main([*arguments(model_dir, questions), *more]) == 1
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert out == "" and says in line and "a bug" not in line


def test_wrong_usage(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model_dir)]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_file_that_cannot_be_closed_leaves_one_json_object(
    model_dir: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.FileIO):
        def close(self) -> None:
            if not self.closed:
                super().close()
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(asking, "open", lambda path, *_, **__: Full(path, "x"), raising=False)
    assert main(arguments(model_dir, questions, "--save", str(tmp_path / "answers.jsonl"), "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["count"] == 5 and "cannot be written (No space left" in report["error"]["message"]


class Disk(io.FileIO):
    """A file on a disk with room for `room` more bytes."""

    room = 1_000_000

    def write(self, data: Any) -> int:
        data = bytes(data)[: Disk.room]
        if not data:
            raise OSError(28, "No space left on device")
        Disk.room -= len(data)
        return super().write(data)


@pytest.mark.parametrize("lines", [0, 2])
def test_a_full_disk_leaves_whole_lines(
    model_dir: Path, questions: Path, tmp_path: Path, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, saved = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert main(arguments(model_dir, questions, "--save", str(whole), "--json")) == 0
    expected = whole.read_bytes().splitlines(keepends=True)[:lines]
    monkeypatch.setattr(asking, "open", lambda path, *_, **__: Disk(path, "x"), raising=False)
    monkeypatch.setattr(Disk, "room", len(b"".join(expected)) + 20)
    capsys.readouterr()
    assert main(arguments(model_dir, questions, "--save", str(saved), "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["error"]["message"] == f"{saved} cannot be written (No space left on device)"
    assert (saved.read_bytes() if lines else saved.exists()) == (b"".join(expected) if lines else False)


def test_save_to_a_link_that_leads_nowhere_is_refused_before_the_work(
    model_dir: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "answers.jsonl"
    saved.symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(Subject, "load", lambda *_, **__: pytest.fail("nothing may be loaded"))
    assert main(arguments(model_dir, questions, "--save", str(saved))) == 1
    assert "already exists and is never overwritten" in capsys.readouterr().err
