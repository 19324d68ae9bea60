"""The check at the end of every conversion: the new graphs, run by the runtime's own backend, are compared with PyTorch.

Before that, the same PyTorch passes give the largest activations, which decide the float types of the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastvlm_edge.backends.dtypes import from_float32
from fastvlm_edge.backends.ort import HostFeatures, OrtDecoder, OrtVision
from fastvlm_edge.backends.ort_session import on_device
from fastvlm_edge.backends.verification.cases import feed
from fastvlm_edge.backends.verification.check import BOUNDS as BACKEND_BOUNDS
from fastvlm_edge.backends.verification.check import MANTISSA
from fastvlm_edge.backends.verification.compare import Difference, compare, divergence, in_steps, regret, top_rows
from fastvlm_edge.backends.verification.conversation import TAIL, Passage, stored_conversation
from fastvlm_edge.backends.verification.reference import Reference
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint
from fastvlm_edge.convert.fastvithd import ConvBN, FastViTHD, LayerScale, image_tokens
from fastvlm_edge.convert.precision import NUMPY_NAMES, VISION_STAGES, Magnitudes, PrecisionPlan, PrecisionRefused
from fastvlm_edge.convert.reference.decoder import Arithmetic, Watch, Weights, reference_logits
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import FileRecord, Manifest

CPU_AIM = 0.01
"""The KL divergence, in nats, of a row of logits on this CPU from the stored weights in FP32 that 16-bit inputs are to bring it down to."""
CPU_LIMIT, CPU_STEPS = 0.1, 128
"""The largest divergence that is accepted, and by how many steps of the plan's type at the size of the row the stored weights may prefer
their own id: about twice those of the worst model without outliers, random weights of three layers (0.05 and 83)."""
LOGIT_COUNT = 24
"""Positions at the end of the stored conversation whose logits are compared."""

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Bounds:
    """What a precision may lose: the smallest accepted cosines, and the smallest share of equal greedy tokens."""

    features: float
    logits: float
    greedy: float
    stored: float | None = None
    """Cosine of the logits to those of PyTorch with the stored integers: the error of the graph without the error of rounding."""


BOUNDS = {
    "fp32": Bounds(features=0.99999, logits=0.99999, greedy=0.95),
    "fp16": Bounds(features=0.999, logits=0.999, greedy=0.75),
    "bf16": Bounds(features=0.99, logits=0.99, greedy=0.5),
    "int8": Bounds(features=0.95, logits=0.97, greedy=0.5, stored=0.99),
    "int4": Bounds(features=0.95, logits=0.5, greedy=0.0, stored=0.99),
}
"""Wide enough for random weights, whose logits are close together: with weights of the 0.5B size rounded to INT4 in blocks of 128, their
cosine is 0.70 at 256 px and 0.82 at 1024 px. A faulty graph is found by the comparison with the stored weights."""


INSTEAD = {
    "fp32": "report it, with the name of the checkpoint and what `fastvlm-edge doctor` prints",
    "fp16": "convert with --precision bf16 or fp32",
    "bf16": "convert with --precision fp32",
    "int8": "convert with --precision fp16 or fp32",
    "int4": "convert with --precision fp16 or fp32",
}
"""What to do if the graphs of a precision do not agree with PyTorch."""


def probe_activations(encoder: FastViTHD, projector: nn.Sequential, pictures: Sequence[Float32]) -> tuple[dict[str, float], list[Float32]]:
    """The largest magnitude in every stage, and the image features [1, tokens, hidden] of every picture, in FP32.

    Only values that the folded graph computes as well are measured: after BatchNorm and layer scale, not before them.
    """
    largest = dict.fromkeys(VISION_STAGES, 0.0)

    def watch(stage: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            largest[stage] = max(largest[stage], float(output.abs().max()))

        return hook

    parts = [encoder.stem, *encoder.stages, encoder.final_conv, projector]
    handles = []
    for stage, part in zip(VISION_STAGES, parts, strict=True):
        for name, module in part.named_modules():
            folded = name.endswith(("fc2", "token_mixer.proj", "mlp.conv.conv")) and stage.startswith("stage")
            if not folded and (isinstance(module, (nn.Conv2d, nn.Linear, ConvBN, LayerScale)) or not name or ".blocks" in f".{name}"):
                handles.append(module.register_forward_hook(watch(stage)))
    try:
        with torch.inference_mode():
            features = [projector(image_tokens(encoder(torch.from_numpy(picture)))).numpy() for picture in pictures]
    finally:
        for handle in handles:
            handle.remove()
    return largest, features


@dataclass(frozen=True)
class Conversation:
    """What PyTorch computes for the stored conversation about a picture, as the reference for the decoder."""

    features: Float32
    """Image features [tokens, hidden]"""
    ids: list[int]
    split: int
    """Index in `ids` where the second chunk of the prefill begins."""
    positions: list[int]
    """Positions whose logits are compared."""
    logits: Float32
    """[len(positions), vocab]"""
    magnitudes: Magnitudes


def converse(
    tokenizer: TextTokenizer,
    manifest: Manifest,
    checkpoint: Checkpoint,
    features: Float32,
    advance: Callable[[], None],
    watch: Watch | None = None,
) -> Conversation:
    """Run the LLM of the checkpoint in FP32 on the stored conversation; `advance` is called once for each layer."""
    ids = stored_conversation(tokenizer, manifest, len(features))
    split = len(ids) - min(LOGIT_COUNT, len(ids) // 2) - 3
    positions = list(range(split, len(ids)))[-LOGIT_COUNT:]
    logits, magnitudes = reference_logits(checkpoint, ids, features, positions, advance, watch)
    return Conversation(features, ids, split, positions, logits, magnitudes)


@dataclass(frozen=True)
class Stored:
    """What PyTorch computes for the stored conversation with the integers in the model directory."""

    features: Float32
    """Image features [tokens, hidden] of the first picture, from the encoder's integers."""
    logits: Float32
    """[positions, vocab]: logits of the positions of `Conversation`, from these features and the decoder's integers."""


