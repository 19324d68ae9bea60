"""`FastVLM`, the Python API: load a model directory and ask questions about images."""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import LOGIT_POSITIONS, PREFILL_CHUNK, Backend
from fastvlm_edge.backends.select import select
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer import Answer, ContextFull, Piece, Score, check_room
from fastvlm_edge.generation.answer_format import answer_format
from fastvlm_edge.generation.cascade import Attempts, ImageSize, check_image_size, sizes_to_try
from fastvlm_edge.generation.chat import Chat
from fastvlm_edge.generation.chat_file import ChatTurn, Model, Turn, read_chat, turns_of
from fastvlm_edge.generation.engine import Counters, Engine
from fastvlm_edge.generation.grammar import Grammar, compile_grammar
from fastvlm_edge.generation.images import AnyImage, EncodedImage, ImageCache, Images, SizedImage, as_list, image_key, model_digest, rows_of
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.sampling import SamplingParams, check_integer, stop_strings
from fastvlm_edge.generation.signature import parameters_of
from fastvlm_edge.generation.stream import ReplyStream, Started
from fastvlm_edge.inputs.image_input import ImageInput, rewound
from fastvlm_edge.inputs.preprocess import GEOMETRIES, preprocess_in_turn, to_pixels
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.rgb import Colour, to_colour
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.engine_record import EngineRecord
from fastvlm_edge.model_dir.manifest import Cascade, Manifest, check_sha256, read_manifest, verify_files, visual_tokens
from fastvlm_edge.model_dir.verified import changed
from fastvlm_edge.model_dir.verified import verify as verify_model
from fastvlm_edge.pretrained import converted
from fastvlm_edge.progress import Progress

SLOTS = 4
"""Questions that are answered at a time unless `load` is told otherwise."""
IMAGE_CACHE = 64 << 20
"""Bytes of encoded pictures that are kept: 70 of the 0.5B at 1024 px."""
_GRAMMARS = 16
"""Formats of answers that are kept compiled."""


@dataclass(frozen=True)
class BackendInfo:
    """What runs a model."""

    name: str
    """`ort`, `ort-cuda` or `tensorrt`."""
    description: str
    """Library, version and device, as text for users."""
    engines: EngineRecord | None = None
    """The record of the TensorRT engines that run, if any do."""


