"""The parts of the peers' run on a GPU that need no GPU: counts, checks, the limit, and a record that survives a failing step."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.common.rounds import Failed
from benchmarks.peers import demo, gpu, run
from benchmarks.peers.protocol import DECODE, DEEP, Workload
from benchmarks.peers.run import Run, contenders
from benchmarks.peers.runtimes import ours
from benchmarks.peers.runtimes.transformers_fastvlm import STAGES, deep_ids, preprocessor, time_compiled, time_eager
from benchmarks.peers.runtimes.transformers_model import Loaded, generate, load_transformers, reply_by_static_loop, time_decoding
from benchmarks.peers.workload import prepare
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.planning.workload import SIZES, TextShape, VisionShape, vision_work
from fastvlm_edge.progress import SilentProgress
from tests.support.checkpoints import TINY_VISION
from tests.support.fake_cuda import FakeCuda

DEVICE = {"name": "NVIDIA GeForce RTX 4070 Ti", "driver": "580.1"}
LIMITS = {"copy_gb_per_second": 100.0, "matrix_tflops": {"float16": 50.0}}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: several would wait for each other for seconds when a tiny model shares its cores with other work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What a GPU allows --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_operations_of_a_picture_are_those_that_pytorch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fastvlm_edge.convert.fastvithd import FastViTHD

    encoder = FastViTHD(TINY_VISION).eval()
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.inference_mode(), math, FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, 3, 256, 256))
    projector = 2 * 16 * 128 * (TINY_VISION.out_dim + 128)
    work = vision_work(VisionShape(TINY_VISION.dims, TINY_VISION.depths, TINY_VISION.out_dim, TINY_VISION.se_dim), 128, 256)
    assert counter.get_total_flops() + projector == 2 * (work.dense + work.grouped)


def test_the_floor_follows_from_the_measured_rates() -> None:
    shape = SIZES["0.5b"]
    floor = gpu.floor_of(shape, 1024, 290, ["fp16", "bf16", "int4"], LIMITS)
    row = floor["by_precision"]["fp16"]
    assert row["vision_ms"] == pytest.approx(floor["vision_gflop"] / 50, rel=1e-3)  # 50 TFLOP/s are 50 GFLOP per millisecond
    assert row["prefill_ms"] == pytest.approx(floor["prefill_gflop"] / 50, rel=1e-3)
    text = shape.text
    read = 2 * (text.body + text.head) + text.cache_bytes(290)
    assert row["mb_per_token@290"] == pytest.approx(read / 1e6, rel=1e-3)
    assert row["decode_tokens_per_second@290"] == pytest.approx(100e9 / read, rel=1e-3)
    assert row[f"mb_per_token@{DEEP}"] > row["mb_per_token@290"] > floor["by_precision"]["int4"]["mb_per_token@290"]
    assert "vision_ms" not in floor["by_precision"]["bf16"]  # its rate was not measured
    assert set(gpu.floor_of(shape, 1024, 290, ["int4"], {})["by_precision"]["int4"]) == {"mb_per_token@290", f"mb_per_token@{DEEP}"}


def test_copies_count_as_read_and_written_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvlm_edge.nvidia import drivers

    cuda, clock = FakeCuda(), itertools.count(0, 0.01)
    monkeypatch.setattr(drivers, "open_cuda", lambda: cuda)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))  # 10 ms for every series
    assert gpu.copy_rate(1 << 10, copies=4) == pytest.approx(2 * 4 * 1024 / 10e-3)
    assert cuda.log.count("copy") == 1 + 3 * 4 and not any(cuda.live().values())


def test_without_a_gpu_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastvlm_edge.nvidia import drivers

    def no_gpu() -> None:
        raise FastVLMError("there is no NVIDIA driver on this machine", "install it")

    monkeypatch.setattr(drivers, "open_cuda", no_gpu)
    assert gpu.main() == 1
    assert capsys.readouterr().err == "there is no NVIDIA driver on this machine; install it\n"


# The run ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Options of a run on a GPU in which nothing real is prepared, checked or measured."""
    (tmp_path / "workload.json").write_text(json.dumps({"image_size": 256, "visual_tokens": 16, "ids": [0] * 50, "new_tokens": 5}))
    monkeypatch.setattr(run, "prepare", lambda *_: None)
    monkeypatch.setattr(run.Run, "_floor", lambda self, prompt: {"prompt": prompt})
    return argparse.Namespace(
        **{"device": "gpu", "only": "fastvlm-edge", "rounds": 2, "runs": 1, "threads": 2, "size": "tiny", "fresh": False},
        **{"limit": None, "prepare": False, "work": tmp_path, "envs": None, "out": tmp_path / "gpu.json"},
    )


def answer(command: list[str], **_: Any) -> str:
    """What the processes of a run print."""
    if command[-1] == "benchmarks.peers.gpu":
        return json.dumps({"device": DEVICE, "versions": {"tensorrt": "10.3"}, "limits": LIMITS})
    if "--check" in command:
        return json.dumps({"asked": 16, "equal": 15})
    return json.dumps({"samples": {"vision_ms": [5.0], "peak_device_memory_mib": [700]}, "versions": {}})


