"""`fastvlm-edge run`: where the question and the pictures may stand, what is checked before the model loads, and what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm_edge import FastVLM
from fastvlm_edge.cli import main
from fastvlm_edge.commands import demo, run

MODEL = str(demo.MODEL)
SHAPES, METER, SIGN = (str(demo.HOME / f"{name}.jpg") for name in ("shapes", "meter", "sign"))
QUESTION, ANSWER = "What colour is the circle?", "purple"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that is begun fails the test."""

    def select(*_given: Any, **_options: Any) -> Any:
        raise AssertionError("the backend was loaded")

    monkeypatch.setattr("fastvlm_edge.generation.vlm.select", select)
    monkeypatch.setattr("fastvlm_edge.generation.vlm.verify_model", select)


@pytest.mark.parametrize(
    "arguments",
    [
        [MODEL, QUESTION, "--image", SHAPES],
        [MODEL, "--image", SHAPES, QUESTION],
        [MODEL, "--image", SHAPES, "--threads", "1", QUESTION],
        ["--image", SHAPES, "--threads", "1", MODEL, QUESTION],
        [MODEL, "--image", SHAPES, "--prompt", QUESTION],
        [MODEL, f"--image={SHAPES}", QUESTION],
    ],
)
def test_the_question_may_stand_anywhere(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [QUESTION, "--image", SHAPES, METER],
        ["--image", SHAPES, METER, QUESTION],
        ["--image", SHAPES, "--image", METER, QUESTION],
        ["--image", SHAPES, "--image", METER, "--prompt", QUESTION],
        ["--image", SHAPES, QUESTION, "--image", METER],
    ],
)
def test_several_pictures(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", MODEL, *arguments, "--json"]) == 0
    with FastVLM.load(MODEL, "ort") as vlm:
        expected = vlm.generate(QUESTION, [SHAPES, METER])
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected.token_ids


@pytest.mark.parametrize("system", ["Answer in one word.", ""])
def test_a_system_prompt(system: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", MODEL, QUESTION, "--image", SHAPES, "--system", system, "--json"]) == 0
    with FastVLM.load(MODEL, "ort") as vlm:
        expected = vlm.generate(QUESTION, SHAPES, system=system)
        usual = vlm.generate(QUESTION, SHAPES)
    found = json.loads(capsys.readouterr().out)
    assert found["token_ids"] == expected.token_ids and found["dropped_turns"] == 0
    assert found["timings"]["prompt_tokens"] == expected.timings.prompt_tokens != usual.timings.prompt_tokens


def from_stdin(*arguments: str, stdin: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastvlm_edge", "run", MODEL, QUESTION, "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, stdin=stdin, capture_output=True, text=True, check=False, timeout=120)


def test_a_picture_from_stdin() -> None:
    with open(SHAPES, "rb") as file:
        from_file = from_stdin("--image", "-", stdin=file)
    with subprocess.Popen(["cat", SHAPES], stdout=subprocess.PIPE) as cat:
        from_pipe = from_stdin("--image", "-", stdin=cat.stdout)
    for done in (from_file, from_pipe):
        assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER + "\n", "")


def test_a_picture_from_a_pipe_with_a_name(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', SHAPES, str(pipe)]):
        done = from_stdin("--image", str(pipe), stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER + "\n", "")


def test_stdin_without_a_picture() -> None:
    done = from_stdin("--image", "-", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr == "fastvlm-edge: error: stdin is empty (0 bytes); give an image\n"
    done = from_stdin("--image", "-", "-", stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and "--image - is given twice" in done.stderr
    ours, theirs = os.openpty()
    done = from_stdin("--image", "-", stdin=theirs)
    os.close(ours), os.close(theirs)
    assert done.returncode == 1 and "stdin, which is a terminal" in done.stderr


def test_quiet_prints_the_reply_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", MODEL, "--image", SHAPES, QUESTION, "-q"]) == 0
    assert capsys.readouterr() == (ANSWER + "\n", "")
    assert main(["run", MODEL, "--image", "gone.jpg", QUESTION, "--quiet"]) == 1
    assert "gone.jpg does not exist" in capsys.readouterr().err


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--image", "gone.jpg", "x"], "gone.jpg does not exist; check the path of the image"),
        (["--image", __file__, "x"], "is not an image in a format that Pillow reads"),
        (["--image", "data:image/png;base64,iVBOR", "x"], "is a data: address, which has the picture itself in base64; decode"),
        (["--image", "https://example.org/a.jpg", "x"], "is a URL, and images are not downloaded; download it first"),
        (["--image", "file:///a/b.jpg", "x"], "is a URL, not a path; give the path /a/b.jpg"),
        (["--image", "iVBORw0KGgo" * 90, "x"], "if it is a picture in base64, decode it first, and give the bytes"),
        (["--image", SHAPES, "--background", "nocolour", "x"], "the background 'nocolour' is not a colour"),
        (["--background", "nocolour", "x"], "the background 'nocolour' is not a colour"),
        ([""], "the prompt is empty and there is no image; give a question or an image"),
        (["word " * 3000], "which leaves no room for a reply in the context of 2048; shorten the prompt"),
        (["--image", *[SHAPES] * 300, "x"], "which leaves no room for a reply in the context of 2048; use fewer images"),
        (["half \udc80"], "the text is not valid Unicode"),
        ([METER], "the question is the name of a picture, "),
        (["--image", SHAPES, METER], "the question is the name of a picture, "),
        (["data:image/png;base64,iVBOR"], "the question is only an address, data:image/png;base64,iVBOR; save the picture"),
        (["https://example.org/a.jpg"], "the question is only an address, https://example.org/a.jpg; save the picture"),
        (
            ["x", "--top-k", "5"],
            "--top-k without --temperature: the most likely token is always taken; add --temperature 0.7, or leave it out",
        ),
        (["x", "--top-p", "0.9", "--seed", "1"], "--top-p, --seed without --temperature: the most likely token is always taken"),
        (["x", "--seed", "-1"], "seed is -1; give an integer of at least 0"),
        (["x", "--json-schema", "gone.json"], "the schema gone.json cannot be read"),
        (["x", "--json-schema", METER], "is not JSON"),
        (["x", "--json-schema", "/dev/null"], "the schema /dev/null is not JSON"),
        (["x", "--choice", "a", "--choice", "a"], "the choice 'a' is given twice"),
        (["x", "--choice", ""], "give a string of at least one character"),
        (["x", "--regex", "(?=a)b"], "the regex cannot be used: look-around"),
        (["x", "--logprobs", "2"], "--logprobs without --json: only the JSON object has them; add --json"),
    ],
)
def test_it_is_refused_before_the_model_loads(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", MODEL, *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1 and len(err) < 400


def test_a_model_directory_in_the_place_of_the_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", QUESTION, MODEL]) == 1
    assert f"{MODEL} is a model directory, not a question; run: fastvlm-edge run {MODEL} --image FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([MODEL], "a question is missing: fastvlm-edge run MODEL --image FILE"),
        ([MODEL, "--image", SHAPES], "a question is missing"),
        ([MODEL, "x", "--prompt", "y"], "the question is given twice"),
        ([MODEL, METER, "x"], "2 arguments after MODEL: give pictures with --image, and put the question in quotes"),
        ([MODEL, "What", "is", "this"], "3 arguments after MODEL"),
        ([MODEL, "x", "--choice", "a", "--regex", "a"], "argument --regex: not allowed with argument --choice"),
        ([MODEL, "x", "--json-schema", ""], "argument --json-schema: it is empty"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_sampling_takes_effect_with_a_temperature(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"temperature": 3.0, "top_k": 20, "top_p": 0.9, "seed": 4, "max_new_tokens": 8}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["run", MODEL, "Hello.", "--json", *words]) == 0
    sampled = json.loads(capsys.readouterr().out)["token_ids"]
    assert main(["run", MODEL, "Hello.", "--json", "--temperature", "0", "--top-p", "0.9", "--max-new-tokens", "8"]) == 0
    greedy = json.loads(capsys.readouterr().out)["token_ids"]
    with FastVLM.load(MODEL, "ort") as vlm:
        assert sampled == vlm.generate("Hello.", **options).token_ids != greedy  # type: ignore[arg-type]
        assert greedy == vlm.generate("Hello.", max_new_tokens=8).token_ids


def test_the_reply_has_the_format_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"circle": {"enum": ["red", "purple"]}}, "required": ["circle"], "maxProperties": 1}'
    )

    def printed(*arguments: str) -> str:
        assert main(["run", MODEL, "--image", SHAPES, QUESTION, *arguments]) == 0
        return capsys.readouterr().out

    assert json.loads(printed("--json-schema", str(schema)))["circle"] in ("red", "purple")
    reading, writing = os.pipe()  # as a shell's <(...) gives it: it can be read once
    os.write(writing, schema.read_bytes())
    os.close(writing)
    assert json.loads(printed("--json-schema", f"/dev/fd/{reading}"))["circle"] in ("red", "purple")
    os.close(reading)
    assert printed("--choice", "red", "--choice", ANSWER) == ANSWER + "\n"
    assert printed("--choice", "red") == "red\n"
    assert printed("--regex", "[a-z]{3}", "-q")[3:] == "\n"
    (token,) = json.loads(printed("--regex", "[a-z]+", "--json", "--logprobs", "3"))["logprobs"]
    assert token["text"] == ANSWER and len(token["top"]) == 3


