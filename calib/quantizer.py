"""Calibrated quantisation as a step of the conversion: data in, integers for encoder and decoder out, and the report on both."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastvlm_edge.backends.verification import ANSWER, QUESTION
from fastvlm_edge.calib.decoder import DecoderQuantization, calibrate_decoder
from fastvlm_edge.calib.encoder.cache import FeatureCache, ObservationCache
from fastvlm_edge.calib.encoder.search import LayerRecord, VisionQuantization, VisionSearch
from fastvlm_edge.calib.judge import Question, Score, drop, score
from fastvlm_edge.calib.report.document import (
    CalibrationData,
    Decision,
    DecoderReport,
    GroupReport,
    LayerReport,
    MatrixReport,
    QuantizationReport,
    VisionReport,
    write_report,
)
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint
from fastvlm_edge.convert.graphs.placement import check_placement
from fastvlm_edge.convert.precision import PrecisionPlan
from fastvlm_edge.convert.reference.fastvithd import FastViTHD, image_tokens
from fastvlm_edge.convert.reference.quantized_decoder import QuantizedDecoder
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import Dataset, Example, open_data
from fastvlm_edge.inputs.preprocess import preprocess
from fastvlm_edge.inputs.prompt import ChatTemplate
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.engine_record import PARTS
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.progress import Progress

Float32 = npt.NDArray[np.float32]

MINIMUM = 8
"""Pictures below which ranges say nothing."""
VISION_PIXELS = 8 << 20
"""Enough for ranges and second moments of the encoder, whatever the pictures' size: 32 of 512 px, MINIMUM of 1024 px. More of these take
minutes each and say little: each has thousands of positions."""
POSITIONS = 40_000
"""Enough positions of conversations for the decoder."""
DAMAGE = 0.001
"""1 - cosine of the image features that a plan may cost where no accuracy is asked for."""
DAMAGES = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001, 0.0)
"""Tried in this order until the accuracy holds; the last leaves the encoder in floats."""
_DECISIONS: dict[str, Decision] = {"w8a8": "int8", "weights": "int8 weights", "wide": "wide"}
JUDGED = 100
"""Questions that judge the accuracy; none of them calibrates."""


@dataclass(frozen=True)
class Options:
    """What `fastvlm-edge convert --calib` was told."""

    source: str
    """As `open_data` takes it."""
    images: Path | None = None
    limit: int = 128
    """Examples that calibrate."""
    accuracy_drop: float | None = None
    """Points that may be lost, of 100; None bounds the damage to the image features instead."""
    cache: Path | None = None
    """Folder for what was observed."""


@dataclass
class Calibrated:
    """The result; close it when the weights are written."""

    vision: VisionQuantization
    decoder: DecoderQuantization
    source: str
    used: int
    skipped: list[str]
    accuracy: dict[str, float] = field(default_factory=dict)
    """Figures of the judge, where it was asked."""
    seconds: float = 0.0

    accuracy_drop: float | None = None
    """As it was asked for."""

    def close(self) -> None:
        """Remove the temporary files of the decoder's matrices."""
        self.decoder.close()

    def write_report(self, directory: Path, manifest: Manifest) -> None:
        """`quantization.json` and `quantization.html` in the model directory."""
        placements = {part: check_placement(directory / f"{part}.onnx") for part in PARTS}
        features, groups = manifest.parity["image_features_w8a8"], _groups(self.vision)
        write_report(
            directory,
            QuantizationReport(
                model=manifest.name,
                precision=manifest.precision,
                toolkit_version=manifest.toolkit_version,
                date=date.today().isoformat(),
                calibration=CalibrationData(self.source, self.used, self.skipped, round(self.seconds, 1)),
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


class Quantizer:
    """Reads the data when the conversion needs it; implements `convert.convert.Calibrator`."""

    def __init__(self, options: Options) -> None:
        """Raises FastVLMError where the data cannot be opened or has too little."""
        if options.limit < MINIMUM:
            raise FastVLMError(f"calibration with {options.limit} examples is too little; give at least {MINIMUM}")
        if options.accuracy_drop is not None and not options.accuracy_drop > 0:
            raise FastVLMError(f"an accuracy drop of {options.accuracy_drop:g} points cannot be promised; give more than 0")
        self.options = options
        judged = 0 if options.accuracy_drop is None else JUDGED
        self.minimum = MINIMUM if options.accuracy_drop is None else MINIMUM * 4 // 3 + 1
        self.data: Dataset = open_data(options.source, images=options.images, limit=options.limit + judged)
        if len(self.data) < self.minimum:
            judges = "" if options.accuracy_drop is None else ", with some to judge the accuracy drop by,"
            raise FastVLMError(f"{options.source} has {len(self.data)} examples and calibration{judges} needs at least {self.minimum}")

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
        """Quantise for `plan`. Temporary files go to `folder`. Raises FastVLMError where data or accuracy do not suffice."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".calibration-") as name:
            examples, pictures = self._read(manifest, Path(name), progress)
            judged = len(examples) - self._count(len(examples))
            used = len(examples) - judged
            questions = [_question(example, manifest, tokenizer) for example in examples]
            features = _encode(encoder, projector, pictures, self._feature_cache(source), progress)

            search = VisionSearch(encoder, projector, plan, folder=Path(name), progress=progress)
            seen = pictures[: min(used, max(MINIMUM, VISION_PIXELS // manifest.vision.image_size**2))]
            search.observe(seen, cache=self._cache(source, seen, search.key()))
            search.measure(seen[:2])
            conversations = itertools.islice(zip(questions, features, strict=True), used)
            decoder = calibrate_decoder(source, _enough(conversations), plan, progress=progress, directory=folder)
            try:
                rest = questions[used:], features[used:], pictures[used:]
                vision, accuracy = self._choose(source, plan, search, seen, decoder, rest, progress)
            except BaseException:
                decoder.close()
                raise
        skipped = [f"{item.id}: {item.reason}" for item in self.data.skipped]
        seconds = time.perf_counter() - began
        return Calibrated(vision, decoder, self.options.source, used, skipped, accuracy, seconds, self.options.accuracy_drop)

    def _count(self, total: int) -> int:
        """How many of `total` examples calibrate: all but those that judge, and three quarters where there are few."""
        return total if self.options.accuracy_drop is None else max(min(self.options.limit, total * 3 // 4), MINIMUM)

    def _read(self, manifest: Manifest, folder: Path, progress: Progress) -> tuple[list[Example], _Pictures]:
        progress.stage(f"read {self.data.source}", len(self.data))
        pictures, examples = _Pictures(folder), []
        for example, image in self.data.read(minimum=self.minimum):
            pictures.add(preprocess(image, manifest.vision.image_size, manifest.vision.geometry))
            examples.append(example)
            progress.advance()
        for item in self.data.skipped:
            progress.note(f"skipped {item.id}: {item.reason}")
        return examples, pictures

    def _cache(self, source: Checkpoint, seen: _Pictures, recipe: str) -> ObservationCache | None:
        if self.options.cache is None:
            return None
        key = _digest(_weights_key(source), *map(seen.digest, range(len(seen))))
        return ObservationCache(self.options.cache / f"vision-{key[:16]}.npz", f"{key} {recipe}")

    def _feature_cache(self, source: Checkpoint) -> FeatureCache | None:
        if self.options.cache is None:
            return None
        return FeatureCache(self.options.cache / f"features-{_weights_key(source)[:16]}")

    def _choose(
        self,
        source: Checkpoint,
        plan: PrecisionPlan,
        search: VisionSearch,
        seen: Sequence[Float32],
        decoder: DecoderQuantization,
        judged: tuple[Sequence[Question], Sequence[Float32], Sequence[Float32]],
        progress: Progress,
    ) -> tuple[VisionQuantization, dict[str, float]]:
        """The cheapest plan of the encoder: within DAMAGE, or the first of DAMAGES that keeps the accuracy on the questions `judged`."""
        allowed = self.options.accuracy_drop
        if allowed is None:
            return search.choose(seen, bound=DAMAGE), {}
        questions, features, pictures = judged
        layers = source.text.layers
        progress.stage("judge the original", layers)
        before = score(source, questions, features, progress.advance)
        quantized = QuantizedDecoder(source, decoder, embedding=bool(plan.embedding.bits))
        lost = 0.0
        for damage in DAMAGES:
            vision = search.choose(seen, bound=damage)
            search.apply(vision)
            progress.stage(f"judge a damage of {damage:g}", layers + len(pictures))
            found = []
            for picture in pictures:
                found.append(search.run(torch.from_numpy(picture))[0].numpy())
                progress.advance()
            after = score(quantized, questions, found, progress.advance)
            lost = drop(before, after)
            progress.note(f"a damage of {damage:g} to the image features costs {lost:.2f} points")
            if lost <= allowed:
                return vision, _figures(before, after, lost, allowed)
        raise FastVLMError(
            f"{lost:.2f} points are lost with the encoder in floats already, {allowed:g} are allowed: it is the decoder; "
            "choose --precision int8 instead of int4, or fp16, or allow more with --accuracy-drop"
        )


class _Pictures(Sequence[Float32]):
    """pixel_values [1, 3, size, size] in files: 128 of 1024 px would be 1.6 GB."""

    def __init__(self, folder: Path, names: Sequence[Path] = ()) -> None:
        self._folder, self._names = folder, list(names)

    def add(self, pixel_values: Float32) -> None:
        path = self._folder / f"picture-{len(self._names)}.npy"
        np.save(path, np.rint(pixel_values * 255).astype(np.uint8))
        self._names.append(path)

    def digest(self, index: int) -> str:
        """Of a picture's shape and pixels."""
        return hashlib.sha256(self._names[index].read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Float32: ...
    @overload
    def __getitem__(self, index: slice) -> _Pictures: ...
    def __getitem__(self, index: int | slice) -> Float32 | _Pictures:
        if isinstance(index, slice):
            return _Pictures(self._folder, self._names[index])
        pixels: Float32 = np.load(self._names[index]).astype(np.float32) / np.float32(255)
        return pixels


def _weights_key(source: Checkpoint) -> str:
    """Says which weights a cache is of, without reading them."""
    return _digest(source.location, *(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in source.weights))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@torch.inference_mode()
def _encode(
    encoder: FastViTHD, projector: nn.Sequential, pictures: _Pictures, cache: FeatureCache | None, progress: Progress
) -> list[Float32]:
    """Image features [tokens, hidden] in FP32."""
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


def _question(example: Example, manifest: Manifest, tokenizer: TextTokenizer) -> Question:
    """What the runtime would ask; the most frequent known answer, or a stored one where there is none."""
    template = ChatTemplate(tokenizer, manifest)
    known = bool(example.answers) and example.prompt is not None
    answer = max(set(example.answers), key=example.answers.count) if known else ANSWER
    asked = [*template.opening(), *template.turn(example.prompt or QUESTION, (manifest.vision.tokens,))]
    return Question([*asked, *tokenizer.encode(answer), template.closing()[0]], len(asked), known)


def _enough(conversations: Iterator[tuple[Question, Float32]]) -> Iterator[tuple[list[int], Float32]]:
    """Conversations until there are POSITIONS."""
    positions = 0
    for question, features in conversations:
        yield question.ids, features
        positions += len(question.ids)
        if positions >= POSITIONS:
            return


def _groups(vision: VisionQuantization) -> list[GroupReport]:
    """The records group by group; a layer that is no candidate is a group of its own."""
    groups: dict[str, list[LayerRecord]] = {}
    for record in vision.records:
        groups.setdefault(record.group or record.name, []).append(record)
    return [
        GroupReport(
            name=name,
            stage=_stage(name),
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


def _stage(name: str) -> str:
    """The key of VISION_STAGES that a layer or group belongs to."""
    part, _, rest = name.removeprefix("vision.").partition(".")
    return f"stage{int(rest.partition('.')[0]) + 1}" if part == "stages" else part


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
