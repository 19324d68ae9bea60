"""What the cases cover, for passages of every length that a context allows."""

from __future__ import annotations

import pytest

from fastvlm_edge.backends.kv_cache import next_capacity
from fastvlm_edge.backends.verification.cases import CALLS, FILLER, STEPS_TOGETHER, Case, all_cases, together
from fastvlm_edge.backends.verification.conversation import MOST_ROWS, SINGLE, TAIL, Passage, compared_positions

VOCAB = 1000


def passage_of(length: int, turn: int) -> Passage:
    ids = [index % VOCAB for index in range(length)]
    return Passage(ids, turn, compared_positions(length, turn))


@pytest.fixture
def cases() -> dict[str, Case]:
    """Those of a 0.5B model at 1024 px: 256 visual tokens a picture."""
    return {case.name: case for case in all_cases(passage_of(620, 306), 4096)}


@pytest.mark.parametrize(
    ("length", "turn", "context"), [(576, 66, 4096), (620, 306, 4096), (1252, 626, 2048), (320, 306, 320), (90, 90, 90)]
)
def test_every_call_is_one_that_an_engine_accepts(length: int, turn: int, context: int) -> None:
    for case in all_cases(passage_of(length, turn), context):
        held = 0
        for call in case.calls:
            assert call.at <= held, "a call would leave a gap in the cache"
            held = call.at + len(call.ids)
            assert 0 < len(call.ids) <= 512 and held <= context
            assert len(call.compared) <= MOST_ROWS
            assert all(call.at <= position < held for position in call.compared)
        assert any(call.compared for call in case.calls), f"{case.name} compares nothing"


def test_a_chunk_of_512_asks_for_16_rows(cases: dict[str, Case]) -> None:
    first = cases["chunks of 512"].calls[0]
    assert len(first.ids) == 512 and list(first.compared) == list(range(496, 512))


def test_single_ids_are_compared_on_both_sides_of_a_border_of_the_cache(cases: dict[str, Case]) -> None:
    singles = [call for call in cases["single ids where the cache grows"].calls if len(call.ids) == 1]
    assert [call.at for call in singles] == list(range(512 - SINGLE, 512 + SINGLE))
    assert all(call.compared for call in singles)
    capacities = [next_capacity(call.at + 1) for call in singles]
    assert capacities == [512] * SINGLE + [640] * SINGLE  # enough on either side to run, to capture a graph and to launch it


def test_the_second_picture_joins_after_the_first_turn(cases: dict[str, Case]) -> None:
    for case in list(cases.values())[:-1]:
        held: set[int] = set()
        for call in case.calls:
            if case.name == "after a question about another picture" and call is case.calls[0]:
                assert list(call.pictures) == [1] and not call.compared
                continue
            held |= set(call.pictures)
            assert list(call.pictures) == ([0] if call.at + len(call.ids) <= 306 else [0, 1])
        assert held == {0, 1}


def test_a_hole_is_left_by_other_ids_that_were_forgotten(cases: dict[str, Case]) -> None:
    calls = cases["a cache with a hole"].calls
    other, after = calls[1], calls[2]
    assert other.at == 306 and len(other.ids) == 3 * TAIL and not other.compared
    assert after.at < other.at, "nothing was truncated"


def test_the_context_is_filled_and_its_end_computed_twice(cases: dict[str, Case]) -> None:
    case = cases["the whole context in the cache"]
    assert case.fills
    filler = [call for call in case.calls if call.text == FILLER]
    filled = max(call.at + len(call.ids) for call in case.calls)
    assert filled == 4096
    compared = [position for call in filler for position in call.compared]
    assert sorted(compared) == sorted([*range(4080, 4096)] * 2)
    back = case.calls.index(filler[-1]) + 1
    assert case.calls[back].at == 0, "the passage comes before what was left in the cache"


def test_small_chunks_cover_the_end_of_the_passage(cases: dict[str, Case]) -> None:
    for size in (1, 7, 16, 150):
        calls = cases[f"chunks of {size}"].calls
        small = [call for call in calls if call.at >= max(620 - CALLS * size, 0)]
        assert {len(call.ids) for call in small[:-1]} == {size} and len(small) <= CALLS
        assert 619 in small[-1].compared


def test_it_takes_a_number_of_calls_that_a_slow_board_can_afford(cases: dict[str, Case]) -> None:
    assert sum(len(case.calls) for case in cases.values()) < 200
    assert sum(case.positions for case in cases.values()) < 4096 + 11 * 620


@pytest.mark.parametrize("count", [2, 4, 8])
def test_conversations_together_differ_in_length_and_take_compared_text(count: int) -> None:
    passage = passage_of(620, 306)
    vocab = 600  # so that the ids 600 to 619, near the end, are rows of pictures
    starts = together(passage, vocab, count)
    assert len(set(starts)) == count and starts == sorted(starts, reverse=True)
    for start in starts:
        assert set(range(start, start + STEPS_TOGETHER)) <= set(passage.positions)
        assert max(passage.ids[start : start + STEPS_TOGETHER]) < vocab
    assert together(passage, 0, count) == []