def answer_passage(
    weights: Weights,
    features: Sequence[Float32],
    passage: Passage,
    conversation: Conversation,
    advance: Callable[[], None],
    watch: Watch | None,
) -> tuple[Reference, Stored]:
    """Run `weights` in PyTorch on the passage, which begins like the conversation: the reference for engines, and for the graphs.

    `features` [tokens, hidden] are those of each picture.
    """
    ids = passage.ids if len(passage.ids) >= len(conversation.ids) else conversation.ids  # a short context cuts the passage
    positions = sorted({*passage.positions, *conversation.positions})
    logits, _ = reference_logits(weights, ids, np.concatenate(features), positions, advance, watch)
    at = {position: index for index, position in enumerate(positions)}
    rows = top_rows(logits[[at[position] for position in passage.positions]])
    reference = Reference("PyTorch", passage, np.stack(features), rows)
    return reference, Stored(features[0], logits[[at[position] for position in conversation.positions]])


@dataclass(frozen=True)
class RowErrors:
    """How far rows of logits are from the reference: the worst figures of all rows."""

    divergence: float
    """KL divergence in nats."""
    position: int
    """The position of that row in the stored passage."""
    regret: float
    """By how much the reference prefers its own id, in nats."""
    steps: float
    """The same in steps of FP16, or of BF16 where that is the plan's type, at the size of the row."""
    greedy_agreement: float
    """Share of rows with the same greedy token."""
    rows: int


def row_errors(logits: dict[int, Float32], reference: Reference, dtype: str) -> RowErrors:
    """Compare logits, position -> [vocab], with the reference. `dtype` is the type of the decoder's plan."""
    at = {position: index for index, position in enumerate(reference.passage.positions)}
    rows = {position: reference.rows[at[position]] for position in logits}
    distances = {position: divergence(row, rows[position]) for position, row in logits.items()}
    regrets = {position: regret(row, rows[position]) for position, row in logits.items()}
    steps = max(in_steps(regrets[position], row, 2.0 ** -MANTISSA[dtype]) for position, row in rows.items())
    worst = max(distances, key=lambda position: distances[position])
    agreement = sum(each == 0 for each in regrets.values()) / len(regrets)
    return RowErrors(distances[worst], worst, max(regrets.values()), steps, agreement, len(rows))


