"""The server of a loaded model in a thread of this process, on a free port, and requests to it without any client library."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from fastvlm_edge import AsyncFastVLM, FastVLM
from fastvlm_edge.server.app import make_app
from fastvlm_edge.server.limits import HeadLimit
from fastvlm_edge.server.settings import Settings
from fastvlm_edge.server.state import ServerState

DEMO = Path(__file__).resolve().parents[2] / "fastvlm_edge" / "demo"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Answer:
    """An answer to a request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The four fields of an error."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    port: int
    state: ServerState
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def get(self, path: str) -> Answer:
        return self.send("GET", path)

    def post(self, body: Any, path: str = CHAT, **headers: str) -> Answer:
        """Post JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, {"content-type": "application/json", **headers})

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def open(self, body: Any) -> socket.socket:
        """A connection on which a chat request was sent, and nothing read."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection


@contextmanager
def serving(vlm: FastVLM, *, ready: bool = True, **settings: Any) -> Iterator[Served]:
    """Serve a model, and by default wait until it is ready."""
    app = make_app(AsyncFastVLM(vlm), Settings(**{"access_log": False, **settings}))
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, http=HeadLimit, ws="none", lifespan="on", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    state: ServerState = app.state.server
    try:
        wait_until(lambda: server.started and (state.ready.is_set() or not ready))
        yield Served(server.servers[0].sockets[0].getsockname()[1], state, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def data_url(picture: Path | bytes) -> str:
    """A picture file as an address."""
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def image(picture: Path | bytes, **more: Any) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(picture), **more}}


def text(text: str) -> dict[str, Any]:
    """A text as a part of a message."""
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def ask(*parts: Any, **more: Any) -> dict[str, Any]:
    """The body of a chat request with one message."""
    return {"messages": [user(*parts)], **more}


def events(body: bytes) -> list[tuple[str, str]]:
    """(name, data) of server-sent events; comments have the name `:`."""
    found = []
    for block in body.decode().split("\n\n")[:-1]:
        name = data = ""
        for line in block.split("\n"):
            if line.startswith(":"):
                name = ":"
            elif line.startswith("event: "):
                name = line[7:]
            else:
                assert line.startswith("data: "), line
                data = line[6:]
        found.append((name, data))
    return found
