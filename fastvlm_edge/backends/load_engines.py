"""Load the TensorRT backend: find the pair of engines that runs on this machine, and verify it if it never was."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.tensorrt import Platform, TensorRTBackend
from fastvlm_edge.backends.verification.compare import compare
from fastvlm_edge.backends.verification.conversation import Answers, answer
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.engine_record import EngineRecord, engine_folders, mismatch, read_record
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.nvidia.drivers import open_cuda
from fastvlm_edge.nvidia.tensorrt_library import find_library
from fastvlm_edge.progress import Progress, SilentProgress

BOUNDS = {"float32": 0.999, "float16": 0.99, "bfloat16": 0.97}
"""Smallest accepted cosine similarity to the features and logits of onnxruntime on the CPU, by the decoder's type (docs/tensorrt.md)."""
EVIDENCE = "mismatch"
"""Results of a rejected pair of engines are kept in `<target>.mismatch`, next to the directory of the engines."""


def open_platform(library: str) -> Platform:
    """Open the GPU and the TensorRT library of that name. Raises FastVLMError if either is missing."""
    found = find_library((library,))
    cuda = open_cuda()
    return Platform(cuda, found.name, found.version, found.load)


def load_engines(directory: Path, manifest: Manifest, *, threads: int | None = None, progress: Progress | None = None) -> TensorRTBackend:
    """Load the engines of a model directory that run on this machine. If they were never compared with onnxruntime, do that first.

    `threads` is for onnxruntime in that comparison. Raises FastVLMError, with the command to run, if there are no engines or TensorRT
    refuses them, or if they disagree with onnxruntime.
    """
    progress = progress or SilentProgress()
    folder, record, platform = _choose(directory, manifest)
    try:
        check_files(folder, record)
    except BaseException:
        platform.cuda.close()
        raise
    if record.verified:
        return TensorRTBackend(folder, manifest, platform, progress=progress)
    backend, figures = verify_engines(directory, folder, folder, manifest, platform, progress, threads)
    with contextlib.suppress(OSError):  # in a read-only directory they are compared at every load
        dataclasses.replace(record, parity=figures).write(folder)
    return backend


def _choose(directory: Path, manifest: Manifest) -> tuple[Path, EngineRecord, Platform]:
    folders = engine_folders(directory)
    if not folders:
        raise FastVLMError(f"{directory} has no engines", f"run: fastvlm-edge build {directory}")
    errors: list[FastVLMError] = []
    for folder in folders:
        try:
            record = read_record(folder)
            platform = open_platform(record.library)
        except FastVLMError as error:
            errors.append(error)
            continue
        device = platform.cuda.device
        reason = mismatch(record, manifest, platform.library, platform.version, device.name, device.compute_capability)
        if reason is None:
            return folder, record, platform
        platform.cuda.close()
        again = f"run: fastvlm-edge build {directory} --force"
        errors.append(FastVLMError(f"the engines in {folder} do not run here: {reason}", again))
    raise errors[0]


def check_files(folder: Path, record: EngineRecord) -> None:
    """Raise FastVLMError if an engine file is missing or its size is not the recorded one."""
    for name, entry in record.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry.bytes:
            what = "is missing" if size < 0 else f"has {size} bytes instead of {entry.bytes}"
            raise FastVLMError(f"{path} {what}", f"run: fastvlm-edge build {folder.parents[1]} --target {record.target} --force")


def verify_engines(
    directory: Path,
    folder: Path,
    place: Path,
    manifest: Manifest,
    platform: Platform,
    progress: Progress,
    threads: int | None = None,
) -> tuple[TensorRTBackend, dict[str, Any]]:
    """Load the engines in `folder` and compare them with onnxruntime on the CPU. Returns the backend, which owns `platform`, and figures.

    onnxruntime runs first and is closed, so that the two never need memory at the same time. `place` is the directory where the engines are
    or will be. If they disagree, this saves the results of both next to it and raises FastVLMError.
    """
    try:
        tokenizer = TextTokenizer(directory / "tokenizer.json")
        expected = reference_answers(directory, manifest, tokenizer, progress, threads)
    except BaseException:
        platform.cuda.close()
        raise
    backend = TensorRTBackend(folder, manifest, platform, progress=progress)
    try:
        progress.stage(f"verifying the engines for {place.name} (first load only)")
        figures = judge(answer(backend, tokenizer, manifest), expected, manifest, place)
        backend.save_kernels()
    except BaseException:
        backend.close()
        raise
    finally:
        progress.done()
    return backend, {**figures, "device": platform.cuda.device.name}


def reference_answers(directory: Path, manifest: Manifest, tokenizer: TextTokenizer, progress: Progress, threads: int | None) -> Answers:
    """The results of onnxruntime on the CPU."""
    reference = OrtBackend(directory, manifest, threads=threads, progress=progress)
    try:
        progress.stage("running onnxruntime for comparison")
        return answer(reference, tokenizer, manifest)
    finally:
        reference.close()
        progress.done()


def judge(found: Answers, expected: Answers, manifest: Manifest, place: Path) -> dict[str, Any]:
    """Compare both results and return figures. Raises FastVLMError if the engines disagree, and keeps the results next to `place`."""
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
                f"{place / name}.engine disagrees with onnxruntime: the cosine similarity is {difference.cosine:.5f}, at least {bound} is "
                f"required ({kept})",
                "report this as a bug, and use --backend ort",
            )
    return figures


def _keep(folder: Path, found: Answers, expected: Answers, figures: dict[str, Any]) -> str:
    """Save the results of both. Returns a clause that says where they are."""
    try:
        folder.mkdir(exist_ok=True)
        sides = {"engine": found, "onnxruntime": expected}
        arrays = {f"{side}_{name}": value for side, answers in sides.items() for name, value in vars(answers).items()}
        np.savez_compressed(folder / "answers.npz", **arrays)
        (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        return f"the results could not be saved: {error.strerror}"
    return f"the results of both are in {folder}"