def run_passage(directory: Path, manifest: Manifest, reference: Reference) -> tuple[RowErrors, float]:
    """Run the decoder for this CPU on the passage: a prefill of each turn, then single ids, for which onnxruntime has other kernels.

    Returns the errors, and the median time of a single id in ms.
    """
    setup = on_device(directory, replace(manifest, files=files_under_way(directory)))
    decoder, dtype = OrtDecoder(setup), setup.manifest.decoder.dtype
    pictures = [HostFeatures(from_float32(features, dtype), dtype) for features in reference.features]
    passage, end = reference.passage, len(reference.passage.ids)
    first = max(end - TAIL, 0)
    logits: dict[int, Float32] = {}
    times = []
    for call in feed(passage, sorted({0, min(passage.turn, first), *range(first, end + 1)})):
        asked = [position - call.at for position in call.compared]
        began = time.perf_counter()
        out = decoder.step(call.ids, tuple(pictures[: len(call.pictures)]), logit_positions=asked or None, want_logits=bool(asked))
        if len(call.ids) == 1:
            times.append(1000 * (time.perf_counter() - began))
        if out.logits is not None:
            logits.update(zip(call.compared, out.logits.copy(), strict=True))
    return row_errors(logits, reference, manifest.decoder.dtype), float(np.median(times))


def errors_of_narrow_type(weights: Weights, reference: Reference, plan: PrecisionPlan, advance: Callable[[], None]) -> RowErrors:
    """The errors of a GPU's arithmetic, computed by PyTorch: weights and values in the plan's float type, sums in FP32."""
    passage = reference.passage
    features = np.concatenate(reference.features)
    logits, _ = reference_logits(weights, passage.ids, features, passage.positions, advance, arithmetic=Arithmetic.of(plan))
    return row_errors(dict(zip(passage.positions, logits, strict=True)), reference, NUMPY_NAMES[plan.decoder])


def check_rows(plan: PrecisionPlan, cpu: RowErrors, gpu: RowErrors | None, noisiest: Sequence[str], seen: Magnitudes) -> None:
    """Raise PrecisionRefused if the rows of onnxruntime on this CPU, or of a GPU in the plan's float type, are too far off.

    `noisiest` is empty if the plan stores floats.
    """
    bounds = BACKEND_BOUNDS[NUMPY_NAMES[plan.decoder]]
    limits = (CPU_LIMIT, CPU_STEPS) if plan.body.bits else (bounds.divergence, bounds.steps)
    if fault := _fault(cpu, *limits):
        where = f"the inputs that 8 bits round most are those of {', '.join(noisiest[:3])}" if noisiest else seen.largest()
        raise PrecisionRefused(
            f"with --precision {plan.name}, a CPU would give other answers than the stored weights: {fault}; {where}",
            INSTEAD[plan.name],
        )
    if gpu is not None and (fault := _fault(gpu, bounds.divergence, bounds.steps)):
        raise PrecisionRefused(
            f"with --precision {plan.name}, a GPU would give other answers than the stored weights: {fault}; {seen.largest()}",
            "convert with --precision fp32" if plan.decoder == "bf16" else "convert with --precision bf16 or fp32",
        )


def _fault(errors: RowErrors, divergence: float, steps: float) -> str | None:
    """What is wrong with rows of logits, as a clause; None if they are within the bounds."""
    if not errors.divergence <= divergence:
        return (
            f"at position {errors.position} of the stored passage the KL divergence is {errors.divergence:.3g} nats, at most {divergence} "
            "is accepted"
        )
    if not errors.steps <= steps:
        return f"they prefer an id that is {errors.regret:.3g} below the best: {errors.steps:.0f} steps, at most {steps:g} are accepted"
    return None


