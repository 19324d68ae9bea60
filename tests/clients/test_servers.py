"""The examples for servers of others, with these servers' own packages: Ray Serve runs, Triton's and KServe's files fit their types."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.commands.demo import MODEL
from tests.browser.conftest import free_port

pytestmark = pytest.mark.clients
ROOT = Path(__file__).resolve().parents[2]
TRITON_CONFIG = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
print(json_format.MessageToJson(text_format.Parse(sys.stdin.read(), ModelConfig()), preserving_proto_field_name=True))
"""


def test_ray_serve_answers_as_the_model(clients: Path, demo_question: tuple[Path, str], tmp_path: Path) -> None:
    picture, question = demo_question
    script = Path(__file__).with_name("ray_serve_client.py")
    command = [str(clients / "python"), str(script), str(MODEL), str(free_port()), str(picture), question]
    patience = {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "60" for check in ("READY", "HEALTH")}  # for a loaded machine
    environment = {**os.environ, **patience, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    replies = json.loads(ended.stdout.strip().splitlines()[-1])
    with FastVLM.load(MODEL, "ort") as vlm:
        expected = vlm.generate(question, picture).text
    assert replies["text"] == expected
    assert len(replies["pieces"]) > 1 and "".join(replies["pieces"]) == expected


def test_kserves_resource(clients: Path) -> None:
    """Every field is one that KServe knows: a cluster would drop others without a word."""
    yaml, jsonschema = pytest.importorskip("yaml"), pytest.importorskip("jsonschema")
    path = clients.parent / "kserve.yaml"
    if not path.is_file():
        pytest.skip(f"{path} is not there; make test-clients downloads it into a new environment")
    definition = yaml.safe_load(path.read_text(encoding="utf-8"))
    (schema,) = [_closed(each["schema"]["openAPIV3Schema"]) for each in definition["spec"]["versions"] if each["name"] == "v1beta1"]
    schema["properties"]["metadata"] = {}  # Kubernetes knows its fields itself
    resource = yaml.safe_load((ROOT / "examples" / "kserve" / "inference-service.yaml").read_text(encoding="utf-8"))
    validator = jsonschema.Draft7Validator(schema)
    assert [error.message for error in validator.iter_errors(resource)] == []
    resource["spec"]["predictor"]["container"] = []
    assert len(list(validator.iter_errors(resource))) == 1


def _closed(schema: Any) -> Any:
    """A schema without room for unknown fields."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    closed = {} if is_open or "properties" not in schema else {"additionalProperties": False}
    return {**{name: _closed(each) for name, each in schema.items()}, **closed}


def test_tritons_configuration(clients: Path) -> None:
    text = (ROOT / "examples" / "triton" / "fastvlm" / "config.pbtxt").read_text(encoding="utf-8")
    ended = subprocess.run([str(clients / "python"), "-c", TRITON_CONFIG], input=text, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    config = json.loads(ended.stdout)
    assert config["backend"] == "python" and config["model_transaction_policy"] == {"decoupled": True}
    inputs = {each["name"]: (each["data_type"], each["dims"], each.get("optional", False)) for each in config["input"]}
    assert inputs == {
        "prompt": ("TYPE_STRING", ["1"], False),
        "image": ("TYPE_STRING", ["1"], True),
        "max_new_tokens": ("TYPE_INT32", ["1"], True),
    }
    assert [(each["name"], each["data_type"]) for each in config["output"]] == [("text", "TYPE_STRING")]
    assert set(config["parameters"]) == {"model", "slots"}
