"""Certificates are used in real handshakes on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.commands import serve
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.server import app, tls
from fastvlm_edge.server.settings import Settings
from fastvlm_edge.server.tls import Certificate, given_certificate, machine_names, self_signed
from tests.support.serving import DEMO, wait_until

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")


def shakes_hands(with_: Certificate, name: str) -> bool:
    """Whether a client that trusts only this certificate reaches a server with it under a name."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(with_.certificate, with_.key)
    client = ssl.create_default_context(cafile=str(with_.certificate))
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:  # the client refused
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
        return True
    except ssl.SSLCertVerificationError:
        return False
    finally:
        ours.close()
        thread.join()


def test_a_self_signed_certificate_serves_the_names_of_this_machine_and_its_key_is_the_owners(tmp_path: Path) -> None:
    made = self_signed("board.example", tmp_path / "tls")
    for name in ("localhost", "127.0.0.1", "::1", "board.example", socket.gethostname().lower()):
        assert shakes_hands(made, name), name
    assert not shakes_hands(made, "elsewhere.example")
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600 and stat.S_IMODE(made.key.parent.stat().st_mode) == 0o700
    assert list(made.key.parent.iterdir()) == [made.key], "no key is left elsewhere"
    command = ["openssl", "x509", "-in", str(made.certificate), "-noout", "-fingerprint", "-sha256", "-text"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"Fingerprint={made.fingerprint}\n" in shown
    assert "CA:FALSE" in shown and "TLS Web Server Authentication" in shown and "prime256v1" in shown


def test_it_is_used_again_until_it_ends_soon_or_lacks_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "DAYS", tls.RENEWED_BEFORE + 1)
    first = self_signed("127.0.0.1", tmp_path).fingerprint
    assert self_signed("127.0.0.1", tmp_path).fingerprint == self_signed("0.0.0.0", tmp_path).fingerprint == first
    wider = self_signed("board.example", tmp_path).fingerprint
    assert wider != first
    monkeypatch.setattr(tls, "DAYS", tls.RENEWED_BEFORE - 1)
    (tmp_path / "self-signed.pem").unlink()
    short = self_signed("127.0.0.1", tmp_path).fingerprint
    assert self_signed("127.0.0.1", tmp_path).fingerprint != short


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    made = self_signed("127.0.0.1", tmp_path)
    made.certificate.write_bytes(made.certificate.read_bytes()[:200])
    assert shakes_hands(self_signed("127.0.0.1", tmp_path), "localhost")


def test_names_are_those_of_the_kernel_without_what_others_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    leaves = "     |-- 192.168.55.1\n        /32 host LOCAL\n     |-- 192.168.55.255\n        /32 link BROADCAST\n"
    (tmp_path / "net" / "fib_trie").write_text(f"Main:\n{leaves}Local:\n{leaves}")
    rows = ["fd000000000000000000000000000002 04 40 00 80 eth0", "fd000000000000000000000000000003 04 40 00 01 eth0"]
    rows += ["fe8000000000000000fc00fffe000001 04 40 20 80 eth0", "00000000000000000000000000000001 01 80 10 80 lo"]
    (tmp_path / "net" / "if_inet6").write_text("\n".join(rows) + "\n")
    addresses = [name for name in machine_names("::", tmp_path) if name.startswith("IP:")]
    assert addresses == ["IP:127.0.0.1", "IP:192.168.55.1", "IP:::1", "IP:fd00::2"]
    assert "IP:10.0.0.7" in machine_names("10.0.0.7", tmp_path)
    assert "IP:fe80::1" in machine_names("fe80::1%eth0", tmp_path)
    assert "DNS:localhost" in machine_names("0.0.0.0", tmp_path / "none")


@pytest.mark.parametrize("host", ["a, IP:8.8.8.8", "a\nkeyUsage = x", "-a", "a..b", "ä"])
def test_a_name_that_is_no_name_is_left_out(host: str, tmp_path: Path) -> None:
    assert machine_names(host, tmp_path) == machine_names("0.0.0.0", tmp_path)
    assert all(re.fullmatch(r"DNS:[a-z0-9.-]+|IP:[0-9a-f.:]+", name) for name in machine_names(host, tmp_path))


def test_without_openssl_or_a_place_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FastVLMError, match=r"cannot hold the certificate.*set FASTVLM_EDGE_CACHE"):
        self_signed("127.0.0.1", tmp_path / "file" / "tls")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FastVLMError, match=r"needs the openssl command.*install openssl, or give a certificate"):
        self_signed("127.0.0.1", tmp_path / "tls")


def test_own_files_are_used(tmp_path: Path) -> None:
    made = self_signed("127.0.0.1", tmp_path)
    key, _, certificate = made.key.read_text().partition("-----BEGIN CERT")
    (tmp_path / "key.pem").write_text(key)
    (tmp_path / "cert.pem").write_text("-----BEGIN CERT" + certificate)
    given = given_certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    assert shakes_hands(given, "localhost") and given.fingerprint == made.fingerprint


def test_files_that_do_not_fit_are_refused_before_anything_is_served(tmp_path: Path) -> None:
    one, other = self_signed("127.0.0.1", tmp_path / "one").key, self_signed("127.0.0.1", tmp_path / "other").key
    locked, text = tmp_path / "locked.pem", tmp_path / "text.pem"
    text.write_text("no certificate")
    lock = ["openssl", "pkey", "-in", str(one), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(lock, check=True, capture_output=True)
    for certificate, key, said in (
        (one, other, "cannot be used together"),
        (text, one, "cannot be used together"),
        (one, text, "cannot be used together"),
        (tmp_path / "none.pem", one, "--tls-cert .*none.pem cannot be read"),
        (one, tmp_path / "none.pem", "--tls-key .*none.pem cannot be read"),
        (one, locked, "has a password; write it without one"),
    ):
        with pytest.raises(FastVLMError, match=said):
            given_certificate(certificate, key)


def test_the_command_serves_https_and_prints_the_fingerprint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvlm_edge", "serve", str(DEMO / "model"), "--port", "0", "--tls", "self-signed"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTVLM_EDGE_CACHE": str(tmp_path)}
    certificate = tmp_path / "tls" / "self-signed.pem"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = None
            while found is None:
                line = process.stderr.readline()
                assert line, "the server has ended"
                found = re.search(r" at https://127\.0\.0\.1:(\d+)/v1; Ctrl-C stops$", line)
            printed = process.stderr.readline()
            assert printed == f"SHA-256 fingerprint of its certificate: {Certificate(certificate, certificate).fingerprint}\n"
            trusting = ssl.create_default_context(cafile=str(certificate))
            with urllib.request.urlopen(f"https://localhost:{found.group(1)}/health", context=trusting, timeout=30) as answer:
                assert answer.status == 200
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tls-cert", "a.pem"], "--tls-cert is given without --tls-key; give --tls-key too"),
        (["--tls-key", "a.pem"], "--tls-key is given without --tls-cert; give --tls-cert too"),
        (["--tls", "self-signed", "--tls-cert", "a.pem", "--tls-key", "b.pem"], "--tls and --tls-cert are both given; give one of them"),
        (["--tls-cert", "none.pem", "--tls-key", "none.pem"], r"--tls-cert .*none.pem cannot be read"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(options: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match=said):
        serve.main([str(tmp_path / "no model"), "--port", "0", *options])


@pytest.fixture
def served_again(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[tuple[Path, int]]:
    """The certificate and the port of a server that looks at its certificate ten times a second."""
    monkeypatch.setenv("FASTVLM_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(tls, "CHECK_SECONDS", 0.1)
    settings, apps = Settings(slots=1, access_log=False), list[Any]()
    make_app = app.make_app
    monkeypatch.setattr(app, "make_app", lambda *given: apps.append(made := make_app(*given)) or made)
    with FastVLM.load(model_dir, "ort", threads=1, slots=1) as vlm, serve.bound("127.0.0.1", 0) as listening:
        certify = partial(self_signed, "127.0.0.1")
        certificate = certify()
        serving = serve._serve(vlm, settings, listening, certificate, certify, quiet=False)
        thread = threading.Thread(target=asyncio.run, args=(serving,), daemon=True)
        thread.start()
        try:
            wait_until(lambda: bool(apps) and apps[0].state.server.ready.is_set())
            yield certificate.certificate, listening.getsockname()[1]
        finally:
            apps[0].state.server.stop()
            thread.join(30)
            assert not thread.is_alive()


def test_a_new_certificate_is_used_while_the_server_runs(served_again: tuple[Path, int], capfd: pytest.CaptureFixture[str]) -> None:
    path, port = served_again

    def shown() -> str:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port)))).digest().hex(":").upper()

    first = Certificate(path, path).fingerprint
    assert shown() == first
    path.write_text("as if it ended soon")
    wait_until(lambda: shown() != first)
    assert shown() == Certificate(path, path).fingerprint
    told = ""

    def has_told() -> bool:
        nonlocal told
        told += capfd.readouterr().err
        return f"new certificate; its SHA-256 fingerprint: {Certificate(path, path).fingerprint}\n" in told

    wait_until(has_told)


def test_a_certificate_that_cannot_be_renewed_stays(
    served_again: tuple[Path, int], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, port = served_again
    before = ssl.get_server_certificate(("127.0.0.1", port))
    monkeypatch.setenv("PATH", str(tmp_path))
    path.write_text("as if it ended soon")
    wait_until(lambda: "WARNING: the certificate stays the same: --tls self-signed needs the openssl command" in capfd.readouterr().err)
    assert ssl.get_server_certificate(("127.0.0.1", port)) == before
