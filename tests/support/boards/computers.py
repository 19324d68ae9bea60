"""Computers that are not Jetsons.

Sources: nvidia-smi's query fields and heading and /proc/driver/nvidia/version as in NVIDIA's driver README (chapters on /proc and
nvidia-smi); PCI classes and vendor ids from the PCI ID repository; /proc/meminfo and /proc/cpuinfo from Linux, Documentation/filesystems
/proc.rst; WSL's /dev/dxg and /usr/lib/wsl/lib from NVIDIA's "CUDA on WSL User Guide".
"""

from __future__ import annotations

from tests.support.boards import RUNTIME, Board

_LIB = "usr/lib/x86_64-linux-gnu"
_FLAGS = "fpu vme sse sse2 ssse3 fma sse4_1 sse4_2 avx f16c avx2 bmi2"
_HEADING = (
    "+-----------------------------------------------------------------------------------------+\n"
    "| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |\n"
)


def rtx_desktop() -> Board:
    """A desktop with a GeForce RTX 4070, driver 580, and everything installed for it."""
    files = {
        **_computer("Ubuntu 24.04.3 LTS", "AMD Ryzen 7 7700X 8-Core Processor", f"{_FLAGS} avx512f avx512_vnni"),
        "proc/driver/nvidia/version": (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\nGCC version:  gcc version 13.3.0\n"
        ),
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.0/device": "0x2786\n",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
        "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.1/device": "0x22bc\n",
        "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",  # its sound device
        f"{_LIB}/libcuda.so.1": "",
        f"{_LIB}/libcuda.so.580.95.05": "",
        "dev/nvidia0": "",
        "dev/nvidiactl": "",
        "dev/nvidia-uvm": "",
    }
    packages = RUNTIME | {"tensorrt_rtx": "1.3.0.35", "cuda-bindings": "13.0.3"}
    listing = "NVIDIA GeForce RTX 4070, 580.95.05, 8.9, 12282, 11480, 41\n"
    return Board(files, "x86_64", "6.14.0-33-generic", (3, 12, 3), 16, packages, (_HEADING, listing), environment="/home/user/.venv")


def cpu_box() -> Board:
    """A small server without any GPU."""
    files = _computer("Debian GNU/Linux 12 (bookworm)", "Intel(R) Xeon(R) Gold 6430", f"{_FLAGS} avx512f avx512_vnni amx_bf16 amx_int8")
    return Board(files, "x86_64", "6.1.0-40-amd64", (3, 11, 2), 8, RUNTIME)


def _computer(system: str, processor: str, flags: str) -> dict[str, str]:
    return {
        "etc/os-release": f'PRETTY_NAME="{system}"\n',
        "proc/meminfo": "MemTotal: 32500000 kB\nMemFree: 20000000 kB\nMemAvailable: 26000000 kB\nSwapTotal: 8388604 kB\n",
        "proc/cmdline": "BOOT_IMAGE=/boot/vmlinuz root=UUID=0 ro quiet splash\n",
        "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/swap.img                               file\t\t8388604\t\t0\t\t-2\n",
        "proc/cpuinfo": f"processor\t: 0\nmodel name\t: {processor}\nflags\t\t: {flags}\n",
        "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
        "sys/class/thermal/thermal_zone0/temp": "44000\n",
        "etc/default/grub": 'GRUB_CMDLINE_LINUX=""\n',
    }
