"""Stop strings: the reply ends before the first of them, wherever token borders fall."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, holding back a tail that may yet become a stop string. `found` is the one that ended the reply."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show. Once a stop string was found nothing more comes out."""
        if self.found is not None or not text:
            return ""
        text = self._held + text
        matches = [(position, -len(string), string) for string in self._strings if (position := text.find(string)) >= 0]
        if matches:
            position, _, self.found = min(matches)
            self._held = ""
            return text[:position]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text still held back, when the reply ended for another reason."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0
