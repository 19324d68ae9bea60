"""Structured answers: a "model" with random logits writes them, and they always match. The mask equals that of the whole row."""

from __future__ import annotations

import json
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.errors import PackageError
from fastvlm_edge.generation.answer_format import MAX_CHARACTERS, AnswerFormat, answer_format, read_schema
from fastvlm_edge.generation.grammar import Grammar, GrammarState, allowed_candidates, compile_grammar
from fastvlm_edge.generation.sampling import MAX_TOP_K, Sampler, SamplingParams
from fastvlm_edge.inputs.detokenize import Detokenizer
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

DEMO = Path(__file__).resolve().parents[3] / "fastvlm_edge" / "demo" / "model"
METER = {
    "type": "object",
    "properties": {
        "reading": {"type": "string", "pattern": "^[0-9]{4,6}$"},
        "unit": {"enum": ["kWh", "m\u00b3", "<|im_end|>"]},
        "sealed": {"type": "boolean"},
        "dials": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 5},
    },
    "required": ["reading", "unit", "dials"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    METER,
    {
        "type": "object",
        "properties": {"a": {"type": "number", "exclusiveMinimum": 0.1, "maximum": 0.35}, "b": {"type": ["null", "boolean"]}},
    },
    {"anyOf": [{"const": {"x": [1, "two", None]}}, {"type": "string", "maxLength": 6}, {"type": "integer", "multipleOf": 7}]},
    {"type": "array", "prefixItems": [{"type": "string", "format": "date"}, {"enum": [1, 2.5, True]}], "items": False, "minItems": 2},
    {
        "$defs": {
            "node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}
        },
        "$ref": "#/$defs/node",
    },
    {
        "type": "object",
        "patternProperties": {"^[a-c]{1,3}$": {"type": "integer", "maximum": 99}},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    {
        "type": "object",
        "properties": {"const": {"minLength": 2, "maxLength": 3, "type": "string"}},
        "required": ["const"],
        "minProperties": 2,
    },
    {
        "allOf": [
            {"type": "object", "properties": {"p": {"type": "string", "pattern": "o$", "maxLength": 9}}, "required": ["p"]},
            {"maxProperties": 1},
        ]
    },
    {"type": "object"},
    {},
]
REGEXES = [
    r"[0-9]{3}-[0-9]{2}",
    r"(yes|no|not visible)",
    r"^\d+(\.\d{1,2})? (kWh|m\u00b3)$".replace(r"\u00b3", "\u00b3"),
    r"(?i)ab?c*[^a-z\n]",
    r"(a/b|\"'`|\\){2,5}",
    r"",
]
CHOICES = [
    ["yes", "no"],
    ["a", "ab", "abc"],
    ["<|im_end|>", "<image>", 'say "x"\n\x7f/'],
    ["\U0001f600", "e\u0301", "\u00e9t\u00e9", "de\u0301ja\u0300 \u212b"],
]


@pytest.fixture(scope="module", params=["demo", "tiny"])
def text(request: pytest.FixtureRequest, model_dir: Path) -> tuple[TextTokenizer, Manifest]:
    directory = DEMO if request.param == "demo" else model_dir
    return TextTokenizer(directory / "tokenizer.json"), read_manifest(directory)


Text = tuple[TextTokenizer, Manifest]


def compiled(text: Text, **options: Any) -> Grammar:
    wanted = answer_format(**options)
    assert wanted is not None
    return compile_grammar(*text, wanted)


class RandomModel:
    """Random logits, with candidates as the decoder graph gives them. It prefers what ends a string, an object or a list."""

    def __init__(self, text: Text, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        tokenizer, manifest = text
        self._vocab, self._count = manifest.decoder.vocab, manifest.text.token_count
        self._ends = [token_id for token_id in range(self._count) if tokenizer.token_bytes(token_id) in (b'"', b"}", b"]", b'"}', b'"]')]
        self._stops = manifest.text.stop_ids
        self.rows = 0

    def step(self) -> tuple[Any, Any, Callable[[], Any]]:
        """Values and ids of the candidates, and what gives the whole row."""
        row = self._random.normal(0, 4, self._vocab).astype(np.float32)
        row[: self._count] = np.round(row[: self._count])  # many equal values
        row[self._ends] += 6
        row[self._stops] += 3
        ids = np.argsort(-row, kind="stable")[:MAX_TOP_K]

        def whole() -> Any:
            self.rows += 1
            return row

        return row[ids], ids, whole


def written(grammar: Grammar, text: Text, seed: int, params: SamplingParams, most: int = 400) -> tuple[str, bool]:
    """A random answer, and whether it is complete. Every id is compared with that of the whole row under the same mask."""
    tokenizer, manifest = text
    model, state, detokenizer = RandomModel(text, seed), grammar.begin(), Detokenizer(tokenizer)
    sampler, reference = (Sampler(params, grammar.token_count) for _ in range(2))
    count = 1 if params.temperature == 0 else params.top_k or MAX_TOP_K
    pieces: list[str] = []
    for _ in range(most):
        values, ids, whole = model.step()
        allowed = state.allowed()
        forbidden = (tokenizer.special_ids - set(manifest.text.stop_ids)) | ({*manifest.text.stop_ids} if state_is_open(state) else set())
        assert len(allowed) == manifest.text.token_count and not allowed[[*forbidden]].any()
        chosen = sampler.next(*allowed_candidates(values, ids, allowed, count, whole))
        masked = np.where(allowed, whole()[: len(allowed)], -np.inf)
        order = np.argsort(-masked, kind="stable")[:MAX_TOP_K]
        assert chosen == reference.next(masked[order], order)
        state.accept(chosen)
        if chosen in manifest.text.stop_ids:
            return "".join([*pieces, detokenizer.flush()]), True
        pieces.append(detokenizer.push(chosen))
    return "".join(pieces), False


def state_is_open(state: GrammarState) -> bool:
    """Whether the answer may not end here, by the parser of llguidance and not by its mask."""
    return not state._matcher.is_accepting()


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=2.0, top_k=3, seed=4),
    SamplingParams(temperature=1.5, top_p=0.7, seed=5),
]


