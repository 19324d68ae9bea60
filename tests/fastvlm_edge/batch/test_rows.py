"""Inputs of a batch: folders, JSON lines, Parquet, WebDataset shards; ids, prompts, shards."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm_edge.batch.rows import Row, Rows, check_askable, open_rows, shard_of
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import ArchivedPicture


def picture(colour: str = "red", format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, format)
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def loaded(row: Row) -> Any:
    """The bytes of the picture of a row."""
    if isinstance(row.image, ArchivedPicture):
        return row.image.load()
    return row.image.read_bytes() if isinstance(row.image, Path) else row.image


def shown(rows: Rows) -> list[tuple[str, str | None, str | None]]:
    return [(row.id, row.prompt, row.reason) for row in rows]


def read_all(source: str | Path, **options: Any) -> None:
    rows = open_rows(source, **options)
    for _ in check_askable(iter(rows), rows.source):
        pass


def refused(source: str | Path, **options: Any) -> str:
    with pytest.raises(FastVLMError) as error:
        read_all(source, **options)
    return str(error.value)


# Folders ------------------------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_pictures_with_relative_paths_as_ids(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "in/c.webp", "in/.hidden.png", ".thumbnails/d.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture())
    rows = open_rows(tmp_path, prompt="What?")
    assert shown(rows) == [("a.JPG", "What?", None), ("b.png", "What?", None), ("in/c.webp", "What?", None)]
    assert shown(rows) == shown(rows)
    assert rows.total == 3
    assert shown(open_rows(tmp_path)) == [(id, None, "no prompt") for id in ("a.JPG", "b.png", "in/c.webp")]
    assert shown(rows.first(2)) == shown(rows)[:2] and rows.first(2).total == 2


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match="has no pictures"):
        _ = open_rows(tmp_path, prompt="x").total


def test_a_folder_that_cannot_be_listed_loses_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "in/b.png"):
        (tmp_path / name).write_bytes(picture())
    original = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "in":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may list every folder
    assert f"{tmp_path / 'in'} cannot be listed (Permission denied)" in refused(tmp_path, prompt="x")


def test_a_folder_with_links_to_folders(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.png").write_bytes(picture())
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / "same").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(folder)
    rows = open_rows(folder, prompt="x")
    assert [row.id for row in rows] == ["a.png", "link/b.png"] and rows.total == 2
    (folder / "own").mkdir()
    (folder / "own" / "c.png").write_bytes(picture())
    (folder / "alias").symlink_to("own")  # the ids of a folder of its own stay when a link to it is added
    assert [row.id for row in rows] == ["a.png", "own/c.png", "link/b.png"]


# JSON lines ---------------------------------------------------------------------------------------------------------------------


def test_json_lines_with_ids_prompts_and_faults(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    path = write_lines(
        tmp_path / "questions.jsonl",
        {"id": "one", "image": "a.png", "prompt": "Own?"},
        {"id": 2, "image": "a.png"},
        "",
        {"image": "a.png", "prompt": ""},
        "{not json",
        {"id": "five"},
        {"id": "six", "image": "a.png", "prompt": 3},
        {"id": "seven", "image": "https://example.org/a.png"},
        "[1]",
        {"id": "nine", "image": "gone.png"},
        {"id": "ten", "image": "a\0.png"},
    )
    rows = list(open_rows(path, prompt="All?"))
    assert [(row.id, row.prompt) for row in rows[:3]] == [("one", "Own?"), ("2", "All?"), ("questions.jsonl:4", "All?")]
    assert [loaded(row) for row in rows[:3]] == [picture()] * 3
    reasons = {row.id: row.reason for row in rows[3:]}
    assert list(reasons) == ["questions.jsonl:5", "five", "six", "seven", "questions.jsonl:9", "nine", "ten"]
    for id, says in {
        "questions.jsonl:5": "not JSON",
        "five": "no picture",
        "six": "its prompt is a int",
        "seven": "is an address",
        "questions.jsonl:9": "a list, not an object",
        "ten": "not a path",
    }.items():
        assert says in (reasons[id] or ""), id
    assert reasons["nine"] is None  # it is looked for when it is needed
    assert open_rows(path).total == 10
    assert [row.reason for row in open_rows(path)][1] == "no prompt"


def test_pictures_are_beside_the_file_or_in_the_folder_given(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture())
    path = write_lines(tmp_path / "q.jsonl", {"id": "1", "image": "a.png", "prompt": "x"})
    assert "none of the first pictures" in refused(path) and "--images DIR" in refused(path)
    found = open_rows(path, images=tmp_path / "pictures")
    assert [loaded(row) for row in found] == [picture()]
    assert [row.id for row in check_askable(iter(found), found.source)] == ["1"]
    assert "is not a folder" in refused(path, images=tmp_path / "gone")
    whole = write_lines(tmp_path / "whole.jsonl", {"id": "1", "image": str(tmp_path / "pictures" / "a.png"), "prompt": "x"})
    assert [loaded(row) for row in open_rows(whole)] == [picture()]


def test_an_input_of_which_nothing_can_be_asked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    assert "none of the first rows" in refused(tmp_path) and "the reason of a.png is: no prompt; give the question" in refused(tmp_path)
    bad, good = {"id": "x", "picture": "a.png"}, {"id": "y", "image": "a.png"}
    path = write_lines(tmp_path / "q.jsonl", *[bad] * 99, good)
    rows = open_rows(path, prompt="x")
    assert [row.id for row in check_askable(iter(rows), "q")] == ["x"] * 99 + ["y"]
    write_lines(path, *[bad] * 100, good)
    assert "the reason of x is: no picture" in refused(path, prompt="x")
    gone = open_rows(write_lines(path, {"id": "z", "image": "gone.png"}), prompt="x")
    assert [row.id for row in check_askable(iter(gone), "q", look=False)] == ["z"]


# Parquet ------------------------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed (the extra batch)")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(dict(columns)), path, **options)
    return path


def test_parquet_with_paths_bytes_and_structs(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("blue"))
    paths = write_parquet(tmp_path / "paths.parquet", {"id": [7, 8], "image": ["a.png", None], "prompt": ["Own?", None]})
    rows = list(open_rows(paths, prompt="All?"))
    assert [(row.id, row.prompt, row.reason) for row in rows] == [("7", "Own?", None), ("8", None, "no picture")]
    assert loaded(rows[0]) == picture("blue")
    encoded = write_parquet(tmp_path / "bytes.parquet", {"image": [picture(), picture("blue")], "other": [1, 2]})
    assert [(row.id, loaded(row)) for row in open_rows(encoded, prompt="x")] == [
        ("bytes.parquet:1", picture()),
        ("bytes.parquet:2", picture("blue")),
    ]
    assert {row.reason for row in open_rows(encoded)} == {"no prompt"}
    structs = [{"bytes": picture(), "path": "z.png"}, {"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, None]
    hub = write_parquet(tmp_path / "hub.parquet", {"image": structs})
    rows = list(open_rows(hub, prompt="x"))
    assert [loaded(row) for row in rows[:2]] == [picture(), picture("blue")]
    assert [row.reason for row in rows] == [None, None, "no picture", "no picture"]
    assert open_rows(hub).total == 4


def test_parquet_is_read_in_parts(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": list(range(100)), "image": [picture()] * 100}, row_group_size=7)
    assert [row.id for row in open_rows(path, prompt="x")] == [str(number) for number in range(100)]


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"picture": ["a.png"]})
    assert "has the columns picture, but no column image" in refused(path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
    assert "cannot be read as Parquet" in refused(tmp_path / "b.parquet")
    whole = write_parquet(tmp_path / "c.parquet", {"image": [bytes(range(256)) * 4000] * 3}, compression="zstd")
    damaged = bytearray(whole.read_bytes())
    damaged[100:400] = bytes(300)
    whole.write_bytes(damaged)
    assert "cannot be read as Parquet" in refused(whole, prompt="x")
    wrong = write_parquet(tmp_path / "d.parquet", {"image": [3], "prompt": [4]})
    assert [row.reason for row in open_rows(wrong)] == ["its picture is a int, not a path or bytes"]


def test_without_pyarrow_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(tmp_path / "a.parquet").startswith("Parquet files need the package pyarrow")


# WebDataset ---------------------------------------------------------------------------------------------------------------------


def test_a_tar_groups_members_by_key(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        {
            "one/a.b.jpg": picture(format="JPEG"),
            "one/a.json": b'{"prompt": "Own?", "id": "ignored"}',
            "one/a.txt": b"a caption",
            "two.png": picture(),
            "two.txt": b" a caption\n",
            "three.txt": b"alone",
            "four.png": picture(),
            "four.json": b"{",
            "README": b"no sample",
        },
    )
    rows = open_rows(path, prompt="All?")
    assert shown(rows)[:2] == [("one/a", "Own?", None), ("two", "All?", None)]
    assert [loaded(row) for row in rows][:2] == [picture(format="JPEG"), picture()]
    assert [row.reason and row.reason[:22] for row in rows] == [None, None, "no picture, only txt", "its text cannot be rea"]
    assert [row.prompt for row in open_rows(path)][:2] == ["Own?", "a caption"]
    assert rows.total is None


def test_links_and_files_with_holes_in_a_tar_are_errors(tmp_path: Path) -> None:
    def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        return member

    path = write_tar(tmp_path / "a.tar", {"a.png": picture()})
    with tarfile.open(path, "a") as archive:
        archive.addfile(link("b.png", tarfile.LNKTYPE, "a.png"))
        archive.addfile(link("c.png", tarfile.SYMTYPE, "a.png"))
        holes = tarfile.TarInfo("d.png")
        holes.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,4", "GNU.sparse.size": "9"}
        holes.size = 4
        archive.addfile(holes, io.BytesIO(b"data"))
        archive.addfile(link("folder.png", tarfile.DIRTYPE, ""))
        text = tarfile.TarInfo("e.png")
        archive.addfile(text)
        archive.addfile(link("e.json", tarfile.SYMTYPE, "a.json"))
    assert [(row.id, row.reason) for row in open_rows(path, prompt="x")] == [
        ("a", None),
        ("b", "b.png is a link in the archive"),
        ("c", "c.png is a link in the archive"),
        ("d", "d.png is not a whole file in the archive"),
        ("e", "e.json is a link in the archive"),
    ]


def test_what_follows_the_end_of_a_tar(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", {"a.png": picture()}).read_bytes()
    two = write_tar(tmp_path / "b.tar", {"b.png": picture()}).read_bytes()
    for tail in (two, bytes(100_000)):
        (tmp_path / "a.tar").write_bytes(one + tail)
        assert "more follows its end" in refused(tmp_path / "a.tar", prompt="x")
    (tmp_path / "a.tar").write_bytes(one + bytes(10240))
    assert [row.id for row in open_rows(tmp_path / "a.tar", prompt="x")] == ["a"]


def test_several_shards_by_pattern_braces_or_folder(tmp_path: Path) -> None:
    for number in range(8, 11):
        write_tar(tmp_path / f"s-{number:03}.tar", {f"{number}.png": picture()})
    for source in (tmp_path, tmp_path / "s-*.tar", tmp_path / "s-{008..010}.tar", tmp_path / "s-0{08,09,10}.tar"):
        assert [row.id for row in open_rows(source, prompt="x")] == ["8", "9", "10"], source
    assert "s-011.tar does not exist; correct" in refused(tmp_path / "s-{008..011}.tar")
    assert "does not exist" in refused(tmp_path / "t-*.tar")
    (tmp_path / "a.png").write_bytes(picture())
    assert "has pictures and shards" in refused(tmp_path) and f'"{tmp_path}/*.tar"' in refused(tmp_path)


def test_a_tar_that_cannot_be_used(tmp_path: Path) -> None:
    write_tar(tmp_path / "empty.tar", {})
    assert "has no samples" in refused(tmp_path / "empty.tar")
    whole = write_tar(tmp_path / "cut.tar", {f"{number}.png": picture() * 20 for number in range(9)}).read_bytes()
    for end in (10240, 10300, 10800, 12000):  # behind a member, in a header, in the data
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        assert "is not a readable, uncompressed tar" in refused(tmp_path / "cut.tar", prompt="x")
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as archive:
        archive.add(__file__)
    assert "uncompress it" in refused(tmp_path / "gz.tar")


def test_a_tar_of_many_members_is_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": b"x" for number in range(500)})
    seen = []
    original = tarfile.TarFile.next

    def counting(self: tarfile.TarFile) -> Any:
        seen.append(len(self.members))  # type: ignore[attr-defined]
        return original(self)

    monkeypatch.setattr(tarfile.TarFile, "next", counting)
    assert len(list(open_rows(path, prompt="x"))) == 500
    assert max(seen) <= 1


def test_one_damaged_file_of_several_is_an_error_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_tar(tmp_path / f"s-{number}.tar", {f"{number}-{each}.png": picture() for each in range(2)})
    damaged = tmp_path / "s-1.tar"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:1024])
    rows = open_rows(tmp_path / "s-*.tar", prompt="x")
    assert [row.id for row in rows] == ["0-0", "0-1", "1-0", "s-1.tar", "2-0", "2-1"]
    assert [row.reason for row in rows if row.reason] == [
        f"{damaged} is not a readable, uncompressed tar (unexpected end of data); copy it again, or uncompress it"
    ]
    for part in (1, 2):
        assert "s-1.tar" in [row.id for row in rows.shard(part, 2)]
    damaged.write_bytes(whole)
    assert [row.id for row in rows] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]

    for number in range(3):
        write_lines(tmp_path / f"q-{number}.jsonl", {"id": str(number), "image": "a.png"})
    (tmp_path / "q-1.jsonl").unlink()
    several, alone = open_rows(tmp_path / "q-*.jsonl", prompt="x"), open_rows(tmp_path / "q-0.jsonl", prompt="x")
    (tmp_path / "q-0.jsonl").unlink()
    assert [(row.id, row.reason) for row in several] == [
        ("q-0.jsonl", f"{tmp_path}/q-0.jsonl cannot be read (No such file or directory); check the disk and the file"),
        ("2", None),
    ]
    assert several.total is None
    with pytest.raises(FastVLMError, match="cannot be read"):
        list(alone)


def test_an_exception_of_pyarrow_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture()]})
    pyarrow = pytest.importorskip("pyarrow")

    def broken(*_arguments: Any, **_options: Any) -> Iterator[Any]:
        yield pyarrow.RecordBatch.from_pylist([{"image": picture()}])
        raise pyarrow.ArrowException("broken")

    rows = open_rows(path, prompt="x")
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", broken)
    with pytest.raises(FastVLMError, match=r"a\.parquet cannot be read as Parquet"):
        list(rows)


def test_equal_names_in_several_folders_give_different_ids(tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "1.png").write_bytes(picture())
        write_lines(tmp_path / day / "q.jsonl", {"image": "1.png"})
        write_lines(tmp_path / day / f"{day}.jsonl", {"image": "1.png"})
    assert [row.id for row in open_rows(tmp_path / "*day", prompt="x")] == ["monday/1.png", "tuesday/1.png"]
    assert [row.id for row in open_rows(tmp_path / "mon*", prompt="x")] == ["monday/1.png"]
    assert [row.id for row in open_rows(tmp_path / "monday", prompt="x")] == ["1.png"]
    assert [row.id for row in open_rows(tmp_path / "*" / "q.jsonl", prompt="x")] == ["monday/q.jsonl:1", "tuesday/q.jsonl:1"]
    assert [row.id for row in open_rows(tmp_path / "*" / "*day.jsonl", prompt="x")] == ["monday.jsonl:1", "tuesday.jsonl:1"]


def test_what_a_row_asks_has_a_digest(tmp_path: Path) -> None:
    """Another picture or prompt gives another one; another place of the input, or another way to name it, does not."""

    def asked(source: Path | str, prompt: str | None = "x") -> str:
        (row,) = open_rows(source, prompt=prompt)
        return row.asked()

    for name in ("monday", "tuesday", "moved/monday"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(picture())
    monday = asked(tmp_path / "monday")
    assert len(monday) == 16
    assert asked(tmp_path / "moved" / "monday") == asked(f"{tmp_path}/monday/../monday/") == monday
    assert monday not in (asked(tmp_path / "tuesday"), asked(tmp_path / "monday", "y"))
    lines = [{"id": "1", "image": "a.png"}, {"id": "1", "image": "b.png"}, {"id": "1", "image": "a.png", "prompt": "y"}]
    assert len({asked(write_lines(tmp_path / "q.jsonl", line)) for line in lines}) == 3
    first = asked(write_tar(tmp_path / "a.tar", {"1.png": picture()}))
    assert first != asked(write_tar(tmp_path / "b.tar", {"1.png": picture()}))
    assert Row("1", b"a", "x").asked() != Row("1", b"b", "x").asked()
    assert Row("1", Path("\udcff.png"), "x").asked() != Row("1", Path("a.png"), "x").asked()


# All --------------------------------------------------------------------------------------------------------------------------


def test_what_is_no_input(tmp_path: Path) -> None:
    assert "does not exist; give a folder of pictures" in refused(tmp_path / "gone")
    (tmp_path / "a.csv").write_text("a,b")
    assert "a.csv has an unknown suffix" in refused(tmp_path / "a.csv")
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is not a file" in refused(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(FastVLMError, match="is empty"):
        _ = open_rows(tmp_path / "b.jsonl").total


def test_shards_partition_the_rows_whatever_their_order(tmp_path: Path) -> None:
    ids = [f"row {number} \u00e4" for number in range(300)]
    (tmp_path / "a.png").write_bytes(picture())
    lines = [{"id": id, "image": "a.png", "prompt": "x"} for id in ids]
    forward = open_rows(write_lines(tmp_path / "a.jsonl", *lines))
    backward = open_rows(write_lines(tmp_path / "b.jsonl", *lines[::-1]))
    parts = [[row.id for row in forward.shard(index, 3)] for index in (1, 2, 3)]
    assert sorted(id for part in parts for id in part) == sorted(ids)
    assert all(60 < len(part) < 140 for part in parts)
    assert [{row.id for row in backward.shard(index, 3)} for index in (1, 2, 3)] == [set(part) for part in parts]
    assert shard_of("row 0 \u00e4", 3) in (1, 2, 3) and shard_of("\udcff.png", 5)
    assert forward.shard(2, 3).total == 100
    for index, count in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(FastVLMError, match=f"the shard is {index}/{count}"):
            forward.shard(index, count)


def test_the_shard_of_an_id_stays_the_same_in_later_versions() -> None:
    """The machines of one job may have different versions."""
    assert [shard_of(id, 7) for id in ("a.jpg", "b/c.jpg", "\u00e4")] == [5, 5, 3]


def test_rows_can_be_sent_to_another_process(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": picture()})
    rows = open_rows(tmp_path / "a.tar", prompt="x")
    again = pickle.loads(pickle.dumps(rows))
    assert [loaded(row) for row in pickle.loads(pickle.dumps(list(again)))] == [picture()]
