"""The manifest for Kubernetes: its schema, its command and its versions."""

from __future__ import annotations

import re
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fastvlm_edge.commands import batch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "kubernetes"
DEFINITION = ROOT / "build" / "kuberay" / "rayjob.yaml"
"""KubeRay's custom resource definition, which `make test-ray` downloads."""

pytestmark = pytest.mark.ray


@pytest.fixture
def manifest() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema of a RayJob v1, in which unknown fields are errors, as for `kubectl apply`."""
    if not DEFINITION.exists():
        pytest.skip(f"{DEFINITION} is not there; make test-ray downloads it")
    definition = yaml.load(DEFINITION.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    close(found)
    return found


def close(schema: Any) -> None:
    """Let objects have no fields but those of the schema."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            close(value)


def test_it_follows_the_schema(manifest: dict[str, Any], schema: dict[str, Any]) -> None:
    manifest["metadata"] = {}  # of any object of Kubernetes
    jsonschema.validate(manifest, schema)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "entryPoint"), "true"),
        (("spec", "backoffLimit"), "1"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"), {"num-cpus": 0}),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"), 4),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMount"), []),
    ],
)
def test_mistakes_are_found(place: tuple[Any, ...], value: Any, manifest: dict[str, Any], schema: dict[str, Any]) -> None:
    wrong = deepcopy(manifest)
    wrong["metadata"] = {}
    at = wrong
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_its_command_is_accepted(manifest: dict[str, Any]) -> None:
    program, command, *arguments = shlex.split(manifest["spec"]["entrypoint"])
    assert (program, command) == ("fastvlm-edge", "batch")
    options = batch.parser().parse_args(arguments)
    workers = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert options.engine == "ray" and options.workers == sum(group["replicas"] for group in workers)


def test_one_version_of_ray(manifest: dict[str, Any]) -> None:
    version = manifest["spec"]["rayClusterSpec"]["rayVersion"]
    container = (FOLDER / "Containerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"(?:ray:|ray==)(\d+\.\d+\.\d+)", container)) == {version}
    images = re.findall(r"image: \S+?:(\S+)", (FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))
    assert len(images) == 2 and set(images) == {version}
