"""`fastvlm-edge bench`: measure model directories on this machine. `bench compare`: which figures changed between two records."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvlm_edge.backends.select import BACKENDS
from fastvlm_edge.bench.compare import RULE, check_comparable, compare, format_changes
from fastvlm_edge.bench.measure import DEPTHS, NEW_TOKENS, Settings, measure
from fastvlm_edge.bench.plot import check_matplotlib, draw, plot_files
from fastvlm_edge.bench.processes import CHILD, Measurement
from fastvlm_edge.bench.record import check_writable, read_json, read_records, write_json
from fastvlm_edge.bench.table import format_record
from fastvlm_edge.bench.workload import TEXT_TOKENS, Pictures
from fastvlm_edge.commands.arguments import at_least, given_path, positive
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.progress import Progress, SilentProgress, stderr_progress

Work = Measurement | dict[str, Any]
"""What one MODEL of the command line stands for: a model to measure, or a record that was read."""


def main(arguments: Sequence[str]) -> int:
    """Measure and print, or compare two records."""
    if arguments and arguments[0] == "compare":
        return _compare(arguments[1:])
    options = parser().parse_args(arguments)
    if options.process is not None:
        return _be_process(options.models[0], json.loads(options.process))
    evaluations = _check(options)
    documents = _measure_all(_work(options), options)
    _tell(documents, options, evaluations)
    return 0


def _check(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Raise FastVLMError for options that cannot work, before minutes are spent on measurements. Returns the files of `--eval`."""
    Pictures(None if options.image is None else Path(options.image))
    if options.eval and options.plot is None:
        raise FastVLMError("--eval is for --plot, which draws accuracy against speed", "add --plot PREFIX")
    if options.output is not None:
        check_writable(options.output)
    if options.plot is not None:
        check_matplotlib()
        for path in plot_files(options.plot):
            check_writable(path)
    return [read_json(path) for path in options.eval]


def _work(options: argparse.Namespace) -> list[Work]:
    settings = Settings(
        backend=options.backend,
        threads=options.threads,
        runs=options.runs,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        depths=options.depths,
        image=options.image,
        image_size=options.image_size,
        slots=tuple(sorted(set(options.slots))),
    )
    work: list[Work] = []
    for model in options.models:
        work += read_records(model) if model.is_file() else [Measurement(model, settings, options.processes)]
    return work


