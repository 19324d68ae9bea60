"""The `fastvlm-edge` command: finds the subcommand and turns every exception into one line and an exit status."""

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
from fastvlm_edge.extras import missing_package
from fastvlm_edge.version import __version__

COMMANDS = {
    "convert": "turn a FastVLM checkpoint into a model directory",
    "build": "build TensorRT engines for a model directory",
    "run": "ask a question about a picture",
    "eval": "count right answers to a file of questions",
    "plan": "predict memory and speed on a board before anything is built",
    "doctor": "look at this machine and say what is missing",
    "bench": "measure speed, memory and energy on this machine",
    "bundle": "write one file with runtime and model for a board without a network",
}
"""Each is a module of `fastvlm_edge.commands` with its own parser and `main(arguments)`."""

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_TERMINATED = 143  # 128 + SIGTERM
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class _Terminated(KeyboardInterrupt):
    """SIGTERM, so that it cleans up like Ctrl-C."""


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a reply may hold what the terminal's encoding does not
    wants_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser().parse_args(arguments)
        status: int = import_module(f"fastvlm_edge.commands.{options.command}").main(options.arguments)
        sys.stdout.flush()
        return status
    except SystemExit as leave:  # argparse: --help, --version, wrong usage
        return leave.code if isinstance(leave.code, int) else EXIT_FAILED
    except _Terminated:
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush says nothing
        return EXIT_BROKEN_PIPE
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
    """Any exception as what is wrong and what to do."""
    if isinstance(error, FastVLMError):
        return error
    if isinstance(error, ModuleNotFoundError) and (missing := missing_package(error.name or "")):
        return missing
    if isinstance(error, MemoryError):
        return FastVLMError("not enough memory", "close other programs, or use a smaller model or precision")
    if isinstance(error, OSError) and error.strerror:
        return FastVLMError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return FastVLMError(
        f"a bug in fastvlm-edge {__version__}: {type(error).__name__}: {error}",
        "please report it; FASTVLM_EDGE_DEBUG=1 shows where it happened",
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvlm-edge",
        description="FastVLM on NVIDIA edge hardware and plain CPUs.",
        epilog="commands:\n" + "".join(f"  {name:10}{summary}\n" for name, summary in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastvlm-edge {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below; COMMAND --help tells more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser
