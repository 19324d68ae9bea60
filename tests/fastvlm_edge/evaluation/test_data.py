"""Every format is recognised by what is in it; what cannot be used is named; the same seed chooses the same examples."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm_edge import FastVLMError
from fastvlm_edge.evaluation.data import Dataset, Example, choose, open_data

QUESTION = "What does the meter read?"


def draw(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)
    return path


def write(path: Path, document: Any) -> str:
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return str(path)


def lines(path: Path, *rows: Any) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(dataset: Dataset) -> list[tuple[str | None, tuple[str, ...], str]]:
    """What is asked, with every picture opened."""
    found = []
    for example, image in dataset.read():
        assert image.mode == "RGB" and image.size == (8, 6)
        found.append((example.prompt, example.answers, example.kind))
    return found


def test_a_folder_of_pictures_is_read_recursively_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "deep/er/c.jpg", "a.webp", ".hidden/d.png"):
        draw(tmp_path / name)
    write(tmp_path / "notes.txt", "not a picture")
    dataset = open_data(str(tmp_path))
    assert [example.id for example, _ in dataset.read()] == ["a.webp", "b.PNG", str(Path("deep/er/c.jpg"))]
    assert dataset.format == "pictures" and dataset.describe() == f"3 examples of {tmp_path} (pictures)"
    assert read(dataset) == [(None, (), "")] * 3


def test_json_lines(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "sub" / "b.png")
    source = lines(
        tmp_path / "questions.jsonl",
        {"image": "a.png", "prompt": QUESTION, "answer": "042", "kind": "reading"},
        {"image": "sub/b.png", "question": "How many?", "answers": ["2", "two"]},
        {"image": str(tmp_path / "a.png"), "prompt": "How many?", "answer": 3, "id": "x"},
        {"image": "a.png"},
    )
    dataset = open_data(source)
    assert dataset.format == "jsonl"
    assert read(dataset) == [(QUESTION, ("042",), "reading"), ("How many?", ("2", "two"), ""), ("How many?", ("3",), ""), (None, (), "")]
    assert [item.id for item in dataset.examples()] == ["line 1", "line 2", "x", "line 4"]


def test_json_lines_need_no_suffix_and_a_list_of_the_same_objects_will_do(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    row = {"image": "a.png", "prompt": QUESTION, "answer": "042"}
    assert read(open_data(lines(tmp_path / "questions", row, row))) == [(QUESTION, ("042",), "")] * 2
    assert read(open_data(lines(tmp_path / "one", row))) == [(QUESTION, ("042",), "")]
    assert read(open_data(write(tmp_path / "list.json", [row, row]))) == [(QUESTION, ("042",), "")] * 2


def test_llava_conversations_give_their_first_turn(tmp_path: Path) -> None:
    draw(tmp_path / "coco" / "a.jpg")
    turns = [
        {"from": "human", "value": "<image>\nWhat is on the sign?"},
        {"from": "gpt", "value": "STOP"},
        {"from": "human", "value": "In which colour?"},
        {"from": "gpt", "value": "white"},
    ]
    document = [{"id": "1", "image": "coco/a.jpg", "conversations": turns}] * 2 + [{"id": "text", "conversations": turns}]
    dataset = open_data(write(tmp_path / "mix.json", document))
    assert dataset.format == "llava"
    assert read(dataset) == [("What is on the sign?", ("STOP",), "")] * 2
    assert [(item.id, item.reason) for item in dataset.skipped] == [("text", "no picture")]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def webdataset(path: Path, picture: bytes) -> str:
    with tarfile.open(path, "w") as archive:
        add(archive, "shard/0001.jpg", picture)
        add(archive, "shard/0001.json", json.dumps({"prompt": QUESTION, "answer": "042", "kind": "reading"}).encode())
        add(archive, "shard/0002.txt", b"a red sign\n")
        add(archive, "shard/0002.PNG", picture)
        add(archive, "shard/0003.json", b"{}")
        add(archive, "shard/0004.v2.png", picture)
    return str(path)


def test_a_webdataset_tar_groups_members_by_key(tmp_path: Path) -> None:
    dataset = open_data(webdataset(tmp_path / "a.tar", draw(tmp_path / "a.png").read_bytes()))
    assert dataset.format == "webdataset"
    assert read(dataset) == [(QUESTION, ("042",), "reading"), (None, ("a red sign",), ""), (None, (), "")]
    assert [(item.id, item.reason) for item in dataset.skipped] == [("shard/0003.json", "no picture")]


def test_a_tar_that_is_cut_off_or_compressed_is_an_error(tmp_path: Path) -> None:
    whole = Path(webdataset(tmp_path / "a.tar", draw(tmp_path / "a.png").read_bytes())).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:600])
    with pytest.raises(FastVLMError, match=r"cut\.tar is not a readable"):
        open_data(str(tmp_path / "cut.tar"))
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    with pytest.raises(FastVLMError, match="uncompress it"):
        open_data(str(tmp_path / "b.tar.gz"))


def textvqa(folder: Path) -> str:
    rows = [{"question_id": 34602, "image_id": "0054c91397f2fe05", "question": "what brand?", "answers": ["nous"] * 10, "set_name": "val"}]
    return write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": rows})


def docvqa(folder: Path) -> str:
    row = {
        "questionId": 49153,
        "question": "What is it?",
        "image": "documents/pybv0228_81.png",
        "docId": 14465,
        "answers": ["2000", "2 000"],
    }
    document = {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": [row | {"question_types": ["handwritten", "form"]}]}
    return write(folder / "val_v1.0_withQT.json", document)


def chartqa(folder: Path) -> str:
    return write(folder / "test_human.json", [{"imgname": "41699051005347.png", "query": "How many bars?", "label": "14"}])


def vqav2(folder: Path) -> str:
    question = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
    answers = [{"answer": "down", "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
    annotation = {
        "question_id": 262148000,
        "image_id": 262148,
        "answer_type": "other",
        "multiple_choice_answer": "down",
        "answers": answers,
    }
    write(folder / "v2_mscoco_val2014_annotations.json", {"data_subtype": "val2014", "annotations": [annotation]})
    return write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": [question]})


PUBLISHED = [
    (textvqa, "train_images/0054c91397f2fe05.jpg", ("what brand?", ("nous",) * 10, "")),
    (docvqa, "documents/pybv0228_81.png", ("What is it?", ("2000", "2 000"), "handwritten")),
    (chartqa, "png/41699051005347.png", ("How many bars?", ("14",), "human")),
    (vqav2, "val2014/COCO_val2014_000000262148.jpg", ("Where is he looking?", ("down",) * 10, "other")),
]


@pytest.mark.parametrize(("make", "picture", "expected"), PUBLISHED)
def test_published_formats(tmp_path: Path, make: Any, picture: str, expected: tuple[Any, ...]) -> None:
    """Beside the file as the owners' archives unpack, and in a folder given with --images."""
    source = make(tmp_path)
    with pytest.raises(FastVLMError, match=r"none of the pictures of .*give their folder with --images DIR"):
        open_data(source)
    draw(tmp_path / picture)
    dataset = open_data(source)
    assert dataset.format == make.__name__ and read(dataset) == [expected]
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(FastVLMError, match=r"elsewhere is not a folder; .*--images DIR"):
        open_data(source, images=elsewhere)
    elsewhere.mkdir()
    with pytest.raises(FastVLMError, match="give another folder with --images DIR"):
        open_data(source, images=elsewhere)
    draw(elsewhere / Path(picture).name)
    assert read(open_data(source, images=elsewhere)) == [expected]


