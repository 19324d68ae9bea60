"""What decides the answers of a batch, written beside its results, so that nobody mixes the answers of two jobs in one file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.cascade import ImageSize, check_image_size
from fastvlm_edge.generation.images import model_digest
from fastvlm_edge.generation.sampling import SamplingParams
from fastvlm_edge.inputs.rgb import to_colour
from fastvlm_edge.model_dir.atomic import whole_file
from fastvlm_edge.model_dir.json_record import from_json, parse_json
from fastvlm_edge.model_dir.manifest import Manifest

_SHOWN = 60


@dataclass(frozen=True)
class Job:
    """Everything that decides an answer, but the row. Make it with `job_for`."""

    model: str
    """Name and precision."""
    model_sha256: str
    """Of all its files, in hexadecimal. The folder of the model may differ between machines."""
    prompt: str | None
    """The question of rows without their own."""
    system: str | None
    """None is the system prompt of the model."""
    geometry: str
    background: list[int]
    """Red, green and blue, 0 to 255."""
    sampling: dict[str, Any]
    """Options of `FastVLM.generate`, defaults included."""
    image_size: Any = None
    """Pixels of a side, or `auto`; None is the model's default."""
    cascade: dict[str, Any] | None = None
    """What decides with `auto`, if it was fitted."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """sha256 of the job, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def job_for(
    manifest: Manifest,
    sampling: Mapping[str, Any],
    *,
    prompt: str | None = None,
    system: str | None = None,
    geometry: str | None = None,
    background: str = "white",
    image_size: ImageSize = None,
) -> Job:
    """The job of a model. `sampling` has options of `FastVLM.generate`; the others are those of `FastVLM.load` and `open_rows`.

    Raises FastVLMError if the model does not have the `image_size`.
    """
    check_image_size(image_size, manifest)
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams) if field.name != "format"}
    options = json.loads(json.dumps({**defaults, **sampling}))  # tuples become lists, as they are read again
    return Job(
        model=f"{manifest.name} {manifest.precision}",
        model_sha256=model_digest(manifest).hex(),
        prompt=prompt,
        system=system,
        geometry=geometry or manifest.vision.geometry,
        background=list(to_colour(background)),
        sampling=options,
        image_size=None if image_size == manifest.vision.image_size else image_size,
        cascade=cascade_of(manifest) if image_size == "auto" else None,
    )


def cascade_of(manifest: Manifest) -> dict[str, Any] | None:
    """What decides an answer with `auto`."""
    cascade = manifest.cascade
    return None if cascade is None else {name: getattr(cascade, name) for name in ("sizes", "threshold", "confidence")}


def sidecar(results: Path) -> Path:
    """Where the job of a file of results is written."""
    return results.with_name(f"{results.name}.job.json")


def write_job(results: Path, job: Job) -> None:
    """Write the job of a file of results that is still empty."""
    with whole_file(sidecar(results)) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(job.to_json(), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_job(results: Path) -> Job:
    """The job of a file of results. Raises FastVLMError if it is not known."""
    path = sidecar(results)
    try:
        job: Job = from_json(Job, parse_json(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        what = f"{results} is not empty, but {path.name}, which says how its rows were answered, is not beside it"
        raise FastVLMError(what, "give another file with -o") from None
    except ValueError as error:
        raise FastVLMError(f"{path} is damaged ({error})", "give another file with -o") from None
    return job


def check_job(results: Path, before: Job, job: Job) -> None:
    """Raise FastVLMError, which names the difference, if the rows of `results`, answered for the job `before`, are those of another job."""
    old, new = _flat(before), _flat(job)
    if before.model_sha256 == job.model_sha256:
        old["model"] = new["model"]  # under another name
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            what = f"{results} was begun with {_named(name, old)}, but now it is {_shown(new.get(name))}"
            raise FastVLMError(what, "give another file with -o, or go on with the same model and options")


def _flat(job: Job) -> dict[str, Any]:
    fields = job.to_json()
    sampling: dict[str, Any] = fields.pop("sampling")
    model = f"{fields.pop('model')} with sha256 {fields['model_sha256'][:12]}..."
    return {"model": model, **fields, **sampling}


def _named(name: str, values: dict[str, Any]) -> str:
    return f"the {name.replace('_', ' ')} {_shown(values.get(name))}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
