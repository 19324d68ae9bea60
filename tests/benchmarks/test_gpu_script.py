"""The parts of benchmarks/gpu/ that need no GPU: counts, aggregation, and a record that survives whatever becomes of a step."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import workload
from benchmarks.gpu.__main__ import parse
from benchmarks.gpu.eager import speed_of_transformers, time_decoding
from benchmarks.gpu.figures import STAGES
from benchmarks.gpu.floor import cache_bytes, floor_of, prefill_flops, vision_flops, weight_bytes
from benchmarks.gpu.ours import time_replies
from benchmarks.gpu.record import begin, merge, slug
from benchmarks.gpu.run import Contender, Run, contenders, run_step, wanted
from benchmarks.gpu.static_loop import speed_of_compiled
from benchmarks.gpu.steps import PART, be_step
from benchmarks.gpu.transformers_model import Loaded
from benchmarks.gpu.workload import Task, photograph
from fastvlm_edge import FastVLM
from fastvlm_edge.bench.record import summary
from fastvlm_edge.bench.workload import question
from fastvlm_edge.convert.precision import precision_plan
from fastvlm_edge.convert.reference.fastvithd import FastViTHDConfig
from tests.fastvlm_edge.generation.test_vlm import PROMPT
from tests.support.checkpoints import SIZES
from tests.support.timm_reference import import_timm

TEXT = SIZES["0.5b"].text(152000, tied=True)
"""24 layers of 896, 14 heads of 64, 2 of keys and values, 4864 in between."""
LAYER = 896 * 1152 + 896 * 896 + 896 * 9728 + 4864 * 896
DEVICE = {"name": "NVIDIA GeForce RTX 4070 Ti", "driver": "580.1"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: more of them wait for each other for seconds where a tiny model shares its cores with other work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_weights_that_a_token_reads() -> None:
    assert LAYER == 14_909_440
    small = 24 * (1152 + 2 * 896) + 896  # biases of q, k and v, two norms a layer, the last norm
    floats = 24 * LAYER + 152000 * 896 + small + 896  # and a row of the embedding
    assert weight_bytes(TEXT, precision_plan("fp32")) == 4 * floats == 1_976_364_032
    assert weight_bytes(TEXT, precision_plan("fp16")) == weight_bytes(TEXT, precision_plan("bf16")) == 2 * floats
    channels = 24 * (1152 + 896 + 9728 + 896) + 152000
    assert weight_bytes(TEXT, precision_plan("int8")) == 24 * LAYER + 152000 * 896 + 2 * (channels + small) + 896 + 2
    blocks = 24 * (7 * (1152 + 896 + 9728) + 38 * 896)  # 896 / 128 = 7 blocks, 4864 / 128 = 38
    expected = 24 * LAYER // 2 + 152000 * 896 + 2 * (blocks + 152000 + small) + 896 + 2
    assert weight_bytes(TEXT, precision_plan("int4")) == expected == 321_144_322


def test_cache_that_a_token_reads() -> None:
    assert cache_bytes(TEXT, precision_plan("fp16"), 300) == 24 * 2 * 2 * 64 * 300 * 2 == 3_686_400
    assert cache_bytes(TEXT, precision_plan("fp32"), 2000) == 24 * 2 * 2 * 64 * 2000 * 4


def test_operations_of_prefill() -> None:
    assert prefill_flops(TEXT, 1) == 2 * (24 * LAYER + 2 * 24 * 896 + 896 * 152000)
    layers = 23 * (2 * LAYER + 2 * 896 * 3)  # the second position looks at both
    last = LAYER + 896 * 256 + 2 * 896 * 2  # the first gives its keys and values, of two heads of 64
    assert prefill_flops(TEXT, 2) == 2 * (layers + last + 896 * 152000)
    whole = 211_441_233_920  # with the last layer like the others
    assert prefill_flops(TEXT, 290) == whole - 2 * (289 * (LAYER - 896 * 256) + 2 * 896 * 289 * 290 // 2)


def test_operations_of_a_picture() -> None:
    """244.264 billion multiply-accumulates are those of every Conv and MatMul of the 0.5B's vision.onnx at 1024 px."""
    assert vision_flops(FastViTHDConfig(), 896, 1024) == 2 * 244_264_075_264


