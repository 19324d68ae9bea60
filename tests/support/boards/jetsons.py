"""Jetson boards.

Sources:
- power monitors, thermal zones, cooling devices, soctherm's over-current counters, nvpmodel, devfreq: Jetson Linux Developer Guide r36.4.3
  ("Jetson Orin Nano Series, Jetson Orin NX Series and Jetson AGX Orin Series") and r38.4 ("Jetson Thor Product Family"), chapter
  Platform Power and Performance; labels of the rails: Linux, arch/arm64/boot/dts/nvidia/tegra234-p3701.dtsi and -p3767.dtsi
- names of sysfs files of an INA3221 and an INA238: Linux, Documentation/hwmon/ina3221.rst and ina238.rst
- /etc/nv_tegra_release, device tree `model` and `compatible`: as users print them on forums.developer.nvidia.com, and the device trees of
  OE4T/meta-tegra
- CMA of 256 MiB on Orin Nano: github.com/hokwangchoi/jetson-orin-nano-benchmarks; zram of half the memory: nvzramconfig of Jetson Linux
- TensorRT's and CUDA's files: the Debian packages of JetPack (libnvinfer10, python3-libnvinfer, cuda-toolkit)
"""

from __future__ import annotations

from tests.support.boards import RUNTIME, Board

_LIB = "usr/lib/aarch64-linux-gnu"
_ARM_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


def orin_nano() -> Board:
    """Jetson Orin Nano Super developer kit, JetPack 6.2, freshly flashed: 15 W, 256 MiB of CMA, only zram as swap."""
    release = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
    zram = "".join(f"/dev/zram{index}                              partition\t635128\t\t0\t\t5\n" for index in range(6))
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
        "etc/nv_tegra_release": release + "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
        "etc/os-release": 'PRETTY_NAME="Ubuntu 22.04.5 LTS"\nNAME="Ubuntu"\nVERSION_ID="22.04"\n',
        "etc/nvpmodel.conf": _nvpmodel("15W", "25W", "MAXN_SUPER", "7W"),
        "var/lib/nvpmodel/status": "pmode:0000\n",
        "boot/extlinux/extlinux.conf": "LABEL primary\n      APPEND ${cbootargs} root=/dev/nvme0n1p1 rw rootwait\n",
        "proc/meminfo": _meminfo(7_802_000, 5_100_000, swap=3_810_768, cma=262_144, cma_free=240_640),
        "proc/cmdline": "root=PARTUUID=0 rw rootwait rootfstype=ext4 mminit_loglevel=4 console=ttyTCU0,115200\n",
        "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n" + zram,
        "proc/cpuinfo": _cpuinfo(6, _ARM_FEATURES),
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "schedutil\n",
        **_devfreq("17000000.gpu", 306_000_000, 306_000_000, 624_750_000, "nvhost_podgov"),
        **_ina3221("hwmon1", {"VDD_IN": (5016, 2400), "VDD_CPU_GPU_CV": (5016, 640), "VDD_SOC": (5008, 480)}),
        **_soctherm("hwmon2", 0, 0, 0),
        **_thermal({"cpu-thermal": 51_000, "gpu-thermal": 49_500, "cv0-thermal": None, "soc0-thermal": 50_100, "tj-thermal": 52_300}),
        **_coolers({"pwm-fan": 1, "cpu-throttle-alert": 0, "gpu-throttle-alert": 0, "hot-surface-alert": 0, "devfreq-17000000.gpu": 9}),
        **_jetpack("10.3.0", "12.6.68", "3.10"),
        "dev/nvmap": "",
        "dev/nvhost-ctrl-gpu": "",
        "dev/nvgpu/igpu0/ctrl": "",
    }
    packages = RUNTIME | {"tensorrt": "10.3.0", "cuda-bindings": "12.9.4"}
    return Board(files, "aarch64", "5.15.148-tegra", (3, 10, 12), 6, packages)


