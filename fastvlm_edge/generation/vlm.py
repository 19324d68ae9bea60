"""`FastVLM`, the Python API: load a model directory and ask questions about images."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import LOGIT_POSITIONS, PREFILL_CHUNK, Backend, ImageFeatures
from fastvlm_edge.backends.select import select
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.generate import Generation, check_room
from fastvlm_edge.generation.reply import Reply, Timings
from fastvlm_edge.generation.sampling import SamplingParams, check_integer, stop_strings
from fastvlm_edge.generation.session import Session
from fastvlm_edge.inputs.image_input import ImageInput
from fastvlm_edge.inputs.preprocess import GEOMETRIES, preprocess
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.rgb import Colour, to_colour
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import Manifest, check_sha256, read_manifest, verify_files
from fastvlm_edge.model_dir.verified import changed
from fastvlm_edge.model_dir.verified import verify as verify_model
from fastvlm_edge.progress import Progress


class EncodedImage:
    """An image after the vision encoder. Pass it as `image` to ask about the same image again without encoding it again."""

    def __init__(self, image_features: ImageFeatures) -> None:
        """Made by `FastVLM.encode_image`."""
        self.image_features = image_features

    def numpy(self) -> NDArray[np.float32]:
        """A copy of the visual tokens: float32 [tokens, hidden]."""
        return self.image_features.numpy()

    def __repr__(self) -> str:
        return f"<EncodedImage of {self.image_features.rows} visual tokens>"


Images: TypeAlias = "ImageInput | EncodedImage | Sequence[ImageInput | EncodedImage] | None"
"""No image, one, or a list or tuple of images."""


@dataclass(frozen=True)
class BackendInfo:
    """What runs a model."""

    name: str
    """`ort`, `ort-cuda` or `tensorrt`."""
    description: str
    """Library, version and device, as text for users."""


class ReplyStream:
    """Iterate for the pieces of a reply as strings. `reply` is the whole reply, after the last piece or after `close`."""

    def __init__(self, generate: Callable[[Callable[[Reply], None]], Iterator[str]]) -> None:
        """`generate` gives the pieces, and passes the reply to the function that it gets."""
        self._reply: Reply | None = None
        self._closed = False
        self._pieces = generate(self._finish)

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def reply(self) -> Reply:
        """The finished reply. Raises FastVLMError before the end, and if the stream was closed before its first piece."""
        if self._reply is None and self._closed:
            raise FastVLMError("there is no reply, because the stream was closed before its first piece")
        if self._reply is None:
            raise FastVLMError("the reply is not finished", "read the stream to its end, or close it")
        return self._reply

    def close(self) -> None:
        """Stop the generation. The text so far, if any, becomes the reply, with stop reason `cancelled`."""
        self._closed = True
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()

    def _finish(self, reply: Reply) -> None:
        self._reply = reply

    def __repr__(self) -> str:
        state = "finished" if self._reply is not None else "closed" if self._closed else "not finished"
        return f"<ReplyStream, {state}>"


@dataclass(frozen=True)
class _Question:
    """A question that was checked, and the conversation that it continues."""

    ids: list[int]
    """The whole conversation, up to where the reply begins."""
    earlier: tuple[ImageFeatures, ...]
    """Features of the images of earlier questions."""
    images: list[ImageInput | EncodedImage]
    """The images of this question."""
    params: SamplingParams
    reuse: bool
    """Whether to reuse what the cache already holds of the conversation."""
    remember: Callable[[list[int], tuple[ImageFeatures, ...]], None] | None
    """Gets the conversation with the reply, and the features of all of its images, once there is at least a part of the reply."""
    seconds: float
    """Time that the tokenizer took."""


def load_parts(
    path: str | os.PathLike[str],
    backend: str = "auto",
    *,
    threads: int | None = None,
    verify: bool = False,
    tune_process: bool = False,
    progress: Progress | None = None,
    check: Callable[[Manifest, TextTokenizer], None] | None = None,
) -> tuple[Manifest, TextTokenizer, Backend]:
    """Load the parts of a model, for code that measures or verifies the backend itself. Options and errors as in `FastVLM.load`.

    `check` is called before anything that takes long, and may raise an error.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise FastVLMError(f"the model directory is of type {type(path).__name__}", "give its path as a str or a pathlib.Path")
    directory = Path(path)
    if threads is not None:
        check_integer("threads", threads, least=1)
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    if verify or "tokenizer.json" in changed(directory, manifest):  # it is read before the others are compared
        check_sha256(directory / "tokenizer.json", manifest.files["tokenizer.json"])
    tokenizer = TextTokenizer(directory / "tokenizer.json")
    if check is not None:
        check(manifest, tokenizer)
    verify_model(directory, manifest, again=verify, progress=progress)
    return manifest, tokenizer, select(backend, directory, manifest, threads=threads, tune_process=tune_process, progress=progress)


