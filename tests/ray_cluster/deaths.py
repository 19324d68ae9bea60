"""What kills processes or fails, with actors that answer at once. Runs in the environment of Ray: `python deaths.py ADDRESS`.

A row that kills every process that answers it becomes an error, and no other row does. A model that fails in one actor is loaded again. A
model that cannot be loaded, or fails everywhere, ends the batch with its own error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastvlm_edge.ray
from fastvlm_edge.batch.job import job_for
from fastvlm_edge.batch.rows import Row
from fastvlm_edge.commands.demo import MODEL
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.ray import DEATHS, FAILURES, Workers


class Quick:
    """An actor without a model. The prompt of a row says what happens."""

    def load(self, version: str, model: str, job: Any, options: Any) -> tuple[str, str]:
        """See `_Actor`."""
        return "a node", "nothing"

    def answer(self, rows: list[Row]) -> list[dict[str, Any]]:
        """See `_Actor`."""
        for row in rows:
            if row.prompt == "die":
                os._exit(1)
            if row.prompt == "fail" or (row.prompt == "fail once" and first_time(row)):
                raise FastVLMError("the model failed", "look at it")
        return [{"id": row.id, "text": row.prompt} for row in rows]


def first_time(row: Row) -> bool:
    """Whether the file of a row did not exist yet; it does now."""
    assert isinstance(row.image, Path)
    try:
        row.image.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def answers(address: str, rows: Iterator[Row]) -> dict[str, dict[str, Any]]:
    """All results by id."""
    said: list[str] = []
    job = job_for(read_manifest(MODEL), {}, prompt="?")
    with Workers(MODEL, job, address=address, actors=2, threads=1, tell=said.append) as workers:
        found = list(workers.answer(rows))
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


def rows(count: int, prompts: dict[int, str], image: Path = MODEL) -> Iterator[Row]:
    """Rows whose ids are numbers."""
    return (Row(str(index), image, prompts.get(index, "fine")) for index in range(count))


def error_of(address: str, prompts: dict[int, str]) -> str:
    """The error that ends a batch."""
    try:
        answers(address, rows(400, prompts))
    except FastVLMError as error:
        return error.what
    raise AssertionError("it did not fail")


def main(address: str) -> None:
    """See above."""
    fastvlm_edge.ray._Actor = Quick  # type: ignore[misc, assignment]
    found = answers(address, rows(200, {50: "die"}))
    assert len(found) == 200
    errors = {id: row["error"] for id, row in found.items() if "error" in row}
    assert errors == {"50": {"kind": "worker", "message": f"{DEATHS} processes died while they answered this row"}}, errors

    once = Path(f"/tmp/fastvlm-edge-deaths-{os.getpid()}")
    try:
        found = answers(address, rows(200, {50: "fail once"}, once))
    finally:
        once.unlink()
    assert len(found) == 200 and all("text" in row for row in found.values())

    everywhere = error_of(address, dict.fromkeys(range(400), "fail"))
    assert f"was lost {FAILURES} times in a row (the model failed; look at it)" in everywhere, everywhere

    def load(self: Any, *arguments: Any) -> None:
        raise FastVLMError("on board-3: there is no model", "copy it")

    Quick.load = load  # type: ignore[method-assign, assignment]
    unloaded = error_of(address, {})
    assert unloaded == "on board-3: there is no model", unloaded
    print("passed")


if __name__ == "__main__":
    main(sys.argv[1])
