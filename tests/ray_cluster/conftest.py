"""The environment of Ray, which `make test-ray` makes, a cluster in it, and batches on that cluster."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge.commands.demo import MODEL

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "ray" / "bin" / "python"
PICTURES = ("meter.jpg", "shapes.jpg", "sign.jpg")
NODES = 3
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


class LocalCluster:
    """`local_cluster.py` in a process of its own."""

    def __init__(self, count: int) -> None:
        command = [str(PYTHON), str(Path(__file__).with_name("local_cluster.py")), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.address = self._answer()

    def ask(self, line: str) -> Any:
        """The answer to a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def workers(self) -> dict[int, list[int]]:
        """Process ids of the actors, by node."""
        return {int(node): pids for node, pids in self.ask("workers").items()}

    def close(self) -> None:
        """End all nodes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line[:1] in '"{0123456789' or line == "null\n":
                return json.loads(line)
        raise AssertionError(f"the cluster ended with status {self.process.wait()}")


class Batch:
    """`fastvlm-edge batch`, running."""

    def __init__(self, source: Path, output: Path, *options: str) -> None:
        self.output = output
        command = [PYTHON, "-m", "fastvlm_edge", "batch", MODEL, source, "-o", output, "--threads", "1", *options]
        self.process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=source.parent)

    def wait_for_rows(self, count: int) -> None:
        """Wait until so many rows are written."""
        deadline = time.monotonic() + 120
        while not self.output.exists() or self.output.read_bytes().count(b"\n") < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[1]
            time.sleep(0.005)

    def end(self) -> str:
        """Wait until it has ended, with an answer or an error for every row. Returns what it said."""
        _, said = self.process.communicate(timeout=240)
        assert self.process.returncode in (0, 1), said
        return said


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The rows of a file of results, without what depends on the moment."""
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return [{name: row[name] for name in ("id", "text", "stop_reason", "error") if name in row} for row in rows]


def by_id(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows by their ids, each of which must be there once."""
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def write_rows(path: Path, count: int, pictures: Path = MODEL.parent) -> Path:
    """A file of rows about the demo's pictures, each with a question of its own. Three more rows are faulty."""
    path.with_name("empty.png").write_bytes(b"")
    rows = [{"id": "missing", "image": "missing.jpg", "prompt": "?"}, {"id": "none"}, {"id": "empty", "image": "empty.png", "prompt": "?"}]
    for index in range(count):
        picture = pictures / PICTURES[index % len(PICTURES)]
        rows.append({"id": f"row {index}", "image": str(picture), "prompt": f"{index}: what number is shown, and what shapes are there?"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def ray_python() -> Path:
    """Python with Ray."""
    if not (PYTHON.parent / "ray").exists():
        pytest.skip("Ray is not installed; make test-ray installs it")
    return PYTHON


@pytest.fixture(scope="session")
def cluster(ray_python: Path) -> Iterator[LocalCluster]:
    """A cluster of three nodes. A test that kills one adds another."""
    cluster = LocalCluster(NODES)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 600 rows, three of them faulty."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 597)


@pytest.fixture(scope="session")
def expected(ray_python: Path, rows: Path) -> dict[str, dict[str, Any]]:
    """The results of `rows` without Ray."""
    output = rows.with_name("expected.jsonl")
    Batch(rows, output).end()
    found = by_id(rows_of(output))
    assert len(found) == 600 and sum("error" in row for row in found.values()) == 3
    return found
