"""Constrains a reply to a format: which ids may come next, and which of the model's candidates they leave. Needs llguidance."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import package_errors
from fastvlm_edge.generation.answer_format import MAX_PATTERNS, AnswerFormat, schema_text
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_JSON_OPTIONS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""White space as `json.dumps` writes it. Where any amount is allowed, a model may write nothing else until the reply is cut off."""
_END = b"<end>"
_NAMES = {"json_schema": "the JSON schema", "choices": "the list of choices", "regex": "the regex", "grammar": "the grammar"}
_LARK = re.compile(
    r"""(?P<skipped> "(?:\\.|[^"\\])*" | /(?:\\.|[^/\\])+/ | (?:\#|//)[^\n]* )
      | (?P<json> %json\b ) | (?P<special> <[^<>\s]+> ) | (?P<temperature> \btemperature\s*= ) | (?P<and> & )""",
    re.VERBOSE,
)
"""Strings, regular expressions and comments, and outside of these what needs a look (llguidance, docs/syntax.md)."""


class Grammar:
    """A format compiled for a tokenizer. Any number of replies and threads may use it at the same time."""

    def __init__(self, tokenizer: TextTokenizer, manifest: Manifest, matcher: LLMatcher) -> None:
        """`matcher` stands at the beginning of an answer and is never moved. `compile_grammar` makes a Grammar."""
        self.token_count = manifest.text.token_count
        self.stop_ids = [token_id for token_id in manifest.text.stop_ids if token_id < self.token_count]
        self._tokenizer = tokenizer  # llguidance has only a weak reference to it
        self._matcher = matcher

    def begin(self) -> GrammarState:
        """The state of a reply that has no id yet."""
        return GrammarState(self, self._matcher.deep_copy())


class GrammarState:
    """How far one reply has come in a grammar. One thread at a time may use it."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._allowed: NDArray[np.bool_] | None = None
        self._may_end = False

    def allowed(self) -> NDArray[np.bool_]:
        """Which ids may come next: [token_count], read-only. Stop ids may come where the answer may end; other special ids never may.

        Raises FastVLMError if the grammar is too complex to go on.
        """
        if self._allowed is None:
            grammar = self._grammar
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
            bits = np.unpackbits(packed, count=grammar.token_count + 1, bitorder="little").view(np.bool_)
            self._may_end = bool(bits[-1])
            self._allowed = bits[:-1]
            self._allowed[grammar.stop_ids] = self._may_end
            self._allowed.flags.writeable = False
        return self._allowed

    @property
    def ended(self) -> bool:
        """Whether the answer is complete, and nothing but a stop id is allowed."""
        allowed = self.allowed()
        return self._may_end and int(np.count_nonzero(allowed)) == len(self._grammar.stop_ids)

    def accept(self, token_id: int) -> None:
        """Move past the next id of the reply. A stop id ends the reply and moves nothing.

        Raises ValueError if the id is not allowed, and FastVLMError if the grammar is too complex to go on.
        """
        if not 0 <= token_id < self._grammar.token_count or not self.allowed()[token_id]:
            raise ValueError(f"the grammar does not allow the id {token_id} here")
        if token_id in self._grammar.stop_ids:
            return
        self._allowed = None
        self._matcher.consume_token(token_id)
        self._check()

    def forced(self, most: int) -> list[int]:
        """At most `most` ids that come next whatever the model computes, as the tokenizer writes their text.

        `allowed` permits nothing but the first of them, and then nothing but the next one.
        """
        ids = self._matcher.compute_ff_tokens()[:most]
        self._check()
        return ids

    def _check(self) -> None:
        # After an error llguidance allows the end, as if the answer were complete.
        if self._matcher.is_error():
            raise FastVLMError(
                f"the format of the answer became too complex in the middle of it ({_reason(self._matcher.get_error())})",
                "use a simpler schema, regular expression or grammar",
            )


def compile_grammar(tokenizer: TextTokenizer, manifest: Manifest, answer_format: AnswerFormat) -> Grammar:
    """Compile a format for the tokenizer of a model.

    The first call for a tokenizer takes longer, because it prepares the vocabulary, which is kept as long as the tokenizer lives.
    Raises FastVLMError if the format has a part that is not supported, or no answer matches it, and PackageError if llguidance is missing.
    """
    with package_errors("structured answers need"):
        from llguidance import LLMatcher, regex_to_lark

    name = _NAMES[answer_format.kind]
    try:
        if answer_format.kind == "json_schema":
            source = LLMatcher.grammar_from_json_schema(answer_format.source, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]
        elif answer_format.kind == "grammar":
            source = LLMatcher.grammar_from_lark(_checked_lark(answer_format.source))
        else:
            source = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(answer_format.source, use_ascii='d')}/")
    except ValueError as error:
        raise FastVLMError(f"{name} cannot be used: {_reason(str(error))}", "leave that out") from None
    matcher = LLMatcher(_vocabulary(tokenizer, manifest), source, log_level=0)
    if matcher.is_error():
        raise FastVLMError(f"{name} cannot be used: {_reason(matcher.get_error())}", "leave that out, or write it in another way")
    matcher.compute_bitmask()
    if matcher.is_error():
        raise FastVLMError(f"no answer can match {name}", "correct it")
    trial = matcher.deep_copy()
    trial.consume_tokens(trial.compute_ff_tokens())
    trial.compute_bitmask()
    if trial.is_error():  # found here, before the model has run
        raise FastVLMError(f"{name} is too complex: {_reason(trial.get_error())}", "use a simpler one")
    return Grammar(tokenizer, manifest, matcher)


# The candidates -----------------------------------------------------------------------------------------------------------------


def allowed_candidates(
    top_values: NDArray[Any],
    top_ids: NDArray[Any],
    allowed: NDArray[np.bool_],
    count: int,
    full_row: Callable[[], NDArray[Any]],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The candidates that sampling sees: the first `count` are those of the whole row after everything that is not allowed was masked.

    `top_values` and `top_ids` are [candidates], in descending order, equal values by id, and `allowed` is [token_count]. `count` is 1 for
    greedy, otherwise top_k or 64. `full_row` gives the logits [vocab] of the position, and is called only if the candidates hold too few
    allowed ids.
    """
    if not np.isfinite(top_values[0]):
        return top_values, top_ids  # the sampler refuses it
    real = top_ids < len(allowed)
    real[real] = allowed[top_ids[real]]
    found = int(np.count_nonzero(real))
    if found >= count or found == np.count_nonzero(allowed):
        return top_values[real], top_ids[real]
    ids = np.flatnonzero(allowed)
    values = full_row()[ids]
    if len(ids) > count:
        best = values >= np.partition(values, len(values) - count)[len(values) - count]
        ids, values = ids[best], values[best]
    order = np.argsort(-values, kind="stable")[:count]
    return values[order], ids[order]


