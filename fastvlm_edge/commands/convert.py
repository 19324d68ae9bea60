"""`fastvlm-edge convert`: a checkpoint becomes a model directory. Needs the `convert` extra (PyTorch and onnx)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from fastvlm_edge.commands.arguments import multiple_of_64, positive
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import PRECISIONS, Manifest
from fastvlm_edge.progress import stderr_progress

_EXTRA = ("torch", "onnx", "ml_dtypes", "safetensors", "huggingface_hub")
_GEOMETRIES = ("pad", "crop")


def main(arguments: Sequence[str]) -> int:
    """Convert, and print what was made."""
    options = parser().parse_args(arguments)
    try:
        convert = import_module("fastvlm_edge.convert.pipeline").convert
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        raise FastVLMError(f"converting needs {missing}, which is not installed; run: pip install 'fastvlm-edge[convert]'") from None
    import_module("fastvlm_edge.backends.ort_session").share_arena()  # for the comparison with PyTorch
    calibrator = None
    if options.calib is not None:
        calibration = import_module("fastvlm_edge.calib.quantizer")
        cache = import_module("fastvlm_edge.engines.engine_cache").default_cache() / "calibration"
        calibrator = calibration.Quantizer(
            calibration.Options(options.calib, options.images, options.calib_limit, options.accuracy_drop, cache)
        )
    elif options.accuracy_drop is not None:
        raise FastVLMError("--accuracy-drop needs questions to measure it with; name them with --calib DATA")
    manifest: Manifest = convert(
        options.checkpoint,
        options.output,
        precision=options.precision,
        image_size=options.image_size,
        geometry=options.geometry,
        context=options.context,
        calibrator=calibrator,
        progress=stderr_progress(),
        force=options.force,
    )
    size = sum(record.bytes for record in manifest.files.values()) / 1e6
    print(
        f"{options.output}: {manifest.name}, {manifest.precision}, {manifest.vision.image_size} px ({manifest.vision.tokens} tokens), "
        f"context {manifest.decoder.context}, {size:.1f} MB"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastvlm-edge convert", description="Turn a FastVLM checkpoint into a model directory.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, or a hub id such as apple/FastVLM-0.5B")
    parser.add_argument("-o", "--output", metavar="MODEL", type=Path, required=True, help="model directory to write")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default %(default)s")
    parser.add_argument("--image-size", metavar="PX", type=multiple_of_64, help="256 to 1536 in steps of 64; default as trained")
    parser.add_argument("--geometry", choices=_GEOMETRIES, default="pad", help="how a picture becomes a square; default %(default)s")
    parser.add_argument("--context", metavar="N", type=positive, help="positions of a conversation; default as trained")
    parser.add_argument("--calib", metavar="DATA", help="calibrate int8 and int4: a folder of pictures, or questions as `eval` takes them")
    parser.add_argument("--images", metavar="DIR", type=Path, help="where the pictures of DATA are; default beside it")
    parser.add_argument("--calib-limit", metavar="N", type=positive, default=128, help="examples that calibrate; default %(default)s")
    parser.add_argument("--accuracy-drop", metavar="POINTS", type=float, help="what may be lost, of 100; INT8 as far as that holds")
    parser.add_argument("--force", action="store_true", help="replace MODEL where it exists")
    return parser