def test_vqav2_needs_its_annotations_and_skips_questions_without(tmp_path: Path) -> None:
    source = Path(vqav2(tmp_path))
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    with pytest.raises(FastVLMError, match="give the file of questions beside it"):
        open_data(str(annotations))
    draw(tmp_path / "COCO_val2014_000000262148.jpg")
    document = json.loads(source.read_text())
    document["questions"] = [*document["questions"] * 2, {"image_id": 1, "question": "?", "question_id": 10}]
    dataset = open_data(write(source, document))
    assert len(read(dataset)) == 2
    assert dataset.skipped[0].reason == "not in v2_mscoco_val2014_annotations.json"
    write(annotations, '{"annotations":\n[}')
    with pytest.raises(FastVLMError, match=r"annotations\.json, line 2: not JSON"):
        open_data(str(source))
    annotations.unlink()
    with pytest.raises(FastVLMError, match=r"put v2_mscoco_val2014_annotations\.json into"):
        open_data(str(source))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '\n\n{"image": \n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", '[1]\n{"image": "a.png"}\n', "line 1: a list, not an object"),
        ("a.jsonl", '{"picture": "a.png", "text": "?"}\n', "the first with the keys picture, text, which is not a known format"),
        ("a.jsonl", "", "is empty"),
        ("a.json", '[\n{"image": "a.png",}\n]', r"a\.json, line 2: not JSON"),
        ("a.json", "[1, 2]", "a list without objects"),
        ("a.json", '[{"url": "a.png"}]', "a list of objects with the keys url"),
        ("a.json", '{"data": [{"text": "?"}]}', "an object with the keys data"),
        ("a.json", '"text"', "a str, which is not a known format"),
        ("a.json", "[" * 100_000, "nested too deeply|not JSON"),
        ("a.parquet", b"PAR1\xff\xfe\x00", "is not text"),
    ],
)
def test_what_is_no_known_format_says_what_is(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    draw(tmp_path / "a.png")
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(FastVLMError, match=says) as caught:
        open_data(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_source_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match=r"gone\.jsonl does not exist; give a folder of pictures"):
        open_data(str(tmp_path / "gone.jsonl"))
    with pytest.raises(FastVLMError, match="has no pictures"):
        open_data(str(tmp_path))


def test_bad_pictures_are_counted_named_and_skipped(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        draw(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    dataset = open_data(str(tmp_path))
    assert len(read(dataset)) == 3
    assert [item.id for item in dataset.skipped] == ["b.png"]
    assert len(read(dataset)) == 3 and len(dataset.skipped) == 1  # reading again counts again


def test_lines_that_cannot_be_read_are_named_and_skipped(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    good = b'{"image": "a.png", "prompt": "?", "answer": "1"}'
    bad = {
        b'{"image": "a.png"': "not JSON (",
        b"[1]": "a list, not an object",
        b'{"image": "\xff.png"}': "not readable ('utf-8' codec",
        b"[" * 100_000: "not ",
        b'{"image": "a.png", "answer": ' + b"1" * 5_000 + b"}": "not readable (Exceeds the limit",
        b'{"image": ["a.png", "a.png"]}': "2 pictures, not one",
        b'{"image": []}': "no picture",
        b'{"image": "a\\u0000b.png"}': "cannot be read",
        b'{"image": "' + b"a" * 5_000 + b'.png"}': "cannot be read",
        b'{"image": "\\ud800.png"}': "cannot be read",
    }
    (tmp_path / "questions.jsonl").write_bytes(b"\r\n".join([good] * len(bad) + list(bad)))
    dataset = open_data(str(tmp_path / "questions.jsonl"))
    assert read(dataset) == [("?", ("1",), "")] * len(bad)
    assert [item.id for item in dataset.skipped] == [f"line {number + len(bad) + 1}" for number in range(len(bad))]
    for item, reason in zip(dataset.skipped, bad.values(), strict=True):
        assert reason in item.reason


@pytest.mark.parametrize("row", [{"image": ["a.png"]}, {"images": ["a.png"]}, {"images": "a.png"}])
def test_a_list_of_one_picture_is_a_picture(tmp_path: Path, row: dict[str, Any]) -> None:
    draw(tmp_path / "a.png")
    row |= {"prompt": "?", "answer": "1"}
    assert read(open_data(lines(tmp_path / "a.jsonl", row))) == [("?", ("1",), "")]
    assert read(open_data(write(tmp_path / "a.json", [row]))) == [("?", ("1",), "")]


def test_extreme_pictures_are_named_and_skipped(tmp_path: Path) -> None:
    """What one picture can be: too narrow, too large, HEIC, a pipe that nobody writes to."""
    for number in range(6):
        draw(tmp_path / f"good{number}.png")
    Image.new("1", (5_000, 50)).save(tmp_path / "strip.png")
    Image.new("1", (14_000, 13_000)).save(tmp_path / "vast.png")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    os.mkfifo(tmp_path / "pipe.jpg")
    dataset = open_data(str(tmp_path))
    assert len(read(dataset)) == 6
    reasons = {item.id: item.reason for item in dataset.skipped}
    assert set(reasons) == {"strip.png", "vast.png", "phone.heic", "pipe.jpg"}
    assert "aspect ratio is above 50" in reasons["strip.png"] and "is too large" in reasons["vast.png"]
    assert "HEIC" in reasons["phone.heic"] or "damaged" in reasons["phone.heic"]
    assert "is not a file" in reasons["pipe.jpg"]


def test_an_archive_that_vanishes_is_named(tmp_path: Path) -> None:
    source = Path(webdataset(tmp_path / "a.tar", draw(tmp_path / "a.png").read_bytes()))
    dataset = open_data(str(source))
    source.unlink()
    with pytest.raises(FastVLMError, match=r"more than half .*a\.tar/shard/0001\.jpg cannot be read \(.*No such file"):
        read(dataset)


def test_rows_of_published_sets_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    for make, picture in ((textvqa, "0054c91397f2fe05.jpg"), (docvqa, "documents/pybv0228_81.png")):
        path = Path(make(tmp_path))
        draw(tmp_path / picture)
        document = json.loads(path.read_text())
        document["data"] = [*document["data"] * 2, {"question": "?"}, 17]
        dataset = open_data(write(path, document))
        assert len(read(dataset)) == 2
        assert [item.id for item in dataset.skipped] == ["number 3", "number 4"]
        assert dataset.skipped[0].reason in ("no image_id", "no image") and dataset.skipped[1].reason == "a int, not an object"


def test_too_few_or_more_than_half_bad_is_an_error(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        draw(tmp_path / name)
    dataset = open_data(str(tmp_path))
    with pytest.raises(FastVLMError, match="has 3 examples, but at least 8 are needed"):
        list(dataset.read(minimum=8))
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(FastVLMError, match=r"1 of the 3 examples .* cannot be used, but 3 are needed: the first is b\.png .*is empty"):
        list(dataset.read(minimum=3))
    assert len(read(dataset)) == 2
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(FastVLMError, match="more than half of the 3 examples"):
        list(dataset.read())


def test_a_bad_picture_in_a_tar_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "1.png", draw(tmp_path / "a.png").read_bytes())
        add(archive, "2.png", b"not a picture")
    dataset = open_data(str(tmp_path / "a.tar"))
    assert len(read(dataset)) == 1
    assert dataset.skipped[0].reason.startswith("a.tar/2.png: the image is not an image")


def test_a_limit_is_reproducible_and_a_larger_one_holds_it(tmp_path: Path) -> None:
    few, more = choose(1000, 10, seed=1), choose(1000, 20, seed=1)
    assert list(few) == sorted(set(few)) and len(few) == 10 and set(few) < set(more)
    assert list(choose(1000, 10, seed=1)) == list(few) != list(choose(1000, 10, seed=2))
    assert list(choose(5, 2, seed=0)) == [3, 4]  # for ever
    assert list(choose(3, 10, seed=0)) == [0, 1, 2]
    with pytest.raises(FastVLMError, match="the limit is 0"):
        open_data(str(tmp_path), limit=0)
    draw(tmp_path / "a.png")
    rows = "".join(json.dumps({"image": "a.png", "prompt": f"question {index}"}) + "\n" for index in range(50))
    source = write(tmp_path / "50.jsonl", rows)
    dataset = open_data(source, limit=4, seed=3)
    assert len(dataset) == 4 and dataset.describe() == f"4 of 50 examples of {source} (jsonl)"


def test_pictures_are_opened_when_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    opened: list[Path] = []
    original = Example.load_image

    def watch(self: Example) -> Image.Image:
        opened.append(Path(self.picture))
        return original(self)

    monkeypatch.setattr(Example, "load_image", watch)
    reading = open_data(str(tmp_path)).read()
    assert opened == []
    next(reading)
    assert opened == [tmp_path / "a.png"]
