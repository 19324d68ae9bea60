"""model directory -> `engines/<target>/`: both engines, built beside their final place, compared where there is a GPU, then put there."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from fastvlm_edge.backends.load_engines import verify_engines
from fastvlm_edge.backends.tensorrt import Platform
from fastvlm_edge.engines.engine_cache import EngineCache, cache_key, default_cache
from fastvlm_edge.engines.layers import Layer, Tensor, parse_inspector, parse_listing
from fastvlm_edge.engines.memory import check_memory
from fastvlm_edge.engines.profiles import decoder_profiles, vision_profiles
from fastvlm_edge.engines.targets import Target, check_precision, find_target, target_of_device
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.atomic import written_beside
from fastvlm_edge.model_dir.engine_record import ENGINES, PARTS, RECORD_NAME, EngineRecord, onnx_hashes, read_record
from fastvlm_edge.model_dir.manifest import FileRecord, Manifest, read_manifest, sha256, verify_files
from fastvlm_edge.nvidia.cuda import Cuda
from fastvlm_edge.nvidia.drivers import open_cuda
from fastvlm_edge.nvidia.tensorrt_library import LIBRARIES, BuildSettings, Built, Library, Profile, find_library
from fastvlm_edge.progress import Progress, SilentProgress

LAYERS_NAME = "layers.json"
REVISION = 1
"""To be raised with every change of how engines are built that their flags do not show: engines of another one are built again."""


@dataclass(frozen=True)
class Options:
    """How `build` builds; the defaults are right for almost everybody."""

    workspace: int | None = None
    """Bytes that a kernel may use beside its inputs and outputs."""
    weakly_typed: bool = False
    """See docs/tensorrt-10.3.md."""
    separate_profiles: bool | None = None
    """Prefill and decoding in profiles of their own; None is what is best for the library (docs/tensorrt.md)."""
    report: bool = False
    """Write every layer to `layers.json`."""
    verify: bool = True
    """Compare with onnxruntime where the GPU is here."""
    check_memory: bool = True
    force: bool = False
    """Build again what is up to date."""
    cache: Path | None = dataclasses.field(default_factory=default_cache)
    """Folder of engines and timings built before; None for neither."""


@dataclass(frozen=True)
class _Plan:
    """Everything that is settled before the first engine is built."""

    target: Target
    library: Library
    cuda: Cuda | None
    compute_capabilities: list[list[int]]
    flags: dict[str, Any]
    profiles: dict[str, tuple[Profile, ...]]


def build(model: Path, target: str = "auto", options: Options | None = None, *, progress: Progress | None = None) -> EngineRecord:
    """Build the engines of the model directory `model` for `target` into `model/engines/<target>/`.

    Nothing is left behind when anything fails, and what was there stays. Engines that are up to date are not built again. Raises
    FastVLMError for everything a user can mend: an unknown target, a precision that it lacks, too little memory or disk, a graph that
    TensorRT refuses, engines that do not compute what onnxruntime does.
    """
    options, progress = options or Options(), progress or SilentProgress()
    model = Path(os.path.abspath(model))
    manifest = read_manifest(model)
    verify_files(model, manifest)
    plan = _plan(manifest, target, options)
    try:
        if not plan.target.listed:
            progress.note(f"warning: {plan.library.name} does not list {plan.target.title}; trying all the same")
        folder = model / ENGINES / plan.target.name
        if not options.force and (found := _up_to_date(folder, manifest, plan, report=options.report)) is not None:
            progress.note(f"{folder} is up to date; --force builds it again")
            return found
        if options.check_memory:
            check_memory(model, plan.library.name)
        _check_disk(model)
        with written_beside(folder, replace=True, elsewhere="make room in the model directory, where engines lie") as partial:
            record = _build_both(model, manifest, plan, options, partial, progress)
            record.write(partial)
        progress.done()
        return record
    finally:
        if plan.cuda is not None:
            plan.cuda.close()


# What is built ------------------------------------------------------------------------------------------------------------------


def _plan(manifest: Manifest, name: str, options: Options) -> _Plan:
    cuda, no_gpu = _open_cuda()
    try:
        device = None if cuda is None else cuda.device
        if name == "auto":
            if device is None:
                raise FastVLMError(f"there is no GPU to build for ({no_gpu}); name one with --target, such as rtx or sm86")
            target = target_of_device(device.compute_capability, _installed())
        else:
            target = find_target(name)
        library = find_library(target.libraries)
        kinds = {part.strip().partition("/")[0] for stage in manifest.plan.values() for part in stage.split("->")} - {"plain"}
        check_precision(target, sorted(kinds), manifest.precision)
        capabilities = target.compute_capabilities
        if not library.is_rtx:
            if device is None or device.compute_capability not in capabilities:
                here = "this machine has none" if device is None else f"here is {device.name}"
                raise FastVLMError(
                    f"engines for {target.title} ({target.name}) are built on it: TensorRT builds for the GPU at hand, and {here}. "
                    f"Copy the model directory there and run: fastvlm-edge build {manifest.name}"
                )
            capabilities = (device.compute_capability,)
        separate = not library.is_rtx if options.separate_profiles is None else options.separate_profiles
        flags = {"weakly_typed": options.weakly_typed, "workspace": options.workspace, "separate_profiles": separate, "revision": REVISION}
        profiles = {"vision": vision_profiles(manifest), "decoder": decoder_profiles(manifest, separate=separate)}
        return _Plan(target, library, cuda, [list(numbers) for numbers in capabilities], flags, profiles)
    except BaseException:
        if cuda is not None:
            cuda.close()
        raise


def _open_cuda() -> tuple[Cuda | None, str]:
    """The GPU of this machine, or why there is none."""
    try:
        return open_cuda(), ""
    except FastVLMError as error:
        return None, str(error)


def _installed() -> list[str]:
    names = []
    for name in LIBRARIES:
        try:
            names.append(find_library((name,)).name)
        except FastVLMError:
            continue
    return names


def _up_to_date(folder: Path, manifest: Manifest, plan: _Plan, *, report: bool) -> EngineRecord | None:
    if not (folder / RECORD_NAME).is_file():
        return None
    try:
        record = read_record(folder)
    except FastVLMError:
        return None
    same = (
        record.onnx == onnx_hashes(manifest)
        and (record.library, record.version) == (plan.library.name, plan.library.version)
        and record.compute_capabilities == plan.compute_capabilities
        and record.flags == plan.flags
        and record.profiles == _as_lists(plan.profiles)
        and (not report or (folder / LAYERS_NAME).is_file())
        and all((folder / name).is_file() and (folder / name).stat().st_size == entry.bytes for name, entry in record.files.items())
    )
    return record if same else None


def _as_lists(profiles: dict[str, tuple[Profile, ...]]) -> dict[str, list[dict[str, list[list[int]]]]]:
    """As JSON has it."""
    return {
        part: [{name: [list(shape) for shape in shapes] for name, shapes in ranges.items()} for ranges in both]
        for part, both in profiles.items()
    }


# Building -----------------------------------------------------------------------------------------------------------------------


def _build_both(model: Path, manifest: Manifest, plan: _Plan, options: Options, partial: Path, progress: Progress) -> EngineRecord:
    cache = EngineCache(options.cache)
    figures: dict[str, Any] = {"date": date.today().isoformat()}
    layers: dict[str, list[Layer]] = {}
    for part in PARTS:
        figures[part] = _build_part(part, model, manifest, plan, options, cache, partial, progress, layers)
    if options.report:
        listed = {part: [dataclasses.asdict(layer) for layer in found] for part, found in layers.items()}
        (partial / LAYERS_NAME).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    files = {f"{part}.engine": _file_record(partial / f"{part}.engine") for part in PARTS}
    record = EngineRecord(
        target=plan.target.name,
        library=plan.library.name,
        version=plan.library.version,
        compute_capabilities=plan.compute_capabilities,
        device=plan.cuda.device.name if plan.cuda is not None else "",
        flags=plan.flags,
        onnx=onnx_hashes(manifest),
        files=files,
        profiles=_as_lists(plan.profiles),
        build=figures,
    )
    here = plan.cuda is not None and list(plan.cuda.device.compute_capability) in plan.compute_capabilities
    if here and options.verify:
        assert plan.cuda is not None
        platform = Platform(plan.cuda, plan.library.name, plan.library.version, plan.library.load)
        backend, parity = verify_engines(model, partial, partial.parent / plan.target.name, manifest, platform, progress)
        backend.close()
        record = replace(record, parity=parity)
    else:
        why = "there is no GPU for them here" if not here else "as asked for"
        progress.note(f"the engines were not compared with onnxruntime ({why}); that happens at their first load on a GPU")
    return record


def _build_part(
    part: str,
    model: Path,
    manifest: Manifest,
    plan: _Plan,
    options: Options,
    cache: EngineCache,
    partial: Path,
    progress: Progress,
    layers: dict[str, list[Layer]],
) -> dict[str, Any]:
    """Write `part.engine`, from the cache where it was built before. Returns what it took."""
    library = plan.library
    # An engine of TensorRT proper is tuned for the very GPU; the others of its compute capability have other clocks and cores.
    device = "" if library.is_rtx or plan.cuda is None else plan.cuda.device.name
    made_for = {"library": library.name, "version": library.version, "capabilities": plan.compute_capabilities, "device": device}
    sources = {name: digest for name, digest in onnx_hashes(manifest).items() if name.startswith(part)}
    key = cache_key({**made_for, "onnx": sources, "flags": plan.flags, "profiles": _as_lists({part: plan.profiles[part]})})
    engine = partial / f"{part}.engine"
    progress.stage(f"building {part}.engine with {library.name} {library.version}", 100)
    if not options.report and not options.force and cache.fetch(key, engine):
        progress.note(f"{part}.engine was built before and is taken from the cache")
        return {"seconds": 0.0, "cached": True}
    began, done = time.perf_counter(), 0

    def advance(share: float) -> None:
        nonlocal done
        if (percent := int(share * 100)) > done:
            progress.advance(percent - done)
            done = percent

    timings = cache_key(made_for)
    named = library.is_rtx and plan.target.listed  # otherwise it is built for the GPU at hand, whatever that is called
    settings = BuildSettings(
        profiles=plan.profiles[part],
        compute_capabilities=tuple((major, minor) for major, minor in plan.compute_capabilities) if named else (),
        workspace=options.workspace,
        weakly_typed=options.weakly_typed,
    )
    built = library.build(model / f"{part}.onnx", settings, timing_cache=cache.timings(timings), monitor=advance)
    with engine.open("wb") as file:
        file.write(memoryview(built.plan))
    cache.keep(key, engine)
    cache.keep_timings(timings, built.timing_cache)
    found = _list_layers(library, built, plan.cuda is not None, progress)
    if widened := sum(layer.widens_weights for layer in found):
        progress.note(
            f"warning: {part}.engine widens {widened} matrices from integers to floats in memory at every run: the type in the graph is "
            "that on the disk, not that which computes (docs/tensorrt-types.md)"
        )
    layers[part] = found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"seconds": round(time.perf_counter() - began, 1), "cached": False, "peak_bytes": peak}


def _list_layers(library: Library, built: Built, has_gpu: bool, progress: Progress) -> list[Layer]:
    """From the builder's log, or the engine inspector where there is none and the GPU is here."""
    if built.listing or not has_gpu:
        return parse_listing(built.listing)
    inspected = library.inspect(built.plan)
    try:
        return parse_inspector(inspected) if inspected else []
    except (ValueError, KeyError, TypeError) as error:  # the engine is fine all the same
        progress.note(f"warning: TensorRT's list of layers cannot be read ({type(error).__name__}: {error})")
        return []


def read_layers(folder: Path) -> dict[str, list[Layer]]:
    """Part -> layers, as `report` wrote them. Empty for a part whose engine came from the cache or was not listed."""
    document = json.loads((folder / LAYERS_NAME).read_text(encoding="utf-8"))
    return {part: [_layer(layer) for layer in layers] for part, layers in document.items()}


def _layer(document: dict[str, Any]) -> Layer:
    tensors = {
        name: tuple(Tensor(each["dtype"], tuple(each["shape"])) for each in document[name]) for name in ("inputs", "constants", "outputs")
    }
    return Layer(name=document["name"], kind=document["kind"], nodes=tuple(document["nodes"]), **tensors)


def _file_record(path: Path) -> FileRecord:
    return FileRecord(sha256(path), path.stat().st_size)


# Disk ---------------------------------------------------------------------------------------------------------------------------


def _check_disk(model: Path) -> None:
    """An engine is about as large as the weights that go in, where TensorRT widens none."""
    needed = sum((model / f"{part}.weights").stat().st_size for part in PARTS)
    free = shutil.disk_usage(model).free
    if needed > free:
        raise FastVLMError(f"the engines need about {needed / 1e6:,.0f} MB, and {model} has {free / 1e6:,.0f} MB free; make room there")