def all_written(text: Text, matches: Callable[[str], bool], seeds: int = 4, **options: Any) -> None:
    grammar = compiled(text, **options)
    complete = 0
    for index, params in enumerate(PARAMS):
        for seed in range(seeds):
            answer, done = written(grammar, text, 100 * index + seed, params)
            assert not done or matches(answer), answer
            complete += done
    assert complete >= seeds, "hardly any answer was finished"


def valid_json(schema: Any, answer: str) -> bool:
    """Valid for the schema, and with the white space of json.dumps."""
    jsonschema.Draft202012Validator(schema).validate(json.loads(answer))
    bare = re.sub(r'"(?:\\.|[^"\\])*"', '""', answer)
    return re.fullmatch(r"(?:[^\s,:]|, |: )*", bare) is not None


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_every_finished_answer_is_valid_json_and_the_mask_is_that_of_the_whole_row(text: Text, schema: dict[str, Any]) -> None:
    all_written(text, lambda answer: valid_json(schema, answer), json_schema=schema)


@pytest.mark.parametrize("regex", REGEXES)
def test_every_finished_answer_matches_the_regex(text: Text, regex: str) -> None:
    if regex:
        all_written(text, lambda answer: re.fullmatch(regex, answer) is not None, regex=regex)
    else:
        with pytest.raises(FastVLMError, match="at least one character"):
            answer_format(regex=regex)


