"""Load `ort-cuda`: onnxruntime on an NVIDIA GPU, verified like a pair of engines at its first load. Not yet run on hardware."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from fastvlm_edge.backends.ort import OrtBackend
from fastvlm_edge.backends.ort_device import DeviceDecoder
from fastvlm_edge.backends.ort_session import graph_name
from fastvlm_edge.backends.verification.check import check
from fastvlm_edge.backends.verification.reference import read_reference
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.host import read_jetson
from fastvlm_edge.machine.libraries import read_driver
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.json_record import from_json, parse_json
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.progress import Progress, SilentProgress

VERDICT_NAME = "ort-cuda.json"
EVIDENCE = "ort-cuda.mismatch"
"""Results of a rejected check are kept in this directory of the model directory."""


@dataclass(frozen=True)
class Verdict:
    """`ort-cuda.json`: what the check of a model directory found, and with what."""

    device: str
    driver: str
    """Version of its driver, or of Jetson Linux; empty if the system does not report it."""
    onnxruntime: str
    files: dict[str, str]
    """Graph or weights -> sha256."""
    faults: list[str] = field(default_factory=list)
    """What disagreed; empty if everything agreed."""
    figures: dict[str, Any] = field(default_factory=dict)

    def concerns(self, other: Verdict) -> bool:
        """Whether both are about the same GPU, driver, version and files."""
        names = ("device", "driver", "onnxruntime", "files")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def write(self, directory: Path) -> None:
        """Write `ort-cuda.json`, completely or not at all."""
        with whole_file(directory / VERDICT_NAME) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def read_verdict(directory: Path) -> Verdict | None:
    """The verdict in a model directory; None if there is none that can be read: then the check is repeated."""
    try:
        verdict: Verdict = from_json(Verdict, parse_json((directory / VERDICT_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return verdict


def describe_device(probe: Probe) -> tuple[str, str]:
    """The GPUs of this machine, those of nvidia-smi or the board, and the version of their driver, on a Jetson that of Jetson Linux.

    CUDA_VISIBLE_DEVICES decides which GPU runs, so it belongs to them. The driver is empty if the system does not report it.
    """
    found, jetson = read_driver(probe), read_jetson(probe)
    cards = [f"{card.name} {'.'.join(map(str, card.compute_capability or ()))}".strip() for card in found.cards]
    linux = "" if jetson is None or jetson.l4t is None else f"Jetson Linux {'.'.join(map(str, jetson.l4t))}"
    driver = linux or found.kernel_module or next((card.driver for card in found.cards), "")
    board = (probe.text("proc/device-tree/model") or "").strip("\0\n ")
    visible = probe.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = ", ".join([*(cards or [board or "unknown GPU"]), *([] if visible is None else [f"CUDA_VISIBLE_DEVICES={visible}"])])
    return gpus, driver


def load_ort_cuda(
    directory: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    slots: int = 1,
    progress: Progress | None = None,
    probe: Probe | None = None,
) -> OrtBackend:
    """Load both graphs on the GPU. Where they never ran with this GPU, driver, onnxruntime and these files, check them first.

    They are compared with the reference that `convert` stored. Raises FastVLMError if onnxruntime cannot run the graphs on a GPU, or if
    they disagree, now or at an earlier load.
    """
    progress = progress or SilentProgress()
    names = [graph_name(part, manifest, True) for part in ("vision", "decoder")] + ["vision.weights", "decoder.weights"]
    hashes = {name: manifest.files[name].sha256 for name in names if name in manifest.files}
    now = Verdict(*describe_device(probe or Probe()), ort.__version__, hashes)
    known = read_verdict(directory)
    if known is not None and known.concerns(now):
        if known.faults:
            raise _disagreement(known, directory, "at an earlier load")
        return _load(directory, manifest, threads, slots, progress)
    backend = _load(directory, manifest, threads, slots, progress)
    try:
        reference = read_reference(directory)
        findings = check(backend, reference, manifest, progress, "ort-cuda (first load only)")
        faults = [f"{fault.part}: {fault.text}" for fault in findings.faults]
        verdict = dataclasses.replace(now, faults=faults, figures=findings.figures)
        with contextlib.suppress(OSError):  # in a read-only directory it is checked at every load
            verdict.write(directory)
        if faults:
            raise _disagreement(verdict, directory, findings.keep(directory / EVIDENCE, reference))
    except BaseException:
        backend.close()
        raise
    finally:
        progress.done()
    return backend


def _load(directory: Path, manifest: Manifest, threads: int | None, slots: int, progress: Progress) -> OrtBackend:
    return OrtBackend(directory, manifest, threads=threads, slots=slots, progress=progress, cuda=True, load_decoder=DeviceDecoder)


def _disagreement(verdict: Verdict, directory: Path, when: str) -> FastVLMError:
    more = f"; {len(verdict.faults)} figures in all are out of bounds" if len(verdict.faults) > 1 else ""
    what = f"onnxruntime {verdict.onnxruntime} on {verdict.device} disagrees with {verdict.figures.get('reference', 'the reference')}"
    return FastVLMError(
        f"{what}: {verdict.faults[0]}{more} ({when})",
        f"report this as a bug, and use --backend ort; delete {directory / VERDICT_NAME} to check again",
    )
