"""checkpoint -> model directory: the whole conversion. It is written beside its final name, checked, and only then put in place.

open      read headers and json, check the request
probe     run PyTorch on stored pictures and a stored conversation: the reference, and the largest activations
calibrate optional: choose integers from data instead of rounding to nearest
write     weights and graphs of the encoder, then of the decoder
verify    run the graphs in onnxruntime and compare them with the reference
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from fastvlm_edge.backends.verification.conversation import PICTURES, stored_passage, stored_pictures
from fastvlm_edge.backends.verification.reference import Reference as StoredRows
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, load_projector, load_vision, open_checkpoint
from fastvlm_edge.convert.checkpoint.hashes import BackgroundHashes
from fastvlm_edge.convert.checkpoint.model_name import check_name
from fastvlm_edge.convert.checkpoint.text import TextAssets, read_text
from fastvlm_edge.convert.conversion import Calibrate, Calibration, Conversion
from fastvlm_edge.convert.cpu_int8 import TRIES, Noise, choose_blocks, watch_blocks
from fastvlm_edge.convert.fastvithd import FastViTHD
from fastvlm_edge.convert.fine_inputs import UNUSUAL, NoiseWatch, Trial, choose_fine_inputs
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.decoder import CANDIDATES, Provider, build_decoder, has_cuda_graph
from fastvlm_edge.convert.graphs.vision import build_vision
from fastvlm_edge.convert.parity import (
    CPU_AIM,
    Conversation,
    RowErrors,
    Stored,
    answer_passage,
    check_parity,
    check_rows,
    converse,
    encode,
    errors_of_narrow_type,
    files_under_way,
    probe_activations,
    run_passage,
)
from fastvlm_edge.convert.precision import NUMPY_NAMES, Magnitudes, PrecisionPlan, PrecisionRefused, fit, on_cpu, precision_plan
from fastvlm_edge.convert.reference.decoder import Watch
from fastvlm_edge.convert.reference.quantized_decoder import QuantizedDecoder, StoredMatrices
from fastvlm_edge.convert.request import GEOMETRIES, check_output, check_space, choose_context, choose_image_sizes
from fastvlm_edge.convert.rescaling import ChannelWatch, find_moves, move_in_encoder, watch_encoder
from fastvlm_edge.convert.weights.decoder import write_decoder_weights
from fastvlm_edge.convert.weights.vision import write_vision_weights
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.atomic import written_beside
from fastvlm_edge.model_dir.engine_record import VISION_GRAPHS
from fastvlm_edge.model_dir.manifest import (
    MANIFEST_NAME,
    DecoderSpec,
    FileRecord,
    Manifest,
    Source,
    TextSpec,
    VisionSpec,
    sha256,
    visual_tokens,
)
from fastvlm_edge.model_dir.verified import remember
from fastvlm_edge.progress import Progress, SilentProgress
from fastvlm_edge.version import __version__

Float32 = npt.NDArray[np.float32]

DEFAULT_PRECISIONS = ("int8", "fp16", "bf16", "fp32")
"""If no precision is named: the first of these that the checks of the conversion accept. Why in this order: docs/precision.md."""


@dataclass(frozen=True)
class Reference:
    """What PyTorch computes with the checkpoint's own weights in FP32: the graphs are compared with it."""

    features: list[Float32]
    """Image features [1, tokens, hidden] of every picture of the conversion."""
    conversation: Conversation
    noises: list[Noise]
    """How coarse INT8 inputs would be, for every branch of the encoder's blocks."""


