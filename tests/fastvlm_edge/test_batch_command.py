"""`fastvlm-edge batch` with the demo model: the whole command, what it refuses, kills and signals, a full disk."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge.batch.results import Results
from fastvlm_edge.batch.rows import shard_of
from fastvlm_edge.cli import main
from fastvlm_edge.commands import batch as command_module
from fastvlm_edge.commands import demo
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.progress import SilentProgress
from tests.fastvlm_edge.batch.test_rows import write_lines, write_tar
from tests.fastvlm_edge.test_run import never_loads  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(demo.MODEL)
PICTURES = [demo.HOME / f"{name}.jpg" for name in ("shapes", "meter", "sign")]
COLOUR, ANSWER = "What colour is the circle?", "purple"


def batch(*arguments: str | Path) -> int:
    return main(["batch", MODEL, *map(str, arguments)])


def rows_in(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by their id, which must be unique."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows), "a row is there twice"
    return {row["id"]: row for row in rows}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The three demo pictures, one of them deeper."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for path in PICTURES:
        shutil.copy(path, folder / "more" if path.stem == "sign" else folder)
    return folder


def many(path: Path, count: int) -> Path:
    """JSON lines with questions about the demo pictures."""
    return write_lines(path, *({"id": f"q{n}", "image": str(PICTURES[n % 3]), "prompt": f"{n}. What is it?"} for n in range(count)))


def test_a_folder_then_a_new_picture_then_nothing_to_do(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, summary = tmp_path / "out.jsonl", tmp_path / "summary.json"
    command = (folder, "-o", out, "--prompt", COLOUR, "--summary", summary)
    assert batch(*command) == 0
    rows = rows_in(out)
    assert rows.keys() == {"shapes.jpg", "meter.jpg", "more/sign.jpg"}
    assert rows["shapes.jpg"]["text"] == ANSWER
    found = json.loads(summary.read_text())
    assert (found["rows"], found["answers"], found["errors"], found["done_before"], found["rows_in_file"]) == (3, 3, {}, 0, 3)
    assert found["tokens"] == sum(row["timings"]["new_tokens"] for row in rows.values())
    assert 3 / (found["seconds"] + 0.001) < found["pictures_per_second"] < 3 / (found["seconds"] - 0.001), "but for rounding"
    told = capsys.readouterr()
    assert told.out == "" and "3 answers in 0:0" in told.err and "at a time" in told.err

    shutil.copy(PICTURES[0], folder / "new.jpg")
    assert batch(*command) == 0
    assert rows_in(out).keys() == rows.keys() | {"new.jpg"} and rows_in(out)["shapes.jpg"] == rows["shapes.jpg"]
    assert json.loads(summary.read_text())["done_before"] == 3
    assert "3 rows done before" in capsys.readouterr().err


def test_the_model_is_not_loaded_if_everything_is_done(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    out = tmp_path / "out.jsonl"
    assert batch(folder, "-o", out, "--prompt", "x", "-q") == 0
    request.getfixturevalue("never_loads")
    assert batch(folder, "-o", out, "--prompt", "x", "-q") == 0


def test_errors_duplicates_and_trying_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"id": "a", "image": "shapes.jpg", "prompt": COLOUR},
        {"id": "b", "image": "late.jpg"},
        {"id": "a", "image": "meter.jpg", "prompt": "Again?"},
        {"id": "c"},
    ]
    source = write_lines(folder / "q.jsonl", *lines)
    out, summary = tmp_path / "out.jsonl", tmp_path / "summary.json"
    command = (source, "-o", out, "--prompt", COLOUR, "--summary", summary)
    for run in range(2):
        assert batch(*command) == 1
        rows = rows_in(out)
        assert rows["a"]["text"] == ANSWER
        assert (rows["b"]["error"]["kind"], rows["c"]["error"]["kind"]) == ("missing", "input")
        found = json.loads(summary.read_text())
        assert found["duplicate_ids"] == {"count": 1, "first": ["a"]}
        assert found["errors"] == ({"input": 1, "missing": 1} if run == 0 else {})
        assert found["errors_in_file"] == {"input": 1, "missing": 1}
        told = capsys.readouterr().err
        assert "1 row left out, because an earlier row has the same id: a" in told
    shutil.copy(PICTURES[0], folder / "late.jpg")
    assert batch(*command, "--retry-errors") == 1
    assert rows_in(out)["b"]["text"] == ANSWER and json.loads(summary.read_text())["errors_in_file"] == {"input": 1}


def test_nothing_can_be_asked_and_then_it_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    command = (folder, "-o", out, "--max-new-tokens", "1", "-q")
    assert batch(*command) == 1
    assert "the reason of meter.jpg is: no prompt; give the question with --prompt" in capsys.readouterr().err
    assert out.read_bytes() == b""
    assert batch(*command, "--prompt", "x", "--limit", "2") == 0
    for name in ("meter.jpg", "shapes.jpg"):  # they are answered, and no longer needed
        (folder / name).unlink()
    monkeypatch.setattr("fastvlm_edge.batch.rows._LOOKED_FOR", 1)
    assert batch(*command, "--prompt", "x") == 0 and len(rows_in(out)) == 3
    (folder / "more" / "sign.jpg").unlink()
    assert batch(*command, "--prompt", "x") == 0 and len(rows_in(out)) == 3


def test_another_input_with_the_same_ids_does_not_go_on_in_the_same_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    for day, path in zip(("monday", "tuesday"), PICTURES, strict=False):
        (tmp_path / day).mkdir()
        shutil.copy(path, tmp_path / day / "1.jpg")
    out = tmp_path / "out.jsonl"
    options = ("-o", out, "--prompt", "x", "--max-new-tokens", "1", "-q")
    assert batch(tmp_path / "monday", *options) == 0
    before = out.read_bytes()
    request.getfixturevalue("never_loads")
    assert batch(tmp_path / "monday", *options) == 0
    assert batch(tmp_path / "tuesday", *options) == 1
    assert f"the row 1.jpg of {out} is the answer about another picture or prompt" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_the_progress_counts_the_rows_of_this_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not rows of the file that another input had."""
    stages, units = list[int | None](), list[int]()

    class Told(SilentProgress):
        def stage(self, name: str, total: int | None = None, *, speed: bool = False) -> None:
            if name == "answering":
                stages.append(total)

        def advance(self, amount: int = 1) -> None:
            if stages:
                units.append(amount)

    out = tmp_path / "out.jsonl"
    options = ("-o", out, "--max-new-tokens", "1")
    assert batch(many(tmp_path / "q.jsonl", 8), *options, "-q") == 0
    lines = [
        {"id": f"q{n}" if n in (0, 1, 5) else f"r{n}", "image": str(PICTURES[n % 3]), "prompt": f"{n}. What is it?"} for n in range(10)
    ]
    monkeypatch.setattr(command_module, "stderr_progress", Told)
    assert batch(write_lines(tmp_path / "r.jsonl", *lines), *options) == 0
    assert stages == [8] and sum(units) == 8


