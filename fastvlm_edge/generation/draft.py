"""Speculation without another model: drafts of the next tokens, copied from the prompt and the answer so far (prompt lookup).

The decoder verifies a whole draft in one step, which takes hardly longer than one token: it waits for the weights either way. Every id is
still chosen by the sampler from the model's own output, so a draft changes no reply, only when its tokens are known.
"""

from __future__ import annotations

from array import array
from collections import defaultdict, deque
from collections.abc import Sequence

MOST = 8
"""Longest draft."""
_NGRAMS = (3, 2)
_LEAST_GAIN = 1.05
"""Drafts are verified if this is the gain that they promise: measured times are noisy."""
_FIRST_RATE = 0.1
_MEMORY = 8
"""Number of guesses over which the rate of right ones is averaged."""


class StepCosts:
    """How long the decoder takes for calls of 1, 2, ... ids, on this machine. Of the last calls of each size the shortest counts."""

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=8))

    def add(self, ids: int, seconds: float) -> None:
        """A call of so many ids has taken so long."""
        self._seconds[ids].append(seconds)

    def ratio(self, ids: int) -> float:
        """Time of a call of so many ids, in calls of one. A size that was never called is assumed to take a tenth more for each id."""
        one, several = self._seconds.get(1), self._seconds.get(ids)
        if not one or not several:
            return 1 + 0.1 * (ids - 1)
        return min(several) / min(one)


class PromptLookup:
    """Guesses what follows the last tokens of a conversation: what followed their latest earlier occurrence.

    Every guess is compared with the token that came, whether it was verified as a draft or not. So the rate of right guesses is known
    before the first draft costs anything.
    """

    def __init__(self, ids: Sequence[int], vocab: int) -> None:
        """`ids` is the conversation so far; ids from `vocab` on are rows of pictures."""
        self._vocab = vocab
        self._ids = array("i", ids)
        self._bytes = bytearray(self._ids.tobytes())
        self.rate = _FIRST_RATE
        """Of the latest guesses of one token, the part that was right."""
        self._guess = self.find(MOST)

    def append(self, token_id: int) -> None:
        """The next token is known."""
        if self._guess:
            self.rate += ((self._guess[0] == token_id) - self.rate) / _MEMORY
        self._ids.append(token_id)
        self._bytes += self._ids[-1:].tobytes()
        self._guess = self.find(MOST)

    def draft(self, costs: StepCosts, most: int) -> list[int]:
        """Ids to verify, at most `most`; none where that does not promise to pay."""
        length, best = 0, _LEAST_GAIN
        for count in range(1, min(most, len(self._guess)) + 1):
            tokens = sum(self.rate**number for number in range(count + 1))
            gain = tokens / costs.ratio(count + 1)
            if gain > best:
                length, best = count, gain
        return self._guess[:length]

    def find(self, most: int) -> list[int]:
        """What followed the last tokens, at most `most` ids of text."""
        for size in _NGRAMS:
            following = self._latest(size)
            found = self._ids[following : following + most].tolist() if following else []
            text = found[: next((number for number, token_id in enumerate(found) if token_id >= self._vocab), len(found))]
            if text:
                return text
        return []

    def _latest(self, size: int) -> int:
        """Where the latest earlier occurrence of the last `size` ids ends, if they are text; 0 if there is none."""
        last = self._ids[-size:]
        if len(last) < size or max(last) >= self._vocab:
            return 0
        pattern, width = last.tobytes(), self._ids.itemsize
        end = len(self._bytes) - width
        while (place := self._bytes.rfind(pattern, 0, end)) % width:  # between two ids, or not at all
            if place < 0:
                return 0
            end = place + len(pattern) - 1
        return place // width + size
