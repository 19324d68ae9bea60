"""The run of the peers and what their scripts share: contenders in turns, and a record that survives a peer that fails."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cpu, headline
from benchmarks.common import machine
from benchmarks.common.rounds import Failed, call, figures, take_turns
from benchmarks.peers import run
from benchmarks.peers.protocol import ROOT, Workload, time_llm, time_vision, versions
from benchmarks.peers.run import Run, contender, contenders, environment
from benchmarks.peers.runtimes import llava_onevision
from benchmarks.peers.workload import converter_digest, write_llm


def workload_in(folder: Path) -> Workload:
    np.save(folder / "pixels.npy", np.zeros((2, 3, 8, 8), np.float32))
    return Workload(folder, "tiny", 8, 4, 100, [*range(100, 104), 1, 2, 3], new_tokens=5, threads=1, runs=3)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Options of a run in which nothing real is prepared or measured."""
    (tmp_path / "workload.json").write_text(json.dumps({"image_size": 256, "visual_tokens": 16, "ids": [0] * 50, "new_tokens": 5}))
    monkeypatch.setattr(run, "prepare", lambda *_: None)
    monkeypatch.setattr(run, "environment", lambda *_: "python")
    monkeypatch.setattr(machine, "limits", lambda threads: {"matmul_gflops": 1.0})
    return argparse.Namespace(
        **{"device": "cpu", "only": None, "rounds": 2, "runs": 1, "threads": 2, "size": "tiny", "fresh": False},
        **{"limit": None, "prepare": False, "work": tmp_path, "envs": tmp_path, "out": tmp_path / "peers.json"},
    )


def run_of(options: argparse.Namespace) -> Run:
    """A run of three contenders."""
    return Run(options, contenders(["llama.cpp", "openvino:bf16"]))


def answer(command: list[str], **_: Any) -> str:
    return json.dumps({"samples": {"prefill_ms": [5.0], "peak_memory_mib": [7.0]}, "versions": {"x": "1"}})


def test_every_peer_of_the_field_is_there_and_can_be_chosen() -> None:
    names = [each.name for each in contenders(None)]
    assert set(names) >= {
        *("fastvlm-edge:int4", "fastvlm-edge:int4-llm", "transformers:float32", "transformers:bfloat16", "transformers:bfloat16-compile"),
        *("optimum-onnx:fp32", "onnxruntime-genai:int4", "llama.cpp:q8_0", "llama.cpp:q4_0"),
        *("openvino:fp32", "openvino:bf16", "openvino:int8"),
    }
    assert [each.name for each in contenders(["llama.cpp", "openvino:bf16"])] == ["llama.cpp:q4_0", "llama.cpp:q8_0", "openvino:bf16"]
    with pytest.raises(SystemExit, match="names vllm, which is none of"):
        contenders(["vllm"])


def test_contenders_take_turns(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def note(command: list[str], **_: Any) -> str:
        if "--measure" in command:
            measured.append(command[-1])
        return answer(command)

    monkeypatch.setattr(run, "call", note)
    assert run_of(options).run() == 0
    assert measured == ["q4_0", "q8_0", "bf16"] * 2
    document = json.loads(options.out.read_text())
    assert document["results"]["llama.cpp:q4_0"]["prefill_ms"] == {"median": 5.0, "min": 5.0, "max": 5.0, "samples": [[5.0], [5.0]]}
    assert document["machine"]["date"] and document["results"]["openvino:bf16"]["versions"] == {"x": "1"}
    assert [record["part"] for record in document["results"].values()] == ["llm", "llm", "vision"]


def test_a_peer_that_fails_is_recorded_and_the_others_go_on(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str], **_: Any) -> str:
        if command[-1] == "q8_0" and "--measure" in command:
            raise Failed("ValueError: no such tensor")
        return answer(command)

    monkeypatch.setattr(run, "call", fail)
    assert run_of(options).run() == 1
    results = json.loads(options.out.read_text())["results"]
    assert results["llama.cpp:q8_0"]["error"] == "ValueError: no such tensor" and "prefill_ms" not in results["llama.cpp:q8_0"]
    assert len(results["openvino:bf16"]["prefill_ms"]["samples"]) == 2
    monkeypatch.setattr(run, "call", answer)
    assert run_of(options).run() == 0  # the same command tries again what failed, and only that
    results = json.loads(options.out.read_text())["results"]
    assert "error" not in results["llama.cpp:q8_0"] and len(results["llama.cpp:q8_0"]["prefill_ms"]["samples"]) == 2


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def stop(command: list[str], **_: Any) -> str:
        if "--measure" in command:
            measured.append(command[-1])
            if len(measured) == 5:
                raise KeyboardInterrupt
        return answer(command)

    monkeypatch.setattr(run, "call", stop)
    with pytest.raises(KeyboardInterrupt):
        run_of(options).run()
    assert len(json.loads(options.out.read_text())["results"]["llama.cpp:q4_0"]["prefill_ms"]["samples"]) == 2
    assert run_of(options).run() == 0
    assert measured == ["q4_0", "q8_0", "bf16", "q4_0", "q8_0", "q8_0", "bf16"]
    assert not (options.work / "peers-run.json").exists()
    options.threads = 1
    assert run_of(options).state["rounds"] == {}


