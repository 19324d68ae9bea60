"""The golden trace of `session`. `python -m tests.support.fake_libcuda.golden` writes it anew; read the difference before you commit it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.support.fake_libcuda import HERE, Libcuda, compiler, machine_with_libcuda
from tests.support.fake_libcuda.session import build, session

GOLDEN = HERE / "session.trace"


def trace_of_session(machine: Libcuda, model: Path, directory: Path) -> str:
    """Run `session` and return what it called."""
    file = directory / "trace"
    machine.run(session, model, trace=file)
    return file.read_text()


def main() -> None:
    """Write the golden trace."""
    if compiler() is None:
        sys.exit("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder, machine_with_libcuda(Path(folder)) as machine:
        GOLDEN.write_text(trace_of_session(machine, build(Path(folder)), Path(folder)))
    print(f"{GOLDEN}: {len(GOLDEN.read_text().splitlines())} calls")


if __name__ == "__main__":
    main()