def run_on_a_gpu(options: argparse.Namespace) -> int:
    return Run(options, contenders(options.only.split(","), "gpu")).run()


def test_the_contenders_on_a_gpu() -> None:
    names = [each.name for each in contenders(device="gpu")]
    assert names == [
        *("fastvlm-edge:tensorrt-int4", "fastvlm-edge:tensorrt-int8", "fastvlm-edge:tensorrt-fp16", "fastvlm-edge:ort-cuda-fp16"),
        *("transformers:float16", "transformers:bfloat16", "transformers:float16-compile"),
    ]


def test_every_contender_is_checked_before_any_is_timed(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def note(command: list[str], **_: Any) -> str:
        seen.append((command[-2], command[-1]))
        return answer(command)

    monkeypatch.setattr(run, "call", note)
    assert run_on_a_gpu(options) == 0
    variants = ["tensorrt-int4", "tensorrt-int8", "tensorrt-fp16", "ort-cuda-fp16"]
    assert [variant for action, variant in seen if action == "--check"] == variants
    assert [variant for action, variant in seen if action == "--measure"] == variants * 2
    assert max(index for index, each in enumerate(seen) if each[0] == "--check") < seen.index(("--measure", "tensorrt-int4"))
    record = json.loads(options.out.read_text())
    assert record["gpu"] == DEVICE and record["limits"] == LIMITS and record["floor"] == {"prompt": 50}
    assert record["machine"]["versions"]["tensorrt"] == "10.3"
    result = record["results"]["fastvlm-edge:tensorrt-int4"]
    assert result["parity"] == {"asked": 16, "equal": 15} and result["peak_device_memory_mib"]["samples"] == [[700], [700]]


def test_the_others_go_on_when_a_check_fails(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> str:
        if command[-2:] == ["--check", "tensorrt-int8"]:
            raise Failed("FastVLMError: no INT8 here")
        return answer(command)

    monkeypatch.setattr(run, "call", fail)
    assert run_on_a_gpu(options) == 1
    results = json.loads(options.out.read_text())["results"]
    assert results["fastvlm-edge:tensorrt-int8"]["error"] == "FastVLMError: no INT8 here"
    assert "vision_ms" not in results["fastvlm-edge:tensorrt-int8"] and "vision_ms" in results["fastvlm-edge:ort-cuda-fp16"]


def test_only_keeps_the_others_of_the_same_gpu(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "call", answer)
    for device, kept in ((DEVICE, True), ({**DEVICE, "driver": "590"}, False)):
        options.out.write_text(json.dumps({"gpu": device, "results": {"transformers:float16": {"part": "all"}}}))
        assert run_on_a_gpu(options) == 0
        assert ("transformers:float16" in json.loads(options.out.read_text())["results"]) is kept


def test_a_run_ends_at_its_limit_and_goes_on_later(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(command: list[str], **_: Any) -> str:
        clock[0] += 10 * ("--measure" in command)
        return answer(command)

    monkeypatch.setattr(run, "call", slow)
    options.limit, options.only = 25, "fastvlm-edge:tensorrt-int4,transformers:float16"
    assert run_on_a_gpu(options) == 1
    assert "25 s are over; the same command continues" in capsys.readouterr().err
    measured = {name: len(record["vision_ms"]["samples"]) for name, record in json.loads(options.out.read_text())["results"].items()}
    assert measured == {"fastvlm-edge:tensorrt-int4": 2, "transformers:float16": 1}
    assert run_on_a_gpu(options) == 0
    results = json.loads(options.out.read_text())["results"]
    assert [len(record["vision_ms"]["samples"]) for record in results.values()] == [2, 2]


def test_a_process_that_the_limit_cuts_off_has_not_failed(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def cut_off(command: list[str], *, seconds: float = 0, **_: Any) -> str:
        if "--measure" in command:
            assert seconds == 25
            clock[0] += seconds
            raise Failed("not done after 25 s")
        return answer(command)

    monkeypatch.setattr(run, "call", cut_off)
    options.limit = 25
    assert run_on_a_gpu(options) == 1
    assert all("error" not in record for record in json.loads(options.out.read_text())["results"].values())


def test_it_converts_only_what_is_needed(options: argparse.Namespace) -> None:
    def precisions(only: str) -> tuple[str, ...]:
        return Run(options, contenders(only.split(","), "gpu"))._precisions()

    assert precisions("fastvlm-edge:tensorrt-int4,fastvlm-edge:ort-cuda-fp16") == ("int4", "fp16")
    assert precisions("transformers") == ("fp16",)


# Measuring, on the CPU ----------------------------------------------------------------------------------------------------------


def test_decoding_at_depth_is_a_figure_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastvlm_edge.bench import measure as bench

    lines = [("vision_ms", 5.0), (f"{DECODE}@290", 100.0), (f"{DECODE}@{DEEP + 1}", 80.0), ("ttft_cold_ms", 9.0)]
    monkeypatch.setattr(bench, "measure", lambda *_: iter([{"figure": name, "value": value} for name, value in lines]))
    workload = Workload(tmp_path, "tiny", 256, 16, 100, [1], new_tokens=5, threads=1, runs=1, device="gpu")
    found = ours.measure(workload, "tensorrt-int4")
    assert found == {"vision_ms": [5.0], DECODE: [100.0], f"{DECODE}@{DEEP}": [80.0], "ttft_ms": [9.0]}


class SimulatedModel:
    """What `generate` needs of transformers, on a clock of its own: a prefill of any length, then steps of 10 ms."""

    def __init__(self, prefills: list[float], passes: int | None = None) -> None:
        import torch

        self.model, self.clock, self.prefills, self.passes = SimpleNamespace(language_model=torch.nn.Identity()), 0.0, prefills, passes

    def generate(self, *, input_ids: Any, max_new_tokens: int, **_: Any) -> Any:
        import torch

        for index in range(self.passes or max_new_tokens):
            self.model.language_model(input_ids)
            self.clock += 0.01 if index else self.prefills.pop(0)
        return torch.cat([input_ids, torch.full((1, max_new_tokens), 7)], 1)


class Simulated(Loaded):
    def wait(self) -> float:
        return float(self.model.clock)


def test_the_speed_of_decoding_does_not_depend_on_prefill() -> None:
    """As the difference of two replies it would: 8 steps less 5 seconds of noise are a negative speed."""
    import torch

    loaded = Simulated(torch, SimulatedModel([5.0, 0.001, 60.0]), "cpu")
    for _ in range(3):
        tokens, speed = time_decoding(loaded, torch.zeros((1, 4), dtype=torch.int64), None, 9)
        assert tokens == [7] * 9 and speed == pytest.approx(100)
    assert not loaded.model.model.language_model._forward_pre_hooks


def test_a_reply_that_is_not_decoded_token_by_token_has_no_speed() -> None:
    import torch

    loaded = Simulated(torch, SimulatedModel([1.0], passes=4), "cpu")
    with pytest.raises(RuntimeError, match="passed 4 times through the language model for 9 tokens"):
        time_decoding(loaded, torch.zeros((1, 4), dtype=torch.int64), None, 9)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """The real workload of the peers, for the tiny size."""
    folder = tmp_path_factory.mktemp("work")
    prepare(folder, "tiny", SilentProgress(), ["fp32"])
    document = json.loads((folder / "workload.json").read_text())
    return Workload(folder, **document | {"new_tokens": 5}, threads=1, runs=2)


@pytest.mark.usefixtures("one_thread")
def test_transformers_is_timed_eagerly_and_by_the_static_loop(workload: Workload) -> None:
    import torch

    loaded = load_transformers(workload.checkpoint, "float32")
    picture = preprocessor(workload, loaded)
    with torch.no_grad():
        sides = [time_eager(workload, loaded, workload.ids, DECODE, picture)]
        sides.append(time_compiled(workload, loaded, workload.ids, DECODE, picture, compiled=False))
    for samples in sides:
        assert set(samples) == {*STAGES, DECODE} and all(len(values) == 2 and min(values) > 0 for values in samples.values())
    assert len(deep_ids(workload)) == DEEP and deep_ids(workload)[: len(workload.ids)] == workload.ids
    assert not loaded.model.model.vision_tower._forward_pre_hooks


@pytest.mark.usefixtures("one_thread")
def test_all_sides_of_the_check_give_the_same_answers(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's answers by `generate`, by the static loop and by our runtime, all on the CPU."""
    import torch

    from fastvlm_edge import FastVLM

    monkeypatch.setattr(demo, "QUESTIONS", 3)
    with FastVLM.load(demo.demo_model(workload.folder, "fp32"), "ort", threads=1) as vlm:
        assert demo.compare_replies(workload.folder, demo.ask(vlm)) == {"asked": 3, "equal": 3}
    loaded = load_transformers(demo.DEMO, "float32")
    for reply in (generate, reply_by_static_loop):
        replies = []
        with torch.inference_mode():
            for ids, pixels, stop_ids, vocab in demo.prompts(workload.folder):
                tokens = reply(loaded, loaded.ids(ids, vocab), torch.from_numpy(pixels), demo.NEW_TOKENS)
                replies.append(tokens[: next((at for at, token in enumerate(tokens) if token in stop_ids), len(tokens))])
        assert demo.compare_replies(workload.folder, replies) == {"asked": 3, "equal": 3}
    replies[1] = [1, 2, 3]
    assert demo.compare_replies(workload.folder, replies) == {"asked": 3, "equal": 2}


def test_the_shape_of_text_is_what_the_floor_counts() -> None:
    """A layer of 896 with 14 heads of 64, two of keys and values, and 4864 in between."""
    text = TextShape(24, 896, 14, 2, 64, 4864, 152000)
    assert text.body == 24 * (896 * 1152 + 896 * 896 + 896 * 9728 + 4864 * 896)
    assert text.cache_bytes(300) == 24 * 2 * 2 * 64 * 300 * 2
