"""Downloads: from a TLS server of this test whose certificate is trusted, at addresses that a resolver of this test gives."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastvlm_edge.server import download
from fastvlm_edge.server.errors import RequestError

PUBLIC, OTHER, PRIVATE = "93.184.216.34", "2606:2800:220:1::1", "10.0.0.7"
HOST = "pictures.example"
MOST = 100_000


@dataclass
class Server:
    """Hosts whose names resolve to public addresses, connections to which come to this process."""

    port: int = 0
    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    names: dict[str, list[list[str]]] = field(default_factory=dict)
    """What the resolver says of a name, look-up by look-up; the last stays."""
    looked_up: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    """The Host headers."""

    def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append(host)
        said = self.names.get(host)
        if said is None:
            raise socket.gaierror(-2, "Name or service not known")
        return said.pop(0) if len(said) > 1 else said[0]

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connected.append(address)
        return socket.create_connection(("127.0.0.1", self.port), seconds)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and its certificate for three names, in one file."""
    folder = tmp_path_factory.mktemp("certificate")
    names = f"subjectAltName=DNS:{HOST},DNS:second.example,DNS:rebinding.example"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-subj", f"/CN={HOST}", "-addext", names, "-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    subprocess.run([*command, "-keyout", folder / "key", "-out", folder / "certificate"], check=True, capture_output=True)
    (folder / "both").write_bytes((folder / "key").read_bytes() + (folder / "certificate").read_bytes())
    return folder / "both"


@pytest.fixture
def server(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server(names={HOST: [[PUBLIC]], "second.example": [[OTHER]]})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.hosts.append(self.headers["Host"])
            found.answers[self.path](self)

        def log_message(self, format: str, *args: object) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None: ...

    http = Quiet(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    found.port = http.server_port
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(download, "resolve", found.resolve)
    monkeypatch.setattr(download, "connect_to", found.connect)
    yield found
    http.shutdown()
    http.server_close()


def sends(body: bytes, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def moved(to: str, status: int = 302) -> Callable[[BaseHTTPRequestHandler], None]:
    return sends(b"", status, {"Location": to})


def get(url: str, most: int = MOST) -> bytes:
    return asyncio.run(download.download(url, most))


def refused(url: str, most: int = MOST) -> str:
    with pytest.raises(RequestError) as caught:
        get(url, most)
    assert caught.value.status in (400, 413)
    return str(caught.value)


def test_a_picture_comes_from_the_address_that_was_checked(server: Server) -> None:
    server.answers["/a%20b.png?size=2"] = sends(b"picture")
    assert get(f"https://{HOST}/a%20b.png?size=2#part") == b"picture"
    assert (server.looked_up, server.connected, server.hosts) == ([HOST], [PUBLIC], [HOST])


def test_the_host_header_has_the_port(server: Server) -> None:
    server.answers["/"] = sends(b"picture")
    assert get(f"https://{HOST}:8443") == b"picture"
    assert server.hosts == [f"{HOST}:8443"]


def test_without_a_length_and_in_chunks(server: Server) -> None:
    def chunks(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"3\r\npic\r\n4\r\nture\r\n0\r\n\r\n")

    def until_closed(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"picture")

    server.answers.update({"/chunks": chunks, "/closed": until_closed})
    assert get(f"https://{HOST}/chunks") == b"picture"
    assert get(f"https://{HOST}/closed") == b"picture"


def test_the_proxy_of_the_environment_is_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.answers["/"] = sends(b"picture")
    assert get(f"https://{HOST}/") == b"picture"


@pytest.mark.parametrize("addresses", [[PRIVATE], [PUBLIC, PRIVATE], ["fe80::1%eth0"], ["not an address"], []])
def test_every_address_of_a_host_must_be_public(server: Server, addresses: list[str]) -> None:
    server.names[HOST] = [addresses]
    assert "not public" in refused(f"https://{HOST}/")
    assert server.connected == []


def test_a_name_that_changes_its_address_is_looked_up_once(server: Server) -> None:
    server.names["rebinding.example"] = [[PUBLIC], [PRIVATE]]
    server.answers["/"] = sends(b"picture")
    assert get("https://rebinding.example/") == b"picture"
    assert (server.looked_up, server.connected) == (["rebinding.example"], [PUBLIC])


def test_a_redirect_to_a_name_that_has_changed_is_refused(server: Server) -> None:
    server.names["rebinding.example"] = [[PUBLIC], [PRIVATE]]
    server.answers["/"] = moved("/again")
    server.answers["/again"] = sends(b"secret")
    assert "not public" in refused("https://rebinding.example/")
    assert server.connected == [PUBLIC]


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1/", "https://[::1]/", "https://2130706433/", "https://0x7f.1/", "https://localhost/", "https://[::ffff:10.0.0.1]/"],
)
def test_literal_addresses_are_checked_too(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def local(host: str, port: int) -> list[str]:
        flags = 0 if host == "localhost" else socket.AI_NUMERICHOST  # no look-up in a test
        return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)]

    monkeypatch.setattr(download, "resolve", local)
    assert "not public" in refused(url)
    assert server.connected == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_and_checked(server: Server, status: int) -> None:
    server.answers["/a/b"] = moved("../c", status)
    server.answers["/c"] = moved("https://second.example/d", status)
    server.answers["/d"] = sends(b"picture")
    assert get(f"https://{HOST}/a/b") == b"picture"
    assert server.connected == [PUBLIC, PUBLIC, OTHER]
    assert server.hosts[-1] == "second.example"


@pytest.mark.parametrize(
    ("to", "why"),
    [
        (f"http://{HOST}/", "https"),
        ("file:///etc/passwd", "https"),
        ("https://private.example/", "not public"),
        ("//private.example/", "not public"),
        (f"https://user:word@{HOST}/", "password"),
        (f"https://{HOST}:99999/", "not a valid URL"),
        ("https://[/", "not a URL"),
    ],
)
def test_redirects_lead_nowhere_else(server: Server, to: str, why: str) -> None:
    server.names["private.example"] = [[PRIVATE]]
    server.answers["/"] = moved(to)
    assert why in refused(f"https://{HOST}/")
    assert server.connected == [PUBLIC]


def test_at_most_three_redirects(server: Server) -> None:
    for number in range(5):
        server.answers[f"/{number}"] = moved(f"/{number + 1}")
    server.answers["/3"] = sends(b"picture")
    assert get(f"https://{HOST}/0") == b"picture"
    server.answers["/3"] = moved("/4")
    server.answers["/4"] = sends(b"picture")
    assert "redirected" in refused(f"https://{HOST}/0")


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/",
        "https:///a.png",
        "https://a b/",
        "https://pictures.example/a\r\nHost: x",
        "https://.pictures.example/",
        "https://unknown.example/",
        f"https://{'a' * 300}/",
    ],
)
def test_other_urls_are_refused(server: Server, url: str) -> None:
    refused(url)
    assert server.hosts == []


