"""Checks a backend on the stored pictures and the stored passage: against the reference, and against its own earlier answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.protocol import Backend, ImageFeatures, StepOutput
from fastvlm_edge.backends.verification.cases import PASSAGE, STEPS_TOGETHER, TOGETHER, Case, all_cases, feed, together
from fastvlm_edge.backends.verification.compare import Rows, cache_errors, candidates_fault, cosines, divergence, in_steps, regret, top_rows
from fastvlm_edge.backends.verification.conversation import PICTURES, stored_pictures
from fastvlm_edge.backends.verification.reference import Reference
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.nvidia.cuda import OutOfDeviceMemory
from fastvlm_edge.progress import Progress

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Bounds:
    """What is accepted of a backend whose decoder computes in one type (docs/tensorrt.md says where the figures come from)."""

    token: float
    """Smallest cosine of a visual token."""
    median: float
    """Smallest median of these cosines in a picture."""
    divergence: float
    """Largest KL divergence of a row of logits, in nats."""
    steps: float
    """A row may prefer another id if the reference's preference is at most this many steps of the type at the row's spread."""
    cache: float
    """Largest relative error of the keys or values of a position in one layer, between two ways to compute them."""


BOUNDS = {
    "float32": Bounds(token=0.998, median=0.9995, divergence=0.01, steps=32, cache=0.25),
    "float16": Bounds(token=0.998, median=0.9995, divergence=0.01, steps=32, cache=0.25),
    "bfloat16": Bounds(token=0.98, median=0.995, divergence=0.1, steps=32, cache=0.25),
}
"""By the decoder's type. TensorRT computes float32 products in TF32, which has the mantissa of float16."""
NOISY = Bounds(token=0.95, median=0.99, divergence=0.2, steps=256, cache=0.25)
"""Where one side quantises the inputs of integer weights to INT8: onnxruntime on a CPU as the reference, or a calibrated encoder."""
MOST_TOGETHER = 8
"""At most this many conversations are decoded together."""
MANTISSA = {"float32": 10, "float16": 10, "bfloat16": 7}


class Checked(Backend, Protocol):
    """A backend that also takes image features that it did not compute itself, and shows its cache."""

    def upload(self, features: Float32) -> ImageFeatures:
        """Image features [rows, hidden] for `step`."""

    def cached(self, length: int, first: int = 0) -> Float32:
        """Keys and values of the positions `first` to `length - 1` in the cache: [layers, 2, kv_heads, positions, head_dim]."""


@dataclass(frozen=True)
class Fault:
    """One figure outside its bound."""

    part: str
    """`vision` or `decoder`"""
    text: str
    """Case, row, figure and bound, as a sentence."""