@pytest.mark.parametrize("choices", CHOICES, ids=range(len(CHOICES)))
def test_every_answer_is_one_of_the_choices_and_each_can_come(text: Text, choices: list[str]) -> None:
    all_written(text, choices.__contains__, choices=choices)
    grammar = compiled(text, choices=choices)
    tokenizer, manifest = text
    for choice in choices:
        state = grammar.begin()
        rest = choice.encode()
        while rest:
            fitting = [int(each) for each in np.flatnonzero(state.allowed()) if rest.startswith(tokenizer.token_bytes(int(each)))]
            token_id = max(fitting, key=lambda each: len(tokenizer.token_bytes(each)))
            state.accept(token_id)
            rest = rest[len(tokenizer.token_bytes(token_id)) :]
        assert state.allowed()[manifest.text.stop_ids].all()
        assert state.ended == (not any(other != choice and other.startswith(choice) for other in choices))


def test_a_grammar_in_lark_syntax_constrains_too(text: Text) -> None:
    lark = 'start: "reads " NUMBER unit? // <not a token>\nunit: " " ("kWh" | "<b>")\nNUMBER: /[0-9]{1,4}/'
    all_written(text, lambda answer: re.fullmatch(r"reads [0-9]{1,4}( (kWh|<b>))?", answer) is not None, grammar=lark)
    inside = (
        'start: "= " %json {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false} "."'
    )
    all_written(text, ['= {"a": 1}.', '= {"a": 2}.'].__contains__, grammar=inside)


def test_the_answers_of_a_bounded_schema_are_bounded(text: Text) -> None:
    longest = '{"reading": "012345", "unit": "<|im_end|>", "sealed": false, "dials": [1, 2, 3, 4, 5]}'
    grammar = compiled(text, json_schema=METER)
    for seed in range(20):
        answer, done = written(grammar, text, seed, PARAMS[seed % len(PARAMS)])
        assert done and len(answer) <= len(longest)


@pytest.mark.parametrize(
    "options",
    [{"json_schema": METER}, {"choices": ["the meter is broken", "the meter is hidden"]}, {"regex": "Zähler [0-9] e\u0301t\u00e9 \u212b"}],
)
def test_forced_ids_are_what_the_mask_permits_and_change_nothing(text: Text, options: dict[str, Any]) -> None:
    grammar = compiled(text, **options)
    drafted = 0
    for seed in range(10):
        random = np.random.default_rng(seed)
        state, without = grammar.begin(), grammar.begin()
        for _ in range(200):
            draft = state.forced(6)
            assert len(draft) <= 6
            assert (state.allowed() == without.allowed()).all(), "asking for forced ids changed the mask"
            for token_id in draft:
                drafted += 1
                assert np.flatnonzero(state.allowed()).tolist() == [token_id], "the model has a choice"
                for each in (state, without):
                    each.accept(token_id)
            if state.ended:
                break
            chosen = int(random.choice(np.flatnonzero(state.allowed())))
            if chosen in text[1].text.stop_ids:
                break
            for each in (state, without):
                each.accept(chosen)
    assert drafted


def test_forced_ids_are_those_of_the_tokenizer(text: Text) -> None:
    tokenizer, _ = text
    answer = '{"reading": "'
    draft = compiled(text, json_schema=METER).begin().forced(100)
    assert len(draft) >= 3
    assert draft == tokenizer.encode(answer)[: len(draft)]
    assert compiled(text, json_schema=METER).begin().forced(2) == draft[:2]
    assert compiled(text, choices=["<|im_end|>"]).begin().forced(100) == tokenizer.encode("<|im_end|>")


def test_the_whole_row_is_asked_for_only_if_the_candidates_do_not_decide(text: Text) -> None:
    allowed = np.zeros(text[1].text.token_count, bool)
    model = RandomModel(text, 0)
    values, ids, whole = model.step()
    real = ids[ids < len(allowed)]
    allowed[real[3:5]] = True
    assert allowed_candidates(values, ids, allowed, 1, whole)[1].tolist() == real[3:5].tolist()
    assert allowed_candidates(values, ids, allowed, 64, whole)[1].tolist() == real[3:5].tolist()
    assert model.rows == 0
    outside = int(np.setdiff1d(np.arange(len(allowed)), ids)[0])
    allowed[outside] = True
    assert allowed_candidates(values, ids, allowed, 2, whole)[1].tolist() == real[3:5].tolist()
    assert model.rows == 0
    assert allowed_candidates(values, ids, allowed, 3, whole)[1].tolist() == [*real[3:5], outside]
    assert model.rows == 1
    allowed[:] = False
    allowed[outside] = True
    assert allowed_candidates(values, ids, allowed, 1, whole)[1].tolist() == [outside]
    assert model.rows == 2


