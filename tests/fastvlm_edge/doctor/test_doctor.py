"""The doctor on the boards of `boards/`: what it says of each, and of each in many ways broken; and that it needs nothing but Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge.commands.doctor import main
from fastvlm_edge.doctor.check_board import OLDEST_TENSORRT
from fastvlm_edge.doctor.check_software import OLDEST_RTX
from fastvlm_edge.doctor.facts import has_gpu, read_facts
from fastvlm_edge.doctor.findings import STATUSES
from fastvlm_edge.extras import install_command
from fastvlm_edge.machine.boards.chips import CHIPS, SUPPORTED
from fastvlm_edge.machine.boards.faults import find_faults
from fastvlm_edge.machine.boards.jetpacks import JETPACKS, find_jetpack
from fastvlm_edge.machine.boards.targets import TARGETS
from fastvlm_edge.machine.libraries import PACKAGES
from fastvlm_edge.machine.probe import Probe
from fastvlm_edge.nvidia import tensorrt_library
from tests.support.boards import RUNTIME, Board, probe_of
from tests.support.boards.computers import cpu_box, rtx_desktop
from tests.support.boards.jetsons import agx_orin, orin_nano, thor
from tests.support.fake_engine import VERSION, build_engines

HERE = Path(__file__).parents[3]
BOARDS = (orin_nano, agx_orin, thor, rtx_desktop, cpu_box)


@dataclass
class Report:
    """What `doctor --json` printed."""

    exit_status: int
    status: str
    machine: dict[str, Any]
    findings: dict[str, dict[str, Any]]
    bad: dict[str, str] = field(default_factory=dict)
    """Topic -> command, of everything that is not ok."""


@pytest.fixture
def examine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Report]:
    def run(board: Board, *arguments: str) -> Report:
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        status = main([*arguments, "--json"], probe_of(board, tmp_path / "root"))
        out, err = capsys.readouterr()
        assert out.count("\n") == 1 and err == ""
        document = json.loads(out)
        findings = {finding["topic"]: finding for finding in document["findings"]}
        for finding in findings.values():
            assert finding["status"] in STATUSES and finding["text"]
            assert finding["mend"] or finding["status"] == "ok", finding
        bad = {topic: finding["mend"] for topic, finding in findings.items() if finding["status"] != "ok"}
        assert status == (1 if any(finding["status"] == "problem" for finding in findings.values()) else 0)
        return Report(status, document["status"], document["machine"], findings, bad)

    return run


# The boards as they are ------------------------------------------------------------------------------------------------------------


def test_an_orin_nano_out_of_the_box(examine: Callable[..., Report]) -> None:
    report = examine(orin_nano())
    assert report.status == "warning" and report.exit_status == 0
    assert report.bad == {
        "cma": r"sudo sed -i 's/ cma=[^ ]*//; /^ *APPEND/ s/$/ cma=950M/' /boot/extlinux/extlinux.conf && sudo reboot",
        "swap": "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile",
        "power mode": "sudo nvpmodel -m 2",
        "tensorrt": "fastvlm-edge build MODEL --static (or install TensorRT 10.7 for L4T, see docs/jetpack-6.md)",
    }
    texts = {topic: finding["text"] for topic, finding in report.findings.items()}
    assert "Orin Nano 8 GB" in texts["board"] and "compute capability 8.7" in texts["board"]
    assert texts["jetpack"] == "Jetson Linux 36.4.3, JetPack 6.2 with TensorRT 10.3 and CUDA 12.6"
    assert texts["tensorrt"] == (
        "tensorrt 10.3.0, libnvinfer 10.3.0; reported to compute transformers with dynamic shapes wrongly (NVIDIA/TensorRT#4419, #4330); "
        "reported to compute other results with dynamic shapes than with fixed ones, and less exact ones with several profiles "
        "(NVIDIA/TensorRT#4250)"
    )
    assert texts["gpu clock"].startswith("306 MHz, 306 to 625") and report.findings["gpu clock"]["mend"].startswith("sudo jetson_clocks")
    assert texts["heat"] == "tj-thermal at 52 °C, not throttling"
    assert report.machine["memory"]["cma_total"] == 256 << 20 and report.machine["power_mode"]["current"] == 0
    assert report.machine["memory"]["swap_zram"] == report.machine["memory"]["swap_total"]


def test_an_agx_orin_that_is_ready(examine: Callable[..., Report]) -> None:
    report = examine(agx_orin())
    assert report.bad == {} and report.status == "ok"
    texts = {topic: finding["text"] for topic, finding in report.findings.items()}
    assert texts["jetpack"] == "Jetson Linux 39.2.0, JetPack 7.2 with TensorRT 10.16 and CUDA 13.2"
    assert texts["emc clock"] == "3199 MHz, 204 to 3199, variable"
    assert texts["power mode"].startswith("MAXN, the fastest") and texts["gpu clock"] == "1300 MHz, 1300 to 1300, fixed"
    assert "oc2 15, oc3 37" in texts["supply"]


def test_a_thor(examine: Callable[..., Report]) -> None:
    report = examine(thor())
    assert report.bad == {
        "power mode": "sudo nvpmodel -m 0",
        "tensorrt": "sdkmanager (on another computer, the board in recovery mode): JetPack 7.2, which has TensorRT 10.16",
    }
    assert "products that share their input wrongly on Thor" in report.findings["tensorrt"]["text"]
    assert "compute capability 11.0" in report.findings["board"]["text"] and "Thor T5000" in report.findings["board"]["text"]
    assert report.findings["emc clock"]["text"].startswith("666 MHz, 666 to 4266")
    assert report.findings["cma"]["status"] == "ok" and "i8mm" in report.findings["processor"]["text"]


def test_a_desktop_with_a_card(examine: Callable[..., Report]) -> None:
    report = examine(rtx_desktop())
    assert report.bad == {}
    text = report.findings["gpu"]["text"]
    assert text == "NVIDIA GeForce RTX 4070, compute capability 8.9, driver 580.95.05, 11480 of 12282 MiB free, 41 °C"
    assert report.machine["driver"]["pci"] == ["10de:2786"]  # its sound device is none
    assert "driver for CUDA 13.0" in report.findings["cuda"]["text"] and "jetpack" not in report.findings


def test_a_computer_without_a_gpu_is_well(examine: Callable[..., Report]) -> None:
    report = examine(cpu_box())
    assert report.bad == {} and "amx_int8, avx512_vnni" in report.findings["processor"]["text"]
    assert report.findings["gpu"]["text"] == "no NVIDIA GPU: models run on the CPU, through onnxruntime"
    assert "cuda" not in report.findings and "rights" not in report.findings


# What is wrong with them -----------------------------------------------------------------------------------------------------------


def _release(text: str) -> dict[str, str]:
    return {"etc/nv_tegra_release": f"# {text}, GCID: 1, BOARD: generic, EABI: aarch64\n"}


def _without_tensorrt(board: Board, **changes: Any) -> Board:
    return board.but(packages={name: version for name, version in board.packages.items() if not name.startswith("tensorrt")}, **changes)


_NVIDIA = "usr/lib/aarch64-linux-gnu/"
_ZONE = "sys/class/thermal/thermal_zone4/temp"

BROKEN = {
    "jetpack 5": (
        orin_nano().but(files=_release("R35 (release), REVISION: 4.1")),
        *("jetpack", "problem", "JetPack 5 with TensorRT 8.5", "sdkmanager"),
    ),
    "jetpack 4": (orin_nano().but(files=_release("R32 (release), REVISION: 7.1")), "jetpack", "problem", "before 5", "sdkmanager"),
    "jetpack 6.0": (
        orin_nano().but(files=_release("R36 (release), REVISION: 3.0")),
        *("jetpack", "problem", "JetPack 6.0", "sudo sed -i 's/r36\\.[23]/r36.4/'"),
    ),
    "a jetpack of the future": (
        thor().but(files=_release("R41 (release), REVISION: 1.0")),
        *("jetpack", "ok", "newer than this version of fastvlm-edge", ""),
    ),
    "a xavier": (
        orin_nano().but(files={"proc/device-tree/compatible": "nvidia,p2972-0000\0nvidia,tegra194\0"}),
        *("board", "problem", "Xavier", "--backend ort"),
    ),
    "a virtual environment that does not see JetPack's": (
        _without_tensorrt(orin_nano(), environment="/home/user/.venv"),
        *("tensorrt", "problem", "does not see JetPack's", "python3.10 -m venv --system-site-packages /home/user/.venv"),
    ),
    "a Python that JetPack's bindings are not for": (
        _without_tensorrt(orin_nano(), python=(3, 12, 4), environment="/home/user/.venv"),
        *("tensorrt", "problem", "built for Python 3.10, and this is 3.12", "/usr/bin/python3.10 -m venv --system-site-packages .venv"),
    ),
    "no bindings": (
        _without_tensorrt(orin_nano(), without=["usr/lib/python3"]),
        *("tensorrt", "problem", "libnvinfer 10.3.0 is installed, but", "sudo apt install python3-libnvinfer"),
    ),
    "a bare Jetson Linux": (
        _without_tensorrt(orin_nano(), without=["usr/lib/python3", f"{_NVIDIA}libnvinfer"]),
        *("tensorrt", "problem", "not installed", "sudo apt update && sudo apt install nvidia-jetpack"),
    ),
    "an old tensorrt": (
        orin_nano().but(packages=orin_nano().packages | {"tensorrt": "8.6.2"}),
        *("tensorrt", "problem", "8.6.2; 10.3 or newer", "sdkmanager"),
    ),
    "a binding of the next CUDA": (
        orin_nano().but(packages=orin_nano().packages | {"cuda-bindings": "13.2.0"}),
        *("cuda", "problem", "needs CUDA 13, and the driver supports 12.6", "pip install 'cuda-bindings<13'"),
    ),
    "no binding": (
        orin_nano().but(packages=RUNTIME | {"tensorrt": "10.3.0"}),
        *("cuda", "problem", "cuda-bindings, which Python needs for CUDA, is not installed", install_command("tensorrt")),
    ),
    "a container without the runtime": (
        orin_nano().but(without=["dev/", "etc/nv_tegra", f"{_NVIDIA}nvidia/"], files={".dockerenv": ""}),
        *("container", "problem", "no access to the GPU", "docker run --runtime nvidia"),
    ),
    "a container where TensorRT misses the DLA": (
        thor().but(without=[f"{_NVIDIA}nvidia/libnvdla"], files={".dockerenv": ""}),
        *("container", "warning", "libnvdla_compiler.so is missing", "docker run -v /usr/lib/aarch64-linux-gnu/nvidia/libnvdla"),
    ),
    "a user without rights": (
        orin_nano().but(denied=("dev/nvmap", "dev/nvhost-ctrl-gpu")),
        *("rights", "problem", "no access to /dev/nvmap, /dev/nvhost-ctrl-gpu", "sudo usermod -aG video,render $USER"),
    ),
    "a cma argument that is too small": (
        orin_nano().but(files={"proc/cmdline": "root=PARTUUID=0 cma=256M rw\n"}),
        *("cma", "warning", "from cma=256M", "cma=950M"),
    ),
    "a board that boots with grub": (
        orin_nano().but(without=["boot/"], files={"etc/default/grub": 'GRUB_CMDLINE_LINUX=""\n'}),
        *("cma", "warning", "256 MiB", "sudo update-grub && sudo reboot"),
    ),
    "little memory free": (
        orin_nano().but(files={"proc/meminfo": "MemTotal: 7802000 kB\nMemAvailable: 1000000 kB\n"}),
        *("memory", "warning", "976 MiB of 7.4 GiB free", "sudo systemctl isolate multi-user.target"),
    ),
    "no swap": (orin_nano().but(files={"proc/meminfo": "MemTotal: 7802000 kB\n"}), "swap", "warning", "none", "fallocate"),
    "throttling": (
        orin_nano().but(files={"sys/class/thermal/cooling_device2/cur_state": "1\n", _ZONE: "99000\n"}),
        *("heat", "warning", "throttling now (gpu-throttle-alert); tj-thermal at 99", "sudo jetson_clocks --fan"),
    ),
    "heat": (orin_nano().but(files={_ZONE: "91000\n"}), "heat", "warning", "91 °C, near throttling", "sudo jetson_clocks --fan"),
    "a weak supply": (
        orin_nano().but(files={"sys/class/hwmon/hwmon2/oc1_event_cnt": "4\n"}),
        *("supply", "warning", "4 under-voltage events", "sudo nvpmodel -m 0"),
    ),
    "powersave": (
        orin_nano().but(files={"sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "powersave\n"}),
        *("cpu clock", "warning", "powersave", "echo schedutil"),
    ),
    "a nearly full disk": (orin_nano().but(free_bytes=3 << 30), "disk (cache)", "warning", "3.0 GiB free", "FASTVLM_EDGE_CACHE="),
    "a full disk": (cpu_box().but(free_bytes=100 << 20), "disk (cache)", "problem", "100 MiB free", "sudo apt clean"),
    "a card without a driver": (
        rtx_desktop().but(without=["proc/driver", "dev/"], smi=None),
        *("gpu", "problem", "(10de:2786) without a driver", "sudo ubuntu-drivers install && sudo reboot"),
    ),
    "an updated driver": (
        rtx_desktop().but(
            without=["usr/lib/x86_64-linux-gnu/libcuda.so.580"], files={"usr/lib/x86_64-linux-gnu/libcuda.so.590.44.01": ""}, smi=None
        ),
        *("gpu", "problem", "kernel module of the driver is 580.95.05, its library 590.44.01", "sudo reboot"),
    ),
    "a driver without nvidia-smi": (rtx_desktop().but(smi=None), "gpu", "problem", "nvidia-smi does not answer", "ubuntu-drivers"),
    "a container without the card": (
        rtx_desktop().but(files={".dockerenv": ""}, smi=None),
        *("gpu", "problem", "no access to the NVIDIA GPU of the host", "docker run --gpus all"),
    ),
    "an old card": (
        rtx_desktop().but(smi=("", "NVIDIA GeForce GTX 1080, 570.1, 6.1, 8192, 8000, 40\n")),
        *("gpu", "problem", "TensorRT needs 7.5", "--backend ort"),
    ),
    "a hot card": (
        rtx_desktop().but(smi=("", "NVIDIA GeForce RTX 4070, 580.1, 8.9, 12282, 11480, 88\n")),
        *("gpu", "warning", "88 °C, near throttling", "nvidia-smi -q -d PERFORMANCE"),
    ),
    "a card and no TensorRT": (
        _without_tensorrt(rtx_desktop()),
        *("tensorrt", "warning", "the GPU is unused", install_command("rtx")),
    ),
    "a card that TensorRT for RTX does not list": (
        rtx_desktop().but(smi=("", "NVIDIA H100 80GB HBM3, 580.1, 9.0, 81559, 81000, 30\n")),
        *("tensorrt", "warning", "cannot build for compute capability 9.0", f"{install_command('tensorrt')} && pip install tensorrt"),
    ),
    "an old TensorRT for RTX": (
        rtx_desktop().but(packages=rtx_desktop().packages | {"tensorrt_rtx": "1.0.0.21"}),
        *("tensorrt", "problem", "1.2 or newer", "pip install --upgrade tensorrt-rtx"),
    ),
    "wsl whose driver does not answer": (
        cpu_box().but(kernel="6.6.87.2-microsoft-standard-WSL2", files={"dev/dxg": "", "usr/lib/wsl/lib/libcuda.so.1": ""}),
        *("gpu", "problem", "nvidia-smi does not answer", "wsl --update"),
    ),
    "wsl without a card": (
        cpu_box().but(kernel="6.6.87.2-microsoft-standard-WSL2", files={"dev/dxg": ""}),
        *("gpu", "ok", "models run on the CPU", "wsl --update"),
    ),
    "an old Python": (cpu_box().but(python=(3, 8, 10)), "python", "problem", "3.10 or newer", "python3.10 -m venv"),
    "nothing installed": (
        cpu_box().but(packages={}),
        "packages",
        "problem",
        "numpy, pillow, tokenizers, onnxruntime missing",
        install_command(),
    ),
    "a broken package": (
        cpu_box().but(broken={"numpy": "OSError: libfoo.so.1"}),
        *("packages", "problem", "numpy is installed but cannot be loaded (OSError: libfoo.so.1)", "--force-reinstall numpy"),
    ),
    "a broken TensorRT on a Jetson": (
        orin_nano().but(broken={"tensorrt": "ImportError: libnvinfer.so.10"}),
        *("tensorrt", "problem", "tensorrt is installed but cannot be loaded", "sudo apt install --reinstall"),
    ),
    "a broken CUDA binding": (
        rtx_desktop().but(broken={"cuda.bindings": "ImportError: GLIBC_2.34 not found"}),
        *("cuda", "problem", "cuda.bindings is installed but cannot be loaded", "--force-reinstall cuda-bindings"),
    ),
    "an old package": (
        cpu_box().but(packages=RUNTIME | {"onnxruntime": "1.18.1"}),
        *("packages", "problem", "too old: onnxruntime 1.18.1", "pip install --upgrade 'onnxruntime>=1.23'"),
    ),
    "an old processor": (
        cpu_box().but(files={"proc/cpuinfo": "model name : Intel(R) Atom(TM)\nflags : sse4_2\n"}),
        *("processor", "ok", "without AVX2", ""),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_found_with_the_command_that_mends_it(name: str, examine: Callable[..., Report]) -> None:
    board, topic, status, text, mend = BROKEN[name]
    finding = examine(board).findings[topic]
    assert (finding["status"], text in finding["text"], mend in (finding["mend"] or "")) == (status, True, True), finding


def test_each_fault_above_is_the_board_s_only_new_one(examine: Callable[..., Report]) -> None:
    """A fault that drags unrelated findings along would send people the wrong way."""
    usual = {"cma", "swap", "power mode", "tensorrt"}
    for name in ("a user without rights", "a binding of the next CUDA", "a weak supply", "throttling", "no bindings"):
        report = examine(BROKEN[name][0])
        assert set(report.bad) <= usual | {BROKEN[name][1]}, name


def test_in_a_container_that_hides_the_device_tree_the_chip_is_still_known(examine: Callable[..., Report]) -> None:
    files = {".dockerenv": "", "sys/devices/soc0/family": "Tegra\n", "sys/devices/soc0/soc_id": "35\n"}
    report = examine(orin_nano().but(without=["proc/device-tree", "etc/nv_tegra_release"], files=files))
    assert report.machine["jetson"]["chip"] == "tegra234" and "compute capability 8.7" in report.findings["board"]["text"]
    assert report.findings["container"]["status"] == "ok" and "not visible" in report.findings["jetpack"]["text"]


# A model -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_dir, tmp_path / "model")


def test_a_whole_model_on_a_cpu(examine: Callable[..., Report], model: Path) -> None:
    report = examine(cpu_box(), str(model))
    assert report.bad == {} and report.findings["model"]["text"].endswith("complete")
    assert report.findings["engines"]["text"] == "none, and a CPU needs none" and "disk (model)" in report.findings


@pytest.mark.parametrize(("file", "says"), [("decoder.onnx", "is missing"), ("fastvlm.json", "is not a model directory")])
def test_a_model_that_lacks_a_file(file: str, says: str, examine: Callable[..., Report], model: Path) -> None:
    (model / file).unlink()
    finding = examine(cpu_box(), str(model)).findings["model"]
    assert finding["status"] == "problem" and says in finding["text"] and finding["mend"]


def test_a_model_with_one_wrong_byte(examine: Callable[..., Report], model: Path) -> None:
    path = model / "tokenizer.json"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    report = examine(cpu_box(), str(model))
    assert report.exit_status == 1 and "sha256 differs" in report.findings["model"]["text"]


def test_a_model_that_this_user_may_not_read(examine: Callable[..., Report], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(model / "decoder.onnx"))

    monkeypatch.setattr("fastvlm_edge.doctor.check_model.verify_files", refuse)
    assert examine(cpu_box(), str(model)).bad == {"model": f"sudo chown -R $USER {model}"}


def test_reading_a_model_shows_progress_and_no_json_has_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model)], probe_of(cpu_box(), tmp_path / "root")) == 0
    out, err = capsys.readouterr()
    assert "reading every file of the model" in err and "reading" not in out


def test_a_model_larger_than_what_is_free(examine: Callable[..., Report], model: Path) -> None:
    report = examine(cpu_box().but(files={"proc/meminfo": "MemTotal: 32500000 kB\nMemAvailable: 10 kB\n"}), str(model))
    assert report.findings["model memory"]["status"] == "problem"


def test_a_gpu_without_engines(examine: Callable[..., Report], model: Path) -> None:
    assert examine(rtx_desktop(), str(model)).bad == {"engines": f"fastvlm-edge build {model}"}


def test_engines_that_fit_the_board(examine: Callable[..., Report], model: Path) -> None:
    build_engines(model)
    (record,) = (model / "engines").glob("*/build.json")
    document = json.loads(record.read_text())
    assert document["version"] == VERSION
    board = agx_orin().but(packages=agx_orin().packages | {"tensorrt": VERSION})
    topic = f"engines ({record.parent.name})"
    record.write_text(json.dumps(document | {"compute_capabilities": [[8, 7]]}))
    assert examine(board, str(model)).findings[topic]["status"] == "ok"

    nano = {"compute_capabilities": [[8, 7]], "board": "Orin Nano 8 GB", "multiprocessors": 8, "memory_bytes": 7 << 30}
    record.write_text(json.dumps(document | nano))
    report = examine(board, str(model))
    assert "built on Orin Nano 8 GB (8 multiprocessors, 7.0 GiB), but this is AGX Orin 64 GB (" in report.findings[topic]["text"]

    record.write_text(json.dumps(document | {"compute_capabilities": [[11, 0]]}))
    report = examine(board, str(model))
    assert "built for compute capability 11.0, but this board has 8.7" in report.findings[topic]["text"]
    assert report.bad[topic] == f"fastvlm-edge build {model} --force" and report.exit_status == 1

    record.write_text(json.dumps(document | {"compute_capabilities": [[8, 7]]}))
    assert "this machine has 10.16.0.40" in examine(agx_orin(), str(model)).findings[topic]["text"]
    assert "for another machine" in examine(cpu_box(), str(model)).findings[topic]["text"]

    next((model / "engines").glob("*/decoder.engine")).unlink()
    assert "decoder.engine is missing" in examine(board, str(model)).findings[topic]["text"]

    record.write_text("{")
    assert "is damaged" in examine(board, str(model)).findings[topic]["text"]


def test_engines_that_disagreed_with_their_reference_are_named(examine: Callable[..., Report], model: Path) -> None:
    build_engines(model, compute_capabilities=[[8, 7]])
    (record,) = (model / "engines").glob("*/build.json")
    faults = [{"part": "decoder", "text": "a row is wrong"}]
    record.write_text(json.dumps(json.loads(record.read_text()) | {"parity": {"device": "Orin", "faults": faults}}))
    board = agx_orin().but(packages=agx_orin().packages | {"tensorrt": VERSION})
    finding = examine(board, str(model)).findings["engines (sm87)"]
    assert finding["status"] == "warning" and "disagreed with their reference on Orin" in finding["text"]
    assert "a row is wrong" in finding["text"]


def test_where_only_the_library_tells_its_version_that_is_compared(examine: Callable[..., Report], model: Path) -> None:
    build_engines(model)
    (record,) = (model / "engines").glob("*/build.json")
    for version, status in (("10.13.3.9", "ok"), ("10.13.2.6", "warning")):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"compute_capabilities": [[11, 0]], "version": version}))
        report = examine(_without_tensorrt(thor(), environment="/home/user/.venv"), str(model))
        assert report.findings[f"engines ({record.parent.name})"]["status"] == status


# The report, the command, and where nothing is installed ---------------------------------------------------------------------------------


def test_text_has_a_line_a_finding_and_its_command_below(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], probe_of(orin_nano(), tmp_path)) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    at = next(index for index, line in enumerate(lines) if re.match("warning  power mode +15W; MAXN_SUPER is the fastest", line))
    assert lines[at + 1].strip() == "-> sudo nvpmodel -m 2"
    assert lines[-1] == "14 ok, 4 warnings, 0 problems"


def test_the_report_in_the_documentation_is_the_one_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([], probe_of(orin_nano(), tmp_path))
    assert f"<!-- orin nano -->\n```\n{capsys.readouterr().out}```\n" in (HERE / "docs/doctor.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", BOARDS)
def test_whether_there_is_a_gpu_is_told_without_importing_packages(make: Callable[[], Board], tmp_path: Path) -> None:
    probe = probe_of(make(), tmp_path)
    expected = read_facts(probe).has_gpu
    assert has_gpu(replace(probe, import_error=lambda name: pytest.fail(f"imports {name}"))) == expected == (make is not cpu_box)


@pytest.mark.parametrize("content", ["", "\0\0", "garbage: x\n= ,,,\n", "-1\n", "9" * 400, "# R (release), REVISION: .\n"])
@pytest.mark.parametrize("make", BOARDS)
def test_files_of_any_content_end_in_a_report(make: Callable[[], Board], content: str, examine: Callable[..., Report]) -> None:
    board = make()
    broken = dict.fromkeys(board.files, content)
    assert examine(board.but(files=broken, smi=(content, content))).findings


def test_a_machine_that_tells_nothing_ends_in_a_report(examine: Callable[..., Report]) -> None:
    report = examine(Board({}, "riscv64", "6.1", (3, 11, 0), 1))
    assert report.findings["heat"]["text"] == "no thermal zone can be read" and report.exit_status == 1


def bare_checkout(tmp_path: Path) -> Path:
    """The runtime alone, as in a clone that nobody installed."""
    shutil.copytree(HERE / "fastvlm_edge", tmp_path / "clone/fastvlm_edge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "pyproject.toml", tmp_path / "clone")
    return tmp_path / "clone"


def test_it_runs_from_a_bare_checkout_with_nothing_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-E", "-m", "fastvlm_edge", "doctor"]
    done = subprocess.run([*command, "--json"], cwd=bare_checkout(tmp_path), capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    assert done.returncode == 1 and done.stderr == "" and document["status"] == "problem"
    missing = next(finding for finding in document["findings"] if finding["topic"] == "packages")
    assert missing["text"].startswith("numpy, pillow, tokenizers, onnxruntime missing")
    assert missing["mend"] == f'pip install "{tmp_path / "clone"}"'


@pytest.mark.parametrize("version", ["3.8", "3.10", "3.12", "3.13"])
def test_it_runs_on_every_python_of_a_jetpack(version: str, tmp_path: Path, model: Path) -> None:
    """3.8 is JetPack 5's: there it says that the board has to be flashed anew."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    known = [shutil.which(f"python{version}"), *map(str, pyenv.glob(f"{version}.*/bin/python"))]
    works = [path for path in known if path and not subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode]
    if not works:
        pytest.skip(f"no Python {version} here")
    python = works[0]
    command = [python, "-S", "-E", "-m", "fastvlm_edge", "doctor", str(model), "--json"]
    done = subprocess.run(command, cwd=bare_checkout(tmp_path), capture_output=True, text=True, check=False)
    findings = {finding["topic"]: finding["status"] for finding in json.loads(done.stdout)["findings"]}
    assert findings["model"] == "ok"
    assert done.returncode == 1 and findings["python"] == ("problem" if version == "3.8" else "ok") and findings["packages"] == "problem"


