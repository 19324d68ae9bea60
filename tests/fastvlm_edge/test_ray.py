"""What `batch --engine ray` does without a cluster; `tests/ray_cluster` has the rest."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import fastvlm_edge
from fastvlm_edge import FastVLM
from fastvlm_edge.batch.job import Job, job_for
from fastvlm_edge.batch.rows import Row
from fastvlm_edge.commands import batch
from fastvlm_edge.commands.demo import MODEL
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.evaluation.data import ArchivedPicture
from fastvlm_edge.model_dir.manifest import Cascade, read_manifest
from fastvlm_edge.ray import BYTES, Describe, Share, _calls, share_of
from tests.support.cascade import LARGE, MIDDLE, SIZES, SMALL, build_sizes

COFFEE = Path(fastvlm_edge.__file__).parent / "pictures" / "coffee.jpg"
BOARD = {"CPU": 6.0, "GPU": 1.0}
BOX = {"CPU": 64.0, "GPU": 4.0}
PLAIN = {"CPU": 8.0}
HEAD = {"memory": 1e9}


@pytest.fixture(scope="module")
def job(model_dir: Path) -> Job:
    return job_for(read_manifest(model_dir), {"max_new_tokens": 4}, prompt="What is it?")


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([HEAD, BOARD, BOARD], {}, Share(1, 1, 2)),
        ([HEAD, BOX, BOARD], {"gpus": 0.5}, Share(1, 0.5, 10)),
        ([BOX], {"actors": 2}, Share(1, 1, 2)),
        ([BOX], {"gpus": 0, "threads": 8}, Share(8, 0, 8)),
        ([HEAD, PLAIN, PLAIN], {}, Share(8, 0, 2)),
        ([PLAIN, {"CPU": 20.0}], {}, Share(8, 0, 3)),
        ([PLAIN], {"threads": 3}, Share(3, 0, 2)),
        ([PLAIN], {"threads": 16}, Share(16, 0, 1)),
        ([HEAD], {}, Share(1, 0, 1)),
    ],
)
def test_how_a_cluster_is_divided(nodes: list[dict[str, float]], options: dict[str, float], expected: Share) -> None:
    given = {"actors": None, "gpus": None, "threads": None, **options}
    assert share_of(nodes, **given) == expected  # type: ignore[arg-type]


def test_calls_are_bounded_by_rows_and_by_bytes() -> None:
    paths = [Row(str(index), Path("a.png"), "?") for index in range(40)]
    assert [len(call) for call in _calls(paths, 16, upload=False)] == [16, 16, 8]
    large = [Row(str(index), bytes(BYTES // 2), "?") for index in range(5)]
    assert [len(call) for call in _calls(large, 16, upload=False)] == [2, 2, 1]
    huge = [Row("0", b"x", "?"), Row("1", bytes(BYTES + 1), "?"), Row("2", b"x", "?")]
    assert [len(call) for call in _calls(huge, 16, upload=False)] == [1, 1, 1]


def test_rows_are_read_as_they_are_needed() -> None:
    read = []
    rows = (read.append(index) or Row(str(index), Path("a.png"), "?") for index in range(10**9))
    calls = _calls(rows, 16, upload=False)
    next(calls)
    next(calls)
    assert len(read) == 33


def test_what_an_actor_gets_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"data")
    archived = ArchivedPicture("shard.tar/b.png", partial(bytes, b"more"))
    rows = [Row("file", Path("a.png"), "?"), Row("gone", Path("b.png"), "?"), Row("tar", archived, "?"), Row("bad", None, None, "why")]
    (paths,) = _calls(rows, 16, upload=False)
    assert [row.image for row in paths] == [tmp_path / "a.png", tmp_path / "b.png", archived, None]
    (sent,) = _calls(rows, 16, upload=True)
    assert [row.image for row in sent] == [b"data", tmp_path / "b.png", b"more", None]
    assert [(row.id, row.prompt, row.reason) for row in sent] == [(row.id, row.prompt, row.reason) for row in rows]


def test_a_batch_of_ray_data(model_dir: Path, job: Job) -> None:
    images = [str(COFFEE), COFFEE.read_bytes(), {"bytes": None, "path": str(COFFEE)}, "/missing.jpg", None, 3]
    prompts = [None, "Why?", None, None, None, None]
    describe = Describe(str(model_dir), job, backend="ort", threads=1)
    found = describe({"label": list("abcdef"), "image": images, "prompt": prompts})
    with FastVLM.load(model_dir, "ort", threads=1) as vlm:
        expected = [vlm.generate(question, COFFEE, max_new_tokens=4).text for question in ("What is it?", "Why?", "What is it?")]
    assert set(found) == {"label", "prompt", "text", "stop_reason", "confidence", "image_size", "error"}
    assert found["image_size"] == [256, 256, 256, None, None, None]
    assert found["label"] == list("abcdef")
    assert found["text"] == [*expected, None, None, None]
    assert found["error"][:3] == [None] * 3
    assert found["error"][3].startswith("missing: /missing.jpg does not exist")
    assert found["error"][4:] == ["input: no picture", "input: its image is of type int, not a path or bytes"]
    assert all(0 < each <= 1 for each in found["confidence"][:3]) and found["confidence"][3:] == [None] * 3


def test_the_pictures_have_the_size_of_the_job(tmp_path: Path) -> None:
    directory = build_sizes(tmp_path / "model", cascade=Cascade(SIZES, 0.0, "mean"))
    manifest = read_manifest(directory)
    for asked, size in ((MIDDLE, MIDDLE), ("auto", SMALL), (None, LARGE)):
        sized = job_for(manifest, {"max_new_tokens": 4}, prompt="What is it?", image_size=asked)  # type: ignore[arg-type]
        assert Describe(str(directory), sized, backend="ort", threads=1)({"image": [str(COFFEE)]})["image_size"] == [size]
    other = replace(manifest, cascade=None)
    with pytest.raises(FastVLMError, match="another cascade than that of the job"):
        Describe(str(directory), job_for(other, {}, image_size="auto"), backend="ort", threads=1)


def test_another_model_on_a_node(model_dir: Path, job: Job, tmp_path: Path) -> None:
    with pytest.raises(FastVLMError, match=r"^on .+ is another model than that of the job: its sha256 is") as error:
        Describe(str(MODEL), job)
    assert error.value.mend == "copy the model directory of the driver to this node"
    with pytest.raises(FastVLMError, match=r"^on .+: "):
        Describe(str(tmp_path / "none"), job)


@pytest.mark.parametrize("option", [["--address", "auto"], ["--workers", "2"], ["--gpus-per-worker", "0"], ["--upload"]])
def test_options_of_ray_without_ray(option: list[str], model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(FastVLMError, match=f"^{option[0]} is for a Ray cluster; add --engine ray"):
        batch.main([str(model_dir), str(tmp_path), "-o", str(tmp_path / "out.jsonl"), "--prompt", "?", *option])


def test_ray_is_not_installed(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.png").write_bytes(COFFEE.read_bytes())
    with pytest.raises(FastVLMError, match=r"^--engine ray needs the package ray") as error:
        batch.main([str(model_dir), str(tmp_path), "-o", str(tmp_path / "out.jsonl"), "--prompt", "?", "--engine", "ray", "--quiet"])
    assert "[ray]" in str(error.value.mend) or "ray>=" in str(error.value.mend)
