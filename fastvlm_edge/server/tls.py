"""Certificates for https: the user's own, or a self-signed one that the `openssl` command makes.

Browsers give the camera only to pages on https or localhost.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.cache_dir import cache_dir
from fastvlm_edge.model_dir.atomic import whole_file

CHECK_SECONDS = 24 * 3600.0
"""Between two looks at the certificate of a server that runs."""
DAYS = 397
"""How long a new certificate is valid. Browsers refuse some that are valid for longer."""
RENEWED_BEFORE = 30
"""Days before its end at which a certificate is replaced."""

_CONFIGURATION = """[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = fastvlm-edge
[extensions]
subjectAltName = {names}
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
"""


@dataclass(frozen=True)
class Certificate:
    """Files in PEM format that have been loaded once, so they fit."""

    certificate: Path
    key: Path
    """May be the same file."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate as browsers show it: pairs of hexadecimal digits."""
        first = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", self.certificate.read_text("ascii", "replace"), re.S)
        assert first is not None  # it has been loaded
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first.group())).digest().hex(":").upper()


def given_certificate(certificate: Path, key: Path) -> Certificate:
    """The user's own files. Raises FastVLMError if they cannot be read, do not fit, or the key has a password."""
    for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise FastVLMError(f"{option} {path} cannot be read ({error.strerror})", "name a file in PEM format") from None

    def refuse() -> str:
        raise FastVLMError(f"--tls-key {key} has a password", f"write it without one: openssl pkey -in {key} -out NEW")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, refuse)
    except ssl.SSLError as error:
        reason = (error.reason or "unknown format").replace("_", " ").lower()
        what = f"--tls-cert {certificate} and --tls-key {key} cannot be used together ({reason})"
        raise FastVLMError(what, "name the certificate and the key that belongs to it, both in PEM format") from None
    return Certificate(certificate, key)


def self_signed(host: str, folder: Path | None = None) -> Certificate:
    """A certificate for all names and addresses of this machine and for `host`, the address that the server binds to.

    It is one file with the key, which only its owner can read, in `folder` (default: `tls` in the cache directory). It is used again
    until it ends in RENEWED_BEFORE days or lacks a name. Raises FastVLMError if there is no `openssl`, or the folder cannot be written.
    """
    folder = cache_dir() / "tls" if folder is None else folder
    path = folder / "self-signed.pem"
    names = machine_names(host)
    if _serves(path, names):
        return Certificate(path, path)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with whole_file(path) as partial, tempfile.TemporaryDirectory(dir=folder) as scratch:
            content = _make(Path(scratch), names)
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
    except OSError as error:
        what = f"{folder} cannot hold the certificate of --tls self-signed ({error.strerror or error})"
        raise FastVLMError(what, "set FASTVLM_EDGE_CACHE to a directory that this user can write") from None
    return Certificate(path, path)


async def renew(context: ssl.SSLContext, certificate: Certificate, again: Callable[[], Certificate], note: Callable[[str], None]) -> None:
    """Give new connections a newer certificate once there is one, until it is cancelled. `again` finds it, as at the start."""
    known = certificate.fingerprint
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        try:
            found = await asyncio.to_thread(again)
            fingerprint = found.fingerprint
            if fingerprint != known:
                context.load_cert_chain(found.certificate, found.key)
                known = fingerprint
                note(f"new certificate; its SHA-256 fingerprint: {fingerprint}")
        except (FastVLMError, OSError) as error:
            note(f"WARNING: the certificate stays the same: {error}")


def machine_names(host: str, proc: Path = Path("/proc")) -> tuple[str, ...]:
    """Names and addresses under which this machine is reached, as entries of a certificate ("DNS:localhost", "IP:127.0.0.1"), sorted."""
    own = socket.gethostname().rstrip(".").lower()
    names = {"localhost", own, f"{own.partition('.')[0]}.local"}  # the last one is multicast DNS
    addresses = {"127.0.0.1", "::1", *_own_addresses(proc)}
    try:
        address = ipaddress.ip_address(host.partition("%")[0])  # certificates have no zones
        addresses |= set() if address.is_unspecified else {str(address)}
    except ValueError:
        names.add(host.rstrip(".").lower())
    fit = {name for name in names if re.fullmatch(r"(?!-)[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*", name) and len(name) < 254}
    return tuple(sorted([f"DNS:{name}" for name in fit] + [f"IP:{address}" for address in addresses]))


def _own_addresses(proc: Path) -> set[str]:
    """Addresses of all interfaces, without those that other machines cannot use or that change by themselves (RFC 8981)."""
    found = set()
    try:
        routes = (proc / "net" / "fib_trie").read_text("ascii")
        found |= set(re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", routes))
    except OSError:
        pass
    try:
        for line in (proc / "net" / "if_inet6").read_text("ascii").splitlines():
            digits, _, _, _, flags, _ = line.split()
            address = ipaddress.IPv6Address(bytes.fromhex(digits))
            if not address.is_link_local and not int(flags, 16) & 0x01:  # IFA_F_TEMPORARY
                found.add(str(address))
    except (OSError, ValueError):
        pass
    return {address for address in found if not ipaddress.ip_address(address).is_loopback}


def _serves(path: Path, names: tuple[str, ...]) -> bool:
    """Whether a certificate is there that has these names and does not end soon."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)
    except (OSError, ssl.SSLError):
        return False
    seconds = str(RENEWED_BEFORE * 24 * 3600)
    run = subprocess.run(
        [_openssl(), "x509", "-in", str(path), "-noout", "-checkend", seconds, "-ext", "subjectAltName"], capture_output=True, text=True
    )
    listed = re.findall(r"(DNS|IP Address):([^,\s]+)", run.stdout)
    has = {f"DNS:{name}" if kind == "DNS" else f"IP:{ipaddress.ip_address(name)}" for kind, name in listed}
    return run.returncode == 0 and set(names) <= has


def _make(scratch: Path, names: tuple[str, ...]) -> bytes:
    """A new key and its certificate."""
    configuration, key, certificate = scratch / "openssl.cnf", scratch / "key.pem", scratch / "certificate.pem"
    configuration.write_text(_CONFIGURATION.format(names=", ".join(names)), encoding="ascii")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-config", str(configuration), "-keyout", str(key), "-out", str(certificate)]
    run = subprocess.run([_openssl(), "req", "-x509", *curve, "-days", str(DAYS), "-sha256", *files], capture_output=True, text=True)
    if run.returncode != 0:
        said = " ".join(run.stderr.split())[-300:]
        raise FastVLMError(f"openssl could not make a certificate: {said}", "give one with --tls-cert and --tls-key")
    return key.read_bytes() + certificate.read_bytes()


def _openssl() -> str:
    found = shutil.which("openssl")
    if found is None:
        what = "--tls self-signed needs the openssl command, which was not found"
        raise FastVLMError(what, "install openssl, or give a certificate with --tls-cert and --tls-key")
    return found
