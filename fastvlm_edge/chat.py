"""A conversation of several turns that keeps its beginning in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvlm_edge.backends import ImageFeatures
from fastvlm_edge.image_input import ImageInput
from fastvlm_edge.prompt import ChatTemplate
from fastvlm_edge.reply import Reply
from fastvlm_edge.vlm import EncodedImage, FastVLM, ReplyStream


class Chat:
    """Made by `FastVLM.chat`. Every turn computes only what is new; other questions to the same model in between cost one full prefill.

    A turn that fails before its first token leaves the conversation as it was. A reply that was cut short stays in it as far as it came.
    """

    def __init__(self, vlm: FastVLM, template: ChatTemplate) -> None:
        self._vlm = vlm
        self._template = template
        self._ids: list[int] = []
        self._pictures: tuple[ImageFeatures, ...] = ()

    @property
    def token_count(self) -> int:
        """Positions of the context that the conversation takes so far."""
        return len(self._ids)

    def ask(self, prompt: str, image: ImageInput | EncodedImage | Sequence[Any] | None = None, **sampling: Any) -> Reply:
        """The next question, with or without a new picture. Options and errors as in `FastVLM.generate`."""
        return self._vlm._finish(self.stream(prompt, image, **sampling))

    def stream(self, prompt: str, image: ImageInput | EncodedImage | Sequence[Any] | None = None, **sampling: Any) -> ReplyStream:
        """Like `ask`, piece by piece."""
        history = [*self._ids, *self._template.closing()] if self._ids else self._template.opening()
        return self._vlm._ask(history, self._pictures, prompt, image, sampling, reuse=True, on_end=self._remember)

    def reset(self) -> None:
        """Begin a new conversation."""
        self._ids, self._pictures = [], ()

    def _remember(self, ids: list[int], pictures: tuple[ImageFeatures, ...]) -> None:
        self._ids, self._pictures = ids, pictures
