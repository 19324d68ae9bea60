"""The `fastvlm-edge` command: runs a subcommand, and turns every exception into one line and an exit status."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import NoReturn

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import import_failure
from fastvlm_edge.version import __version__

COMMANDS = {
    "convert": "convert a FastVLM checkpoint to a model directory",
    "build": "build TensorRT engines for a model directory",
    "run": "ask a question about an image",
    "eval": "measure accuracy on a file of questions",
    "plan": "predict memory and speed on a board before building anything",
    "doctor": "check this machine and say what is missing",
    "bench": "measure speed, memory and energy on this machine",
    "bundle": "pack runtime and model into one file for a board without network access",
}
"""Command -> summary. Each command is a module of `fastvlm_edge.commands` with a `parser()` and a `main(arguments)`."""

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_TERMINATED = 143  # 128 + SIGTERM
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, so that a command cleans up as after Ctrl-C."""


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.

    With `--json`, a command that fails prints `{"error": {"message": ..., "mend": ...}}` on stdout. If it has a partial result, `error` is
    added to that object. Wrong usage prints nothing on stdout.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a reply may contain characters that the terminal cannot encode
    try:
        return _run(arguments)
    except SystemExit as leave:  # argparse: --help, --version, wrong usage
        return leave.code if isinstance(leave.code, int) else EXIT_FAILED
    except _Terminated:
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush of the interpreter does not fail
        return EXIT_BROKEN_PIPE


def _run(arguments: Sequence[str] | None) -> int:
    wants_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser().parse_args(arguments)
        if sys.version_info < (3, 10) and options.command != "doctor":  # JetPack 5 has Python 3.8
            version = ".".join(map(str, sys.version_info[:2]))
            raise FastVLMError(
                f"{options.command} needs Python 3.10 or newer, and this is Python {version}", "run: python3 -m fastvlm_edge doctor"
            )
        status: int = import_module(f"fastvlm_edge.commands.{options.command}").main(options.arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("FASTVLM_EDGE_DEBUG"):
            raise
        told = _explain(error)
        if wants_json:
            report = {**(told.partial or {}), "error": {"message": told.what, "mend": told.mend}}
            print(json.dumps(report, ensure_ascii=False), flush=True)
        print(f"fastvlm-edge: error: {' '.join(str(told).split())}", file=sys.stderr)
        return EXIT_FAILED


def _explain(error: Exception) -> FastVLMError:
    """Turn any exception into one that says what is wrong and what to do."""
    if isinstance(error, FastVLMError):
        return error
    if isinstance(error, ImportError) and (failure := import_failure(error)) is not None:
        return failure
    if isinstance(error, MemoryError):
        return FastVLMError("not enough memory", "close other programs, or use a smaller model or precision")
    if isinstance(error, OSError) and error.strerror:
        return FastVLMError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return FastVLMError(
        f"a bug in fastvlm-edge {__version__}: {type(error).__name__}: {error}",
        "please report it; with FASTVLM_EDGE_DEBUG=1 in the environment, the command prints a traceback",
    )


def parser() -> argparse.ArgumentParser:
    """The parser of `fastvlm-edge` itself. Each command parses its own arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge",
        description="FastVLM on NVIDIA edge hardware and plain CPUs.",
        epilog="commands:\n" + "".join(f"  {name:10}{summary}\n" for name, summary in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastvlm-edge {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below; COMMAND --help describes it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser
