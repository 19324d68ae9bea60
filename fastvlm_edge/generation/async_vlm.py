"""`AsyncFastVLM`, the Python API for asyncio. Pictures are read and encoded in threads; waiting for a token occupies none."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

from fastvlm_edge.generation.answer import Piece
from fastvlm_edge.generation.cascade import ImageSize
from fastvlm_edge.generation.chat import Chat
from fastvlm_edge.generation.chat_file import Turn
from fastvlm_edge.generation.images import EncodedImage, Images
from fastvlm_edge.generation.logprobs import TokenLogProb
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.signature import parameters_of
from fastvlm_edge.generation.stream import ReplyStream
from fastvlm_edge.generation.vlm import FastVLM
from fastvlm_edge.inputs.image_input import ImageInput

PICTURES = 2
"""Pictures that are worked on at a time: one is encoded, the next one is read."""


class AsyncReplyStream:
    """Iterate with `async for` for the pieces of a reply as strings. `reply` is the whole reply, after the last piece or after `aclose`.

    One task reads it. If that task is cancelled while it waits for a piece, the stream is closed.
    """

    def __init__(self, stream: ReplyStream, pictures: Executor) -> None:
        """Made by `AsyncFastVLM.stream` and `AsyncChat.stream`. `pictures` is where images are read and encoded."""
        self._stream, self._pictures = stream, pictures
        self._events: asyncio.Queue[Piece | None] | None = None

    def __aiter__(self) -> AsyncReplyStream:
        return self

    async def __anext__(self) -> str:
        return await self._next(piecewise=True)

    @property
    def reply(self) -> Reply:
        """The finished reply. Raises FastVLMError before the end, and if the stream was closed before its first piece."""
        return self._stream.reply

    def logprobs_from(self, first: int) -> list[TokenLogProb]:
        """As in `ReplyStream`."""
        return self._stream.logprobs_from(first)

    async def aclose(self) -> None:
        """Stop the generation, before the next chunk or step. The text that was read, if any, becomes the reply."""
        self._stream.close()

    async def wait(self) -> Reply:
        """Read to the end."""
        try:
            while True:
                await self._next(piecewise=False)
        except StopAsyncIteration:
            return self.reply

    async def _next(self, *, piecewise: bool) -> str:
        while True:
            try:
                if self._events is None:
                    self._events = await self._start(piecewise=piecewise)
                event = None if self._events is None else await self._events.get()
            except BaseException:  # also a cancelled task
                self._stream.close()
                raise
            if self._events is None:
                raise StopAsyncIteration
            try:
                text = self._stream._take(event)
            except StopIteration:
                raise StopAsyncIteration from None
            if text is not None:
                return text
            if event is None:  # of an answer that does not stand
                self._events = None

    async def _start(self, *, piecewise: bool) -> asyncio.Queue[Piece | None] | None:
        """Hand the question to the engine. None if the stream is closed."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()

        def start() -> bool:
            # Raises RuntimeError if the loop is closed. It refers to no stream, so that one that was left is closed.
            return self._stream._begin(piecewise=piecewise, sink=lambda event: _put(loop, events, event))

        begun = await loop.run_in_executor(self._pictures, start) if self._stream.reads_images else start()
        return events if begun else None

    def __repr__(self) -> str:
        return f"<Async{repr(self._stream)[1:]}"


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Piece | None], event: Piece | None) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


