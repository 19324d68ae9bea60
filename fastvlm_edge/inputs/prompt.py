"""The conversation as ids: template `qwen_2` of FastVLM, with every picture as a run of ids `vocab + k`.

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n{picture}\\n{prompt}<|im_end|>\\n
    <|im_start|>assistant\\n{reply}<|im_end|>\\n ...

Text between two control tokens or pictures is tokenised as one string, as transformers does it, so the ids are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest


class ChatTemplate:
    """Builds the ids of a conversation piece by piece: `opening`, then for each question `turn` and, after the reply, `closing`."""

    def __init__(self, tokenizer: TextTokenizer, manifest: Manifest) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = manifest.text.system_prompt
        self._vocab = manifest.decoder.vocab
        self._start = tokenizer.control_id("<|im_start|>")
        self._end = tokenizer.control_id("<|im_end|>")

    def opening(self) -> list[int]:
        """Ids of the system prompt."""
        encode = self._tokenizer.encode
        return [self._start, *encode(f"system\n{self._system_prompt}"), self._end, *encode("\n")]

    def turn(self, prompt: str, picture_rows: Sequence[int] = (), *, first_row: int = 0) -> list[int]:
        """Ids of one question, up to where the reply begins.

        `picture_rows` are the rows of image_features of each picture of this question; they count on from `first_row`, the rows that
        earlier questions took. Raises FastVLMError for a prompt that is no text or, without a picture, empty.
        """
        if not isinstance(prompt, str):
            raise FastVLMError(f"the prompt is a {type(prompt).__name__}; give a string")
        if not prompt.strip() and not picture_rows:
            raise FastVLMError("the prompt is empty and there is no picture; ask something")
        encode = self._tokenizer.encode
        ids = [self._start]
        before = "user\n"
        for rows in picture_rows:
            ids += encode(before)
            ids += range(self._vocab + first_row, self._vocab + first_row + rows)
            first_row += rows
            before = "\n"
        return [*ids, *encode(before + prompt), self._end, *encode("\n"), self._start, *encode("assistant\n")]

    def closing(self) -> list[int]:
        """Ids that end a reply, before the next question."""
        return [self._end, *self._tokenizer.encode("\n")]
