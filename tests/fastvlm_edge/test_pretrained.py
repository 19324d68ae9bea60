"""From a hub id or a directory to a loaded model: converted once into the cache, and found there. The hub is on this machine."""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastvlm_edge import AsyncFastVLM, FastVLM, FastVLMError, pretrained
from fastvlm_edge.cli import main
from fastvlm_edge.commands.demo import HOME, MODEL
from fastvlm_edge.model_dir.atomic import written_beside
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest
from fastvlm_edge.pretrained import converted, is_hub_id
from fastvlm_edge.progress import Progress, SilentProgress, TextProgress
from tests.support.fake_hub import COMMIT, Hub, fake_hub

pytest.importorskip("torch")
pytest.importorskip("huggingface_hub")

from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from tests.support.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ID = "apple/FastVLM-tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the hub's layout; do not write to it."""
    folder = tmp_path_factory.mktemp("hub") / "FastVLM-tiny"
    write_checkpoint(folder, layout="hub")
    (folder / "example.jpg").write_bytes(b"a picture")
    return folder


@pytest.fixture(scope="module")
def hub(checkpoint: Path) -> Iterator[Hub]:
    with fake_hub({ID: checkpoint}) as running:
        yield running


@pytest.fixture(autouse=True)
def machine(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose only hub is that of this machine, with an empty cache, which is returned."""
    hub.requests.clear()
    for name, value in environment(hub, tmp_path).items():
        monkeypatch.setenv(name, value)
    # What huggingface_hub read from the environment when it was imported.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "models"


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    return {
        "FASTVLM_EDGE_CACHE": str(folder / "cache"),
        "HF_ENDPOINT": hub.address,
        "HF_HUB_CACHE": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }


def models(cache: Path) -> list[Path]:
    """The model directories of the cache. There is nothing else but their records and the lock."""
    found = sorted(path for path in cache.iterdir() if path.is_dir())
    assert {path.name for path in cache.iterdir()} - {".lock"} <= {name for path in found for name in (path.name, f"{path.name}.json")}
    return found


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fastvlm_edge", *map(str, arguments)]


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the conversion by a copy of the demo model; returns what was asked for."""
    asked: list[dict[str, Any]] = []

    def convert(checkpoint: str, output: Path, *, force: bool, progress: Progress, **options: Any) -> Manifest:
        asked.append({"checkpoint": checkpoint, **{name: value for name, value in options.items() if value is not None}})
        with written_beside(output, replace=force, elsewhere="choose another place") as folder:
            for path in MODEL.iterdir():
                shutil.copy(path, folder)
        return read_manifest(output)

    monkeypatch.setattr("fastvlm_edge.convert.pipeline.convert", convert)
    return asked


def test_one_command_from_a_hub_id_to_an_answer(hub: Hub, machine: Path) -> None:
    """Two processes at once convert once. Then neither the hub nor the packages of the extra `convert` are needed."""
    ask = command("run", ID, "--image", HOME / "meter.jpg", "What is this?", "--max-new-tokens", "4")
    both = [subprocess.Popen(ask, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    (place,) = models(machine)
    assert ended[0][0] == ended[1][0]
    (error,) = [error for _, error in ended if "converted once" in error]
    assert f"{ID} is downloaded and converted once, to {place}" in error and f"MB; to free them, remove {place}" in error
    assert place.name.startswith("apple--FastVLM-tiny-") and "example.jpg" not in hub.downloads and "model.safetensors" in hub.downloads
    manifest = read_manifest(place)
    assert (manifest.name, manifest.source.checkpoint, manifest.precision) == ("FastVLM-tiny", ID, "int8")
    record = json.loads(place.with_name(f"{place.name}.json").read_text(encoding="utf-8"))
    assert (record["checkpoint"], record["state"]) == (ID, COMMIT)
    hub.requests.clear()
    hidden = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'onnx', 'huggingface_hub')); import fastvlm_edge.cli as c; sys.exit(c.main())"
    )
    again = subprocess.run([sys.executable, "-c", hidden, *ask[3:]], capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stdout) == (0, ended[0][0]), again.stderr
    assert f"{ID} is already converted: {place}, " in again.stderr and " MB" in again.stderr
    assert hub.requests == []


