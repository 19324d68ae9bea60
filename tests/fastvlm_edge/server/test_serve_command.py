"""`fastvlm-edge serve` as a process: its options, the environment, its address, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge.commands import serve
from fastvlm_edge.commands.environment import parse, variable
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.server.settings import Settings
from tests.support.serving import DEMO, ask

ROOT = Path(__file__).resolve().parents[3]


class Process:
    """The command, with what it prints on stderr."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastvlm_edge", "serve", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        self.port = 0
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if found := re.search(r" at http://(?:127\.0\.0\.1|0\.0\.0\.0|\[::1\]):(\d+)/v1; Ctrl-C stops$", self.lines[-1]):
                self.port = int(found.group(1))
                break
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,))
        self._reader.start()

    def _read(self, stream: Any) -> None:
        self.lines += [line.rstrip("\n") for line in stream]

    def end(self, number: int | None = signal.SIGTERM) -> int:
        if number is not None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join(10)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""
        return status

    def post(self, body: Any, on_begin: Callable[[], None] = lambda: None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        first = response.read(10)
        on_begin()
        return response.status, first + response.read()


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[Process]:
    process = Process(*arguments, **environment)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()


def test_it_serves_and_drains(model_dir: Path) -> None:
    """A stream that has begun is finished after SIGTERM, and the exit status is 0."""
    with started(str(model_dir), "--port", "0", "--threads", "1") as process:
        assert process.lines[-1].startswith("serving fake (fp32) on ")
        stop = process.process.terminate
        status, body = process.post(ask("Tell me.", max_tokens=300, stream=True), on_begin=stop)
        assert status == 200 and body.endswith(b"data: [DONE]\n\n")
        assert process.end(None) == 0
        assert not any("Traceback" in line for line in process.lines)


def test_ctrl_c_ends_it_the_same_way() -> None:
    with started(str(DEMO / "model"), "--port", "0", "--threads", "1") as process:
        assert process.post(ask("What?", max_tokens=2))[0] == 200
        assert process.end(signal.SIGINT) == 0


def test_the_environment_is_enough_and_the_command_line_wins() -> None:
    with started(
        "--max-tokens",
        "2",
        FASTVLM_EDGE_MODEL=str(DEMO / "model"),
        FASTVLM_EDGE_PORT="0",
        FASTVLM_EDGE_MAX_TOKENS="5",
        FASTVLM_EDGE_THREADS="1",
    ) as process:
        status, body = process.post(ask("Count from one to ten."))
        assert status == 200 and json.loads(body)["usage"]["completion_tokens"] <= 2
        assert process.end() == 0


def test_an_open_address_without_a_key_is_told_loudly() -> None:
    with started(str(DEMO / "model"), "--host", "0.0.0.0", "--port", "0", "--threads", "1") as process:
        (warning,) = [line for line in process.lines if line.startswith("WARNING")]
        assert "everyone who reaches http://0.0.0.0:" in warning and "--api-key" in warning
        assert process.end() == 0
    with started(str(DEMO / "model"), "--port", "0", "--threads", "1") as process:
        assert not any("WARNING" in line for line in process.lines)
        assert process.end() == 0


def failed(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fastvlm_edge", "serve", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done.stderr


def test_an_address_that_is_taken(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says = failed(capfd, str(DEMO / "model"), "--port", str(port))
        assert f"the address 127.0.0.1:{port} cannot be used (Address already in use); choose another one" in says
    assert "is not an address of this machine" in failed(capfd, str(DEMO / "model"), "--host", "no.such.host.invalid")


def test_two_servers_that_begin_at_the_same_time_with_one_address() -> None:
    """Both have it until the first one listens, once its model is loaded."""
    with serve.bound("127.0.0.1", 0) as one, serve.bound("127.0.0.1", one.getsockname()[1]) as other:
        serve._listen(one)
        with pytest.raises(FastVLMError, match="Address already in use"):
            serve._listen(other)


def test_a_model_is_needed(capfd: pytest.CaptureFixture[str]) -> None:
    assert "MODEL is missing" in failed(capfd)
    assert "does not exist" in failed(capfd, "no-such-model", "--port", "0")


# Options ------------------------------------------------------------------------------------------------------------------------


def test_the_defaults_of_the_options_are_those_of_the_settings() -> None:
    assert serve.settings_of(serve.parser().parse_args(["model"])) == Settings()
    assert serve.settings_of(serve.parser().parse_args(["model", "--slots", "2"])).queue == 8


OPTIONS: dict[str, tuple[str, Any]] = {
    "host": ("::1", "::1"),
    "port": ("1234", 1234),
    "api_keys": ("a-key, another", ("a-key", "another")),
    "allowed_hosts": ("board.local, [fd00::2]", ("board.local", "[fd00::2]")),
    "model_name": ("meter", "meter"),
    "slots": ("3", 3),
    "queue": ("0", 0),
    "image_size": ("512", 512),
    "max_tokens": ("7", 7),
    "timeout_seconds": ("2.5", 2.5),
    "drain_seconds": ("0", 0),
    "max_body_bytes": ("1000", 1000),
    "max_images": ("0", 0),
    "max_image_bytes": ("99", 99),
    "max_pixels": ("5000", 5000),
    "allow_remote_images": ("1", True),
    "media_path": ("/srv", Path("/srv")),
    "special_tokens": ("yes", True),
    "cors_origins": ("https://a.example", ("https://a.example",)),
    "metrics_alias": ("vllm", "vllm"),
    "access_log": ("on", False),
    "page": ("true", False),
}
"""Setting -> a value of its variable, and what it becomes."""
NAMES = {
    "api_keys": "api_key",
    "allowed_hosts": "allowed_host",
    "cors_origins": "cors_origin",
    "timeout_seconds": "timeout",
    "drain_seconds": "drain",
    "access_log": "no_access_log",
    "page": "no_page",
}


@pytest.mark.parametrize("setting", [field.name for field in fields(Settings)])
def test_every_setting_is_an_option_and_a_variable(setting: str) -> None:
    text, value = OPTIONS[setting]
    name = f"FASTVLM_EDGE_{NAMES.get(setting, setting).upper()}"
    parser = serve.parser()
    (action,) = [action for action in parser._actions if variable(action) == name]
    assert f"[{name}]" in (action.help or "")
    options = parse(parser, [] if setting == "slots" else ["--slots", "4"], {name: text, "FASTVLM_EDGE_MODEL": "model"})
    assert getattr(serve.settings_of(options), setting) == value and options.model == "model"


def test_every_option_has_a_variable_that_its_help_names() -> None:
    actions = [action for action in serve.parser()._actions if action.dest != "help"]
    assert all((action.help or "").endswith(f"[{variable(action)}]") for action in actions)
    assert len({variable(action) for action in actions}) == len(actions) > 25


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("PORT", "http", "FASTVLM_EDGE_PORT is 'http': 'http' is not an integer"),
        ("THREADS", "x", "FASTVLM_EDGE_THREADS is 'x': it is not a number"),
        ("PORT", "70000", "FASTVLM_EDGE_PORT is '70000': 70000 is not a port"),
        ("SLOTS", "0", "FASTVLM_EDGE_SLOTS is '0': 0 is not a positive number"),
        ("TIMEOUT", "inf", "FASTVLM_EDGE_TIMEOUT is 'inf': inf is not a time"),
        ("ALLOW_REMOTE_IMAGES", "maybe", "FASTVLM_EDGE_ALLOW_REMOTE_IMAGES is 'maybe'; give 1 or 0"),
        ("METRICS_ALIAS", "other", "FASTVLM_EDGE_METRICS_ALIAS is 'other'; use one of: vllm"),
        ("API_KEY", " , ", "FASTVLM_EDGE_API_KEY is ',', which has no value; give values with commas between them"),
        ("BACKEND", "gpu", "FASTVLM_EDGE_BACKEND is 'gpu'; use one of: auto"),
    ],
)
def test_a_wrong_variable_is_named(name: str, text: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(serve.parser(), ["model"], {f"FASTVLM_EDGE_{name}": text})
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_the_command_line_replaces_the_variable() -> None:
    environment = {"FASTVLM_EDGE_API_KEY": "a,b", "FASTVLM_EDGE_PORT": "1", "FASTVLM_EDGE_NO_PAGE": "0", "FASTVLM_EDGE_HOST": ""}
    settings = serve.settings_of(parse(serve.parser(), ["model", "--api-key", "c", "--port", "2"], environment))
    assert (settings.api_keys, settings.port, settings.page, settings.host) == (("c",), 2, True, "127.0.0.1")


def test_a_key_that_no_header_can_hold() -> None:
    for key in ("a b", "ä", "a\nb"):
        with pytest.raises(FastVLMError, match="an API key has characters that HTTP headers cannot hold"):
            serve.settings_of(serve.parser().parse_args(["model", "--api-key", key]))


@pytest.mark.parametrize("name", ["http://board.local", "board.local:8000", "fd00::2", "[fd00::2]:8000", "a b", "a/b"])
def test_a_name_that_no_host_has(name: str) -> None:
    with pytest.raises(FastVLMError, match="is not the name of a host; give it as clients write it, without a port"):
        serve.settings_of(serve.parser().parse_args(["model", "--allowed-host", name]))
