"""`fastvlm-edge eval`: how often a model is right about questions with known answers, and how far it is from a reference."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from fastvlm_edge.backends.select import BACKENDS
from fastvlm_edge.bench.record import check_writable
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import open_data
from fastvlm_edge.evaluation.evaluate import MAX_NEW_TOKENS, Answer, Evaluation, Subject, check_answers, format_table
from fastvlm_edge.generation.sampling import SamplingParams
from fastvlm_edge.progress import SilentProgress, stderr_progress


def main(arguments: Sequence[str]) -> int:
    """Ask everything, then print a table, or with `--json` one object; after Ctrl-C or an error what there is of it."""
    options = parser().parse_args(arguments)
    SamplingParams(max_new_tokens=options.max_new_tokens)  # what can be wrong is told before the model loads
    if options.save is not None and options.save.exists():
        raise FastVLMError(f"{options.save} exists, and answers are never overwritten; give --save another name, or remove it")
    if options.save is not None:
        check_writable(options.save)
    dataset = open_data(options.data, images=options.images, limit=options.limit, seed=options.seed)
    check_answers(dataset)
    progress = stderr_progress() if not options.json or sys.stderr.isatty() else SilentProgress()
    with ExitStack() as stack:
        subject = stack.enter_context(
            Subject.load(options.model, options.backend, threads=options.threads, tune_process=True, progress=progress)
        )
        reference = None
        if options.reference is not None:
            backend = options.reference_backend or options.backend
            reference = stack.enter_context(
                Subject.load(options.reference, backend, threads=options.threads, tune_process=True, progress=progress)
            )
        evaluation = Evaluation(subject, dataset, reference=reference, max_new_tokens=options.max_new_tokens, suffix=options.suffix)
        saved = None if options.save is None else stack.enter_context(open(options.save, "x", encoding="utf-8", errors="replace"))
        try:
            evaluation.run(on_answer=lambda answer: _save(saved, answer), progress=progress)
        except (KeyboardInterrupt, FastVLMError):
            progress.done()
            if evaluation.count:
                _print(evaluation, as_json=options.json)
            raise
        _print(evaluation, as_json=options.json)
    return 0


def _save(file: TextIO | None, answer: Answer) -> None:
    if file is None:
        return
    try:
        file.write(json.dumps(answer.to_json(), ensure_ascii=False) + "\n")
        file.flush()
    except OSError as error:
        raise FastVLMError(f"{file.name} cannot be written ({error.strerror}); make room, or choose another place with --save") from None


def _print(evaluation: Evaluation, *, as_json: bool) -> None:
    report = evaluation.report()
    print(json.dumps(report, ensure_ascii=False) if as_json else format_table(report), flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge eval", description="Ask a model questions with known answers, and count how often it is right (docs/eval.md)."
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="model directory, made by fastvlm-edge convert")
    group = parser.add_argument_group("the questions")
    group.add_argument("--data", metavar="FILE", required=True, help="JSON lines, LLaVA JSON, WebDataset tar, TextVQA, DocVQA, ...")
    group.add_argument("--images", metavar="DIR", type=Path, help="folder of the pictures; default beside FILE")
    group.add_argument("--limit", metavar="N", type=int, help="ask only N of them, always the same for the same seed")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="which ones --limit chooses; default %(default)s")
    group.add_argument("--suffix", metavar="TEXT", help="after each question; default LLaVA's short-answer sentence for published sets")
    group = parser.add_argument_group("the answers")
    group.add_argument("--max-new-tokens", metavar="N", type=int, default=MAX_NEW_TOKENS, help="default %(default)s")
    group.add_argument("--reference", metavar="MODEL2", type=Path, help="compare tokens and logits with this model directory")
    group.add_argument("--save", metavar="FILE.jsonl", type=Path, help="write each answer as it comes")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="default %(default)s")
    group.add_argument("--reference-backend", choices=BACKENDS, help="of MODEL2; default the same")
    group.add_argument("--threads", metavar="N", type=int, help="CPU threads; default all that this process may use")
    return parser