def convert(
    checkpoint: str,
    output: Path,
    *,
    precision: str | None = None,
    image_size: int | str | Sequence[int] | None = None,
    geometry: str | None = None,
    context: int | None = None,
    name: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    calibrate: Calibrate | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Manifest:
    """Convert a checkpoint (a directory or a hub id) into the model directory `output`, and return its manifest.

    `image_size` in pixels and `geometry` default to the checkpoint's own. Of several sizes (a list, or "1024,512") the first is the
    default one; the encoder then takes pictures of each. `context` in positions defaults to 4096 or to what the LLM was trained for if that
    is less, and `name` to that of the hub repository or directory (`checkpoint.model_name`). `revision` is a branch, tag or commit of the
    hub repository. `adapter`, another directory or hub id, is a fine-tune of the checkpoint, which is merged into it first
    (`checkpoint.adapter`). `calibrate`, such as `calib.quantizer.Quantizer(...).calibrate`, chooses the integers of `int8` and `int4`;
    without it they are rounded to nearest. `output` must not exist, unless `force` replaces a model directory. If anything fails, nothing
    is left behind.

    `precision` None tries DEFAULT_PRECISIONS in turn; the notes of the manifest say which were refused and why. With `calibrate` it means
    `int8` alone. Raises PrecisionRefused if the model cannot be held in the precision, or in any that was tried, and FastVLMError for
    everything else that a user can correct.
    """
    progress = progress or SilentProgress()
    by_default = DEFAULT_PRECISIONS if calibrate is None else DEFAULT_PRECISIONS[:1]
    plans = [precision_plan(name) for name in (by_default if precision is None else [precision])]
    if calibrate is not None and not plans[0].body.bits:
        raise FastVLMError(f"--precision {precision} has no integers to calibrate", "choose int8 or int4, or leave --calib out")
    if geometry is not None and geometry not in GEOMETRIES:
        raise FastVLMError(f"unknown geometry {geometry!r}", f"choose {' or '.join(GEOMETRIES)}")
    if name is not None:
        check_name(name)
    output = Path(os.path.realpath(output))
    check_output(output, force=force)
    progress.stage("open")
    source = open_checkpoint(checkpoint, revision=revision, adapter=adapter)
    source.name = name or source.name
    geometry = geometry or source.geometry
    sizes = choose_image_sizes(source, image_size)
    context = choose_context(source, context, max(sizes))
    text = read_text(source)
    notes = [*source.notes, *text.notes]
    for note in notes:
        progress.note(note)
    with BackgroundHashes(source) as source_hashes:
        while True:
            plan = plans.pop(0)
            check_space(source, plan, output.parent)
            described = _describe(source, text, plan, sizes, geometry, context, notes)
            try:
                with written_beside(output, replace=force, elsewhere="choose another place for the model directory") as directory:
                    text.write_tokenizer(directory / "tokenizer.json")
                    manifest = _write(source, plan, described, directory, calibrate, progress)
                    progress.stage("hash")
                    manifest = _add_hashes(manifest, directory, source_hashes.result())
                    manifest.write(directory)
                    remember(directory, manifest)
                progress.done()
                return manifest
            except PrecisionRefused as refusal:
                if not plans:
                    raise
                notes.append(f"{plan.name} was refused: {refusal.what}")
            progress.note(f"{notes[-1]}; trying {plans[0].name}")


def _write(
    source: Checkpoint, plan: PrecisionPlan, manifest: Manifest, directory: Path, calibrate: Calibrate | None, progress: Progress
) -> Manifest:
    """Fill `directory`, which has the tokenizer, and return the manifest without hashes."""
    vision = manifest.vision
    with ExitStack() as cleanup:
        conversion = Conversion(
            source=source,
            plan=plan,
            manifest=manifest,
            directory=directory,
            tokenizer=TextTokenizer(directory / "tokenizer.json"),
            pictures=[picture for size in vision.every_size for picture in stored_pictures(size, vision.geometry)],
            progress=progress,
            cleanup=cleanup,
        )
        _run(conversion, calibrate)
    return conversion.manifest


def _describe(
    source: Checkpoint, text: TextAssets, plan: PrecisionPlan, sizes: list[int], geometry: str, context: int, notes: list[str]
) -> Manifest:
    """The manifest as far as it is known before any tensor is read."""
    llm, encoder = source.text, source.vision
    return Manifest(
        name=source.name,
        toolkit_version=__version__,
        source=Source(source.location, source.layout, {}, source.adapter.location if source.adapter else ""),
        precision=plan.name,
        plan={},
        vision=VisionSpec(
            sizes[0],
            geometry,
            visual_tokens(sizes[0]),
            llm.hidden,
            dims=list(encoder.dims),
            depths=list(encoder.depths),
            out_dim=encoder.out_dim,
            se_dim=encoder.se_dim,
            other_sizes=sizes[1:],
        ),
        decoder=DecoderSpec(
            llm.layers,
            llm.kv_heads,
            llm.head_dim,
            llm.hidden,
            llm.vocab,
            context,
            min(CANDIDATES, llm.vocab),
            dtype="",
            heads=llm.heads,
            intermediate=llm.intermediate,
            max_positions=llm.max_positions,
        ),
        text=TextSpec(text.system_prompt, text.stop_ids, text.token_count),
        files={},
        notes=list(notes),
    )


def _add_hashes(manifest: Manifest, directory: Path, source_hashes: dict[str, str]) -> Manifest:
    """The manifest with size and sha256 of every file in the finished `directory`, and with the sha256 of the checkpoint's files."""
    paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST_NAME)
    files = {path.name: FileRecord(sha256(path), path.stat().st_size) for path in paths}
    return replace(manifest, files=files, source=replace(manifest.source, files=source_hashes))