def test_a_run_of_other_settings_is_not_taken_up(options: argparse.Namespace) -> None:
    settings = {"device": "cpu", "size": "tiny", "threads": 2, "runs": 1}
    state = {"settings": settings, "rounds": {"x": []}, "errors": {}, "versions": {}, "checks": {}, "before": {}}
    (options.work / "peers-run.json").write_text(json.dumps(state))
    assert run_of(options).state["rounds"] == {"x": []}
    options.fresh = True
    assert run_of(options).state["rounds"] == {}
    options.fresh, options.threads = False, 4
    assert run_of(options).state["rounds"] == {}


def test_what_a_process_said_last_is_the_reason() -> None:
    assert call([sys.executable, "-c", "print(1)"]) == "1\n"
    with pytest.raises(Failed, match=r"^ValueError: broken$"):
        call([sys.executable, "-c", "raise ValueError('broken')"])
    with pytest.raises(Failed, match="ended by signal 9: "):
        call([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])


def lives(pid: str) -> bool:
    """Whether a process still runs after five seconds; one that ended stays a zombie if nobody asks for its status."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state in "ZX":
            return False
        time.sleep(0.1)
    return True


def test_a_process_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """A script of the shell, which starts at once; Python may take longer than the given time on a busy machine."""
    began, child = time.monotonic(), tmp_path / "child"
    with pytest.raises(Failed, match=r"^not done after 1 s$"):
        call(["/bin/sh", "-c", f"sleep 60 & echo $! > '{child}'; wait"], seconds=0.7)
    assert time.monotonic() - began < 30
    assert not lives(child.read_text().strip()), "a process that it started lives on"


def test_what_a_process_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    child = tmp_path / "child"
    call(["/bin/sh", "-c", f"sleep 60 > /dev/null 2>&1 & echo $! > '{child}'"])
    assert not lives(child.read_text().strip())


def test_rounds_can_begin_with_another_contender_each_time() -> None:
    order: list[str] = []

    def measure(name: str) -> dict[str, list[float]]:
        order.append(name)
        return {"vision_ms": [float(len(order))]}

    found = take_turns("abc", 3, measure, rotate=True)
    assert "".join(order) == "abcbcacab"
    assert found["a"] == [{"vision_ms": [1.0]}, {"vision_ms": [6.0]}, {"vision_ms": [8.0]}]


def test_without_a_place_for_failures_they_are_raised() -> None:
    def measure(name: str) -> dict[str, list[float]]:
        raise Failed("broken")

    with pytest.raises(Failed, match="broken"):
        take_turns(["a"], 1, measure)


def test_the_other_comparisons_have_contenders_of_the_peers(tmp_path: Path) -> None:
    assert {each.name for each in contenders(cpu.CONTENDERS)} == set(cpu.CONTENDERS)
    chosen = [contender(name, module, variant) for name, (module, variant) in headline.CONTENDERS.items()]
    assert all(each.variant in each.peer.variants for each in chosen)
    assert [each.environment for each in chosen] == ["ours", "transformers_fastvlm", "transformers_fastvlm"]
    assert chosen[0].command("python", tmp_path, 2, 3, "cpu", "--measure") == [
        *("python", "-m", "benchmarks.peers.runtimes.ours", "--work", str(tmp_path)),
        *("--threads", "2", "--runs", "3", "--device", "cpu", "--measure", "int4"),
    ]


def test_models_of_an_older_converter_are_known_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module of convert/ counts, those in its sub-directories too."""
    from benchmarks.peers import workload

    (tmp_path / "convert" / "graphs").mkdir(parents=True)
    module = tmp_path / "convert" / "graphs" / "vision.py"
    module.write_text("a = 1")
    monkeypatch.setattr(workload, "ROOT", tmp_path)
    before = converter_digest()
    module.write_text("a = 2")
    assert converter_digest() != before


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(venv, "create", lambda folder, with_pip: (folder).mkdir(exist_ok=True))

    def note(command: list[str]) -> str:
        commands.append(command)
        return ""

    monkeypatch.setattr(run, "call", note)
    peer = run.peer_of("transformers_fastvlm")
    for _ in range(2):
        assert environment(tmp_path / "env", peer) == str(tmp_path / "env" / "bin" / "python")
    assert len(commands) == 2 and all(str(ROOT / "constraints.txt") in command for command in commands)
    assert "torch==2.13.0" in commands[0] and commands[1][-2:] == ["--no-deps", "timm"]
    assert environment(tmp_path / "other", run.peer_of("ours")) == sys.executable


def test_prefill_and_decoding_are_timed_greedily(tmp_path: Path) -> None:
    fed: list[Any] = []
    work = workload_in(tmp_path)

    def prefill(ids: list[int]) -> int:
        fed.append(ids)
        return 7

    def decode(token: int) -> int:
        fed.append(token)
        return token + 1

    samples = time_llm(prefill, decode, lambda: fed.append("reset"), work)
    assert len(samples["prefill_ms"]) == len(samples["decode_tokens_per_second"]) == 3
    assert fed[:6] == ["reset", work.text_ids, 7, 8, 9, 10] and len(fed) == 4 * 6
    assert len(work.text_ids) == len(work.ids)