@pytest.mark.parametrize("content", ["null", "false", "3", '{"not": {}}'])
@pytest.mark.usefixtures("never_loads")
def test_a_schema_that_cannot_be_kept(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content)
    assert main(["run", MODEL, "x", "--json-schema", str(path)]) == 1
    assert "the JSON schema" in capsys.readouterr().err


def test_pictures_are_checked_but_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("RGB", (2000, 2000)).save(path)
    options = run.parser().parse_args([MODEL, "--image", str(path), "x"])
    assert run._images(options) == [str(path)]


@pytest.mark.parametrize(("most", "tokens"), [("1", 1), ("9", 1), ("2", 2)])
def test_one_token_has_no_speed(most: str, tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even with the step that ended the reply, which computes no token of it."""
    question = QUESTION if tokens == 1 else "What is on the sign?"
    assert main(["run", MODEL, "--image", SHAPES if tokens == 1 else SIGN, question, "--max-new-tokens", most]) == 0
    summary = capsys.readouterr().err.splitlines()[-1]
    assert summary.startswith(f"[{tokens} token") and ("tokens/s" in summary) == (tokens > 1)


# A clip -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    pytest.importorskip("av", reason="the package av is not installed (the extra camera)")
    from tests.support.videos import write_video

    return write_video(tmp_path / "clip.mp4", [index / 10 for index in range(40)])


def test_a_clip_is_pictures_of_one_question(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastvlm_edge.camera.clip import frames_of_clip

    with FastVLM.load(MODEL, "ort") as vlm:
        for words, frames in (((), 8), (("--frames", "3"), 3)):
            assert main(["run", MODEL, "--video", str(clip), *words, QUESTION, "--json", "--max-new-tokens", "8"]) == 0
            expected = vlm.generate(QUESTION, list(frames_of_clip(clip, frames)), max_new_tokens=8)
            found = json.loads(capsys.readouterr().out)
            assert found["token_ids"] == expected.token_ids
            assert found["timings"]["prompt_tokens"] == expected.timings.prompt_tokens


@pytest.mark.usefixtures("never_loads")
def test_frames_that_do_not_fit_are_never_decoded(clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_edge.camera.clip.upright", lambda _frame: pytest.fail("a frame was decoded"))
    assert main(["run", MODEL, "--video", str(clip), "x", "--frames", "1000", "--system", "word " * 410]) == 1
    assert "40 frames of " in capsys.readouterr().err, "the clip has no more"


@pytest.mark.usefixtures("never_loads")
def test_what_is_wrong_with_a_clip_is_said_before_the_model_loads(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["--video", str(clip), "--image", SHAPES, "x"], "--video and --image were given, but a question is about one of them"),
        (["--frames", "3", "x"], "--frames without --video; name the clip with --video FILE"),
        (["--video", "gone.mp4", "x"], "gone.mp4 cannot be opened as video: No such file or directory"),
        (["--video", SHAPES, "x", "--background", "nocolour"], "the background 'nocolour' is not a colour"),
        (["--video", str(clip), "x", "--frames", "40", "--system", "word " * 410], "40 frames of "),
        (["--video", str(clip), "x", "--frames", "40", "--system", "word " * 410], "; take at most 3"),
        (["--video", str(clip), "x", "--system", "word " * 1900], "; shorten the question, or convert with a larger --context"),
    ):
        assert main(["run", MODEL, *words]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and says in captured.err, (words, captured.err)
