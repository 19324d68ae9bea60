"""The stand-in for NVIDIA's libcuda.so.1: compile it, and run a function in a process whose cuda-python finds it instead of a driver."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def compiler() -> str | None:
    """A C compiler of this machine."""
    return shutil.which("gcc") or shutil.which("cc")


class Libcuda:
    """A machine whose driver is the stand-in."""

    def __init__(self, worker: subprocess.Popen[str]) -> None:
        self._worker = worker

    def run(self, function: Callable[..., object], *arguments: object, **settings: object) -> str:
        """Call a function of a module, with strings as arguments, in a process of its own. Returns what it printed.

        `settings` are those of libcuda.c without their prefix, such as `trace=path`, or variables of the environment in capitals. Raises
        AssertionError, with the traceback, if the function does not return normally.
        """
        named = {name if name.isupper() else f"FAKE_LIBCUDA_{name.upper()}": str(value) for name, value in settings.items()}
        request = {"module": function.__module__, "name": function.__name__, "arguments": [*map(str, arguments)], "environment": named}
        assert self._worker.stdin and self._worker.stdout
        print(json.dumps(request), file=self._worker.stdin, flush=True)
        reply = json.loads(self._worker.stdout.readline())
        assert reply["code"] == 0, f"{function.__name__}{arguments} ended with {reply['code']}:\n{reply['output']}"
        return str(reply["output"])


@contextlib.contextmanager
def machine_with_libcuda(directory: Path) -> Iterator[Libcuda]:
    """Compile the stand-in into a directory, and start the process that functions are run by. Needs a C compiler."""
    found = compiler()
    assert found
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1"]
    sources = [str(HERE / name) for name in ("books.c", "libcuda.c")]
    subprocess.run([found, *flags, "-o", str(directory / "libcuda.so.1"), *sources], check=True)
    paths = [str(directory), os.environ.get("LD_LIBRARY_PATH", "")]  # the dynamic loader reads it once, when a process starts
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}
    command = [sys.executable, "-m", f"{__name__}.worker"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        yield Libcuda(worker)
