"""`Describe` in a pipeline of Ray Data gives the answers of `FastVLM`. Runs in the environment of Ray: `python ray_data.py ADDRESS`.

Images are paths, bytes, or both as in Hugging Face's datasets; faulty rows have an error, and the other columns stay.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray

from fastvlm_edge import FastVLM
from fastvlm_edge.batch.job import job_for
from fastvlm_edge.commands.demo import MODEL
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.ray import Describe

PICTURES = [MODEL.parent / name for name in ("meter.jpg", "shapes.jpg", "sign.jpg")]
PROMPT = "What number is shown?"


def image_of(kind: str, picture: Path) -> Any:
    """A picture as it may stand in a column."""
    return {"path": str(picture), "bytes": picture.read_bytes(), "both": {"bytes": picture.read_bytes(), "path": picture.name}}[kind]


def main(address: str) -> None:
    """See above."""
    ray.init(address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    job = job_for(read_manifest(MODEL), {"max_new_tokens": 16}, prompt=PROMPT)
    with FastVLM.load(MODEL, "ort", threads=1) as vlm:
        expected = [vlm.generate(PROMPT, picture, max_new_tokens=16).text for picture in PICTURES]
    for kind in ("path", "bytes", "both"):
        items = [{"label": index, "image": image_of(kind, PICTURES[index % 3])} for index in range(30)]
        items.append({"label": 30, "image": {"path": "/missing.jpg", "bytes": b"not a picture", "both": {"bytes": b"", "path": ""}}[kind]})
        described = ray.data.from_items(items, override_num_blocks=4).map_batches(
            Describe, fn_constructor_args=[str(MODEL), job], fn_constructor_kwargs={"threads": 1}, batch_size=8, concurrency=2, num_cpus=1
        )
        found = sorted(described.take_all(), key=lambda row: row["label"])
        assert [row["label"] for row in found] == list(range(31))
        assert set(found[0]) == {"label", "text", "stop_reason", "confidence", "image_size", "error"}
        for row in found[:30]:
            assert row["text"] == expected[row["label"] % 3] and row["error"] is None and 0 < row["confidence"] <= 1, row
        assert found[30]["text"] is None and found[30]["error"], found[30]
    print("passed")


if __name__ == "__main__":
    main(sys.argv[1])