def test_a_row_that_is_not_finite_is_still_reported(text: Text) -> None:
    allowed = np.ones(text[1].text.token_count, bool)
    values, ids, whole = RandomModel(text, 0).step()
    for bad in (np.nan, np.inf):
        values[0] = bad
        with pytest.raises(FastVLMError, match="not finite"):
            Sampler(SamplingParams(), len(allowed)).next(*allowed_candidates(values, ids, allowed, 1, whole))


def test_a_masked_row_with_a_repetition_penalty_gives_allowed_ids_only(text: Text) -> None:
    allowed = np.zeros(text[1].text.token_count, bool)
    allowed[[7, 30, 31]] = True
    sampler = Sampler(SamplingParams(temperature=3.0, repetition_penalty=1.3, seed=0), len(allowed))
    for seed in range(200):
        values, ids, whole = RandomModel(text, seed).step()
        assert sampler.next(values, ids, np.where(allowed, whole()[: len(allowed)], -np.inf)) in (7, 30, 31)


def test_stop_ids_beyond_the_vocabulary_do_not_matter_and_all_others_end(text: Text) -> None:
    tokenizer, manifest = text
    stop_ids = [*manifest.text.stop_ids, manifest.text.token_count]
    other = replace(manifest, text=replace(manifest.text, stop_ids=stop_ids), decoder=replace(manifest.decoder, vocab=9999))
    state = compiled((tokenizer, other), choices=["a"]).begin()
    assert not state.ended and not state.allowed()[manifest.text.stop_ids].any()
    state.accept(int(np.flatnonzero(state.allowed())[0]))
    assert np.flatnonzero(state.allowed()).tolist() == sorted(manifest.text.stop_ids) and state.ended
    state.accept(manifest.text.stop_ids[0])
    assert state.ended


def test_an_id_that_is_not_allowed_is_refused(text: Text) -> None:
    state = compiled(text, choices=["yes", "no"]).begin()
    for token_id in (text[1].text.stop_ids[0], text[1].text.token_count, -1, text[0].encode("x")[0]):
        with pytest.raises(ValueError, match="does not allow"):
            state.accept(token_id)
    assert state.allowed().any()


