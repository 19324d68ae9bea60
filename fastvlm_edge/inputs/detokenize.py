"""Token ids -> text, while they are generated. A character appears once all of its bytes are there."""

from __future__ import annotations

import codecs

from fastvlm_edge.inputs.tokenizer import TextTokenizer


class Detokenizer:
    """Decodes one reply id by id, in time linear in its length. The pieces joined equal the decoding of all ids at once.

    A byte-level token may end inside a UTF-8 character; its bytes are kept until the rest arrives. Bytes that cannot become a character
    turn into U+FFFD, one for each maximal subpart (The Unicode Standard, section 3.9, U+FFFD Substitution of Maximal Subparts).
    """

    def __init__(self, tokenizer: TextTokenizer, *, special_tokens: bool = False) -> None:
        """`special_tokens` shows them as they are written in the vocabulary."""
        self._tokenizer = tokenizer
        self._hidden = frozenset() if special_tokens else tokenizer.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, possibly empty. Hidden special tokens have none."""
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    @property
    def incomplete(self) -> bool:
        """Whether the last character is not complete yet."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """Call at the end of the reply: U+FFFD if the last character is incomplete, else an empty string."""
        return self._decoder.decode(b"", final=True)