def agx_orin() -> Board:
    """Jetson AGX Orin 64 GB developer kit, JetPack 7.2, at MAXN with clocks held by jetson_clocks."""
    release = "# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64, DATE: Mon Jun  1 09:28:48 PM UTC 2026\n"
    files = {
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
        "etc/nv_tegra_release": release + "# KERNEL_VARIANT: oot\n",
        "etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.4 LTS"\nNAME="Ubuntu"\nVERSION_ID="24.04"\n',
        "etc/nvpmodel.conf": _nvpmodel("MAXN", "15W", "30W", "50W"),
        "var/lib/nvpmodel/status": "pmode:0000\n",
        "proc/meminfo": _meminfo(64_350_000, 58_000_000, swap=0, cma=262_144, cma_free=200_000),
        "proc/cmdline": "root=PARTUUID=0 rw rootwait\n",
        "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
        "proc/cpuinfo": _cpuinfo(12, _ARM_FEATURES),
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
        **_devfreq("17000000.gpu", 1_300_500_000, 1_300_500_000, 1_300_500_000, "nvhost_podgov"),
        "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
        "sys/kernel/debug/bpmp/debug/clk/emc/min_rate": "204000000\n",
        "sys/kernel/debug/bpmp/debug/clk/emc/max_rate": "3199000000\n",
        **_ina3221("hwmon3", {"VDD_GPU_SOC": (20_000, 250), "VDD_CPU_CV": (20_000, 60), "VIN_SYS_5V0": (5000, 840)}),
        **_ina3221("hwmon4", {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5000, 220)}),
        **_soctherm("hwmon5", 0, 15, 37),
        **_thermal({"cpu-thermal": 47_000, "gpu-thermal": 45_000, "tboard-thermal": 36_000, "tj-thermal": 47_200}),
        **_coolers({"pwm-fan": 2, "cpu-throttle-alert": 0, "gpu-throttle-alert": 0}),
        **_jetpack("10.16.0", "13.2.0", "3.12"),
        "dev/nvmap": "",
        "dev/nvhost-ctrl-gpu": "",
    }
    packages = RUNTIME | {"tensorrt": "10.16.0.40", "cuda-bindings": "13.2.0"}
    return Board(files, "aarch64", "6.8.12-1021-tegra", (3, 12, 3), 12, packages)


def thor() -> Board:
    """Jetson AGX Thor developer kit, JetPack 7.1, 120 W. When idle, the rail of the GPU reads slightly below 0, and its zone is off."""
    release = "# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic, EABI: aarch64, DATE: Wed Dec 31 23:24:25 UTC 2025\n"
    files = {
        "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
        "etc/nv_tegra_release": release + "# KERNEL_VARIANT: oot\nINSTALL_TYPE=\n",
        "etc/os-release": 'PRETTY_NAME="Ubuntu 24.04.3 LTS"\nNAME="Ubuntu"\nVERSION_ID="24.04"\n',
        "etc/nvpmodel.conf": _nvpmodel("MAXN", "120W", "90W", "70W"),
        "var/lib/nvpmodel/status": "pmode:0001\n",
        "proc/meminfo": _meminfo(128_790_092, 104_857_600, swap=0),
        "proc/cmdline": "root=PARTUUID=0 rw rootwait\n",
        "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
        "proc/cpuinfo": _cpuinfo(14, f"{_ARM_FEATURES} sve i8mm bf16"),
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
        **_devfreq("gpu-gpc-0", 315_000_000, 315_000_000, 1_575_000_000, "nvhost_podgov"),
        **_devfreq("gpu-nvd-0", 315_000_000, 315_000_000, 1_692_000_000, "nvhost_podgov"),
        **_devfreq("bwmgr", 665_600_000, 665_600_000, 4_266_000_000, "bwmgr"),
        **_ina3221("hwmon2", {"VDD_GPU": (9800, -40), "VDD_CPU_SOC_MSS": (10_000, 650), "VIN_SYS_5V0": (5000, 1300)}),
        "sys/class/hwmon/hwmon3/name": "ina238\n",
        "sys/class/hwmon/hwmon3/in1_input": "19500\n",
        "sys/class/hwmon/hwmon3/curr1_input": "1200\n",
        "sys/class/hwmon/hwmon3/power1_input": "23400000\n",
        **_soctherm("hwmon4", 0, 0, 0),
        **_thermal({"cpu-thermal": 53_700, "gpu-thermal": None, "soc012-thermal": 55_100, "tj-thermal": 55_100}),
        **_coolers({"cpufreq-cpu0": 0, "pwm-fan": 0, "gpu-throttle-alert": 0, "soc012-throttle-alert": 0, "devfreq-gpu-gpc-0": 18}),
        **_jetpack("10.13.3", "13.0.2", "3.12"),
        "dev/nvidia0": "",
        "dev/nvidiactl": "",
        "dev/nvmap": "",
    }
    packages = RUNTIME | {"tensorrt": "10.13.3.9", "cuda-bindings": "13.0.3"}
    return Board(files, "aarch64", "6.8.12-tegra", (3, 12, 3), 14, packages)


