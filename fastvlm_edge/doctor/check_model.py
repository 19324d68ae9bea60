"""Findings on a model directory: is it complete, does it fit into memory, and do its engines run on this machine."""

from __future__ import annotations

from pathlib import Path

from fastvlm_edge.doctor.check_board import gib
from fastvlm_edge.doctor.facts import Facts
from fastvlm_edge.doctor.findings import Finding, ok, problem, warning
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.engine_record import EngineRecord, Gpu, engine_folders, mismatch, read_record
from fastvlm_edge.model_dir.manifest import Manifest, links_outside, read_manifest, verify_files

_COPY_AGAIN = "copy the model directory again, or convert the checkpoint again"


def check_model(directory: Path, facts: Facts) -> list[Finding]:
    """Findings on the model directory. Every file is read once for its sha256, which takes as long as copying the directory."""
    try:
        manifest = read_manifest(directory)
        verify_files(directory, manifest, hashes=True)
    except FastVLMError as error:
        return [problem("model", error.what, error.mend or _COPY_AGAIN)]
    except OSError as error:
        return [problem("model", f"{error.filename} cannot be read: {error.strerror}", f"sudo chown -R $USER {directory}")]
    nbytes = sum(record.bytes for record in manifest.files.values())
    findings = [ok("model", f"{manifest.name}, {manifest.precision}, {gib(nbytes)}, complete")]
    if links := links_outside(directory):
        text = f"{links[0].name} is a link to a file outside the directory, which some versions of onnxruntime refuse to load"
        findings.append(warning("model links", text, f"cp -rL {directory} NEW"))
    if nbytes > facts.memory.available:
        text = f"its weights alone need {gib(nbytes)}, and {gib(facts.memory.available)} are free"
        findings.append(problem("model memory", text, "fastvlm-edge convert CHECKPOINT -o MODEL --precision int4"))
    return [*findings, *_engines(directory, manifest, facts)]


def _engines(directory: Path, manifest: Manifest, facts: Facts) -> list[Finding]:
    build = f"fastvlm-edge build {directory}"
    folders = engine_folders(directory)
    if not folders:
        if facts.has_gpu:
            return [warning("engines", "no engines yet; the GPU is unused until you build them", build)]
        return [ok("engines", "none, and a CPU needs none")]
    findings = []
    for folder in folders:
        try:
            record = read_record(folder)
        except FastVLMError as error:
            findings.append(problem(f"engines ({folder.name})", error.what, error.mend or f"{build} --force"))
            continue
        reason = _damage(folder, record) or _unfit(record, manifest, facts)
        if reason is None and record.faults:
            text = f"disagreed with their reference on {record.parity.get('device')}, which does not use them: {record.faults[0]['text']}"
            findings.append(warning(f"engines ({folder.name})", text, f"{build} --target {record.target} --force"))
        elif reason is None:
            compared = "verified" if record.verified else "will be verified at their first run"
            findings.append(ok(f"engines ({folder.name})", f"fit this machine; {compared}"))
        elif facts.has_gpu:
            findings.append(warning(f"engines ({folder.name})", f"do not run on this machine: {reason}", f"{build} --force"))
        else:
            findings.append(ok(f"engines ({folder.name})", f"for another machine: {reason}; onnxruntime answers on this one"))
    if facts.has_gpu and all(finding.status != "ok" for finding in findings):
        findings.append(problem("engines", "none of them runs on this machine", f"{build} --force"))
    return findings


def _damage(folder: Path, record: EngineRecord) -> str | None:
    for name, entry in record.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {entry.bytes}"
    return None


def _unfit(record: EngineRecord, manifest: Manifest, facts: Facts) -> str | None:
    """Why the loader would refuse the engines; None if it would load them.

    A version that is known only from the file name of libnvinfer has fewer numbers; only these are compared.
    """
    found = facts.tensorrt
    version = found.rtx if record.library == "tensorrt_rtx" else found.module if found.module not in (None, "unknown") else found.library
    if version is None:
        return f"{record.library} is not installed"
    if version == "unknown" or f"{record.version}.".startswith(f"{version}."):
        version = record.version
    capability = facts.compute_capability
    if capability is None:
        return "this machine has no GPU"
    if facts.jetson is not None:
        gpu = Gpu("this board", capability, memory_bytes=facts.memory.total, board=facts.jetson.name)
    else:
        gpu = Gpu(facts.driver.cards[0].name if facts.driver.cards else "this GPU", capability)
    return mismatch(record, manifest, record.library, version, gpu)
