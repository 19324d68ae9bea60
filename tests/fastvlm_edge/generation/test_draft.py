"""A draft changes when tokens are known and never which: greedy, sampled, right, wrong or half right."""

from __future__ import annotations

import random
from itertools import takewhile
from typing import Any

import pytest
from skimage import data

from fastvlm_edge import FastVLM
from fastvlm_edge.generation import answer
from fastvlm_edge.generation.draft import MOST, PromptLookup, StepCosts

VOCAB = 100


def costs(**more: float) -> StepCosts:
    """Seconds by number of ids: `costs(n2=1.1)`."""
    found = StepCosts()
    for _ in range(3):
        found.add(1, 1.0)
        for name, seconds in more.items():
            found.add(int(name[1:]), seconds)
    return found


def test_a_guess_is_what_followed_the_latest_earlier_occurrence() -> None:
    assert PromptLookup([1, 2, 3, 4, 5, 1, 2, 3], VOCAB).find(8) == [4, 5, 1, 2, 3]
    assert PromptLookup([1, 2, 3, 4, 1, 2, 3, 9, 1, 2, 3], VOCAB).find(2) == [9, 1]
    assert PromptLookup([7, 2, 3, 4, 8, 2, 3], VOCAB).find(1) == [4], "two ids if three are unknown"
    assert PromptLookup([1, 2, 3, 4], VOCAB).find(8) == []
    assert PromptLookup([1, 2, VOCAB, 5, 1, 2], VOCAB).find(8) == [], "rows of a picture are no text"
    assert PromptLookup([1, 2, 4, VOCAB, 5, 1, 2], VOCAB).find(8) == [4]


def test_a_guess_is_found_wherever_a_plain_search_finds_it() -> None:
    """Ids share bytes here, so that their bytes are also found between two ids."""
    vocab, chance = 100_000, random.Random(0)
    pool = [1, 256, 257, 65536, 65537, vocab, vocab + 1]
    for _ in range(2000):
        ids = [chance.choice(pool) for _ in range(chance.randrange(40))]
        lookup = PromptLookup(ids[: len(ids) // 2], vocab)
        for token_id in ids[len(ids) // 2 :]:
            lookup.append(token_id)
        assert lookup.find(4) == _searched(ids, vocab, 4)


def _searched(ids: list[int], vocab: int, most: int) -> list[int]:
    for size in (3, 2):
        last = ids[-size:]
        if len(last) == size and max(last) < vocab:
            starts = [start for start in range(len(ids) - size) if ids[start : start + size] == last]
            found = ids[starts[-1] + size :][:most] if starts else []
            text = list(takewhile(vocab.__gt__, found))
            if text:
                return text
    return []


def test_nothing_is_verified_before_guesses_were_right() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3], VOCAB)
    assert lookup.draft(costs(), MOST) == []
    for token_id in (4, 5, 6):
        lookup.append(token_id)
    assert lookup.draft(costs(), 2) == [7, 8]
    assert len(lookup.draft(costs(), MOST)) >= 2
    for token_id in (50, 51, 1, 2, 60, 1, 2, 61, 1, 2, 62, 1, 2, 63, 1, 2, 64, 1, 2, 65, 1, 2, 66, 1, 2, 67, 1, 2):
        lookup.append(token_id)
    assert lookup.find(MOST) and lookup.draft(costs(), MOST) == [], "guesses were wrong since"


def test_the_length_follows_from_the_cost_of_a_step() -> None:
    lookup = PromptLookup([*range(1, 30), 1, 2, 3], VOCAB)
    for token_id in range(4, 20):
        lookup.append(token_id)
    assert lookup.rate > 0.8
    flat = {f"n{number}": 1.01 for number in range(2, MOST + 2)}
    assert len(lookup.draft(costs(**flat), MOST)) == MOST
    assert len(lookup.draft(costs(**{**flat, "n4": 5.0, "n5": 5.0, "n6": 5.0, "n7": 5.0, "n8": 5.0, "n9": 5.0}), MOST)) == 2
    dear = {f"n{number}": float(number) for number in range(2, MOST + 2)}
    assert lookup.draft(costs(**dear), MOST) == [], "rows that cost as much as steps"


def test_one_slow_call_does_not_spoil_the_costs() -> None:
    found = costs(n2=1.1)
    found.add(2, 100.0)
    assert found.ratio(2) == pytest.approx(1.1)


class Guesses(PromptLookup):
    """Guesses the true reply with errors, and is always believed."""

    truth: list[int]
    chance: random.Random

    def draft(self, costs: StepCosts, most: int) -> list[int]:
        known = len(self._ids) - self.prompt
        wrong = [token_id if self.chance.random() < 0.7 else (token_id + 1) % 400 for token_id in self.truth[known:]]
        return wrong[: min(most, self.chance.randrange(MOST + 1))]

    def __init__(self, ids: Any, vocab: int) -> None:
        self.prompt = len(ids)
        super().__init__(ids, vocab)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 2.0, "top_p": 0.9, "seed": 6}, {"repetition_penalty": 3.0}, {"stop": "zzzz"}],
)
def test_a_draft_changes_no_reply(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(vlm, "_speculate", False)
    prompts = [("What does the meter read?", data.coffee()), ("Describe the picture. " * 25, None)]
    plain = [vlm.generate(prompt, picture, max_new_tokens=50, **options) for prompt, picture in prompts]
    monkeypatch.setattr(vlm, "_speculate", True)
    monkeypatch.setattr(answer, "PromptLookup", Guesses)
    before = vlm.counters()
    for seed in range(4):
        for (prompt, picture), expected in zip(prompts, plain, strict=True):
            Guesses.truth, Guesses.chance = [*expected.token_ids, 7, 7, 7], random.Random(seed)
            reply = vlm.generate(prompt, picture, max_new_tokens=50, **options)
            assert (reply.token_ids, reply.text, reply.stop_reason) == (expected.token_ids, expected.text, expected.stop_reason)
            assert reply.confidence is not None and expected.confidence is not None
            assert reply.confidence.mean == pytest.approx(expected.confidence.mean, rel=1e-3)
    after = vlm.counters()
    drafted, accepted = after.drafted_tokens - before.drafted_tokens, after.accepted_tokens - before.accepted_tokens
    assert drafted > accepted > 50


def test_a_chat_goes_on_after_drafts(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk() -> list[list[int]]:
        chat = vlm.chat()
        return [chat.ask(prompt, max_new_tokens=20).token_ids for prompt in ("One?", "Two?", "Three?")]

    monkeypatch.setattr(vlm, "_speculate", False)
    expected = talk()
    monkeypatch.setattr(vlm, "_speculate", True)
    monkeypatch.setattr(answer, "PromptLookup", Guesses)
    Guesses.truth, Guesses.chance = expected[1], random.Random(1)
    assert talk() == expected
