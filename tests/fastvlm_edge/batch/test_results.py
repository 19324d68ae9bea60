"""The file of results: torn lines, another job, two processes, a full disk, errors that are tried again."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge.batch import results as module
from fastvlm_edge.batch.job import Job, sidecar
from fastvlm_edge.batch.results import Results, while_it_works
from fastvlm_edge.errors import FastVLMError

JOB = Job("a int4", "00", "What?", None, "pad", [255, 255, 255], {"max_new_tokens": 8, "stop": []})


def row(id: str, text: str = "yes") -> dict[str, Any]:
    return {"id": id, "text": text}


def failed(id: str, kind: str = "missing") -> dict[str, Any]:
    return {"id": id, "error": {"kind": kind, "message": "gone"}}


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with three rows, one of them an error."""
    path = tmp_path / "out.jsonl"
    with Results(path, JOB) as results:
        for each in (row("a"), failed("b"), row("c", "\u00e4\n\u2028")):
            assert results.write(each)
    return path


def test_rows_are_in_the_file_at_once_and_known_again(path: Path) -> None:
    assert [each["id"] for each in rows_in(path)] == ["a", "b", "c"]
    with Results(path, JOB) as results:
        assert (results.rows, results.errors) == (3, {"missing": 1})
        assert [results.claim(id) for id in ("a", "d", "a", "d", "c")] == ["done", "new", "twice", "twice", "done"]
        assert results.write(row("d")) and rows_in(path)[-1] == row("d")
        assert not results.write(row("d", "again")) and not results.write(row("a", "again"))
        assert results.rows == 4
    assert [each["id"] for each in rows_in(path)] == ["a", "b", "c", "d"]


def test_a_line_that_was_not_written_completely_is_removed(path: Path) -> None:
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        with Results(path, JOB) as results:
            assert (results.rows, results.claim("c")) == (2, "new")
        assert path.read_bytes() == whole[:last]


@pytest.mark.parametrize("tail", [bytes(4096), b"\0\n\0\0", b'{"id": 3}\n{"id"', b"\xff\n"])
def test_what_a_power_cut_leaves_behind_the_last_row_is_removed(path: Path, tail: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with Results(path, JOB) as results:
        assert results.rows == 3
        results.write(row("d"))
    assert path.read_bytes().startswith(whole) and rows_in(path)[3:] == [row("d")]


def test_a_damaged_line_between_rows_is_named_and_nothing_is_changed(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], b"not a row\n", *lines[1:]])
    path.write_bytes(damaged)
    with pytest.raises(FastVLMError, match=r"out.jsonl, line 2 is not a row of results; remove the line"):
        Results(path, JOB)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model_sha256": "11"}, 'the model "a int4 with sha256 00...", but now it is "a int4 with sha256 11..."'),
        ({"prompt": "Where?"}, 'the prompt "What?", but now it is "Where?"'),
        ({"prompt": None}, 'the prompt "What?", but now it is null'),
        ({"system": ""}, 'the system null, but now it is ""'),
        ({"geometry": "crop"}, 'the geometry "pad", but now it is "crop"'),
        ({"image_size": 512}, "the image size null, but now it is 512"),
        ({"image_size": "auto", "cascade": {"sizes": [256, 512]}}, 'the image size null, but now it is "auto"'),
        ({"background": [0, 0, 0]}, "the background [255, 255, 255], but now it is [0, 0, 0]"),
        ({"sampling": {"max_new_tokens": 9, "stop": []}}, "the max new tokens 8, but now it is 9"),
        ({"sampling": {"max_new_tokens": 8, "stop": [], "regex": "[0-9]+"}}, 'the regex null, but now it is "[0-9]+"'),
    ],
)
def test_another_job_does_not_go_on_in_the_file(path: Path, changed: dict[str, Any], says: str) -> None:
    before = path.read_bytes()
    with pytest.raises(FastVLMError) as error:
        Results(path, replace(JOB, **changed))
    assert says in str(error.value) and str(path) in str(error.value)
    assert path.read_bytes() == before
    assert replace(JOB, **changed).digest() != JOB.digest()


def test_a_file_from_before_there_were_sizes_goes_on(path: Path) -> None:
    job = json.loads(sidecar(path).read_text(encoding="utf-8"))
    del job["image_size"], job["cascade"]
    sidecar(path).write_text(json.dumps(job), encoding="utf-8")
    with Results(path, JOB) as results:
        assert results.rows == 3


def test_a_model_under_another_name_is_the_same(path: Path) -> None:
    with Results(path, replace(JOB, model="b int4")) as results:
        assert results.rows == 3


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "a"}\n')
    with pytest.raises(FastVLMError, match=r"other\.jsonl\.job\.json, which says how its rows were answered, is not beside it"):
        Results(other, JOB)
    assert other.read_text() == '{"id": "a"}\n'
    sidecar(path).write_text("{")
    with pytest.raises(FastVLMError, match="is damaged"):
        Results(path, JOB)
    with pytest.raises(FastVLMError, match="cannot be written"):
        Results(tmp_path / "gone" / "a.jsonl", JOB)
    with pytest.raises(FastVLMError, match="cannot be written"):
        Results(tmp_path, JOB)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FastVLMError, match="is not a file"):
        Results(tmp_path / "pipe", JOB)


def test_an_empty_file_begins_a_new_job(path: Path) -> None:
    path.write_bytes(b"")
    with Results(path, replace(JOB, prompt="Where?")) as results:
        results.write(row("a"))
    with Results(path, replace(JOB, prompt="Where?")) as results:
        assert results.rows == 1


