"""Code that all comparisons share: it runs the contenders in rounds and computes the figures of their samples.

In every round each contender runs once, in a new process. The contenders take turns, so that noise of the machine affects all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import FIELDS, ROOT, Peer, Samples
from fastvlm_edge.bench import record

TIMEOUT = 3600.0
"""Seconds that one process may take."""

Rounds = dict[str, list[Samples]]
"""Name of a contender -> the samples of each of its processes."""


@dataclass(frozen=True)
class Contender:
    """One side of a comparison: a variant of a peer."""

    name: str
    """In the record, such as `llama.cpp:q4_0`."""
    peer: Peer
    module: str
    """Of `benchmarks.peers.runtimes`; it is run as a script."""
    variant: str

    @property
    def environment(self) -> str:
        """The module whose environment it runs in."""
        return self.peer.environment or self.module

    def command(self, python: str, work: Path, threads: int, runs: int, device: str, what: str) -> list[str]:
        """The command line of one process. `what` is `--prepare`, `--check` or `--measure`."""
        options = ["--work", str(work.resolve()), "--threads", str(threads), "--runs", str(runs), "--device", device]
        return [python, "-m", f"benchmarks.peers.runtimes.{self.module}", *options, what, self.variant]


class Failed(Exception):
    """A process failed; the message is the last line that it wrote to stderr."""


def call(command: Sequence[str], *, seconds: float = TIMEOUT, environment: Mapping[str, str] | None = None) -> str:
    """Run a command in the root of the repository and return what it printed.

    `environment` is added to that of this process. Whatever the command started is ended with it. Raises Failed if the exit status is not
    0, or if it takes longer than `seconds`.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"not done after {seconds:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the workers of torch.compile; everything after Ctrl-C
        process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        killed = f"ended by signal {-process.returncode}: " if process.returncode < 0 else ""
        raise Failed((killed + lines[-1]).replace(str(ROOT), ".")[:400])
    return out


def take_turns(
    names: Sequence[str],
    rounds: int,
    measure: Callable[[str], Samples],
    *,
    found: Rounds | None = None,
    keep: Callable[[], None] = lambda: None,
    failed: Callable[[str, Exception], None] | None = None,
    rotate: bool = False,
) -> Rounds:
    """Call `measure(name)` for every name, `rounds` times over, and return the samples by name.

    `found` holds earlier rounds: they are not measured again, and new ones are added to it; `keep` is called after each. With `failed`, a
    contender whose process fails is reported there and left out from then on; without, the exception is raised. With `rotate`, each round
    begins with the next name.
    """
    found = {} if found is None else found
    out: set[str] = set()
    for number in range(rounds):
        first = number % len(names) if rotate else 0
        for name in (*names[first:], *names[:first]):
            done = found.setdefault(name, [])
            if len(done) > number or name in out:
                continue
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            try:
                done.append(measure(name))
            except (Failed, OSError, ValueError, IndexError) as error:
                if failed is None:
                    raise
                out.add(name)
                failed(name, error)
            else:
                keep()
    return found


def figures(rounds: Iterable[Samples], fields: Sequence[str] = FIELDS) -> dict[str, Any]:
    """Median, minimum, maximum and the samples by process of every field that was measured."""
    samples = record.Samples()
    for found in rounds:
        samples.begin_process()
        for name in fields:
            for value in found.get(name, ()):
                samples.add(name, value)
    return {name: samples.summary(name) for name in fields if name in samples.figures}
