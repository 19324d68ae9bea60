"""Build both engines of a model directory, verify them if their GPU is here, and put them into `engines/<target>/`."""

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
from fastvlm_edge.backends.malloc import trim
from fastvlm_edge.backends.tensorrt import Platform
from fastvlm_edge.engines.engine_cache import EngineCache, cache_key
from fastvlm_edge.engines.layers import Layer, Tensor, parse_inspector, parse_listing
from fastvlm_edge.engines.memory import check_memory
from fastvlm_edge.engines.profiles import decoder_profiles, static_capacities, static_profiles, vision_profiles
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.boards.faults import find_faults
from fastvlm_edge.machine.boards.targets import Target, build_target, check_precision, target_of_device
from fastvlm_edge.machine.cache_dir import cache_dir
from fastvlm_edge.model_dir.atomic import written_beside
from fastvlm_edge.model_dir.engine_record import (
    ENGINES,
    RECORD_NAME,
    VISION_GRAPHS,
    EngineRecord,
    Gpu,
    gpu_of,
    mismatch,
    onnx_hashes,
    read_record,
)
from fastvlm_edge.model_dir.json_record import parse_json
from fastvlm_edge.model_dir.manifest import FileRecord, Manifest, read_manifest, sha256
from fastvlm_edge.model_dir.verified import verify
from fastvlm_edge.nvidia.cuda import Cuda
from fastvlm_edge.nvidia.drivers import open_cuda
from fastvlm_edge.nvidia.tensorrt_library import (
    LIBRARIES,
    BuildSettings,
    Built,
    GraphRefusedError,
    Library,
    Monitor,
    Profile,
    find_library,
)
from fastvlm_edge.progress import Progress, SilentProgress

LAYERS_NAME = "layers.json"
REVISION = 2
"""Raise this with every change to how engines are built that `flags` does not show: engines of other revisions are then built again."""


INTEGRATED_WORKSPACE = 1 << 30
"""Scratch memory that a kernel may use on a GPU that shares its memory with the host, such as a Jetson's. Without a limit, TensorRT tries
kernels that need all of it."""


@dataclass(frozen=True)
class Options:
    """Options of `build`. The defaults are right for almost everybody."""

    workspace: int | None = None
    """Bytes of scratch memory that a kernel may use. None means INTEGRATED_WORKSPACE, or all memory of a graphics card."""
    weakly_typed: bool = False
    """Use a weakly typed network (docs/tensorrt-10.3.md)."""
    separate_profiles: bool | None = None
    """Use separate profiles for prefill and decoding. None means what is best for the library (docs/tensorrt.md)."""
    max_batch: int = 1
    """Most conversations per call of the decoder."""
    static: bool = False
    """Build the decoder as engines of fixed shapes, two for each capacity of the cache (docs/tensorrt.md)."""
    capacities: tuple[int, ...] = ()
    """Capacities of static engines. Empty means 1,024 and the whole context."""
    report: bool = False
    """Write all layers of the engines to `layers.json`."""
    verify: bool = True
    """Verify the engines if their GPU is here."""
    onnxruntime: bool = False
    """Verify them with onnxruntime, not with the reference answers in the model directory."""
    check_memory: bool = True
    """Refuse a build for which memory is short."""
    force: bool = False
    """Rebuild engines even if they are up to date."""
    cache: Path | None = dataclasses.field(default_factory=cache_dir)
    """Directory with engines and timings of earlier builds. None means no cache."""


@dataclass(frozen=True)
class _Plan:
    """Everything that is decided before the first engine is built."""

    target: Target
    library: Library
    cuda: Cuda | None
    gpu: Gpu | None
    """The GPU of this machine; None if there is none."""
    compute_capabilities: list[list[int]]
    flags: dict[str, Any]
    profiles: dict[str, tuple[Profile, ...]]


