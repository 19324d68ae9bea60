"""The check at the end of every conversion: the new graphs, run by the runtime's own backend, are compared with PyTorch.

Before that, the same PyTorch passes give the largest activations, which decide the float types of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from fastvlm_edge.backends.verification.compare import Difference, compare, top_rows
from fastvlm_edge.backends.verification.conversation import Passage, stored_conversation
from fastvlm_edge.backends.verification.reference import Reference
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint
from fastvlm_edge.convert.fastvithd import ConvBN, FastViTHD, LayerScale, image_tokens
from fastvlm_edge.convert.precision import VISION_STAGES, Magnitudes
from fastvlm_edge.convert.reference.decoder import Weights, reference_logits
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.manifest import FileRecord, Manifest

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
    tokenizer: TextTokenizer, manifest: Manifest, checkpoint: Checkpoint, features: Float32, advance: Callable[[], None]
) -> Conversation:
    """Run the LLM of the checkpoint in FP32 on the stored conversation; `advance` is called once for each layer."""
    ids = stored_conversation(tokenizer, manifest, len(features))
    split = len(ids) - min(LOGIT_COUNT, len(ids) // 2) - 3
    positions = list(range(split, len(ids)))[-LOGIT_COUNT:]
    logits, magnitudes = reference_logits(checkpoint, ids, features, positions, advance)
    return Conversation(features, ids, split, positions, logits, magnitudes)


@dataclass(frozen=True)
class Stored:
    """What PyTorch computes for the stored conversation with the integers in the model directory."""

    features: Float32
    """Image features [tokens, hidden] of the first picture, from the encoder's integers."""
    logits: Float32
    """[positions, vocab]: logits of the positions of `Conversation`, from these features and the decoder's integers."""


def answer_passage(
    weights: Weights, features: Sequence[Float32], passage: Passage, conversation: Conversation, advance: Callable[[], None]
) -> tuple[Reference, Stored]:
    """Run `weights` in PyTorch on the passage, which begins like the conversation: the reference for engines, and for the graphs.

    `features` [tokens, hidden] are those of each picture.
    """
    ids = passage.ids if len(passage.ids) >= len(conversation.ids) else conversation.ids  # a short context cuts the passage
    positions = sorted({*passage.positions, *conversation.positions})
    logits, _ = reference_logits(weights, ids, np.concatenate(features), positions, advance)
    at = {position: index for index, position in enumerate(positions)}
    rows = top_rows(logits[[at[position] for position in passage.positions]])
    reference = Reference("PyTorch", passage, np.stack(features), rows)
    return reference, Stored(features[0], logits[[at[position] for position in conversation.positions]])


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
) -> dict[str, Any]:
    """Run the graphs of `directory` and compare the image features of each picture, then the logits of the stored conversation.

    The decoder gets PyTorch's image features, so that each graph is tested alone, and its prompt in two chunks, so that the cache is tested
    too. `stored` is what PyTorch computes with the integers in the directory; None if the plan stores floats. With `activations`, the
    encoder's graph for a GPU is run as well, because only that one has quantised activations. `advance` is called for each picture and at
    the end. Returns the figures for the manifest. Raises FastVLMError if they are outside BOUNDS.
    """
    bounds = BOUNDS[manifest.precision]
    setup = on_device(directory, manifest)
    worst = _run_vision(OrtVision(setup), pictures, expected, advance)
    quantized = worst
    if activations:
        without = replace(manifest, files={name: record for name, record in manifest.files.items() if not name.endswith(".cpu.onnx")})
        quantized = _run_vision(OrtVision(on_device(directory, without)), pictures, expected, lambda: None)
    decoder, dtype = OrtDecoder(setup), setup.manifest.decoder.dtype
    logits = _run_decoder(decoder, conversation, conversation.features, dtype)
    repeated = None if stored is None else _run_decoder(decoder, conversation, stored.features, dtype)
    advance()
    figures: dict[str, Any] = {
        "image_features": asdict(worst),
        **({"image_features_w8a8": asdict(quantized)} if activations else {}),
        "logits": _likeness(logits, conversation.logits),
        **({} if stored is None or repeated is None else {"logits_stored_weights": _likeness(repeated, stored.logits)}),
        "bounds": asdict(bounds),
    }
    checks = [
        ("the cosine of the image features", min(worst.cosine, quantized.cosine), bounds.features),
        ("the cosine of the logits", figures["logits"]["cosine"], bounds.logits),
        ("the share of equal greedy tokens", figures["logits"]["greedy_agreement"], bounds.greedy),
    ]
    if stored is not None:
        assert bounds.stored is not None
        checks.append(("the cosine to the logits of the stored weights", figures["logits_stored_weights"]["cosine"], bounds.stored))
    for what, value, bound in checks:
        if not value >= bound:
            raise FastVLMError(
                f"the {manifest.precision} graphs do not agree with PyTorch, so nothing was written: "
                f"{what} is {value:.5f}, but must be at least {bound}",
                "try --precision fp32, and report it if that fails too",
            )
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


def _run_vision(vision: OrtVision, pictures: Sequence[Float32], expected: Sequence[Float32], advance: Callable[[], None]) -> Difference:
    """The largest difference among all pictures."""
    differences = []
    for picture, want in zip(pictures, expected, strict=True):
        differences.append(compare(vision.encode(picture).numpy()[None], want))
        advance()
    return min(differences, key=lambda difference: difference.cosine)


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
