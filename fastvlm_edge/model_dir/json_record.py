"""JSON text -> values -> dataclasses.

Every value is checked against the type of its field, so that the error for a damaged file names the place.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal, get_args, get_origin, get_type_hints

_UNIONS = (typing.Union, getattr(types, "UnionType", typing.Union))
_GENERIC = {"list": typing.List, "dict": typing.Dict}  # noqa: UP006
"""Resolves `list[int]` on Python 3.8 (JetPack 5), where only `doctor` runs."""

MAX_DEPTH = 100
"""Of a value of any type in a record."""


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`. A document that is nested too deeply is a ValueError too; json raises RecursionError.

    All JSON from files is read with this function, and `options` are those of `json.loads`.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def from_json(kind: Any, value: Any, where: str = "the document") -> Any:
    """Turn `value`, which `parse_json` gave, into the type `kind`: a dataclass, `list`, `dict`, `Literal`, `X | None` or a plain type.

    A field with a default may be missing, and a float may be null, which becomes NaN. Raises ValueError that names the place of a value
    that does not fit; `where` names the place of `value`.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        _check_depth(value, where)
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_json(kind, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}, not one of {', '.join(map(str, arguments))}")
        return value
    if origin in _UNIONS:
        return None if value is None else from_json(arguments[0], value, where)
    if kind is float and value is None:
        return math.nan
    expected: Any = (int, float) if kind is float else origin or kind
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where} is {str(value)[:40]!r}, not of type {getattr(expected, '__name__', 'float')}")
    if origin is list:
        return [from_json(arguments[0], each, where) for each in value]
    if origin is dict:
        return {key: from_json(arguments[1], each, f"{where} {key}") for key, each in value.items()}
    return value


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for each in level if isinstance(each, (dict, list)) for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise ValueError(f"{where} is nested too deeply")


def _dataclass_from_json(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    types_by_name = get_type_hints(kind, localns=_GENERIC)
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            raise ValueError(f"{where} lacks {field.name!r}")
    for key in value:
        if key not in types_by_name:
            raise ValueError(f"{where} has an unknown {key!r}")
    return kind(**{key: from_json(types_by_name[key], each, key) for key, each in value.items()})
