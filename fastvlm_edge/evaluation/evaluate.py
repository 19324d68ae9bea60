"""Questions with known answers -> accuracy of a model directory, and its distance from a reference.

The runtime generates every answer greedily. Logits along a given answer (teacher-forced) are computed afterwards.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import ArchivedPicture, Dataset, Example
from fastvlm_edge.evaluation.metrics import (
    agreeing_tokens,
    anls,
    exact_match,
    kl_divergence,
    relaxed_accuracy,
    textvqa_accuracy,
    vqa_accuracy,
)
from fastvlm_edge.generation.answer import check_room
from fastvlm_edge.generation.images import EncodedImage
from fastvlm_edge.generation.reply import Reply
from fastvlm_edge.generation.vlm import FastVLM
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
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
_NAMED = 20


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
        self._shown: tuple[Path | ArchivedPicture, EncodedImage] | None = None

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
    ) -> Subject:
        """Load a model directory. Options and errors as in `FastVLM.load`; `special_tokens` as in `SamplingParams`."""
        vlm = FastVLM.load(directory, backend, threads=threads, tune_process=tune_process, progress=progress)
        return cls(directory, vlm, special_tokens=special_tokens)

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.vlm.close()

    def check(self, prompt: str) -> None:
        """Raise FastVLMError if the question is not valid text, or leaves no room for an answer."""
        check_room(self._prompt_ids(prompt), self.vlm.manifest)

    def answer(self, prompt: str, source: Path | ArchivedPicture, image: Image.Image, *, max_new_tokens: int) -> Reply:
        """The greedy answer. Consecutive questions about the same picture encode it once."""
        if self._shown is None or self._shown[0] != source:
            self._shown = (source, self.vlm.encode_image(image))
        self._ids = self._prompt_ids(prompt)
        return self.vlm.generate(prompt, self._shown[1], max_new_tokens=max_new_tokens, special_tokens=self._special_tokens)

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
        return self.vlm.logits([*self._ids, *answer[:-1]], [self._shown[1]], start=len(self._ids) - 1)

    def nats_of(self, answer: Sequence[int]) -> float:
        """Negative log-likelihood of an answer to the last question, the sum over its ids. Perplexity is exp of the mean over all ids."""
        assert self._shown is not None, "answer first"
        return -float(self.vlm.log_probabilities([*self._ids, *answer], [self._shown[1]], start=len(self._ids) - 1).sum())

    def _prompt_ids(self, prompt: str) -> list[int]:
        turn = self._template.turn(prompt, [self.vlm.manifest.vision.tokens], special_tokens=self._special_tokens)
        return [*self._template.opening(), *turn]


@dataclass(frozen=True)
class Answer:
    """One question, the model's answer, and its scores by name."""

    example: Example
    reply: Reply
    scores: dict[str, float]

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


class Tally:
    """Running means of scores."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, float] = {}

    def add(self, scores: dict[str, float]) -> None:
        """Count one question."""
        self.count += 1
        for name, value in scores.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Score name -> mean, 0 to 1."""
        return {name: round(value / self.count, 6) for name, value in self._sums.items()}


