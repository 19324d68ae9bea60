"""The calls that an engine is checked with: the stored passage in different chunks, over different caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from fastvlm_edge.backends.verification.conversation import MOST_ROWS, SINGLE, TAIL, Passage
from fastvlm_edge.generation.session import PREFILL_CHUNK

CHUNKS = (1, 7, 16, 150)
"""The end of the passage is prefilled in chunks of these sizes."""
CALLS = 24
"""At most this many chunks of one size, so that a slow board needs seconds."""
FIRST, SECOND = 0, 1

PASSAGE, FILLER = "passage", "filler"
"""Which text a compared position belongs to. The reference knows the passage; rows of the filler are compared with each other."""


@dataclass(frozen=True)
class Call:
    """One call of the decoder."""

    at: int
    """Length of the cache before the call: it is truncated to that."""
    ids: Sequence[int]
    pictures: Sequence[int] = ()
    """The pictures whose features are given."""
    compared: Sequence[int] = ()
    """Positions whose logits are compared, at most MOST_ROWS. If empty, the logits are not looked at."""
    text: str = PASSAGE


@dataclass(frozen=True)
class Case:
    """Calls on one conversation. Each begins with an empty cache, whose memory may be left from earlier cases."""

    name: str
    calls: Sequence[Call] = field(repr=False)
    fills: bool = False
    """Whether the case fills the whole context, for which memory may be short."""

    @property
    def positions(self) -> int:
        """How many ids it feeds."""
        return sum(len(call.ids) for call in self.calls)


def all_cases(passage: Passage, context: int) -> list[Case]:
    """Every case, in the order in which the cache of a backend grows."""
    end, turn, border = len(passage.ids), passage.turn, passage.border
    first = max(border - SINGLE, 0)
    singles = [*range(first, min(border + SINGLE, end))]
    stops = sorted({0, min(turn, first), first, *(index + 1 for index in singles), end})
    one_by_one = [*_feed(passage, stops)]
    other = Call(0, passage.ids[:turn], (SECOND,))
    back = max(turn - MOST_ROWS, 0)
    hole = Call(turn, _filler(passage, min(3 * TAIL, context - turn)), (FIRST,)) if turn < context else None
    cases = [
        Case("single ids where the cache grows", one_by_one),
        Case(f"chunks of {PREFILL_CHUNK}", [*_feed(passage, _steps(0, end, PREFILL_CHUNK))]),
        Case("after a question about another picture", [other, *_feed(passage, [0, turn]), *_feed(passage, [turn, end])]),
        Case(
            "a cache with a hole",
            [*_feed(passage, [0, turn]), *([] if hole is None else [hole]), *_feed(passage, [back, *range(back + 1, turn + 1), end])],
        ),
    ]
    for size in CHUNKS:
        start = max(end - CALLS * size, 0)
        stops = [*_steps(0, start, PREFILL_CHUNK)[:-1], *_steps(start, end, size)]
        cases.append(Case(f"chunks of {size}", [*_feed(passage, stops)]))
    return [*cases, _full_context(passage, context)]


def _full_context(passage: Passage, context: int) -> Case:
    """Fill the context, compute its end again in small chunks, and then the passage before all that was left behind."""
    ids, turn, border = _filler(passage, context), passage.turn, passage.border
    calls = [Call(start, ids[start : start + PREFILL_CHUNK], (FIRST, SECOND)) for start in range(0, context, PREFILL_CHUNK)]
    last = calls[-1]
    compared = [*range(last.at, context)][-MOST_ROWS:]
    calls[-1] = replace(last, compared=compared, text=FILLER)
    back = max(context - 2 * MOST_ROWS, 0)
    for start in range(back, context, 7):
        part = ids[start : min(start + 7, context)]
        again = [position for position in compared if start <= position < start + len(part)]
        calls.append(Call(start, part, (FIRST, SECOND), again, FILLER))
    first = max(border - SINGLE, turn)
    stops = sorted({0, turn, first, *range(first, min(border + SINGLE, len(passage.ids))), len(passage.ids)})
    return Case("the whole context in the cache", [*calls, *_feed(passage, stops)], fills=True)


def _feed(passage: Passage, stops: Sequence[int]) -> Iterator[Call]:
    """The passage from the first to the last of `stops`, with a call between each two of them."""
    for start, stop in zip(stops, stops[1:], strict=False):
        pictures = (FIRST,) if stop <= passage.turn else (FIRST, SECOND)
        compared = [position for position in passage.positions if start <= position < stop][-MOST_ROWS:]
        yield Call(start, passage.ids[start:stop], pictures, compared)


def _steps(start: int, stop: int, size: int) -> list[int]:
    return [*range(start, stop, size), stop]


def _filler(passage: Passage, length: int) -> list[int]:
    """Ids of text: the end of the passage, repeated."""
    end = [*passage.ids[-TAIL:]]
    return (end * (length // len(end) + 1))[:length]
