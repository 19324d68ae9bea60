"""`FastVLM`, the Python API: a model directory goes in, answers about pictures come out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fastvlm_edge.backends.protocol import Backend, ImageFeatures
from fastvlm_edge.backends.select import select
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.generate import Generation, check_room
from fastvlm_edge.generation.reply import Reply, Timings
from fastvlm_edge.generation.sampling import SamplingParams
from fastvlm_edge.generation.session import PREFILL_CHUNK, Session
from fastvlm_edge.inputs.image_input import ImageInput
from fastvlm_edge.inputs.preprocess import GEOMETRIES, preprocess
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest, verify_files
from fastvlm_edge.progress import Progress


class EncodedImage:
    """A picture after the vision encoder; pass it as `image` to ask about it again without encoding it again."""

    def __init__(self, features: ImageFeatures) -> None:
        self.features = features

    def numpy(self) -> Any:
        """The visual tokens: float32 [tokens, hidden]."""
        return self.features.numpy()


class ReplyStream:
    """Iterate for the pieces of a reply as strings; `reply` is the whole of it, once iteration ended or `close` was called."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._reply: Reply | None = None
        self._closed = False

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def reply(self) -> Reply:
        """The finished reply. Raises FastVLMError before the end, and where the stream was closed before its first piece."""
        if self._reply is None and self._closed:
            raise FastVLMError("the stream was closed before its first piece, so there is no reply")
        if self._reply is None:
            raise FastVLMError("the reply is not finished; read the stream to its end, or close it")
        return self._reply

    def finish(self, reply: Reply) -> None:
        """Called by the generator when the reply is complete."""
        self._reply = reply

    def close(self) -> None:
        """Stop listening. What came so far, if anything did, becomes the reply, with stop reason `cancelled`."""
        self._closed = True
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


def _check_options(geometry: str | None, prefill_chunk: int) -> None:
    if geometry is not None and geometry not in GEOMETRIES:
        raise FastVLMError(f"geometry {geometry!r} is unknown; use one of: {', '.join(GEOMETRIES)}")
    if prefill_chunk < 1:
        raise FastVLMError(f"prefill_chunk is {prefill_chunk}; give a whole number of at least 1")


