"""/openapi.json is true: it has every address, and every answer of the server matches what it says of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from fastvlm_edge import FastVLM
from fastvlm_edge.server.openapi import describe
from fastvlm_edge.server.settings import Settings
from tests.fastvlm_edge.server.serving import PROMPT, events_of, picture_url, serving

ASK = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}


@pytest.fixture(scope="module")
def client(vlm: FastVLM) -> Iterator[TestClient]:
    with serving(vlm, timeout_seconds=600.0) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    whole = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def valid(document: dict[str, Any], schema: dict[str, Any], value: Any) -> bool:
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]}).is_valid(value)


def test_every_address_for_programs_is_in_it(client: TestClient, document: dict[str, Any]) -> None:
    app: Any = client.app
    routes = [route for route in app.routes if isinstance(route, Route)]
    served = {(route.path.replace(":path", ""), method.lower()) for route in routes for method in route.methods or () if method != "HEAD"}
    described = {(path, method) for path, methods in document["paths"].items() for method in methods if method != "parameters"}
    assert described == served


def test_every_schema_is_valid(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema.get("description") or "anyOf" in schema, name
    names = [
        operation["operationId"] for path in document["paths"].values() for method, operation in path.items() if method != "parameters"
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/health/ready", None, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/models/demo", None, 200),
        ("GET", "/v1/models/other", None, 404),
        ("GET", "/props", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/openapi.json", None, 200),
        ("POST", "/tokenize", {"content": "a"}, 200),
        ("POST", "/tokenize", {"content": "a", "with_pieces": True, "return_token_strs": True}, 200),
        ("POST", "/tokenize", {}, 400),
        ("POST", "/tokenize", {"content": "a", "model": "other"}, 404),
        ("POST", "/detokenize", {"tokens": [1, 2]}, 200),
        ("POST", "/detokenize", {"tokens": [-1]}, 400),
        ("POST", "/v1/chat/completions", ASK, 200),
        ("POST", "/v1/chat/completions", {**ASK, "logprobs": True, "top_logprobs": 2, "n": 2}, 200),
        ("POST", "/v1/chat/completions", {**ASK, "tools": [{}]}, 400),
        ("POST", "/v1/chat/completions", {**ASK, "model": "other"}, 404),
        ("POST", "/v1/responses", {"input": PROMPT, "max_output_tokens": 3}, 200),
        (
            "POST",
            "/v1/responses",
            {"input": PROMPT, "max_output_tokens": 3, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
            200,
        ),
        ("POST", "/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": picture_url()}]}]}, 200),
        ("POST", "/v1/responses", {"input": PROMPT, "tools": [{}]}, 400),
    ],
)
def test_answers_match_it(client: TestClient, document: dict[str, Any], method: str, path: str, body: Any, status: int) -> None:
    answer = client.request(method, path, **({} if body is None else {"json": body}))
    assert answer.status_code == status
    operation = document["paths"]["/v1/models/{name}" if path.startswith("/v1/models/") else path][method.lower()]
    content = operation["responses"][str(status)]["content"]
    media = answer.headers["content-type"].partition(";")[0]
    check(document, content[media]["schema"], answer.json() if media == "application/json" else answer.text)
    if body is not None and status in (200, 404):
        check(document, operation["requestBody"]["content"]["application/json"]["schema"], body)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", ASK), ("/v1/responses", {"input": PROMPT, "max_output_tokens": 3})])
def test_events_match_it(client: TestClient, document: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    text = client.post(path, json={**body, "stream": True}).text.replace("data: [DONE]\n\n", "")
    event = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    schema = event["properties"]["data"]["contentSchema"]
    events = events_of(text)
    assert len(events) > 3
    for _, data in events:
        check(document, schema, data)


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        (ASK, True),
        ({**ASK, "tools": []}, True),
        ({**ASK, "tools": None}, True),
        ({**ASK, "tools": [{}]}, False),
        ({**ASK, "unheard_of": 1}, False),
        ({**ASK, "temperature": -1}, False),
        ({"messages": []}, False),
    ],
)
def test_requests_fit_it_as_the_server_takes_them(client: TestClient, document: dict[str, Any], body: dict[str, Any], fits: bool) -> None:
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert valid(document, schema, body) == fits == (client.post("/v1/chat/completions", json=body).status_code == 200)


def test_other_statuses_are_documented(client: TestClient, document: dict[str, Any], vlm: FastVLM) -> None:
    documented = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert client.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    with serving(vlm, max_body_bytes=100) as small:
        assert small.post("/v1/chat/completions", json={**ASK, "user": "x" * 100}).status_code == 413
    assert client.get("/health", headers={"host": "elsewhere"}).status_code == 403
    assert "403" not in describe(Settings(host="0.0.0.0"))["paths"]["/health"]["get"]["responses"]
    assert {"200", "400", "403", "404", "408", "413", "415", "429", "500", "503", "504"} == set(documented)
    assert "504" not in describe(Settings())["paths"]["/v1/chat/completions"]["post"]["responses"]


def test_keys(vlm: FastVLM) -> None:
    document = describe(Settings(api_keys=("secret",)))
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert "secret" not in str(document)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method != "parameters":
                closed = path not in ("/health", "/health/ready")
                assert ("security" in operation, "401" in operation["responses"]) == (closed, closed), path
