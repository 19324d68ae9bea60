"""checkpoint -> model directory: the whole conversion, written beside its final name, checked, and only then put in place."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from fastvlm_edge.backends.verification import stored_pictures
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.checkpoint.text import TextAssets, read_text
from fastvlm_edge.convert.cpu_int8 import TRIES, Float32, choose_blocks, watch_blocks
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.decoder import CANDIDATES, build_decoder
from fastvlm_edge.convert.graphs.vision import build_vision
from fastvlm_edge.convert.parity import check_parity, converse, encode, files_under_way, probe_activations, repeat
from fastvlm_edge.convert.precision import FLOAT_TYPES, NUMPY_NAMES, PrecisionPlan, WeightType, fit, on_cpu, precision_plan
from fastvlm_edge.convert.reference.fastvithd import FastViTHD
from fastvlm_edge.convert.reference.quantized_decoder import QuantizedDecoder, StoredMatrices
from fastvlm_edge.convert.weights.decoder import write_decoder_weights
from fastvlm_edge.convert.weights.vision import write_vision_weights
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.atomic import written_beside
from fastvlm_edge.model_dir.manifest import MANIFEST_NAME, STRIDE, DecoderSpec, FileRecord, Manifest, Source, TextSpec, VisionSpec, sha256
from fastvlm_edge.progress import Progress, SilentProgress
from fastvlm_edge.version import __version__

IMAGE_SIZES = range(256, 1536 + 1, STRIDE)
DEFAULT_CONTEXT = 4096
MIN_ANSWER = 64
"""Positions that a context must leave beside the picture."""


class Calibrated(Protocol):
    """What calibration found, such as `calib.quantizer.Calibrated`."""

    vision: Any
    """`calib.encoder.search.VisionQuantization`"""
    decoder: Any
    """`convert.decoder_weights.QuantizedMatrices`"""

    def write_report(self, directory: Path, manifest: Manifest) -> None:
        """Write what was decided and why into the finished model directory."""

    def close(self) -> None:
        """Give temporary files back."""


class Calibrator(Protocol):
    """Chooses integers for a plan from data, such as `calib.quantizer.Quantizer`: the conversion calls it, and knows nothing of how."""

    def calibrate(
        self,
        source: Checkpoint,
        encoder: FastViTHD,
        projector: nn.Sequential,
        plan: PrecisionPlan,
        manifest: Manifest,
        tokenizer: TextTokenizer,
        folder: Path,
        progress: Progress,
    ) -> Calibrated:
        """Quantise for `plan`; temporary files go into `folder`."""


def convert(
    checkpoint: str,
    output: Path,
    *,
    precision: str = "fp32",
    image_size: int | None = None,
    geometry: str = "pad",
    context: int | None = None,
    calibrator: Calibrator | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Manifest:
    """Convert a checkpoint (a folder or a hub id) into the model directory `output`.

    `image_size` in pixels is the checkpoint's own unless given; `context` in positions is 4096, or what the LLM was trained for if less.
    `calibrator` chooses the integers of `int8` and `int4`, which are rounded to nearest without one. `output` must not exist, unless
    `force` replaces a model directory. Nothing is left behind when anything fails.
    Raises FastVLMError for everything a user can mend.
    """
    progress = progress or SilentProgress()
    plan = precision_plan(precision)
    if calibrator is not None and not plan.body.bits:
        raise FastVLMError(f"--precision {precision} has no integers to calibrate; choose int8 or int4, or leave --calib out")
    if geometry not in ("pad", "crop"):
        raise FastVLMError(f"unknown geometry {geometry!r}; choose pad or crop")
    output = Path(os.path.realpath(output))
    _check_output(output, force)
    progress.stage("open")
    source = open_checkpoint(checkpoint)
    image_size = _image_size(source, image_size)
    context = _context(source, context, (image_size // STRIDE) ** 2)
    text = read_text(source)
    _check_space(source, plan, output.parent)
    with written_beside(output, replace=force, elsewhere="choose another place for the model directory") as directory:
        hashing = _Hashing(source)
        try:
            manifest = _write(source, text, plan, image_size, geometry, context, calibrator, directory, progress)
            progress.stage("hash")
            files = {
                path.name: FileRecord(sha256(path), path.stat().st_size)
                for path in sorted(directory.iterdir())
                if path.name != MANIFEST_NAME
            }
            manifest = replace(manifest, files=files, source=replace(manifest.source, files=hashing.result()))
        finally:
            hashing.stop()
        manifest.write(directory)
    progress.done()
    return manifest


def _write(
    source: Checkpoint,
    text: TextAssets,
    plan: PrecisionPlan,
    image_size: int,
    geometry: str,
    context: int,
    calibrator: Calibrator | None,
    directory: Path,
    progress: Progress,
) -> Manifest:
    """Write graphs, weights and tokenizer into `directory`, check them, and return the manifest, still without hashes."""
    shape, encoder_shape, hidden = source.text, source.vision, source.text.hidden
    tokens = (image_size // STRIDE) ** 2
    candidates = min(CANDIDATES, shape.vocab)
    manifest = Manifest(
        name=source.name,
        toolkit_version=__version__,
        source=Source(source.location, source.layout, {}),
        precision=plan.name,
        plan={},
        vision=VisionSpec(
            image_size,
            geometry,
            tokens,
            hidden,
            dims=list(encoder_shape.dims),
            depths=list(encoder_shape.depths),
            out_dim=encoder_shape.out_dim,
            se_dim=encoder_shape.se_dim,
        ),
        decoder=DecoderSpec(
            shape.layers,
            shape.kv_heads,
            shape.head_dim,
            hidden,
            shape.vocab,
            context,
            candidates,
            dtype="",
            heads=shape.heads,
            intermediate=shape.intermediate,
        ),
        text=TextSpec(text.system_prompt, text.stop_ids, text.token_count),
        files={},
    )
    text.write_tokenizer(directory / "tokenizer.json")

    # PyTorch speaks first: what it computes is what the graphs are checked with, and how large it gets decides on their types.
    progress.stage("probe vision")
    encoder, projector = load_vision(source), load_projector(source)
    pictures = stored_pictures(image_size, geometry)
    with watch_blocks(encoder) as noises:
        largest, features = probe_activations(encoder, projector, pictures)
    progress.stage("probe decoder", shape.layers)
    tokenizer = TextTokenizer(directory / "tokenizer.json")
    conversation = converse(tokenizer, manifest, source, features[0][0], progress.advance)
    plan = fit(plan, largest, conversation.magnitudes.largest())
    decoder = replace(manifest.decoder, dtype=NUMPY_NAMES[plan.decoder])
    activations = {"pictures": len(pictures), "largest": largest, "decoder": asdict(conversation.magnitudes)}
    manifest = replace(manifest, plan=plan.describe(), decoder=decoder, activations=activations)

    with ExitStack() as cleanup:
        calibrated = None
        if calibrator is not None:
            calibrated = calibrator.calibrate(source, encoder, projector, plan, manifest, tokenizer, directory, progress)
            cleanup.callback(calibrated.close)
        progress.stage("vision", len(plan.vision))
        with _weights(directory / "vision.weights") as vision_weights:
            write_vision_weights(encoder, projector, plan, vision_weights, progress.advance, calibrated.vision if calibrated else None)
        scales = calibrated.vision.activation_scales if calibrated else {}
        for name, graph_plan, cpu in _graphs("vision", plan):
            graph = GraphBuilder("vision", vision_weights)
            build_vision(graph, source.vision, hidden, image_size, graph_plan, None if cpu else scales)
            graph.save(directory / name)
        del encoder, projector
        progress.stage("decoder", shape.layers + 2)
        with _weights(directory / "decoder.weights") as weights:
            write_decoder_weights(source, plan, weights, progress.advance, calibrated.decoder if calibrated else None)
        for name, graph_plan, cpu in _graphs("decoder", plan):
            graph = GraphBuilder("decoder", weights)
            build_decoder(graph, shape, graph_plan, cpu_context=context if cpu else None)
            graph.save(directory / name)
        stored = None
        if plan.body.bits:
            progress.stage("probe stored decoder", shape.layers)
            integers = QuantizedDecoder(source, StoredMatrices(weights), embedding=bool(plan.embedding.bits))
            stored = repeat(conversation, integers, progress.advance)

        if plan.vision_weights.bits:
            progress.stage("INT8 on a CPU", TRIES + 1)
            allowed = [noise for noise in noises if not calibrated or scales.keys() >= set(noise.layers)]

            def write(layers: frozenset[str]) -> None:
                graph = GraphBuilder("vision", vision_weights)
                build_vision(graph, source.vision, hidden, image_size, on_cpu(plan), integer_inputs=layers)
                graph.save(directory / "vision.cpu.onnx")

            def run(layers: frozenset[str]) -> list[Float32]:
                write(layers)
                progress.advance()
                return encode(directory, manifest, pictures)

            chosen = choose_blocks(allowed, run)
            write(chosen.layers)
            progress.note(
                f"on a CPU {chosen.blocks} of {len(noises)} blocks of the encoder compute in INT8 (features lose {chosen.loss:.1e})"
            )
            manifest = replace(manifest, activations={**activations, "int8_on_cpu": chosen.describe()})

        progress.stage("verify", len(pictures) + 1)
        manifest = replace(manifest, files=files_under_way(directory))
        figures = check_parity(
            directory, manifest, pictures, features, conversation, progress.advance, stored=stored, activations=calibrated is not None
        )
        manifest = replace(manifest, parity=figures)
        if stored is not None:
            progress.note(_cost_of_integers(figures, advise=calibrated is None))
        if calibrated is not None:
            calibrated.write_report(directory, manifest)
    return manifest


def _cost_of_integers(figures: dict[str, Any], *, advise: bool) -> str:
    """What the rounding of the decoder's weights did to the stored conversation; a user sees it before the first odd answer."""
    logits = figures["logits"]
    text = (
        f"logits keep a cosine of {logits['cosine']:.4f} to the checkpoint's, {logits['greedy_agreement']:.0%} of greedy tokens are equal"
    )
    return f"{text}; --calib would keep more" if advise else text


