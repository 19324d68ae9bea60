"""The `fastvlm-edge` command: runs a subcommand, and turns every exception into one line and an exit status."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import Any, TextIO, cast

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import import_failure
from fastvlm_edge.version import __version__

COMMANDS = {
    "demo": "ask a small model that comes with the package, to see that everything works",
    "convert": "convert a FastVLM checkpoint to a model directory",
    "build": "build TensorRT engines for a model directory",
    "run": "ask a question about an image",
    "chat": "ask several questions in one conversation",
    "serve": "answer clients of the OpenAI API",
    "watch": "ask about the newest frame of a camera, video or folder, again and again",
    "batch": "ask about every picture of a folder or a data set, and go on after a stop",
    "eval": "measure accuracy on a file of questions",
    "plan": "predict memory and speed on a board before building anything",
    "doctor": "check this machine and say what is missing",
    "bench": "measure speed, memory and energy on this machine",
    "bundle": "pack runtime and model into one file for a board without network access",
}
"""Command -> summary. Each command is a module of `fastvlm_edge.commands` with a `parser()` and a `main(arguments)`."""

EXIT_FAILED = 1
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that end a command, which then removes what is half-written. A lost ssh connection sends SIGHUP."""
_RETRY_SECONDS = 0.02


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong usage, or 128 and the number of the signal that ended it.

    With `--json`, a command that fails prints `{"error": {"message": ..., "mend": ...}}` on stdout. If it has a partial result, `error` is
    added to that object. Wrong usage prints nothing on stdout.
    """
    return guarded(lambda: _run(arguments), as_json="--json" in (sys.argv[1:] if arguments is None else arguments))


def guarded(work: Callable[[], int], *, as_json: bool = False) -> int:
    """Run `work`, which returns an exit status, and turn every exception and signal into a line on stderr and an exit status.

    Standard streams that are closed lead nowhere, and what cannot be written to stderr is lost.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a reply may contain characters that the terminal cannot encode
    with _Stop() as stop, _forgiving_stderr():
        try:
            return work()
        except KeyboardInterrupt:
            return stop.status
        except BrokenPipeError:
            return EXIT_BROKEN_PIPE if stop.number is None else stop.status
        except Exception as error:
            if stop.number is not None:  # a module that was interrupted while it loads may say that it is broken
                return stop.status
            if os.environ.get("FASTVLM_EDGE_DEBUG"):
                raise
            return _report(error, as_json=as_json)
        finally:
            if not _flushes(sys.stdout):
                _discard(sys.stdout)  # otherwise the interpreter would try again when it ends


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = parser().parse_args(arguments)
        if sys.version_info < (3, 10) and options.command != "doctor":  # JetPack 5 has Python 3.8
            version = ".".join(map(str, sys.version_info[:2]))
            raise FastVLMError(
                f"{options.command} needs Python 3.10 or newer, and this is Python {version}", "run: python3 -m fastvlm_edge doctor"
            )
        status: int = import_module(f"fastvlm_edge.commands.{options.command}").main(options.arguments)
    except SystemExit as leave:  # argparse: --help, --version, wrong usage; or a broken package
        if (failure := import_failure(leave)) is not None:
            raise failure from leave
        status = leave.code if isinstance(leave.code, int) else EXIT_FAILED
    sys.stdout.flush()
    return status


def _report(error: Exception, *, as_json: bool) -> int:
    """Print an error, and return the exit status."""
    told = _explain(error)
    try:
        if as_json:
            report = {**(told.partial or {}), "error": {"message": told.what, "mend": told.mend}}
            print(json.dumps(report, ensure_ascii=False), flush=True)
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError:
        pass  # stderr may be elsewhere
    print(f"fastvlm-edge: error: {' '.join(str(told).split())}", file=sys.stderr)
    return EXIT_FAILED


def _explain(error: Exception) -> FastVLMError:
    """Turn any exception into one that says what is wrong and what to do."""
    if isinstance(error, FastVLMError):
        return error
    if (failure := import_failure(error)) is not None:
        return failure
    if isinstance(error, MemoryError):
        return FastVLMError("not enough memory", "close other programs, or use a smaller model or precision")
    if isinstance(error, OSError) and error.strerror:
        return FastVLMError(f"{error.filename or 'input or output'}: {error.strerror}")
    return FastVLMError(
        f"a bug in fastvlm-edge {__version__}: {type(error).__name__}: {error}",
        "please report it; with FASTVLM_EDGE_DEBUG=1 in the environment, the command prints a traceback",
    )


# Signals ------------------------------------------------------------------------------------------------------------------------


class _Stop:
    """While it is entered, SIGNALS raise KeyboardInterrupt in the main thread, so that a command cleans up. Ignored ones stay ignored.

    While a module loads, this waits until it is loaded: the exception would become an ImportError there, or be lost. A second Ctrl-C does
    not wait. After the first signal, SIGTERM and SIGHUP no longer interrupt: a lost connection sends several.
    """

    number: int | None = None
    """The first signal that was received."""

    def __enter__(self) -> _Stop:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_error: object) -> None:
        if getattr(signal, "SIGALRM", None) in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, before in self._before.items():
            signal.signal(number, before)

    @property
    def status(self) -> int:
        """The exit status, as a shell reports it."""
        return 128 + (signal.SIGINT if self.number is None else self.number)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        for other in set(self._before) - {signal.SIGINT}:
            signal.signal(other, signal.SIG_IGN)
        self._raise(number, frame)

    def _raise(self, _number: int, frame: FrameType | None) -> None:
        if not _loads_a_module(frame) or not hasattr(signal, "setitimer"):
            raise KeyboardInterrupt
        before = signal.signal(signal.SIGALRM, self._raise)
        self._before.setdefault(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)


def _loads_a_module(frame: FrameType | None) -> bool:
    """Whether `frame` runs inside an import statement of the command."""
    while frame is not None and frame.f_code is not guarded.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


# Standard streams ---------------------------------------------------------------------------------------------------------------


def _open_closed_streams() -> None:
    """Let standard streams that are closed lead nowhere.

    Otherwise the next file that is opened would get their number, and what libraries print would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
        setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115


class _Forgiving:
    """A text stream whose writes never fail: a log that nobody reads, or a full disk, is not a reason to stop the work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            _discard(self._stream)
        return len(text)

    def flush(self) -> None:
        if not _flushes(self._stream):
            _discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _forgiving_stderr() -> Iterator[None]:
    stream = sys.stderr
    sys.stderr = cast("TextIO", _Forgiving(stream))
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = stream


def _flushes(stream: TextIO) -> bool:
    try:
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def _discard(stream: TextIO) -> None:
    """Let a stream that failed lead nowhere, with what is still in its buffer."""
    with suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


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