# llguidance ---------------------------------------------------------------------------------------------------------------------


class _Vocabulary:
    """What LLTokenizer asks for: the bytes of every id, and how text is tokenized. One more id stands for the end of the answer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer, manifest: Manifest) -> None:
        count = manifest.text.token_count
        self.eos_token_id = count
        # llguidance takes 0xFF at the beginning of a token for the mark of a special one; that byte is never part of UTF-8.
        self.tokens = [b"" if data.startswith(b"\xff") else data for data in tokenizer.text_bytes(count)] + [_END]
        for stop_id in manifest.text.stop_ids:
            if stop_id < count:
                self.tokens[stop_id] = b""
        self.special_token_ids = [count]
        self._single = {data: token_id for token_id, data in enumerate(self.tokens) if len(data) == 1}
        self._tokenizer = ref(tokenizer)

    def __call__(self, text: str) -> list[int]:
        """The ids of exactly this text: Qwen2's tokenizer turns it into Unicode's NFC, which may be another one."""
        tokenizer = self._tokenizer()
        assert tokenizer is not None  # every Grammar holds it
        ids, data = tokenizer.encode(text), text.encode("utf-8")
        if b"".join(map(tokenizer.token_bytes, ids)) == data:
            return ids
        half = len(text) // 2
        return [*self(text[:half]), *self(text[half:])] if half else [self._single[bytes([byte])] for byte in data]


_vocabularies: WeakKeyDictionary[TextTokenizer, dict[tuple[int, ...], LLTokenizer]] = WeakKeyDictionary()
_preparing = threading.Lock()


def _vocabulary(tokenizer: TextTokenizer, manifest: Manifest) -> LLTokenizer:
    from llguidance import LLTokenizer

    key = (manifest.text.token_count, *manifest.text.stop_ids)
    with _preparing:
        known = _vocabularies.setdefault(tokenizer, {})
        if key not in known:
            vocabulary = _Vocabulary(tokenizer, manifest)
            known[key] = LLTokenizer(vocabulary)  # type: ignore[arg-type]
            vocabulary.tokens.clear()  # llguidance has copied them
        return known[key]


def _checked_lark(grammar: str) -> str:
    """The grammar with the JSON schemas in it as `schema_text` and _JSON_OPTIONS want them.

    Raises FastVLMError if it names special tokens, which never come in an answer, or a temperature.
    """
    return "".join(_lark_pieces(grammar))


def _lark_pieces(grammar: str) -> Iterator[str]:
    position = intersections = 0
    while found := _LARK.search(grammar, position):
        if found["special"] or found["temperature"]:
            what = f"the special token {found['special']}" if found["special"] else "a temperature"
            raise FastVLMError(f"the grammar has {what}, which is not supported", "leave it out")
        intersections += found["and"] is not None
        if intersections > MAX_PATTERNS:
            raise FastVLMError(f"the grammar has more than {MAX_PATTERNS} intersections (&)", "write one regular expression instead")
        yield grammar[position : found.end()]
        position = found.end()
        if found["json"]:
            begin = re.compile(r"\s*").match(grammar, position).end()  # type: ignore[union-attr]
            try:
                schema, position = json.JSONDecoder().raw_decode(grammar, begin)
            except (ValueError, RecursionError) as error:
                raise FastVLMError(f"the grammar has a JSON schema that is not JSON ({error})", "correct it") from None
            yield json.dumps({**json.loads(schema_text(schema)), "x-guidance": _JSON_OPTIONS})
    yield grammar[position:]


def _reason(error: str) -> str:
    """What llguidance says about a grammar, in one line: the parser of regular expressions has its reason in a line "error: ..."."""
    lines = [line.strip() for line in re.split("<state>|<backtrace>", error)[0].splitlines() if line.strip()] or ["it gives no reason"]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (named or lines)[0][:300]