def _graphs(part: str, plan: PrecisionPlan) -> Iterator[tuple[str, PrecisionPlan, bool]]:
    """File, plan and whether it is for the CPU: one for every backend, and another where onnxruntime's CPU provider needs its own."""
    yield f"{part}.onnx", plan, False
    if on_cpu(plan) != plan or (part == "decoder" and plan.decoder == "fp32"):
        yield f"{part}.cpu.onnx", on_cpu(plan), True


@contextmanager
def _weights(path: Path) -> Iterator[WeightsFile]:
    weights = WeightsFile(path)
    try:
        yield weights
    finally:
        weights.close()


# What was asked for -------------------------------------------------------------------------------------------------------------


def _image_size(source: Checkpoint, asked: int | None) -> int:
    size = asked or source.image_size
    if size != source.image_size and size not in IMAGE_SIZES:
        raise FastVLMError(
            f"image size {size} is not supported; choose 256 to 1536 in steps of 64 ({source.name} was trained at {source.image_size})"
        )
    return size


def _context(source: Checkpoint, asked: int | None, tokens: int) -> int:
    limit = source.text.max_positions
    context = min(DEFAULT_CONTEXT, limit) if asked is None else asked
    if context > limit:
        raise FastVLMError(f"a context of {context} is more than the {limit} positions that {source.name} was trained for; lower --context")
    if context < tokens + MIN_ANSWER:
        raise FastVLMError(
            f"a context of {context} is too small for a picture of {tokens} tokens and a conversation; "
            f"give at least {tokens + MIN_ANSWER}, or a smaller --image-size"
        )
    return context


