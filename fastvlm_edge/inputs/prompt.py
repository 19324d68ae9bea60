r"""The conversation as token ids: FastVLM's template `qwen_2`, in which an image is a run of ids `vocab + k`.

    <|im_start|>system\n{system}<|im_end|>\n
    <|im_start|>user\n{image}\n{prompt}<|im_end|>\n
    <|im_start|>assistant\n{reply}<|im_end|>\n ...

Text between two control tokens or images is tokenised as one string. transformers does the same, so the ids are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest


class ChatTemplate:
    """Builds the ids of a conversation part by part: `opening`, then `turn` for each question and `closing` after each reply."""

    def __init__(self, tokenizer: TextTokenizer, manifest: Manifest) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = manifest.text.system_prompt
        self._vocab = manifest.decoder.vocab
        self._start = tokenizer.control_id("<|im_start|>")
        self._end = tokenizer.control_id("<|im_end|>")

    def opening(self, system: str | None = None) -> list[int]:
        """Ids of the system prompt, with which a conversation begins; none if it is empty.

        None is that of the model, which is empty if it was trained without one. Raises FastVLMError if it is not a string.
        """
        if system is None:
            system = self._system_prompt
        if not isinstance(system, str):
            raise FastVLMError(f"the system prompt is of type {type(system).__name__}, not str", 'give a string, "" for none')
        if not system:
            return []
        encode = self._tokenizer.encode
        return [self._start, *encode(f"system\n{system}"), self._end, *encode("\n")]

    def turn(self, prompt: str, image_rows: Sequence[int] = (), *, first_row: int = 0, special_tokens: bool = False) -> list[int]:
        """Ids of one question, up to where the reply begins.

        `image_rows` holds the number of rows of image_features for each image of this question. Earlier questions of the conversation have
        used the rows before `first_row`. With `special_tokens`, those in the prompt are read as tokens.
        Raises FastVLMError if the prompt is not a string, or is empty and there is no image.
        """
        if not isinstance(prompt, str):
            raise FastVLMError(f"the prompt is of type {type(prompt).__name__}, not str", "give a string")
        if not prompt.strip() and not image_rows:
            raise FastVLMError("the prompt is empty and there is no image", "give a question or an image")
        encode = self._tokenizer.encode
        ids = [self._start]
        before = "user\n"
        for rows in image_rows:
            ids += encode(before)
            ids += range(self._vocab + first_row, self._vocab + first_row + rows)
            first_row += rows
            before = "\n"
        return [
            *ids,
            *encode(before + prompt, special_tokens=special_tokens),
            self._end,
            *encode("\n"),
            self._start,
            *encode("assistant\n"),
        ]

    def closing(self) -> list[int]:
        """Ids between the end of a reply and the next question."""
        return [self._end, *self._tokenizer.encode("\n")]