def test_a_finished_job_whose_pictures_are_gone_has_nothing_to_do(folder: Path, tmp_path: Path) -> None:
    source, out = (
        write_lines(folder / "q.jsonl", {"id": "a", "image": "shapes.jpg"}, {"id": "b", "image": "meter.jpg"}),
        tmp_path / "o.jsonl",
    )
    command = (source, "-o", out, "--prompt", "x", "--max-new-tokens", "1", "-q")
    assert batch(*command) == 0
    shutil.rmtree(folder / "more")
    for name in ("meter.jpg", "shapes.jpg"):
        (folder / name).unlink()
    assert batch(*command) == 0 and len(rows_in(out)) == 2


def test_shards_of_several_machines_are_the_whole(tmp_path: Path) -> None:
    source, found = many(tmp_path / "q.jsonl", 20), []
    for index in (1, 2, 3):
        out = tmp_path / f"out-{index}.jsonl"
        assert batch(source, "-o", out, "--shard", f"{index}/3", "--max-new-tokens", "1", "-q") == 0
        assert all(shard_of(id, 3) == index for id in rows_in(out))
        found += list(rows_in(out))
    assert sorted(found) == sorted(f"q{number}" for number in range(20))


def test_a_structured_answer_from_a_tar_and_a_limit(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{path.stem}.jpg": path.read_bytes() for path in PICTURES})
    out = tmp_path / "out.jsonl"
    assert batch(tar, "-o", out, "--prompt", COLOUR, "--choice", "green", "--choice", "blue", "--limit", "2", "-q") == 0
    assert len(rows_in(out)) == 2 and {row["text"] for row in rows_in(out).values()} <= {"green", "blue"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "Where?"], 'was begun with the prompt "x", but now it is "Where?"'),
        (["--prompt", "x", "--max-new-tokens", "3"], "was begun with the max new tokens 256, but now it is 3"),
        (["--prompt", "x", "--choice", "a", "--choice", "b"], 'was begun with the choices null, but now it is ["a", "b"]'),
        (["--prompt", "x", "--geometry", "crop"], 'was begun with the geometry "pad", but now it is "crop"'),
    ],
)
def test_another_question_does_not_go_on_in_the_same_file(
    options: list[str], says: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out.jsonl"
    assert batch(folder, "-o", out, "--prompt", "x", "--limit", "1", "-q") == 0
    before = out.read_bytes()
    request.getfixturevalue("never_loads")
    assert batch(folder, "-o", out, *options) == 1
    assert says in capsys.readouterr().err and out.read_bytes() == before


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("output", "summary", "says"),
    [
        ("out.jsonl", "out.jsonl", "is the file of the summary and the file of the results; give another file with --summary"),
        ("out.jsonl", "link.json", "is the file of the summary and the file of the results"),
        ("out.jsonl", "out.jsonl.job.json", "is the file of the summary and out.jsonl.job.json, which says how"),
        ("out.jsonl", "q.jsonl", "is the file of the summary and the input"),
        ("q.jsonl", None, "is the file of the results and the input"),
        ("link.jsonl", None, "is the file of the results and the input"),
        ("q", None, "is q.job.json, which says how the results were answered and the input"),
    ],
)
def test_no_file_is_two_things(output: str, summary: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = many(tmp_path / "q.jsonl", 1)
    if output == "q":
        (tmp_path / "q.job.json").symlink_to(source)
    (tmp_path / "out.jsonl").write_text("results")
    (tmp_path / "link.json").symlink_to("out.jsonl")
    (tmp_path / "link.jsonl").symlink_to("q.jsonl")
    before = source.read_bytes()
    options: list[str | Path] = [] if summary is None else ["--summary", tmp_path / summary]
    assert batch(source, "-o", tmp_path / output, *options) == 1
    assert says in capsys.readouterr().err
    assert source.read_bytes() == before and (tmp_path / "out.jsonl").read_text() == "results"


def test_a_summary_that_cannot_be_written_hides_no_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: Any) -> Any:
        raise FastVLMError("the device is lost", "restart it")

    def full(_path: Path) -> Any:
        raise OSError(28, "No space left on device")

    out, summary = tmp_path / "out.jsonl", tmp_path / "summary.json"
    command = (folder, "-o", out, "--prompt", COLOUR, "--max-new-tokens", "1", "--summary", summary)
    monkeypatch.setattr(command_module, "whole_file", full)
    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", broken)
        assert batch(*command) == 1
    told = capsys.readouterr().err
    assert "the device is lost; restart it" in told and f"the summary {summary} cannot be written (No space left on device)" in told
    assert batch(*command) == 0 and len(rows_in(out)) == 3


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone", "-o", "{}/o.jsonl"], "gone does not exist"),
        (["{}/pictures", "-o", "{}/gone/o.jsonl", "--prompt", "x"], "gone does not exist; create this directory"),
        (["{}/pictures", "-o", "{}", "--prompt", "x"], "is a directory"),
        (["{}/pictures", "-o", "{}/o.jsonl", "--prompt", "x", "--shard", "3/2"], "the shard is 3/2; give 1/2 to 2/2"),
        (["{}/pictures", "-o", "{}/o.jsonl", "--prompt", "word " * 5000], "leaves no room for a reply"),
        (["{}/pictures", "-o", "{}/o.jsonl", "--prompt", "x", "--regex", "("], "regex"),
        (["{}/pictures", "-o", "{}/o.jsonl", "--prompt", "x", "--background", "nocolour"], "is not a colour"),
        (["{}", "-o", "{}/o.jsonl", "--prompt", "x", "--images", "{}/gone"], "is not a folder"),
        (["{}/pictures", "-o", "{}/o.jsonl", "--prompt", "x", "--summary", "{}"], "is a directory"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_loads(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(*(argument.replace("{}", str(folder.parent)) for argument in arguments)) == 1
    assert says in capsys.readouterr().err


def test_wrong_usage(folder: Path, tmp_path: Path) -> None:
    assert batch(folder) == 2
    for shard in ("1", "1/", "a/b", "-1/2"):
        assert batch(folder, "-o", tmp_path / "o.jsonl", f"--shard={shard}") == 2


# Stops --------------------------------------------------------------------------------------------------------------------------


def start(*arguments: str | Path, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastvlm_edge", "batch", MODEL, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=limit)


def wait_for_rows(running: subprocess.Popen[str], out: Path, more_than: int) -> None:
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") <= more_than:
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[1]
        time.sleep(0.005)


def check_it_goes_on(out: Path, more: int, *command: str | Path) -> None:
    """Answer `more` rows behind the last one that is done; then the file has each row up to there, once."""
    limit = more + max(int(id[1:]) for id in rows_in(out)) + 1
    assert batch(*command, "--limit", str(limit), "-q") == 0
    found = rows_in(out)
    assert found.keys() == {f"q{number}" for number in range(limit)}
    assert all("text" in row for row in found.values())


def kill_at_random(source: Path, out: Path, kills: int, seconds: float) -> tuple[str | Path, ...]:
    """Kill the command so many times, each a random time after its first new row. Returns its arguments."""
    times = random.Random(kills)
    command = (source, "-o", out, "--max-new-tokens", "8", "--threads", "1")
    for _ in range(kills):
        before = out.read_bytes().count(b"\n") if out.exists() else 0
        running = start(*command)
        wait_for_rows(running, out, before)
        time.sleep(times.uniform(0, seconds))
        reported = out.read_bytes()
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL, "it was finished before"
        assert out.read_bytes().startswith(reported[: reported.rfind(b"\n") + 1])
    return command


def test_three_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = kill_at_random(many(tmp_path / "q.jsonl", 5000), out, kills=3, seconds=0.3)
    check_it_goes_on(out, 20, *command)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = kill_at_random(many(tmp_path / "q.jsonl", 20_000), out, kills=50, seconds=0.8)
    check_it_goes_on(out, 100, *command)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_the_same_command_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    source, out, summary = many(tmp_path / "q.jsonl", 5000), tmp_path / "out.jsonl", tmp_path / "summary.json"
    command = (source, "-o", out, "--max-new-tokens", "8", "--threads", "1", "--summary", summary)
    running = start(*command)
    wait_for_rows(running, out, 3)
    running.send_signal(number)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert "stopped; the same command goes on" in told and f"{len(rows_in(out))} rows in {out}" in told
    assert json.loads(summary.read_text())["answers"] == len(rows_in(out))
    check_it_goes_on(out, 20, *command)


def test_a_full_disk_ends_it_with_an_error_and_it_goes_on_later(tmp_path: Path) -> None:
    source, out = many(tmp_path / "q.jsonl", 30), tmp_path / "out.jsonl"
    command = (source, "-o", out, "--max-new-tokens", "4")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    running = start(*command, limit=limit)
    _, told = running.communicate(timeout=120)
    assert running.returncode == 1 and "is full, or the file may not grow" in told
    assert 5 < len(rows_in(out)) < 30
    assert batch(*command, "-q") == 0
    assert len(rows_in(out)) == 30


def test_a_disk_that_is_gone_ends_it_and_it_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures are gone after the first row."""
    disk = tmp_path / "disk"
    disk.mkdir()
    shutil.copy(PICTURES[0], disk / "a.jpg")
    lines = [{"id": f"q{n}", "image": "disk/a.jpg" if n == 0 else "disk/b.jpg"} for n in range(12)]
    source, out = write_lines(tmp_path / "q.jsonl", *lines), tmp_path / "out.jsonl"
    command = (source, "-o", out, "--prompt", "x", "--max-new-tokens", "1", "--slots", "1", "-q")
    monkeypatch.setattr("fastvlm_edge.batch.results._FAILED", 7)
    assert batch(*command) == 1
    assert "7 rows in a row failed" in capsys.readouterr().err
    assert rows_in(out).keys() <= {f"q{n}" for n in range(12)} and len(rows_in(out)) < 6
    shutil.copy(PICTURES[0], disk / "b.jpg")
    assert batch(*command, "--retry-errors") == 0
    assert len(rows_in(out)) == 12


def test_a_second_process_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = many(tmp_path / "q.jsonl", 5000), tmp_path / "out.jsonl"
    running = start(source, "-o", out, "-q")
    try:
        wait_for_rows(running, out, 1)
        assert batch(source, "-o", out) == 1
        assert f"another process is writing {out}" in capsys.readouterr().err
    finally:
        running.kill()
        running.communicate()
