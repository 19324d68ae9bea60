"""Dataclasses from JSON. Every value is compared with the type of its field, so that a damaged file is told in a sentence."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, get_args, get_origin, get_type_hints

_UNIONS = (typing.Union, getattr(types, "UnionType", typing.Union))
_GENERIC = {"list": typing.List, "dict": typing.Dict}  # noqa: UP006
"""What `list[int]` means to the Python 3.8 of JetPack 5, where the doctor runs and nothing else."""


def from_json(kind: Any, value: Any, where: str = "the document") -> Any:
    """A value of the type `kind` from what `json.loads` gave: a dataclass, `list`, `dict`, `Literal`, `X | None` or a plain type.

    Fields with a default may be missing; a float may be null, which is NaN. Raises ValueError that says where the value does not fit.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}, not one of {', '.join(arguments)}")
        return value
    if origin in _UNIONS:
        return None if value is None else from_json(arguments[0], value, where)
    if kind is float and value is None:
        return math.nan
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no object")
        fields = get_type_hints(kind, localns=_GENERIC)
        for field in dataclasses.fields(kind):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in value:
                raise ValueError(f"{where} lacks {field.name!r}")
        for key in value:
            if key not in fields:
                raise ValueError(f"{where} has an unknown {key!r}")
        make: Any = kind
        return make(**{key: from_json(fields[key], each, key) for key, each in value.items()})
    expected: Any = (int, float) if kind is float else origin or kind
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where} is {str(value)[:40]!r}, not of type {getattr(expected, '__name__', 'float')}")
    if origin is list:
        return [from_json(arguments[0], each, where) for each in value]
    if origin is dict:
        return {key: from_json(arguments[1], each, f"{where} {key}") for key, each in value.items()}
    return value