def load_parts(
    path: str | os.PathLike[str],
    backend: str = "auto",
    *,
    threads: int | None = None,
    slots: int = 1,
    image_size: ImageSize = None,
    verify: bool = False,
    tune_process: bool = False,
    progress: Progress | None = None,
    check: Callable[[Manifest, TextTokenizer], None] | None = None,
) -> tuple[Manifest, TextTokenizer, Backend]:
    """Load the parts of a model, for code that measures or verifies the backend itself. Options and errors as in `FastVLM.load`.

    `image_size` is checked first. `check` is called before anything that takes long, and may raise an error.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise FastVLMError(f"the model directory is of type {type(path).__name__}", "give its path as a str or a pathlib.Path")
    directory = Path(path)
    if threads is not None:
        check_integer("threads", threads, least=1)
    check_integer("slots", slots, least=1)
    manifest = read_manifest(directory)
    check_image_size(image_size, manifest)
    verify_files(directory, manifest)
    if verify or "tokenizer.json" in changed(directory, manifest):  # it is read before the others are compared
        check_sha256(directory / "tokenizer.json", manifest.files["tokenizer.json"])
    tokenizer = TextTokenizer(directory / "tokenizer.json")
    if check is not None:
        check(manifest, tokenizer)
    verify_model(directory, manifest, again=verify, progress=progress)
    loaded = select(backend, directory, manifest, threads=threads, slots=slots, tune_process=tune_process, progress=progress)
    return manifest, tokenizer, loaded


def check_question(
    manifest: Manifest,
    tokenizer: TextTokenizer,
    prompt: str,
    images: int,
    *,
    image_size: ImageSize = None,
    system: str | None = None,
    special_tokens: bool = False,
) -> None:
    """Raise FastVLMError for a prompt that is not text, or that leaves no room for a reply beside this number of images.

    With a cascade, the first size has to leave room.
    """
    template = ChatTemplate(tokenizer, manifest)
    rows = [visual_tokens(sizes_to_try(image_size, manifest)[0])] * images
    check_room([*template.opening(system), *template.turn(prompt, rows, special_tokens=special_tokens)], manifest)


@dataclass(frozen=True)
class _Question:
    """A question that was checked, and the conversation that it continues."""

    ids: dict[int, list[int]]
    """The whole conversation, up to where the reply begins, for each size of its pictures."""
    earlier: tuple[EncodedImage, ...]
    """The images of earlier questions."""
    images: list[AnyImage]
    """The images of this question."""
    params: SamplingParams
    grammar: Grammar | None
    pixels: list[NDArray[np.uint8] | None] | None
    """Filled with those of each image when it is read, unless it is None."""
    reuse: bool
    """Whether to begin with what the cache holds of the conversation."""
    seconds: float
    """Time that the tokenizer took."""


class FastVLM:
    """A loaded model. It answers as many questions at a time as it has slots; others wait for one, in order. Threads may share it."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: TextTokenizer,
        engine: Engine,
        *,
        image_size: ImageSize = None,
        geometry: str | None = None,
        background: Colour = "white",
        prefill_chunk: int = PREFILL_CHUNK,
        prefix_cache: bool = True,
        image_cache: int = IMAGE_CACHE,
        speculate: bool = True,
    ) -> None:
        """Use `FastVLM.load`."""
        check_image_size(image_size, manifest)
        self.manifest = manifest
        self.image_size = manifest.vision.image_size if image_size is None else image_size
        """The size of pictures for questions that do not say it: pixels of a side, or `auto`."""
        self.geometry = geometry or manifest.vision.geometry
        self.background = background
        _check_options(self.geometry, background, prefill_chunk, image_cache, prefix_cache=prefix_cache, speculate=speculate)
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, manifest)
        self._engine = engine
        self._chunk = prefill_chunk
        self._prefix_cache = prefix_cache
        self._images = ImageCache(image_cache)
        self._speculate = speculate
        self._digest = model_digest(manifest)
        self._grammar = lru_cache(_GRAMMARS)(partial(compile_grammar, tokenizer, manifest))
        self._vision = threading.Lock()
        """Held while a picture is encoded."""

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        threads: int | None = None,
        verify: bool = False,
        image_size: ImageSize = None,
        geometry: str | None = None,
        background: Colour = "white",
        prefill_chunk: int = PREFILL_CHUNK,
        slots: int = SLOTS,
        cache_memory: int | None = None,
        prefix_cache: bool = True,
        image_cache: int = IMAGE_CACHE,
        speculate: bool = True,
        tune_process: bool = False,
        progress: Progress | None = None,
    ) -> FastVLM:
        """Load a model directory.

        `threads` is the number of CPU threads; None means all that this process may use. `verify` compares the sha256 of every file with
        the manifest. `image_size` is how large pictures are for the model, in pixels of a side: one of the sizes that it was converted
        with. None is the first of them, and "auto" answers at a small size first (docs/image_size.md). Each question may say another one.
        `geometry` (`pad` or `crop`) overrides that of the manifest. Transparent pictures are drawn over `background`, a name, `#rrggbb` or
        (red, green, blue). `prefill_chunk` is the number of tokens per prefill call; with a smaller one, running
        answers wait less for new questions.

        `slots` is how many questions are answered at a time, where the backend has slots; memory is only taken for those in use.
        `cache_memory` bounds the keys and values of all conversations, in bytes; None takes what full slots need, but at most a quarter of
        the memory that is available now. `prefix_cache` begins a question with what earlier ones have computed of it. `image_cache` is how
        many bytes of encoded pictures are kept, to be found by their content; 0 keeps none. `speculate` lets the decoder verify guesses of
        the next tokens where they were often right and a step of several ids costs little, and those that a format of the answer
        leaves no choice for; no reply depends on it.

        `tune_process` saves memory with two settings that affect the whole process until it ends (`backends.select.select`): the commands
        of the toolkit turn it on, a program that embeds the model decides for itself. Replies are the same either way. Raises FastVLMError
        if the directory is incomplete, damaged, or does not fit this machine.
        """
        # Before minutes of loading.
        _check_options(geometry, background, prefill_chunk, image_cache, prefix_cache=prefix_cache, speculate=speculate)
        if cache_memory is not None:
            check_integer("cache_memory", cache_memory, least=1)
        manifest, tokenizer, loaded = load_parts(
            path,
            backend,
            threads=threads,
            slots=slots,
            image_size=image_size,
            verify=verify,
            tune_process=tune_process,
            progress=progress,
        )
        return cls(
            manifest,
            tokenizer,
            Engine(loaded, manifest.decoder, cache_memory=cache_memory),
            image_size=image_size,
            geometry=geometry,
            background=background,
            prefill_chunk=prefill_chunk,
            prefix_cache=prefix_cache,
            image_cache=image_cache,
            speculate=speculate,
        )

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        revision: str | None = None,
        precision: str | None = None,
        image_size: int | str | Sequence[int] | None = None,
        context: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> FastVLM:
        """Load a checkpoint, a directory or a hub id, which is converted at its first use and kept in the cache (`pretrained.converted`).

        `revision` is a branch, tag or commit of the hub repository; `precision` and `context` are those of `fastvlm-edge convert`, with the
        same defaults. So is `image_size`: with several sizes, the first is the default. "auto", and a size of a model directory, are for
        `load` alone. `options` are the others of `load`. With `progress` None, only a conversion is shown on
        stderr. Raises FastVLMError as `convert` and `load` do. Converting needs the packages of the extra `convert`, loading does not.
        """
        inspect.signature(cls.load).bind(checkpoint, **options)  # a wrong name is a TypeError before anything is converted
        to_convert = None if image_size == "auto" else image_size
        place = converted(checkpoint, revision=revision, precision=precision, image_size=to_convert, context=context, progress=progress)
        to_load: ImageSize = "auto" if image_size == "auto" else image_size if isinstance(image_size, int) else None
        return cls.load(place, image_size=to_load, progress=progress, **options)

    @property
    def backend(self) -> BackendInfo:
        """Name and description of what runs the model."""
        backend = self._engine.backend
        return BackendInfo(backend.name, backend.description, backend.engines)

    @property
    def slots(self) -> int:
        """How many questions are answered at a time."""
        return self._engine.backend.slots

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model."""
        return self._tokenizer

    def counters(self) -> Counters:
        """What was asked and answered since the model was loaded, and how much of it was known already."""
        return replace(self._engine.counters(), image_bytes=self._images.nbytes)

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
        system: str | None = None,
        image_size: ImageSize = None,
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
            logprobs=logprobs,
            format=answer_format(response_format=response_format, json_schema=json_schema, choices=choices, regex=regex, grammar=grammar),
        )
        return self._ask(self._template.opening(system), (), prompt, image, params, image_size=image_size)

    @parameters_of(stream)
    def generate(self, *prompt: Any, **options: Any) -> Reply:
        """Answer a question about no image, one, or several.

        The options are described in `SamplingParams`; `stop` is one string, several, or None. At most one of these five holds the reply
        to a format: `response_format` (that of the OpenAI API), `json_schema`, `choices`, `regex`, or `grammar` in llguidance's Lark
        syntax. A reply that `max_new_tokens` or the context cut off may not match it. `system` is the system prompt: "" is none, None
        that of the model. `image_size` is how large the pictures are for the model, as in `load`; None is what `load` was given. An
        `EncodedImage` keeps the size that it has, and there is no cascade.

        Raises FastVLMError if an option is out of range, a format is not supported, an image cannot be read, or the context is full.
        """
        return self.stream(*prompt, **options).wait()

    def prepare_format(
        self,
        *,
        response_format: Mapping[str, Any] | None = None,
        json_schema: Mapping[str, Any] | bool | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> None:
        """Check the format of an answer, and compile it as its first use would. Raises FastVLMError if it is not supported."""
        wanted = answer_format(response_format=response_format, json_schema=json_schema, choices=choices, regex=regex, grammar=grammar)
        if wanted is not None:
            self._grammar(wanted)

    def chat(
        self,
        *,
        system: str | None = None,
        context: Literal["error", "slide"] = "error",
        history: Sequence[Turn | ChatTurn] = (),
    ) -> Chat:
        """Begin a conversation of several turns, or go on with one that was held elsewhere.

        `system` is its system prompt: "" is none, None that of the model. When the context is full, a question is an error; with
        `context="slide"`, the oldest turns leave instead, with their pictures (`Reply.dropped_turns`). `history` is what was said before:
        objects of `ChatTurn`, or those of `Chat.turns`. Nothing of it is computed before the first question. Raises FastVLMError for other
        values.
        """
        model = self._known_as()
        return Chat(self._ask, model, self._most_rows, system=system, context=context, turns=turns_of(history, model))

    def load_chat(self, path: str | os.PathLike[str], images: Images = None) -> Chat:
        """Continue a conversation that `Chat.save` wrote, exactly where it was. `images` are those of which it has only the sha256.

        Raises FastVLMError if the file is damaged or of another model, or the images are not those of the conversation.
        """
        model = self._known_as()
        saved, turns = read_chat(path, model, as_list(images))
        return Chat(self._ask, model, self._most_rows, system=saved.system, context=saved.context, turns=turns)

    def encode_image(self, image: ImageInput, *, image_size: ImageSize = None) -> EncodedImage:
        """Run only the vision encoder. `image_size` is as in `generate`, but "auto" is the default size: there is no answer to judge.

        Raises FastVLMError if the image cannot be read, or the model does not have the size.
        """
        self._engine.check_open()
        size = self.fixed_size(image_size)
        began = time.perf_counter()
        pixel_values = self._preprocess(image, size)
        middle = time.perf_counter()
        encoded = self._encode_to_keep(pixel_values)
        encoded.preprocess_ms, encoded.vision_ms = (middle - began) * 1e3, (time.perf_counter() - middle) * 1e3
        return encoded

    def fixed_size(self, image_size: ImageSize = None) -> int:
        """The size of a picture that is encoded once, as by `encode_image`. Raises FastVLMError if the model does not have it."""
        check_image_size(image_size, self.manifest)
        chosen = (size for size in (image_size, self.image_size) if isinstance(size, int))
        return next(chosen, self.manifest.vision.image_size)

    def recall_image(self, key: bytes) -> EncodedImage | None:
        """The picture with this `EncodedImage.key`, if it was encoded before and is still kept. It takes no work, and has no pixels."""
        self._engine.check_open()
        image = self._images.get(key)
        if image is None:
            return None
        self._engine.count(images=1, cached_images=1)
        return EncodedImage(image.image_features, image.key)

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
        self._engine.check_open()
        _check_ids(input_ids, start)
        for image in images:
            if not isinstance(image, EncodedImage):
                raise FastVLMError(f"images holds a {type(image).__name__}, not an EncodedImage", "encode it first, with encode_image")
        ids = list(input_ids)
        end = self.manifest.decoder.vocab + sum(image.rows for image in images)
        if wrong := [token_id for token_id in ids if not 0 <= token_id < end]:
            raise FastVLMError(f"the id {wrong[0]} is out of range: there are {end} text and visual tokens")
        if not 0 <= start < len(ids):
            raise FastVLMError(f"start is {start}, outside the {len(ids)} ids")

        def blocks() -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
            for first in range(start, len(ids), LOGIT_POSITIONS):
                self._engine.check_open()
                score = Score(ids[: first + LOGIT_POSITIONS], tuple(images), first, chunk=self._chunk)
                self._engine.submit(score)
                yield first, *score.result()

        return blocks()

    def close(self) -> None:
        """Release the memory of the model. Open replies end with an error. May be called twice, and from any thread."""
        with self._vision:
            self._engine.close()
            self._images.clear()

    def __repr__(self) -> str:
        state = "closed" if self._engine.closed else self.backend.name
        return f"<FastVLM {self.manifest.name}, {self.manifest.precision}, {state}>"

    def __enter__(self) -> FastVLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _ask(
        self,
        history: list[int],
        earlier: tuple[EncodedImage, ...],
        prompt: str,
        image: Images,
        params: SamplingParams,
        *,
        image_size: ImageSize = None,
        reuse: bool = False,
        leave: Callable[[Answer | None, str, bool], None] | None = None,
        pixels: list[NDArray[np.uint8] | None] | None = None,
        or_else: str = "start a new conversation",
        dropped_turns: int = 0,
    ) -> ReplyStream:
        """Check a question that follows the conversation `history` with the images `earlier`, and return the stream that will answer it.

        With `reuse` it begins with what the cache holds of it, even if the model was loaded without `prefix_cache`. `pixels` is filled with
        those of its pictures; `or_else` is a remedy for a full context.
        """
        self._engine.check_open()
        began = time.perf_counter()
        images = as_list(image)
        sizes, cascade = self._sizes(images, image_size)
        first_row = sum(each.rows for each in earlier)
        ids: dict[int, list[int]] = {}
        for size in sizes:
            turn = self._template.turn(prompt, rows_of(images, size), first_row=first_row, special_tokens=params.special_tokens)
            try:
                check_room([*history, *turn], self.manifest, or_else=or_else)  # before the vision encoder runs in vain
            except ContextFull:
                if not ids:
                    raise
                break
            ids[size] = [*history, *turn]
        grammar = None if params.format is None else self._grammar(params.format)
        attempts, seconds = Attempts(list(ids), cascade), time.perf_counter() - began
        question = _Question(ids, earlier, images, params, grammar, pixels, reuse or self._prefix_cache, seconds)
        reads_images = any(not isinstance(each, EncodedImage) for each in images)
        return ReplyStream(
            partial(self._start, question, attempts),
            self.backend.name,
            self.manifest.precision,
            attempts,
            leave,
            dropped_turns,
            reads_images=reads_images,
        )

    def _sizes(self, images: Sequence[AnyImage], image_size: ImageSize) -> tuple[list[int], Cascade | None]:
        """The sizes at which to ask about these images, and the cascade if it decides. Raises FastVLMError for one that there is not."""
        size, cascade = self.fixed_size(image_size), self.manifest.cascade
        auto = (self.image_size if image_size is None else image_size) == "auto"
        if not auto or cascade is None or not images or any(isinstance(each, EncodedImage) for each in images):
            return [size], None
        return cascade.sizes, cascade

    def _most_rows(self, image: Images, image_size: ImageSize) -> list[int]:
        return rows_of(image, self._sizes(as_list(image), image_size)[0][-1])

    def _start(
        self,
        question: _Question,
        attempts: Attempts,
        piecewise: bool,
        sink: Callable[[Piece | None], None] | None,
        wanted: Callable[[], bool],
    ) -> Started | None:
        """Encode the images, and hand the question to the engine. None if the answer is no longer wanted."""
        began = time.perf_counter()
        if question.pixels is not None:
            question.pixels.clear()  # those of the size before
        if attempts.tried:
            question.images[:] = [each if isinstance(each, (EncodedImage, SizedImage)) else rewound(each) for each in question.images]
        encoded: list[EncodedImage] = []
        preprocess_seconds = vision_seconds = 0.0
        cached = 0
        for image in question.images:
            if not isinstance(image, EncodedImage) and not wanted():
                return None
            if isinstance(image, SizedImage):
                image = image.at(attempts.size)
            if isinstance(image, EncodedImage):
                encoded.append(EncodedImage(image.image_features, image.key))
                if question.pixels is not None:
                    question.pixels.append(image.pixels)
                continue
            start = time.perf_counter()
            pixel_values = self._preprocess(image, attempts.size)
            middle = time.perf_counter()
            if not wanted():
                return None
            encoding = self._encode(pixel_values, wanted)
            if encoding is None:
                return None
            known, found = encoding
            encoded.append(known)
            if question.pixels is not None:
                question.pixels.append(to_pixels(pixel_values))
            cached += found
            preprocess_seconds += middle - start
            vision_seconds += time.perf_counter() - middle
        if not wanted():
            return None
        answer = Answer(
            self._tokenizer,
            self.manifest,
            question.ids[attempts.size],
            (*question.earlier, *encoded),
            question.params,
            question.grammar,
            reuse=question.reuse,
            chunk=self._chunk,
            piecewise=piecewise and attempts.last,
            speculate=self._speculate,
            least=attempts.least,
            sink=sink,
        )
        started = Started(
            answer,
            preprocess_seconds=preprocess_seconds,
            vision_seconds=vision_seconds,
            before_seconds=time.perf_counter() - began + (0 if attempts.seconds else question.seconds),
            cached_images=cached,
        )
        self._engine.submit(answer)
        return started

    def _encode(self, pixel_values: NDArray[np.float32], wanted: Callable[[], bool] = lambda: True) -> tuple[EncodedImage, bool] | None:
        """The features of a picture, and whether they were known already. Running answers go on meanwhile, another picture waits.

        None if they are no longer `wanted` when it is their turn.
        """
        key = image_key(pixel_values, self._digest)
        with self._vision:
            if not wanted():
                return None
            self._engine.check_open()
            image = self._images.get(key)
            self._engine.count(images=1, cached_images=int(image is not None))
            if image is not None:
                return image, True
            image = EncodedImage(self._engine.backend.encode(pixel_values), key)
            self._images.put(image)
            return image, False

    def _known_as(self) -> Model:
        return Model(self.manifest, self._digest, self._tokenizer, self._template, self._preprocess, self._encode_to_keep)

    def _encode_to_keep(self, pixel_values: NDArray[np.float32]) -> EncodedImage:
        encoding = self._encode(pixel_values)
        assert encoding is not None  # always wanted
        image = encoding[0]
        return EncodedImage(image.image_features, image.key, to_pixels(pixel_values))

    def _preprocess(self, image: ImageInput, size: int) -> NDArray[np.float32]:
        return preprocess_in_turn(image, size, self.geometry, self.background)


def _check_ids(input_ids: Sequence[int], start: int) -> None:
    for token_id in input_ids:
        if not isinstance(token_id, (int, np.integer)):
            raise FastVLMError(f"input_ids holds {token_id!r}, not an integer", "give a sequence of integers")
    if not isinstance(start, (int, np.integer)):
        raise FastVLMError(f"start is {start!r}", "give an integer")


def _check_options(geometry: str | None, background: Colour, prefill_chunk: int, image_cache: int, **switches: bool) -> None:
    to_colour(background)
    if geometry is not None and geometry not in GEOMETRIES:
        raise FastVLMError(f"unknown geometry {geometry!r}", f"use one of: {', '.join(GEOMETRIES)}")
    check_integer("prefill_chunk", prefill_chunk, least=1)
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise FastVLMError(f"{name} is {value!r}", "give True or False")
    check_integer("image_cache", image_cache, least=0)