def _run(conversion: Conversion, calibrate: Calibrate | None) -> None:
    """All steps from the checkpoint to the checked graphs."""
    conversion.progress.stage("probe vision")
    encoder, projector = load_vision(conversion.source), load_projector(conversion.source)
    reference = probe(conversion, encoder, projector)
    calibration = None if calibrate is None else calibrate(conversion, encoder, projector)
    vision_weights = write_vision(conversion, encoder, projector, calibration)
    del encoder, projector  # their memory is needed for the decoder
    decoder_weights = write_decoder(conversion, calibration)
    features = choose_cpu_int8(conversion, reference, vision_weights, calibration)
    answers = store_reference(conversion, reference, features, decoder_weights)
    cpu = choose_cpu_inputs(conversion, answers, decoder_weights)
    verify(conversion, reference, answers, cpu, calibration)
    if calibration is not None:
        if calibration.certify is not None:
            calibration.certify(conversion.directory, conversion.manifest)
        calibration.write_report(conversion.directory, conversion.manifest)


def probe(conversion: Conversion, encoder: FastViTHD, projector: nn.Sequential) -> Reference:
    """Run PyTorch on the stored pictures and the stored conversation, and move outlier channels.

    The results of the checkpoint as it is are the reference for the graphs, and the largest activations after the moves decide the float
    types of the plan.
    """
    progress = conversion.progress
    moved: dict[str, list[int]] = {}
    with watch_blocks(encoder) as noises, watch_encoder(encoder) as channels:
        largest, features = probe_activations(encoder, projector, conversion.pictures)
    if conversion.plan.vision_weights.bits and (moved := move_in_encoder(encoder, channels)):
        with watch_blocks(encoder) as noises:
            largest, _ = probe_activations(encoder, projector, conversion.pictures)
    conversation = _converse(conversion, features[0][0], seen := ChannelWatch())
    moves = find_moves(seen, conversion.source.text, conversion.plan)
    if moves.factors:
        conversion.source = conversion.source.rescaled(moves.factors)
        conversation = replace(conversation, magnitudes=_converse(conversion, features[0][0]).magnitudes)
    moved |= moves.channels
    if moved:
        progress.note(_moved(moved))
    conversion.plan = fit(conversion.plan, largest, conversation.magnitudes)
    progress.note(_largest_of_llm(conversation.magnitudes, conversion.plan))
    conversion.manifest = replace(
        conversion.manifest,
        plan=conversion.plan.describe(),
        decoder=replace(conversion.manifest.decoder, dtype=NUMPY_NAMES[conversion.plan.decoder]),
        activations={
            "pictures": len(PICTURES),
            "largest": largest,
            "decoder": asdict(conversation.magnitudes),
            "moved_channels": moved,
            "fp32_scores": sorted(conversion.plan.wide_scores),
            "up_shifts": {str(layer): shift for layer, shift in conversion.plan.up_shifts.items()},
        },
    )
    return Reference(features, conversation, noises)


