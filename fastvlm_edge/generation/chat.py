"""`Chat`: a conversation of several turns."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer import Answer
from fastvlm_edge.generation.answer_format import answer_format
from fastvlm_edge.generation.cascade import ImageSize
from fastvlm_edge.generation.chat_file import CONTEXTS, Model, Turn, conversation_ids, text_of, write_chat
from fastvlm_edge.generation.images import EncodedImage, Images
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.sampling import SamplingParams, stop_strings
from fastvlm_edge.generation.signature import parameters_of
from fastvlm_edge.generation.stream import ReplyStream
from fastvlm_edge.inputs.detokenize import Detokenizer
from fastvlm_edge.inputs.tokenizer import TextTokenizer

_OR_ELSE = 'start a new conversation, begin it with context="slide" so that its oldest turns leave'


class Asks(Protocol):
    """`FastVLM._ask`."""

    def __call__(
        self,
        history: list[int],
        earlier: tuple[EncodedImage, ...],
        prompt: str,
        image: Images,
        params: SamplingParams,
        *,
        image_size: ImageSize,
        reuse: bool,
        leave: Callable[[Answer | None, str, bool], None],
        pixels: list[NDArray[np.uint8] | None],
        or_else: str,
        dropped_turns: int,
    ) -> ReplyStream: ...


class Chat:
    """A conversation, made by `FastVLM.chat`. Each turn computes only what is new.

    One turn at a time: a new question while a reply is still open is refused. A turn that fails before its first piece leaves the
    conversation as it was. A reply that was cut short stays in it as far as it was read.
    """

    def __init__(
        self,
        ask: Asks,
        model: Model,
        most_rows: Callable[[Images, ImageSize], list[int]],
        *,
        system: str | None,
        context: str,
        turns: Sequence[Turn] = (),
    ) -> None:
        """`most_rows` says how many visual tokens each image of a question takes, at the largest size that may be tried."""
        if context not in CONTEXTS:
            raise FastVLMError(f"context is {context!r}", f"use one of: {', '.join(CONTEXTS)}")
        self._ask = ask
        self._model = model
        self._most_rows = most_rows
        self._opening = model.template.opening(system)
        self._system = model.manifest.text.system_prompt if system is None else system
        self._context = context
        self._turns: tuple[Turn, ...] = ()
        self._ids: list[int] = []
        """Those of the turns, up to the end of the last reply."""
        self._lock = threading.RLock()
        self._turn: object | None = None
        """The turn whose reply is open."""
        self._open: weakref.ref[ReplyStream] | None = None
        if turns:
            self._turns, self._ids = tuple(turns), self._ids_of(turns)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation so far, without a reply that is still open."""
        return self._turns

    @property
    def token_count(self) -> int:
        """Number of positions that the conversation takes in the context so far."""
        return len(self._ids)

    def stream(
        self,
        prompt: str,
        image: Images = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        special_tokens: bool = False,
        logprobs: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        json_schema: Mapping[str, Any] | bool | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        image_size: ImageSize = None,
    ) -> ReplyStream:
        """Like `ask`, piece by piece. The turn is over when the stream is read to its end, closed, or no longer referred to."""
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            stop=stop_strings(stop),
            special_tokens=special_tokens,
            logprobs=logprobs,
            format=answer_format(response_format=response_format, json_schema=json_schema, choices=choices, regex=regex, grammar=grammar),
        )
        with self._lock:
            if self._turn is not None:
                what = "the reply before this question is still open in this conversation"
                raise FastVLMError(what, "read its stream to the end or close it, or call cancel() of the chat")
            turns = self._turns if self._context == "error" else self._turns_with_room(prompt, self._most_rows(image, image_size), params)
            dropped = len(self._turns) - len(turns)
            ids = self._ids_of(turns) if dropped else self._ids
            pixels: list[NDArray[np.uint8] | None] = []
            turn = object()
            stream = self._ask(
                [*ids, *self._model.template.closing()] if turns else self._opening,
                tuple(EncodedImage(each.image_features, each.key) for before in turns for each in before.images),
                prompt,
                image,
                params,
                image_size=image_size,
                reuse=True,
                leave=partial(self._leave, turn, turns, prompt, pixels, params.special_tokens),
                pixels=pixels,
                or_else=_OR_ELSE if turns else "ask less at a time",
                dropped_turns=dropped,
            )
            self._turn, self._open = turn, weakref.ref(stream)
            return stream

    @parameters_of(stream)
    def ask(self, *prompt: Any, **options: Any) -> Reply:
        """Ask the next question, with or without a new image. Options and errors as in `FastVLM.generate`.

        `image_size` is that of new images; those of earlier questions keep the size that they were answered at.
        """
        return self.stream(*prompt, **options).wait()

    def cancel(self) -> None:
        """Close the reply that is open, if there is one. Any thread may call this."""
        stream = None if self._open is None else self._open()
        if stream is not None:
            stream.close()

    def reset(self) -> None:
        """Forget the conversation and begin a new one. A reply that is open is closed, and is not part of the new one."""
        with self._lock:
            stream = None if self._open is None else self._open()
            self._turn, self._open = None, None
            self._ids, self._turns = [], ()
        if stream is not None:
            stream.close()

    def save(self, path: str | os.PathLike[str], *, pictures: Literal["embed", "hash"] = "embed") -> None:
        """Write the conversation to a JSON file, which `FastVLM.load_chat` continues. A reply that is open is not part of it.

        The pictures are in it as the model saw them, square and reduced; with `pictures="hash"` only their sha256 is. Raises FastVLMError
        if the file cannot be written, or exists and is not a saved conversation.
        """
        write_chat(path, self._turns, self._model, system=self._system, context=self._context, pictures=pictures)

    def __repr__(self) -> str:
        return f"<Chat of {self.token_count} positions with {self._model.manifest.name}>"

    def _leave(
        self,
        turn: object,
        turns: tuple[Turn, ...],
        prompt: str,
        pixels: list[NDArray[np.uint8] | None],
        special_tokens: bool,
        answer: Answer | None,
        text: str,
        whole: bool,
    ) -> None:
        """The reply of a turn after `turns` has ended."""
        with self._lock:
            if turn is not self._turn:
                return
            self._turn, self._open = None, None
            if answer is None or not (whole or text):
                return
            tokenizer = self._model.tokenizer
            if whole and answer.stop_string is None:
                said = answer.token_ids
            else:
                said = shown_ids(answer.token_ids, text, tokenizer, special_tokens=special_tokens)
            images = answer.images[len(answer.images) - len(pixels) :]
            seen = tuple(EncodedImage(image.image_features, image.key, kept) for image, kept in zip(images, pixels, strict=True))
            reply = text_of(said, tokenizer, special_tokens=special_tokens)
            self._turns = (*turns, Turn(prompt, seen, special_tokens, reply, tuple(said)))
            self._ids = [*answer.ids, *said]

    def _ids_of(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation, up to the end of its last reply."""
        pieces = [(turn.prompt, [image.rows for image in turn.images], turn.special_tokens, turn.reply_ids) for turn in turns]
        return conversation_ids(self._model.template, self._opening, pieces)

    def _turns_with_room(self, prompt: str, rows: list[int], params: SamplingParams) -> tuple[Turn, ...]:
        """The last turns that fit into the context with a question and room for its reply, which is at most a quarter of the context."""
        context = self._model.manifest.decoder.context
        needed = len(self._model.template.turn(prompt, rows, special_tokens=params.special_tokens))
        needed += len(self._model.template.closing()) + min(params.max_new_tokens, context // 4)
        turns, taken = self._turns, len(self._ids)
        while turns and taken + needed > context:
            turns = turns[1:]
            taken = len(self._ids_of(turns))
        return turns


def shown_ids(token_ids: Sequence[int], text: str, tokenizer: TextTokenizer, *, special_tokens: bool) -> list[int]:
    """Ids of a reply of which only the beginning `text` was shown: those that it shows completely, and the rest of it tokenised anew."""
    detokenizer = Detokenizer(tokenizer, special_tokens=special_tokens)
    shown, count, whole = "", 0, ""
    for number, token_id in enumerate(list(token_ids), 1):  # the engine may still append
        shown += detokenizer.push(token_id)
        if not text.startswith(shown):
            break
        if not detokenizer.incomplete:
            count, whole = number, shown
            if shown == text:
                break
    return [*token_ids[:count], *tokenizer.encode(text[len(whole) :])]
