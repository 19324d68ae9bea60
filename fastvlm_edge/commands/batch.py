"""`fastvlm-edge batch`: a question about every picture of a folder or a data set; one line of JSON per picture goes to a file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from fastvlm_edge.batch.answering import RowAnswerer
from fastvlm_edge.batch.job import Job, job_for, sidecar
from fastvlm_edge.batch.results import Results, not_done, while_it_works
from fastvlm_edge.batch.rows import Row, Rows, check_askable, open_rows
from fastvlm_edge.batch.summary import Summary
from fastvlm_edge.bench.record import check_writable
from fastvlm_edge.commands.arguments import at_least_zero, given, given_path, positive
from fastvlm_edge.commands.run import (
    MODEL_HELP,
    add_loading_options,
    add_reply_options,
    check_format,
    check_reply,
    load,
    model_directory,
    sampling_options,
)
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.rgb import to_colour
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.machine.power import NoSensor, Sensor, find_sensor
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest
from fastvlm_edge.progress import Progress, SilentProgress, stderr_progress

SLOTS = 8
"""More than for questions of people: how many answers come in an hour counts, and not how long one of them takes."""


def main(arguments: Sequence[str]) -> int:
    """Answer the rows that the file does not have yet. The status is 0 if all rows have answers, and 1 if some have errors."""
    options = parser().parse_args(arguments)
    sampling = sampling_options(options)
    to_colour(options.background)
    for path in (options.output, options.summary):
        if path is not None:
            check_writable(path)
    _check_engine(options)
    # Ray's workers run in another folder.
    source = os.path.abspath(options.input) if options.engine == "ray" else options.input
    rows = open_rows(source, prompt=options.prompt, images=options.images).shard(*options.shard).first(options.limit)
    _check_distinct(options, rows)
    options.model = Path(model_directory(options.model, SilentProgress() if options.quiet else stderr_progress(), options.image_size))
    job = job_for(
        read_manifest(options.model),
        sampling,
        prompt=options.prompt,
        system=options.system,
        geometry=options.geometry,
        background=options.background,
        image_size=options.image_size,
    )
    summary = Summary()
    with Results(options.output, job, retry_errors=options.retry_errors) as results:
        try:
            _answer(options, sampling, rows, results, summary)
        except (KeyboardInterrupt, FastVLMError):
            results.sync()
            _tell(options, summary, results, "stopped; the same command goes on")
            raise
        _tell(options, summary, results)
        return 1 if results.errors or summary.twice else 0


def _answer(options: argparse.Namespace, sampling: dict[str, Any], rows: Rows, results: Results, summary: Summary) -> None:
    """Load the model if there is anything to do, and answer."""
    progress = SilentProgress() if options.quiet else stderr_progress()

    def check(manifest: Manifest, tokenizer: TextTokenizer) -> None:
        if options.prompt is None:
            check_format(manifest, tokenizer, sampling)
        else:
            check_reply(manifest, tokenizer, options, sampling, images=1)

    waiting = not_done(rows, results, summary)
    if results.rows == results.errors.total():  # there is no answer yet
        waiting = check_askable(waiting, rows.source, look=options.engine != "ray" or options.upload)  # otherwise they are on the nodes
    first = next(waiting, None)
    total = None if first is None and results.rows else rows.total
    if first is None:
        return
    with _answering(options, results.job, progress, check) as (answer, where, sensor), summary.measuring(sensor):
        progress.note(f"[{where}]")
        left_out = summary.done_before + summary.twice
        progress.stage("answering", None if total is None else max(1, total - left_out), speed=True)
        with closing(answer(chain([first], waiting))) as answered:
            try:
                for row in while_it_works(answered):
                    results.write(row)
                    summary.add(row)
                    before, left_out = left_out, summary.done_before + summary.twice
                    progress.advance(1 + left_out - before)
            finally:
                progress.done()


@contextmanager
def _answering(
    options: argparse.Namespace, job: Job, progress: Progress, check: Callable[[Manifest, TextTokenizer], None]
) -> Iterator[tuple[Callable[[Iterable[Row]], Generator[dict[str, Any]]], str, Sensor | NoSensor]]:
    """What answers rows, where, and what measures its power."""
    if options.engine == "here":
        with load(options, progress, check, slots=options.slots) as vlm:
            where = f"{options.slots} at a time, on {vlm.backend.description}"
            yield RowAnswerer(vlm, job).answer, where, find_sensor(card=vlm.backend.name != "ort")
        return
    from fastvlm_edge.ray import Workers

    check(read_manifest(options.model), TextTokenizer(options.model / "tokenizer.json"))
    with Workers(
        options.model,
        job,
        address=options.address,
        actors=options.workers,
        gpus=options.gpus_per_worker,
        upload=options.upload,
        tell=lambda line: progress.note(f"[{line}]"),
        threads=options.threads,
        slots=options.slots,
        backend=options.backend,
        prefill_chunk=options.prefill_chunk,
        verify=options.verify,
    ) as workers:
        yield workers.answer, workers.description, NoSensor("the workers may run on other machines")


def _check_engine(options: argparse.Namespace) -> None:
    for name in ("address", "workers", "gpus_per_worker", "upload"):
        value = getattr(options, name)
        if options.engine != "ray" and value is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            raise FastVLMError(f"{option} is for a Ray cluster", f"add --engine ray, or leave {option} out")


def _check_distinct(options: argparse.Namespace, rows: Rows) -> None:
    """Raise FastVLMError if a file that is written is also another one: its content would be lost."""
    taken = {os.path.realpath(reader.path): f"the input {reader.path}" for reader in rows.readers}
    job = sidecar(options.output)
    for option, path, use in (
        ("-o", options.output, "the file of the results"),
        ("-o", job, f"{job.name}, which says how the results were answered"),
        ("--summary", options.summary, "the file of the summary"),
    ):
        if path is not None:
            other = taken.setdefault(os.path.realpath(path), use)
            if other is not use:
                raise FastVLMError(f"{path} is {use} and {other}", f"give another file with {option}")


def _tell(options: argparse.Namespace, summary: Summary, results: Results, *last: str) -> None:
    if not options.quiet:
        for line in (*summary.lines(), f"{results.rows} rows in {results.path}", *last):
            print(f"[{line}]", file=sys.stderr, flush=True)
    if options.summary is not None:
        document = {**summary.to_json(), "rows_in_file": results.rows, "errors_in_file": dict(sorted(results.errors.items()))}
        try:
            with whole_file(options.summary) as partial:
                partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        except OSError as error:  # an error of the answers must not be hidden by it
            print(f"[the summary {options.summary} cannot be written ({error.strerror or error})]", file=sys.stderr, flush=True)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 2/3")
    return int(index), int(count)


def parser() -> argparse.ArgumentParser:
    """The options of `fastvlm-edge batch`."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge batch",
        description="Ask about every picture of a folder or a data set. Each answer is one line of JSON, added to a file as soon as it is "
        "known. After a stop of any kind, the same command goes on where it stopped. (docs/batch.md)",
    )
    parser.add_argument("model", metavar="MODEL", type=given, help=MODEL_HELP)
    parser.add_argument(
        "input",
        metavar="INPUT",
        type=given,
        help="a folder of pictures; JSON lines or Parquet with id, image and prompt; WebDataset shards, such as 'train-{000..127}.tar'",
    )
    parser.add_argument("-o", "--output", metavar="OUT.jsonl", type=given_path, required=True, help="file to which the answers are added")
    group = parser.add_argument_group("the pictures and questions")
    group.add_argument("--prompt", metavar="TEXT", help="the question about each picture that has none of its own")
    group.add_argument("--images", metavar="DIR", type=given_path, help="folder of the pictures that a file names (default: beside it)")
    group.add_argument(
        "--shard", metavar="I/N", type=_shard, default=(1, 1), help="answer only part I of N, for N machines; the ids decide which rows"
    )
    group.add_argument("--limit", metavar="N", type=positive, help="answer only the first N rows")
    group.add_argument("--retry-errors", action="store_true", help="first remove the rows with errors from the file, to try them again")
    group = parser.add_argument_group("how it works")
    group.add_argument(
        "--slots", metavar="N", type=positive, default=SLOTS, help="answers that are generated at a time (default: %(default)s)"
    )
    group.add_argument("--summary", metavar="FILE.json", type=given_path, help="also write the summary to this file")
    group.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    group = parser.add_argument_group("on several machines (docs/ray.md)")
    group.add_argument(
        "--engine", choices=("here", "ray"), default="here", help="in this process, or on a Ray cluster (default: %(default)s)"
    )
    group.add_argument("--address", metavar="ADDRESS", help="of the Ray cluster (default: RAY_ADDRESS, or a cluster on this machine)")
    group.add_argument("--workers", metavar="N", type=positive, help="models that answer at a time (default: as many as fit)")
    group.add_argument(
        "--gpus-per-worker", metavar="X", type=at_least_zero, help="GPUs of each, such as 0.5 (default: 1 if the cluster has any)"
    )
    group.add_argument("--upload", action="store_true", help="send the pictures to the workers, which otherwise open them by their paths")
    add_reply_options(parser)
    add_loading_options(parser)
    return parser
