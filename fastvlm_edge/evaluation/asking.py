"""Every usable question of a dataset is asked, and its answer is scored and kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import Dataset, Example
from fastvlm_edge.evaluation.metrics import anls, exact_match, relaxed_accuracy, textvqa_accuracy, vqa_accuracy
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.progress import Progress, SilentProgress

METRICS: dict[str, tuple[str, Callable[[str, Sequence[str]], float]]] = {
    "textvqa": ("vqa_accuracy", textvqa_accuracy),
    "vqav2": ("vqa_accuracy", vqa_accuracy),
    "chartqa": ("relaxed_accuracy", relaxed_accuracy),
    "docvqa": ("anls", anls),
}
"""Format -> the score that the owners of this published set use. Exact match and ANLS are measured for every set."""
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""LLaVA, on which FastVLM's code is built, appends this to questions of these sets (haotian-liu/LLaVA, docs/Evaluation.md)."""
MAX_NEW_TOKENS = 128
NAMED = 20
"""Examples that are named, of those that are skipped."""


@dataclass(frozen=True)
class Answer:
    """One question, the model's answer, and its scores by name."""

    example: Example
    reply: Reply
    scores: dict[str, float]
    image_size: int
    """That of the picture, in pixels of a side."""

    def to_json(self) -> dict[str, Any]:
        """A line of `--save`."""
        example, reply = self.example, self.reply
        return {
            "id": example.id,
            "image": example.picture,
            "kind": example.kind,
            "prompt": example.prompt,
            "answers": list(example.answers),
            "answer": reply.text,
            "stop_reason": reply.stop_reason,
            "token_ids": reply.token_ids,
            "image_size": self.image_size,
            "confidence": None if reply.confidence is None else dataclasses.asdict(reply.confidence),
            **{name: round(value, 6) for name, value in self.scores.items()},
        }


class AnswerFile:
    """The file of `--save`: a line of JSON for each answer, written at once. It ends with a whole line, whatever interrupts the writing.

    Without any answer it is removed.
    """

    def __init__(self, path: Path) -> None:
        """Create the file. Raises FastVLMError if it exists or cannot be created."""
        self._path = path
        self._written = 0
        """Bytes of whole lines."""
        try:
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with suppress(OSError, FastVLMError):  # the first error is the one to report
            self.close()

    def add(self, answer: Answer) -> None:
        """Append an answer. Raises FastVLMError if the disk is full."""
        line = (json.dumps(answer.to_json(), ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        done = 0
        try:
            while done < len(line):
                done += self._file.write(line[done:])
        except OSError as error:
            raise self._failure(error) from None
        finally:
            if done < len(line):
                self._file.truncate(self._written)
                self._file.seek(self._written)
        self._written += len(line)

    def close(self) -> None:
        """Close the file. May be called twice. Raises FastVLMError if the disk is full."""
        if self._file.closed:
            return
        try:
            self._file.close()
            if not self._written:
                self._path.unlink()
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> FastVLMError:
        return FastVLMError(f"{self._path} cannot be written ({error.strerror})", "free some space, or choose another place with --save")


def ask_all(
    dataset: Dataset, check: Callable[[Example], None], ask: Callable[[Example, Image.Image], None], progress: Progress | None = None
) -> None:
    """Call `ask` for every example that has a question and answers, and for which `check` raises no FastVLMError. Others are skipped.

    Raises FastVLMError if more than half of the examples cannot be used, and what `ask` raises.
    """
    progress = progress or SilentProgress()
    progress.stage(f"answering {dataset.describe()}", len(dataset))
    asked = seen = noted = 0
    for example, image in dataset.read():
        if (reason := _unusable(example, check)) is None:
            ask(example, image)
            asked += 1
        else:
            dataset.skip(example.id, reason)
        for item in dataset.skipped[noted:NAMED]:
            progress.note(f"skipped {item.id}: {item.reason}")
        noted = len(dataset.skipped)
        progress.advance(asked + noted - seen)
        seen = asked + noted
    for item in dataset.skipped[noted:NAMED]:
        progress.note(f"skipped {item.id}: {item.reason}")
    progress.done()


def _unusable(example: Example, check: Callable[[Example], None]) -> str | None:
    """Why an example cannot be asked; None if it can."""
    if not example.prompt or not example.answers:
        return "no answer" if example.prompt else "no question"
    try:
        check(example)
    except FastVLMError as error:
        return str(error)
    return None


def suffix_of(dataset: Dataset, suffix: str | None) -> str:
    """What is appended to every question: `suffix`, or if that is None, what published sets need."""
    return (SHORT_ANSWER if dataset.format in METRICS else "") if suffix is None else suffix


def metric_of(dataset: Dataset) -> str:
    """Name of the score that the owners of this set use; exact match for sets of no known format."""
    return METRICS[dataset.format][0] if dataset.format in METRICS else "exact_match"


def asked_of(dataset: Dataset, suffix: str, max_new_tokens: int, *, finished: bool) -> dict[str, Any]:
    """What a report says of its questions: where they come from, how they were asked, and which were skipped."""
    return {
        "data": dataset.source,
        "format": dataset.format,
        "metric": metric_of(dataset),
        "examples": len(dataset),
        "suffix": suffix,
        "max_new_tokens": max_new_tokens,
        "partial": not finished,
        "skipped_examples": [{"id": item.id, "reason": item.reason} for item in dataset.skipped[:NAMED]],
    }


def scores_of(reply: Reply, example: Example, dataset: Dataset) -> dict[str, float]:
    """Scores of an answer by name, 0 to 1: exact match, ANLS, and that of `metric_of`."""
    scores = {"exact_match": exact_match(reply.text, example.answers), "anls": anls(reply.text, example.answers)}
    if dataset.format in METRICS:
        name, score = METRICS[dataset.format]
        scores[name] = score(reply.text, example.answers)
    return scores


def check_answers(dataset: Dataset) -> None:
    """Raise FastVLMError if there is nothing to ask. Called before a model is loaded."""
    for number, item in enumerate(dataset.examples()):
        if isinstance(item, Example) and item.prompt and item.answers:
            return
        if number == 1000:
            break
    mend = "give a file of questions, not a folder of pictures" if dataset.format == "pictures" else "give a split that has answers"
    raise FastVLMError(f"{dataset.source} ({dataset.format}) has no questions with answers, which eval needs", mend)
