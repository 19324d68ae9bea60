"""Questions with known answers -> accuracy of a model directory, and its distance from a reference.

The runtime generates every answer greedily. Logits along a given answer (teacher-forced) are computed afterwards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from PIL import Image

from fastvlm_edge.evaluation.asking import MAX_NEW_TOKENS, Answer, ask_all, asked_of, scores_of, suffix_of
from fastvlm_edge.evaluation.data import Dataset, Example
from fastvlm_edge.evaluation.metrics import agreeing_tokens, kl_divergence
from fastvlm_edge.evaluation.subject import Subject, check_same_vocabulary, identity
from fastvlm_edge.evaluation.table import columns
from fastvlm_edge.progress import Progress


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
        self._suffix = suffix_of(dataset, suffix)
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
        ask_all(self._dataset, self._check, lambda example, image: self._ask(example, image, on_answer), progress)
        self._finished = True

    def report(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        manifest, backend = self._subject.vlm.manifest, self._subject.vlm.backend
        means = self._all.means()
        document: dict[str, Any] = {
            "exact_match": means.pop("exact_match", None),
            "by_kind": {kind: {**tally.means(), "count": tally.count} for kind, tally in sorted(self._kinds.items())},
            "count": self.count,
            "skipped": len(self._dataset.skipped),
            **means,
            "perplexity": _perplexity(self._nats, self._answer_tokens),
        }
        if self._reference is not None:
            compared = self._compared or math.nan
            document |= {
                "token_agreement": _finite(self._agreeing / compared),
                "kl_divergence": _finite(max(0.0, self._divergence / compared)),
                "compared_tokens": self._compared,
                "reference": identity(self._reference),
            }
        document |= {
            **identity(self._subject),
            "name": manifest.name,
            "runs_on": backend.description,
            "image_size": self._subject.size,
            **asked_of(self._dataset, self._suffix, self._max_new_tokens, finished=self._finished),
        }
        return document

    def _check(self, example: Example) -> None:
        self._subject.encode(_gold(example))
        for model in (self._subject, self._reference):
            if model is not None:
                model.check(f"{example.prompt}{self._suffix}")

    def _ask(self, example: Example, image: Image.Image, on_answer: Callable[[Answer], None] | None) -> None:
        subject, reference = self._subject, self._reference
        prompt = f"{example.prompt}{self._suffix}"
        reply = subject.answer(prompt, example.image, image, max_new_tokens=self._max_new_tokens)
        gold_ids = subject.with_end(subject.encode(_gold(example)))
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
        scores = scores_of(reply, example, self._dataset)
        answer = Answer(example, reply, scores, subject.size)
        if on_answer is not None:
            on_answer(answer)
        self._all.add(scores)
        if example.kind:
            self._kinds.setdefault(example.kind, Tally()).add(scores)
        self._nats, self._answer_tokens = self._nats + nats, self._answer_tokens + len(gold_ids)
        self._divergence, self._agreeing = self._divergence + divergence, self._agreeing + agreeing
        self._compared += compared


def format_table(report: dict[str, Any]) -> str:
    """The report for a person to read."""
    names = [name for name in ("exact_match", "vqa_accuracy", "relaxed_accuracy", "anls") if report.get(name) is not None]
    rows = [["", "count", *(name.replace("_", " ") for name in names)]]
    everything = {**{name: report[name] for name in names}, "count": report["count"]}
    for kind, scores in (*report["by_kind"].items(), ("all", everything)):
        rows.append([kind, str(scores["count"]), *(f"{100 * scores[name]:.1f} %" for name in names)])
    lines = columns(rows)
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


def _perplexity(nats: float, tokens: int) -> float | None:
    """exp of the mean; None without tokens, or if the result is too large for a float."""
    if not tokens or nats / tokens > 700:
        return None
    return _finite(math.exp(nats / tokens))


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _gold(example: Example) -> str:
    return Counter(example.answers).most_common(1)[0][0]
