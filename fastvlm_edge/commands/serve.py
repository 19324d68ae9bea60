"""`fastvlm-edge serve`: answers clients of the OpenAI API until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from fastvlm_edge.commands.arguments import at_least, given, given_path, number, positive
from fastvlm_edge.commands.environment import name_variables, parse
from fastvlm_edge.commands.run import MODEL_HELP, add_loading_options, load
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import package_errors
from fastvlm_edge.generation.async_vlm import AsyncFastVLM
from fastvlm_edge.generation.vlm import FastVLM
from fastvlm_edge.inputs.rgb import to_colour
from fastvlm_edge.progress import SilentProgress, stderr_progress
from fastvlm_edge.server.settings import HOST, QUEUE, Settings
from fastvlm_edge.server.tls import Certificate, given_certificate, renew, self_signed

_KEEP_ALIVE = 30
"""Seconds that a connection without a request stays open: longer than clients keep theirs, so that none begins a request as it closes."""


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C. Then requests that run are finished, for `--drain` seconds at most; a second Ctrl-C ends at once."""
    known = parser()
    options = parse(known, arguments, os.environ)
    if options.model is None:
        known.error("MODEL is missing: name a model directory, made by fastvlm-edge convert")
    with package_errors("serving needs"):
        from fastvlm_edge.server import app  # noqa: F401  before minutes of loading
    settings = settings_of(options)
    to_colour(options.background)
    with bound(settings.host, settings.port) as listening:
        certify = _certify(options, settings.host)
        certificate = None if certify is None else certify()
        _warn_if_open(_address(listening, certificate), listening, settings)
        progress = SilentProgress() if options.quiet else stderr_progress()
        with load(options, progress, slots=settings.slots) as vlm:
            asyncio.run(_serve(vlm, settings, listening, certificate, certify, quiet=options.quiet))
    return 0