def build(model: Path, target: str = "auto", options: Options | None = None, *, progress: Progress | None = None) -> EngineRecord:
    """Build the engines of the model directory `model` for `target` into `model/engines/<target>/`.

    Engines that are up to date are not built again. After an error nothing is left behind, and earlier engines stay as they were. Raises
    FastVLMError for an unknown target, a precision that the target does not support, too little memory or disk space, a graph that TensorRT
    refuses, and engines that disagree with their reference.
    """
    options, progress = options or Options(), progress or SilentProgress()
    model = Path(os.path.abspath(model))
    manifest = read_manifest(model)
    verify(model, manifest, progress=progress)
    plan = _plan(manifest, target, options)
    try:
        if not plan.target.listed:
            progress.note(f"warning: {plan.library.name} does not list {plan.target.title} as supported; trying anyway")
        folder = model / ENGINES / plan.target.name
        if not options.force and (found := _up_to_date(folder, manifest, plan, report=options.report)) is not None:
            progress.note(f"{folder} is up to date; --force rebuilds it")
            return found
        if plan.cuda is not None:
            for fault in find_faults(plan.library.name, plan.library.version, plan.cuda.device.compute_capability):
                if fault.only_dynamic and options.static and not manifest.vision.other_sizes:
                    continue
                progress.note(f"warning: {plan.library.name} {plan.library.version}: {fault.what}; {fault.mend} ({fault.sources})")
        if options.check_memory:
            # Static engines of one capacity are a pair: prefill and decoding.
            prefills = 1 if plan.flags["separate_profiles"] else options.max_batch
            decoders = 2 if options.static else 1
            check_memory(model, manifest, plan.library.name, plan.cuda, decoders=decoders, prefills=prefills)
        _check_disk(model, plan)
        with written_beside(folder, replace=True, elsewhere="move the model directory to another disk") as partial:
            record = _build_both(_Job(model, manifest, plan, options, partial, progress))
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
                assert no_gpu is not None
                mend = "choose a target with --target, such as rtx or sm86"
                raise FastVLMError(
                    f"there is no GPU to build for ({no_gpu.what})", mend if no_gpu.mend is None else f"{mend}, or {no_gpu.mend}"
                )
            target = target_of_device(device.compute_capability, _installed())
        else:
            target = build_target(name)
        kinds = {part.strip().partition("/")[0] for stage in manifest.plan.values() for part in stage.split("->")} - {"plain"}
        check_precision(target, sorted(kinds), manifest.precision)
        library = find_library(target.libraries)
        capabilities = target.compute_capabilities
        if not library.is_rtx:
            if device is None or device.compute_capability not in capabilities:
                here = "this machine has no GPU" if device is None else f"this machine has {device.name}"
                raise FastVLMError(
                    f"TensorRT only builds for the local GPU: engines for {target.title} ({target.name}) must be built there, and {here}",
                    f"copy the model directory there and run: fastvlm-edge build {manifest.name}",
                )
            capabilities = (device.compute_capability,)
        separate = options.separate_profiles
        if separate is None:  # one profile for several conversations would need the scratch memory of as many prefills
            separate = not library.is_rtx or options.max_batch > 1
        workspace = options.workspace
        if workspace is None and device is not None and device.integrated:
            workspace = INTEGRATED_WORKSPACE
        flags = {"weakly_typed": options.weakly_typed, "workspace": workspace, "separate_profiles": separate, "revision": REVISION}
        flags |= {"max_batch": options.max_batch, "static": options.static}
        if options.static:
            decoder = static_profiles(manifest, static_capacities(manifest.decoder.context, options.capacities))
        else:
            decoder = {"decoder": decoder_profiles(manifest, separate=separate, max_batch=options.max_batch)}
        profiles = {"vision": vision_profiles(manifest), **decoder}
        return _Plan(
            target, library, cuda, gpu_of(device) if device else None, [list(numbers) for numbers in capabilities], flags, profiles
        )
    except BaseException:
        if cuda is not None:
            cuda.close()
        raise


def _open_cuda() -> tuple[Cuda | None, FastVLMError | None]:
    """Open the GPU of this machine. If that fails, returns None and the reason."""
    try:
        return open_cuda(), None
    except FastVLMError as error:
        return None, error


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
        and (plan.gpu is None or mismatch(record, manifest, record.library, record.version, plan.gpu) is None)
        and record.flags == plan.flags
        and record.profiles == _as_lists(plan.profiles)
        and (not report or (folder / LAYERS_NAME).is_file())
        and all((folder / name).is_file() and (folder / name).stat().st_size == entry.bytes for name, entry in record.files.items())
    )
    return record if same and not record.faults else None


def _as_lists(profiles: dict[str, tuple[Profile, ...]]) -> dict[str, list[dict[str, list[list[int]]]]]:
    """The profiles as JSON represents them."""
    return {
        part: [{name: [list(shape) for shape in shapes] for name, shapes in ranges.items()} for ranges in both]
        for part, both in profiles.items()
    }


# Building -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A build in progress."""

    model: Path
    manifest: Manifest
    plan: _Plan
    options: Options
    partial: Path
    """The directory for the new engines, until they are complete."""
    progress: Progress


