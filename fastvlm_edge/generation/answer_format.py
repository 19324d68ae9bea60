"""What an answer must look like, as a caller asks for it: checked without the model and without llguidance."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.json_record import parse_json

MAX_CHARACTERS = {"json_schema": 1 << 14, "choices": 1 << 16, "regex": 1 << 13, "grammar": 1 << 13}
"""Of each kind of source; all choices together. It bounds the time that llguidance takes to compile one, and the depth of its stack."""
MAX_MULTIPLE = 10_000
"""The automaton for "divisible by n" has n states, and all `multipleOf` of a schema may meet in one number."""
MAX_PATTERN_PROPERTIES = 16
"""Of a whole schema. llguidance compares every pair of them, so that no name matches two."""
MAX_JOINED_PATTERN_PROPERTIES = 3
"""If schemas are joined: it compares the pairs again for each reference and for each combination of alternatives."""
MAX_PATTERNS = 8
"""Regular expressions that one text must match at the same time: the time to compile them grows exponentially."""

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value maps names to schemas."""
_VALUES = ("const", "enum", "default", "examples")
"""Keywords whose value is data, not a schema."""
_SAME_VALUE = ("allOf", "anyOf", "oneOf")
"""Keywords with a list of schemas for the same value."""
_JOINING = (*_SAME_VALUE, "$ref")


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer must match. `answer_format` makes it, and `grammar.compile_grammar` compiles it for a tokenizer."""

    kind: Literal["json_schema", "choices", "regex", "grammar"]
    source: str
    """A JSON schema as JSON text, a regular expression (also for `choices`), or a grammar in llguidance's Lark syntax.

    Regular expressions have the syntax of Rust's regex crate, without look-around and backreferences; `\\d` is 0 to 9.
    """


def answer_format(
    *,
    response_format: Mapping[str, Any] | None = None,
    json_schema: Mapping[str, Any] | bool | None = None,
    choices: Sequence[str] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> AnswerFormat | None:
    """The format that one of the options asks for; None if none of them is given, or `response_format` is `{"type": "text"}`.

    `response_format` is that of the OpenAI API: `{"type": "json_schema", "json_schema": {"schema": ...}}` or `{"type": "json_object"}`.
    Raises FastVLMError if several are given, or the one is not usable.
    """
    options = {
        "response_format": response_format,
        "json_schema": json_schema,
        "choices": choices,
        "regex": regex,
        "grammar": grammar,
    }
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise FastVLMError(f"{' and '.join(given)} were given, but an answer has one format", "give one of them")
    if response_format is not None:
        return _of_response_format(response_format)
    if json_schema is not None:
        return _of_schema(json_schema)
    if choices is not None:
        return _of_choices(choices)
    if regex is not None:
        return AnswerFormat("regex", _checked_regex(regex))
    if grammar is not None:
        return AnswerFormat("grammar", _checked_text("grammar", "the grammar", grammar))
    return None


def read_schema(path: Path) -> Any:
    """The JSON schema in a file. Raises FastVLMError if the file cannot be read or is not JSON."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise FastVLMError(f"the schema {path} cannot be read ({error.strerror or error})", "name a JSON file") from None
    except ValueError as error:
        raise FastVLMError(f"the schema {path} is not JSON ({error})", "correct the file") from None