def check_parity(
    directory: Path,
    manifest: Manifest,
    pictures: Sequence[Float32],
    expected: Sequence[Float32],
    conversation: Conversation,
    advance: Callable[[], None],
    *,
    stored: Stored | None = None,
    activations: bool = False,
    suspects: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run the graphs of `directory` and compare the image features of each picture, then the logits of the stored conversation.

    The decoder gets PyTorch's image features, so that each graph is tested alone, and its prompt in two chunks, so that the cache is tested
    too. `stored` is what PyTorch computes with the integers in the directory; None if the plan stores floats. With `activations`, the
    encoder's graph for a GPU is run as well, because only that one has quantised activations. `advance` is called for each picture and at
    the end. `suspects` has a clause for the error about each of both parts, `vision` and `decoder`. Returns the figures for the manifest.
    Raises PrecisionRefused if they are outside BOUNDS.
    """
    bounds = BOUNDS[manifest.precision]
    setup = on_device(directory, manifest)
    features = _by_size("image_features", manifest, _run_vision(OrtVision(setup), pictures, expected, advance))
    if activations:
        without = replace(manifest, files={name: record for name, record in manifest.files.items() if not name.endswith(".cpu.onnx")})
        quantized = _run_vision(OrtVision(on_device(directory, without)), pictures, expected, lambda: None)
        features |= _by_size("image_features_w8a8", manifest, quantized)
    decoder, dtype = OrtDecoder(setup), setup.manifest.decoder.dtype
    logits = _run_decoder(decoder, conversation, conversation.features, dtype)
    repeated = None if stored is None else _run_decoder(decoder, conversation, stored.features, dtype)
    advance()
    figures: dict[str, Any] = {
        **{name: asdict(difference) for name, difference in features.items()},
        "logits": _likeness(logits, conversation.logits),
        **({} if stored is None or repeated is None else {"logits_stored_weights": _likeness(repeated, stored.logits)}),
        "bounds": asdict(bounds),
    }
    worst = min(features, key=lambda name: features[name].cosine)
    at = worst.partition(".")[2]
    checks = [
        ("vision", f"the cosine of the image features{at and f' at {at} px'}", features[worst].cosine, bounds.features),
        ("decoder", "the cosine of the logits", figures["logits"]["cosine"], bounds.logits),
        ("decoder", "the share of equal greedy tokens", figures["logits"]["greedy_agreement"], bounds.greedy),
    ]
    if stored is not None:
        assert bounds.stored is not None
        found = figures["logits_stored_weights"]["cosine"]
        checks.append(("decoder", "the cosine to the logits of the stored weights", found, bounds.stored))
    for part, what, value, bound in checks:
        if not value >= bound:
            text = f"the {manifest.precision} graphs do not agree with PyTorch: {what} is {value:.5f}, but must be at least {bound}"
            if suspects:
                text += f"; {suspects[part]}"
            raise PrecisionRefused(text, INSTEAD[manifest.precision])
    return figures


def _likeness(found: Float32, expected: Float32) -> dict[str, float]:
    """Difference of two sets of logits [positions, vocab], and the share of positions with the same greedy token."""
    greedy = float((found.argmax(1) == expected.argmax(1)).mean())
    return {**asdict(compare(found, expected)), "greedy_agreement": greedy, "positions": len(found)}


def files_under_way(directory: Path) -> dict[str, FileRecord]:
    """The files that an unfinished model directory has so far, with sizes but without hashes, so that a backend can load it."""
    return {path.name: FileRecord("", path.stat().st_size) for path in directory.iterdir() if path.is_file()}


def encode(directory: Path, manifest: Manifest, pictures: Sequence[Float32]) -> list[Float32]:
    """The image features [tokens, hidden] of each picture, computed on the CPU by the encoder of an unfinished model directory."""
    vision = OrtVision(on_device(directory, replace(manifest, files=files_under_way(directory))))
    return [vision.encode(picture).numpy() for picture in pictures]


def _by_size(name: str, manifest: Manifest, found: Sequence[tuple[int, Difference]]) -> dict[str, Difference]:
    """The largest difference of each size of pictures: `name` for the default size, and `name.512` for another."""
    return {
        f"{name}{manifest.vision.suffix(size)}": min((each for at, each in found if at == size), key=lambda difference: difference.cosine)
        for size in dict.fromkeys(at for at, _ in found)
    }


def _run_vision(
    vision: OrtVision, pictures: Sequence[Float32], expected: Sequence[Float32], advance: Callable[[], None]
) -> list[tuple[int, Difference]]:
    """Size and difference of every picture."""
    differences = []
    for picture, want in zip(pictures, expected, strict=True):
        differences.append((picture.shape[-1], compare(vision.encode(picture).numpy()[None], want)))
        advance()
    return differences


def _run_decoder(decoder: OrtDecoder, conversation: Conversation, features: Float32, dtype: str) -> Float32:
    """Logits [positions, vocab] of the conversation about a picture with these features. Its ids are given in two chunks."""
    ids, split = conversation.ids, conversation.split
    picture = HostFeatures(from_float32(features, dtype), dtype)
    decoder.reset()
    decoder.step(ids[:split], (picture,))
    positions = [position - split for position in conversation.positions]
    out = decoder.step(ids[split:], (picture,), logit_positions=positions, want_logits=True)
    assert out.logits is not None
    logits: Float32 = out.logits.copy()
    return logits
