"""`fastvlm-edge eval`: accuracy on questions with known answers, and the distance from a reference model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastvlm_edge.backends.select import BACKENDS
from fastvlm_edge.bench.plot import check_matplotlib, plot_files
from fastvlm_edge.bench.record import check_writable
from fastvlm_edge.commands.arguments import at_least_zero, given, given_path, image_size
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.asking import MAX_NEW_TOKENS, AnswerFile, check_answers
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.evaluation.evaluate import Evaluation, format_table
from fastvlm_edge.evaluation.image_sizes import Judged, SizeComparison, check_several_sizes, format_sizes
from fastvlm_edge.evaluation.size_plot import draw_sizes
from fastvlm_edge.evaluation.subject import Subject
from fastvlm_edge.generation.sampling import SamplingParams
from fastvlm_edge.model_dir.cascade_record import check_changeable, write_cascade
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME
from fastvlm_edge.progress import SilentProgress, stderr_progress


def main(arguments: Sequence[str]) -> int:
    """Ask all questions, then print a table, or with `--json` one object; after Ctrl-C or an error, print what was measured so far."""
    options = parser().parse_args(arguments)
    _check(options)
    dataset = open_data(options.data, images=options.images, limit=options.limit, seed=options.seed)
    check_answers(dataset)
    progress = stderr_progress() if not options.json or sys.stderr.isatty() else SilentProgress()
    with ExitStack() as stack:
        load = partial(Subject.load, threads=options.threads, tune_process=True, special_tokens=options.special_tokens, progress=progress)
        # With auto, every time to the first token is that of a new picture.
        load = partial(load, **({"slots": 1, "image_cache": 0} if options.image_size == "auto" else {"image_size": options.image_size}))
        subject = stack.enter_context(load(options.model, options.backend))
        reference = None
        if options.reference is not None:
            backend = options.reference_backend or options.backend
            reference = stack.enter_context(load(options.reference, backend))
        asked = {"max_new_tokens": options.max_new_tokens, "suffix": options.suffix}
        evaluation: Evaluation | SizeComparison
        if options.image_size == "auto":
            evaluation = SizeComparison(subject, dataset, **asked)
        else:
            evaluation = Evaluation(subject, dataset, reference=reference, **asked)
        saved = None if options.save is None else stack.enter_context(AnswerFile(options.save))
        judged: Judged | None = None
        try:
            evaluation.run(on_answer=None if saved is None else saved.add, progress=progress)
            if isinstance(evaluation, SizeComparison):
                judged = evaluation.stored() if options.accuracy_drop is None else evaluation.fit(options.accuracy_drop)
                if judged is not None and judged.fitted:
                    write_cascade(options.model, subject.vlm.manifest, evaluation.cascade(judged))
        except (KeyboardInterrupt, FastVLMError) as error:
            progress.done()
            report = _report(evaluation, judged) if evaluation.count else None
            if report is not None and options.json and isinstance(error, FastVLMError):
                error.partial = report  # printed with the error, as one object
            elif report is not None:
                _finish(report, saved, options)
            raise
        _finish(_report(evaluation, judged), saved, options)
        if judged is not None and judged.fitted and not options.json:
            print(f"{options.model / MANIFEST_NAME} has this cascade now, and `--image-size auto` follows it")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise FastVLMError for options that cannot work, before the model loads."""
    SamplingParams(max_new_tokens=options.max_new_tokens)
    if options.save is not None and os.path.lexists(options.save):
        raise FastVLMError(f"{options.save} already exists and is never overwritten", "remove it, or give another name with --save")
    if options.save is not None:
        check_writable(options.save)
    if options.image_size != "auto":
        for name in ("accuracy_drop", "plot"):
            if getattr(options, name) is not None:
                raise FastVLMError(
                    f"--{name.replace('_', '-')} is for --image-size auto, which asks at every size", "add --image-size auto"
                )
        return
    if options.reference is not None:
        raise FastVLMError("--reference compares the answers at one size, and auto asks at every size", "leave one of them out")
    check_several_sizes(options.model)
    if options.accuracy_drop is not None:
        check_changeable(options.model)
    if options.plot is not None:
        check_matplotlib()
        for path in plot_files(options.plot, ["sizes"]):
            check_writable(path)


def _report(evaluation: Evaluation | SizeComparison, judged: Judged | None) -> dict[str, Any]:
    return evaluation.report(judged) if isinstance(evaluation, SizeComparison) else evaluation.report()


def _finish(report: dict[str, Any], saved: AnswerFile | None, options: argparse.Namespace) -> None:
    """Print the report, draw it and close the file. With `--json` the object is printed last: an error must not follow as a second one."""
    if not options.json:
        print(format_sizes(report) if options.image_size == "auto" else format_table(report), flush=True)
    try:
        if saved is not None:
            saved.close()
        if options.plot is not None:
            for path in draw_sizes(options.plot, report):
                print(path, file=sys.stderr)
    except FastVLMError as error:
        error.partial = report
        raise
    if options.json:
        print(json.dumps(report, ensure_ascii=False), flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge eval",
        description="Measure the accuracy of a model on a file of questions, and optionally its distance from a reference (docs/eval.md).",
    )
    parser.add_argument("model", metavar="MODEL", type=given_path, help="model directory, written by fastvlm-edge convert")
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--data", metavar="FILE", type=given, required=True, help="JSON lines, LLaVA JSON, a WebDataset tar, TextVQA, DocVQA, ..."
    )
    group.add_argument("--images", metavar="DIR", type=given_path, help="folder of the pictures (default: beside FILE)")
    group.add_argument("--limit", metavar="N", type=int, help="evaluate a reproducible random subset of N questions")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the subset that --limit chooses (default: %(default)s)")
    group.add_argument(
        "--suffix", metavar="TEXT", help="text to append to each question (default: LLaVA's short-answer sentence for published sets)"
    )
    group = parser.add_argument_group("size of pictures")
    group.add_argument(
        "--image-size",
        metavar="PX|auto",
        type=image_size,
        help="one of the model's sizes (default: its default size); auto compares all of them, and the cascade",
    )
    group.add_argument(
        "--accuracy-drop",
        metavar="POINTS",
        type=at_least_zero,
        help="fit the cascade: the fastest that loses at most so many points to the largest size; write it into the model directory",
    )
    group.add_argument("--plot", metavar="PREFIX", type=given_path, help="write PREFIX-sizes, .png and .svg: accuracy against time")
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=MAX_NEW_TOKENS, help="longest answer, in tokens (default: %(default)s)"
    )
    group.add_argument("--special-tokens", action="store_true", help="read special tokens in the data as tokens, and show those of answers")
    group.add_argument("--reference", metavar="MODEL2", type=given_path, help="compare tokens and logits with this model directory")
    group.add_argument("--save", metavar="FILE.jsonl", type=given_path, help="write each answer to this file as soon as it is known")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what runs the model; auto takes the best that can (default: %(default)s)"
    )
    group.add_argument("--reference-backend", choices=BACKENDS, help="what runs MODEL2 (default: as --backend)")
    group.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: all that this process may use)")
    return parser
