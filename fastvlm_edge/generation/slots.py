"""What the slots of the cache hold, and how much of it a new conversation can use again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fastvlm_edge.backends.protocol import Backend, SavedSlot
from fastvlm_edge.generation.images import EncodedImage

MOST_SAVED = 32
"""Conversations that are kept outside the slots, at most: each new one is compared with all of them."""


@dataclass(eq=False)
class Held:
    """The beginning of a conversation whose keys and values are in a slot, or in a copy of one."""

    ids: list[int] = field(default_factory=list)
    images: tuple[EncodedImage, ...] = ()
    saved: SavedSlot | None = None
    """The copy. None if it is in a slot."""

    def common(self, ids: Sequence[int], images: tuple[EncodedImage, ...], vocab: int) -> int:
        """Number of leading positions that are those of `ids` too. A row of a picture counts only if all pictures up to it are the same."""
        length = _common_length(self.ids, ids)
        same_rows = 0
        for mine, other in zip(self.images, images, strict=False):
            if mine.key != other.key:
                break
            same_rows += mine.rows
        else:
            if len(self.images) == len(images):
                return length
        return next((position for position in range(length) if ids[position] >= vocab + same_rows), length)


def _common_length(some: Sequence[int], others: Sequence[int]) -> int:
    """By bisection, because comparing slices is much faster than comparing ids one by one."""
    low, high = 0, min(len(some), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if some[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Slots:
    """The slots of a backend. Those in use are the first ones; the others keep what they hold until they are needed.

    A conversation that has to leave its slot is saved if the backend has copies and there is memory, and the least recently used copies
    make room for it.
    """

    def __init__(self, backend: Backend, *, vocab: int) -> None:
        """`vocab` is the first id of a picture's rows."""
        self._backend, self._vocab = backend, vocab
        self._held = [Held() for _ in range(backend.slots)]
        self._saved: list[Held] = []  # the least recently used first

    @property
    def saved_bytes(self) -> int:
        """Memory of the copies."""
        return sum(held.saved.nbytes for held in self._saved if held.saved is not None)

    def length(self, slot: int) -> int:
        """Number of positions in a slot."""
        return self._backend.lengths[slot]

    def take(self, slot: int, ids: Sequence[int], images: tuple[EncodedImage, ...], *, most: int, saved_bytes: int) -> int:
        """Let a slot, the first one that is not in use, hold the longest known beginning of `ids`, up to `most` positions.

        Returns its length. Slots after it are emptied. What they and it hold is saved in at most `saved_bytes`, unless the new conversation
        begins with all of it.
        """
        sources = [*self._held, *self._saved]
        lengths = [min(held.common(ids, images, self._vocab), most) for held in sources]
        length = max(lengths)
        own = self._held[slot]
        best = own if lengths[slot] == length else sources[lengths.index(length)]
        for number in range(slot, len(self._held)):
            if len(self._held[number].ids) > lengths[number]:  # otherwise the new conversation begins with all of it
                self.save(number, saved_bytes)
        if not length:
            self._backend.reset(slot)
        elif best is own:
            self._backend.truncate(length, slot)
        elif best.saved is None:
            self._backend.copy(self._held.index(best), slot, length)
        else:
            self._backend.restore(best.saved, slot, length)
            if len(best.ids) == length and best in self._saved:
                self._saved.remove(best)
        for number in range(len(self._held) - 1, slot, -1):
            if self._held[number].ids:
                self.forget(number)
        self._held[slot] = Held(list(ids[:length]), images)
        self._bound(saved_bytes)
        return length

    def append(self, slot: int, ids: Sequence[int]) -> None:
        """Record what was appended to a slot."""
        self._held[slot].ids += ids

    def recover(self) -> None:
        """After a call that failed: what was not recorded, or is not in the backend, is forgotten."""
        for slot, (held, length) in enumerate(zip(self._held, self._backend.lengths, strict=True)):
            if length > len(held.ids):
                self._backend.truncate(len(held.ids), slot)
            del held.ids[length:]

    def truncate(self, slot: int, length: int) -> None:
        """Forget the positions of a slot from `length` on."""
        self._backend.truncate(length, slot)
        del self._held[slot].ids[length:]

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds, and empty that."""
        self._backend.copy(source, target, self._backend.lengths[source])
        self._held[target] = self._held[source]
        self._held[source] = Held()
        self._backend.reset(source)

    def forget(self, slot: int) -> None:
        """Empty a slot."""
        self._held[slot] = Held()
        self._backend.reset(slot)

    def forget_all(self) -> None:
        """Empty all slots, whatever state a call that failed has left them in."""
        self._held = [Held() for _ in self._held]
        for slot in reversed(range(len(self._held))):
            with suppress(Exception):  # `take` empties the slot again
                self._backend.reset(slot)

    def clear(self) -> None:
        """Forget all copies."""
        self._saved.clear()

    def save(self, slot: int, saved_bytes: int) -> None:
        """Save a conversation before its slot is needed for another one, if `saved_bytes` have room for it without newer ones."""
        held = self._held[slot]
        for other in self._saved:
            if other.common(held.ids, held.images, self._vocab) == len(held.ids):  # it was asked before, and is saved with more
                self._saved.remove(other)
                self._saved.append(other)
                return
        size = len(held.ids) * self._backend.position_bytes
        saved = self._backend.save(slot) if 0 < size <= saved_bytes else None
        if saved is not None:
            self._saved = [other for other in self._saved if held.common(other.ids, other.images, self._vocab) < len(other.ids)]
            self._saved.append(Held(list(held.ids), held.images, saved))
            self._bound(saved_bytes)

    def _bound(self, saved_bytes: int) -> None:
        while self.saved_bytes > saved_bytes or len(self._saved) > MOST_SAVED:
            del self._saved[0]
