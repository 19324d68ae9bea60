"""API keys: every path but /health needs one, and nothing of a request is looked at before."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fastvlm_edge import FastVLM
from fastvlm_edge.server import auth
from fastvlm_edge.server.auth import Auth
from fastvlm_edge.server.settings import Settings
from tests.fastvlm_edge.server.serving import serving

KEYS = ("first-key", "zwoelfter-schlüssel")


def client(keys: Sequence[str] = KEYS) -> TestClient:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("served")

    app = Starlette(routes=[Route(path, answer, methods=["GET", "POST"]) for path in ("/health", "/v1/models")])
    return TestClient(Auth(app, keys))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_key_opens(key: str, scheme: str) -> None:
    assert client().get("/v1/models", headers={b"Authorization": f"{scheme} {key}".encode()}).text == "served"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-key2",
        "Bearer FIRST-KEY",
        "first-key",
        "Basic first-key",
        "Bearer a b",
    ],
)
def test_everything_else_is_refused(header: str | None) -> None:
    answer = client().post("/v1/models", headers={} if header is None else {"Authorization": header}, content=b"{")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert not any(key in answer.text for key in KEYS)


def test_two_headers_are_refused() -> None:
    answer = client().get("/v1/models", headers=[("Authorization", "Bearer first-key"), ("Authorization", "Bearer wrong")])
    assert answer.status_code == 401


def test_only_whole_open_paths_are_open() -> None:
    assert client().get("/health").text == "served"
    for path in (
        "/page.html",
        "/health/",
        "/healthy",
        "/v1/models?/health",
        "/health%2f..%2fv1/models",
        "/missing",
        "/metrics",
    ):
        assert client().get(path).status_code == 401


def test_without_keys_everything_is_open() -> None:
    assert client(()).get("/v1/models").text == "served"


def test_all_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return hmac.compare_digest(given, known)

    monkeypatch.setattr(auth, "compare_digest", compare)
    assert client().get("/v1/models", headers={"Authorization": "Bearer first-key"}).text == "served"
    assert compared == [key.encode() for key in KEYS]


# Names of the server ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST.:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]", "127.0.0.1:", "board.local:1"]
)
def test_a_local_server_answers_by_its_own_names(vlm: FastVLM, host: str) -> None:
    with serving(vlm, allowed_hosts=("Board.local",)) as served:
        assert served.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil.example"),
        *("", "[::1", "a b", "localhost:8000:8000", "0.0.0.0", "192.168.0.2"),
    ],
)
def test_a_page_whose_name_leads_here_is_refused(vlm: FastVLM, host: str) -> None:
    with serving(vlm) as served:
        for path in ("/v1/models", "/", "/health", "/metrics"):
            answer = served.get(path, headers={"Host": host})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed", path
        assert 'requests_rejected_total{model_name="demo",status="403"} 4.0' in served.get("/metrics").text


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"localhost", "127.0.0.1", "[::1]"}),
        ({"host": "localhost"}, {"localhost", "127.0.0.1", "[::1]"}),
        ({"host": "::1"}, {"localhost", "127.0.0.1", "[::1]"}),
        ({"host": "127.0.0.9"}, {"localhost", "127.0.0.1", "[::1]", "127.0.0.9"}),
        ({"api_keys": ("a-key",)}, None),
        ({"host": "0.0.0.0"}, None),
        ({"host": "board.local"}, None),
        ({"host": "0.0.0.0", "allowed_hosts": ("board",)}, {"localhost", "127.0.0.1", "[::1]", "0.0.0.0", "board"}),
        ({"api_keys": ("a-key",), "allowed_hosts": ("board",)}, {"localhost", "127.0.0.1", "[::1]", "board"}),
    ],
)
def test_which_names_a_server_has(settings: dict[str, Any], names: set[str] | None) -> None:
    assert Settings(**settings).names == names


# The whole server ---------------------------------------------------------------------------------------------------------------


def test_the_server_asks_for_a_key(vlm: FastVLM) -> None:
    with serving(vlm, api_keys=KEYS) as served:
        body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}
        key = {"Authorization": f"Bearer {KEYS[0]}"}
        for path, status in (("/v1/chat/completions", 200), ("/v1/responses", 400), ("/tokenize", 400), ("/detokenize", 400)):
            assert served.post(path, json=body).status_code == 401
            assert served.post(path, json=body, headers=key).status_code == status
        for path in ("/v1/models", "/v1/models/demo", "/props", "/metrics", "/openapi.json"):
            assert served.get(path).status_code == 401
            assert served.get(path, headers=key).status_code == 200
        assert 'requests_rejected_total{model_name="demo",status="401"} 9.0' in served.get("/metrics", headers=key).text
        assert served.get("/health").status_code == 200
        assert served.get("/v1/models", headers={"Origin": "https://other.example"}).status_code == 401
        assert served.post("/v1/chat/completions", content=b"x" * 1000).status_code == 401, "before the body is looked at"