def _converse(conversion: Conversion, features: Float32, watch: Watch | None = None) -> Conversation:
    conversion.progress.stage("probe decoder", conversion.source.text.layers)
    return converse(conversion.tokenizer, conversion.manifest, conversion.source, features, conversion.progress.advance, watch)


def _moved(channels: dict[str, list[int]]) -> str:
    """Which outlier channels were moved, for the user: every product if they are few."""
    names = [
        f"{name} (channel{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:4]))}{', ...' * (len(numbers) > 4)})"
        for name, numbers in channels.items()
    ]
    listed = ", ".join(names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6)
    return f"balanced outlier channels between the inputs of products and their weights, which changes nothing in FP32: {listed}"


def _largest_of_llm(seen: Magnitudes, plan: PrecisionPlan) -> str:
    """The largest attention score and residual stream of every layer, and what the plan does about large values."""
    scores, residual = (" ".join(f"{value:,.0f}" for value in values) for values in (seen.scores, seen.residual))
    text = f"LLM, largest attention score of each layer: {scores}; largest residual stream: {residual}"
    if plan.wide_scores:
        text += f"; scores in FP32 in {len(plan.wide_scores)} of {len(seen.scores)} layers"
    if plan.up_shifts:
        text += f"; MLP divided in layer{'s' * (len(plan.up_shifts) > 1)} {', '.join(map(str, plan.up_shifts))}"
    return text


def write_vision(conversion: Conversion, encoder: FastViTHD, projector: nn.Sequential, calibration: Calibration | None) -> WeightsFile:
    """Write `vision.weights` and the graphs of encoder and projector."""
    plan, progress = conversion.plan, conversion.progress
    progress.stage("vision", len(plan.vision))
    integers = None if calibration is None else calibration.vision
    with _weights(conversion.directory / "vision.weights") as weights:
        write_vision_weights(encoder, projector, plan, weights, progress.advance, integers)
    scales = {} if integers is None else integers.activation_scales
    preferred, fp32_scales, float_inputs = VISION_GRAPHS
    _save_vision(conversion, weights, preferred, plan, scales=scales)
    if scales:
        _save_vision(conversion, weights, fp32_scales, plan, scales=scales, fp32_scales=True)
        _save_vision(conversion, weights, float_inputs, plan)
    if _needs_cpu_graph("vision", plan):
        _save_vision(conversion, weights, "vision.cpu.onnx", on_cpu(plan))
    return weights


def _save_vision(
    conversion: Conversion,
    weights: WeightsFile,
    file: str,
    plan: PrecisionPlan,
    *,
    scales: Mapping[str, float] | None = None,
    integer_inputs: frozenset[str] = frozenset(),
    fp32_scales: bool = False,
) -> None:
    graph = GraphBuilder("vision", weights)
    spec = conversion.manifest.vision
    size = None if spec.other_sizes else spec.image_size
    build_vision(graph, conversion.source.vision, spec.hidden, size, plan, scales, integer_inputs, fp32_scales=fp32_scales)
    graph.save(conversion.directory / file)


def write_decoder(conversion: Conversion, calibration: Calibration | None) -> WeightsFile:
    """Write `decoder.weights` and the graphs of the LLM."""
    source, plan, progress = conversion.source, conversion.plan, conversion.progress
    progress.stage("decoder", source.text.layers + 2)
    with _weights(conversion.directory / "decoder.weights") as weights:
        quantized = None if calibration is None else calibration.decoder
        write_decoder_weights(source, plan, weights, progress.advance, quantized, context=conversion.manifest.decoder.context)
    graphs: list[tuple[str, PrecisionPlan, Provider | None]] = [("decoder.onnx", plan, None)]
    if _needs_cpu_graph("decoder", plan):
        graphs.append(("decoder.cpu.onnx", on_cpu(plan), "cpu"))
    if has_cuda_graph(plan):
        graphs.append(("decoder.cuda.onnx", plan, "cuda"))
    for file, graph_plan, provider in graphs:
        _save_decoder(conversion, weights, file, graph_plan, provider)
    return weights


def _save_decoder(conversion: Conversion, weights: WeightsFile, file: str, plan: PrecisionPlan, provider: Provider | None) -> None:
    graph = GraphBuilder("decoder", weights)
    build_decoder(graph, conversion.source.text, plan, provider=provider)
    graph.save(conversion.directory / file)


