"""Calibrated quantisation as a step of `convert`: opens the data, chooses integers for encoder and decoder, and writes the report."""

from __future__ import annotations

import functools
import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.verification.conversation import ANSWER, QUESTION
from fastvlm_edge.calib.accuracy import Question, Score, points_lost, score, score_backend
from fastvlm_edge.calib.decoder import DecoderQuantization, calibrate_decoder
from fastvlm_edge.calib.encoder.cache import FeatureCache, ObservationCache
from fastvlm_edge.calib.encoder.search import LayerRecord, VisionQuantization, VisionSearch
from fastvlm_edge.calib.report.document import (
    CalibrationData,
    Decision,
    DecoderReport,
    GroupReport,
    LayerReport,
    MatrixReport,
    QuantizationReport,
    VisionReport,
)
from fastvlm_edge.calib.report.write import write_report
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint
from fastvlm_edge.convert.conversion import Calibration, Conversion
from fastvlm_edge.convert.fastvithd import FastViTHD, image_tokens
from fastvlm_edge.convert.graphs.placement import check_placement
from fastvlm_edge.convert.precision import PrecisionRefused, vision_stage
from fastvlm_edge.convert.reference.decoder import Arithmetic
from fastvlm_edge.convert.reference.quantized_decoder import QuantizedDecoder
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import Dataset, Example, open_data
from fastvlm_edge.generation.answer import check_room
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.engine_record import PARTS
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.progress import Progress

Float32 = npt.NDArray[np.float32]

MINIMUM = 8
"""Fewest pictures from which ranges mean anything."""
VISION_PIXELS = 8 << 20
"""Pixels that are enough for ranges and second moments of the encoder: 32 pictures of 512 px, or MINIMUM pictures of 1024 px. More pictures
add little, because each has thousands of positions, and take minutes each. Of several image sizes, every picture is used at each."""
POSITIONS = 40_000
"""Positions of conversations that are enough for the decoder."""
MEASURED = 2
"""Pictures at each size on which the damage to the image features is measured."""
DAMAGE = 0.001
"""Largest accepted 1 - cosine of the image features if no accuracy drop is given."""
DAMAGES = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001, 0.0)
"""Bounds that are tried in this order until the accuracy is kept; the last one leaves the encoder in floats."""
HELD_OUT = 100
"""Questions that measure the accuracy; they are not used for calibration."""
_DECISIONS: dict[str, Decision] = {"w8a8": "int8", "weights": "int8 weights", "wide": "wide"}


@dataclass(frozen=True)
class Options:
    """The calibration options of `fastvlm-edge convert`."""

    source: str
    """The calibration data, as `open_data` takes it."""
    images: Path | None = None
    """Directory of the pictures; None means that of the data."""
    limit: int = 128
    """Number of calibration examples."""
    accuracy_drop: float | None = None
    """Largest accepted loss in percentage points. None bounds the damage to the image features (DAMAGE) instead."""
    cache: Path | None = None
    """Directory for observations, so that a second calibration is faster; None keeps nothing."""
    special_tokens: bool = False
    """Whether special tokens in questions and answers are read as tokens, as in `SamplingParams`."""


