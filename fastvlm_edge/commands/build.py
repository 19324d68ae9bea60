"""`fastvlm-edge build`: build TensorRT engines for a model directory. TensorRT for RTX needs no GPU for this."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastvlm_edge.backends.ort_session import share_arena
from fastvlm_edge.commands.arguments import given_path, positive
from fastvlm_edge.engines.build import LAYERS_NAME, Options, build, read_layers
from fastvlm_edge.engines.layers import count_kinds
from fastvlm_edge.machine.boards.targets import BUILD_NAMES, TARGETS
from fastvlm_edge.machine.cache_dir import cache_dir
from fastvlm_edge.model_dir.engine_record import ENGINES, capability
from fastvlm_edge.progress import stderr_progress


def main(arguments: Sequence[str]) -> int:
    """Build the engines and print a summary."""
    command = parser()
    options = command.parse_args(arguments)
    if options.list_targets:
        print(_table())
        return 0
    if options.model is None:
        command.error("the following arguments are required: MODEL")
    if options.capacities and not options.static:
        command.error("--capacities is for --static")
    if options.static and (options.max_batch > 1 or options.profiles is not None):
        command.error("--static has fixed shapes: it cannot be combined with --max-batch or --profiles")
    settings = Options(
        workspace=options.workspace,
        weakly_typed=options.weakly_typed,
        max_batch=options.max_batch,
        static=options.static,
        capacities=options.capacities,
        separate_profiles=None if options.profiles is None else options.profiles == 2,
        report=options.report,
        verify=not options.no_verify,
        onnxruntime=options.reference == "ort",
        check_memory=not options.no_memory_check,
        force=options.force,
        cache=None if options.no_cache else cache_dir(),
    )
    share_arena()  # for a comparison with onnxruntime
    record = build(options.model, options.target, settings, progress=stderr_progress())
    folder = options.model / ENGINES / record.target
    if options.report:
        for part, layers in read_layers(folder).items():
            print(f"{part}.engine: {len(layers)} layers")
            for kind, types, count in count_kinds(layers):
                print(f"  {count:5}  {kind:16} {types}")
    for part, figures in record.build.items():
        preferred = f"{part.partition('.')[0]}.onnx"
        if isinstance(figures, dict) and figures.get("graph", preferred) != preferred:
            reason = figures.get("refused", "this version of TensorRT refused the preferred graph")
            print(f"{part}.engine was built from {figures['graph']}: {reason}")
    size = sum(entry.bytes for entry in record.files.values()) / 1e6
    gpus = ", ".join(capability(numbers) for numbers in record.compute_capabilities)
    state = "verified" if record.verified else "not yet verified"
    print(f"{folder}: {record.library} {record.version}, compute capability {gpus}, {size:.1f} MB, {state}")
    return 0


def _table() -> str:
    rows = [("target", "compute capability", "precisions", "memory", "TensorRT", "for")]
    for target in map(TARGETS.__getitem__, BUILD_NAMES):
        gpus = ", ".join(capability(numbers) for numbers in target.compute_capabilities)
        memory = "the card's" if target.memory is None else f"{target.memory >> 30} GiB"
        rows.append((target.name, gpus, " ".join(target.precisions), memory, target.versions, target.title))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastvlm-edge build", description="Build TensorRT engines for a model directory.")
    parser.add_argument("model", metavar="MODEL", type=given_path, nargs="?", help="model directory that fastvlm-edge convert wrote")
    parser.add_argument(
        "--target",
        metavar="NAME",
        default="auto",
        help="see --list-targets; auto, the default, is the GPU of this machine",
    )
    parser.add_argument("--list-targets", action="store_true", help="print the table of targets and exit")
    parser.add_argument("--force", action="store_true", help="rebuild even if up to date")
    parser.add_argument("--report", action="store_true", help=f"write all layers of the engines to {LAYERS_NAME} and print a summary")
    parser.add_argument(
        "--workspace",
        metavar="MIB",
        type=_mebibytes,
        help="scratch memory that a kernel may use, in MiB (default: 1024 on a Jetson, else all)",
    )
    parser.add_argument(
        "--profiles", type=int, choices=(1, 2), help="use one profile for prefill and decoding, or two (default: whichever is best)"
    )
    parser.add_argument(
        "--max-batch", metavar="N", type=positive, default=1, help="most conversations that one call decodes (default: 1, as `run` needs)"
    )
    parser.add_argument("--static", action="store_true", help="decoder engines of fixed shapes, for TensorRT with faults in dynamic ones")
    parser.add_argument(
        "--capacities",
        metavar="N,N",
        type=_sizes,
        default=(),
        help="KV cache capacities of --static, in positions (default: 1024; the whole context is always one)",
    )
    parser.add_argument("--weakly-typed", action="store_true", help="for TensorRT 10.3 if strong typing fails (docs/tensorrt-10.3.md)")
    parser.add_argument("--no-verify", action="store_true", help="verify the engines at the first load, not now")
    parser.add_argument(
        "--reference",
        choices=("stored", "ort"),
        default="stored",
        help="what the engines are compared with: the answers in the model directory (default), or onnxruntime, which needs more memory",
    )
    parser.add_argument("--no-memory-check", action="store_true", help="build even if there may be too little memory")
    parser.add_argument("--no-cache", action="store_true", help="do not use or write the cache of engines and timings")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _mebibytes(text: str) -> int:
    return positive(text) << 20
