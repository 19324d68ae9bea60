"""`fastvlm-edge bench`: what it measures and prints, that stopping it loses nothing, and that its figures are of what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.bench import energy
from fastvlm_edge.bench.compare import compare, format_changes
from fastvlm_edge.bench.measure import Settings, measure, measure_backend, plan_for
from fastvlm_edge.bench.processes import Measurement
from fastvlm_edge.bench.record import FIGURES, Samples, _check_values, figures_of, read_records, write_json
from fastvlm_edge.bench.table import format_record
from fastvlm_edge.bench.timed_backend import TimedBackend
from fastvlm_edge.bench.workload import Pictures, question, question_near
from fastvlm_edge.cli import main
from fastvlm_edge.inputs.image_input import load_rgb
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.machine.description import IDENTITY, describe
from fastvlm_edge.machine.peak_memory import DeviceMemory, peak_host_mib
from fastvlm_edge.machine.power import NoSensor, PowerFigures
from fastvlm_edge.machine.state import busy, hottest, read_state
from fastvlm_edge.model_dir.engine_record import EngineRecord, onnx_hashes
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.nvidia import drivers
from fastvlm_edge.nvidia.description import describe_gpu
from fastvlm_edge.progress import SilentProgress
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_model import build_model

NAMED = (
    *("preprocess_ms", "vision_ms", "prefill_ms", "first_sample_ms", "ttft_cold_ms", "ttft_warm_ms"),
    *("decode_tokens_per_second", "load_ms", "peak_memory_mib"),
)
QUICK = ["--processes", "1", "--runs", "2", "--threads", "1", "--new-tokens", "4", "--depths", "80,200", "--backend", "ort"]


@pytest.fixture(scope="module")
def record(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of two processes, measured once."""
    path = tmp_path_factory.mktemp("bench") / "record.json"
    assert main(["bench", str(model_dir), *QUICK, "--processes", "2", "-o", str(path)]) == 0
    (document,) = read_records(path)
    return document


def lines_of(figures: list[dict[str, Any]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in figures:
        if "figure" in line:
            found.setdefault(line["figure"], []).append(line["value"])
    return found


# What comes out -------------------------------------------------------------------------------------------------------------------


def test_json_has_every_figure_with_median_least_and_most(record: dict[str, Any]) -> None:
    for name in NAMED:
        figure = record[name]
        assert set(figure) == {"median", "min", "max", "samples"}, name
        assert 0 < figure["min"] <= figure["median"] <= figure["max"], name
        assert len(figure["samples"]) == 2, "a list for each process"
    assert [len(group) for group in record["ttft_cold_ms"]["samples"]] == [2, 2]
    assert [len(group) for group in record["load_ms"]["samples"]] == [1, 1]
    assert [entry["depth"] for entry in record["decode_by_depth"]] == [record["prompt_tokens"], 80, 200]
    assert record["decode_tokens_per_second"] == record["decode_by_depth"][0]["tokens_per_second"]
    assert record["partial"] is False and record["processes_done"] == 2


def test_json_has_machine_versions_hashes_and_state(record: dict[str, Any], model_dir: Path) -> None:
    manifest = read_manifest(model_dir)
    assert record["model"]["files"] == {name: entry.sha256 for name, entry in manifest.files.items()}
    assert record["model"]["precision"] == "fp32" and record["model"]["image_size"] == 256
    machine = record["machine"]
    assert machine["cores"] >= 1 and machine["memory_gib"] > 0 and machine["versions"]["onnxruntime"] and machine["date"]
    assert record["backend"] == "ort" and record["runs_on"].startswith("onnxruntime")
    assert set(record["state"]) == {"before", "after", "hottest_c"}
    assert "sensor" in record["power"]
    assert record["settings"]["runs"] == 2 and record["settings"]["threads"] == 1 and record["engines"] == []


def test_the_parts_of_the_first_token_are_its_whole(record: dict[str, Any]) -> None:
    groups = [record[name]["samples"] for name in ("ttft_cold_ms", "preprocess_ms", "vision_ms", "prefill_ms", "first_sample_ms")]
    for whole, *parts in zip(*([value for process in group for value in process] for group in groups), strict=True):
        assert 0.6 * whole < sum(parts) <= whole * 1.001  # the rest is the tokenizer


def test_the_table_is_for_people_and_progress_goes_to_stderr(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model_dir), *QUICK]) == 0
    out, err = capsys.readouterr()
    for text in ("fake (fp32), 256 px; onnxruntime", "first token, new picture", "decode at 200 positions", "tokens/s", "MiB", "power: "):
        assert text in out
    assert "measuring fake (fp32)" in err and "Traceback" not in err