def _needs_cpu_graph(part: str, plan: PrecisionPlan) -> bool:
    """Whether onnxruntime's CPU provider needs a graph of its own, with the same weights file (docs/graphs.md)."""
    return on_cpu(plan) != plan or (part == "decoder" and plan.decoder == "fp32")


def choose_cpu_int8(conversion: Conversion, reference: Reference, weights: WeightsFile, calibration: Calibration | None) -> list[Float32]:
    """Let the encoder's graph for a CPU compute as many blocks in INT8 as the image features allow; only if its weights are INT8.

    Returns the image features [tokens, hidden] of every picture as the graph for a GPU states them, computed in FP32.
    """
    plan, progress = conversion.plan, conversion.progress
    if not plan.vision_weights.bits:
        return [features[0] for features in reference.features]
    progress.stage("INT8 on a CPU", TRIES + 1)
    stated: list[Float32] = []
    if calibration is not None:
        _save_vision(conversion, weights, "vision.cpu.onnx", on_cpu(plan), scales=calibration.vision.activation_scales)
        stated = encode(conversion.directory, conversion.manifest, conversion.pictures)
    blocks = reference.noises
    if calibration is not None:  # layers that calibration left in floats have no integers to multiply
        blocks = [noise for noise in blocks if calibration.vision.activation_scales.keys() >= set(noise.layers)]

    def save(layers: frozenset[str]) -> None:
        _save_vision(conversion, weights, "vision.cpu.onnx", on_cpu(plan), integer_inputs=layers)

    def features_with(layers: frozenset[str]) -> list[Float32]:
        nonlocal stated
        save(layers)
        progress.advance()
        features = encode(conversion.directory, conversion.manifest, conversion.pictures)
        if not layers:
            stated = stated or features
        return features

    chosen = choose_blocks(blocks, features_with)
    save(chosen.layers)
    progress.note(
        f"on a CPU, {chosen.blocks} of {len(reference.noises)} blocks of the encoder compute in INT8 "
        f"(1 - cosine of the image features: {chosen.loss:.1e})"
    )
    activations = {**conversion.manifest.activations, "int8_on_cpu": chosen.describe()}
    conversion.manifest = replace(conversion.manifest, activations=activations)
    return stated


@dataclass
class Answers:
    """What the stored weights compute for the stored passage in PyTorch and FP32, and how far the arithmetic of devices is from it."""

    rows: StoredRows
    stored: Stored
    noise: NoiseWatch | None
    """None if the plan stores floats."""
    gpu: RowErrors | None
    """None in FP32."""


def store_reference(conversion: Conversion, reference: Reference, features: list[Float32], weights: WeightsFile) -> Answers:
    """Write `reference.npz`, with which engines are compared: PyTorch in FP32 with the stored integers, so that it shows their error alone.

    `features` [tokens, hidden] are those of every picture; the answers are about those of the default size. If the plan stores floats, the
    reference is the checkpoint itself.
    """
    source, plan, progress = conversion.source, conversion.plan, conversion.progress
    narrow = plan.decoder != "fp32"
    progress.stage("reference answers", source.text.layers * (1 + narrow))
    decoder = QuantizedDecoder(source, StoredMatrices(weights), plan) if plan.body.bits else source
    passage = stored_passage(conversion.tokenizer, conversion.manifest)
    noise = NoiseWatch(plan) if plan.body.bits else None
    sizes = [features[first : first + len(PICTURES)] for first in range(0, len(features), len(PICTURES))]
    rows, stored = answer_passage(decoder, sizes[0], passage, reference.conversation, progress.advance, noise)
    others = zip(conversion.manifest.vision.other_sizes, map(np.stack, sizes[1:]), strict=True)
    rows = replace(rows, other_sizes=dict(others))
    rows.write(conversion.directory)
    gpu = errors_of_narrow_type(decoder, rows, plan, progress.advance) if narrow else None
    return Answers(rows, stored, noise, gpu)


