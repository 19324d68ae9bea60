"""A directory or file that is being written appears complete or not at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.model_dir.atomic import whole_file, written_beside

ELSEWHERE = "choose another disk"


def files_in(directory: Path) -> dict[str, str]:
    """Every file below `directory`, hidden ones included, with its text."""
    return {str(path.relative_to(directory)): path.read_text() for path in sorted(directory.rglob("*")) if path.is_file()}


def write_half(path: Path, error: BaseException) -> NoReturn:
    path.write_text("half")
    raise error


def old_directory(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    return tmp_path / "model"


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    output = tmp_path / "missing" / "parents" / "model"
    with written_beside(output, replace=False, elsewhere=ELSEWHERE) as partial:
        (partial / "a").write_text("a")
        assert not output.exists()
        assert partial.parent == output.parent
    assert files_in(tmp_path) == {"missing/parents/model/a": "a"}


def test_the_old_directory_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    output = old_directory(tmp_path)
    with written_beside(output, replace=True, elsewhere=ELSEWHERE) as partial:
        (partial / "new").write_text("new")
        assert files_in(output) == {"old": "old"}
    assert files_in(tmp_path) == {"model/new": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failing_block_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    output = old_directory(tmp_path)
    with pytest.raises(error), written_beside(output, replace=True, elsewhere=ELSEWHERE) as partial:
        write_half(partial / "new", error())
    assert files_in(tmp_path) == {"model/old": "old"}


def test_without_replace_an_existing_directory_is_kept(tmp_path: Path) -> None:
    output = old_directory(tmp_path)
    with (
        pytest.raises(FastVLMError, match=f"could not be written .*; {ELSEWHERE}"),
        written_beside(output, replace=False, elsewhere=ELSEWHERE) as partial,
    ):
        (partial / "new").write_text("new")
    assert files_in(tmp_path) == {"model/old": "old"}


def test_the_old_directory_comes_back_if_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, rename = old_directory(tmp_path), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if target == output and not path.name.endswith("-old"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(FastVLMError, match="busy"), written_beside(output, replace=True, elsewhere=ELSEWHERE) as partial:
        (partial / "new").write_text("new")
    assert files_in(tmp_path) == {"model/old": "old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_remedy(tmp_path: Path, number: int) -> None:
    with pytest.raises(FastVLMError) as caught, written_beside(tmp_path / "model", replace=False, elsewhere=ELSEWHERE) as partial:
        write_half(partial / "a", OSError(number, os.strerror(number)))
    assert caught.value.what == f"the disk of {tmp_path} is full; nothing was left there"
    assert caught.value.mend == f"free some space, or {ELSEWHERE}"
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FastVLMError, match="cannot be written to") as caught,
        written_beside(tmp_path / "file" / "model", replace=False, elsewhere=ELSEWHERE),
    ):
        pytest.fail("the block must not run")
    assert caught.value.mend == ELSEWHERE


def test_the_target_of_a_link_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "disk" / "model")
    with written_beside(link, replace=True, elsewhere=ELSEWHERE) as partial:
        assert partial.parent == tmp_path / "disk"
        (partial / "a").write_text("a")
    assert link.is_symlink()
    assert files_in(tmp_path / "disk") == {"model/a": "a"}


def test_leftovers_of_killed_processes_are_removed_and_those_of_running_ones_kept(tmp_path: Path) -> None:
    writer = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from fastvlm_edge.model_dir.atomic import written_beside
        with written_beside(Path(sys.argv[1]), replace=True, elsewhere="") as partial:
            (partial / "half").write_text("half")
            print(partial.name, flush=True)
            time.sleep(600)
    """)
    output = tmp_path / "model"
    processes = [subprocess.Popen([sys.executable, "-c", writer, output], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        names = []
        for process in processes:
            assert process.stdout is not None
            names.append(process.stdout.readline().strip())
        killed, running = processes
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert {path.name for path in tmp_path.iterdir()} == set(names)
        with written_beside(output, replace=True, elsewhere=ELSEWHERE) as partial:
            (partial / "a").write_text("a")
        assert {path.name for path in tmp_path.iterdir()} == {"model", names[1]}
        running.send_signal(signal.SIGINT)  # an interrupted writer cleans up by itself
        running.wait()
        assert files_in(tmp_path) == {"model/a": "a"}
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for text in ("first", "second"):
        with whole_file(path) as partial:
            partial.write_text(text)
            assert (path.read_text() if path.exists() else None) == (None if text == "first" else "first")
    assert files_in(tmp_path) == {"record.json": "second"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_stays_as_it_was_if_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as partial:
        write_half(partial, error())
    assert files_in(tmp_path) == {"record.json": "old"}


def test_a_block_that_writes_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "record.json"):
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_parents_that_were_created_are_removed_if_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "there").mkdir()
    output = tmp_path / "there" / "engines" / "new" / "target"
    with pytest.raises(error), written_beside(output, replace=True, elsewhere=ELSEWHERE) as partial:
        write_half(partial / "a", error())
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_parents_that_others_use_stay(tmp_path: Path) -> None:
    output = tmp_path / "engines" / "sm86"
    with suppress(ValueError), written_beside(output, replace=True, elsewhere=ELSEWHERE) as partial:
        (output.parent / "sm87").mkdir()
        write_half(partial / "a", ValueError())
    assert list(tmp_path.rglob("*")) == [output.parent, output.parent / "sm87"]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/null")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [pipe, directory, link_to_a_device, link_to_itself])
def test_only_regular_files_are_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "record.json"
    make(path)
    before = path.lstat()
    with pytest.raises(OSError, match=re.escape(path.name)), whole_file(path):
        pytest.fail("the block must not run")
    assert os.path.samestat(path.lstat(), before) and stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize("make", [pipe, link_to_a_device])
def test_only_directories_are_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    output = tmp_path / "model"
    make(output)
    with (
        pytest.raises(FastVLMError, match="is not a directory"),
        written_beside(output, replace=True, elsewhere=ELSEWHERE),
    ):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize("exists", [True, False])
def test_the_target_of_a_link_to_a_file_is_replaced(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target.json", tmp_path / "record.json"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    with whole_file(link) as partial:
        assert partial.parent == target.parent  # renaming works only within one file system
        partial.write_text("new")
    assert link.is_symlink() and target.read_text() == "new" and sorted(tmp_path.rglob("*")) == [target.parent, target, link]


def test_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    killed = subprocess.Popen(["true"])
    killed.wait()
    (tmp_path / f".record.json.{killed.pid}.partial").write_text("half")
    running = tmp_path / f".record.json.{os.getppid()}.partial"
    running.write_text("half")
    with whole_file(path) as partial:
        partial.write_text("new")
    assert files_in(tmp_path) == {running.name: "half", "record.json": "new"}
