"""A backend and what its cache holds: prefill in chunks, prefix reuse, and who may decode next."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fastvlm_edge.backends.protocol import Backend, ImageFeatures, StepOutput
from fastvlm_edge.errors import FastVLMError

PREFILL_CHUNK = 512


class Session:
    """Feeds one conversation at a time to a backend.

    A caller holds a ticket from `prefill` on. Whoever prefills next takes the cache over, and the older ticket gets a FastVLMError instead
    of tokens from a cache that is no longer its own. `lock` makes a prefill or a step atomic; hold it to keep others out for longer.
    """

    def __init__(self, backend: Backend, *, vocab: int) -> None:
        self.backend = backend
        self.lock = threading.RLock()
        self._vocab = vocab
        self._ids: list[int] = []  # what the cache holds, at least as long as it
        self._image_features: tuple[ImageFeatures, ...] = ()
        self._ticket: object | None = None

    def prefill(
        self,
        ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...],
        *,
        reuse: bool = False,
        chunk: int = PREFILL_CHUNK,
        want_logits: bool = False,
    ) -> tuple[object, StepOutput, int]:
        """Bring the cache to exactly `ids`; the output is that of the last one.

        With `reuse` the longest common beginning of `ids` and the cache is kept. Returns a ticket for `decode`, the output, and how many
        positions were computed. Attention over the cache makes chunks of any length equal to one long call.
        """
        with self.lock:
            self._ticket = ticket = object()
            kept = min(self._common_length(ids, image_features), len(ids) - 1) if reuse else 0
            if kept:
                self.backend.truncate(kept)
            else:
                self.backend.reset()
            # Recorded before it is computed: should an exception come in between, the backend's length says how much of it is true.
            self._ids, self._image_features = list(ids), image_features
            last = len(ids) - 1
            for start in range(kept, len(ids), chunk):
                part = ids[start : start + chunk]
                output = self.backend.step(part, image_features, want_logits=want_logits and start + len(part) > last)
            return ticket, output, len(ids) - kept

    def decode(self, ticket: object, token_id: int, *, want_logits: bool = False) -> StepOutput:
        """Append one id and return the output after it. Raises FastVLMError where the ticket was superseded."""
        with self.lock:
            if ticket is not self._ticket:
                raise FastVLMError("this reply was cut short by a newer question to the same model; finish one stream before the next")
            self._ids.append(token_id)
            return self.backend.step((token_id,), self._image_features, want_logits=want_logits)

    def close(self) -> None:
        """Close the backend; unfinished replies end with an error."""
        with self.lock:
            self._ticket = None
            self.backend.close()

    def _common_length(self, ids: Sequence[int], image_features: tuple[ImageFeatures, ...]) -> int:
        """How many leading ids the cache holds already, counting rows of a picture only where the picture is the same."""
        same_rows = 0
        for new, old in zip(image_features, self._image_features, strict=False):
            if new is not old:
                break
            same_rows += new.rows
        first_unknown = self._vocab + same_rows
        length = 0
        for new_id, old_id in zip(ids, self._ids[: self.backend.length], strict=False):
            if new_id != old_id or new_id >= first_unknown:
                break
            length += 1
        return length