class FastVLM:
    """A loaded model. It answers one question at a time: a newer question ends a stream that is still open."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: TextTokenizer,
        backend: Backend,
        *,
        geometry: str | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """Use `FastVLM.load`."""
        self.manifest = manifest
        self.geometry = geometry or manifest.vision.geometry
        _check_options(self.geometry, prefill_chunk)
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, manifest)
        self._session = Session(backend, vocab=manifest.decoder.vocab)
        self._chunk = prefill_chunk
        self._closed = False

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        threads: int | None = None,
        verify: bool = False,
        geometry: str | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        tune_process: bool = False,
        progress: Progress | None = None,
    ) -> FastVLM:
        """Load a model directory.

        `threads` is for the CPU, by default all that this process may use. `verify` compares the sha256 of every file with the manifest.
        `geometry` (`pad` or `crop`) overrides the manifest's. `prefill_chunk` bounds the memory of a long prompt and changes nothing else.
        `tune_process` saves memory with two settings that last as long as the process and concern all of it (`backends.select.select`): the
        commands of the toolkit ask for them; a program that embeds the model decides for itself. Answers are the same either way.
        Raises FastVLMError where the directory is incomplete, damaged, or not for this machine.
        """
        directory = Path(path)
        if threads is not None and threads < 1:
            raise FastVLMError(f"threads is {threads}; give a whole number of at least 1")
        _check_options(geometry, prefill_chunk)  # before minutes of loading
        manifest = read_manifest(directory)
        verify_files(directory, manifest, hashes=verify)
        tokenizer = TextTokenizer(directory / "tokenizer.json")
        runner = select(backend, directory, manifest, threads=threads, tune_process=tune_process, progress=progress)
        return cls(manifest, tokenizer, runner, geometry=geometry, prefill_chunk=prefill_chunk)

    @property
    def backend(self) -> Backend:
        """What runs the graphs."""
        return self._session.backend

    def generate(self, prompt: str, image: ImageInput | EncodedImage | Sequence[Any] | None = None, **sampling: Any) -> Reply:
        """Answer a question about no picture, one, or a list of them.

        `sampling` is any field of `SamplingParams`. Raises FastVLMError for a picture that cannot be read or a full context.
        """
        return self._finish(self.stream(prompt, image, **sampling))

    def stream(self, prompt: str, image: ImageInput | EncodedImage | Sequence[Any] | None = None, **sampling: Any) -> ReplyStream:
        """Like `generate`, piece by piece. The question is checked now; pictures are read when the first piece is asked for."""
        return self._ask(self._template.opening(), (), prompt, image, sampling)

    def chat(self) -> Chat:
        """Begin a conversation of several turns."""
        return Chat(self, self._template)

    def encode_image(self, image: ImageInput) -> EncodedImage:
        """Run the vision encoder alone."""
        self._check_open()
        return EncodedImage(self.backend.encode(preprocess(image, self.manifest.vision.image_size, self.geometry)))

    def close(self) -> None:
        """Give back the memory of the model. May be called twice."""
        if not self._closed:
            self._closed = True
            self._session.close()

    def __enter__(self) -> FastVLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _ask(
        self,
        history: list[int],
        earlier: tuple[ImageFeatures, ...],
        prompt: str,
        image: Any,
        sampling: dict[str, Any],
        *,
        reuse: bool = False,
        on_end: Callable[[list[int], tuple[ImageFeatures, ...]], None] | None = None,
    ) -> ReplyStream:
        """A question after the conversation `history`, whose pictures are `earlier`.

        `on_end` gets the conversation with question and reply, and its pictures, once there is a reply or part of one.
        """
        self._check_open()
        began = time.perf_counter()
        params = SamplingParams(**sampling)
        images = list(image) if isinstance(image, (list, tuple)) else [] if image is None else [image]
        rows = [given.features.rows if isinstance(given, EncodedImage) else self.manifest.vision.tokens for given in images]
        ids = [*history, *self._template.turn(prompt, rows, first_row=sum(picture.rows for picture in earlier))]
        check_room(ids, self.manifest)  # before the vision encoder runs for nothing
        prompt_seconds = time.perf_counter() - began

        def run() -> Iterator[str]:
            self._check_open()
            began = time.perf_counter()
            image_features, preprocess_seconds, vision_seconds = self._encode_all(images)
            shown = (*earlier, *image_features)
            generation = Generation(self._session, self._tokenizer, self.manifest, ids, shown, params, reuse=reuse, chunk=self._chunk)
            before_prefill = prompt_seconds + time.perf_counter() - began
            texts: list[str] = []
            try:
                for piece in generation:
                    if piece.text:
                        texts.append(piece.text)
                        yield piece.text
            finally:
                if generation.prefill_seconds:  # else there is no reply, not even part of one
                    if on_end is not None:
                        on_end([*ids, *generation.token_ids], shown)
                    timings = Timings(
                        preprocess_ms=preprocess_seconds * 1e3,
                        vision_ms=vision_seconds * 1e3,
                        prefill_ms=generation.prefill_seconds * 1e3,
                        ttft_ms=(before_prefill + generation.prefill_seconds) * 1e3,
                        decode_tokens_per_second=generation.decode_steps / generation.decode_seconds if generation.decode_steps else 0.0,
                        prompt_tokens=len(ids),
                        prefilled_tokens=generation.prefilled_tokens,
                        new_tokens=len(generation.token_ids),
                    )
                    stream.finish(self._reply("".join(texts), generation, timings))

        stream = ReplyStream(run())
        return stream

    def _finish(self, stream: ReplyStream) -> Reply:
        """Read a stream to its end, while other threads wait."""
        with self._session.lock:
            for _ in stream:
                pass
        return stream.reply

    def _reply(self, text: str, generation: Generation, timings: Timings) -> Reply:
        return Reply(
            text=text,
            token_ids=list(generation.token_ids),
            stop_reason=generation.stop_reason,
            stop_string=generation.stop_string,
            backend=self.backend.name,
            precision=self.manifest.precision,
            timings=timings,
        )

    def _encode_all(self, images: Sequence[Any]) -> tuple[list[ImageFeatures], float, float]:
        """Features of every picture, and the seconds that preprocessing and encoding took."""
        features: list[ImageFeatures] = []
        preprocess_seconds = vision_seconds = 0.0
        for image in images:
            if isinstance(image, EncodedImage):
                features.append(image.features)
                continue
            start = time.perf_counter()
            pixel_values = preprocess(image, self.manifest.vision.image_size, self.geometry)
            middle = time.perf_counter()
            features.append(self.backend.encode(pixel_values))
            preprocess_seconds += middle - start
            vision_seconds += time.perf_counter() - middle
        return features, preprocess_seconds, vision_seconds

    def _check_open(self) -> None:
        if self._closed:
            raise FastVLMError("this model was closed; load it again with FastVLM.load")


class Chat:
    """Made by `FastVLM.chat`. Every turn computes only what is new; other questions to the same model in between cost one full prefill.

    A turn that fails before its first token leaves the conversation as it was. A reply that was cut short stays in it as far as it came.
    """

    def __init__(self, vlm: FastVLM, template: ChatTemplate) -> None:
        self._vlm = vlm
        self._template = template
        self._ids: list[int] = []
        self._image_features: tuple[ImageFeatures, ...] = ()

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
        return self._vlm._ask(history, self._image_features, prompt, image, sampling, reuse=True, on_end=self._remember)

    def reset(self) -> None:
        """Begin a new conversation."""
        self._ids, self._image_features = [], ()

    def _remember(self, ids: list[int], image_features: tuple[ImageFeatures, ...]) -> None:
        self._ids, self._image_features = ids, image_features
