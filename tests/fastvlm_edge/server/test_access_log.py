"""The access log: one JSON line a request, whatever happens to it, and nothing in it that was said."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from fastvlm_edge import FastVLM
from fastvlm_edge.server.access_log import AccessLog, note_tokens
from tests.fastvlm_edge.server.serving import serving


def ask(method: str, path: str, **options: Any) -> dict[str, Any]:
    """The line of a request."""

    async def answer(request: Request) -> Response:
        note_tokens(request.scope, 20, 3)
        note_tokens(request.scope, 1, 2)
        return PlainTextResponse("answer", 201)

    async def breaks(request: Request) -> Response:
        raise ValueError("secret")

    stream = io.StringIO()
    app = Starlette(routes=[Route("/v1/ask", answer, methods=["POST"]), Route("/breaks", breaks)])
    TestClient(AccessLog(app, stream), raise_server_exceptions=False).request(method, path, **options)
    assert stream.getvalue().count("\n") == 1
    line: dict[str, Any] = json.loads(stream.getvalue())
    assert "secret" not in stream.getvalue()
    assert 0 <= line.pop("seconds") < 60
    assert line.pop("time").endswith("+00:00")
    assert line.pop("client") == "testclient"
    return line


def test_a_request() -> None:
    line = ask("POST", "/v1/ask?key=secret", content=b"secret", headers={"Authorization": "Bearer secret", "X-Other": "secret"})
    assert line == {"method": "POST", "path": "/v1/ask", "status": 201, "prompt_tokens": 21, "completion_tokens": 5}


def test_faults_and_unknown_paths() -> None:
    assert ask("GET", "/breaks") == {"method": "GET", "path": "/breaks", "status": 500}
    assert ask("GET", "/missing") == {"method": "GET", "path": "/missing", "status": 404}


def test_a_path_cannot_forge_a_line() -> None:
    line = ask("GET", "/a%0a%7b%22status%22:200%7d" + "x" * 5000)
    assert line["status"] == 404
    assert line["path"].startswith('/a\n{"status":200}x')
    assert len(line["path"]) == 200


def test_it_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    TestClient(AccessLog(Starlette())).get("/")
    captured = capsys.readouterr()
    assert json.loads(captured.err)["status"] == 404
    assert captured.out == ""


def test_a_client_that_left_before_the_answer() -> None:
    async def leaves(scope: Any, receive: Any, send: Any) -> None:
        return None

    async def never(*_: Any) -> Any:
        raise AssertionError

    stream = io.StringIO()
    asyncio.run(AccessLog(leaves, stream)({"type": "http", "method": "GET", "path": "/"}, never, never))
    assert json.loads(stream.getvalue())["status"] == 499
    assert json.loads(stream.getvalue())["client"] is None


class Full(io.StringIO):
    """A file on a disk that is full."""

    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_breaks_no_request() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, Full()):
        app = Starlette(routes=[Route("/a", lambda _request: PlainTextResponse("answer"))])
        assert TestClient(AccessLog(app, stream)).get("/a").text == "answer"


def test_lines_of_the_server(vlm: FastVLM, capsys: pytest.CaptureFixture[str]) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 3}
    with serving(vlm, access_log=True) as client:
        capsys.readouterr()
        usage = client.post("/v1/chat/completions", json=body).json()["usage"]
        client.post("/v1/chat/completions", json={**body, "stream": True})
        client.post("/v1/responses", json={"input": "a secret", "max_output_tokens": 3})
        client.post("/v1/chat/completions", json={**body, "tools": ["a secret"]})
    text = capsys.readouterr().err
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 200, 400]
    assert [(line["prompt_tokens"], line["completion_tokens"]) for line in lines[:3]] == [(usage["prompt_tokens"], 3)] * 3
    assert "prompt_tokens" not in lines[3]
    assert "secret" not in text