class AsyncChat:
    """A conversation, made by `AsyncFastVLM.chat`. It behaves as `Chat`."""

    def __init__(self, chat: Chat, pictures: Executor) -> None:
        self._chat, self._pictures = chat, pictures

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation so far, without a reply that is still open."""
        return self._chat.turns

    @property
    def token_count(self) -> int:
        """Number of positions that the conversation takes in the context so far."""
        return self._chat.token_count

    @parameters_of(Chat.ask)
    async def ask(self, *prompt: Any, **options: Any) -> Reply:
        """Ask the next question, with or without a new image. Options and errors as in `FastVLM.generate`."""
        return await self.stream(*prompt, **options).wait()

    @parameters_of(Chat.stream)
    def stream(self, *prompt: Any, **options: Any) -> AsyncReplyStream:
        """Like `ask`, piece by piece. The turn is over when the stream is read to its end, closed, or no longer referred to."""
        return AsyncReplyStream(self._chat.stream(*prompt, **options), self._pictures)

    def cancel(self) -> None:
        """Close the reply that is open, if there is one."""
        self._chat.cancel()

    def reset(self) -> None:
        """Forget the conversation and begin a new one. A reply that is open is closed."""
        self._chat.reset()

    @parameters_of(Chat.save)
    async def save(self, *path: Any, **options: Any) -> None:
        """Write the conversation to a JSON file, in a thread. Options and errors as in `Chat.save`."""
        await asyncio.to_thread(self._chat.save, *path, **options)

    def __repr__(self) -> str:
        return f"<Async{repr(self._chat)[1:]}"


class AsyncFastVLM:
    """A loaded model for asyncio. Tasks of any event loop, and threads that use its `vlm`, may share it.

    Cancelling a task stops its work before the next chunk or step, and frees the slot. A picture that is being encoded is finished first.
    """

    def __init__(self, vlm: FastVLM) -> None:
        """Use a model that is loaded already. `close` closes it."""
        self.vlm = vlm
        self._pictures = ThreadPoolExecutor(PICTURES, thread_name_prefix="fastvlm-pictures")

    @classmethod
    @parameters_of(FastVLM.load.__func__)  # type: ignore[attr-defined]
    async def load(cls, *path: Any, **options: Any) -> AsyncFastVLM:
        """Load a model directory, in a thread. Options and errors as in `FastVLM.load`."""
        return cls(await asyncio.to_thread(FastVLM.load, *path, **options))

    @classmethod
    @parameters_of(FastVLM.from_pretrained.__func__)  # type: ignore[attr-defined]
    async def from_pretrained(cls, *checkpoint: Any, **options: Any) -> AsyncFastVLM:
        """Load a checkpoint, which is converted at its first use, in a thread. Options and errors as in `FastVLM.from_pretrained`."""
        return cls(await asyncio.to_thread(FastVLM.from_pretrained, *checkpoint, **options))

    @parameters_of(FastVLM.generate)
    async def generate(self, *prompt: Any, **options: Any) -> Reply:
        """Answer a question about no image, one, or several. Options and errors as in `FastVLM.generate`."""
        return await self.stream(*prompt, **options).wait()

    @parameters_of(FastVLM.stream)
    def stream(self, *prompt: Any, **options: Any) -> AsyncReplyStream:
        """Like `generate`, piece by piece. The question is checked now; images are read when the first piece is requested."""
        return AsyncReplyStream(self.vlm.stream(*prompt, **options), self._pictures)

    @parameters_of(FastVLM.chat)
    def chat(self, **options: Any) -> AsyncChat:
        """Begin a conversation of several turns. Options and errors as in `FastVLM.chat`."""
        return AsyncChat(self.vlm.chat(**options), self._pictures)

    async def load_chat(self, path: str | os.PathLike[str], images: Images = None) -> AsyncChat:
        """Continue a conversation that `AsyncChat.save` or `Chat.save` wrote. Errors as in `FastVLM.load_chat`."""
        chat = await asyncio.get_running_loop().run_in_executor(self._pictures, self.vlm.load_chat, path, images)
        return AsyncChat(chat, self._pictures)

    async def encode_image(self, image: ImageInput, *, image_size: ImageSize = None) -> EncodedImage:
        """Run only the vision encoder. Options and errors as in `FastVLM.encode_image`."""
        encode = partial(self.vlm.encode_image, image, image_size=image_size)
        return await asyncio.get_running_loop().run_in_executor(self._pictures, encode)

    async def close(self) -> None:
        """Release the memory of the model. Open replies end with an error. May be called twice."""
        await asyncio.to_thread(self.vlm.close)

    def __repr__(self) -> str:
        return f"<Async{repr(self.vlm)[1:]}"

    async def __aenter__(self) -> AsyncFastVLM:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()
