"""The calls that an engine is checked with: the stored passage in different chunks, over different caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fastvlm_edge.backends.protocol import PREFILL_CHUNK
from fastvlm_edge.backends.verification.conversation import MOST_ROWS, SINGLE, TAIL, Passage

CHUNKS = (1, 7, 16, 150)
"""The end of the passage is prefilled in chunks of these sizes."""
CALLS = 24
"""At most this many chunks of one size, so that a slow board needs seconds."""
TOGETHER = "several conversations in one call"
STEPS_TOGETHER = 4
"""Number of ids that each of them takes."""
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
    end, turn = len(passage.ids), passage.turn
    back = max(turn - MOST_ROWS, 0)
    whole = feed(passage, [0, turn, end])
    return [
        Case("single ids where the cache grows", _singles_at_border(passage)),
        Case(f"chunks of {PREFILL_CHUNK}", feed(passage, [0, end])),
        Case("after a question about another picture", [Call(0, passage.ids[: min(turn, PREFILL_CHUNK)], (SECOND,)), *whole]),
        Case(
            "a cache with a hole",
            [*feed(passage, [0, turn]), *_other_ids(passage, context), *feed(passage, [*range(back, turn), turn, end])],
        ),
        *(Case(f"chunks of {size}", feed(passage, _last_chunks(end, size))) for size in CHUNKS),
        Case("the whole context in the cache", [*_fill(passage, context), *_singles_at_border(passage)], fills=True),
    ]


def _singles_at_border(passage: Passage) -> list[Call]:
    """The passage, with ids fed one by one on both sides of the border of the cache."""
    first, end = max(passage.border - SINGLE, 0), len(passage.ids)
    singles = range(first, min(passage.border + SINGLE, end))
    return feed(passage, sorted({0, min(passage.turn, first), *singles, singles.stop, end}))


def _other_ids(passage: Passage, context: int) -> list[Call]:
    """Ids after the first turn that do not belong there. The next call forgets them."""
    ids = _filler(passage, min(3 * TAIL, context - passage.turn))
    return [Call(passage.turn, ids, (FIRST, SECOND))] if ids else []


def _last_chunks(end: int, size: int) -> list[int]:
    """Where calls begin and end if at most CALLS chunks of `size` follow a prefill."""
    return sorted({0, *range(max(end - CALLS * size, 0), end, size), end})


def _fill(passage: Passage, context: int) -> list[Call]:
    """Fill the context, and compute its end again in small chunks: the rows have to be the same."""
    ids, pictures = _filler(passage, context), (FIRST, SECOND)
    end = range(max(context - MOST_ROWS, 0), context)
    starts = [*range(0, context - 1, PREFILL_CHUNK), context]
    chunks = [*pairwise(starts)]
    chunks += [(start, min(start + 7, context)) for start in range(max(context - 2 * MOST_ROWS, 0), context, 7)]
    return [
        Call(start, ids[start:stop], pictures, [position for position in end if start <= position < stop], FILLER) for start, stop in chunks
    ]


def feed(passage: Passage, stops: Sequence[int]) -> list[Call]:
    """The passage from the first to the last of `stops`, in calls that end at one of them or after PREFILL_CHUNK ids."""
    calls = []
    for first, last in pairwise(stops):
        for start in range(first, last, PREFILL_CHUNK):
            stop = min(start + PREFILL_CHUNK, last)
            pictures = (FIRST,) if stop <= passage.turn else (FIRST, SECOND)
            compared = [position for position in passage.positions if start <= position < stop][-MOST_ROWS:]
            calls.append(Call(start, passage.ids[start:stop], pictures, compared))
    return calls


def together(passage: Passage, vocab: int, count: int) -> list[int]:
    """Where `count` conversations continue the passage, the longest first. Their next ids are text, and compared. May be empty."""
    compared = {position for position in passage.positions if passage.ids[position] < vocab}
    starts = [start for start in sorted(compared, reverse=True) if compared.issuperset(range(start, start + STEPS_TOGETHER))]
    return [starts[row * len(starts) // count] for row in range(count)] if len(starts) >= count else []


def _filler(passage: Passage, length: int) -> list[int]:
    """Ids of text: the end of the passage, repeated."""
    end = [*passage.ids[-TAIL:]]
    return (end * (length // len(end) + 1))[:length]
