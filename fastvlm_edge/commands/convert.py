"""`fastvlm-edge convert`: turns a checkpoint into a model directory. Needs the `convert` extra (PyTorch and onnx)."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from fastvlm_edge.commands.arguments import given, given_path, image_sizes, positive
from fastvlm_edge.doctor.facts import has_gpu
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.cache_dir import cache_dir
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.model_dir.limits import SIZES_IN_WORDS
from fastvlm_edge.model_dir.manifest import PRECISIONS, Manifest
from fastvlm_edge.progress import stderr_progress

OUTPUT_HELP = "model directory to write"


def main(arguments: Sequence[str]) -> int:
    """Convert, and print one line about the model directory, then the commands to type next."""
    return convert_as_asked(parser().parse_args(arguments))


def convert_as_asked(options: argparse.Namespace) -> int:
    """What the command does with its options, which `optimum-cli export fastvlm` has too. Returns the exit status."""
    if options.accuracy_drop is not None and options.calib is None:
        raise FastVLMError("--accuracy-drop needs questions to measure the accuracy", "add --calib DATA")
    if options.special_tokens and options.calib is None:
        raise FastVLMError("--special-tokens is for the questions of --calib", "add --calib DATA, or leave it out")
    convert = import_module("fastvlm_edge.convert.pipeline").convert
    import_module("fastvlm_edge.backends.ort_session").share_arena()  # for the comparison with PyTorch
    calibrate = None
    if options.calib is not None:
        quantizer = import_module("fastvlm_edge.calib.quantizer")
        cache = cache_dir() / "calibration"
        settings = quantizer.Options(
            options.calib, options.images, options.calib_limit, options.accuracy_drop, cache, options.special_tokens
        )
        calibrate = quantizer.Quantizer(settings).calibrate
    manifest: Manifest = convert(
        options.checkpoint,
        options.output,
        precision=options.precision,
        image_size=options.image_size,
        geometry=options.geometry,
        context=options.context,
        name=options.name,
        adapter=options.adapter,
        calibrate=calibrate,
        progress=stderr_progress(),
        force=options.force,
    )
    size = sum(record.bytes for record in manifest.files.values()) / 1e6
    vision = manifest.vision
    others = "".join(f"{each} px ({vision.at(each).tokens} tokens), " for each in vision.other_sizes)
    print(
        f"{options.output}: {manifest.name}, {manifest.precision}, {vision.image_size} px ({vision.tokens} tokens, {vision.geometry}), "
        f"{others}context {manifest.decoder.context}, {size:.1f} MB"
    )
    for note in manifest.notes:
        print(f"note: {note}", file=sys.stderr)
    print("next: " + "\nthen: ".join(next_commands(options.output, gpu=has_gpu(Probe()))))
    return 0


def next_commands(model: Path, *, gpu: bool) -> list[str]:
    """The commands that lead from the model directory to the first answer, for a shell; PICTURE stands for a file."""
    program, place = toolkit_command(), shlex.quote(str(model))
    ask = f'{program} run {place} --image PICTURE "What is in this picture?"'
    return [f"{program} build {place}", ask] if gpu else [ask]


def toolkit_command() -> str:
    """How the user started the toolkit, for a shell: the script (by its name if PATH leads to it), or `python -m fastvlm_edge`."""
    started = Path(sys.argv[0])
    if (started.parent.name, started.name) == ("fastvlm_edge", "__main__.py"):
        return f"{_word(sys.executable)} -m fastvlm_edge"
    return _word(sys.argv[0]) if started.name == "fastvlm-edge" else "fastvlm-edge"


def _word(program: str) -> str:
    name = Path(program).name
    return name if shutil.which(name) == program else shlex.quote(program)


def parser() -> argparse.ArgumentParser:
    """The options of the command. Works without the packages of the `convert` extra."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge convert",
        description="Turn a FastVLM checkpoint into a model directory. The new graphs are compared with PyTorch before it is written.",
    )
    add_checkpoint(parser)
    parser.add_argument("-o", "--output", metavar="MODEL", type=given_path, required=True, help=OUTPUT_HELP)
    add_options(parser)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The first argument."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=given, help="checkpoint directory, or a hub id such as apple/FastVLM-0.5B")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything but the two places."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="types of weights and activations (default: int8, and fp16, bf16 or fp32 if the comparison with PyTorch refuses it)",
    )
    parser.add_argument(
        "--image-size",
        metavar="PX[,PX]",
        type=image_sizes,
        help=f"{SIZES_IN_WORDS} (default: the size the model was trained at); of several sizes, the first is the default one",
    )
    parser.add_argument("--geometry", choices=("pad", "crop"), help="how a picture is made square (default: as the checkpoint says)")
    parser.add_argument(
        "--context", metavar="N", type=positive, help="longest conversation in tokens, pictures included (default: 4096, or as trained)"
    )
    parser.add_argument("--name", metavar="NAME", help="what the model is called (default: its hub repository or directory)")
    parser.add_argument(
        "--adapter",
        metavar="ADAPTER",
        type=given,
        help="directory or hub id of a fine-tune of CHECKPOINT: a LoRA of PEFT, with LLaVA's non_lora_trainables.bin if there is one",
    )
    parser.add_argument(
        "--calib",
        metavar="DATA",
        type=given,
        help="calibrate int8 (the default here, too) or int4 with DATA: a folder of pictures, or a file of questions as for `eval`",
    )
    parser.add_argument("--images", metavar="DIR", type=given_path, help="folder of the pictures of DATA (default: beside DATA)")
    parser.add_argument(
        "--calib-limit", metavar="N", type=positive, default=128, help="number of calibration examples (default: %(default)s)"
    )
    parser.add_argument(
        "--accuracy-drop",
        metavar="POINTS",
        type=float,
        help="largest accepted accuracy loss, in percentage points; the encoder uses INT8 as far as this allows",
    )
    parser.add_argument(
        "--special-tokens", action="store_true", help="read special tokens in DATA as tokens, as `eval` does with this option"
    )
    parser.add_argument("--force", action="store_true", help="replace MODEL if it exists")