def test_it_imports_nothing_but_the_standard_library(tmp_path: Path, model: Path) -> None:
    script = """
import sys
before = set(sys.modules)
from fastvlm_edge.cli import main
main(["doctor", sys.argv[1]])
from fastvlm_edge.machine.power import find_sensor
find_sensor()
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print("foreign:", sorted(new - sys.stdlib_module_names - {"fastvlm_edge"}))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", script, str(model)], cwd=bare_checkout(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "foreign: []", done.stderr
    assert re.search(r"^ok +model +.*complete", done.stdout, re.MULTILINE)


def test_this_very_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) in (0, 1)
    document = json.loads(capsys.readouterr().out)
    assert document["machine"]["python"]["version"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert next(finding for finding in document["findings"] if finding["topic"] == "packages")["status"] == "ok"


def test_a_program_that_fails_or_is_absent_tells_nothing() -> None:
    probe = Probe()
    assert probe.run(["no-such-program-here"]) is None and probe.run([sys.executable, "-c", "raise SystemExit(9)"]) is None
    assert probe.run([sys.executable, "-c", "print(5)"]) == "5\n"
    assert not probe.has_module("no.such.module") and probe.has_module("json")
    assert probe.free_bytes(Path("/no/such/folder/yet")) is not None


# What other files say too --------------------------------------------------------------------------------------------------------------


def test_versions_are_those_of_pyproject_and_of_the_runtime() -> None:
    pyproject = (HERE / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*)\]", pyproject, re.MULTILINE)
    assert needed
    assert dict(PACKAGES.values()) == dict(re.findall(r'"([\w-]+)>=([\d.]+)"', needed.group(1)))
    assert (tensorrt_library.OLDEST["tensorrt"], tensorrt_library.OLDEST["tensorrt_rtx"]) == (OLDEST_TENSORRT, OLDEST_RTX)


def test_the_table_of_jetpacks_is_in_order_and_agrees_with_the_targets() -> None:
    assert [row.l4t for row in JETPACKS] == sorted(row.l4t for row in JETPACKS)
    for l4t, name in {
        (36, 4, 0): "6.1",
        (36, 4, 3): "6.2",
        (36, 4, 4): "6.2.1",
        (36, 5, 0): "6.2.2",
        (38, 2, 2): "7.0",
        (39, 2, 1): "7.2.1",
    }.items():
        row = find_jetpack(l4t)
        assert row is not None and row.name == name
    assert find_jetpack((32, 7, 1)) is None and find_jetpack((41, 1)) is None
    assert [CHIPS[chip][1] for chip in SUPPORTED] == [TARGETS[name].compute_capabilities[0] for name in ("orin", "thor")]
    for row in JETPACKS:
        if row.tensorrt >= OLDEST_TENSORRT:
            named = " ".join(TARGETS[name].versions for name in ("orin", "thor"))
            assert ".".join(map(str, row.tensorrt)) in named


@pytest.mark.parametrize(
    ("version", "capability", "faults"),
    [
        ("10.3.0.30", (8, 7), 2),
        ("10.3.0", None, 2),
        ("10.4.0", (8, 7), 2),
        ("10.5.0", (8, 7), 1),
        ("10.7.0.23", (8, 7), 1),
        ("10.8.0", (8, 7), 0),
        ("10.13.3.9", (11, 0), 1),
        ("10.13.3.9", (8, 9), 0),
        ("10.15.1", (11, 0), 0),
        ("11.2.0.113", (8, 7), 1),
        ("11.4.1", (8, 7), 0),
        ("unknown", (8, 7), 0),
    ],
)
def test_faults_are_those_of_the_version_and_the_gpu(version: str, capability: tuple[int, int] | None, faults: int) -> None:
    found = find_faults("tensorrt", version, capability)
    assert len(found) == faults and find_faults("tensorrt_rtx", version, capability) == []
    assert all("#" in fault.sources and fault.mend for fault in found)


def test_tensorrt_10_7_is_not_given_a_clean_bill(examine: Callable[..., Report]) -> None:
    report = examine(orin_nano().but(packages=RUNTIME | {"tensorrt": "10.7.0"}))
    assert report.bad["tensorrt"] == "fastvlm-edge build MODEL --static (--profiles 1 may be enough)"
    assert "with several profiles (NVIDIA/TensorRT#4250)" in report.findings["tensorrt"]["text"]


def test_facts_are_read_quickly(tmp_path: Path) -> None:
    import time

    probe = probe_of(agx_orin(), tmp_path)
    began = time.thread_time()
    read_facts(probe)
    assert time.thread_time() - began < 0.5