def _measure_all(work: Sequence[Work], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one model after another. After Ctrl-C or an error, what was measured so far is still printed and written."""
    progress = stderr_progress() if not options.json or sys.stderr.isatty() else SilentProgress()
    begun: list[Work] = []
    try:
        for each in work:
            begun.append(each)
            if isinstance(each, Measurement):
                _measure(each, begun, options.output, progress)
    except (KeyboardInterrupt, FastVLMError) as error:
        progress.done()
        documents = [document for document in _documents(begun) if "load_ms" in document]
        if documents and options.json and isinstance(error, FastVLMError):
            error.partial = _one(documents)  # printed with the error, as one object
            with suppress(FastVLMError):  # the first error is the one to report
                _write(documents, options.output)
        elif documents:
            _tell(documents, options)
        raise
    return _documents(begun)


def _measure(measurement: Measurement, begun: list[Work], output: Path | None, progress: Progress) -> None:
    """Run all processes of one model. The record is written to disk after each of them."""
    for _ in measurement.run(progress):
        if output is not None:
            write_json(output, _one(_documents(begun)))


def _documents(begun: Sequence[Work]) -> list[dict[str, Any]]:
    return [each.document() if isinstance(each, Measurement) else each for each in begun]


def _one(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0] if len(documents) == 1 else {"results": documents}


def _tell(documents: list[dict[str, Any]], options: argparse.Namespace, evaluations: list[dict[str, Any]] | None = None) -> None:
    """Print and write the records, and draw them if `evaluations` is given.

    A table is printed first, because the disk may be full. With `--json` the object is printed last, so that no error object can follow it.
    """
    if not options.json:
        print("\n\n".join(format_record(document) for document in documents), flush=True)
    try:
        _write(documents, options.output)
        if options.plot is not None and evaluations is not None:
            for path in draw(options.plot, documents, evaluations):
                print(path, file=sys.stderr)
    except FastVLMError as error:
        error.partial = _one(documents)
        raise
    except KeyboardInterrupt:
        if options.json:
            print(json.dumps(_one(documents)), flush=True)
        raise
    if options.json:
        print(json.dumps(_one(documents)), flush=True)


def _write(documents: list[dict[str, Any]], output: Path | None) -> None:
    if output is not None:
        write_json(output, _one(documents))


def _be_process(model: Path, settings: dict[str, Any]) -> int:
    """Be one process of a measurement: print every figure as a line of JSON. The command line prints an error as JSON too (`--json`)."""
    depths, slots = settings["depths"] and tuple(settings["depths"]), tuple(settings["slots"])  # JSON has no tuples
    for line in measure(model, Settings(**{**settings, "depths": depths, "slots": slots})):
        print(json.dumps(line), flush=True)
    return 0


def _compare(arguments: Sequence[str]) -> int:
    options = compare_parser().parse_args(arguments)
    before, after = (_single(path) for path in (options.before, options.after))
    differs = check_comparable(before, after, across_machines=options.across_machines)
    changes = compare(before, after)
    if not changes:
        raise FastVLMError(f"{options.before} and {options.after} have no figure in common", "measure both with the same options")
    if options.json:
        print(json.dumps({"changes": [dataclasses.asdict(change) for change in changes], "differs": differs, "rule": RULE}))
    else:
        print(format_changes(changes, differs))
    return 0


def _single(path: Path) -> dict[str, Any]:
    records = read_records(path)
    if len(records) != 1:
        raise FastVLMError(f"{path} has records of {len(records)} models", "give a record of one model")
    return records[0]


def compare_parser() -> argparse.ArgumentParser:
    """The arguments of `bench compare`."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge bench compare", description="Say which figures changed between two records by more than the noise."
    )
    parser.add_argument("before", metavar="A.json", type=given_path, help="a record, written with -o or --json")
    parser.add_argument("after", metavar="B.json", type=given_path, help="another record")
    parser.add_argument("--across-machines", action="store_true", help="compare even if the machines differ")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge bench",
        description="Measure model directories on this machine (docs/bench.md): time to first token for new and known pictures, decoding, "
        "memory and energy. `fastvlm-edge bench compare A.json B.json` says what changed between two records.",
    )
    parser.add_argument(
        "models", metavar="MODEL", type=given_path, nargs="+", help="model directory to measure, or record to print and draw"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    group.add_argument("-o", "--output", metavar="FILE", type=given_path, help="also write the JSON to FILE")
    group.add_argument(
        "--plot",
        metavar="PREFIX",
        type=given_path,
        help="write PREFIX-ttft, -decode, -slots and -accuracy, each .png and .svg",
    )
    group.add_argument(
        "--eval", metavar="FILE", type=given_path, action="append", default=[], help="output of eval --json, for PREFIX-accuracy"
    )
    group = parser.add_argument_group("measurement")
    group.add_argument("--processes", metavar="N", type=positive, default=5, help="each process reloads the model (default: %(default)s)")
    group.add_argument("--runs", metavar="N", type=positive, default=3, help="runs per process, after a warm-up (default: %(default)s)")
    group.add_argument("--image", metavar="FILE", help="photograph (default: one of 512 x 341 pixels)")
    group.add_argument("--image-size", metavar="PX", type=positive, help="one of the sizes of the model (default: the first of them)")
    group.add_argument(
        "--text-tokens", metavar="N", type=positive, default=TEXT_TOKENS, help="text tokens of the prompt (default: %(default)s)"
    )
    group.add_argument("--new-tokens", metavar="N", type=_several, default=NEW_TOKENS, help="tokens of each reply (default: %(default)s)")
    shown = ",".join(map(str, DEPTHS))
    group.add_argument(
        "--depths",
        metavar="N,N",
        type=_numbers,
        help=f"positions at which to measure decoding (default: {shown}, as far as they fit)",
    )
    group.add_argument(
        "--slots", metavar="N,N", type=_numbers, default=(), help="also measure with so many conversations at once, such as 1,2,4,8"
    )
    group = parser.add_argument_group("execution")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="backend to use (default: %(default)s)")
    group.add_argument("--threads", metavar="N", type=positive, help="CPU threads (default: all cores that this process may use)")
    group.add_argument(CHILD, metavar="JSON", help=argparse.SUPPRESS)
    return parser


def _several(text: str) -> int:
    return at_least(text, 2)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))