def choose_cpu_inputs(conversion: Conversion, answers: Answers, weights: WeightsFile) -> RowErrors:
    """Let the decoder's graph for a CPU give 16-bit inputs to as few products as its logits need; only if its weights are integers.

    Returns how far the rows of the graph are from the stored weights on this CPU.
    """
    plan, progress = conversion.plan, conversion.progress
    progress.stage("decoder on a CPU")
    if answers.noise is None:
        return run_passage(conversion.directory, conversion.manifest, answers.rows)[0]
    errors: list[RowErrors] = []

    def run(products: frozenset[str]) -> Trial:
        _save_decoder(conversion, weights, "decoder.cpu.onnx", replace(on_cpu(plan), fine_inputs=products), "cpu")
        found, milliseconds = run_passage(conversion.directory, conversion.manifest, answers.rows)
        errors.append(found)
        return Trial(found.divergence, milliseconds)

    chosen = choose_fine_inputs(answers.noise.noisiest_inputs(UNUSUAL), run, CPU_AIM)
    if chosen.products:
        progress.note(
            f"on a CPU, {len(chosen.products)} of {len(answers.noise.products)} products of the LLM have 16-bit inputs, which makes a step "
            f"{chosen.slower:.0%} slower: {', '.join(chosen.products[:6])}{', ...' * (len(chosen.products) > 6)}"
        )
    activations = {**conversion.manifest.activations, "fine_inputs_on_cpu": asdict(chosen)}
    conversion.manifest = replace(conversion.manifest, activations=activations)
    return errors[-1]


def verify(conversion: Conversion, reference: Reference, answers: Answers, cpu: RowErrors, calibration: Calibration | None) -> None:
    """Compare the written graphs with the reference. Raises PrecisionRefused if they disagree. `cpu` are the errors of rows on this CPU."""
    plan, progress = conversion.plan, conversion.progress
    progress.stage("verify", len(conversion.pictures) + 1)
    conversion.manifest = replace(conversion.manifest, files=files_under_way(conversion.directory))
    noisiest = [] if answers.noise is None else answers.noise.noisiest_inputs()
    check_rows(plan, cpu, answers.gpu, noisiest, reference.conversation.magnitudes)
    figures = check_parity(
        conversion.directory,
        conversion.manifest,
        conversion.pictures,
        reference.features,
        reference.conversation,
        progress.advance,
        stored=answers.stored if plan.body.bits else None,
        activations=calibration is not None,
        suspects=_suspects(conversion, reference, answers),
    )
    for name, errors in (("rows_on_cpu", cpu), ("rows_on_gpu", answers.gpu)):
        if errors is not None:
            figures[name] = asdict(errors)
    conversion.manifest = replace(conversion.manifest, parity=figures)
    if plan.body.bits:
        progress.note(_cost_of_integers(figures, advise=calibration is None))


def _suspects(conversion: Conversion, reference: Reference, answers: Answers) -> dict[str, str]:
    """Where the error of a graph is likely to come from: a clause about the encoder, and one about the LLM."""
    largest = conversion.manifest.activations["largest"]
    stage = max(largest, key=lambda name: float(largest[name]))
    vision = f"{stage} of the encoder has its largest values, up to {largest[stage]:,.0f}"
    if answers.noise is not None:
        decoder = f"the weights that integers change most are those of {', '.join(answers.noise.coarsest_weights()[:3])}"
    else:
        decoder = reference.conversation.magnitudes.largest()
    return {"vision": vision, "decoder": decoder}


def _cost_of_integers(figures: dict[str, Any], *, advise: bool) -> str:
    """What quantising the decoder's weights changed in the stored conversation: users should know it before the first odd answer."""
    logits = figures["logits"]
    text = (
        f"quantised decoder: the logits have a cosine of {logits['cosine']:.4f} to the checkpoint's, "
        f"and {logits['greedy_agreement']:.0%} of greedy tokens are unchanged"
    )
    return f"{text}; calibration (--calib DATA) may preserve more" if advise and logits["greedy_agreement"] < 1 else text


@contextmanager
def _weights(path: Path) -> Iterator[WeightsFile]:
    weights = WeightsFile(path)
    try:
        yield weights
    finally:
        weights.close()
