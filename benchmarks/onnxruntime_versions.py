"""How fast is each version of onnxruntime on a CPU? The same questions with all of them, processes in turns.

    python -m benchmarks.onnxruntime_versions [--work build/bench-versions] [--versions 1.23.2 ... newest] [--processes 3] [--out FILE]

A random FastVLM of 0.5B's width with four layers, at 512 px. Every version gets the same model directories. `int8, standard operators` is
what `decoder.cpu.onnx` would be without onnxruntime's MatMulNBits: versions before 1.25 do not make it of DequantizeLinear and MatMul
themselves. The record also has how far the logits of each version are from those of the last one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.common import machine
from benchmarks.common.rounds import call, figures, take_turns
from benchmarks.peers.protocol import Samples
from benchmarks.peers.runtimes.ours import samples_of
from benchmarks.peers.workload import converter_digest
from fastvlm_edge.bench.measure import Settings
from fastvlm_edge.bench.record import digits, write_json
from fastvlm_edge.progress import stderr_progress

NEWEST = "newest"
VERSIONS = ("1.23.2", "1.24.4", NEWEST)
PRECISIONS = ("fp32", "int8", "int4")
STANDARD = "int8, standard operators"
WAYS = (*PRECISIONS, STANDARD)
SIZE, IMAGE_SIZE, CONTEXT, NEW_TOKENS = "0.5b-4-layers", 512, 1024, 33
FIELDS = ("load_ms", "vision_ms", "prefill_ms", "decode_tokens_per_second", "peak_memory_mib")


def main() -> int:
    """Measure every version with every precision and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench-versions"))
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="VERSION", help="the last one is compared with")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnxruntime_versions.json")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "LOGITS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, logits = options.one
        one_process(options.work, way, logits, options.threads)
        return 0
    prepare(options.work)
    folders = {version_in(folder): folder for folder in (install(version, options.work) for version in options.versions)}
    ways = [(way, version) for version in folders for way in WAYS]

    def measure(name: str) -> Samples:
        way, version = name.split(" @ ")
        command = [sys.executable, "-m", "benchmarks.onnxruntime_versions", "--work", str(options.work), "--threads", str(options.threads)]
        here = {"PYTHONPATH": str(folders[version].resolve())}
        samples: Samples = json.loads(call([*command, "--one", way, str(logits_of(options.work, way, version))], environment=here))
        return samples

    rounds = take_turns([f"{way} @ {version}" for way, version in ways], options.processes, measure, rotate=True)
    newest = list(folders)[-1]
    results: dict[str, dict[str, Any]] = {version: {} for version in folders}
    for way, version in ways:
        found = figures(rounds[f"{way} @ {version}"], FIELDS)
        results[version][way] = found | {"logits": distance(options.work, way, version, newest)}
        print(version, way, {field: found[field]["median"] for field in FIELDS}, results[version][way]["logits"])
    document = {
        "what": f"random FastVLM of the size {SIZE}, {IMAGE_SIZE} px: the same model directories with versions of onnxruntime",
        "machine": described(),
        "threads": options.threads,
        "processes": options.processes,
        "results": results,
    }
    write_json(options.out, document)
    return 0


def prepare(work: Path) -> None:
    """The model directories, converted again if the converter has changed."""
    from examples.checkpoints.random_checkpoint import write_checkpoint
    from fastvlm_edge.convert.graphs import decoder
    from fastvlm_edge.convert.pipeline import convert

    checkpoint = work / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        write_checkpoint(checkpoint, layout="native", size=SIZE, image_size=IMAGE_SIZE)
    for way in WAYS:
        made_by = work / f"{way}.made-by"
        if not made_by.is_file() or made_by.read_text(encoding="ascii") != converter_digest():
            precision, standard = way.partition(",")[0], patch.object(decoder._Decoder, "_is_packed", lambda *_: False)
            with standard if way == STANDARD else nullcontext():
                convert(str(checkpoint), work / way, precision=precision, context=CONTEXT, force=True, progress=stderr_progress())
            made_by.write_text(converter_digest(), encoding="ascii")


def install(version: str, work: Path) -> Path:
    """A folder with this version alone; in front of Python's path it takes the place of the installed one."""
    folder = work / "onnxruntime" / version
    if version == NEWEST or not folder.is_dir():
        wanted = "onnxruntime" if version == NEWEST else f"onnxruntime=={version}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(folder), wanted], check=True)
    return folder


def version_in(folder: Path) -> str:
    """The version of onnxruntime in a folder that `install` filled."""
    (metadata,) = folder.glob("onnxruntime-*.dist-info")
    return metadata.name.removeprefix("onnxruntime-").removesuffix(".dist-info")


def logits_of(work: Path, way: str, version: str) -> Path:
    """The file for the logits of a process."""
    return work / "logits" / f"{way}-{version}.npy"


def one_process(work: Path, way: str, logits: str, threads: int) -> None:
    """Measure one way with the onnxruntime on this process's path, print the samples, and write the logits of the stored passage."""
    from fastvlm_edge.backends.ort import OrtDecoder
    from fastvlm_edge.backends.ort_session import on_device
    from fastvlm_edge.model_dir.manifest import read_manifest

    directory = work / way
    samples = samples_of(directory, Settings("ort", threads, 2, new_tokens=NEW_TOKENS, depths=()))
    decoder = OrtDecoder(on_device(directory, read_manifest(directory), threads=threads))
    ids = np.random.default_rng(0).integers(0, 500, 64).tolist()
    rows = []
    for part in (ids[:56], *([each] for each in ids[56:])):
        found = decoder.step(part, want_logits=True).logits
        assert found is not None
        rows.append(found[-1].copy())
    Path(logits).parent.mkdir(parents=True, exist_ok=True)
    np.save(logits, np.stack(rows))
    print(json.dumps(samples))


def distance(work: Path, way: str, version: str, newest: str) -> dict[str, float]:
    """How far the logits of a version are from those of the newest one, with the same precision."""
    found, expected = np.load(logits_of(work, way, version)), np.load(logits_of(work, way.partition(",")[0], newest))
    return {"largest_difference": digits(float(np.abs(found - expected).max())), "largest_logit": digits(float(np.abs(expected).max()))}


def described() -> dict[str, Any]:
    """This machine; the versions of onnxruntime are those of the results."""
    found = machine.describe()
    found["versions"].pop("onnxruntime", None)
    return found


if __name__ == "__main__":
    sys.exit(main())