class Quantizer:
    """Calibration with one set of data. Its method `calibrate` is what `convert` takes."""

    def __init__(self, options: Options) -> None:
        """Open the data. Raises FastVLMError if that fails or if there are too few examples."""
        if options.limit < MINIMUM:
            raise FastVLMError(f"{options.limit} calibration examples are too few", f"give at least {MINIMUM} with --calib-limit")
        if options.accuracy_drop is not None and not options.accuracy_drop > 0:
            raise FastVLMError(f"--accuracy-drop must be greater than 0 (got {options.accuracy_drop:g})", "give a larger number")
        self.options = options
        held_out = 0 if options.accuracy_drop is None else HELD_OUT
        self.minimum = MINIMUM if options.accuracy_drop is None else MINIMUM * 4 // 3 + 1
        self.data: Dataset = open_data(options.source, images=options.images, limit=options.limit + held_out)
        if len(self.data) < self.minimum:
            purpose = "calibration" if options.accuracy_drop is None else "calibration with --accuracy-drop"
            raise FastVLMError(f"{options.source} has {len(self.data)} examples, but {purpose} needs at least {self.minimum}", "add more")

    def calibrate(self, conversion: Conversion, encoder: FastViTHD, projector: nn.Sequential) -> Calibration:
        """Choose integers for the plan of a conversion. Raises FastVLMError if data or accuracy are not sufficient.

        `encoder` is in inference form; neither module is changed. Temporary files are in the conversion's directory until it ends.
        """
        began = time.perf_counter()
        source, plan, manifest, progress = conversion.source, conversion.plan, conversion.manifest, conversion.progress
        folder = Path(conversion.cleanup.enter_context(tempfile.TemporaryDirectory(dir=conversion.directory, prefix=".calibration-")))
        questions, pictures, other_sizes = self._read(manifest, conversion.tokenizer, folder, progress)
        used = self._count(len(questions))
        features = _encode(encoder, projector, pictures, self._feature_cache(source), progress)

        search = VisionSearch(encoder, projector, plan, folder=folder, progress=progress)
        most = max(MINIMUM, VISION_PIXELS // sum(size**2 for size in manifest.vision.sizes))
        seen = _alternating([*other_sizes, pictures], min(used, most))
        search.observe(seen, cache=self._cache(source, seen, search.key()))
        search.measure(seen[: MEASURED * len(manifest.vision.sizes)])
        conversations = _enough(itertools.islice(zip(questions, features, strict=True), used))
        decoder = calibrate_decoder(source, conversations, plan, progress=progress, directory=conversion.directory)
        conversion.cleanup.callback(decoder.close)
        accuracy: dict[str, float] = {}
        certify: Callable[[Path, Manifest], None] | None = None
        if self.options.accuracy_drop is None:
            vision = search.choose(seen, bound=DAMAGE, measured=MEASURED * len(manifest.vision.sizes))
        else:
            held_out = _HeldOut(questions[used:], features[used:], pictures[used:])
            vision, before, accuracy = self._keep_accuracy(conversion, search, seen, decoder, held_out, self.options.accuracy_drop)
            certify = functools.partial(_certify, held_out, before, accuracy, progress)
        skipped = [f"{item.id}: {item.reason}" for item in self.data.skipped]
        data = CalibrationData(self.options.source, used, skipped, round(time.perf_counter() - began, 1))
        found = _Findings(vision, decoder, data, self.options.accuracy_drop, accuracy)
        return Calibration(vision, decoder, certify, found.write_report)

    def _count(self, total: int) -> int:
        """How many of `total` examples calibrate: all except those that are held out, or three quarters if there are few."""
        return total if self.options.accuracy_drop is None else max(min(self.options.limit, total * 3 // 4), MINIMUM)

    def _read(
        self, manifest: Manifest, tokenizer: TextTokenizer, folder: Path, progress: Progress
    ) -> tuple[list[Question], _Pictures, list[_Pictures]]:
        """The questions, their pictures at the default size, and their pictures at each of the other sizes."""
        progress.stage(f"read {self.data.source}", len(self.data))
        vision = manifest.vision
        pictures, others, questions = _Pictures(folder), {size: _Pictures(folder) for size in vision.other_sizes}, []
        for example, image in self.data.read(minimum=self.minimum):
            try:
                question = _question(example, manifest, tokenizer, special_tokens=self.options.special_tokens)
                check_room(question.ids, manifest)
                pictures.add(preprocess(image, vision.image_size, vision.geometry))
            except FastVLMError as error:
                self.data.skip(example.id, str(error), minimum=self.minimum)
                continue
            for size, smaller in others.items():
                smaller.add(preprocess(image, size, vision.geometry))
            questions.append(question)
            progress.advance()
        for item in self.data.skipped:
            progress.note(f"skipped {item.id}: {item.reason}")
        return questions, pictures, list(others.values())

    def _cache(self, source: Checkpoint, seen: _Pictures, recipe: str) -> ObservationCache | None:
        if self.options.cache is None:
            return None
        key = _digest(_weights_key(source), *map(seen.digest, range(len(seen))))
        return ObservationCache(self.options.cache / f"vision-{key[:16]}.npz", f"{key} {recipe}")

    def _feature_cache(self, source: Checkpoint) -> FeatureCache | None:
        if self.options.cache is None:
            return None
        return FeatureCache(self.options.cache / f"features-{_weights_key(source)[:16]}")

    def _keep_accuracy(
        self,
        conversion: Conversion,
        search: VisionSearch,
        seen: Sequence[Float32],
        decoder: DecoderQuantization,
        held_out: _HeldOut,
        allowed: float,
    ) -> tuple[VisionQuantization, Score, dict[str, float]]:
        """The encoder's plan for the first of DAMAGES that loses at most `allowed` points on the held-out questions.

        The decoder rounds as on a GPU. Also returns the original model's score, and the figures. Raises PrecisionRefused if even an
        encoder in floats loses more.
        """
        source, plan, progress = conversion.source, conversion.plan, conversion.progress
        layers = source.text.layers
        progress.stage("measure the original model", layers)
        before = score(source, held_out.questions, held_out.features, progress.advance)
        quantized, arithmetic = QuantizedDecoder(source, decoder, plan), Arithmetic.of(plan)
        lost = 0.0
        for damage in DAMAGES:
            vision = search.choose(seen, bound=damage, measured=MEASURED * len(conversion.manifest.vision.sizes))
            search.apply(vision)
            progress.stage(f"measure with damage up to {damage:g}", layers + len(held_out.pictures))
            features = []
            for picture in held_out.pictures:
                features.append(search.run(torch.from_numpy(picture))[0].numpy())
                progress.advance()
            after = score(quantized, held_out.questions, features, progress.advance, arithmetic)
            lost = points_lost(before, after)
            progress.note(f"with damage up to {damage:g} to the image features, the model loses {lost:.2f} points")
            if lost <= allowed:
                return vision, before, _figures(before, after, lost, allowed)
        raise PrecisionRefused(
            f"the decoder alone loses {lost:.2f} points (limit: {allowed:g}), even with a floating-point encoder",
            "choose --precision int8 instead of int4, or fp16, or allow more with --accuracy-drop",
        )


@dataclass(frozen=True)
class _HeldOut:
    """Examples that measure the accuracy and are not used for calibration."""

    questions: Sequence[Question]
    features: Sequence[Float32]
    """Image features [tokens, hidden] of each question's picture, in FP32."""
    pictures: Sequence[Float32]
    """pixel_values [1, 3, size, size]"""


def _certify(held_out: _HeldOut, before: Score, figures: dict[str, float], progress: Progress, directory: Path, manifest: Manifest) -> None:
    """Ask the finished model the held-out questions, as a user on this CPU would, and add to the figures.

    Raises PrecisionRefused if it loses more than is allowed.
    """
    progress.stage("measure on this CPU", len(held_out.questions))
    backend = OrtBackend(directory, manifest)
    try:
        after = score_backend(backend, held_out.questions, held_out.pictures, progress.advance)
    finally:
        backend.close()
    lost, allowed = points_lost(before, after), figures["points_allowed"]
    progress.note(f"with {backend.description}, the model loses {lost:.2f} points")
    figures |= {f"cpu_{name}": value for name, value in _figures(before, after, lost, allowed).items()}
    if lost > allowed:
        raise PrecisionRefused(
            f"with {backend.description}, the model loses {lost:.2f} points (limit: {allowed:g}), though a GPU would lose "
            f"{figures['points_lost']:.2f}",
            "choose --precision fp16, or allow more with --accuracy-drop",
        )


@dataclass(frozen=True)
class _Findings:
    """What was chosen for a model, from which data, and at what cost: the content of the report."""

    vision: VisionQuantization
    decoder: DecoderQuantization
    data: CalibrationData
    accuracy_drop: float | None
    """As asked for."""
    accuracy: dict[str, float]
    """Figures on the held-out questions; empty without `accuracy_drop`."""

    def write_report(self, directory: Path, manifest: Manifest) -> None:
        """Write `quantization.json` and `quantization.html` into the model directory, whose graphs and parity figures are complete."""
        placements = {part: check_placement(directory / f"{part}.onnx", {"size": manifest.vision.image_size}) for part in PARTS}
        features, groups = manifest.parity["image_features_w8a8"], _groups(self.vision)
        write_report(
            directory,
            QuantizationReport(
                model=manifest.name,
                precision=manifest.precision,
                toolkit_version=manifest.toolkit_version,
                date=date.today().isoformat(),
                calibration=self.data,
                accuracy_drop=self.accuracy_drop,
                vision=VisionReport(
                    observer="mse",
                    bound=self.vision.bound,
                    predicted=sum(group.relative_error for group in groups if group.decision == "int8"),
                    measured_cosine=features["cosine"],
                    measured_relative=features["relative"] ** 2,
                    groups=groups,
                ),
                decoder=DecoderReport("GPTQ", [_matrix(self.decoder, name) for name in self.decoder.names()]),
                placement={part: placement.macs for part, placement in placements.items()},
                fallbacks=[asdict(fallback) for placement in placements.values() for fallback in placement.fallbacks],
                bytes={name: record.bytes for name, record in manifest.files.items()},
                evaluation={**self.accuracy, "parity": manifest.parity},
            ),
        )


def _alternating(sizes: Sequence[_Pictures], count: int) -> _Pictures:
    """The first `count` pictures at every size: all sizes of the first picture, then those of the second."""
    return _Pictures(Path(), [name for names in zip(*(pictures.names[:count] for pictures in sizes), strict=True) for name in names])


class _Pictures(Sequence[Float32]):
    """pixel_values [1, 3, size, size], kept in files: 128 pictures of 1024 px would need 1.6 GB of memory."""

    def __init__(self, folder: Path, names: Sequence[Path] = ()) -> None:
        self._folder, self.names = folder, list(names)

    def add(self, pixel_values: Float32) -> None:
        path = self._folder / f"picture-{len(self.names)}-{pixel_values.shape[-1]}.npy"
        np.save(path, np.rint(pixel_values * 255).astype(np.uint8))
        self.names.append(path)

    def digest(self, index: int) -> str:
        """sha256 of a picture's shape and pixels."""
        return hashlib.sha256(self.names[index].read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Float32: ...
    @overload
    def __getitem__(self, index: slice) -> _Pictures: ...
    def __getitem__(self, index: int | slice) -> Float32 | _Pictures:
        if isinstance(index, slice):
            return _Pictures(self._folder, self.names[index])
        pixels: Float32 = np.load(self.names[index]).astype(np.float32) / np.float32(255)
        return pixels


def _weights_key(source: Checkpoint) -> str:
    """Identifies the weights that a cache belongs to by names, sizes and times of their files, without reading them."""
    files = [*source.weights, *(source.adapter.files if source.adapter else [])]
    return _digest(source.location, *(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@torch.inference_mode()
def _encode(
    encoder: FastViTHD, projector: nn.Sequential, pictures: _Pictures, cache: FeatureCache | None, progress: Progress
) -> list[Float32]:
    """Image features [tokens, hidden] of every picture in FP32, from the cache where it has them."""
    progress.stage("encode", len(pictures))
    features = []
    for index in range(len(pictures)):
        digest = pictures.digest(index)
        found = cache.read(digest) if cache else None
        if found is None:
            found = projector(image_tokens(encoder(torch.from_numpy(pictures[index]))))[0].numpy()
            if cache:
                cache.write(digest, found)
        features.append(found)
        progress.advance()
    return features


def _question(example: Example, manifest: Manifest, tokenizer: TextTokenizer, *, special_tokens: bool) -> Question:
    """An example as the runtime would ask it, with its most frequent answer, or with a stock answer if the data has none."""
    template = ChatTemplate(tokenizer, manifest)
    known = bool(example.answers) and example.prompt is not None
    answer = max(set(example.answers), key=example.answers.count) if known else ANSWER
    turn = template.turn(example.prompt or QUESTION, (manifest.vision.tokens,), special_tokens=special_tokens)
    asked = [*template.opening(), *turn]
    return Question([*asked, *tokenizer.encode(answer, special_tokens=special_tokens), template.closing()[0]], len(asked), known)


def _enough(conversations: Iterator[tuple[Question, Float32]]) -> Iterator[tuple[list[int], Float32]]:
    """Ids and image features of conversations, until they have POSITIONS positions."""
    positions = 0
    for question, features in conversations:
        yield question.ids, features
        positions += len(question.ids)
        if positions >= POSITIONS:
            return


def _groups(vision: VisionQuantization) -> list[GroupReport]:
    """The records, grouped for the report; a layer that is not a candidate for INT8 is a group by itself."""
    groups: dict[str, list[LayerRecord]] = {}
    for record in vision.records:
        groups.setdefault(record.group or record.name, []).append(record)
    return [
        GroupReport(
            name=name,
            stage=vision_stage(name),
            kind="+".join(dict.fromkeys(record.kind for record in records)),
            macs=sum(record.macs for record in records),
            weight_bytes=sum(record.weight_bytes for record in records),
            cosine_loss=records[0].cosine_loss,
            relative_error=records[0].squared_error,
            decision=_DECISIONS[records[0].decision],
            reason=records[0].reason,
            layers=[
                LayerReport(
                    name=record.name,
                    kind=record.kind,
                    macs=record.macs,
                    weight_bytes=record.weight_bytes,
                    observed_max=record.largest or None,
                    clip=record.clip or None,
                    decision=_DECISIONS[record.decision],
                    reason=record.reason,
                )
                for record in records
            ],
        )
        for name, records in groups.items()
    ]


def _matrix(decoder: DecoderQuantization, name: str) -> MatrixReport:
    matrix = decoder.matrix(name)
    bits = 4 if matrix.values.dtype.name == "int4" else 8
    block = matrix.values.shape[0] // matrix.scales.shape[0] if matrix.scales.ndim > 1 else 0
    size = matrix.values.size * bits // 8 + matrix.scales.size * decoder.scale_type.itemsize
    return MatrixReport(name, bits, block, size, decoder.rounded[name], decoder.errors[name])


def _figures(before: Score, after: Score, lost: float, allowed: float) -> dict[str, float]:
    figures = {"points_lost": lost, "points_allowed": allowed, "token_agreement": before.agreement(after)}
    if before.exact_match is not None and after.exact_match is not None:
        figures |= {"exact_match_before": before.exact_match, "exact_match_after": after.exact_match}
    return figures