def check_question(manifest: Manifest, tokenizer: TextTokenizer, prompt: str, images: int, *, special_tokens: bool = False) -> None:
    """Raise FastVLMError for a prompt that is not text, or that leaves no room for a reply beside this number of images."""
    template = ChatTemplate(tokenizer, manifest)
    check_room([*template.opening(), *template.turn(prompt, [manifest.vision.tokens] * images, special_tokens=special_tokens)], manifest)


class FastVLM:
    """A loaded model. It answers one question at a time: a new question ends a stream that is still open."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: TextTokenizer,
        backend: Backend,
        *,
        geometry: str | None = None,
        background: Colour = "white",
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """Use `FastVLM.load`."""
        self.manifest = manifest
        self.geometry = geometry or manifest.vision.geometry
        self.background = background
        _check_options(self.geometry, background, prefill_chunk)
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, manifest)
        self._backend = backend
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
        background: Colour = "white",
        prefill_chunk: int = PREFILL_CHUNK,
        tune_process: bool = False,
        progress: Progress | None = None,
    ) -> FastVLM:
        """Load a model directory.

        `threads` is the number of CPU threads; None means all that this process may use. `verify` compares the sha256 of every file with
        the manifest. `geometry` (`pad` or `crop`) overrides that of the manifest. Transparent pictures are drawn over `background`, a name,
        `#rrggbb` or (red, green, blue). `prefill_chunk` is the number of tokens per prefill call; a smaller one uses less memory.
        `tune_process` saves memory with two settings that affect the whole process until it ends (`backends.select.select`): the commands
        of the toolkit turn it on, a program that embeds the model decides for itself. Replies are the same either way. Raises FastVLMError
        if the directory is incomplete, damaged, or does not fit this machine.
        """
        _check_options(geometry, background, prefill_chunk)  # before minutes of loading
        parts = load_parts(path, backend, threads=threads, verify=verify, tune_process=tune_process, progress=progress)
        return cls(*parts, geometry=geometry, background=background, prefill_chunk=prefill_chunk)

    @property
    def backend(self) -> BackendInfo:
        """Name and description of what runs the model."""
        return BackendInfo(self._backend.name, self._backend.description)

    def generate(
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
    ) -> Reply:
        """Answer a question about no image, one, or several.

        The options are described in `SamplingParams`; `stop` is one string, several, or None. Raises FastVLMError if an option is out of
        range, an image cannot be read, or the context is full.
        """
        stream = self.stream(
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
        )
        return self._finish(stream)

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
    ) -> ReplyStream:
        """Like `generate`, piece by piece. The question is checked now; images are read when the first piece is requested."""
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            stop=stop_strings(stop),
            special_tokens=special_tokens,
        )
        return self._ask(self._template.opening(), (), prompt, image, params)

    def chat(self) -> Chat:
        """Begin a conversation of several turns."""
        return Chat(self, self._template)

    def encode_image(self, image: ImageInput) -> EncodedImage:
        """Run only the vision encoder. Raises FastVLMError if the image cannot be read."""
        self._check_open()
        return EncodedImage(self._backend.encode(self._preprocess(image)))

    def logits(self, input_ids: Sequence[int], images: Sequence[EncodedImage] = (), *, start: int = 0) -> Iterator[NDArray[np.float32]]:
        """Logits after each of `input_ids[start:]`, to score a given text: blocks [up to 16, token_count] float32.

        The id `vocab + k` is row k of the features of all `images`, concatenated (docs/graphs.md). Positions that the cache still holds,
        such as those of the question just asked, are not computed again. The model may be used for something else between two blocks.
        Raises FastVLMError if an id is out of range or the ids do not fit into the context.
        """
        blocks = self._score(input_ids, images, start)
        return (logits[:, : self.manifest.text.token_count] for _, logits, _ in blocks)  # the others are padding rows of the embedding

    def log_probabilities(self, input_ids: Sequence[int], images: Sequence[EncodedImage] = (), *, start: int = 0) -> NDArray[np.float64]:
        """Natural logarithms of the probabilities of `input_ids[start + 1:]`, each after the ids before it: [len(input_ids) - start - 1].

        `input_ids`, `images` and errors are those of `logits`; the ids after `start` are text. The last id is not run, so it may be one
        more than the context holds. All rows of the embedding count, as in transformers, also padding rows.
        """
        _check_ids(input_ids, start)
        if not 0 <= start < len(input_ids) - 1:
            what = f"start is {start}, and {len(input_ids)} ids were given: there is no id after start to score"
            raise FastVLMError(what, "give at least two ids, and a start before the last of them")
        *ids, last = input_ids
        following = [*ids[start + 1 :], last]
        if wrong := [token_id for token_id in following if not 0 <= token_id < self.manifest.decoder.vocab]:
            raise FastVLMError(f"the id {wrong[0]} is not a text token: there are {self.manifest.decoder.vocab}")
        found = []
        for first, logits, log_normalizer in self._score(ids, images, start):
            chosen = following[first - start : first - start + len(logits)]
            found.append(logits[range(len(chosen)), chosen].astype(np.float64) - log_normalizer)
        return np.concatenate(found)

    def _score(
        self, input_ids: Sequence[int], images: Sequence[EncodedImage], start: int
    ) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
        """Blocks (index of the first id, logits after each id, their log normalizers)."""
        self._check_open()
        _check_ids(input_ids, start)
        for image in images:
            if not isinstance(image, EncodedImage):
                raise FastVLMError(f"images holds a {type(image).__name__}, not an EncodedImage", "encode it first, with encode_image")
        image_features = tuple(image.image_features for image in images)
        ids = list(input_ids)
        end = self.manifest.decoder.vocab + sum(features.rows for features in image_features)
        if wrong := [token_id for token_id in ids if not 0 <= token_id < end]:
            raise FastVLMError(f"the id {wrong[0]} is out of range: there are {end} text and visual tokens")
        if not 0 <= start < len(ids):
            raise FastVLMError(f"start is {start}, outside the {len(ids)} ids")

        def blocks() -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
            for first in range(start, len(ids), LOGIT_POSITIONS):
                self._check_open()
                yield first, *self._session.logits(ids[: first + LOGIT_POSITIONS], image_features, first)

        return blocks()

    def close(self) -> None:
        """Release the memory of the model. May be called twice."""
        if not self._closed:
            self._closed = True
            self._session.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._backend.name
        return f"<FastVLM {self.manifest.name}, {self.manifest.precision}, {state}>"

    def __enter__(self) -> FastVLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _ask(
        self,
        history: list[int],
        earlier: tuple[ImageFeatures, ...],
        prompt: str,
        image: Images,
        params: SamplingParams,
        *,
        reuse: bool = False,
        remember: Callable[[list[int], tuple[ImageFeatures, ...]], None] | None = None,
    ) -> ReplyStream:
        """Check a question that follows the conversation `history`, and return the stream that will answer it. See `_Question`."""
        self._check_open()
        began = time.perf_counter()
        images = _as_list(image)
        rows = [each.image_features.rows if isinstance(each, EncodedImage) else self.manifest.vision.tokens for each in images]
        first_row = sum(features.rows for features in earlier)
        ids = [*history, *self._template.turn(prompt, rows, first_row=first_row, special_tokens=params.special_tokens)]
        check_room(ids, self.manifest)  # before the vision encoder runs in vain
        question = _Question(ids, earlier, images, params, reuse, remember, time.perf_counter() - began)
        return ReplyStream(partial(self._answer, question))

    def _answer(self, question: _Question, finish: Callable[[Reply], None]) -> Iterator[str]:
        """Encode the images and generate the reply: yields its text, then passes it to `finish`, also when it was cut short."""
        self._check_open()
        began = time.perf_counter()
        encoded, preprocess_seconds, vision_seconds = self._encode_all(question.images)
        image_features = (*question.earlier, *encoded)
        generation = Generation(
            self._session,
            self._tokenizer,
            self.manifest,
            question.ids,
            image_features,
            question.params,
            reuse=question.reuse,
            chunk=self._chunk,
        )
        before_prefill = question.seconds + time.perf_counter() - began
        try:
            yield from generation
        finally:
            if generation.prefill_seconds:  # otherwise there is not even a part of a reply
                if question.remember is not None:
                    question.remember([*question.ids, *generation.token_ids], image_features)
                timings = Timings(
                    preprocess_ms=preprocess_seconds * 1e3,
                    vision_ms=vision_seconds * 1e3,
                    prefill_ms=generation.prefill_seconds * 1e3,
                    ttft_ms=(before_prefill + generation.prefill_seconds) * 1e3,
                    decode_tokens_per_second=generation.decode_steps / generation.decode_seconds if generation.decode_steps else 0.0,
                    prompt_tokens=len(question.ids),
                    prefilled_tokens=generation.prefilled_tokens,
                    new_tokens=len(generation.token_ids),
                )
                finish(self._reply(generation, timings))

    def _reply(self, generation: Generation, timings: Timings) -> Reply:
        return Reply(
            text="".join(generation.pieces),
            token_ids=list(generation.token_ids),
            stop_reason=generation.stop_reason,
            stop_string=generation.stop_string,
            backend=self._backend.name,
            precision=self.manifest.precision,
            timings=timings,
        )

    def _finish(self, stream: ReplyStream) -> Reply:
        """Read a stream to its end, while other threads wait."""
        with self._session.lock:
            for _ in stream:
                pass
        return stream.reply

    def _encode_all(self, images: Sequence[ImageInput | EncodedImage]) -> tuple[list[ImageFeatures], float, float]:
        """Features of every image, and the seconds that preprocessing and the vision encoder took."""
        image_features: list[ImageFeatures] = []
        preprocess_seconds = vision_seconds = 0.0
        for image in images:
            if isinstance(image, EncodedImage):
                image_features.append(image.image_features)
                continue
            start = time.perf_counter()
            pixel_values = self._preprocess(image)
            middle = time.perf_counter()
            image_features.append(self._backend.encode(pixel_values))
            preprocess_seconds += middle - start
            vision_seconds += time.perf_counter() - middle
        return image_features, preprocess_seconds, vision_seconds

    def _preprocess(self, image: ImageInput) -> NDArray[np.float32]:
        return preprocess(image, self.manifest.vision.image_size, self.geometry, self.background)

    def _check_open(self) -> None:
        if self._closed:
            raise FastVLMError("this model was closed", "load it again with FastVLM.load")


class Chat:
    """A conversation, made by `FastVLM.chat`. Each turn computes only what is new.

    If the model was used for something else in between, the next turn computes the whole conversation again. A turn that fails before its
    first token leaves the conversation as it was. A reply that was cut short stays in it, up to where it was cut.
    """

    def __init__(self, vlm: FastVLM, template: ChatTemplate) -> None:
        self._vlm = vlm
        self._template = template
        self._ids: list[int] = []
        self._image_features: tuple[ImageFeatures, ...] = ()

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
    ) -> Reply:
        """Ask the next question, with or without a new image. Options and errors as in `FastVLM.generate`."""
        stream = self.stream(
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
        )
        return self._vlm._finish(stream)

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
    ) -> ReplyStream:
        """Like `ask`, piece by piece."""
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            stop=stop_strings(stop),
            special_tokens=special_tokens,
        )
        history = [*self._ids, *self._template.closing()] if self._ids else self._template.opening()
        return self._vlm._ask(history, self._image_features, prompt, image, params, reuse=True, remember=self._remember)

    def __repr__(self) -> str:
        return f"<Chat of {self.token_count} positions with {self._vlm.manifest.name}>"

    def reset(self) -> None:
        """Forget the conversation and begin a new one."""
        self._ids, self._image_features = [], ()

    def _remember(self, ids: list[int], image_features: tuple[ImageFeatures, ...]) -> None:
        self._ids, self._image_features = ids, image_features


def _as_list(image: Images) -> list[ImageInput | EncodedImage]:
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [cast("ImageInput | EncodedImage", image)]


def _check_ids(input_ids: Sequence[int], start: int) -> None:
    for token_id in input_ids:
        if not isinstance(token_id, (int, np.integer)):
            raise FastVLMError(f"input_ids holds {token_id!r}, not an integer", "give a sequence of integers")
    if not isinstance(start, (int, np.integer)):
        raise FastVLMError(f"start is {start!r}", "give an integer")


def _check_options(geometry: str | None, background: Colour, prefill_chunk: int) -> None:
    to_colour(background)
    if geometry is not None and geometry not in GEOMETRIES:
        raise FastVLMError(f"unknown geometry {geometry!r}", f"use one of: {', '.join(GEOMETRIES)}")
    check_integer("prefill_chunk", prefill_chunk, least=1)
