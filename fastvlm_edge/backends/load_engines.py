"""Load the TensorRT backend: find the pair of engines that runs on this machine, and verify it if it never was."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from fastvlm_edge.backends.tensorrt import Platform, TensorRTBackend
from fastvlm_edge.backends.verification.check import Findings, check
from fastvlm_edge.backends.verification.reference import Reference, compute_reference, read_reference
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.engine_record import EngineRecord, engine_folders, gpu_of, mismatch, read_record
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.nvidia.drivers import open_cuda
from fastvlm_edge.nvidia.tensorrt_library import find_library
from fastvlm_edge.progress import Progress, SilentProgress

EVIDENCE = "mismatch"
"""Results of a rejected pair of engines are kept in `<target>.mismatch`, next to the directory of the engines."""


def open_platform(library: str) -> Platform:
    """Open the GPU and the TensorRT library of that name. Raises FastVLMError if either is missing."""
    found = find_library((library,))
    cuda = open_cuda()
    return Platform(cuda, found.name, found.version, found.load)


def load_engines(directory: Path, manifest: Manifest, *, threads: int | None = None, progress: Progress | None = None) -> TensorRTBackend:
    """Load the engines of a model directory that run on this machine. If they were never verified, do that first.

    `threads` is for onnxruntime, which computes the reference of a model directory that has none. Raises FastVLMError, with the command to
    run, if there are no engines or TensorRT refuses them, or if they disagree with the reference.
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
    with contextlib.suppress(OSError):  # in a read-only directory they are verified at every load
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
        reason = mismatch(record, manifest, platform.library, platform.version, gpu_of(platform.cuda.device))
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
    *,
    onnxruntime: bool = False,
) -> tuple[TensorRTBackend, dict[str, Any]]:
    """Load the engines in `folder` and check them. Returns the backend, which owns `platform`, and the figures for the record.

    They are compared with the reference that `convert` stored; with `onnxruntime`, or if there is none, with onnxruntime on the CPU. That
    runs first and is closed, so that the two never need memory at the same time. `place` is the directory where the engines are or will
    be. If they disagree, this saves the results of both next to it and raises FastVLMError.
    """
    try:
        reference = find_reference(directory, manifest, progress, threads, onnxruntime=onnxruntime)
    except BaseException:
        platform.cuda.close()
        raise
    backend = TensorRTBackend(folder, manifest, platform, progress=progress)
    try:
        findings = check(backend, reference, manifest, progress, f"the engines for {place.name} (first load only)")
        judge(findings, reference, place)
        backend.shrink()
        backend.save_kernels()
    except BaseException:
        backend.close()
        raise
    finally:
        progress.done()
    return backend, {**findings.figures, "device": platform.cuda.device.name}


def find_reference(
    directory: Path, manifest: Manifest, progress: Progress, threads: int | None = None, *, onnxruntime: bool = False
) -> Reference:
    """The reference of a model directory, computed with onnxruntime if it has none or if `onnxruntime` asks for it."""
    stored = None if onnxruntime else read_reference(directory)
    if stored is not None:
        return stored
    if not onnxruntime:
        progress.note(
            f"{manifest.name} was converted before reference answers were stored, so onnxruntime computes them now, which needs the memory "
            "of the whole model; convert the checkpoint again to avoid that"
        )
    return compute_reference(directory, manifest, progress, threads)


def judge(findings: Findings, reference: Reference, place: Path) -> None:
    """Raise FastVLMError if there are faults, and keep the results of both sides next to `place`."""
    if not findings.faults:
        return
    fault = findings.faults[0]
    more = f"; {len(findings.faults)} figures in all are out of bounds" if len(findings.faults) > 1 else ""
    kept = _keep(place.parent / f"{place.name}.{EVIDENCE}", findings, reference)
    raise FastVLMError(
        f"{place / fault.part}.engine disagrees with {reference.program}: {fault.text}{more} ({kept})",
        f"{'try fastvlm-edge build --static, ' if fault.part == 'decoder' else ''}report this as a bug, and use --backend ort",
    )


def _keep(folder: Path, findings: Findings, reference: Reference) -> str:
    """Save the results of both. Returns a clause that says where they are."""
    try:
        findings.save(folder, reference)
    except OSError as error:
        return f"the results could not be saved: {error.strerror}"
    return f"the results of both are in {folder}"
