"""A model that is evaluated: it answers questions greedily, and its logits along a given answer (teacher-forced) can be computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import ArchivedPicture
from fastvlm_edge.generation.answer import check_room
from fastvlm_edge.generation.images import EncodedImage
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.vlm import FastVLM
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import visual_tokens
from fastvlm_edge.progress import Progress


class Subject:
    """A loaded model, and the conversation that its cache holds."""

    def __init__(self, directory: Path, vlm: FastVLM, *, special_tokens: bool = False) -> None:
        """Use `load`."""
        self.directory = directory
        self._special_tokens = special_tokens
        self.vlm = vlm
        self.tokenizer = TextTokenizer(directory / "tokenizer.json")
        self._template = ChatTemplate(self.tokenizer, vlm.manifest)
        self._ids: list[int] = []
        self._source: Path | ArchivedPicture | None = None
        self._encoded: dict[int, EncodedImage] = {}
        """The last picture, by the size it was encoded at."""
        self._shown: EncodedImage | None = None

    @classmethod
    def load(
        cls,
        directory: Path,
        backend: str = "auto",
        *,
        threads: int | None = None,
        tune_process: bool = False,
        special_tokens: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> Subject:
        """Load a model directory. Options and errors as in `FastVLM.load`; `special_tokens` as in `SamplingParams`."""
        vlm = FastVLM.load(directory, backend, threads=threads, tune_process=tune_process, progress=progress, **options)
        return cls(directory, vlm, special_tokens=special_tokens)

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.vlm.close()

    @property
    def size(self) -> int:
        """The size of pictures, in pixels of a side, unless a method is given another one."""
        return self.vlm.fixed_size()

    def check(self, prompt: str, size: int | None = None) -> None:
        """Raise FastVLMError if the question is not valid text, or leaves no room for an answer."""
        check_room(self._prompt_ids(prompt, visual_tokens(size or self.size)), self.vlm.manifest)

    def show(self, source: Path | ArchivedPicture, image: Image.Image, size: int | None = None) -> EncodedImage:
        """A picture for the next question. It is encoded once for consecutive questions about it."""
        size = size or self.size
        if self._source != source:
            self._source, self._encoded = source, {}
        if size not in self._encoded:
            self._encoded[size] = self.vlm.encode_image(image, image_size=size)
        self._shown = self._encoded[size]
        return self._shown

    def answer(
        self,
        prompt: str,
        source: Path | ArchivedPicture,
        image: Image.Image,
        *,
        max_new_tokens: int,
        size: int | None = None,
        logprobs: int | None = None,
    ) -> Reply:
        """The greedy answer."""
        encoded = self.show(source, image, size)
        self._ids = self._prompt_ids(prompt, encoded.rows)
        special = self._special_tokens
        return self.vlm.generate(prompt, encoded, max_new_tokens=max_new_tokens, special_tokens=special, logprobs=logprobs)

    def encode(self, text: str) -> list[int]:
        """Ids of a known answer."""
        return self.tokenizer.encode(text, special_tokens=self._special_tokens)

    def with_end(self, token_ids: Sequence[int], *, ended: bool = True) -> list[int]:
        """An answer's ids and, if it `ended`, the id that ends it."""
        return [*token_ids, *self._template.closing()[: int(ended)]]

    @property
    def room(self) -> int:
        """Length of the longest answer to the last question for which every position has logits."""
        return self.vlm.manifest.decoder.context - len(self._ids) + 1

    def logits_along(self, answer: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits that predict each id of an answer to the last question after those before it, in blocks [up to 16, token_count]."""
        assert self._shown is not None, "answer first"
        return self.vlm.logits([*self._ids, *answer[:-1]], [self._shown], start=len(self._ids) - 1)

    def nats_of(self, answer: Sequence[int]) -> float:
        """Negative log-likelihood of an answer to the last question, the sum over its ids. Perplexity is exp of the mean over all ids."""
        assert self._shown is not None, "answer first"
        return -float(self.vlm.log_probabilities([*self._ids, *answer], [self._shown], start=len(self._ids) - 1).sum())

    def _prompt_ids(self, prompt: str, rows: int) -> list[int]:
        turn = self._template.turn(prompt, [rows], special_tokens=self._special_tokens)
        return [*self._template.opening(), *turn]


def check_same_vocabulary(reference: Subject, model: Subject) -> None:
    """Raise FastVLMError unless every id stands for the same token in both."""
    mend = "choose a reference from the same checkpoint, for example with another --precision"
    manifests = [subject.vlm.manifest for subject in (reference, model)]
    counts = [manifest.text.token_count for manifest in manifests]
    if counts[0] != counts[1]:
        raise FastVLMError(f"{reference.directory} has {counts[0]} tokens and {model.directory} has {counts[1]}", mend)
    # The same tokenizer may be formatted differently in two layouts of one checkpoint, so the hashes alone do not decide.
    if len({manifest.files["tokenizer.json"].sha256 for manifest in manifests}) > 1:
        first, second = (Tokenizer.from_file(str(s.directory / "tokenizer.json")).get_vocab() for s in (reference, model))
        if first != second:
            raise FastVLMError(f"{reference.directory} and {model.directory} have different tokenizers", mend)


def identity(subject: Subject) -> dict[str, str]:
    """What a report says of a model."""
    return {"model": str(subject.directory), "precision": subject.vlm.manifest.precision, "backend": subject.vlm.backend.name}
