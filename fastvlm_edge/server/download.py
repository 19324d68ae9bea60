"""Downloads a picture for `media.py`, and never from a machine of the local network.

The host name is resolved once, every address that it has must be public, and the connection is made to one of those addresses. So a name
that resolves differently a moment later changes nothing. The same holds for each redirect. Only https, no proxy, no cookies.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from fastvlm_edge.server.errors import RequestError
from fastvlm_edge.version import __version__

SECONDS = 10.0
"""For a whole download: names, connections, redirects and reading."""
REDIRECTS = 3
ADDRESSES = 4
"""Of a name, how many are tried."""
CODE = "invalid_image_url"
_PIECE = 1 << 16
_SAFE = "%/:?[]@!$&'()*+,;=~-._"
"""Characters of a path and a query that stay as they are (RFC 3986)."""
_THREADS = ThreadPoolExecutor(8, thread_name_prefix="fastvlm-download")
"""Their own, so that slow hosts take no threads from the rest of the server."""

_NOT_PUBLIC_4 = [
    IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24"),
        *("192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
]
"""IANA IPv4 Special-Purpose Address Registry (RFC 6890), multicast and reserved."""
_PUBLIC_6 = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = [IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20")]
"""Parts of it that are special (IANA IPv6 Special-Purpose Address Registry). 2001::/23 contains Teredo, which carries IPv4."""
_NAT64 = IPv6Network("64:ff9b::/96")
_SIX_TO_FOUR = IPv6Network("2002::/16")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address belongs to a host of the public internet, also after translation (mapped, NAT64 and 6to4 addresses)."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    if address in _SIX_TO_FOUR:
        return is_public(IPv4Address(int(address) >> 80 & 0xFFFFFFFF))
    return address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)


async def download(url: str, most: int) -> bytes:
    """What a URL names, at most `most` bytes. Raises RequestError if it is refused, fails or takes more than SECONDS."""
    loop = asyncio.get_running_loop()
    end = time.monotonic() + SECONDS
    try:  # the thread ends by itself; this bounds the wait for a resolver, and for a thread
        return await asyncio.wait_for(loop.run_in_executor(_THREADS, _follow, url, most, end), SECONDS + 1)
    except (asyncio.TimeoutError, TimeoutError):
        raise _failed(f"takes more than {SECONDS:g} seconds") from None


def _follow(url: str, most: int, end: float) -> bytes:
    for _ in range(REDIRECTS + 1):
        answer = _get(_checked(url), most, end)
        if isinstance(answer, bytes):
            return answer
        try:
            url = urljoin(url, answer)
        except ValueError:
            raise _failed("was redirected to an address that is not a URL") from None
    raise _failed(f"was redirected more than {REDIRECTS} times")


def _checked(url: str) -> SplitResult:
    if any(ord(character) <= 0x20 or ord(character) == 0x7F for character in url):
        raise refused("the address of a picture has white space or control characters in it")
    try:
        parts = urlsplit(url)
        _ = parts.port  # read here, because a wrong one is an error
    except ValueError:
        raise refused("the address of a picture is not a valid URL") from None
    if parts.scheme != "https":
        raise refused("pictures are only downloaded by https")
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise refused("the address of a picture must have a host, and neither a user name nor a password")
    return parts


def _get(parts: SplitResult, most: int, end: float) -> bytes | str:
    """The bytes, or where they have moved."""
    host = _ascii(parts.hostname or "")
    port = parts.port or 443
    context = ssl.create_default_context()
    context.sslsocket_class = _Timed
    connection = http.client.HTTPSConnection(host, port, context=context)
    connection.sock = _connect(context, host, public_addresses(host, port), port, end)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("GET", quote(target, safe=_SAFE), headers={"User-Agent": f"fastvlm-edge/{__version__}", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (place := response.getheader("Location")):
            return place
        if response.status != 200:
            raise _failed(f"could not be downloaded: the host answered {response.status}")
        if (response.length or 0) > most:
            raise too_large(most)
        pieces, count = [], 0
        while piece := response.read(_PIECE):
            pieces.append(piece)
            count += len(piece)
            if count > most:
                raise too_large(most)
        if response.length:  # `read` with a size does not notice that the rest is missing
            raise _failed("could not be downloaded: the connection ended too early")
        return b"".join(pieces)
    except TimeoutError:
        raise _failed(f"takes more than {SECONDS:g} seconds") from None
    except (OSError, http.client.HTTPException, ValueError):
        raise _failed("could not be downloaded: the host does not answer as it should") from None
    finally:
        connection.close()


def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, after one look-up. Raises RequestError if there is none, or one of them is not public."""
    try:
        found = resolve(host, port)
    except (OSError, UnicodeError):
        raise _failed("could not be downloaded: its host name is not known") from None
    addresses = list(dict.fromkeys(found))
    try:
        public = all(is_public(ip_address(address.partition("%")[0])) for address in addresses)
    except ValueError:
        public = False
    if not addresses or not public:
        raise refused("the host of a picture has an address that is not public")
    return addresses


def resolve(host: str, port: int) -> list[str]:
    """What the resolver of the system says now."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect_to(address: str, port: int, seconds: float) -> socket.socket:
    """A connection to an address that was checked."""
    return socket.create_connection((address, port), seconds)


class _Timed(ssl.SSLSocket):
    """No read goes on after `end`, however slowly the bytes come."""

    end: float

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(_left(self.end))
        return super().recv_into(buffer, nbytes, flags)


def _connect(context: ssl.SSLContext, host: str, addresses: list[str], port: int, end: float) -> _Timed:
    for number, address in enumerate(addresses[:ADDRESSES], 1):
        try:
            plain = connect_to(address, port, _left(end) / (2 if number < len(addresses) else 1))
            plain.settimeout(_left(end))
            sock = context.wrap_socket(plain, server_hostname=host)
        except ssl.SSLCertVerificationError:
            raise _failed("could not be downloaded: the certificate of its host is not trusted") from None
        except (OSError, ValueError):  # ValueError: a name that TLS does not accept
            continue
        assert isinstance(sock, _Timed)
        sock.end = end
        return sock
    raise _failed("could not be downloaded: no connection to its host")


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _ascii(host: str) -> str:
    """A host name as DNS and TLS know it."""
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        raise refused("the host name of a picture is not valid") from None


def too_large(most: int) -> RequestError:
    """The error for a picture of more than `most` bytes."""
    return RequestError(413, f"a picture has more than {most:,} bytes, which is the limit of this server", code="image_too_large")


def refused(why: str) -> RequestError:
    """The error for a picture that is not taken from where it is."""
    return RequestError(400, why, code=CODE)


def _failed(how: str) -> RequestError:
    return RequestError(400, f"a picture {how}", code=CODE)