def test_json_on_stdout_is_one_object(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model_dir), *QUICK, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kind"] == "fastvlm-edge bench" and out.count("\n") == 1 and err == ""


def test_records_are_shown_again_beside_a_measured_model(
    record: dict[str, Any], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "a.json", record)
    assert main(["bench", str(tmp_path / "a.json"), str(model_dir), *QUICK, "-o", str(tmp_path / "both.json"), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["results"]
    assert first == record and second["partial"] is False
    assert read_records(tmp_path / "both.json") == [first, second]


# What it measures -----------------------------------------------------------------------------------------------------------------


def test_on_every_backend_warm_computes_no_visual_token_again(vlm: FastVLM, model_dir: Path) -> None:
    settings = Settings(runs=2, new_tokens=4, depths=(80,), text_tokens=40)
    tokenizer = TextTokenizer(model_dir / "tokenizer.json")
    free = iter([10 << 30, *[6 << 30] * 9])
    memory = DeviceMemory(lambda: next(free))
    lines = list(measure_backend(vlm._engine.backend, vlm.manifest, tokenizer, settings, memory))
    found = lines_of(lines)
    facts = {name: value for line in lines if "facts" in line for name, value in line["facts"].items()}
    plan = plan_for(vlm.manifest, tokenizer, settings)
    assert facts["warm_prefilled_tokens"] < plan.prompt_tokens - vlm.manifest.vision.tokens
    assert {f"decode_tokens_per_second@{plan.prompt_tokens}", "decode_tokens_per_second@80"} <= set(found)
    assert all(len(found[name]) == 2 for name in ("ttft_cold_ms", "ttft_features_ms", "ttft_warm_ms", "decode_tokens_per_second@80"))
    assert len(found["ttft_first_question_ms"]) == 1
    if vlm.backend.name == "ort":
        assert "peak_device_memory_mib" not in found  # it is not on a GPU, whatever a GPU beside it does
    else:
        assert found["peak_device_memory_mib"] == [4096]
    assert not set(found) - set(FIGURES) - {name for name in found if "@" in name}


def test_a_cold_question_encodes_and_computes_everything(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | bytes, int]] = []
    generate = FastVLM.generate

    def spy(self: FastVLM, prompt: str, image: Any = None, **sampling: Any) -> Any:
        reply = generate(self, prompt, image, **sampling)
        asked.append((image, reply.timings.prefilled_tokens) if isinstance(image, bytes) else ("kept", reply.timings.prefilled_tokens))
        return reply

    monkeypatch.setattr(FastVLM, "generate", spy)
    list(measure(model_dir, Settings("ort", 1, runs=3, new_tokens=4, depths=())))
    pictures = [image for image, _ in asked if image != "kept"]
    assert len(pictures) == len(set(pictures)) == 5  # the first question, the warm-up, three runs
    manifest = read_manifest(model_dir)
    plan = plan_for(manifest, TextTokenizer(model_dir / "tokenizer.json"), Settings())
    assert {computed for _, computed in asked} == {plan.prompt_tokens}


def test_energy_is_counted_where_there_is_a_sensor(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def figures(self) -> PowerFigures:
            return PowerFigures("VDD_IN", mean_w=6.0, peak_w=8.0, energy_j=3.0, seconds=0.5, temperature_c=51.0, throttled=False)

    monkeypatch.setattr(energy, "PowerRecorder", lambda _sensor: Recorder())
    lines = list(measure(model_dir, Settings("ort", 1, runs=2, new_tokens=4, depths=())))
    found = lines_of(lines)
    assert found["joules_per_picture"] == [3.0, 3.0] and found["joules_per_token"] == [0.75, 0.75]
    power = lines[-1]["facts"]["power"]
    assert power == {"sensor": "VDD_IN", "mean_w": 6.0, "peak_w": 8.0, "temperature_c": 51.0, "throttled": False}


def test_without_a_sensor_the_reason_is_told(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        __enter__ = __exit__ = lambda self, *_: None

        def figures(self) -> NoSensor:
            return NoSensor("no INA3221 and no NVML")

    asked = []
    monkeypatch.setattr(energy, "find_sensor", lambda **options: asked.append(options) or NoSensor("found nothing"))
    monkeypatch.setattr(energy, "PowerRecorder", lambda _sensor: Recorder())
    lines = list(measure(model_dir, Settings("ort", 1, runs=1, new_tokens=4, depths=())))
    assert lines[-1]["facts"]["power"] == {"sensor": None, "reason": "no INA3221 and no NVML"}
    assert asked == [{"card": False}], "the CPU works, so a card's sensor would measure something else"
    assert not any("joules" in line.get("figure", "") for line in lines)


def test_engine_build_times_come_from_the_record_of_the_build(model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model_dir, tmp_path / "model")
    folder = directory / "engines" / "rtx"
    folder.mkdir(parents=True)
    build = {"date": "2026-01-01", "vision": {"seconds": 9.5, "cached": False}, "decoder": {"seconds": 0.0, "cached": True}}
    hashes = onnx_hashes(read_manifest(directory))
    EngineRecord("rtx", "tensorrt_rtx", "1.7", [[8, 6]], "", {}, hashes, {}, {}, build).write(folder)
    (engines,) = Measurement(directory, Settings("ort"), 1).document()["engines"]
    assert engines["build_seconds"] == {"vision": 9.5, "decoder": 0.0} and engines["from_cache"] == {"vision": False, "decoder": True}


def test_no_two_pictures_are_equal_and_each_is_a_whole_jpeg(tmp_path: Path) -> None:
    pictures = Pictures()
    several = [pictures.new() for _ in range(40)]
    decoded = {load_rgb(each).tobytes() for each in several}
    assert len(decoded) == 40 and pictures.size == (512, 341)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    assert load_rgb(Pictures(tmp_path / "red.png").new()).size == (30, 20)


def test_questions_have_the_length_that_was_asked_for() -> None:
    assert question(lambda prompt: 10 + len(prompt.split()), 15, "b") == "b b b b b"
    with pytest.raises(ValueError, match="no prompt takes 10"):
        question(lambda prompt: 10 + len(prompt.split()), 10)
    assert question_near(lambda prompt: 10 + len(prompt.split()), 3) == "a"
    assert question_near(lambda prompt: 10 + 2 * len(prompt.split()), 15) == "a a a"  # 16: no 15 is to be had


def test_a_machine_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise FastVLMError("no NVIDIA driver on this machine")

    monkeypatch.setattr(drivers, "open_cuda", none)
    assert describe_gpu() == {"missing": "no NVIDIA driver on this machine"}


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(drivers, "open_cuda", lambda: fake)
    described = describe_gpu()
    assert described["name"] == fake.device.name and described["compute_capability"] == list(fake.device.compute_capability)


def test_peak_memory_is_that_of_this_process(tmp_path: Path) -> None:
    block = bytearray(b"x") * (64 << 20)
    assert peak_host_mib() > len(block) >> 20
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    2048 kB\n")
    assert peak_host_mib(tmp_path / "status") == 2.0


def test_state_is_read_from_the_system(tmp_path: Path) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert read_state(tmp_path) == {}
    put("sys/class/thermal/thermal_zone0/type", "cpu-thermal\n")
    put("sys/class/thermal/thermal_zone0/temp", "48500\n")
    put("sys/class/thermal/thermal_zone1/temp", "-256000\n")
    for core, mhz in ((0, 729), (1, 1510)):
        put(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", f"{mhz * 1000}\n")
        put(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_max_freq", "1510400\n")
        put(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor", "schedutil\n")
    put("sys/class/devfreq/17000000.gpu/cur_freq", "624750000\n")
    put("var/lib/nvpmodel/status", "pmode:0000 fmode:fanNull\n")
    put("proc/loadavg", "1.25 0.5 0.1 1/100 1\n")
    state = read_state(tmp_path)
    assert state == {
        "temperature_c": {"cpu-thermal": 48.5},
        "cpu_mhz": [729, 1510],
        "cpu_max_mhz": 1510,
        "governor": "schedutil",
        "device_mhz": {"17000000.gpu": 625},
        "power_mode": "pmode:0000 fmode:fanNull",
        "load_average": 1.25,
    }
    assert busy(state) and hottest(state) == 48.5 and not busy({}) and hottest({}) is None


def test_a_board_is_named_in_the_machine(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    described = describe(root=tmp_path)
    assert described["board"] == "NVIDIA Jetson Orin Nano Developer Kit" and described["jetson_linux"] == "R36 (release), REVISION: 4.3"
    assert described["instructions"] == ["asimd", "asimddp"]
    assert set(IDENTITY) - {"gpu"} <= set(described)


# Several conversations at once ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slots_record(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("slots") / "record.json"
    assert main(["bench", str(model_dir), *QUICK, "--slots", "4,1,2,2", "-o", str(path)]) == 0
    (document,) = read_records(path)
    return document


def test_slots_are_measured_for_every_number_of_conversations(slots_record: dict[str, Any], record: dict[str, Any]) -> None:
    assert [entry["slots"] for entry in slots_record["by_slots"]] == [1, 2, 4] and slots_record["slots"] == 4
    for entry in slots_record["by_slots"]:
        for key in ("tokens_per_second", "tokens_per_second_each", "ttft_under_load_ms"):
            assert [len(group) for group in entry[key]["samples"]] == [2] and entry[key]["min"] > 0
        assert entry["tokens_per_second"]["max"] == pytest.approx(entry["slots"] * entry["tokens_per_second_each"]["max"], rel=1e-3)
    for name in ("ttft_repeated_picture_ms", "ttft_follow_up_ms"):
        assert [len(group) for group in slots_record[name]["samples"]] == [2]
    assert "by_slots" not in record and "slots" not in record and record["settings"]["slots"] == [], "off unless asked for"
    assert not {"ttft_repeated_picture_ms", "ttft_follow_up_ms"} & set(record)
    text = format_record(slots_record)
    for line in (
        "decode, 1 conversation at once ",
        "decode, 4 conversations at once ",
        "  each of them",
        "first token, follow-up question",
    ):
        assert line in text
    assert "not measured" not in text.replace("power: not measured", "")


def test_progress_counts_every_figure(slots_record: dict[str, Any], record: dict[str, Any], model_dir: Path) -> None:
    for document in (slots_record, record):
        settings = Settings("ort", 1, runs=2, new_tokens=4, depths=(80, 200), slots=tuple(document["settings"]["slots"]))
        figures = [summary for name, summary in figures_of(document).items() if not name.startswith("joules")]
        assert Measurement(model_dir, settings, 1)._steps() == sum(len(figure["samples"][0]) for figure in figures)


def test_a_record_with_slots_compares_with_itself_and_with_an_older_one(slots_record: dict[str, Any], record: dict[str, Any]) -> None:
    alike = compare(slots_record, slots_record)
    assert {change.figure for change in alike} == set(figures_of(slots_record))
    text = format_changes(alike, [])
    assert re.search(r"(?m)^decode, 4 conversations at once +\S+ +\S+ +tokens/s ", text)
    assert len(re.findall(r"(?m)^  first token, new picture +\S+ +\S+ +ms ", text)) == 3
    older = json.loads(json.dumps(record))
    del older["settings"]["slots"]
    assert {change.figure for change in compare(older, slots_record)} == set(figures_of(record))
    damaged = json.loads(json.dumps(slots_record))
    damaged["by_slots"][1]["tokens_per_second"]["samples"] = []
    with pytest.raises(ValueError, match="decode_together_tokens_per_second@2 has no samples"):
        _check_values(damaged)


def test_all_conversations_run_while_they_are_measured(vlm: FastVLM, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every backend: numbers for which it has no slots are left out and named."""
    running: list[tuple[str, int]] = []
    generate = FastVLM.generate

    def spy(self: FastVLM, prompt: str, image: Any = None, **sampling: Any) -> Any:
        before = self.counters().running
        reply = generate(self, prompt, image, **sampling)
        running.append(("cold" if isinstance(image, bytes) else "kept", before))
        return reply

    monkeypatch.setattr(FastVLM, "generate", spy)
    backend = vlm._engine.backend
    settings = Settings(runs=1, new_tokens=9, depths=(), slots=(1, 2, backend.slots, backend.slots + 1))
    lines = list(measure_backend(backend, vlm.manifest, TextTokenizer(model_dir / "tokenizer.json"), settings))
    found = lines_of(lines)
    measured = sorted({1, backend.slots} | ({2} if backend.slots > 1 else set()))
    assert sorted(int(name.partition("@")[2]) for name in found if name.startswith("decode_each")) == measured
    assert {"facts": {"slots": backend.slots}} in lines
    under_load = [number for picture, number in running[-2 * len([each for each in settings.slots if each <= backend.slots]) :]]
    assert sorted(set(under_load)) == [number - 1 for number in measured]


def test_only_steps_of_all_conversations_count(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one take 4 ms, those of three together 12 ms: a third of the steps each, the same speed in all."""
    decode = TimedBackend.decode

    def slow(self: TimedBackend, ids: Any, **options: Any) -> Any:
        time.sleep(0.004 * len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(TimedBackend, "decode", slow)
    found = lines_of(list(measure(model_dir, Settings("ort", 1, runs=1, new_tokens=9, depths=(), slots=(1, 3)))))
    assert 20 < found["decode_together_tokens_per_second@1"][0] <= 250
    assert 20 < found["decode_together_tokens_per_second@3"][0] <= 250
    assert found["decode_each_tokens_per_second@3"][0] <= 250 / 3


def test_answers_that_end_too_early_are_an_error(model_dir: Path, tmp_path: Path) -> None:
    directory = build_model(tmp_path / "small", context=70)
    with pytest.raises(FastVLMError, match=r"ended before .*--context"):
        list(measure(directory, Settings("ort", 1, runs=1, new_tokens=20, depths=(), slots=(8,))))


def test_a_backend_with_fewer_slots_says_so(slots_record: dict[str, Any]) -> None:
    text = format_record(slots_record | {"backend": "tensorrt", "slots": 1})
    assert "tensorrt answers at most 1 at once: 2, 4 not measured" in text


# What goes wrong ------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_prints_and_writes_what_was_measured(model_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    command = [sys.executable, "-m", "fastvlm_edge", "bench", str(model_dir), *QUICK, "--processes", "500", "-o", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True)
    deadline = time.monotonic() + 60
    while not output.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the measuring process as well
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "incomplete: stopped after" in out and "first token, new picture" in out
    (document,) = read_records(output)
    assert document["partial"] and 1 <= document["processes_done"] < 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json"]


def test_a_process_that_fails_keeps_what_came_before_it(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_one = Measurement._run_one

    def fail(self: Measurement, number: int, progress: Any) -> None:
        if number == 2:
            raise FastVLMError("process 2 was killed")
        run_one(self, number, progress)

    monkeypatch.setattr(Measurement, "_run_one", fail)
    assert main(["bench", str(model_dir), *QUICK, "--processes", "3", "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (
        document["processes_done"] == 1 and document["partial"] and document["error"] == {"message": "process 2 was killed", "mend": None}
    )
    assert err == "fastvlm-edge: error: process 2 was killed\n"


def test_the_reason_of_a_measuring_process_is_told_in_one_line(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model_dir), *QUICK, "--backend", "tensorrt", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("fastvlm-edge: error: ") and "fastvlm-edge build" in err
    assert "has no engines" in json.loads(out)["error"]["message"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.kill(os.getpid(), 9)", "process 1 was killed, as Linux does if memory runs out"),
        ("import os; os.kill(os.getpid(), 11)", "process 1 was ended by signal 11"),
        ("import sys; sys.exit('no such module')", "process 1 failed: no such module; try again, and report it"),
    ],
)
def test_a_process_that_dies_without_a_word_is_explained(
    code: str, says: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c {shlex.quote(code)}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(FastVLMError, match=says):
        list(Measurement(model_dir, Settings("ort"), 1).run(SilentProgress()))


def test_the_error_of_a_process_keeps_its_two_parts(model_dir: Path) -> None:
    with pytest.raises(FastVLMError) as caught:
        list(Measurement(model_dir, Settings("tensorrt"), 1).run(SilentProgress()))
    assert "fastvlm-edge build" in (caught.value.mend or "") and "fastvlm-edge build" not in caught.value.what


def test_processes_must_agree_on_the_backend(model_dir: Path) -> None:
    measurement = Measurement(model_dir, Settings(), 2)
    measurement._take({"facts": {"backend": "ort"}}, 1, SilentProgress())
    with pytest.raises(FastVLMError, match="process 2 ran on other, and earlier processes on ort"):
        measurement._take({"facts": {"backend": "other"}}, 2, SilentProgress())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--depths", "9"], "decoding cannot be timed at 9 positions"),
        (["--depths", "5000"], "decoding cannot be timed at 5000 positions"),
        (["--new-tokens", "4000", "--depths", "80"], "use fewer --new-tokens"),
        (["--image", "nowhere.jpg"], "nowhere.jpg does not exist"),
        (["-o", "nowhere/x.json"], "does not exist; create this directory first"),
        (["-o", "."], "is a directory; give the name of a file"),
        (["-o", "/dev/null"], "/dev/null cannot be written (not a regular file); give the name of a file"),
        (["-o", "link.json"], "link.json cannot be written (not a regular file)"),
        (["-o", "pipe.json"], "pipe.json cannot be written (not a regular file)"),
        (["--eval", "x.json"], "--eval is for --plot"),
    ],
)
def test_wrong_options_are_told_before_anything_is_measured(
    arguments: list[str], says: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link.json").symlink_to("/dev/null")
    os.mkfifo("pipe.json")
    monkeypatch.setattr(Measurement, "_run_one", lambda *_: pytest.fail("measured"))
    assert main(["bench", str(model_dir), *QUICK, *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


def test_wrong_usage_is_status_2(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--runs", "0"], ["--new-tokens", "1"], ["--depths", "a"], ["--slots", "0,2"], ["--slots", ""]):
        assert main(["bench", str(model_dir), *arguments]) == 2
    assert main(["bench"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is not JSON"), ("[1]", "contains a list"), ('{"kind": "x"}', "is not a record"), (None, "cannot be read")]
)
def test_a_file_that_is_no_record_is_refused(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FastVLMError, match=says):
        read_records(path)


def test_a_record_of_another_schema_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "new.json", record | {"schema": 99})
    with pytest.raises(FastVLMError, match="schema 99"):
        read_records(tmp_path / "new.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda record: record.pop("model"), "model is not an object"),
        (lambda record: record.update(machine=[]), "machine is not an object"),
        (lambda record: record["model"].update(image_size="big"), "image_size of model is 'big', not of type int"),
        (lambda record: record["load_ms"].pop("median"), "load_ms lacks 'median'"),
        (lambda record: record["load_ms"].update(median="fast"), "median is 'fast', not of type float"),
        (lambda record: record["load_ms"].update(samples=[[], []]), "load_ms has no samples"),
        (lambda record: record["load_ms"].update(samples=[[-1.0]]), "load_ms has no samples, or one that is not"),
        (lambda record: record["load_ms"].update(max=None), "load_ms has no samples, or one that is not"),
        (lambda record: record.update(decode_by_depth=[{"tokens_per_second": 1}]), "decode_by_depth lacks 'depth'"),
        (lambda record: record.update(decode_by_depth=7), "decode_by_depth is '7', not of type list"),
        (lambda record: record.update(by_slots=[{"slots": "2"}]), "slots is '2', not of type int"),
        (lambda record: record.update(slots="many"), "slots is 'many', not of type int"),
        (lambda record: record["settings"].update(slots=4), "slots of settings is '4', not of type list"),
    ],
)
def test_a_record_with_impossible_values_is_damaged(
    record: dict[str, Any], change: Callable[[dict[str, Any]], Any], says: str, tmp_path: Path
) -> None:
    document = json.loads(json.dumps(record))
    change(document)
    write_json(tmp_path / "x.json", document)
    with pytest.raises(FastVLMError, match=re.escape(says)):
        read_records(tmp_path / "x.json")


def test_records_that_were_published_are_read() -> None:
    assert read_records(Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "bench.json")


def test_a_full_disk_leaves_no_half_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text("{}")

    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(FastVLMError, match="No space left on device"):
        write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "x.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_samples_keep_their_processes_apart() -> None:
    samples = Samples()
    for values in ((1.0, 2.0), (), (5.0,)):
        samples.begin_process()
        for value in values:
            samples.add("load_ms", value)
    assert samples.summary("load_ms") == {"median": 2.0, "min": 1.0, "max": 5.0, "samples": [[1.0, 2.0], [5.0]]}


def test_the_runtime_of_bench_imports_neither_torch_nor_matplotlib(model_dir: Path) -> None:
    code = (
        "import sys\nfrom fastvlm_edge.cli import main\n"
        f"assert main(['bench', {str(model_dir)!r}, *{QUICK!r}, '--json']) == 0\n"
        "bad = {'torch', 'transformers', 'onnx', 'matplotlib', 'psutil'} & set(sys.modules)\nassert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
