"""From a model directory with engines to a TensorRT backend: find the pair that runs here, and believe none that was never compared."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.tensorrt import Platform, TensorRTBackend
from fastvlm_edge.backends.verification import Answers, answer, compare
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.engine_record import EngineRecord, engine_folders, mismatch, read_record
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.nvidia.drivers import open_cuda
from fastvlm_edge.nvidia.tensorrt_library import find_library
from fastvlm_edge.progress import Progress, SilentProgress

BOUNDS = {"float32": 0.999, "float16": 0.99, "bfloat16": 0.97}
"""Smallest cosine of an engine's features and logits with those of onnxruntime on the CPU, by the decoder's type (docs/tensorrt.md)."""
EVIDENCE = "mismatch"
"""`<target>.mismatch`, beside the engines, has what a refused pair computed."""

Opener = Callable[[str], Platform]
"""Name of a library -> what engines of it run on. Raises FastVLMError where that is not here."""


def open_platform(library: str) -> Platform:
    """The GPU and the library of that name."""
    found = find_library((library,))
    cuda = open_cuda()
    return Platform(cuda, found.name, found.version, found.load)


def load_engines(
    directory: Path, manifest: Manifest, *, progress: Progress | None = None, threads: int | None = None, opener: Opener = open_platform
) -> TensorRTBackend:
    """Load the engines of a model directory that run on this machine; compare them with onnxruntime first where nobody ever did.

    Raises FastVLMError with the command that mends it where there are none, or they are refused.
    """
    progress = progress or SilentProgress()
    folder, record, platform = _choose(directory, manifest, opener)
    try:
        check_files(folder, record)
    except BaseException:
        platform.cuda.close()
        raise
    if record.verified:
        return TensorRTBackend(folder, manifest, platform, progress=progress)
    return _load_unverified(directory, folder, record, manifest, platform, progress, threads)


def _choose(directory: Path, manifest: Manifest, opener: Opener) -> tuple[Path, EngineRecord, Platform]:
    folders = engine_folders(directory)
    if not folders:
        raise FastVLMError(f"{directory} has no engines; run: fastvlm-edge build {directory}")
    why: list[str] = []
    for folder in folders:
        try:
            record = read_record(folder)
            platform = opener(record.library)
        except FastVLMError as error:
            why.append(str(error))
            continue
        device = platform.cuda.device
        reason = mismatch(record, manifest, platform.library, platform.version, device.name, device.compute_capability)
        if reason is None:
            return folder, record, platform
        platform.cuda.close()
        why.append(f"the engines in {folder} do not run here: {reason}; run: fastvlm-edge build {directory} --force")
    raise FastVLMError(why[0])


def check_files(folder: Path, record: EngineRecord) -> None:
    """Raises FastVLMError where an engine is missing or not as long as it was."""
    for name, entry in record.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry.bytes:
            what = "is missing" if size < 0 else f"has {size} bytes instead of {entry.bytes}"
            raise FastVLMError(f"{path} {what}; run: fastvlm-edge build {folder.parents[1]} --target {record.target} --force")


def _load_unverified(
    directory: Path,
    folder: Path,
    record: EngineRecord,
    manifest: Manifest,
    platform: Platform,
    progress: Progress,
    threads: int | None,
) -> TensorRTBackend:
    backend, figures = verify_engines(directory, folder, folder, manifest, platform, progress, threads)
    with contextlib.suppress(OSError):  # a read-only directory: they are compared again at the next load
        dataclasses.replace(record, parity=figures).write(folder)
    return backend


def verify_engines(
    directory: Path,
    folder: Path,
    place: Path,
    manifest: Manifest,
    platform: Platform,
    progress: Progress,
    threads: int | None = None,
) -> tuple[TensorRTBackend, dict[str, Any]]:
    """Load the engines in `folder` and compare them with onnxruntime on the CPU; the backend, which owns `platform`, and the figures.

    onnxruntime answers first and is closed, so that only one of the two needs its memory. Raises FastVLMError where they differ, with the
    evidence beside `place`, where the engines are or will be.
    """
    try:
        tokenizer = TextTokenizer(directory / "tokenizer.json")
        expected = reference_answers(directory, manifest, tokenizer, progress, threads)
    except BaseException:
        platform.cuda.close()
        raise
    backend = TensorRTBackend(folder, manifest, platform, progress=progress)
    try:
        progress.stage(f"verifying the engines for {place.name}, once")
        figures = judge(answer(backend, tokenizer, manifest), expected, manifest, place)
        backend.save_kernels()
    except BaseException:
        backend.close()
        raise
    finally:
        progress.done()
    return backend, {**figures, "device": platform.cuda.device.name}


def reference_answers(directory: Path, manifest: Manifest, tokenizer: TextTokenizer, progress: Progress, threads: int | None) -> Answers:
    """What onnxruntime says on the CPU."""
    reference = OrtBackend(directory, manifest, threads=threads, progress=progress)
    try:
        progress.stage("asking onnxruntime for comparison")
        return answer(reference, tokenizer, manifest)
    finally:
        reference.close()
        progress.done()


def judge(found: Answers, expected: Answers, manifest: Manifest, place: Path) -> dict[str, Any]:
    """Figures of the comparison. Raises FastVLMError, with the evidence beside `place`, where the engines compute something else."""
    bound = BOUNDS[manifest.decoder.dtype]
    features, logits = compare(found.features, expected.features), compare(found.logits, expected.logits)
    greedy = float((found.logits.argmax(1) == expected.logits.argmax(1)).mean())
    figures: dict[str, Any] = {
        "image_features": dataclasses.asdict(features),
        "logits": {**dataclasses.asdict(logits), "greedy_agreement": greedy, "positions": len(found.logits)},
        "bound": bound,
    }
    for name, difference in (("vision", features), ("decoder", logits)):
        if not difference.cosine >= bound:
            kept = _keep(place.parent / f"{place.name}.{EVIDENCE}", found, expected, figures)
            raise FastVLMError(
                f"{place / name}.engine does not compute what onnxruntime does: cosine {difference.cosine:.5f}, at least {bound} is "
                f"needed; {kept}, please report it, and use --backend ort"
            )
    return figures


def _keep(folder: Path, found: Answers, expected: Answers, figures: dict[str, Any]) -> str:
    """Save both sides; a few words on where they are."""
    try:
        folder.mkdir(exist_ok=True)
        sides = {"engine": found, "onnxruntime": expected}
        arrays = {f"{side}_{name}": value for side, answers in sides.items() for name, value in vars(answers).items()}
        np.savez_compressed(folder / "answers.npz", **arrays)
        (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        return f"the evidence could not be kept ({error.strerror})"
    return f"the evidence is in {folder}"
