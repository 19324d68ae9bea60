"""Ids -> text while they are generated, never half a character."""

from __future__ import annotations

import codecs

from fastvlm_edge.inputs.tokenizer import TextTokenizer


class Detokenizer:
    """Incremental decoder of one reply; linear in its length.

    A byte-level token may end inside a character. Its bytes wait for the rest; bytes that cannot become a character turn into U+FFFD, as
    many as Unicode recommends (one for each maximal subpart), which is what decoding everything at once gives.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, possibly empty. Special tokens have none."""
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The end of the reply: U+FFFD for a character that never became whole, else empty."""
        return self._decoder.decode(b"", final=True)
