"""Which files a program touches and whom it calls, as strace sees it: every system call of the program, its threads and its children."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_CHANGES = {"creat", "truncate", "rmdir", "rename", "renameat", "renameat2"}
_CHANGES |= {call + at for call in ("mkdir", "mknod", "link", "symlink", "unlink") for at in ("", "at")}
_TRACED = ",".join(["%network", *(f"?{call}" for call in ("open", "openat", "openat2", *sorted(_CHANGES)))])
_WRITES = re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC|TMPFILE)\b")
_PATH = re.compile(r'(?:AT_FDCWD(?:<[^>]*>)?|\d+<(?P<folder>[^>]*)>)?(?:, )?"(?P<path>(?:[^"\\]|\\.)*)"')
_RESOLVER = {"/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/gai.conf"}
"""Files that a C library reads only to look up a name."""
_DAEMON = '"/var/run/nscd/socket"'


@dataclass(frozen=True)
class Seen:
    """What a program printed and did."""

    status: int
    stdout: str
    stderr: str
    written: frozenset[Path]
    """Paths that it wrote to, made, renamed or removed, or tried to."""
    calls: tuple[str, ...]
    """System calls that need a network or look up a name. Sockets of the family AF_UNIX do not leave the machine, so pairs of them, and
    the C library's question for a user at nscd, are none of these; a connection to any other local service is: it may pass a name on."""

    def outside(self, *named: Path) -> list[Path]:
        """Paths in `written` that are none of `named`, and not below them."""
        return sorted(path for path in self.written if not any(path.is_relative_to(place) for place in named))


def watch(command: Sequence[str | Path], *, folder: Path, environment: Mapping[str, str]) -> Seen:
    """Run a command in `folder` with nothing but `environment`, and tell what it did."""
    with tempfile.TemporaryDirectory() as traces:
        how = ["-ff", "-y", "-qq", "--columns=1", "--seccomp-bpf", f"--trace={_TRACED}", "--signal=none", f"--output={traces}/trace"]
        words = ["strace", *how, *map(str, command)]
        done = subprocess.run(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
        lines = [line for trace in sorted(Path(traces).iterdir()) for line in trace.read_text(errors="replace").splitlines()]
    assert lines, done.stderr
    written = frozenset(path for line in lines if _changes(line) for path in _paths(line, folder))
    return Seen(done.returncode, done.stdout, done.stderr, written, tuple(line for line in lines if _calls_out(line, folder)))


def _changes(line: str) -> bool:
    call = line.partition("(")[0]
    if "-1 EEXIST" in line:
        return False  # the folder of something else
    return call in _CHANGES or (call.startswith("open") and _WRITES.search(line) is not None)


def _calls_out(line: str, folder: Path) -> bool:
    call = line.partition("(")[0]
    if call == "socket":
        return "(AF_UNIX," not in line
    if call in ("connect", "sendto", "sendmsg", "sendmmsg"):
        return re.search(r"sin6?_port=|sun_path=", line) is not None and _DAEMON not in line
    return call.startswith("open") and any(str(path) in _RESOLVER for path in _paths(line, folder))


def _paths(line: str, folder: Path) -> Iterator[Path]:
    """The paths in the arguments of a system call. Relative ones count from the open directory that the call names, or from `folder`."""
    for found in _PATH.finditer(line.rpartition(") = ")[0]):
        yield Path(os.path.normpath(folder / (found["folder"] or "") / found["path"]))