async def _serve(
    vlm: FastVLM,
    settings: Settings,
    listening: socket.socket,
    certificate: Certificate | None,
    certify: Callable[[], Certificate] | None,
    *,
    quiet: bool,
) -> None:
    import uvicorn

    from fastvlm_edge.server.app import make_app
    from fastvlm_edge.server.limits import HeadLimit

    class Server(uvicorn.Server):
        """It leaves the signals to the event loop: uvicorn would raise them again after it has stopped in good order."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        def stop(self) -> None:
            self.should_exit = True

    app = make_app(AsyncFastVLM(vlm), settings)
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="on",
            http=HeadLimit,
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=settings.drain_seconds,
            ssl_certfile=None if certificate is None else certificate.certificate,
            ssl_keyfile=None if certificate is None else str(certificate.key),
        )
    )
    app.state.server.stop = server.stop
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, server.handle_exit, number, None)

    async def announce() -> None:
        await app.state.server.ready.wait()
        print(f"serving {_described(vlm)} at {_address(listening, certificate)}/v1; Ctrl-C stops", file=sys.stderr, flush=True)
        if certificate is not None:
            print(f"SHA-256 fingerprint of its certificate: {certificate.fingerprint}", file=sys.stderr, flush=True)

    _listen(listening)
    beside = [asyncio.ensure_future(asyncio.sleep(0) if quiet else announce())]
    server.config.load()
    if server.config.ssl is not None and certificate is not None and certify is not None:
        beside.append(asyncio.ensure_future(renew(server.config.ssl, certificate, certify, _tell)))
    try:
        await server.serve(sockets=[listening])
    finally:
        for task in beside:
            task.cancel()
    if app.state.server.failure is not None:
        raise app.state.server.failure


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _described(vlm: FastVLM) -> str:
    return f"{vlm.manifest.name} ({vlm.manifest.precision}) on {vlm.backend.description}"


# The address --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket with this address, which does not listen yet: the model may take minutes to load. Raises FastVLMError if it is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise FastVLMError(f"the host {host!r} is not an address of this machine ({error})", "give --host 127.0.0.1, or 0.0.0.0") from None
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise FastVLMError(
                f"the address {host}:{port} cannot be used ({reason})", "choose another one with --host and --port"
            ) from None
        yield listening


def _listen(listening: socket.socket) -> None:
    """Raise FastVLMError if another server, which had this address too while both loaded their models, listens by now."""
    try:
        listening.listen()
    except OSError as error:
        host, port, *_ = listening.getsockname()
        raise FastVLMError(
            f"the address {host}:{port} cannot be used ({error.strerror})", "choose another one with --host and --port"
        ) from None


def _address(listening: socket.socket, certificate: Certificate | None) -> str:
    host, port, *_ = listening.getsockname()
    return f"{'http' if certificate is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"


def _certify(options: argparse.Namespace, host: str) -> Callable[[], Certificate] | None:
    """What finds or makes the certificate; None is http. Raises FastVLMError for options that contradict each other, and half of a pair."""
    files = [options.tls_cert, options.tls_key]
    if options.tls is not None and any(files):
        raise FastVLMError("--tls and --tls-cert are both given", "give one of them")
    if all(files):
        return partial(given_certificate, options.tls_cert, options.tls_key)
    if any(files):
        has, lacks = ("--tls-cert", "--tls-key") if options.tls_cert else ("--tls-key", "--tls-cert")
        raise FastVLMError(f"{has} is given without {lacks}", f"give {lacks} too")
    return None if options.tls is None else partial(self_signed, host)


def _warn_if_open(address: str, listening: socket.socket, settings: Settings) -> None:
    host = listening.getsockname()[0]
    if settings.api_keys or ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        return
    print(
        f"WARNING: everyone who reaches {address} can use this server, and no key is asked for. Give --api-key, or --host 127.0.0.1.",
        file=sys.stderr,
        flush=True,
    )


# The options --------------------------------------------------------------------------------------------------------------------


def settings_of(options: argparse.Namespace) -> Settings:
    """What the options ask for. Raises FastVLMError for values that do not go together."""
    for name in options.allowed_host or ():
        found = HOST.fullmatch(name.lower())
        if found is None or found[2]:
            what = f"--allowed-host {name} is not the name of a host"
            raise FastVLMError(what, "give it as clients write it, without a port: board.local, or [fd00::2]")
    if options.api_key and any(not key.isascii() or not key.isprintable() or " " in key for key in options.api_key):
        raise FastVLMError("an API key has characters that HTTP headers cannot hold", "use letters, digits and punctuation")
    return Settings(
        host=options.host,
        port=options.port,
        api_keys=tuple(options.api_key or ()),
        allowed_hosts=tuple(options.allowed_host or ()),
        model_name=options.model_name,
        slots=options.slots,
        queue=QUEUE * options.slots if options.queue is None else options.queue,
        image_size=options.image_size or "auto",
        max_tokens=options.max_tokens,
        timeout_seconds=options.timeout,
        drain_seconds=options.drain,
        max_body_bytes=options.max_body_bytes,
        max_images=options.max_images,
        max_image_bytes=options.max_image_bytes,
        max_pixels=options.max_pixels,
        allow_remote_images=options.allow_remote_images,
        media_path=options.media_path,
        special_tokens=options.special_tokens,
        cors_origins=tuple(options.cors_origin or ()),
        metrics_alias=options.metrics_alias,
        access_log=not options.no_access_log,
        page=not options.no_page,
    )


def _port(text: str) -> int:
    value = at_least(text, 0)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{value} is not a port")
    return value


def _not_negative(text: str) -> int:
    return at_least(text, 0)


def _seconds(text: str) -> float:
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return value


def parser() -> argparse.ArgumentParser:
    """The options of `fastvlm-edge serve`."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge serve",
        description="Answer clients of the OpenAI API. Every option is also an environment variable, which is named in brackets; the "
        "command line wins. An option that may be repeated is one variable, with commas.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", type=given, help=MODEL_HELP)
    group = parser.add_argument_group("address")

    def add(*names: str, **how: Any) -> None:
        group.add_argument(*names, **how)

    add("--host", metavar="HOST", type=given, default=defaults.host, help="address to listen at; 0.0.0.0 is all (default: %(default)s)")
    add("--port", metavar="N", type=_port, default=defaults.port, help="0 takes a free one (default: %(default)s)")
    add("--api-key", metavar="KEY", type=given, action="append", help="clients must send one of these keys; may be repeated")
    add("--allowed-host", metavar="NAME", type=given, action="append", help="name of this server that clients use; may be repeated")
    add("--tls", choices=("self-signed",), help="https, with a certificate that is made for this machine and kept in the cache directory")
    add("--tls-cert", metavar="FILE", type=given_path, help="https, with this certificate in PEM format")
    add("--tls-key", metavar="FILE", type=given_path, help="the key of --tls-cert")
    add("--cors-origin", metavar="ORIGIN", type=given, action="append", help="web pages of this origin may ask; may be repeated")
    add("--model-name", metavar="NAME", type=given, help="what clients call the model (default: its name in the manifest)")
    group = parser.add_argument_group("limits")
    add("--slots", metavar="N", type=positive, default=defaults.slots, help="replies that are generated at a time (default: %(default)s)")
    add("--queue", metavar="N", type=_not_negative, help=f"requests that wait; more get status 429 (default: {QUEUE} for each slot)")
    add("--max-tokens", metavar="N", type=positive, default=defaults.max_tokens, help="longest reply unless a request says (%(default)s)")
    add("--timeout", metavar="SECONDS", type=_seconds, help="longest time of a request, waiting included (default: none)")
    add(
        "--drain",
        metavar="SECONDS",
        type=_not_negative,
        default=defaults.drain_seconds,
        help="time to finish requests after SIGTERM (default: %(default)s)",
    )
    add("--max-body-bytes", metavar="N", type=positive, default=defaults.max_body_bytes, help="of a request (default: %(default)s)")
    add("--max-images", metavar="N", type=_not_negative, default=defaults.max_images, help="of a request (default: %(default)s)")
    add("--max-image-bytes", metavar="N", type=positive, default=defaults.max_image_bytes, help="of a picture file (default: %(default)s)")
    add("--max-pixels", metavar="N", type=positive, help="of a picture, before it is decoded (default: about 179 million)")
    group = parser.add_argument_group("what is offered")
    add("--allow-remote-images", action="store_true", help="fetch pictures from https addresses that requests name")
    add("--media-path", metavar="FOLDER", type=given_path, help="requests may name files in this folder, as file:///...")
    add("--special-tokens", action="store_true", help="read special tokens of a fine-tune, such as <loc_12>, and show those in replies")
    add("--metrics-alias", choices=("vllm",), help="name the metrics as vLLM does")
    add("--no-page", action="store_true", help="no page at /")
    add("--no-access-log", action="store_true", help="no line for each request on stderr")
    group = add_loading_options(parser)
    add("-q", "--quiet", action="store_true", help="print nothing but warnings and errors")
    name_variables(parser)
    return parser