@dataclass(frozen=True)
class _Engine:
    """A finished engine file."""

    figures: dict[str, Any]
    """Duration, peak memory, and whether it came from the cache."""
    layers: list[Layer] | None
    """None if it came from the cache."""


def _build_both(job: _Job) -> EngineRecord:
    """Build both engines and verify them if their GPU is here. Returns the record, which is not yet written."""
    plan, manifest, partial = job.plan, job.manifest, job.partial
    engines = {}
    for part in plan.profiles:
        engines[part] = _build_part(job, part)
        trim()  # the builder's memory is free by now; the next part and the verification need it
    if job.options.report:
        listed = {part: [dataclasses.asdict(layer) for layer in engine.layers or ()] for part, engine in engines.items()}
        (partial / LAYERS_NAME).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    record = EngineRecord(
        target=plan.target.name,
        library=plan.library.name,
        version=plan.library.version,
        compute_capabilities=plan.compute_capabilities,
        device=plan.gpu.name if plan.gpu is not None else "",
        flags=plan.flags,
        onnx=onnx_hashes(manifest),
        files={f"{part}.engine": _file_record(partial / f"{part}.engine") for part in plan.profiles},
        profiles=_as_lists(plan.profiles),
        build={"date": date.today().isoformat(), **{part: engine.figures for part, engine in engines.items()}},
        multiprocessors=plan.gpu.multiprocessors if plan.gpu is not None else 0,
        memory_bytes=plan.gpu.memory_bytes if plan.gpu is not None else 0,
        board=plan.gpu.board if plan.gpu is not None else "",
    )
    return replace(record, parity=_verify(job))


def _verify(job: _Job) -> dict[str, Any]:
    """Compare the engines with their reference and return the figures; empty if that is not possible here or not wanted."""
    plan = job.plan
    here = plan.cuda is not None and list(plan.cuda.device.compute_capability) in plan.compute_capabilities
    if plan.cuda is None or not here or not job.options.verify:
        why = "as requested" if here else "this machine has no GPU for them"
        job.progress.note(f"the engines were not verified ({why}); this happens when a GPU loads them for the first time")
        return {}
    platform = Platform(plan.cuda, plan.library.name, plan.library.version, plan.library.load)
    place = job.partial.parent / plan.target.name
    backend, parity = verify_engines(
        job.model, job.partial, place, job.manifest, platform, job.progress, onnxruntime=job.options.onnxruntime
    )
    backend.close()
    return parity