def _check_output(output: Path, force: bool) -> None:
    """Refuse what cannot become a model directory, before any work."""
    if os.path.ismount(output):
        raise FastVLMError(f"{output} is a mount point, which no folder can be renamed to; name a folder in it: {output / 'model'}")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        if not (output.is_dir() and (output / MANIFEST_NAME).is_file()):
            raise FastVLMError(f"{output} exists and is no model directory; choose another name")
        if not force:
            raise FastVLMError(f"{output} exists; add --force to replace it, or choose another name")
    if output.parent.exists() and not os.access(output.parent, os.W_OK):
        raise FastVLMError(f"{output.parent} is not writable; choose another place for the model directory")


def _check_space(source: Checkpoint, plan: PrecisionPlan, folder: Path) -> None:
    """Compare what will be written with what is free, before any work."""
    needed = estimated_bytes(source, plan)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FastVLMError(
            f"the model directory needs about {needed / 1e6:,.0f} MB, and {folder} has {free / 1e6:,.0f} MB free; make room there"
        )


def estimated_bytes(source: Checkpoint, plan: PrecisionPlan) -> int:
    """Size of the weights that the plan makes of a checkpoint, without padding to pages."""
    total = 0.0
    for name in source.names():
        count = float(np.prod(source.shape(name), dtype=np.float64))
        if name.startswith(("vision.", "projector.")):
            total += count * _bytes_each(plan.vision_weights, plan.vision[_vision_stage(name)])
        elif name == "llm.embed_tokens.weight":
            total += count * _bytes_each(plan.embedding, plan.decoder)
            if source.text.tied and plan.head.bits:
                total += count * _bytes_each(plan.head, plan.decoder)
        else:
            total += count * _bytes_each(plan.head if name == "lm_head.weight" else plan.body, plan.decoder)
    return int(total)


def _vision_stage(name: str) -> str:
    part, _, rest = name.removeprefix("vision.").partition(".")
    return f"stage{int(rest[0]) + 1}" if part == "stages" else part


def _bytes_each(weights: WeightType, kind: str) -> float:
    if not weights.bits:
        return np.dtype(FLOAT_TYPES[kind]).itemsize
    return weights.bits / 8 + (np.dtype(FLOAT_TYPES[kind]).itemsize / weights.block if weights.block else 0)


# Hashes -------------------------------------------------------------------------------------------------------------------------


class _Hashing:
    """Hashes the checkpoint's files in the background: reading 15 GB takes a while."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._hashes: dict[str, str] = {}
        self._error: Exception | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._hashes = self._source.hash_files(self._watch)
        except Exception as error:
            self._error = error

    def _watch(self, _done: int, _total: int) -> None:
        if self._stopped:
            raise InterruptedError

    def result(self) -> dict[str, str]:
        self._thread.join()
        if self._error:
            raise self._error
        return self._hashes

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()
