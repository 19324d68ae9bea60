"""Stop strings: the reply ends before the first one, even if it is spread over several tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, but holds back a tail that may become a stop string. `found` is the stop string that ended the reply, or None.

    The stop string that is complete first counts; of several that end at the same character, the longest. So the result does not depend on
    how the text is split into pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that can be shown now. After a stop string was found, nothing more is returned."""
        if self.found is not None or not text:
            return ""
        text = self._held + text
        starts = {string: start for string in self._strings if (start := text.find(string)) >= 0}
        if starts:
            self.found = min(starts, key=lambda string: (starts[string] + len(string), -len(string)))
            self._held = ""
            return text[: starts[self.found]]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that is still held back. Call it when the reply ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest tail of `text` that is the beginning of a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0
