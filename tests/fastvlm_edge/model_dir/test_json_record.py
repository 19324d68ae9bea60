"""What a dataclass writes as JSON is read back equal, and everything that does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fastvlm_edge.model_dir.json_record import MAX_DEPTH, from_json, parse_json


@dataclass(frozen=True)
class Part:
    name: str
    size: int


@dataclass(frozen=True)
class Record:
    kind: Literal["small", "large"]
    seconds: float
    verified: bool
    parts: list[Part]
    by_name: dict[str, Part]
    shapes: list[list[int]]
    anything: Any
    comment: str | None = None
    notes: list[str] = field(default_factory=list)


RECORD = Record("small", 1.5, True, [Part("a", 1), Part("b", 2)], {"c": Part("c", 3)}, [[1, 2], []], {"free": [1, None]}, "text", ["note"])


def document(**changes: Any) -> dict[str, Any]:
    """RECORD as `json.loads` gives it, with some fields replaced."""
    return {**json.loads(json.dumps(dataclasses.asdict(RECORD))), **changes}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in document().items() if key != name}


def test_a_record_is_read_back_equal() -> None:
    assert from_json(Record, document()) == RECORD


def test_fields_with_a_default_may_be_missing() -> None:
    read = from_json(Record, {key: value for key, value in document().items() if key not in ("comment", "notes")})
    assert read == dataclasses.replace(RECORD, comment=None, notes=[])


def test_null_is_none_where_it_is_allowed_and_nan_for_a_float() -> None:
    assert from_json(Record, document(comment=None)).comment is None
    assert math.isnan(from_json(Record, document(seconds=None)).seconds)


def test_a_float_may_be_written_as_an_integer() -> None:
    assert from_json(Record, document(seconds=2)).seconds == 2


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        ([], "the document is not an object"),
        (without("kind"), "the document lacks 'kind'"),
        (document(colour="red"), "the document has an unknown 'colour'"),
        (document(kind="huge"), "kind is 'huge', not one of small, large"),
        (document(seconds="1.5"), "seconds is '1.5', not of type float"),
        (document(seconds=True), "seconds is 'True', not of type float"),
        (document(verified=1), "verified is '1', not of type bool"),
        (document(parts={}), "parts is '{}', not of type list"),
        (document(parts=[1]), "parts is not an object"),
        (document(parts=[{"name": "a"}]), "parts lacks 'size'"),
        (document(parts=[{"name": "a", "size": True}]), "size is 'True', not of type int"),
        (document(parts=[{"name": "a", "size": 1.0}]), "size is '1.0', not of type int"),
        (document(by_name=[]), "by_name is '[]', not of type dict"),
        (document(by_name={"c": None}), "by_name c is not an object"),
        (document(shapes=[[1, "2"]]), "shapes is '2', not of type int"),
        (document(comment=7), "comment is '7', not of type str"),
        (document(notes=None), "notes is 'None', not of type list"),
        (document(parts="x" * 500), f"parts is '{'x' * 40}', not of type list"),
    ],
)
def test_a_value_that_does_not_fit_is_named(damaged: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        from_json(Record, damaged)


def test_where_names_the_whole() -> None:
    with pytest.raises(ValueError, match=r"^build\.json lacks 'name'$"):
        from_json(Part, {"size": 1}, "build.json")


@pytest.mark.parametrize("depth", [100_000, 1_000_000])
@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
def test_what_is_nested_too_deeply_is_a_value_error(opening: str, depth: int) -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
        parse_json(depth * opening)


def test_values_of_any_type_are_nested_within_bounds() -> None:
    def nested(depth: int) -> Any:
        return parse_json("[" * depth + "]" * depth)

    assert from_json(Record, document(anything=nested(MAX_DEPTH))).anything
    with pytest.raises(ValueError, match=r"^anything is nested too deeply$"):
        from_json(Record, document(anything=nested(MAX_DEPTH + 1)))
