"""Every question at every size of pictures -> accuracy and time by size, and of the cascade that is stored or fitted to the answers."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.asking import MAX_NEW_TOKENS, Answer, ask_all, asked_of, metric_of, scores_of, suffix_of
from fastvlm_edge.evaluation.cascade_fit import Answers, Outcome, fit, follow, held_out, largest_only, lost, questions_needed
from fastvlm_edge.evaluation.data import Dataset, Example
from fastvlm_edge.evaluation.metrics import Floats
from fastvlm_edge.evaluation.subject import Subject, identity
from fastvlm_edge.evaluation.table import columns
from fastvlm_edge.machine.description import describe
from fastvlm_edge.model_dir.manifest import Cascade, read_manifest, sha256
from fastvlm_edge.progress import Progress
from fastvlm_edge.version import __version__


@dataclass(frozen=True)
class Judged:
    """A cascade, and what it makes of questions that it was not fitted to."""

    cascade: Cascade
    outcome: Outcome
    fitted: dict[str, Any]
    """About the fit to these questions; empty for a cascade that was stored."""


@dataclass(frozen=True)
class _Asked:
    """The answers to one question: k values each, one for each size."""

    kind: str
    picture: str
    scores: list[float]
    mean: list[float]
    tokens: list[list[float]]
    first_ms: list[float]
    whole_ms: list[float]


class SizeComparison:
    """Asks a model every question of a dataset at each of its sizes. `report` is valid at any moment, also after an interruption."""

    def __init__(self, subject: Subject, dataset: Dataset, *, max_new_tokens: int = MAX_NEW_TOKENS, suffix: str | None = None) -> None:
        """Options as in `Evaluation`."""
        self.sizes = subject.vlm.manifest.vision.sizes
        self._subject, self._dataset = subject, dataset
        self._max_new_tokens, self._suffix = max_new_tokens, suffix_of(dataset, suffix)
        self._asked: list[_Asked] = []
        self._finished = False

    @property
    def count(self) -> int:
        """Questions answered so far."""
        return len(self._asked)

    def run(self, *, on_answer: Callable[[Answer], None] | None = None, progress: Progress | None = None) -> None:
        """Answer all questions; `on_answer` gets each answer at once. Errors as those of `Evaluation.run`."""
        for size in self.sizes:  # the first picture of a size takes longer
            self._subject.vlm.generate("?", Image.new("RGB", (64, 64)), image_size=size, max_new_tokens=1)
        ask_all(self._dataset, self._check, lambda example, image: self._ask(example, image, on_answer), progress)
        self._finished = True

    def answers(self) -> Answers:
        """All answers so far, at least one."""
        asked = self._asked
        longest = max(len(tokens) for each in asked for tokens in each.tokens)
        numbers: dict[str, int] = {}
        return Answers(
            self.sizes,
            np.array([each.scores for each in asked]),
            np.array([each.mean for each in asked]),
            np.array([[tokens + [2.0] * (longest - len(tokens)) for tokens in each.tokens] for each in asked]),
            np.array([each.first_ms for each in asked]),
            np.array([each.whole_ms for each in asked]),
            np.array([numbers.setdefault(each.picture, len(numbers)) for each in asked]),
        )

    def stored(self) -> Judged | None:
        """The cascade of the model directory; None if there is none."""
        cascade = self._subject.vlm.manifest.cascade
        return None if cascade is None else Judged(cascade, follow(self.answers(), cascade), {})

    def fit(self, drop: float) -> Judged:
        """The cheapest cascade that loses at most `drop` points (0 to 100) to the largest size, by the rule of `cascade_fit.fit`.

        Raises FastVLMError if the answers do not show that there is one, or if what is fitted to a half of them loses more on the other.
        """
        answers = self.answers()
        cascade = fit(answers, drop)
        largest, bound = self.sizes[-1], f"{drop:g} points"
        if cascade == largest_only(answers) or answers.pictures.max() == 0:
            what = f"{len(answers):,} questions do not show that a faster way than {largest} px loses at most {bound}"
            if (needed := questions_needed(answers, drop)) is None or needed <= len(answers):
                raise FastVLMError(f"{what}; auto was not fitted", "allow a larger --accuracy-drop")
            what += f": about {needed:,} like these would be enough"
            raise FastVLMError(f"{what}; auto was not fitted", "give more questions, or allow a larger --accuracy-drop")
        outcome, halves = held_out(answers, drop)
        if (points := lost(answers, outcome).points) > drop:
            what = f"what was fitted to one half of {len(answers):,} questions loses {points:.2f} points on the other, more than {bound}"
            raise FastVLMError(f"{what}; auto was not fitted", "give more questions, or allow a larger --accuracy-drop")
        fitted = {
            "accuracy_drop": drop,
            "lost_points_fitted": _rounded(asdict(lost(answers, follow(answers, cascade)))),
            "halves": [_choice(half) for half in halves],
        }
        return Judged(cascade, outcome, fitted)

    def report(self, judged: Judged | None = None) -> dict[str, Any]:
        """The object that `--json` prints."""
        answers = self.answers()
        kinds = np.array([each.kind for each in self._asked])
        outcome = None if judged is None else judged.outcome
        by_kind = {str(kind): _figures(answers, outcome, kinds == kind) for kind in sorted(set(kinds) - {""})}
        found = _figures(answers, outcome, np.ones(len(answers), dtype=bool))
        if judged is not None:
            found["cascade"] |= {**_choice(judged.cascade), "held_out": bool(judged.fitted), **judged.fitted}
        return {
            **found,
            "by_kind": by_kind,
            "skipped": len(self._dataset.skipped),
            **identity(self._subject),
            "name": self._subject.vlm.manifest.name,
            "runs_on": self._subject.vlm.backend.description,
            "default_size": self._subject.size,
            **asked_of(self._dataset, self._suffix, self._max_new_tokens, finished=self._finished),
        }

    def cascade(self, judged: Judged) -> Cascade:
        """A fitted cascade with its figures, for the manifest."""
        report = self.report(judged)
        names = ("count", "skipped", "sizes", "cascade", "format", "metric", "suffix", "max_new_tokens", "backend", "runs_on")
        path = Path(self._dataset.source)
        machine = describe()
        figures = {
            "data": path.name,
            "data_sha256": sha256(path),
            **{name: report[name] for name in names},
            "machine": machine.get("board") or machine["cpu"],
            "toolkit_version": __version__,
            "date": datetime.date.today().isoformat(),
        }
        return replace(judged.cascade, figures=figures)

    def _check(self, example: Example) -> None:
        self._subject.check(f"{example.prompt}{self._suffix}", self.sizes[-1])

    def _ask(self, example: Example, image: Image.Image, on_answer: Callable[[Answer], None] | None) -> None:
        subject, prompt, metric = self._subject, f"{example.prompt}{self._suffix}", metric_of(self._dataset)
        asked = _Asked(example.kind, example.picture, [], [], [], [], [])
        for size in self.sizes:
            encoded = subject.show(example.image, image, size)
            image_ms = encoded.preprocess_ms + encoded.vision_ms  # also of a picture that an earlier question was about
            began = time.perf_counter()
            reply = subject.answer(prompt, example.image, image, max_new_tokens=self._max_new_tokens, size=size, logprobs=0)
            asked.whole_ms.append(image_ms + (time.perf_counter() - began) * 1e3)
            asked.first_ms.append(image_ms + reply.timings.ttft_ms)
            asked.mean.append(-1.0 if reply.confidence is None else reply.confidence.mean)
            asked.tokens.append([math.exp(token.logprob) for token in reply.logprobs or ()])
            scores = scores_of(reply, example, self._dataset)
            asked.scores.append(scores[metric])
            if on_answer is not None:
                on_answer(Answer(example, reply, scores, size))
        self._asked.append(asked)


def check_several_sizes(directory: Path) -> None:
    """Raise FastVLMError if a model directory has only one size of pictures. Called before the model is loaded."""
    sizes = read_manifest(directory).vision.sizes
    if len(sizes) == 1:
        what = f"{directory} has one size of pictures, {sizes[0]} px, so there is nothing to choose from"
        raise FastVLMError(what, "convert with several, such as --image-size 1024,512,256")


def _figures(answers: Answers, outcome: Outcome | None, rows: NDArray[np.bool_]) -> dict[str, Any]:
    """Accuracy and times of some questions, by size and of a cascade."""
    part = answers.part(rows)
    sizes = {str(size): _speed(part.scores[:, at], part.first_ms[:, at], part.whole_ms[:, at]) for at, size in enumerate(part.sizes)}
    if outcome is None:
        return {"count": len(part), "sizes": sizes, "cascade": None}
    found = outcome.part(rows)
    cascade = {
        **_speed(found.scores, found.first_ms, found.whole_ms),
        "lost_points": _rounded(asdict(lost(part, found))),
        "first_token_share": round(float(found.first_ms.mean() / part.first_ms[:, -1].mean()), 4),
        "answered_at": {str(size): round(float((found.sizes == size).mean()), 4) for size in part.sizes},
    }
    return {"count": len(part), "sizes": sizes, "cascade": cascade}


def _speed(scores: Floats, first_ms: Floats, whole_ms: Floats) -> dict[str, Any]:
    first = {"mean": float(first_ms.mean()), "p95": float(np.percentile(first_ms, 95))}
    return {"accuracy": round(float(scores.mean()), 6), "first_token_ms": _rounded(first), "answer_ms": round(float(whole_ms.mean()), 3)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def _choice(cascade: Cascade) -> dict[str, Any]:
    return {"sizes": cascade.sizes, "threshold": cascade.threshold, "confidence": cascade.confidence}


def format_sizes(report: dict[str, Any]) -> str:
    """The report for a person to read."""
    cascade, names = report["cascade"], [*report["sizes"]]
    metric = report["metric"].replace("_", " ")
    rows: list[Sequence[str]] = [("", f"{metric}, %", "first token, mean ms", "95th percentile, ms", "whole answer, mean ms")]
    for title, found in _ways(report):
        first = found["first_token_ms"]
        times = (first["mean"], first["p95"], found["answer_ms"])
        rows.append((title, f"{100 * found['accuracy']:.2f}", *(f"{value:,.1f}" for value in times)))
    lines = columns(rows)
    if cascade is None:
        lines += ["", f"auto was never fitted, so it takes the default size, {report['default_size']} px; --accuracy-drop POINTS fits it"]
    else:
        lines += ["", *_about(cascade, names[-1])]
    if report["by_kind"]:
        titles = [title for title, _ in _ways(report)]
        rows = [(f"{metric}, %", "count", *titles, *(("auto, first token ms",) if cascade else ()))]
        for kind, found in report["by_kind"].items():
            cells = [f"{100 * way['accuracy']:.1f}" for _, way in _ways(found)]
            cells += [f"{found['cascade']['first_token_ms']['mean']:,.1f}"] if cascade else []
            rows.append((kind, str(found["count"]), *cells))
        lines += ["", *columns(rows)]
    lines += ["", f"{report['model']} ({report['precision']}) on {report['runs_on']}; {report['count']} of {report['examples']} questions"]
    if report["skipped"]:
        lines[-1] += f", {report['skipped']} skipped"
    if report["partial"]:
        lines[-1] += "; partial: the run was stopped before the end"
    return "\n".join(lines)


def _ways(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Title and figures of every size, and of the cascade if there is one."""
    sizes = [(f"{size} px", figures) for size, figures in found["sizes"].items()]
    return sizes if found["cascade"] is None else [*sizes, ("auto", found["cascade"])]