@pytest.mark.usefixtures("conversions")
def test_python_and_the_commands_share_the_cache(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FastVLM.from_pretrained(ID, backend="ort", threads=1, slots=1) as vlm:
        expected = vlm.generate("What is this?", max_new_tokens=4)
    assert "converted once" in capsys.readouterr().err
    assert main(["run", ID, "What is this?", "--max-new-tokens", "4", "--json", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["token_ids"] == expected.token_ids and captured.err == ""
    FastVLM.from_pretrained(ID).close()
    assert capsys.readouterr().err == ""
    assert len(models(machine)) == 1


@pytest.mark.usefixtures("conversions")
def test_nothing_is_shown_where_nothing_may_be(capsys: pytest.CaptureFixture[str], hub: Hub) -> None:
    """Not the bars of huggingface_hub either, which are there again for the next download of the program."""
    converted(ID, progress=SilentProgress())
    assert "model.safetensors" in hub.downloads and capsys.readouterr().err == ""
    assert not are_progress_bars_disabled()


def test_other_options_and_revisions_are_other_conversions(machine: Path, conversions: list[dict[str, Any]]) -> None:
    ways: list[dict[str, Any]] = [{}, {"precision": "int4", "context": 512}, {"image_size": 512}, {"revision": "v1"}]
    places = [converted(ID, **way) for way in ways]
    assert models(machine) == sorted(places) and len(set(places)) == 4
    assert conversions == [{"checkpoint": ID, **way, "revision": COMMIT} for way in ways]
    assert [converted(ID, **way) for way in ways] == places and len(conversions) == 4


def test_a_directory_is_converted_again_after_a_change(tmp_path: Path, machine: Path, conversions: list[dict[str, Any]]) -> None:
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    place = converted(folder)
    (folder / "training.log").write_text("step 1", encoding="utf-8")
    assert converted(str(folder)) == place and converted(Path("tuned")) == place
    assert conversions == [{"checkpoint": str(folder)}]
    (folder / "config.json").write_text("[]", encoding="utf-8")
    assert converted(folder) == place and models(machine) == [place]
    (folder / "model.safetensors").write_bytes(b"more")
    assert converted(folder) == place and models(machine) == [place]
    assert len(conversions) == 3


@pytest.mark.parametrize("damage", ["another format", "no record", "half a model", "no model"])
def test_what_cannot_be_used_is_converted_again(damage: str, conversions: list[dict[str, Any]]) -> None:
    place = converted(ID)
    record = place.with_name(f"{place.name}.json")
    if damage == "another format":
        record.write_text(json.dumps({**json.loads(record.read_text()), "schema": 2}), encoding="utf-8")
    elif damage == "no record":
        record.unlink()
    elif damage == "half a model":
        (place / "decoder.onnx").unlink()
    else:
        shutil.rmtree(place)
    assert converted(ID) == place
    assert len(conversions) == 2 and (place / "decoder.onnx").is_file() and record.is_file()


def test_a_model_directory_is_itself() -> None:
    with FastVLM.from_pretrained(MODEL, backend="ort") as vlm:
        assert vlm.manifest.precision == "int4"
    with pytest.raises(FastVLMError, match=r"already converted: precision would change nothing; leave that out, or give the checkpoint"):
        FastVLM.from_pretrained(MODEL, precision="int8")


def test_a_wrong_option_of_load_is_found_before_anything_is_converted(hub: Hub) -> None:
    with pytest.raises(TypeError, match="slot"):
        FastVLM.from_pretrained(ID, slot=2)
    assert hub.requests == []


def test_asyncio(conversions: list[dict[str, Any]]) -> None:
    async def load() -> None:
        async with await AsyncFastVLM.from_pretrained(ID, backend="ort", threads=1, context=512) as vlm:
            assert vlm.vlm.backend.name == "ort"

    asyncio.run(load())
    assert conversions == [{"checkpoint": ID, "context": 512, "revision": COMMIT}]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("apple/none", {}, "apple/none is neither a local directory nor a public hub repository; check the name"),
        ("gated/FastVLM", {}, "gated/FastVLM is gated on the hub; accept its conditions"),
        (ID, {"revision": "v9"}, f"{ID} has no revision 'v9' on the hub"),
        (ID, {"image_size": 100}, "image size"),
        ("no folder", {}, "'no folder' is neither a local directory nor a hub id"),
        ("", {}, "'' is neither a local directory nor a hub id"),
    ],
)
def test_what_cannot_be_had_is_said_and_leaves_nothing(given: str, options: dict[str, Any], message: str, machine: Path) -> None:
    with pytest.raises(FastVLMError, match=message):
        converted(given, **options)
    assert models(machine) == []


def test_no_network(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FastVLMError, match="the hub cannot be reached"):
        converted(ID)
    assert models(machine) == []


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    monkeypatch.setattr("fastvlm_edge.convert.request.shutil", SimpleNamespace(disk_usage=lambda _path: SimpleNamespace(free=1000)))
    with pytest.raises(FastVLMError, match=r"the model directory needs about .* MB, but only 0 MB are free"):
        converted(ID)
    assert models(machine) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTVLM_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        FastVLMError, match=r"cannot hold the converted model .*; set FASTVLM_EDGE_CACHE to a directory that this user can write"
    ):
        converted(ID)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub: Hub) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "fastvlm_edge.convert.pipeline", raising=False)
    assert main(["run", ID, "What is this?"]) == 1
    error = capsys.readouterr().err
    assert f"{ID} must be converted first, which needs" in error and "torch" in error
    assert hub.requests == []


def test_in_a_bundle_it_is_just_not_a_model_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda _name: None)
    with pytest.raises(FastVLMError, match=f"{ID} is not a model directory here; if it is a hub id, it must be converted first"):
        converted(ID)


def test_an_interrupted_conversion_leaves_nothing(machine: Path) -> None:
    process = subprocess.Popen(command("run", ID, "What?"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not (machine.is_dir() and any(machine.glob(".*.partial-*"))):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert models(machine) == []


@pytest.mark.usefixtures("conversions")
def test_what_a_killed_process_left_is_removed(machine: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (half := machine / f".{converted(ID, context=512).name}.partial-{ended.pid}").mkdir()
    shutil.rmtree(machine / half.name.split(".partial")[0][1:])
    place = converted(ID, context=512)
    assert models(machine) == [place]


@pytest.mark.usefixtures("conversions")
def test_waiting_is_said(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine.mkdir(parents=True)
    with (machine / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=converted, args=(ID,), kwargs={"progress": TextProgress(sys.stderr, terminal=False)})
        thread.start()
        end, told = time.monotonic() + 20, ""
        while "waiting for another process that is converting" not in told:
            assert time.monotonic() < end
            told += capsys.readouterr().err
            time.sleep(0.01)
        assert models(machine) == []
    thread.join(60)
    assert len(models(machine)) == 1


@pytest.mark.parametrize(
    ("text", "expected"), [(ID, True), ("model", False), ("here/model", False), ("./a/b", False), ("a/b/c", False), ("", False)]
)
def test_what_has_the_form_of_a_hub_id(text: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert is_hub_id(text) is expected