def schema_text(schema: Any) -> str:
    """A JSON schema as JSON text, with its keys in their order, because answers have theirs in the same order.

    Raises FastVLMError for what a grammar cannot express although llguidance accepts it, or could not compile in bounded time.
    """
    if schema is True:
        return "{}"
    if not isinstance(schema, Mapping):
        raise FastVLMError(f"the JSON schema is {str(schema)[:40]!r}", "give a schema that is an object, or True for any JSON")
    try:
        text = json.dumps(dict(schema), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FastVLMError(
            f"the JSON schema is not JSON ({error})", "give dictionaries, lists, strings, numbers, booleans and None"
        ) from None
    except RecursionError:
        raise FastVLMError("the JSON schema is nested too deeply", "use $defs and $ref, or a flatter schema") from None
    _check_length("json_schema", "the JSON schema", text)
    schema = json.loads(text)
    if "x-guidance" in schema:
        raise FastVLMError("the JSON schema has x-guidance, which is not a keyword of JSON Schema", "leave it out")
    multiple, names, joined = 1, 0, False
    for part in _schemas(schema):
        _check_min_properties(part)
        multiple = math.lcm(multiple, _digits(part.get("multipleOf")))
        by_pattern = part.get("patternProperties")
        names += len(by_pattern) if isinstance(by_pattern, dict) else 0
        joined |= any(key in part for key in _JOINING)
    if multiple > MAX_MULTIPLE:
        raise FastVLMError(
            f"the multipleOf values of the JSON schema have the common multiple {multiple}, but at most {MAX_MULTIPLE} is supported",
            "leave out multipleOf, and check the number afterwards",
        )
    most = MAX_JOINED_PATTERN_PROPERTIES if joined else MAX_PATTERN_PROPERTIES
    if names > most:
        beside = f" beside {', '.join(_JOINING)}" if joined else ""
        raise FastVLMError(
            f"the JSON schema has {names} patternProperties{beside}, but at most {most} are supported",
            "write one pattern instead",
        )
    try:
        patterns = _patterns_at_once(schema, schema, {})
    except RecursionError:
        raise FastVLMError("the JSON schema is nested too deeply", "use a flatter schema") from None
    if patterns > MAX_PATTERNS:
        raise FastVLMError(
            f"the JSON schema may join {patterns} values of pattern and format in one string, but at most {MAX_PATTERNS} are supported",
            "write one pattern instead",
        )
    return text


def _of_response_format(response_format: Mapping[str, Any]) -> AnswerFormat | None:
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _of_schema({"type": "object"})
    wrapped = response_format.get("json_schema") if kind == "json_schema" else None
    if not isinstance(wrapped, Mapping) or "schema" not in wrapped:
        raise FastVLMError(
            f"response_format is {str(response_format)[:80]}",
            'give {"type": "json_schema", "json_schema": {"schema": {...}}}, {"type": "json_object"} or {"type": "text"}',
        )
    return _of_schema(wrapped["schema"])


def _of_schema(schema: Any) -> AnswerFormat:
    return AnswerFormat("json_schema", schema_text(schema))


def _of_choices(choices: Sequence[str]) -> AnswerFormat:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise FastVLMError(f"choices is {str(choices)[:40]!r}", "give a list of strings")
    if not choices:
        raise FastVLMError("there are no choices", "give at least one")
    seen = set()
    for choice in choices:
        if _checked_text("choices", "the choice", choice) in seen:
            raise FastVLMError(f"the choice {choice[:40]!r} is given twice", "give each choice once")
        seen.add(choice)
    _check_length("choices", "the list of choices", "".join(choices))
    return AnswerFormat("choices", "|".join("".join(f"\\x{{{ord(character):x}}}" for character in choice) for choice in choices))


def _checked_regex(regex: str) -> str:
    text = _checked_text("regex", "the regex", regex)
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise FastVLMError("the regex ends in a backslash that escapes nothing", "double it, or leave it out")  # llguidance drops it
    return text


def _checked_text(kind: str, name: str, text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise FastVLMError(f"{name} is {str(text)[:40]!r}", "give a string of at least one character")
    _check_length(kind, name, text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FastVLMError(f"{name} is not valid Unicode: it contains half of a surrogate pair", "pass UTF-8") from None
    return text


def _check_length(kind: str, name: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS[kind]:
        raise FastVLMError(f"{name} has {len(text)} characters, but at most {MAX_CHARACTERS[kind]} are supported", "shorten it")


def _schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`schema` and every schema in it, at any depth."""
    waiting: list[Any] = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            yield value
            for key, inner in value.items():
                if key in _NAMED_SCHEMAS and isinstance(inner, dict):
                    waiting += inner.values()
                elif key not in _VALUES:
                    waiting.append(inner)


def _check_min_properties(schema: dict[str, Any]) -> None:
    """A grammar does not know which names an object already has, so it could count one name twice."""
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least > named + 1:
        raise FastVLMError(
            f"the JSON schema has minProperties {least} with {named} required properties; a grammar can only count one more than those",
            "list the properties in required, or use an array",
        )


def _patterns_at_once(schema: Any, root: dict[str, Any], known: dict[str, int]) -> int:
    """An upper bound of how many patterns and formats meet in one string; schemas for one object meet in each of its properties.

    `known` has the number of each `$ref`. Raises FastVLMError for a reference that leads out of the schema.
    """
    if not isinstance(schema, dict):
        return 0
    count = sum(key in schema for key in ("pattern", "format"))
    below = []
    for key, value in schema.items():
        inner = value.values() if key in _NAMED_SCHEMAS and isinstance(value, dict) else value if isinstance(value, list) else [value]
        counts = [] if key in (*_VALUES, "$defs", "definitions") else [_patterns_at_once(each, root, known) for each in inner]
        if key in ("allOf", "patternProperties"):
            count += sum(counts)
        elif key in _SAME_VALUE:
            count += max(counts, default=0)
        else:
            below += counts
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference not in known:
            known[reference] = 0  # a schema that contains itself
            known[reference] = _patterns_at_once(_referenced(reference, root), root, known)
        count += known[reference]
    return count + max(below, default=0)


def _referenced(reference: str, root: dict[str, Any]) -> Any:
    """The schema that a JSON pointer "#/..." names (RFC 6901, section 6)."""
    first, *names = unquote(reference).split("/")
    try:
        if first != "#":
            raise KeyError(first)
        found: Any = root
        for name in names:
            found = found[int(name) if isinstance(found, list) else name.replace("~1", "/").replace("~0", "~")]
    except (LookupError, ValueError, TypeError):
        raise FastVLMError(
            f"the JSON schema has the $ref {reference[:80]!r}, which is not a part of it", 'refer to a part, as "#/$defs/name"'
        ) from None
    return found


def _digits(multiple_of: Any) -> int:
    """The significant digits of a number as an integer: 25 for 0.25 and for 2500. 1 for what is not a number."""
    if not isinstance(multiple_of, int | float) or isinstance(multiple_of, bool) or not multiple_of:
        return 1
    return int("".join(map(str, Decimal(str(multiple_of)).as_tuple().digits)).rstrip("0") or 1)
