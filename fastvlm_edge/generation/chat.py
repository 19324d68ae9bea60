"""`Chat`: a conversation of several turns."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer import Answer
from fastvlm_edge.generation.answer_format import answer_format
from fastvlm_edge.generation.images import EncodedImage, Images
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.sampling import SamplingParams, stop_strings
from fastvlm_edge.generation.stream import ReplyStream
from fastvlm_edge.inputs.detokenize import Detokenizer
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer


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
        reuse: bool,
        leave: Callable[[Answer | None, str, bool], None],
    ) -> ReplyStream: ...


class Chat:
    """A conversation, made by `FastVLM.chat`. Each turn computes only what is new.

    One turn at a time: a new question while a reply is still open is refused. A turn that fails before its first piece leaves the
    conversation as it was. A reply that was cut short stays in it as far as it was read.
    """

    def __init__(self, ask: Asks, model: str, tokenizer: TextTokenizer, template: ChatTemplate) -> None:
        self._ask = ask
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._ids: list[int] = []
        self._images: tuple[EncodedImage, ...] = ()
        self._lock = threading.RLock()
        self._turn: object | None = None
        """The turn whose reply is open."""
        self._open: weakref.ref[ReplyStream] | None = None

    @property
    def token_count(self) -> int:
        """Number of positions that the conversation takes in the context so far."""
        return len(self._ids)

    def ask(
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
    ) -> Reply:
        """Ask the next question, with or without a new image. Options and errors as in `FastVLM.generate`."""
        return self.stream(
            prompt,
            image,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            stop=stop,
            special_tokens=special_tokens,
            logprobs=logprobs,
            response_format=response_format,
            json_schema=json_schema,
            choices=choices,
            regex=regex,
            grammar=grammar,
        ).wait()

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
            history = [*self._ids, *self._template.closing()] if self._ids else self._template.opening()
            turn = object()
            leave = partial(self._leave, turn, params.special_tokens)
            stream = self._ask(history, self._images, prompt, image, params, reuse=True, leave=leave)
            self._turn, self._open = turn, weakref.ref(stream)
            return stream

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
            self._ids, self._images = [], ()
        if stream is not None:
            stream.close()

    def __repr__(self) -> str:
        return f"<Chat of {self.token_count} positions with {self._model}>"

    def _leave(self, turn: object, special_tokens: bool, answer: Answer | None, text: str, whole: bool) -> None:
        """The reply of a turn has ended."""
        with self._lock:
            if turn is not self._turn:
                return
            self._turn, self._open = None, None
            if answer is None or not (whole or text):
                return
            if whole and answer.stop_string is None:
                said = answer.token_ids
            else:
                said = shown_ids(answer.token_ids, text, self._tokenizer, special_tokens=special_tokens)
            self._ids, self._images = [*answer.ids, *said], answer.images


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
