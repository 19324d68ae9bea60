"""Run the processes of a measurement one after another and collect their figures, so that nothing is lost if it is stopped halfway."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fastvlm_edge.bench.measure import Line, Plan, Settings, plan_for
from fastvlm_edge.bench.record import Samples, document_of
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.machine.description import describe, gpu_versions
from fastvlm_edge.machine.state import hottest, read_state
from fastvlm_edge.model_dir.engine_record import find_records
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.model_dir.verified import verify
from fastvlm_edge.nvidia.description import describe_gpu
from fastvlm_edge.progress import Progress

CHILD = "--process"
"""Option that makes `fastvlm-edge bench` one process of a measurement. Its value is the settings as JSON."""


class Measurement:
    """The measurement of one model directory. `document` can be called at any time."""

    def __init__(self, directory: Path, settings: Settings, processes: int) -> None:
        """Raises FastVLMError if the model directory is damaged, or if the settings do not fit it. The model is not loaded."""
        self.directory, self.settings, self.processes = directory, settings, processes
        self.manifest = read_manifest(directory)
        verify(directory, self.manifest)  # here, so that no process measures it
        self.plan: Plan = plan_for(self.manifest, TextTokenizer(directory / "tokenizer.json"), settings)
        self.samples = Samples()
        self._facts: dict[str, Any] = {}
        self._power: list[dict[str, Any]] = []
        self._done = 0
        self._machine = describe()
        self._states = [read_state()]

    def run(self, progress: Progress) -> Iterator[int]:
        """Run all processes, and yield the number of each when it ends. Raises FastVLMError if one fails; earlier figures are kept."""
        manifest = self.manifest
        progress.stage(f"measuring {manifest.name} ({manifest.precision})", self.processes * self._steps())
        for number in range(1, self.processes + 1):
            self.samples.begin_process()
            self._run_one(number, progress)
            self._done = number
            if self._facts.get("backend") != "ort" and "gpu" not in self._machine:  # not earlier: it takes memory and time on the GPU
                self._machine["gpu"] = describe_gpu()
                self._machine["versions"] |= gpu_versions()
            self._states.append(read_state())
            yield number
        progress.done()

    def document(self) -> dict[str, Any]:
        """The record so far."""
        manifest, settings = self.manifest, self.settings
        vision = manifest.vision.at(settings.image_size or manifest.vision.image_size)
        temperatures = [value for state in self._states if (value := hottest(state)) is not None]
        facts: dict[str, Any] = {
            "model": {
                "directory": str(self.directory),
                "name": manifest.name,
                "precision": manifest.precision,
                "image_size": vision.image_size,
                "visual_tokens": vision.tokens,
                "image_sizes": manifest.vision.sizes,
                "context": manifest.decoder.context,
                "toolkit_version": manifest.toolkit_version,
                "source": manifest.source.files,
                "files": {name: record.sha256 for name, record in manifest.files.items()},
            },
            **{name: value for name, value in self._facts.items() if name != "power"},
            "engines": [_engines(record) for record in find_records(self.directory)],
            "prompt_tokens": self.plan.prompt_tokens,
            "settings": {**dataclasses.asdict(settings), "processes": self.processes},
            "processes_done": self._done,
            "power": _joined(self._power),
            "state": {"before": self._states[0], "after": self._states[-1], "hottest_c": max(temperatures, default=None)},
            "machine": self._machine,
        }
        return document_of(self.samples, facts, partial=self._done < self.processes)

    def _steps(self) -> int:
        """Number of figures that every process gives, for the progress bar."""
        together = 3 * len(self.settings.slots) + 2 if self.settings.slots else 0
        return 3 + (len(self.plan.depths) > 1) + self.settings.runs * (9 + len(self.plan.depths) + together)

    def _run_one(self, number: int, progress: Progress) -> None:
        settings = json.dumps(dataclasses.asdict(self.settings))
        command = [sys.executable, "-m", "fastvlm_edge", "bench", str(self.directory), CHILD, settings, "--json"]
        failure: FastVLMError | None = None
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8")
            assert process.stdout is not None
            try:
                for text in process.stdout:
                    line = json.loads(text)
                    if "error" in line:  # printed by the command line because of --json
                        failure = FastVLMError(line["error"]["message"], line["error"]["mend"])
                    else:
                        self._take(line, number, progress)
                status = process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                process.stdout.close()
            if status:
                raise failure or _crash(status, errors, number)

    def _take(self, line: Line, number: int, progress: Progress) -> None:
        if "figure" in line:
            self.samples.add(line["figure"], line["value"])
            progress.advance()
            return
        facts = line["facts"]
        if "power" in facts:
            self._power.append(facts["power"])
        for name, value in facts.items():
            if name == "backend" and self._facts.get(name, value) != value:
                raise FastVLMError(
                    f"process {number} ran on {value}, and earlier processes on {self._facts[name]}",
                    "choose one with --backend (docs/bench.md)",
                )
            self._facts[name] = value


def _crash(status: int, errors: IO[bytes], number: int) -> FastVLMError:
    """The error of a process that ended without naming one; `errors` is what it wrote to stderr."""
    if status == -signal.SIGKILL:
        return FastVLMError(
            f"process {number} was killed, as Linux does if memory runs out", "close other programs, or convert with --precision int4"
        )
    if status < 0:
        return FastVLMError(f"process {number} was ended by signal {-status}", "try again, and report it if it happens again")
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    what = f"process {number} failed: {lines[-1] if lines else f'exit status {status}'}"
    return FastVLMError(what, "try again, and report it if it happens again")


def _engines(record: Any) -> dict[str, Any]:
    return {
        "target": record.target,
        "library": record.library,
        "version": record.version,
        "device": record.device,
        "verified": record.verified,
        "build_seconds": {part: entry.get("seconds") for part, entry in record.build.items() if isinstance(entry, dict)},
        "from_cache": {part: entry.get("cached") for part, entry in record.build.items() if isinstance(entry, dict)},
        "files": {name: entry.sha256 for name, entry in record.files.items()},
        "flags": record.flags,
    }


def _joined(powers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Power figures of all processes together: the mean of the means, and the highest peak and temperature."""
    found = [power for power in powers if power["sensor"] is not None]
    if not found:
        return dict(powers[-1]) if powers else {"sensor": None, "reason": "nothing was measured"}
    means = [power["mean_w"] for power in found if power["mean_w"] is not None]
    throttled = [power["throttled"] for power in found if power["throttled"] is not None]
    return {
        "sensor": found[-1]["sensor"],
        "mean_w": sum(means) / len(means) if means else None,
        "peak_w": max(power["peak_w"] for power in found),
        "temperature_c": max((power["temperature_c"] for power in found if power["temperature_c"] is not None), default=None),
        "throttled": any(throttled) if throttled else None,
    }