def _about(cascade: dict[str, Any], largest: str) -> list[str]:
    """What a cascade does, and what it loses and saves, in sentences."""
    *tries, last = cascade["sizes"]
    rule = f"always {last} px"
    if tries:
        sizes = ", then ".join(f"{size} px" for size in tries)
        rule = f"{sizes} while the {cascade['confidence']} probability of the answer is under {cascade['threshold']:.6g}, then {last} px"
    lost, judged = cascade["lost_points"], "on the halves that it was not fitted to" if cascade["held_out"] else "on these questions"
    points, low, high = (f"{-lost[end] + 0.0:+.2f}" for end in ("points", "high", "low"))
    lines = [
        f"auto: {rule}",
        f"against {largest} px, {judged}: {points} points (95 % interval {low} to {high}), "
        f"{100 * cascade['first_token_share']:.0f} % of the mean time to the first token",
        "answered at " + ", ".join(f"{size} px: {100 * share:.1f} %" for size, share in cascade["answered_at"].items()),
    ]
    if cascade["held_out"]:
        end = f"{-cascade['lost_points_fitted']['high'] + 0.0:+.2f}"
        lines.append(f"bound: {-cascade['accuracy_drop'] + 0.0:+g} points; on all questions, the interval begins at {end}")
    return lines