def test_a_file_of_errors_begins_another_job_if_they_are_tried_again(path: Path) -> None:
    other = replace(JOB, prompt="Where?")
    with pytest.raises(FastVLMError, match="was begun with the prompt"):
        Results(path, other, retry_errors=True)  # it has answers
    assert len(rows_in(path)) == 3
    path.write_text(json.dumps(failed("a")) + "\n" + json.dumps(failed("b")) + "\n")
    with pytest.raises(FastVLMError, match="was begun with the prompt"):
        Results(path, other)
    with Results(path, other, retry_errors=True) as results:
        assert (results.rows, path.read_bytes()) == (0, b"")
        results.write(row("a"))
    with Results(path, other) as results:
        assert results.rows == 1


def test_only_one_process_writes_the_file(path: Path) -> None:
    with Results(path, JOB) as results:
        for retry in (False, True):
            with pytest.raises(FastVLMError, match=f"another process is writing {path}"):
                Results(path, JOB, retry_errors=retry)
        results.write(row("d"))
    Results(path, JOB).close()


def test_errors_are_removed_to_be_tried_again(path: Path) -> None:
    before = path.stat().st_ino
    with Results(path, JOB, retry_errors=True) as results:
        assert [each["id"] for each in rows_in(path)] == ["a", "c"]
        assert (results.rows, dict(results.errors), results.claim("b"), results.claim("a")) == (2, {}, "new", "done")
        with pytest.raises(FastVLMError, match="another process"):
            Results(path, JOB)
        results.write(row("b"))
    assert path.stat().st_ino != before
    assert [each["id"] for each in rows_in(path)] == ["a", "c", "b"]
    assert sorted(each.name for each in path.parent.iterdir()) == ["out.jsonl", "out.jsonl.job.json"]
    before = path.stat().st_ino
    Results(path, JOB, retry_errors=True).close()
    assert path.stat().st_ino == before  # nothing to remove


def test_whoever_waited_for_a_file_that_was_replaced_takes_the_new_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between `open` and `flock`, another process finishes a --retry-errors."""
    original, times = fcntl.flock, list[int]()

    def flock(file: int, operation: int) -> None:
        if not times:
            new = path.with_name("new")
            new.write_bytes(path.read_bytes())
            new.replace(path)
        times.append(file)
        original(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Results(path, JOB) as results:
        results.write(row("d"))
    assert len(times) == 2
    assert rows_in(path)[-1] == row("d")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond this size fail, as on a full disk: a part of the data is written before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_leaves_all_earlier_rows(path: Path) -> None:
    before = path.read_bytes()
    with Results(path, JOB) as results:
        with largest_file(len(before) + 10):
            with pytest.raises(FastVLMError, match="is full, or the file may not grow; free some space"):
                results.write(row("d"))
            assert path.read_bytes() == before
            assert results.rows == 3
        assert results.write(row("d"))  # there is space again
    assert rows_in(path)[3:] == [row("d")]


def test_a_full_disk_while_errors_are_removed_leaves_the_file(path: Path) -> None:
    before = path.read_bytes()
    with largest_file(20), pytest.raises(FastVLMError, match="is full"):
        Results(path, JOB, retry_errors=True)
    assert path.read_bytes() == before
    assert sorted(each.name for each in path.parent.iterdir()) == ["out.jsonl", "out.jsonl.job.json"]


def test_rows_are_synced_soon_even_if_no_other_follows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    original = os.fsync

    def fsync(file: int) -> None:
        original(file)
        synced.set()

    monkeypatch.setattr(module, "SYNC_SECONDS", 0.05)
    with Results(path, JOB) as results:
        monkeypatch.setattr(os, "fsync", fsync)
        assert not synced.wait(0.2)  # nothing to sync
        results.write(row("d"))
        assert synced.wait(5)


def test_a_sync_that_fails_in_the_background_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fsync(_file: int) -> None:
        failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "SYNC_SECONDS", 0.02)
    results = Results(path, JOB)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        results.write(row("d"))
        assert failed.wait(5)
        results._thread.join()
    with pytest.raises(FastVLMError, match="Input/output error"):
        results.write(row("e"))
    with pytest.raises(FastVLMError, match="Input/output error"):
        results.close()


def test_an_answer_about_another_picture_or_prompt_is_not_taken_for_that_of_a_row(path: Path) -> None:
    with Results(path, JOB) as results:
        assert [results.claim("d", "11"), results.claim("e", "22")] == ["new", "new"]
        results.write(row("d"))
        results.write(failed("e"))
    assert rows_in(path)[3:] == [{**row("d"), "asked": "11"}, failed("e")]
    with Results(path, JOB) as results:
        assert [results.claim(*each) for each in (("d", "11"), ("e", "33"), ("a", "44"), ("d", "55"))] == ["done", "done", "done", "twice"]
    with (
        Results(path, JOB) as results,
        pytest.raises(FastVLMError, match=f"the row d of {path} is the answer about another picture or prompt"),
    ):
        results.claim("d", "12")


def test_names_that_are_not_utf_8_are_written_and_known_again(path: Path) -> None:
    with Results(path, JOB) as results:
        results.write(row("\udcff.png"))
    with Results(path, JOB) as results:
        assert results.claim("\udcff.png") == "done"


def test_rows_that_all_fail_end_the_batch_and_are_not_written() -> None:
    broken = [failed(str(number), kind) for number, kind in enumerate(["missing", "unreadable", "memory", "model"] * 30)]
    given = [row("a"), *broken[:99], row("b"), *broken[:60], failed("c", "damaged"), *broken[:99]]
    assert list(while_it_works(given)) == given
    answered = while_it_works([row("a"), failed("c", "damaged"), *broken])
    assert [next(answered), next(answered)] == [row("a"), failed("c", "damaged")]
    with pytest.raises(FastVLMError, match="100 rows in a row failed, 0 to 99; the last error is: gone; check the disk"):
        next(answered)
