"""What is true of any text: streaming it token by token, or in any pieces, gives exactly the whole, and nothing too early."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fastvlm_edge.inputs.detokenize import Detokenizer
from fastvlm_edge.inputs.stop_strings import StopStrings
from fastvlm_edge.inputs.tokenizer import TextTokenizer

DEMO = Path(__file__).resolve().parents[3] / "examples" / "demo" / "fastvlm-demo" / "tokenizer.json"
"""A byte-level BPE tokenizer, trained as those of Qwen2 are. It has few merges, so most characters beyond ASCII are several tokens."""

TOKENIZER, WHOLE = TextTokenizer(DEMO), Tokenizer.from_file(str(DEMO))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)  # any Unicode but halves of surrogate pairs
IDS = st.lists(st.integers(0, WHOLE.get_vocab_size() - 1), max_size=60)
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


def stream(ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(TEXT)
@example("")
@example(f"a{FAMILY}\ufffd\U0010ffff\x00 <|im_end|>\r\n")
def test_any_text_comes_back_token_by_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    pieces = stream(ids)
    assert "".join(pieces) == text == WHOLE.decode(ids, skip_special_tokens=False)
    assert pieces[-1] == "", "nothing may wait for the end of a complete text"


@given(TEXT)
@example(FAMILY)
def test_every_piece_is_as_long_as_it_can_be_and_never_half_a_character(text: str) -> None:
    """After each token, exactly the complete characters were shown: no U+FFFD that the text does not have, and none held back."""
    ids = TOKENIZER.encode(text)
    shown, raw = "", b""
    for token_id, piece in zip(ids, stream(ids), strict=False):
        shown += piece
        raw += TOKENIZER.token_bytes(token_id)
        assert shown == raw.decode("utf-8", "ignore") if "\ufffd" not in text else text.startswith(shown)


@given(IDS)
def test_any_ids_give_what_decoding_all_at_once_gives(ids: list[int]) -> None:
    """Also ids that no text encodes to, as a model may sample them; special tokens have no text."""
    assert "".join(stream(ids)) == WHOLE.decode(ids, skip_special_tokens=True)


def cut(text: str, strings: list[str]) -> tuple[str, str | None]:
    """The definition: of the stop strings, the one that is complete first counts, and of those that end together the longest."""
    for end in range(1, len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces_of(text: str, borders: list[int]) -> list[str]:
    places = [0, *sorted(border % (len(text) + 1) for border in borders), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


FEW = st.text("ab\n\U0001f600", max_size=30)  # few letters, so that texts and stop strings overlap in every way
STRINGS = st.lists(st.text("ab\n\U0001f600", min_size=1, max_size=5), max_size=4)
BORDERS = st.lists(st.integers(0, 1000), max_size=20)


@given(FEW, STRINGS, BORDERS)
@example("xabcd", ["bcd", "c"], [])  # the longer one begins first, the shorter one ends first
@example("xabcd", ["bcd", "c"], [4])
@example("xabc", ["abc", "ab"], [])
@example("aab", ["b", "ab"], [1, 2])
def test_the_pieces_joined_are_the_text_up_to_the_first_stop_string(text: str, strings: list[str], borders: list[int]) -> None:
    stops = StopStrings(strings)
    shown = "".join(stops.push(piece) for piece in pieces_of(text, borders)) + stops.flush()
    assert (shown, stops.found) == cut(text, strings)


@given(FEW, STRINGS, BORDERS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, strings: list[str], borders: list[int]) -> None:
    stops, shown, given_so_far = StopStrings(strings), "", ""
    for piece in pieces_of(text, borders):
        shown += stops.push(piece)
        given_so_far += piece
        if stops.found is not None:
            break
        held = given_so_far[len(shown) :]
        assert given_so_far == shown + held
        assert held == "" or any(string.startswith(held) and string != held for string in strings)


@given(FEW, STRINGS.filter(bool), FEW)
def test_nothing_is_shown_after_a_stop_string(text: str, strings: list[str], more: str) -> None:
    stops = StopStrings(strings)
    stops.push(text + strings[0])
    found = stops.found
    assert found is not None
    assert (stops.push(more), stops.flush(), stops.found) == ("", "", found)


@pytest.mark.parametrize("text", ["It reads 042.", FAMILY])
def test_without_stop_strings_everything_is_shown_at_once(text: str) -> None:
    stops = StopStrings([])
    assert [stops.push(character) for character in text] == list(text) and stops.flush() == ""
