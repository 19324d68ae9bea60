"""Who uses the KV cache of a backend, and for what: chunked prefill, reuse of a common beginning, logits, and who may decode next."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import PREFILL_CHUNK, Backend, ImageFeatures, StepOutput
from fastvlm_edge.errors import FastVLMError


class Session:
    """Feeds one conversation at a time to a backend.

    `prefill` returns a ticket, and only its holder may `decode`. The next prefill takes the cache over; `decode` then raises FastVLMError
    for the older ticket. `lock` makes each call atomic; hold it to keep other threads out for longer.
    """

    def __init__(self, backend: Backend, *, vocab: int) -> None:
        self.lock = threading.RLock()
        self._backend = backend
        self._vocab = vocab
        self._ids: list[int] = []  # ids of the cache; may be longer than the cache, never shorter
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
        """Fill the cache with exactly `ids`. Returns a ticket for `decode`, the output after the last id, and how many ids were computed.

        With `reuse`, the longest beginning that `ids` and the cache have in common is not computed again. The backend gets at most `chunk`
        ids per call; the result does not depend on it, because every chunk attends to the cache.
        """
        with self.lock:
            self._ticket = ticket = object()
            kept = self._keep(ids, image_features, len(ids) - 1 if reuse else 0)
            last = len(ids) - 1
            for start in range(kept, len(ids), chunk):
                part = ids[start : start + chunk]
                output = self._step(part, want_logits=want_logits and start + len(part) > last)
            return ticket, output, len(ids) - kept

    def decode(self, ticket: object, token_id: int, *, want_logits: bool = False) -> StepOutput:
        """Append one id and return the output after it. Raises FastVLMError if the cache was used for something else since."""
        with self.lock:
            if ticket is not self._ticket:
                raise FastVLMError(
                    "this reply was cut short, because the same model was used for something else", "finish one stream before the next"
                )
            del self._ids[self._backend.lengths[0] :]  # an id whose step failed is not in the cache
            self._ids.append(token_id)
            return self._step((token_id,), want_logits=want_logits)

    def logits(
        self, ids: Sequence[int], image_features: tuple[ImageFeatures, ...], start: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits after each of `ids[start:]` and their log normalizers: [n, vocab] and [n], for n = len(ids) - start up to LOGIT_POSITIONS.

        Takes the cache over as `prefill` does, and reuses the beginning that it has in common with `ids[:start]`.
        """
        with self.lock:
            self._ticket = None
            kept = self._keep(ids, image_features, start)
            for first in range(kept, start, PREFILL_CHUNK):
                self._step(ids[first : min(first + PREFILL_CHUNK, start)])
            output = self._step(ids[start:], logit_positions=range(len(ids) - start), want_logits=True)
            assert output.logits is not None
            return output.logits.astype(np.float32), output.log_normalizer.astype(np.float32)  # copies: the next step may overwrite them

    def close(self) -> None:
        """Close the backend. Unfinished replies end with an error."""
        with self.lock:
            self._ticket = None
            self._backend.close()

    def _keep(self, ids: Sequence[int], image_features: tuple[ImageFeatures, ...], most: int) -> int:
        """Cut the cache down to the beginning that it shares with `ids`, at most `most` positions. Returns its length."""
        kept = min(self._common_length(ids, image_features), most) if most else 0
        if kept:
            self._backend.truncate(kept)
        else:
            self._backend.reset()
        # Recorded before the steps: if an exception ends one of them, the length of the cache tells how many of these ids are in it.
        self._ids, self._image_features = list(ids), image_features
        return kept

    def _step(self, ids: Sequence[int], *, logit_positions: Sequence[int] | None = None, want_logits: bool = False) -> StepOutput:
        return self._backend.step(ids, self._image_features, logit_positions=logit_positions, want_logits=want_logits)

    def _common_length(self, ids: Sequence[int], image_features: tuple[ImageFeatures, ...]) -> int:
        """Number of leading ids that are in the cache already. Rows of an image count only if it is the same image."""
        same_rows = 0
        for new, old in zip(image_features, self._image_features, strict=False):
            if new is not old:
                break
            same_rows += new.rows
        first_unknown = self._vocab + same_rows
        length = 0
        for new_id, old_id in zip(ids, self._ids[: self._backend.lengths[0]], strict=False):
            if new_id != old_id or new_id >= first_unknown:
                break
            length += 1
        return length