def test_one_grammar_serves_many_threads(text: Text) -> None:
    grammar = compiled(text, json_schema=METER)
    expected = [written(grammar, text, seed, PARAMS[1]) for seed in range(8)]
    found: list[Any] = [None] * 8
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(3):
                found[seed] = written(grammar, text, seed, PARAMS[1])
                assert compiled(text, json_schema=METER).begin().forced(2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and found == expected


def test_a_vocabulary_goes_with_its_tokenizer(model_dir: Path) -> None:
    import gc
    import weakref

    tokenizer = TextTokenizer(model_dir / "tokenizer.json")
    gone = weakref.ref(tokenizer)
    state = compiled((tokenizer, read_manifest(model_dir)), choices=["yes"]).begin()
    del tokenizer
    gc.collect()
    assert state.forced(9) and gone() is not None, "a state needs the tokenizer"
    del state
    gc.collect()
    assert gone() is None


# What is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"properties": {"a": {"if": {}, "then": {}}}}, "if"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "string", "format": "iban"}, "iban"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "string", "pattern": r"\bword"}, "lookarounds"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"patternProperties": {"^a": {}, "^ab": {}}}, "patternProperty"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"type": "text"}, "text"),
        ({"enum": []}, "anyOf is empty"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$ref": "#name", "$defs": {"a": {"$anchor": "name"}}}, "#name"),
        ({"$ref": "#/$defs/gone"}, "gone"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no answer"),
        ({"x-guidance": {"whitespace_flexible": True}}, "x-guidance"),
        ({"type": "object", "properties": {"a": {"type": "object", "minProperties": 2}}}, "minProperties 2"),
        ({"type": "integer", "multipleOf": 99999937}, "multipleOf"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 9.91}]}, "multipleOf"),
        ({"enum": [f"word {index}" for index in range(9000)]}, "at most 16384"),
        ({"allOf": [{"pattern": f"x{index}"} for index in range(9)]}, "9 values of pattern and format"),
        (
            {
                "$defs": {f"d{index}": {"pattern": f"x{index}", "$ref": f"#/$defs/d{index + 1}"} for index in range(9)} | {"d9": {}},
                "$ref": "#/$defs/d0",
            },
            "9 values",
        ),
        ({"allOf": [{"properties": {"a": {"anyOf": [{"pattern": f"x{index}"}, {}]}}} for index in range(9)]}, "9 values"),
        ({"type": "object", "properties": {f"p{index}": {} for index in range(900)}}, "too complex"),
        ({"patternProperties": {f"^{index:02}": {} for index in range(17)}}, "17 patternProperties, but at most 16"),
        ({"items": {"patternProperties": {f"^{index}": {} for index in range(4)}}, "anyOf": [{}, {}]}, "4 patternProperties beside allOf"),
        ({"const": float("nan")}, "not JSON"),
        ({"const": {1, 2}}, "not JSON"),
        ({"const": "\ud800"}, "JSON"),
        ([], "object"),
        (False, "object"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_by_name(text: Text, schema: Any, named: str) -> None:
    with pytest.raises(FastVLMError, match=re.escape(named)) as raised:
        compiled(text, json_schema=schema)
    assert raised.value.mend and "\n" not in str(raised.value)


def test_deep_nesting_is_an_error_of_the_user(text: Text) -> None:
    for depth in (200, 20_000):
        schema: dict[str, Any] = {}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        with pytest.raises(FastVLMError, match=r"recursion|deep|characters"):
            compiled(text, json_schema=schema)
        with pytest.raises(FastVLMError, match=r"recursion|deep|not JSON|characters"):
            compiled(text, grammar="start: %json " + '{"items": ' * depth + "true" + "}" * depth)
    with pytest.raises(FastVLMError, match="nest"):
        compiled(text, regex="(" * 4_000 + "a" + ")" * 4_000)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"regex": "(?<=a)b"}, "look-behind"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "a{2,1}"}, "repetition"),
        ({"regex": r"a\b"}, "lookarounds"),
        ({"regex": "\ud800"}, "surrogate"),
        ({"regex": "a\\\\\\"}, "backslash"),
        ({"regex": "a" * (MAX_CHARACTERS["regex"] + 1)}, "characters"),
        ({"regex": 3}, "regex is '3'"),
        ({"choices": []}, "no choices"),
        ({"choices": ["a", ""]}, "at least one character"),
        ({"choices": ["a", "b", "a"]}, "'a' is given twice"),
        ({"choices": "yes"}, "list of strings"),
        ({"choices": ["a", 1]}, "the choice"),
        ({"choices": [f"{index:09}" for index in range(9000)]}, "list of choices"),
        ({"grammar": 'start: "a'}, "1(10)"),
        ({"grammar": 'begin: "a"'}, "start"),
        ({"grammar": 'start: "a" <|im_start|>'}, "<|im_start|>"),
        ({"grammar": "start: <[*]>"}, "<[*]>"),
        ({"grammar": "start: a\na[temperature=0.5]: /a*/"}, "temperature"),
        ({"grammar": 'start: %json {"not": {}}'}, "not"),
        ({"grammar": 'start: %json {"minProperties": 9}'}, "minProperties"),
        ({"grammar": "start: %json {"}, "not JSON"),
        ({"grammar": "start: A\nA: " + " & ".join(["/a*/"] * 12)}, "intersections"),
        ({"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000}, "deeply nested"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"regex": "a", "choices": ["a"]}, "choices and regex"),
    ],
)
def test_other_formats_that_cannot_be_kept_are_refused_by_name(text: Text, options: dict[str, Any], named: str) -> None:
    with pytest.raises(FastVLMError, match=re.escape(named)) as raised:
        compiled(text, **options)
    assert raised.value.mend and "\n" not in str(raised.value)