def _build_part(job: _Job, part: str) -> _Engine:
    """Write `<part>.engine` into the new directory, from the cache if it was built before."""
    plan, options, library = job.plan, job.options, job.plan.library
    cache, path = EngineCache(options.cache), job.partial / f"{part}.engine"
    graphs = [f"{_model_of(part)}.onnx"]
    if part == "vision":
        graphs += [name for name in VISION_GRAPHS if name in job.manifest.files and name not in graphs]
    job.progress.stage(f"building {part}.engine with {library.name} {library.version}", 100)
    if not options.report and not options.force:
        # An engine of a later graph is there only if TensorRT refused the earlier ones.
        for name in graphs:
            if cache.fetch(_engine_key(job, part, name), path):
                job.progress.note(f"{part}.engine is taken from the cache of earlier builds")
                return _Engine({"seconds": 0.0, "cached": True, "graph": name}, None)
    began = time.perf_counter()
    # Without a target that the library lists, it builds for the local GPU, whatever its name.
    named = plan.compute_capabilities if library.is_rtx and plan.target.listed else []
    settings = BuildSettings(
        profiles=plan.profiles[part],
        compute_capabilities=tuple((major, minor) for major, minor in named),
        workspace=plan.flags["workspace"],
        weakly_typed=options.weakly_typed,
    )
    timings_key = cache_key(_made_for(plan))
    timings = cache.timings(timings_key)
    refused = ""
    for number, name in enumerate(graphs):
        try:
            built = library.build(job.model / name, settings, timing_cache=timings, monitor=_in_percent(job.progress))
            break
        except GraphRefusedError as error:
            if number + 1 == len(graphs):
                raise
            refused = refused or error.what
            following = VISION_GRAPHS[graphs[number + 1]]
            job.progress.note(f"warning: {error.what}; trying the encoder {following}")
            job.progress.stage(f"building {part}.engine {following}", 100)
    with path.open("wb") as file:
        file.write(memoryview(built.plan))
    cache.keep(_engine_key(job, part, name), path)
    cache.keep_timings(timings_key, built.timing_cache)
    layers = _list_layers(library, built, plan.profiles[part], job.progress, inspect=options.report and plan.cuda is not None)
    if widened := sum(layer.widens_weights for layer in layers):
        job.progress.note(
            f"warning: {part}.engine converts {widened} integer matrices to floats in memory at every run: the types in the graph "
            "are those of the file, not of the computation (docs/tensorrt-types.md)"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    figures = {"seconds": round(time.perf_counter() - began, 1), "cached": False, "peak_bytes": peak, "graph": name}
    figures |= {"scratch_bytes": built.scratch_bytes} if built.scratch_bytes else {}
    return _Engine({**figures, "refused": refused} if refused else figures, layers)


def _model_of(part: str) -> str:
    """The graph of an engine: static engines are called `decoder.prefill.1024` and alike."""
    return part.partition(".")[0]


def _engine_key(job: _Job, part: str, graph: str) -> str:
    """Key of an engine in the cache: a hash of everything that it depends on."""
    plan = job.plan
    hashes = onnx_hashes(job.manifest)
    sources = {name: digest for name, digest in hashes.items() if name.startswith(_model_of(part))}
    if graph in job.manifest.files:
        sources[f"{_model_of(part)}.onnx"] = job.manifest.files[graph].sha256
    profiles = _as_lists({part: plan.profiles[part]})
    return cache_key({**_made_for(plan), "onnx": sources, "flags": plan.flags, "profiles": profiles})


def _made_for(plan: _Plan) -> dict[str, Any]:
    """The library and the GPU. Its hash is the key of the timings in the cache."""
    gpu = None
    if not plan.library.is_rtx and plan.gpu is not None:
        # TensorRT tunes an engine for one model of GPU: others of the same compute capability have other clocks and numbers of cores.
        gpu = [plan.gpu.name, plan.gpu.multiprocessors, round(plan.gpu.memory_bytes / (1 << 30)), plan.gpu.board]
    return {
        "library": plan.library.name,
        "version": plan.library.version,
        "capabilities": plan.compute_capabilities,
        "gpu": gpu,
    }


def _in_percent(progress: Progress) -> Monitor:
    """A monitor that advances `progress` by each whole percent."""
    done = 0

    def advance(share: float) -> None:
        nonlocal done
        if (percent := int(share * 100)) > done:
            progress.advance(percent - done)
            done = percent

    return advance


def _list_layers(library: Library, built: Built, profiles: tuple[Profile, ...], progress: Progress, *, inspect: bool) -> list[Layer]:
    """The layers from the builder's log. If it has none and with `inspect`, from the engine inspector, which loads the engine once more."""
    inputs = {name for ranges in profiles for name in ranges}
    if (layers := parse_listing(built.listing, inputs)) or not inspect:
        return layers
    inspected = library.inspect(built.plan)
    try:
        return parse_inspector(inspected, inputs) if inspected else []
    except (ValueError, KeyError, TypeError) as error:  # the engine is not affected
        progress.note(f"warning: the list of layers from TensorRT cannot be read ({type(error).__name__}: {error})")
        return []


def read_layers(folder: Path) -> dict[str, list[Layer]]:
    """Read `layers.json`, which a build with `report` writes: part -> layers. Empty for a part that TensorRT did not list.

    Raises FastVLMError if it is damaged.
    """
    path = folder / LAYERS_NAME
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        return {part: [_layer(layer) for layer in layers] for part, layers in document.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastVLMError(f"{path} is damaged ({type(error).__name__}: {error})", "build again with --report --force") from None


def _layer(document: dict[str, Any]) -> Layer:
    tensors = {
        name: tuple(Tensor(each["dtype"], tuple(each["shape"])) for each in document[name]) for name in ("inputs", "constants", "outputs")
    }
    return Layer(name=document["name"], kind=document["kind"], nodes=tuple(document["nodes"]), **tensors)


def _file_record(path: Path) -> FileRecord:
    return FileRecord(sha256(path), path.stat().st_size)


# Disk ---------------------------------------------------------------------------------------------------------------------------


def _check_disk(model: Path, plan: _Plan) -> None:
    """Raise FastVLMError if the disk is too full. An engine is about as large as its weights, unless TensorRT converts them."""
    needed = sum((model / f"{_model_of(part)}.weights").stat().st_size for part in plan.profiles)
    free = shutil.disk_usage(model).free
    if needed > free:
        what = f"the engines need about {needed / 1e6:,.0f} MB, but the disk of {model} has only {free / 1e6:,.0f} MB free"
        raise FastVLMError(what, "free some space there")
