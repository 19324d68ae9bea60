"""Lines are posted in order; an address that fails, is slow or leads elsewhere delays nothing and is counted."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastvlm_edge.camera import webhook
from fastvlm_edge.camera.webhook import Webhook
from fastvlm_edge.errors import FastVLMError


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


class Site:
    """An address that remembers what came. `answer` gives the status, and where a redirect leads."""

    def __init__(self, answer: Callable[[], tuple[int, str | None]] = lambda: (200, None)) -> None:
        self.lines: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                site.headers.append(dict(self.headers))
                site.lines.append(self.rfile.read(int(self.headers["Content-Length"])))
                status, where = answer()
                self.send_response(status)
                if where is not None:
                    self.send_header("Location", where)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_given: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}/hook/secret"


@contextmanager
def running(site: Site) -> Iterator[Site]:
    thread = threading.Thread(target=site.server.serve_forever)
    thread.start()
    try:
        yield site
    finally:
        site.server.shutdown()
        thread.join()
        site.server.server_close()


def test_lines_arrive_in_order() -> None:
    notes: list[str] = []
    with running(Site()) as site:
        hook = Webhook(site.address, notes.append)
        for number in range(20):
            hook.post(json.dumps({"number": number, "text": "größer"}, ensure_ascii=False))
        hook.close()
    assert [json.loads(line) for line in site.lines] == [{"number": number, "text": "größer"} for number in range(20)]
    assert {head["Content-Type"] for head in site.headers} == {"application/json"}
    assert (hook.posted, hook.failed, notes) == (20, 0, [])


def test_failures_are_told_once_and_counted() -> None:
    notes: list[str] = []
    statuses = iter([200, 500, 404, 200, 503])
    with running(Site(lambda: (next(statuses), None))) as site:
        hook = Webhook(site.address, notes.append)
        for _ in range(5):
            hook.post("{}")
        hook.close()
    assert (hook.posted, hook.failed) == (2, 3)
    assert notes == [
        "the webhook at 127.0.0.1 failed: HTTP status 500",
        "the webhook at 127.0.0.1 works again",
        "the webhook at 127.0.0.1 failed: HTTP status 503",
    ]


def test_nobody_listens() -> None:
    notes: list[str] = []
    site = Site()
    site.server.server_close()
    hook = Webhook(site.address, notes.append)
    hook.post("{}")
    hook.close()
    assert (hook.posted, hook.failed) == (0, 1)
    assert len(notes) == 1 and "Connection refused" in notes[0] and "secret" not in notes[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    notes: list[str] = []
    with running(Site()) as other, running(Site(lambda: (status, other.address))) as site:
        hook = Webhook(site.address, notes.append)
        hook.post("{}")
        hook.close()
    assert other.lines == [] and (hook.posted, hook.failed) == (0, 1)
    assert notes == [f"the webhook at 127.0.0.1 failed: HTTP status {status}, a redirect, which is not followed"]


def test_a_slow_address_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "QUEUED", 5)
    notes: list[str] = []
    leave = threading.Event()
    with running(Site(lambda: (200 if leave.wait(20) else 500, None))) as site:
        hook = Webhook(site.address, notes.append)
        began = time.monotonic()
        hook.post("{}")
        while not site.lines:
            time.sleep(0.01)
        for _ in range(9):
            hook.post("{}")
        assert time.monotonic() - began < 1 and hook.failed == 4
        assert notes == ["the webhook at 127.0.0.1 failed: 5 answers are waiting"]
        hook.close(seconds=0.2)
        assert time.monotonic() - began < 3 and hook.failed == 10 and hook.posted == 0
        leave.set()


def test_https_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl, which makes the certificate")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    site = Site()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
    address = f"https://localhost:{site.server.server_port}/"
    notes: list[str] = []
    with running(site):
        stranger = Webhook(address, notes.append)
        stranger.post("{}")
        stranger.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        friend = Webhook(address, notes.append)
        friend.post("{}")
        friend.close()
    assert (stranger.failed, friend.posted) == (1, 1) and len(site.lines) == 1
    assert len(notes) == 1 and "certificate" in notes[0].lower()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ftp://host/x", "not an address of http or https"),
        ("file:///etc/passwd", "not an address of http or https"),
        ("example.org/x", "not an address of http or https"),
        ("http://", "not an address of http or https"),
        ("http://[::1", "not an address ("),
        ("http://host:port/", "not an address ("),
        ("http://user:secret@host/", "has a user name in its address"),
        ("http://host/a b", "has characters that no address has"),
        ("http://host/\r\nX: y", "has characters that no address has"),
        ("", "not an address of http or https"),
    ],
)
def test_addresses_that_are_refused(address: str, says: str) -> None:
    with pytest.raises(FastVLMError) as error:
        Webhook(address, print)
    assert says in str(error.value) and "secret" not in str(error.value)
