"""`fastvlm-edge eval`: accuracy on questions with known answers, and the distance from a reference model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from fastvlm_edge.backends.select import BACKENDS
from fastvlm_edge.bench.record import check_writable
from fastvlm_edge.commands.arguments import given, given_path
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.evaluation.evaluate import MAX_NEW_TOKENS, AnswerFile, Evaluation, Subject, check_answers, format_table
from fastvlm_edge.generation.sampling import SamplingParams
from fastvlm_edge.progress import SilentProgress, stderr_progress


def main(arguments: Sequence[str]) -> int:
    """Ask all questions, then print a table, or with `--json` one object; after Ctrl-C or an error, print what was measured so far."""
    options = parser().parse_args(arguments)
    SamplingParams(max_new_tokens=options.max_new_tokens)  # wrong options are reported before the model loads
    if options.save is not None and os.path.lexists(options.save):
        raise FastVLMError(f"{options.save} already exists and is never overwritten", "remove it, or give another name with --save")
    if options.save is not None:
        check_writable(options.save)
    dataset = open_data(options.data, images=options.images, limit=options.limit, seed=options.seed)
    check_answers(dataset)
    progress = stderr_progress() if not options.json or sys.stderr.isatty() else SilentProgress()
    with ExitStack() as stack:
        load = partial(Subject.load, threads=options.threads, tune_process=True, special_tokens=options.special_tokens, progress=progress)
        subject = stack.enter_context(load(options.model, options.backend))
        reference = None
        if options.reference is not None:
            backend = options.reference_backend or options.backend
            reference = stack.enter_context(load(options.reference, backend))
        evaluation = Evaluation(subject, dataset, reference=reference, max_new_tokens=options.max_new_tokens, suffix=options.suffix)
        saved = None if options.save is None else stack.enter_context(AnswerFile(options.save))
        try:
            evaluation.run(on_answer=None if saved is None else saved.add, progress=progress)
        except (KeyboardInterrupt, FastVLMError) as error:
            progress.done()
            if evaluation.count and options.json and isinstance(error, FastVLMError):
                error.partial = evaluation.report()  # printed with the error, as one object
            elif evaluation.count:
                _finish(evaluation, saved, as_json=options.json)
            raise
        _finish(evaluation, saved, as_json=options.json)
    return 0


def _finish(evaluation: Evaluation, saved: AnswerFile | None, *, as_json: bool) -> None:
    """Print the report and close the file. With `--json` the object is printed last: an error must not follow as a second one."""
    report = evaluation.report()
    if not as_json:
        print(format_table(report), flush=True)
    if saved is not None:
        try:
            saved.close()
        except FastVLMError as error:
            error.partial = report
            raise
    if as_json:
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
