"""`fastvlm-edge bench`: how fast model directories are on this machine, and `bench compare`: what changed between two records."""

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
from fastvlm_edge.bench.plot import check_matplotlib, draw
from fastvlm_edge.bench.processes import CHILD, Measurement
from fastvlm_edge.bench.record import check_writable, read_json, read_records, write_json
from fastvlm_edge.bench.table import format_record
from fastvlm_edge.bench.workload import TEXT_TOKENS, Pictures
from fastvlm_edge.commands.arguments import at_least, positive
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.progress import Progress, SilentProgress, stderr_progress


def main(arguments: Sequence[str]) -> int:
    """Measure and print, or compare; after Ctrl-C or an error what there is of it is printed and written."""
    if arguments and arguments[0] == "compare":
        return _compare(arguments[1:])
    options = parser().parse_args(arguments)
    if options.process is not None:
        settings = json.loads(options.process)
        return _be_process(options.models[0], Settings(**settings | {"depths": settings["depths"] and tuple(settings["depths"])}))
    settings = Settings(
        backend=options.backend,
        threads=options.threads,
        runs=options.runs,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        depths=options.depths,
        image=options.image,
    )
    Pictures(None if options.image is None else Path(options.image))  # what can be wrong is told before minutes of work
    if options.eval and options.plot is None:
        raise FastVLMError("--eval is for --plot, which draws accuracy against speed; give --plot PREFIX as well")
    if options.output is not None:
        check_writable(options.output)
    if options.plot is not None:
        check_matplotlib()
        check_writable(options.plot.with_name(f"{options.plot.name}-ttft.png"))
    evaluations = [read_json(path) for path in options.eval]
    work: list[Measurement | dict[str, Any]] = []
    for model in options.models:
        work += read_records(model) if model.is_file() else [Measurement(model, settings, options.processes)]

    progress = stderr_progress() if not options.json or sys.stderr.isatty() else SilentProgress()
    begun: list[Measurement | dict[str, Any]] = []
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
    documents = _documents(begun)
    _tell(documents, options)
    if options.plot is not None:
        for path in draw(options.plot, documents, evaluations):
            print(path, file=sys.stderr)
    return 0


def _measure(measurement: Measurement, begun: list[Measurement | dict[str, Any]], output: Path | None, progress: Progress) -> None:
    """All processes of one model; the record is on disk after each of them."""
    for _ in measurement.run(progress):
        if output is not None:
            write_json(output, _one(_documents(begun)))


def _documents(begun: Sequence[Measurement | dict[str, Any]]) -> list[dict[str, Any]]:
    return [each.document() if isinstance(each, Measurement) else each for each in begun]


def _one(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0] if len(documents) == 1 else {"results": documents}


def _tell(documents: list[dict[str, Any]], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(_one(documents)), flush=True)
    else:
        print("\n\n".join(format_record(document) for document in documents), flush=True)
    _write(documents, options.output)  # last: the disk may be full


def _write(documents: list[dict[str, Any]], output: Path | None) -> None:
    if output is not None:
        write_json(output, _one(documents))


def _be_process(model: Path, settings: Settings) -> int:
    for line in measure(model, settings):
        print(json.dumps(line), flush=True)
    return 0


def _compare(arguments: Sequence[str]) -> int:
    options = compare_parser().parse_args(arguments)
    before, after = (_single(path) for path in (options.before, options.after))
    differs = check_comparable(before, after, across_machines=options.across_machines)
    changes = compare(before, after)
    if not changes:
        raise FastVLMError(f"{options.before} and {options.after} have no figure in common; measure the same things")
    if options.json:
        print(json.dumps({"changes": [dataclasses.asdict(change) for change in changes], "differs": differs, "rule": RULE}))
    else:
        print(format_changes(changes, differs))
    return 0


def _single(path: Path) -> dict[str, Any]:
    records = read_records(path)
    if len(records) != 1:
        raise FastVLMError(f"{path} has the records of {len(records)} models; give a record of one model")
    return records[0]


def compare_parser() -> argparse.ArgumentParser:
    """The arguments of `bench compare`."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge bench compare", description="Say which figures changed between two records by more than the noise of both."
    )
    parser.add_argument("before", metavar="A.json", type=Path, help="a record, written with -o or --json")
    parser.add_argument("after", metavar="B.json", type=Path, help="another one")
    parser.add_argument("--across-machines", action="store_true", help="compare although the machines differ")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge bench",
        description="Measure model directories on this machine (docs/bench.md): first token of new and known pictures, decoding, memory, "
        "energy. `fastvlm-edge bench compare A.json B.json` says what changed between two records.",
    )
    parser.add_argument("models", metavar="MODEL", type=Path, nargs="+", help="model directory to measure, or a record to show and draw")
    group = parser.add_argument_group("what comes out")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    group.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the JSON there too")
    group.add_argument(
        "--plot", metavar="PREFIX", type=Path, help="write PREFIX-ttft, PREFIX-decode and PREFIX-accuracy, each .png and .svg"
    )
    group.add_argument(
        "--eval", metavar="FILE", type=Path, action="append", default=[], help="what eval --json printed, for PREFIX-accuracy"
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument("--processes", metavar="N", type=positive, default=5, help="each loads the model anew; default %(default)s")
    group.add_argument("--runs", metavar="N", type=positive, default=3, help="in each process, after a warm-up; default %(default)s")
    group.add_argument("--image", metavar="FILE", help="the photograph; default one of 512 x 341 that comes with the package")
    group.add_argument("--text-tokens", metavar="N", type=positive, default=TEXT_TOKENS, help="around the picture; default %(default)s")
    group.add_argument("--new-tokens", metavar="N", type=_several, default=NEW_TOKENS, help="of a reply; default %(default)s")
    shown = ",".join(map(str, DEPTHS))
    group.add_argument(
        "--depths", metavar="N,N", type=_depths, help=f"positions of context to decode at; default {shown} as far as they fit"
    )
    group = parser.add_argument_group("how it runs")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="default %(default)s")
    group.add_argument("--threads", metavar="N", type=positive, help="CPU threads; default all that this process may use")
    group.add_argument(CHILD, metavar="JSON", help=argparse.SUPPRESS)
    return parser


def _several(text: str) -> int:
    return at_least(text, 2)


def _depths(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))