def test_another_certificate_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.names["other.example"] = [[PUBLIC]]
    assert "certificate" in refused("https://other.example/")
    monkeypatch.delenv("SSL_CERT_FILE")
    assert "certificate" in refused(f"https://{HOST}/")
    assert server.hosts == []


def test_the_next_address_is_tried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.names[HOST] = [[OTHER, PUBLIC]]
    server.answers["/"] = sends(b"picture")

    def connect(address: str, port: int, seconds: float) -> socket.socket:
        if address == OTHER:
            raise ConnectionRefusedError
        return server.connect(address, port, seconds)

    monkeypatch.setattr(download, "connect_to", connect)
    assert get(f"https://{HOST}/") == b"picture"


def test_the_size_is_bounded_while_reading(server: Server) -> None:
    sent = 0

    def endless(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 10_000)
            sent += 10_000

    server.answers["/endless"] = endless
    server.answers["/promised"] = sends(b"", headers={"Content-Length": str(MOST + 1)})
    server.answers["/exact"] = sends(b"x" * MOST)
    assert "more than" in refused(f"https://{HOST}/endless")
    assert sent < 50 * MOST
    assert "more than" in refused(f"https://{HOST}/promised")
    assert get(f"https://{HOST}/exact") == b"x" * MOST


def test_slow_bytes_do_not_outlast_the_time_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the header nor in the body: each read would come in time, all together do not."""
    monkeypatch.setattr(download, "SECONDS", 1.0)

    def slowly(handler: BaseHTTPRequestHandler, start: bytes) -> None:
        handler.wfile.write(start)
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)

    server.answers["/header"] = lambda handler: slowly(handler, b"HTTP/1.1 200 OK\r\nX-Slow: ")
    server.answers["/body"] = lambda handler: slowly(handler, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    for path in ("header", "body"):
        began = time.monotonic()
        assert "seconds" in refused(f"https://{HOST}/{path}")
        assert time.monotonic() - began < 3


def test_a_resolver_that_hangs_does_not_outlast_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(download, "SECONDS", 0.2)
    monkeypatch.setattr(download, "resolve", lambda host, port: [PUBLIC] if released.wait(30) else [])
    began = time.monotonic()
    try:
        assert "seconds" in refused(f"https://{HOST}/")
        assert time.monotonic() - began < 5
    finally:
        released.set()


@pytest.mark.parametrize(
    "answer",
    [
        sends(b"no", 404),
        sends(b"no", 204),
        moved("", 304),
        sends(b"short", headers={"Content-Length": "1000"}),
        lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"),
        lambda handler: None,
    ],
)
def test_other_answers_are_refused(server: Server, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
    server.answers["/"] = answer
    assert "could not be downloaded" in refused(f"https://{HOST}/")


@given(st.text(max_size=60))
@example("[/")
@example("[::1]:x/")
@example("a\u3002b/")
@example("xn--/")
def test_any_url_is_refused_or_tried(rest: str) -> None:
    with suppress(RequestError):
        parts = download._checked("https://" + rest)
        assert parts.hostname
        assert download._ascii(parts.hostname).isascii()


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101", "2002:101:101::1", "::ffff:1.1.1.1"]
)
def test_public_addresses(address: str) -> None:
    assert download.is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *(
            "0.0.0.0",
            "0.1.2.3",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
        ),
        *(
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
        ),
        *(
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "100::1",
            "2001::1",
        ),
        *(
            "2001:db8::1",
            "3fff::1",
            "5f00::1",
            "::ffff:127.0.0.1",
            "::ffff:192.168.0.1",
            "64:ff9b::a00:1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
        ),
        *("2002:a00:1::1", "2002:7f00:1::1", "2002:c0a8:101::1", "4000::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not download.is_public(ip_address(address))