@dataclass
class Findings:
    """The result of a check."""

    figures: dict[str, Any]
    faults: list[Fault] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What was computed, as evidence."""

    def keep(self, folder: Path, reference: Reference) -> str:
        """Save the results of both sides as in `save`. Returns a clause that says where they are, or why they could not be saved."""
        try:
            self.save(folder, reference)
        except OSError as error:
            return f"the results could not be saved: {error.strerror}"
        return f"the results of both are in {folder}"

    def save(self, folder: Path, reference: Reference) -> None:
        """Write figures, faults, and the results of both sides into `folder`, which is created. Raises OSError."""
        folder.mkdir(exist_ok=True)
        arrays: dict[str, Any] = self.arrays
        np.savez_compressed(folder / "answers.npz", **arrays)
        reference.write(folder)
        document = {**self.figures, "faults": [asdict(fault) for fault in self.faults]}
        (folder / "figures.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def check(
    backend: Checked, reference: Reference, manifest: Manifest, progress: Progress, name: str, *, cases: Sequence[Case] | None = None
) -> Findings:
    """Run `cases`, by default all, on `backend` and compare. Leaves its cache empty. `name` is what is checked, as text for users."""
    cases = all_cases(reference.passage, manifest.decoder.context) if cases is None else cases
    progress.stage(f"verifying {name}", sum(case.positions for case in cases))
    dtype = manifest.decoder.dtype
    own = BOUNDS[dtype]
    bounds = NOISY if reference.noisy else own
    findings = Findings({"reference": reference.program, "bounds": asdict(bounds)})
    quantized_inputs = "image_features_w8a8" in manifest.parity
    _check_vision(backend, reference, manifest, NOISY if quantized_inputs else bounds, findings)
    decoder = _DecoderCheck(backend, reference, bounds, own, 2.0 ** -MANTISSA[dtype])
    findings.figures["positions"] = 0
    findings.figures["cases"] = []
    for case in cases:
        try:
            decoder.run(case, progress)
        except OutOfDeviceMemory as error:
            if not case.fills:
                raise
            progress.note(f"warning: not verified with {case.name}: {error.what}")
            continue
        finally:
            backend.reset()
        findings.figures["cases"].append(decoder.summary(case.name))
        findings.figures["positions"] = max(findings.figures["positions"], *(call.at + len(call.ids) for call in case.calls))
    starts = together(reference.passage, manifest.decoder.vocab, min(backend.slots, MOST_TOGETHER))
    if len(starts) > 1:
        try:
            decoder.run_together(starts)
            findings.figures["cases"].append(decoder.summary(TOGETHER))
        except OutOfDeviceMemory as error:
            progress.note(f"warning: not verified with {TOGETHER}: {error.what}")
        finally:
            for slot in range(len(starts)):
                backend.reset(slot)
    findings.faults += decoder.faults
    findings.arrays.update(decoder.arrays())
    progress.done()
    return findings


def _check_vision(backend: Checked, reference: Reference, manifest: Manifest, bounds: Bounds, findings: Findings) -> None:
    vision = manifest.vision
    for size in vision.every_size:
        pixels, suffix = stored_pictures(size, vision.geometry), vision.suffix(size)
        found = np.stack([backend.encode(picture).numpy() for picture in pixels])
        findings.arrays[f"features{suffix}"] = found
        figures = findings.figures[f"image_features{suffix}"] = {}
        expected = reference.features_at(size, vision.image_size)
        at = f" at {size} px" if vision.other_sizes else ""
        for name, ours, theirs in zip(PICTURES, found, expected, strict=True):
            similar = cosines(ours, theirs)
            worst, median = int(similar.argmin()), float(np.median(similar))
            figures[name] = {"worst": float(similar[worst]), "token": worst, "median": median}
            if not similar[worst] >= bounds.token:
                text = f"visual token {worst} of {name}{at} has a cosine of {similar[worst]:.5f}, at least {bounds.token} is required"
                findings.faults.append(Fault("vision", text))
            elif not median >= bounds.median:
                text = f"the median cosine of the visual tokens of {name}{at} is {median:.5f}, at least {bounds.median} is required"
                findings.faults.append(Fault("vision", text))


@dataclass(frozen=True)
class _Row:
    """The comparison of one row."""

    case: str
    text: str
    position: int
    found: Rows
    divergence: float
    """From the reference; 0 for a text that it does not know."""
    drift: float
    """Divergence from the row that the backend itself computed for this position before."""
    steps: float
    """By how many steps of the type the reference prefers its own id."""


class _DecoderCheck:
    """Runs cases and collects rows. `step` is the distance of two neighbouring values of the decoder's type near 1."""

    def __init__(self, backend: Checked, reference: Reference, bounds: Bounds, own: Bounds, step: float) -> None:
        self._backend, self._reference, self._bounds, self._own, self._step = backend, reference, bounds, own, step
        self._pictures = tuple(backend.upload(features) for features in reference.features)
        self._index = {position: index for index, position in enumerate(reference.passage.positions)}
        self._before: dict[tuple[str, int], tuple[str, Rows]] = {}
        """(text, position) -> the case that computed its row first, and the row."""
        self._cache: Float32 | None = None
        """Keys and values of the whole passage, as the first case left them."""
        self._cache_errors: dict[str, float] = {}
        self._rows: list[_Row] = []
        self._logits: Float32 | None = None
        """The whole first faulty row."""
        self.faults: list[Fault] = []

    def run(self, case: Case, progress: Progress) -> None:
        """Run the calls of a case. Raises FastVLMError if the backend fails."""
        backend = self._backend
        backend.reset()
        written: list[tuple[int, int, Float32]] = []
        for call in case.calls:
            if backend.lengths[0] > call.at:
                self._compare_earlier(case, written)
                written = []
                backend.truncate(call.at)
            asked = [position - call.at for position in call.compared]
            pictures = tuple(self._pictures[index] for index in call.pictures)
            output = backend.step(call.ids, pictures, logit_positions=asked or None, want_logits=bool(asked))
            for index, position in enumerate(call.compared):
                self._compare(case.name, call.text, position, output, index)
            if case.fills:
                written.append((call.at, backend.lengths[0], self._norms(call.at, backend.lengths[0])))
            progress.advance(len(call.ids))
        self._compare_cache(case)

    def run_together(self, starts: Sequence[int]) -> None:
        """Decode as many conversations together as there are `starts`, each of which continues the passage from there."""
        backend, passage = self._backend, self._reference.passage
        backend.reset()
        for call in feed(passage, sorted({0, min(passage.turn, starts[0]), starts[0]})):
            backend.step(call.ids, tuple(self._pictures[index] for index in call.pictures))
        for row, start in enumerate(starts[1:], 1):
            backend.copy(0, row, start)
        for number in range(STEPS_TOGETHER):
            output = backend.decode([passage.ids[start + number] for start in starts], want_logits=True)
            for row, start in enumerate(starts):
                self._compare(TOGETHER, PASSAGE, start + number, output, row)

    def _norms(self, first: int, length: int) -> Float32:
        """Squared norms of the keys and values of the positions `first` to `length - 1`: [layers, 2, kv_heads, positions]."""
        norms: Float32 = np.square(self._backend.cached(length, first)).sum(axis=4)
        return norms

    def _compare_earlier(self, case: Case, written: Sequence[tuple[int, int, Float32]]) -> None:
        """What calls have written, as (first, length, norms), has to be in the cache still, though it has grown since."""
        for first, length, norms in written:
            changed = np.flatnonzero((self._norms(first, length) != norms).any(axis=(0, 1, 2)))
            if len(changed):
                text = f"in the case '{case.name}', keys or values of position {first + changed[0]} changed while later ids were fed"
                self.faults.append(Fault("decoder", text))
                return

    def _compare_cache(self, case: Case) -> None:
        """Every case ends with the passage in the cache: its keys and values have to be those of the first case."""
        cache = self._backend.cached(len(self._reference.passage.ids))
        if self._cache is None:
            self._cache = cache
        errors = np.where(np.square(cache).sum(axis=(2, 4)).all(axis=(0, 1)), cache_errors(cache, self._cache), 1.0)
        worst = int(errors.argmax())
        self._cache_errors[case.name] = float(errors[worst])
        if not errors[worst] <= self._own.cache:
            text = (
                f"in the case '{case.name}', keys or values of position {worst} are {errors[worst]:.2g} of their size away from those in "
                f"the case '{next(iter(self._cache_errors))}', at most {self._own.cache:g} is accepted"
            )
            self.faults.append(Fault("decoder", text))

    def _compare(self, case: str, text: str, position: int, output: StepOutput, index: int) -> None:
        assert output.logits is not None
        logits = output.logits[index]
        found = top_rows(logits[None])
        first, before = self._before.setdefault((text, position), (case, found))
        expected = self._reference.rows[self._index[position]] if text == PASSAGE else None
        distance = 0.0 if expected is None else divergence(logits, expected)
        preferred = 0.0 if expected is None else regret(logits, expected)
        steps = 0.0 if expected is None else in_steps(preferred, expected, self._step)
        row = _Row(case, text, position, found, distance, divergence(logits, before), steps)
        self._rows.append(row)
        where = f"in the case '{case}', the row of position {position}"
        wrong = candidates_fault(logits, output.top_values[index], output.top_ids[index], float(output.log_normalizer[index]))
        if not row.divergence <= self._bounds.divergence:
            fault = f"{where} has a KL divergence of {row.divergence:.3g}, at most {self._bounds.divergence} is accepted"
        elif not row.steps <= self._bounds.steps:
            fault = (
                f"{where} prefers id {found.ids[0, 0]}, which the reference puts {preferred:.3g} below its best: "
                f"{row.steps:.0f} steps of the type, at most {self._bounds.steps:g} are accepted"
            )
        elif not row.drift <= self._own.divergence:
            fault = (
                f"{where} has a KL divergence of {row.drift:.3g} from the row of the same ids in the case '{first}', "
                f"at most {self._own.divergence} is accepted"
            )
        elif wrong is not None:
            fault = f"{where} has other outputs than its logits: {wrong}"
        else:
            return
        if self._logits is None:
            self._logits = logits.copy()
        self.faults.append(Fault("decoder", fault))

    def summary(self, case: str) -> dict[str, Any]:
        """The worst figures of a case."""
        rows = [row for row in self._rows if row.case == case]
        worst = max(rows, key=lambda row: row.divergence)
        return {
            "case": case,
            "rows": len(rows),
            "divergence": worst.divergence,
            "position": worst.position,
            "drift": max(row.drift for row in rows),
            "steps": max(row.steps for row in rows),
            "cache": self._cache_errors.get(case, 0.0),
            "greedy_agreement": sum(row.steps == 0 for row in rows) / len(rows),
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All rows, and the whole first faulty row, as evidence."""
        rows = self._rows
        columns = {name: np.array([getattr(row, name) for row in rows]) for name in ("case", "text", "position", "divergence", "drift")}
        parts = {name: np.concatenate([getattr(row.found, name) for row in rows]) for name in ("ids", "values", "normalizer")}
        return {**columns, **parts, **({} if self._logits is None else {"first_faulty_logits": self._logits})}