@pytest.mark.usefixtures("one_thread")
def test_operations_of_a_picture_are_those_that_pytorch_counts() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fastvlm_edge.convert.reference.fastvithd import FastViTHD
    from tests.support.checkpoints import TINY_VISION

    encoder = FastViTHD(TINY_VISION).eval()
    with (
        torch.inference_mode(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        encoder(torch.zeros(1, 3, 256, 256))
    projector = 2 * 16 * 128 * (TINY_VISION.out_dim + 128)
    assert counter.get_total_flops() + projector == vision_flops(TINY_VISION, 128, 256)


def test_the_floor_follows_from_the_measured_rates(tmp_path: Path) -> None:
    from tests.support.checkpoints import write_checkpoint

    source = write_checkpoint(tmp_path / "ck", layout="native")
    limits = {"copy_gb_per_second": 1.0, "matrix_tflops": {"float16": 0.001}}
    floor = floor_of(source, ("fp16", "bf16"), limits)
    row = floor["by_precision"]["fp16"]
    assert row["vision_ms"] == pytest.approx(floor["vision_gflop"] * 1e3, rel=1e-3)  # a GFLOP/s
    read = row["decode"]["300"]["mb_per_token"]
    assert row["decode"]["300"]["tokens_per_second"] == pytest.approx(1000 / read, rel=1e-3)
    assert row["decode"]["2000"]["mb_per_token"] > read > row["weights_mb"]
    assert "vision_ms" not in floor["by_precision"]["bf16"] and "decode" in floor_of(source, ["fp16"], {})["by_precision"]["fp16"]


def test_summary_and_names() -> None:
    assert summary([3.0, 1.0, 123456.0]) == {"median": 3.0, "min": 1.0, "max": 123500.0}
    assert slug("NVIDIA GeForce RTX 4070 Ti") == "nvidia-geforce-rtx-4070-ti"
    record = {"parity": {"a": 1}, "x": 1}
    merge(record, {"parity": {"b": 2}, "x": 2})
    assert record == {"parity": {"a": 1, "b": 2}, "x": 2}


def test_contenders_and_only() -> None:
    names = [each.name for each in contenders(["int8", "int4"])]
    assert names == [
        "tensorrt:int8",
        "transformers:float16",
        "tensorrt:int4",
        "transformers:bfloat16",
        "ort-cuda:int8",
        "compiled:float16",
    ]
    assert [name for name in names if wanted(name, ["tensorrt", "ort-cuda:int8"])] == [
        "tensorrt:int8",
        "tensorrt:int4",
        "ort-cuda:int8",
    ]
    assert all(wanted(name, None) for name in names) and not wanted("tensorrt:int8", ["tensor"])


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--precisions", "fp8"], "'fp8' is unknown; choose from fp32"), (["--runs", "0"], "--runs is 0")]
)
def test_options_that_are_refused(arguments, says, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert says in capsys.readouterr().err


def test_a_prompt_of_just_so_many_positions() -> None:
    assert question(lambda prompt: 10 + len(prompt.split()), 15) == "a a a a a"
    with pytest.raises(ValueError, match="no prompt takes 10"):
        question(lambda prompt: 10 + len(prompt.split()), 10)


# Steps that go wrong ------------------------------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_code(code: str, seconds: float = 60) -> tuple[bool, dict, list]:
    record, parts = {}, []
    good = run_step("a step", python(code), seconds, lambda part: (parts.append(part), merge(record, part)))
    return good, record, parts


def test_a_step_hands_on_its_parts_and_nothing_else() -> None:
    good, _, parts = run_code("""print('noise'); print('part: {"a": 1}'); print('{"b": 2}'); print('part: {"c": {"d": 3}}')""")
    assert good and parts == [{"a": 1}, {"c": {"d": 3}}]


def test_a_step_that_tells_what_went_wrong_keeps_its_own_words() -> None:
    good, record, _ = run_code("""print('part: {"a": 1}'); print('part: {"error": "no BF16 here"}'); raise SystemExit(1)""")
    assert not good and record == {"a": 1, "error": "no BF16 here"}


def test_a_step_that_crashes() -> None:
    good, record, _ = run_code("""import os; print('part: {"a": 1}', flush=True); os.kill(os.getpid(), 11)""")
    assert not good and record == {"a": 1, "error": "a step: ended by signal 11 (SIGSEGV)"}
    assert run_code("raise SystemExit(3)")[1]["error"] == "a step: exit status 3, see its output"


def lives(pid: str) -> bool:
    """Whether a process still runs after five seconds at most; a dead one stays a zombie where nobody asks for it."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state in "ZX":
            return False
        time.sleep(0.1)
    return True


def test_a_step_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """A step of the shell, which begins at once, where Python may take longer than the step is given on a busy machine."""
    began = time.monotonic()
    child = tmp_path / "child"
    script = f"""sleep 60 & echo $! > '{child}'; echo 'part: {{"a": 1}}'; wait"""
    record: dict = {}
    assert not run_step("a step", ["/bin/sh", "-c", script], 0.7, lambda part: merge(record, part))
    assert record == {"a": 1, "error": "a step: cut off, the time was up"}
    assert time.monotonic() - began < 30
    assert not lives(child.read_text().strip()), "a process of the step lives on"


def make_run(tmp_path: Path, steps, **options) -> Run:
    """A run whose steps are made of Python code."""
    run = Run(Task(tmp_path, tmp_path / "checkpoint", ("fp16",), 1), tmp_path / "out.json", None, options.pop("limit", 60))
    run.document = begin({"device": DEVICE, "machine": {}}, None)
    run._step = lambda step, keep: run_step(step, python(steps[step]), 60, keep)
    return run


def test_the_others_go_on_when_one_contender_fails(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"bad": "raise SystemExit(1)", "never": "", "good": """print('part: {"decode": {"300": {}}}')"""})
    assert not run.measure(Contender("first", ("bad", "never")))
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"]["first"] == {"state": "failed", "error": "bad: exit status 1, see its output"}
    assert run.measure(Contender("second", ("good",)))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["second"] == {"state": "done", "decode": {"300": {}}} and results["first"]["state"] == "failed"


def test_every_part_is_on_the_disk_as_soon_as_it_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = f"""
import json, time
print('part: {{"load_ms": 1}}', flush=True)
for _ in range(200):
    time.sleep(0.05)
    try:
        seen = json.load(open({str(out)!r}))["results"]["x"].get("load_ms")
    except OSError:
        seen = None
    if seen:
        break
print('part: ' + json.dumps({{"seen": seen}}))
"""
    run = make_run(tmp_path, {"step": code})
    assert run.measure(Contender("x", ("step",)))
    assert run.document["results"]["x"]["seen"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_step_finds_itself_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    run = Run(Task(tmp_path / "work", tmp_path, ("fp16",), 1), tmp_path / "out.json", None, 60)
    told: dict = {}
    assert run._step("checkpoint", told.update) and told == {}
    (tmp_path / "config.json").unlink()
    assert not run._step("checkpoint", told.update)
    assert told["error"].startswith(f"checkpoint: FileNotFoundError: {tmp_path} has no config.json")


def test_what_has_no_time_left_says_so(tmp_path: Path) -> None:
    run = Run(Task(tmp_path, tmp_path, ("fp16",), 1), tmp_path / "out.json", None, 0)
    run.document = begin({"device": DEVICE, "machine": {}}, None)
    assert not run.measure(Contender("late", ("speed:tensorrt:fp16",)))
    assert "not begun, no time was left; run again" in run.document["results"]["late"]["error"]


def test_only_keeps_the_others_of_the_same_gpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"device": DEVICE, "results": {"transformers:float16": {"state": "done"}}}))
    assert begin({"device": DEVICE, "machine": {}}, path)["results"] == {"transformers:float16": {"state": "done"}}
    assert begin({"device": {**DEVICE, "driver": "590"}, "machine": {}}, path)["results"] == {}
    assert begin({"device": DEVICE, "machine": {}}, tmp_path / "none.json")["results"] == {}


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastvlm_edge import FastVLMError
    from fastvlm_edge.nvidia import drivers

    def no_gpu() -> None:
        raise FastVLMError("no NVIDIA driver on this machine")

    monkeypatch.setattr(drivers, "open_cuda", no_gpu)
    assert be_step("device", Task(tmp_path, tmp_path, ("fp16",), 1)) == 1
    line = capsys.readouterr().out
    assert json.loads(line.removeprefix(PART)) == {"error": "device: no NVIDIA driver on this machine"}


# Measuring, on the CPU ----------------------------------------------------------------------------------------------------------


def test_replies_are_timed_and_none_ends_early(model_dir: Path) -> None:
    with FastVLM.load(model_dir, "ort", threads=1) as vlm:
        end = vlm.generate(PROMPT, photograph(), max_new_tokens=1).token_ids[0]
        vlm.manifest.text.stop_ids.append(end)
        record: dict = {}
        for part in time_replies(vlm, {"short": 60, "long": 150}, 3, 9):
            merge(record, part)
    assert set(record["first_token"]) == set(STAGES)
    first = record["first_token"]["ttft_ms"]
    assert 0 < first["min"] <= first["median"] <= first["max"]
    assert [record["decode"][name]["prompt_tokens"] for name in ("short", "long")] == [60, 150]
    assert all(row["tokens_per_second"]["median"] > 0 for row in record["decode"].values())
    assert len(record["tokens"]) == 9


class SimulatedModel:
    """Of transformers, as far as `generate` needs it, on a clock of its own: a prefill of any length, then steps of 10 ms."""

    def __init__(self, prefills: list[float], passes: int | None = None) -> None:
        import torch

        self.model, self.clock, self.prefills, self.passes = SimpleNamespace(language_model=torch.nn.Identity()), 0.0, prefills, passes

    def generate(self, *, input_ids, max_new_tokens, **_):
        import torch

        for index in range(self.passes or max_new_tokens):
            self.model.language_model(input_ids)
            self.clock += 0.01 if index else self.prefills.pop(0)
        return torch.cat([input_ids, torch.full((1, max_new_tokens), 7)], 1)


class Simulated(Loaded):
    def wait(self) -> float:
        return self.model.clock


def test_the_speed_of_decoding_does_not_depend_on_prefill() -> None:
    """Taken as the difference of two replies it would: 8 steps less 5 seconds of noise are a negative speed."""
    import torch

    loaded = Simulated(torch, SimulatedModel([5.0, 0.001, 60.0]), "cpu", 256)
    for _ in range(3):
        tokens, speed = time_decoding(loaded, torch.zeros((1, 4), dtype=torch.int64), None, 9)
        assert tokens == [7] * 9 and speed == pytest.approx(100)
    assert not loaded.model.model.language_model._forward_pre_hooks


def test_a_reply_that_is_not_decoded_token_by_token_has_no_speed() -> None:
    import torch

    loaded = Simulated(torch, SimulatedModel([1.0], passes=4), "cpu", 256)
    with pytest.raises(RuntimeError, match="passed 4 times through the language model for 9 tokens"):
        time_decoding(loaded, torch.zeros((1, 4), dtype=torch.int64), None, 9)


@pytest.mark.usefixtures("one_thread")
def test_transformers_and_the_loop_that_is_compiled_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed steps on the CPU, uncompiled: what they do is right, how fast it is does not matter here."""
    from fastvlm_edge.convert.pipeline import convert
    from tests.support.checkpoints import write_checkpoint

    import_timm()
    task = Task(tmp_path, write_checkpoint(tmp_path / "ck", layout="native", image_size=256), ("fp32",), 2)
    convert(str(task.checkpoint), tmp_path / "fp32", context=512)
    monkeypatch.setattr(workload, "PROMPTS", {"300": 60, "2000": 90})
    monkeypatch.setattr(workload, "NEW_TOKENS", 9)
    with FastVLM.load(tmp_path / "fp32", "ort", threads=1) as vlm:
        sides = [time_replies(vlm, workload.PROMPTS, 2, 9), speed_of_transformers(task, "float32", "cpu")]
        sides.append(speed_of_compiled(task, "float32", "cpu", compiled=False))
        records: list[dict] = []
        for parts in sides:
            records.append({})
            for part in parts:
                merge(records[-1], part)
    assert all(record["tokens"] == records[0]["tokens"] and len(record["tokens"]) == 9 for record in records)
    for record in records:
        assert set(record["first_token"]) == set(STAGES)
        assert {name: row["prompt_tokens"] for name, row in record["decode"].items()} == workload.PROMPTS
        speeds = [row["tokens_per_second"] for row in record["decode"].values()]
        assert all(set(speed) == {"median", "min", "max"} and speed["min"] > 0 for speed in speeds)
