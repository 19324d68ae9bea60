"""`batch --engine ray` on several nodes: the rows of one process, whoever is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge.commands.demo import MODEL
from tests.ray_cluster.conftest import ENVIRONMENT, NODES, PYTHON, Batch, LocalCluster, by_id, rows_of, write_rows

pytestmark = pytest.mark.ray

Rows = dict[str, dict[str, Any]]


def start(cluster: LocalCluster, source: Path, output: Path, *options: str) -> Batch:
    return Batch(source, output, "--engine", "ray", "--address", cluster.address, *options)


def test_three_workers_give_the_rows_of_one(cluster: LocalCluster, rows: Path, expected: Rows, tmp_path: Path) -> None:
    batch = start(cluster, rows, tmp_path / "out.jsonl")
    batch.wait_for_rows(500)
    assert all(len(pids) == 1 for pids in cluster.workers().values())
    said = batch.end()
    assert by_id(rows_of(batch.output)) == expected
    assert said.count("a worker on") == NODES


def test_a_worker_killed_in_the_middle(cluster: LocalCluster, rows: Path, expected: Rows, tmp_path: Path) -> None:
    batch = start(cluster, rows, tmp_path / "out.jsonl")
    batch.wait_for_rows(100)
    os.kill(next(pid for pids in cluster.workers().values() for pid in pids), signal.SIGKILL)
    said = batch.end()
    assert "was lost" in said
    assert by_id(rows_of(batch.output)) == expected


def test_a_node_killed_in_the_middle_that_does_not_come_back(cluster: LocalCluster, rows: Path, expected: Rows, tmp_path: Path) -> None:
    batch = start(cluster, rows, tmp_path / "out.jsonl")
    batch.wait_for_rows(100)
    node = next(node for node, pids in cluster.workers().items() if pids)
    cluster.ask(f"kill {node}")
    said = batch.end()
    cluster.ask("add")
    assert "was lost" in said
    assert by_id(rows_of(batch.output)) == expected


def test_a_killed_driver_goes_on(cluster: LocalCluster, rows: Path, expected: Rows, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    batch = start(cluster, rows, output)
    batch.wait_for_rows(100)
    batch.process.kill()
    batch.process.communicate()
    before = output.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert before.count(b"\n") < 600
    start(cluster, rows, output).end()
    assert output.read_bytes().startswith(before)
    assert by_id(rows_of(output)) == expected


def test_sigterm_stops_it(cluster: LocalCluster, rows: Path, tmp_path: Path) -> None:
    batch = start(cluster, rows, tmp_path / "out.jsonl")
    batch.wait_for_rows(100)
    batch.process.terminate()
    _, said = batch.process.communicate(timeout=60)
    assert batch.process.returncode == 143 and "stopped; the same command goes on" in said, said


def test_a_node_that_joins_late_gets_rows(cluster: LocalCluster, rows: Path, expected: Rows, tmp_path: Path) -> None:
    batch = start(cluster, rows, tmp_path / "out.jsonl", "--workers", str(NODES + 1))
    batch.wait_for_rows(20)
    cluster.ask("add")
    batch.end()
    assert by_id(rows_of(batch.output)) == expected


def test_pictures_that_only_the_driver_has(cluster: LocalCluster, expected: Rows, tmp_path: Path) -> None:
    """They are below /proc/self/cwd, which is another folder in each process."""
    (tmp_path / "demo").symlink_to(MODEL.parent)
    source = write_rows(tmp_path / "rows.jsonl", 30, Path("/proc/self/cwd/demo"))
    start(cluster, source, tmp_path / "paths.jsonl").end()
    start(cluster, source, tmp_path / "sent.jsonl", "--upload").end()
    paths, sent = (by_id(rows_of(tmp_path / name)) for name in ("paths.jsonl", "sent.jsonl"))
    assert {row["error"]["kind"] for id, row in paths.items() if id.startswith("row")} == {"missing"}
    assert {id: row for id, row in sent.items() if id.startswith("row")} == {id: expected[id] for id in sent if id.startswith("row")}
    kinds = {id: row["error"]["kind"] for id, row in sent.items() if "error" in row}
    assert kinds == {"missing": "missing", "none": "input", "empty": "damaged"}


@pytest.mark.parametrize("script", ["deaths.py", "ray_data.py"])
def test_scripts(cluster: LocalCluster, ray_python: Path, script: str) -> None:
    """Each says in its docstring what it asserts."""
    command = [str(ray_python), str(Path(__file__).with_name(script)), cluster.address]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert ended.returncode == 0 and ended.stdout.endswith("passed\n"), ended.stdout[-2000:] + ended.stderr[-4000:]


def test_the_memory_of_the_driver_grows_by_the_ids_alone(ray_python: Path, tmp_path: Path) -> None:
    """100,000 rows from a file to a file. A row of the input or of the results would take some 1,000 bytes as an object of Python."""
    out = tmp_path / "out.json"
    command = [str(ray_python), "-m", "benchmarks.ray_cluster", str(MODEL), "--rounds", "0", "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(out.read_text(encoding="utf-8"))["driver"]
    assert found["rows"] == 100_000 and found["bytes_per_row"] < 400, found


def test_no_cluster(ray_python: Path, rows: Path, tmp_path: Path) -> None:
    batch = Batch(rows, tmp_path / "out.jsonl", "--engine", "ray", "--address", "127.0.0.1:1")
    _, said = batch.process.communicate(timeout=120)
    assert batch.process.returncode == 1 and "no Ray cluster could be joined at 127.0.0.1:1" in said and "Traceback" not in said


def test_without_the_token_of_the_cluster(cluster: LocalCluster, rows: Path, tmp_path: Path) -> None:
    """No token in the home directory is an error of the user, and the message names what is missing."""
    command = [PYTHON, "-m", "fastvlm_edge", "batch", MODEL, rows, "-o", tmp_path / "out", "--engine", "ray", "--address", cluster.address]
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 1
    assert "no Ray cluster could be joined" in ended.stderr and "RAY_AUTH_MODE=token" in ended.stderr and "a bug" not in ended.stderr
