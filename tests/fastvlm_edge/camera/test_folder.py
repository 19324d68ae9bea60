"""New pictures of a directory: only those that are finished, in the order in which they were written."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_edge.camera.folder import POLL_SECONDS, FolderReader
from fastvlm_edge.camera.frame import Frame, SourceError
from fastvlm_edge.errors import FastVLMError


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[FolderReader]:
    save(tmp_path / "old.png")
    with_old = FolderReader(str(tmp_path))
    yield with_old
    with_old.close()


def save(path: Path, colour: str = "red", at: float | None = None) -> Path:
    Image.new("RGB", (64, 48), colour).save(path)
    if at is not None:
        os.utime(path, (at, at))
    return path


def read(reader: FolderReader) -> Frame:
    found = reader.read()
    assert found is not None
    return found


def nothing_comes(reader: FolderReader, seconds: float = 6 * POLL_SECONDS) -> bool:
    """Polls as `read` does, which would wait."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reader._poll()
        if reader._waiting:
            return False
        time.sleep(POLL_SECONDS / 4)
    return True


def test_new_pictures_in_their_order(reader: FolderReader, tmp_path: Path) -> None:
    now = time.time()
    save(tmp_path / "b.png", "green", now - 20)
    save(tmp_path / "a.jpg", "blue", now - 10)
    first, second = read(reader), read(reader)
    assert (first.file, second.file) == ("b.png", "a.jpg")
    assert abs(first.time - (now - 20)) < 0.01 and first.position is None
    assert first.picture().getpixel((5, 5)) == (0, 128, 0)
    assert nothing_comes(reader)


def test_a_file_that_grows_is_not_finished(reader: FolderReader, tmp_path: Path) -> None:
    data = save(tmp_path / ".whole.png").read_bytes()
    stop = threading.Event()

    def write() -> None:
        with open(tmp_path / "slow.png", "wb") as file:
            for index in range(len(data)):
                file.write(data[index : index + 1])
                file.flush()
                if stop.wait(2 / len(data)):
                    return

    thread = threading.Thread(target=write)
    thread.start()
    began = time.monotonic()
    try:
        found = read(reader)
    finally:
        took = time.monotonic() - began
        stop.set()
        thread.join()
    assert found.file == "slow.png" and took > 2 and found.picture().size == (64, 48)


def test_other_names_are_left_out(reader: FolderReader, tmp_path: Path) -> None:
    save(tmp_path / ".hidden.png")
    save(tmp_path / "new.png").rename(tmp_path / "new.png.part")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    os.symlink("nowhere", tmp_path / "link.png")
    assert nothing_comes(reader)
    (tmp_path / "new.png.part").rename(tmp_path / "new.png")
    assert read(reader).file == "new.png"


def test_a_picture_that_is_replaced_is_new(reader: FolderReader, tmp_path: Path) -> None:
    for colour, pixel in (("green", (0, 128, 0)), ("blue", (0, 0, 255))):
        save(tmp_path / "old.png", colour)
        found = read(reader)
        assert found.file == "old.png" and found.picture().getpixel((0, 0)) == pixel
    fresh = save(tmp_path / ".fresh.png", "white")
    shutil.copystat(tmp_path / "old.png", fresh)
    fresh.rename(tmp_path / "old.png")
    assert read(reader).picture().getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_that_was_removed_and_comes_back(reader: FolderReader, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    assert read(reader).file == "a.png"
    data, status = path.read_bytes(), path.stat()
    path.unlink()
    assert nothing_comes(reader)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read(reader).file == "a.png"


def test_damaged_and_removed_pictures_say_so_when_they_are_looked_at(reader: FolderReader, tmp_path: Path) -> None:
    whole = save(tmp_path / ".whole.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FastVLMError, match=r"a\.jpg is damaged or truncated"):
        read(reader).picture()
    (tmp_path / "a.jpg").write_bytes(whole)
    assert read(reader).picture().size == (64, 48)
    save(tmp_path / "b.jpg")
    found = read(reader)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(FastVLMError, match=r"b\.jpg does not exist"):
        found.picture()


def test_closing_ends_a_read_that_waits(reader: FolderReader) -> None:
    threading.Timer(0.1, reader.close).start()
    began = time.monotonic()
    assert reader.read() is None and time.monotonic() - began < 2


def test_a_directory_that_is_gone(reader: FolderReader, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    with pytest.raises(SourceError, match="cannot be read: No such file or directory"):
        reader.read()
    with pytest.raises(SourceError, match="cannot be read"):
        FolderReader(str(tmp_path))
    tmp_path.mkdir()