def test_an_encoder_that_gives_nonsense_is_an_error(tmp_path: Path) -> None:
    work = workload_in(tmp_path)
    assert len(time_vision(lambda pixels: np.ones((1, 4, 2)), work)["vision_ms"]) == 3
    with pytest.raises(RuntimeError, match="not finite"):
        time_vision(lambda pixels: np.full((1, 4, 2), np.nan), work)


def test_figures_keep_rounds_apart_and_versions_name_what_was_installed() -> None:
    found = figures([{"vision_ms": [1.0, 3.0], "unknown": [1.0]}, {"vision_ms": [2.0]}])
    assert found == {"vision_ms": {"median": 2.0, "min": 1.0, "max": 3.0, "samples": [[1.0, 3.0], [2.0]]}}
    assert set(versions(("numpy==1.0", "no-such-package[x]"))) == {"python", "numpy"}


def test_no_peer_loads_the_toolkit_into_its_own_memory() -> None:
    code = "import sys; from benchmarks.peers.runtimes import llamacpp, openvino_vision; import benchmarks.peers.protocol as p; "
    code += "assert p.peak_host_mib() > 1; bad = {'fastvlm_edge', 'onnxruntime'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_llm_alone_is_a_checkpoint_that_transformers_reads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.checkpoints import SIZES, write_checkpoint

    source = write_checkpoint(tmp_path / "ck", layout="native")
    write_llm(source, tmp_path / "llm")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", output_loading_info=True)
    model, notes = loaded
    assert type(model).__name__ == "Qwen2ForCausalLM" and not notes["missing_keys"] and not notes["unexpected_keys"]
    assert model.config.num_hidden_layers == SIZES["tiny"].layers
    with torch.inference_mode():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_llava_onevision_has_the_tokens_that_the_paper_counts() -> None:
    from fastvlm_edge.bench.workload import Pictures

    assert llava_onevision.VISUAL_TOKENS == 7290
    cuts = llava_onevision.tiles(Pictures().new())
    assert cuts.shape == (10, 3, 384, 384) and -1 <= cuts.min() < 0 < cuts.max() <= 1
    config = llava_onevision.config_of("0.5b")
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers, config.vision_config.image_size) == (1152, 26, 384)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (896, 24)


def test_the_encoder_is_counted_from_the_checkpoint(tmp_path: Path) -> None:
    from tests.support.checkpoints import SIZES, native_rows, stored_shapes, write_safetensors

    text = SIZES["0.5b"].text(native_rows(SIZES["0.5b"].rows), tied=True)
    write_safetensors(tmp_path, stored_shapes(SIZES["0.5b"].vision, text, "native"), None, layout="native")  # holes: no disk
    assert headline.encoder_parameters(tmp_path) == 122_714_208


def test_the_headline_is_a_run_of_its_three_contenders(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(command: list[str], **_: Any) -> str:
        slow = 10 if "llava" in command[2] else 1
        samples = {"ttft_ms": [100.0 * slow], "encoder_parameters": [400e6]}
        return json.dumps({"samples": samples, "versions": {}})

    monkeypatch.setattr(run, "call", measured)
    monkeypatch.setattr(headline, "encoder_parameters", lambda _: 125_000_000)
    found = headline.headline(options)
    assert list(found["results"]) == list(headline.CONTENDERS) and (found["rounds"], found["runs"]) == (2, 1)
    assert found["ttft_ratio"] == {"fastvlm-edge int4": 10.0, "transformers FastVLM bfloat16": 10.0}
    assert found["encoder_parameters"] == {"FastViTHD": 125_000_000, "SigLIP": 400_000_000} and found["encoder_ratio"] == 3.2


def test_the_headline_puts_ours_beside_the_paper(tmp_path: Path) -> None:
    figure = {"median": 100.0, "min": 90.0, "max": 110.0}
    parts = dict.fromkeys(("ttft_ms", "ttft_cold_ms", "preprocess_ms", "vision_ms", "prefill_ms", "first_sample_ms"), figure)
    document = {
        "paper": headline.PAPER,
        "machine": {"cpu": "x", "date": "2026-01-01"},
        "threads": 2,
        "headline": {
            "results": dict.fromkeys(headline.CONTENDERS, parts),
            "ttft_ratio": {"fastvlm-edge int4": 21.5},
            "encoder_parameters": {"SigLIP": 400e6, "FastViTHD": 125e6},
            "encoder_ratio": 3.2,
        },
        "resolutions": [{**parts, "model": {"image_size": size, "visual_tokens": (size // 64) ** 2}} for size in (256, 1024)],
    }
    text = headline.tables(document)
    for shown in ("21.5 times as long", "85 times as long", "14,124", "3.2 times (paper: 3.4)", "235.6", "2412.13303"):
        assert shown in text
    headline.plot(tmp_path / "h", document)
    assert all((tmp_path / f"h.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))