class Evaluation:
    """Asks a model every question of a dataset. `report` is valid at any moment, also after an interruption."""

    def __init__(
        self,
        subject: Subject,
        dataset: Dataset,
        *,
        reference: Subject | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        suffix: str | None = None,
    ) -> None:
        """`suffix` is appended to every question; None is SHORT_ANSWER for published sets and nothing for others.

        Raises FastVLMError if the reference has another vocabulary: its tokens cannot be compared.
        """
        if reference is not None:
            check_same_vocabulary(reference, subject)
        self._subject, self._reference, self._dataset = subject, reference, dataset
        self._max_new_tokens = max_new_tokens
        self._suffix = (SHORT_ANSWER if dataset.format in METRICS else "") if suffix is None else suffix
        self._metric = METRICS.get(dataset.format)
        self._all = Tally()
        self._kinds: dict[str, Tally] = {}
        self._nats, self._answer_tokens = 0.0, 0
        self._divergence, self._agreeing, self._compared = 0.0, 0, 0
        self._finished = False

    @property
    def count(self) -> int:
        """Questions answered so far."""
        return self._all.count

    def run(self, *, on_answer: Callable[[Answer], None] | None = None, progress: Progress | None = None) -> None:
        """Answer all questions; `on_answer` gets each one at once.

        Raises FastVLMError if more than half of the examples cannot be used, or the model's logits are not finite.
        """
        progress = progress or SilentProgress()
        progress.stage(f"answering {self._dataset.describe()}", len(self._dataset))
        seen = noted = 0
        for example, image in self._dataset.read():
            self._ask(example, image, on_answer)
            skipped = self._dataset.skipped
            for item in skipped[noted:_NAMED]:
                progress.note(f"skipped {item.id}: {item.reason}")
            noted = len(skipped)
            progress.advance(self.count + noted - seen)
            seen = self.count + noted
        for item in self._dataset.skipped[noted:_NAMED]:
            progress.note(f"skipped {item.id}: {item.reason}")
        progress.done()
        self._finished = True

    def report(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        manifest, backend = self._subject.vlm.manifest, self._subject.vlm.backend
        skipped = self._dataset.skipped
        means = self._all.means()
        document: dict[str, Any] = {
            "exact_match": means.pop("exact_match", None),
            "by_kind": {kind: {**tally.means(), "count": tally.count} for kind, tally in sorted(self._kinds.items())},
            "count": self.count,
            "skipped": len(skipped),
            **means,
            "perplexity": _perplexity(self._nats, self._answer_tokens),
        }
        if self._reference is not None:
            compared = self._compared or math.nan
            document |= {
                "token_agreement": _finite(self._agreeing / compared),
                "kl_divergence": _finite(max(0.0, self._divergence / compared)),
                "compared_tokens": self._compared,
                "reference": _identity(self._reference),
            }
        document |= {
            **_identity(self._subject),
            "name": manifest.name,
            "runs_on": backend.description,
            "data": self._dataset.source,
            "format": self._dataset.format,
            "metric": "exact_match" if self._metric is None else self._metric[0],
            "examples": len(self._dataset),
            "suffix": self._suffix,
            "max_new_tokens": self._max_new_tokens,
            "partial": not self._finished,
            "skipped_examples": [{"id": item.id, "reason": item.reason} for item in skipped[:_NAMED]],
        }
        return document

    def _ask(self, example: Example, image: Image.Image, on_answer: Callable[[Answer], None] | None) -> None:
        subject, reference = self._subject, self._reference
        if not example.prompt or not example.answers:
            self._dataset.skip(example.id, "no answer" if example.prompt else "no question")
            return
        prompt = example.prompt + self._suffix
        gold = Counter(example.answers).most_common(1)[0][0]
        try:
            gold_ids = subject.with_end(subject.encode(gold))
            for model in (subject, reference):
                if model is not None:
                    model.check(prompt)
        except FastVLMError as error:
            self._dataset.skip(example.id, str(error))
            return

        reply = subject.answer(prompt, example.image, image, max_new_tokens=self._max_new_tokens)
        gold_ids = gold_ids[: subject.room]
        nats = subject.nats_of(gold_ids)
        divergence, agreeing, compared = 0.0, 0, 0
        if reference is not None:
            own = reference.answer(prompt, example.image, image, max_new_tokens=self._max_new_tokens)
            along = reference.with_end(own.token_ids, ended=own.stop_reason == "stop")[: min(reference.room, subject.room)]
            compared = len(along)
            for expected, found in zip(reference.logits_along(along), subject.logits_along(along), strict=True):
                divergence += float(kl_divergence(expected, found).sum())
                agreeing += agreeing_tokens(expected, found)

        # Counted only now, and all together: after an interruption all figures are about the same questions.
        scores = {"exact_match": exact_match(reply.text, example.answers), "anls": anls(reply.text, example.answers)}
        if self._metric is not None:
            name, score = self._metric
            scores[name] = score(reply.text, example.answers)
        answer = Answer(example, reply, scores)
        if on_answer is not None:
            on_answer(answer)
        self._all.add(scores)
        if example.kind:
            self._kinds.setdefault(example.kind, Tally()).add(scores)
        self._nats, self._answer_tokens = self._nats + nats, self._answer_tokens + len(gold_ids)
        self._divergence, self._agreeing = self._divergence + divergence, self._agreeing + agreeing
        self._compared += compared


def check_answers(dataset: Dataset) -> None:
    """Raise FastVLMError if there is nothing to ask. Called before a model is loaded."""
    for number, item in enumerate(dataset.examples()):
        if isinstance(item, Example) and item.prompt and item.answers:
            return
        if number == 1000:
            break
    mend = "give a file of questions, not a folder of pictures" if dataset.format == "pictures" else "give a split that has answers"
    raise FastVLMError(f"{dataset.source} ({dataset.format}) has no questions with answers, which eval needs", mend)


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


def format_table(report: dict[str, Any]) -> str:
    """The report for a person to read."""
    names = [name for name in ("exact_match", "vqa_accuracy", "relaxed_accuracy", "anls") if report.get(name) is not None]
    rows = [["", "count", *(name.replace("_", " ") for name in names)]]
    everything = {**{name: report[name] for name in names}, "count": report["count"]}
    for kind, scores in (*report["by_kind"].items(), ("all", everything)):
        rows.append([kind, str(scores["count"]), *(f"{100 * scores[name]:.1f} %" for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    if report["perplexity"] is not None:
        lines += ["", f"perplexity of the answers  {report['perplexity']:.3f}"]
    if "reference" in report and report["token_agreement"] is not None:
        lines.append(f"equal tokens  {100 * report['token_agreement']:.2f} %, KL  {report['kl_divergence']:.6f} nats/token, ")
        lines[-1] += f"against {report['reference']['model']} ({report['reference']['precision']})"
    lines.append(f"{report['model']} ({report['precision']}) on {report['runs_on']}; {report['count']} of {report['examples']} questions")
    if report["skipped"]:
        lines[-1] += f", {report['skipped']} skipped"
    if report["partial"]:
        lines[-1] += "; partial: the run was stopped before the end"
    return "\n".join(lines)


def _identity(subject: Subject) -> dict[str, str]:
    return {"model": str(subject.directory), "precision": subject.vlm.manifest.precision, "backend": subject.vlm.backend.name}


def _perplexity(nats: float, tokens: int) -> float | None:
    """exp of the mean; None without tokens, or if the result is too large for a float."""
    if not tokens or nats / tokens > 700:
        return None
    return _finite(math.exp(nats / tokens))


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
