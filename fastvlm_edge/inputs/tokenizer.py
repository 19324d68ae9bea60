"""`tokenizer.json` of a model directory: text <-> ids. Text from a user can never become a control token, unless the caller asks for it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from fastvlm_edge.errors import FastVLMError

_IMAGE_MARK = "<image>"
_LONG = 1 << 12
"""Characters that take about a millisecond."""


class TextTokenizer:
    """A byte-level BPE tokenizer, as every Qwen2 checkpoint has."""

    def __init__(self, path: Path) -> None:
        """Read `tokenizer.json`. Raises FastVLMError if it is damaged or not byte-level BPE."""
        self._tokenizer = _read(path)
        if "ByteLevel" not in repr(self._tokenizer.decoder):
            raise FastVLMError(f"{path} is not a byte-level tokenizer, which FastVLM's Qwen2 needs", "convert the checkpoint again")
        # From here on "<|im_end|>" in a text is encoded as those ten characters. Only `control_id` gives control tokens.
        self._tokenizer.encode_special_tokens = True
        self._with_special: Tokenizer | None = None
        """The same, reading special tokens; loaded at its first use."""
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._image_mark = next((token for token in added.values() if token.content == _IMAGE_MARK), None)
        self._bytes = {token_id: token.content.encode("utf-8") for token_id, token in added.items()}

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Ids of a text. Every character is taken literally, and no tokens are added around it.

        With `special_tokens`, special tokens in the text are read as tokens, except `<image>`: images are not passed in the text.
        Raises FastVLMError if the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise FastVLMError("the text is not valid Unicode: it contains half of a surrogate pair", "pass UTF-8") from None
        pieces = [text]
        tokenizer = self._reading_special() if special_tokens else self._tokenizer
        if self._image_mark is not None and (special_tokens or not self._image_mark.special):
            # The token would be matched, so the word is split after its first character.
            first, *rest = text.split(_IMAGE_MARK)
            for part in rest:
                pieces[-1:] = [first + _IMAGE_MARK[0], _IMAGE_MARK[1:] + part]
                first = pieces[-1]
        return [token_id for piece in pieces if piece for token_id in _ids(tokenizer, piece)]

    def _reading_special(self) -> Tokenizer:
        """A second tokenizer, because the setting belongs to the object, and another thread may use the first."""
        if self._with_special is None:
            self._with_special = Tokenizer.from_str(self._tokenizer.to_str())
            self._with_special.no_truncation()
            self._with_special.no_padding()
        return self._with_special

    def control_id(self, name: str) -> int:
        """Id of a control token such as `<|im_start|>`. Raises FastVLMError if the vocabulary does not contain it."""
        token_id: int | None = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise FastVLMError(f"the tokenizer has no {name} token, which FastVLM's prompt needs", "convert the checkpoint again")
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, b"" for an id without a token. They may begin or end inside a character."""
        known = self._bytes.get(token_id)
        if known is None:
            token: str | None = self._tokenizer.id_to_token(token_id)  # not an added one
            known = self._bytes[token_id] = b"" if token is None else _to_bytes(token)
        return known

    def text_bytes(self, count: int) -> list[bytes]:
        """The bytes of every id below `count`, for a grammar. b"" for an id without a token, for special tokens and for `<image>`."""
        found = [b""] * count
        added = self._tokenizer.get_added_tokens_decoder()
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token_id < count and token_id not in self.special_ids and token != _IMAGE_MARK:
                found[token_id] = token.encode("utf-8") if token_id in added else _to_bytes(token)
        return found


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A long text is a batch of one: `encode` keeps all other threads of Python waiting, and a batch does not."""
    if len(text) < _LONG:
        return tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as in byte-level BPE (GPT-2, `bytes_to_unicode`).

    Printable Latin-1 characters stand for themselves, the characters from U+0100 on for the other bytes.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _to_bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:  # not byte-level, so it is stored as plain text
        return token.encode("utf-8")


def _read(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise FastVLMError(f"{path} cannot be read as a tokenizer: {error}", "copy it again, or convert the checkpoint again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
