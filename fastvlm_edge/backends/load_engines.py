"""Load the TensorRT backend: find the pair of engines that runs on this machine, and verify it if that never happened here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvlm_edge.backends.tensorrt import Platform, TensorRTBackend
from fastvlm_edge.backends.verification.check import check
from fastvlm_edge.backends.verification.reference import compute_reference, read_reference
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.engine_record import EngineRecord, engine_folders, gpu_of, mismatch, read_record
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.nvidia.drivers import open_cuda
from fastvlm_edge.nvidia.tensorrt_library import LoadedEngine, find_library
from fastvlm_edge.progress import Progress, SilentProgress

EVIDENCE = "mismatch"
"""Results of a rejected pair of engines are kept in `<target>.mismatch`, next to the directory of the engines."""


class EnginesDisagreeError(FastVLMError):
    """Engines compute something else than their reference. `figures` belong into their record."""

    figures: dict[str, Any]


def open_platform(library: str) -> Platform:
    """Open the GPU and the TensorRT library of that name. Raises FastVLMError if either is missing."""
    found = find_library((library,))
    cuda = open_cuda()
    return Platform(cuda, found.name, found.version, found.load)


def load_engines(directory: Path, manifest: Manifest, *, slots: int = 1, progress: Progress | None = None) -> TensorRTBackend:
    """Load the engines of a model directory that run on this machine. If they were never verified here, do that first.

    Raises FastVLMError, with the command to run, if there are no engines or TensorRT refuses them, or if they disagree with the reference,
    now or at an earlier load on this GPU.
    """
    progress = progress or SilentProgress()
    folder, record, platform = _choose(directory, manifest)
    device = platform.cuda.device
    judged = record.judged_on(device.name, device.compute_capability)
    try:
        check_files(folder, record)
        if judged and record.faults:
            raise _disagreement(record.parity, folder)
    except BaseException:
        platform.cuda.close()
        raise
    if judged:
        backend = TensorRTBackend(folder, manifest, platform, slots=slots, progress=progress)
        backend.engines = record
        return backend
    try:
        backend, figures = verify_engines(directory, folder, folder, manifest, platform, progress, slots=slots)
    except EnginesDisagreeError as error:
        _keep_figures(folder, record, error.figures)
        raise
    record = _keep_figures(folder, record, figures)
    if record.library != "tensorrt":
        try:
            serving = open_platform(record.library)  # before the other is closed, so that the CUDA context stays
        finally:
            backend.close()
        backend = TensorRTBackend(folder, manifest, serving, slots=slots, progress=progress)
    backend.engines = record
    return backend


def _keep_figures(folder: Path, record: EngineRecord, figures: dict[str, Any]) -> EngineRecord:
    record = dataclasses.replace(record, parity=figures)
    with contextlib.suppress(OSError):  # in a read-only directory they are verified at every load
        record.write(folder)
    return record


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
    *,
    onnxruntime: bool = False,
    slots: int = 1,
) -> tuple[TensorRTBackend, dict[str, Any]]:
    """Load the engines in `folder` and check them. Returns the backend, which owns `platform`, and the figures for the record.

    They are compared with the reference that `convert` stored; with `onnxruntime`, with onnxruntime on the CPU. That runs first and is
    closed, so that the two never need memory at the same time. `place` is the directory where the engines are or will be. If they disagree,
    this saves the results of both next to it and raises EnginesDisagreeError.

    TensorRT for RTX would answer with other kernels until those for a new shape are compiled. Here it waits for them, so that they are the
    ones that are verified, and the backend goes on like that.
    """
    try:
        reference = compute_reference(directory, manifest, progress) if onnxruntime else read_reference(directory)
    except BaseException:
        platform.cuda.close()
        raise
    device = platform.cuda.device
    waiting = dataclasses.replace(platform, load=_waiting(platform.load))
    backend = TensorRTBackend(folder, manifest, waiting, slots=slots, progress=progress)
    try:
        findings = check(backend, reference, manifest, progress, f"the engines for {place.name} (first load only)")
        figures = {**findings.figures, "device": device.name, "compute_capability": list(device.compute_capability)}
        if findings.faults:
            figures["faults"] = [dataclasses.asdict(fault) for fault in findings.faults]
            raise _disagreement(figures, place, findings.keep(place.parent / f"{place.name}.{EVIDENCE}", reference))
        backend.shrink()
        backend.save_kernels()
    except BaseException:
        backend.close()
        raise
    finally:
        progress.done()
    return backend, figures


def _waiting(load: Callable[[Path], LoadedEngine]) -> Callable[[Path], LoadedEngine]:
    def loaded(path: Path) -> LoadedEngine:
        engine = load(path)
        engine.waits_for_kernels = True
        return engine

    return loaded


def _disagreement(figures: dict[str, Any], place: Path, kept: str = "at an earlier load") -> EnginesDisagreeError:
    """The error for the figures of a record that has faults. `kept` is a clause that says where the results of both sides are."""
    faults = figures["faults"]
    part, text = faults[0]["part"], faults[0]["text"]
    more = f"; {len(faults)} figures in all are out of bounds" if len(faults) > 1 else ""
    again = f"run: fastvlm-edge build {place.parents[1]} --target {place.name} --force"
    static = "try fastvlm-edge build --static, " if part == "decoder" else ""
    error = EnginesDisagreeError(
        f"{place / part}.engine disagrees with {figures['reference']}: {text}{more} ({kept})",
        f"{static}report this as a bug, and use --backend ort; to verify again, {again}",
    )
    error.figures = figures
    return error