PAIRS: dict[str, Any] = {f"^.*a.{{4}}{index:02}$": {} for index in range(16)}
"""Patterns of which it takes long to find out that no text matches two, but not so long that llguidance gives up."""


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "a*" * (MAX_CHARACTERS["regex"] // 2 - 1) + "b"},
        {"json_schema": {"pattern": "a?" * 8000}},
        {"json_schema": {"patternProperties": PAIRS}},
        {
            "json_schema": {
                "$defs": {"p": {"patternProperties": dict([*PAIRS.items()][:3])}},
                "properties": {f"q{index}": {"allOf": [{"$ref": "#/$defs/p"}, {"minProperties": index % 2}]} for index in range(230)},
            }
        },
        {"choices": [f"{index * 7919 % 100003:05}" for index in range(13_000)]},
    ],
)
def test_the_slowest_formats_compile_in_bounded_time(text: Text, options: dict[str, Any]) -> None:
    """In time of this thread, about a second: nobody can stop llguidance when a client has gone away."""
    began = time.thread_time()
    with suppress(FastVLMError):
        compiled(text, **options)
    assert time.thread_time() - began < 3


def test_response_format_is_that_of_the_openai_api() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    wrapped = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    expected = AnswerFormat("json_schema", json.dumps(schema))
    assert answer_format(response_format=wrapped) == answer_format(json_schema=schema) == expected
    assert answer_format(response_format={"type": "json_object"}) == AnswerFormat("json_schema", '{"type": "object"}')
    assert answer_format(json_schema=True) == AnswerFormat("json_schema", "{}")
    assert answer_format(response_format={"type": "text"}) is None
    assert answer_format() is None


def test_a_file_with_a_schema_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    with pytest.raises(FastVLMError, match=r"schema\.json cannot be read"):
        read_schema(path)
    for content in (b"{", b"\xff\xfe{", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(FastVLMError, match=r"schema\.json is not JSON"):
            read_schema(path)
    path.write_text(json.dumps(METER))
    assert read_schema(path) == METER


def test_what_becomes_too_complex_in_the_middle_is_an_error_and_no_short_answer(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    state = compiled(text, choices=["yes", "no"]).begin()

    class Broken:
        def compute_bitmask(self) -> bytes:
            return b"\xff" * 4096

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "ParserTooComplex\n<state>\nmuch"

    monkeypatch.setattr(state, "_matcher", Broken())
    with pytest.raises(FastVLMError, match=r"too complex in the middle of it \(ParserTooComplex\)"):
        state.allowed()


def test_without_the_package_the_error_names_the_extra(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("fastvlm_edge.extras.metadata.version", unknown)
    with pytest.raises(PackageError, match=r"structured answers need the package llguidance.*\[structured\]"):
        compiled(text, choices=["a"])


def test_a_mask_takes_less_than_a_small_step(text: Text) -> None:
    """20 ms would be as long as a step of the 0.5B model; the median is far below a millisecond."""
    grammar = compiled(text, json_schema=METER)
    times: list[float] = []
    for seed in range(5):
        random, state = np.random.default_rng(seed), grammar.begin()
        while not state.ended and len(times) < 500:
            began = time.perf_counter()
            allowed = state.allowed()
            times.append(time.perf_counter() - began)
            state.accept(int(random.choice(np.setdiff1d(np.flatnonzero(allowed), text[1].text.stop_ids))))
    assert statistics.median(times) < 0.02
