"""A file of questions and answers -> rows. Pictures are only names here; `data.py` finds and opens them.

The content tells the format: JSON lines and JSON lists of {image, prompt, answer}, LLaVA conversations, and TextVQA, DocVQA, ChartQA and
VQAv2 as their owners publish them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import parse_json

ACCEPTED = (
    "a folder of pictures, JSON lines or a JSON list of {image, prompt, answer}, LLaVA conversations, a WebDataset .tar, "
    "or TextVQA, DocVQA, ChartQA or VQAv2 as published"
)
_PICTURE_KEYS = {"image", "images", "conversations"}
_ONE_PER_LINE = 'write one object per line, such as {"image": "a.jpg", "prompt": "What does the meter read?", "answer": "042"}'


@dataclass(frozen=True)
class Row:
    """A question about a picture; `picture` is its name in the file."""

    id: str
    picture: str
    prompt: str | None
    answers: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Unusable:
    """A row or a picture that cannot be used, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class Parsed:
    """The rows of a file, in the order of the file."""

    format: str
    rows: list[Row | Unusable]
    folders: tuple[str, ...] = ()
    """Folders, relative to the file's, into which the owners' archives unpack the pictures."""


def parse_file(path: Path) -> Parsed:
    """Read a file of questions.

    Raises FastVLMError if it is not JSON (with the line), has an unknown format, or its file of annotations is missing.
    """
    try:
        with open(path, "rb") as file:
            first = next((line for line in file if line.strip()), b"").decode("utf-8-sig")
        if _is_json_lines(path, first):
            return _from_lines(path)
        document = parse_json(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise FastVLMError(f"{path} is not text", f"give {ACCEPTED}") from None
    except json.JSONDecodeError as error:
        raise FastVLMError(f"{path}, line {error.lineno}: not JSON ({error.msg})", f"give {ACCEPTED}") from None
    except ValueError as error:
        raise FastVLMError(f"{path} cannot be read ({error})", f"give {ACCEPTED}") from None
    if isinstance(document, list):
        return _from_list(path, document)
    if isinstance(document, dict):
        return _from_object(path, document)
    raise _unknown(path, f"a {type(document).__name__}")


def _is_json_lines(path: Path, first: str) -> bool:
    """Whether every line is a separate object. A published format may be one object on one line."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    try:
        document = parse_json(first)
    except ValueError:
        return False
    return isinstance(document, dict) and not {"data", "questions", "annotations"} & set(document)


def _from_lines(path: Path) -> Parsed:
    """The first line must be an object with known keys. A later one that cannot be read is one unusable row."""
    rows: list[Row | Unusable] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"line {number}"
            try:
                text = line.decode("utf-8-sig")
                if not text.strip():
                    continue
                fields = parse_json(text)
            except ValueError as error:
                why = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else f"not readable ({error})"
                if not rows:
                    raise FastVLMError(f"{path}, {where}: {why}", _ONE_PER_LINE) from None
                rows.append(Unusable(where, why))
                continue
            if not rows and not isinstance(fields, dict):
                raise FastVLMError(f"{path}, {where}: a {type(fields).__name__}, not an object", _ONE_PER_LINE)
            if not rows and not _PICTURE_KEYS & set(fields):
                raise _unknown(path, f"one object per line, the first with the keys {_keys(fields)}")
            rows.append(from_fields(fields, where))
    return Parsed("jsonl", _not_empty(path, rows))


def _from_list(path: Path, document: list[Any]) -> Parsed:
    first = next((fields for fields in document if isinstance(fields, dict)), None)
    if first is None:
        raise _unknown(path, "a list without objects")
    if {"imgname", "query"} <= set(first):
        return _chartqa(path, document)
    if not _PICTURE_KEYS & set(first):
        raise _unknown(path, f"a list of objects with the keys {_keys(first)}")
    name = "llava" if "conversations" in first else "json"
    return Parsed(name, [from_fields(fields, f"number {number}") for number, fields in enumerate(document, start=1)])


def _from_object(path: Path, document: dict[str, Any]) -> Parsed:
    if isinstance(document.get("questions"), list):
        return _vqav2(path, document)
    if isinstance(document.get("annotations"), list):
        mend = "give the file of questions beside it, v2_OpenEnded_mscoco_..._questions.json"
        raise FastVLMError(f"{path} has the answers of VQAv2, not the questions", mend)
    data = document.get("data")
    first = data[0] if isinstance(data, list) and data else None
    if isinstance(data, list) and isinstance(first, dict) and "question" in first:
        if "image_id" in first:
            return _textvqa(path, data)
        if "image" in first:
            return _docvqa(path, data)
    raise _unknown(path, f"an object with the keys {_keys(document)}")


def from_fields(fields: Any, where: str) -> Row | Unusable:
    """One object of {image, prompt, answer}, or one LLaVA conversation; `where` is the id of an object without one."""
    if not isinstance(fields, dict):
        return Unusable(where, _no_object(fields))
    name = str(_first(fields, "id", "question_id", default=where))
    picture = _first(fields, "image", "images")
    if isinstance(picture, list):
        if len(picture) > 1:
            return Unusable(name, f"{len(picture)} pictures, not one")
        picture = next(iter(picture), None)
    if not isinstance(picture, str) or not picture:
        return Unusable(name, "no picture")
    kind = "" if fields.get("kind") is None else str(fields["kind"])
    if "conversations" in fields:
        turns = _first_turn(fields["conversations"])
        return Unusable(name, "no question followed by an answer") if turns is None else Row(name, picture, *turns, kind)
    prompt = _first(fields, "prompt", "question")
    if prompt is not None and not isinstance(prompt, str):
        return Unusable(name, f"its prompt is a {type(prompt).__name__}")
    return Row(name, picture, prompt, _texts(_first(fields, "answers", "answer")), kind)


def _first_turn(conversations: Any) -> tuple[str, tuple[str, ...]] | None:
    """The first question and its answer; later turns depend on earlier ones.

    LLaVA docs/Finetune_Custom_Data.md: turns {from: human or gpt, value}, `<image>` in the first. The runtime puts the picture first,
    as LLaVA's own preprocessing does (llava/train/train.py, preprocess_multimodal), so `<image>` is dropped.
    """
    turns = [turn for turn in conversations if isinstance(turn, dict)] if isinstance(conversations, list) else []
    for question, answer in pairwise(turns):
        if question.get("from") in ("human", "user") and answer.get("from") in ("gpt", "assistant"):
            return str(question.get("value", "")).replace("<image>", "").strip(), (str(answer.get("value", "")).strip(),)
    return None


def _textvqa(path: Path, data: list[Any]) -> Parsed:
    """TextVQA_0.5.1_{train,val}.json: {data: [{question_id, image_id, question, answers: [10 texts], ...}]}, pictures {image_id}.jpg.

    https://textvqa.org/dataset. LLaVA (llava/eval/eval_textvqa.py) and MMF read the same fields. The
    archive of pictures unpacks to train_images.
    """
    rows = _rows(
        data,
        lambda number, fields: Row(
            str(fields.get("question_id", number)),
            f"{fields['image_id']}.jpg",
            _text(fields, "question"),
            _texts(fields.get("answers")),
        ),
    )
    return Parsed("textvqa", rows, ("train_images", "train_val_images/train_images", "test_images"))


def _docvqa(path: Path, data: list[Any]) -> Parsed:
    """SP-DocVQA {train,val}_v1.0[_withQT].json: {data: [{questionId, question, image: "documents/x.png", answers, question_types?, ...}]}.

    https://rrc.cvc.uab.es/?ch=17 (task 1); the kind is the first question type, if the file has question types.
    """
    rows = _rows(
        data,
        lambda number, fields: Row(
            str(fields.get("questionId", number)),
            str(fields["image"]),
            _text(fields, "question"),
            _texts(fields.get("answers")),
            next(iter(_texts(fields.get("question_types"))), ""),
        ),
    )
    return Parsed("docvqa", rows, ("spdocvqa_images", "val", "train", "test"))


def _chartqa(path: Path, data: list[Any]) -> Parsed:
    """{split}_{human,augmented}.json: [{imgname, query, label}], pictures in the folder png beside it.

    https://github.com/vis-nlp/ChartQA ("ChartQA Dataset/test/test_human.json"); the kind is who wrote the questions.
    """
    kind = next((kind for kind in ("human", "augmented") if kind in path.stem), "")
    rows = _rows(
        data,
        lambda number, fields: Row(str(number), str(fields["imgname"]), _text(fields, "query"), _texts(fields.get("label")), kind),
    )
    return Parsed("chartqa", rows, ("png",))


def _vqav2(path: Path, document: dict[str, Any]) -> Parsed:
    """v2_OpenEnded_mscoco_{subset}_questions.json, beside it v2_mscoco_{subset}_annotations.json, pictures COCO_{subset}_{12 digits}.jpg.

    https://visualqa.org/download and GT-Vision-Lab/VQA, PythonHelperTools/vqaDemo.py (names); the kind is the answer_type.
    """
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    if beside == path or not beside.is_file():
        wanted = beside.name if beside != path else "v2_mscoco_..._annotations.json"
        raise FastVLMError(f"{path} has questions of VQAv2, but their answers are not beside it", f"put {wanted} into {path.parent}")
    try:
        annotations = parse_json(beside.read_text(encoding="utf-8-sig"))["annotations"]
        known = {str(fields["question_id"]): fields for fields in annotations if isinstance(fields, dict) and "question_id" in fields}
        if not known:
            raise ValueError("no annotation")
    except json.JSONDecodeError as error:
        raise FastVLMError(f"{beside}, line {error.lineno}: not JSON ({error.msg})", "download it again") from None
    except (KeyError, TypeError, ValueError):
        what = f"{beside} is not an annotations file of VQAv2 (annotations with question_id and answers)"
        raise FastVLMError(what, "download it again") from None
    subset = str(document.get("data_subtype") or next((part for part in path.stem.split("_") if part[-4:].isdigit()), "val2014"))

    def row(number: int, fields: dict[str, Any]) -> Row | Unusable:
        name = str(fields.get("question_id", number))
        annotation = known.get(name)
        if annotation is None or not _is_number(fields["image_id"]):
            return Unusable(name, f"not in {beside.name}" if annotation is None else "no image_id")
        picture = f"COCO_{subset}_{int(fields['image_id']):012}.jpg"
        kind = str(annotation.get("answer_type") or "")
        return Row(name, picture, _text(fields, "question"), _texts(annotation.get("answers")), kind)

    return Parsed("vqav2", _rows(document["questions"], row), (subset,))


def _rows(data: Iterable[Any], row: Callable[[int, dict[str, Any]], Row | Unusable]) -> list[Row | Unusable]:
    """`row` of every object. What is not an object, or lacks a key that `row` needs, is a row that cannot be used."""
    rows: list[Row | Unusable] = []
    for number, fields in enumerate(data, start=1):
        try:
            rows.append(row(number, fields) if isinstance(fields, dict) else Unusable(f"number {number}", _no_object(fields)))
        except KeyError as error:
            rows.append(Unusable(f"number {number}", f"no {error.args[0]}"))
    return rows


def _no_object(fields: Any) -> str:
    return f"a {type(fields).__name__}, not an object"


def _is_number(value: Any) -> bool:
    """Whether it is a whole number, or its decimal digits."""
    return re.fullmatch(r"[0-9]{1,18}", str(value)) is not None


def _first(fields: dict[str, Any], *keys: str, default: Any = None) -> Any:
    """The value of the first of `keys` that is present and not null."""
    return next((fields[key] for key in keys if fields.get(key) is not None), default)


def _text(fields: dict[str, Any], key: str) -> str | None:
    return fields[key] if isinstance(fields.get(key), str) else None


def _texts(value: Any) -> tuple[str, ...]:
    """Answers from a text or a number, a list of these, or VQAv2's list of {answer: text}."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    texts = (item.get("answer") if isinstance(item, dict) else item for item in items)
    return tuple(str(text) for text in texts if text is not None)


def _not_empty(path: Path, rows: list[Row | Unusable]) -> list[Row | Unusable]:
    if not rows:
        raise FastVLMError(f"{path} is empty", f"give {ACCEPTED}")
    return rows


def _keys(fields: dict[str, Any]) -> str:
    return ", ".join(list(map(str, fields))[:8]) or "(none)"


def _unknown(path: Path, found: str) -> FastVLMError:
    return FastVLMError(f"{path} contains {found}, which is not a known format", f"give {ACCEPTED}")
