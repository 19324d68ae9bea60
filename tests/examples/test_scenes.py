"""The demo's scene generator: reproducible, split cleanly, right about its own pictures, and usable as a command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]

from examples.demo_training.drawing.meters import dial_values  # noqa: E402
from examples.demo_training.drawing.objects import PLURALS  # noqa: E402
from examples.demo_training.drawing.picture import COLOURS, SHAPES, Scene  # noqa: E402
from examples.demo_training.drawing.signs import CODE_CHARACTERS, WORDS  # noqa: E402
from examples.demo_training.scenes import KINDS, OBJECT_KINDS, SPLITS, make_scene, scene_rng  # noqa: E402


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(scene.image)


def test_same_split_seed_and_index_draw_the_same_scene() -> None:
    for kind in KINDS:
        first, again = (make_scene("heldout", 7, 3, kind=kind, questions=4) for _ in range(2))
        assert np.array_equal(pixels(first), pixels(again))
        assert first.questions == again.questions and first.marks == again.marks


def test_splits_seeds_and_indices_have_unrelated_streams() -> None:
    streams = {
        (split, seed, index): scene_rng(split, seed, index).integers(0, 2**63, 4).tobytes()
        for split in SPLITS
        for seed in range(5)
        for index in range(40)
    }
    assert len(set(streams.values())) == len(streams)
    assert not np.array_equal(pixels(make_scene("train", 1, 0)), pixels(make_scene("heldout", 1, 0)))


def test_every_kind_occurs_and_readings_are_the_most_frequent() -> None:
    kinds = Counter(make_scene("train", 0, index, size=64).kind for index in range(400))
    assert set(kinds) == set(KINDS)
    assert kinds.most_common(1)[0][0] == "reading"


@pytest.mark.parametrize("kind", ["reading", "sign", "label"])
def test_text_answers_are_the_characters_drawn_from_left_to_right(kind: str) -> None:
    for index in range(30):
        scene = make_scene("heldout", 1, index, kind=kind)
        question = scene.questions[0]
        assert question.kind == kind and question.answer == scene.text
        assert "".join(mark.name for mark in sorted(scene.marks, key=lambda mark: mark.x)) == scene.text
        assert all(0 <= mark.x < 192 and 0 <= mark.y < 192 for mark in scene.marks), "every character is inside the picture"
        allowed = {"reading": r"\d{1,4}", "sign": "|".join(WORDS), "label": f"[{CODE_CHARACTERS}]{{2,4}}"}[kind]
        assert re.fullmatch(allowed, scene.text)


def test_readings_have_one_to_four_digits_and_can_be_limited() -> None:
    lengths = {len(make_scene("train", 2, index, kind="reading", size=64).text) for index in range(60)}
    assert lengths == {1, 2, 3, 4}
    assert {len(make_scene("train", 2, index, kind="reading", size=64, max_digits=2).text) for index in range(30)} == {1, 2}


def test_dial_answers_are_ticks() -> None:
    answers = {make_scene("train", 3, index, kind="dial", size=64).questions[0].answer for index in range(150)}
    assert answers == set(dial_values())


def test_object_answers_follow_from_the_marks() -> None:
    asked: Counter[str] = Counter()
    for index in range(120):
        scene = make_scene("heldout", 4, index, kind=OBJECT_KINDS[index % 4], questions=4)
        shapes, colours = [mark.name for mark in scene.marks], [mark.colour for mark in scene.marks]
        assert 1 <= len(shapes) <= 6 and set(shapes) <= set(SHAPES) and set(colours) <= set(COLOURS)
        assert len({question.prompt for question in scene.questions}) == len(scene.questions)
        for question in scene.questions:
            asked[question.kind] += 1
            named = [shape for shape in SHAPES if re.search(rf"\b({shape}|{PLURALS[shape]})\b", question.prompt)]
            tinted = [colour for colour in COLOURS if colour in question.prompt]
            match question.kind:
                case "count":
                    expected = shapes.count(named[0]) if named else colours.count(tinted[0]) if tinted else len(shapes)
                    assert question.answer == str(expected)
                case "colour":
                    assert shapes.count(named[0]) == 1 and question.answer == colours[shapes.index(named[0])]
                case "shape":
                    assert colours.count(tinted[0]) == 1 and question.answer == shapes[colours.index(tinted[0])]
                case "position":
                    assert shapes.count(named[0]) == 1
                    mark = scene.marks[shapes.index(named[0])]
                    for word in question.answer.split():
                        assert {"left": mark.x < 96, "right": mark.x > 96, "top": mark.y < 96, "bottom": mark.y > 96}[word]
    assert set(asked) == set(OBJECT_KINDS)


def test_marks_are_where_the_colour_is() -> None:
    """The warp moves picture and marks alike: at the middle of a shape the picture differs from its corner, in the shape's own hue."""
    for index in range(20):
        scene = make_scene("heldout", 5, index, kind="colour", difficulty=0.5)
        for mark in (mark for mark in scene.marks if mark.colour in ("red", "green", "blue")):
            patch = pixels(scene)[int(mark.y) - 3 : int(mark.y) + 4, int(mark.x) - 3 : int(mark.x) + 4].reshape(-1, 3).mean(0)
            assert int(patch.argmax()) == ("red", "green", "blue").index(mark.colour)


def test_sizes_may_be_wide_or_tall() -> None:
    assert make_scene("heldout", 0, 0, size=(320, 192)).image.size == (320, 192)
    assert make_scene("heldout", 0, 0, size=(128, 256), kind="count").image.size == (128, 256)
    assert make_scene("heldout", 0, 0, size=640).image.size == (640, 640)


@pytest.mark.parametrize(("arguments", "message"), [(("test", 0, 0), "split must be one of"), (("train", -1, 0), "must not be negative")])
def test_bad_arguments_are_named(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scene(*arguments)


def test_unknown_kind_and_tiny_size_are_named() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        make_scene("train", 0, 0, kind="poem")
    with pytest.raises(ValueError, match="at least 64 px"):
        make_scene("train", 0, 0, size=32)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.demo_training.scenes", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_command_writes_pictures_and_questions(tmp_path: Path) -> None:
    result = run_command("--seed", "9", "--count", "6", "--out", str(tmp_path / "new" / "pictures"))
    assert result.returncode == 0 and result.stdout == "" and "6/6" in result.stderr
    rows = [json.loads(line) for line in (tmp_path / "new" / "pictures" / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for index, row in enumerate(rows):
        assert set(row) == {"image", "prompt", "answer", "kind"} and row["kind"] in KINDS
        scene = make_scene("heldout", 9, index)
        assert (row["prompt"], row["answer"]) == (scene.questions[0].prompt, scene.questions[0].answer)
        with Image.open(tmp_path / "new" / "pictures" / row["image"]) as image:
            assert np.array_equal(np.asarray(image), pixels(scene))


def test_command_fails_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_command("--seed", "1", "--count", "1", "--out", str(tmp_path / "file" / "pictures"))
    assert result.returncode == 1 and result.stderr.startswith("scenes: ") and len(result.stderr.splitlines()) == 1
    assert run_command("--seed", "1", "--count", "0", "--out", str(tmp_path)).returncode == 2