def _nvpmodel(*names: str) -> str:
    models = "".join(f"< POWER_MODEL ID={index} NAME={name} >\nCPU_ONLINE CORE_0 1\n\n" for index, name in enumerate(names))
    return f"< PARAM TYPE=FILE NAME=CPU_ONLINE >\n{models}< PM_CONFIG DEFAULT=0 >\n"


def _meminfo(total: int, available: int, *, swap: int, cma: int | None = None, cma_free: int = 0) -> str:
    """/proc/meminfo, with all sizes in KiB."""
    lines = {"MemTotal": total, "MemFree": available // 2, "MemAvailable": available, "SwapTotal": swap, "SwapFree": swap}
    if cma is not None:
        lines |= {"CmaTotal": cma, "CmaFree": cma_free}
    return "".join(f"{name + ':':15} {kib:8} kB\n" for name, kib in lines.items())


def _cpuinfo(cores: int, features: str) -> str:
    return "".join(f"processor\t: {core}\nBogoMIPS\t: 62.50\nFeatures\t: {features}\nCPU part\t: 0xd42\n\n" for core in range(cores))


def _devfreq(name: str, now: int, least: int, most: int, governor: str) -> dict[str, str]:
    values = {"cur_freq": now, "min_freq": least, "max_freq": most, "governor": governor}
    return {f"sys/class/devfreq/{name}/{key}": f"{value}\n" for key, value in values.items()}


def _ina3221(folder: str, rails: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Files of power monitors; `rails` are label -> millivolts and milliamperes."""
    files = {"name": "ina3221\n", "in7_label": "sum of shunt voltages\n", "in7_input": "760\n"}
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        files |= {
            f"in{channel}_label": f"{label}\n",
            f"in{channel}_input": f"{millivolts}\n",
            f"curr{channel}_input": f"{milliamperes}\n",
        }
    return {f"sys/class/hwmon/{folder}/{name}": text for name, text in files.items()}


def _soctherm(folder: str, *counts: int) -> dict[str, str]:
    events = {f"oc{index}_event_cnt": f"{count}\n" for index, count in enumerate(counts, 1)}
    return {f"sys/class/hwmon/{folder}/{name}": text for name, text in ({"name": "soctherm_oc\n"} | events).items()}


def _thermal(zones: dict[str, int | None]) -> dict[str, str]:
    """`zones` are name -> millidegrees; None is a zone that cannot be read, like that of a part that is switched off."""
    files = {}
    for index, (name, millidegrees) in enumerate(zones.items()):
        files[f"sys/class/thermal/thermal_zone{index}/type"] = f"{name}\n"
        files[f"sys/class/thermal/thermal_zone{index}/temp"] = "" if millidegrees is None else f"{millidegrees}\n"
    return files


def _coolers(states: dict[str, int]) -> dict[str, str]:
    files = {}
    for index, (name, state) in enumerate(states.items()):
        files[f"sys/class/thermal/cooling_device{index}/type"] = f"{name}\n"
        files[f"sys/class/thermal/cooling_device{index}/cur_state"] = f"{state}\n"
    return files


def _jetpack(tensorrt: str, cuda: str, python: str) -> dict[str, str]:
    return {
        f"{_LIB}/libnvinfer.so.{tensorrt}": "",
        f"{_LIB}/libnvinfer.so.{tensorrt.partition('.')[0]}": "",
        f"{_LIB}/nvidia/libcuda.so.1": "",
        f"{_LIB}/nvidia/libnvdla_compiler.so": "",
        f"usr/lib/python{python}/dist-packages/tensorrt/__init__.py": "",
        "usr/local/cuda/version.json": f'{{"cuda": {{"name": "CUDA SDK", "version": "{cuda}"}}}}\n',
    }
