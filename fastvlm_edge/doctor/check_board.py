"""Findings on a board or computer: its system, processor, memory, power, heat and disk."""

from __future__ import annotations

from fastvlm_edge.doctor.facts import Facts
from fastvlm_edge.doctor.findings import Finding, ok, problem, warning
from fastvlm_edge.machine.boards.chips import CHIPS, SUPPORTED
from fastvlm_edge.machine.host import Jetson

GIB = 1 << 30
OLDEST_TENSORRT = (10, 3)
"""As in tensorrt_library.OLDEST, which needs packages to be imported; a test compares the two."""
LOW_MEMORY = 2 * GIB
"""With less free memory, the smallest model (0.4 GiB of weights in INT4) has little room beside its runtime."""
SMALL_BOARD = 12 * GIB
"""On smaller boards, those of up to 8 GB, contiguous memory and swap decide whether a build succeeds."""
SMALL_CMA = 300 << 20
"""Just above the 256 MiB that Jetson Linux reserves on an Orin Nano. The builder needs large contiguous blocks, and 950 MiB is the
practical maximum (github.com/hokwangchoi/jetson-orin-nano-benchmarks, notes on CMA)."""
HOT = 85.0
"""Degrees Celsius: about 10 below the temperature at which Orin begins to throttle (Jetson Linux Developer Guide, "Thermal Management")."""
FLASH = "sdkmanager (on another computer, the board in recovery mode): JetPack 6.2 or newer"
FULL_DISK, LOW_DISK = 1 * GIB, 5 * GIB


def check_board(facts: Facts) -> list[Finding]:
    """Findings on everything but software and models."""
    findings = [_board(facts), _system(facts)]
    if facts.jetson is not None:
        findings.append(_jetson_linux(facts.jetson))
    findings += [_processor(facts), _memory(facts), *_cma(facts), _swap(facts)]
    if facts.power_mode is not None or facts.jetson is not None:
        findings.append(_power_mode(facts))
    return [*findings, *_clocks(facts), *_heat(facts), *_disk(facts)]


def gib(nbytes: int) -> str:
    """A size in GiB or MiB, for people."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes >> 20} MiB"


def _board(facts: Facts) -> Finding:
    board = facts.jetson
    if board is None:
        return ok("board", f"not a Jetson: a computer with {facts.system.architecture}")
    title = f"{board.model}{f', {board.module}' if board.module else ''}"
    if board.chip not in SUPPORTED:
        name = CHIPS[board.chip][0] if board.chip in CHIPS else "unknown"
        return problem(
            "board",
            f"{title}: there is no JetPack with TensorRT {_dotted(OLDEST_TENSORRT)} or newer for its chip ({name})",
            "fastvlm-edge run MODEL --backend ort ... (on the CPU)",
        )
    name, capability = CHIPS[board.chip]
    return ok("board", f"{title} ({name}, compute capability {_dotted(capability)})")


def _system(facts: Facts) -> Finding:
    system = facts.system
    within = " in a container" if system.container else " under WSL" if system.wsl else ""
    return ok("system", f"{system.name}, kernel {system.kernel}, {system.architecture}{within}")


def _jetson_linux(board: Jetson) -> Finding:
    if board.l4t is None:
        return ok("jetpack", "Jetson Linux of the host is unknown: /etc/nv_tegra_release is not visible in this container")
    release = f"Jetson Linux {_dotted(board.l4t)}"
    row = board.jetpack
    if row is None and board.l4t[0] > 35:
        return ok("jetpack", f"{release}, which is newer than this version of fastvlm-edge; see the version of TensorRT below")
    brings = f"JetPack {row.name} with TensorRT {_dotted(row.tensorrt)} and CUDA {_dotted(row.cuda)}" if row else "a JetPack before 5"
    if row is not None and row.tensorrt >= OLDEST_TENSORRT:
        return ok("jetpack", f"{release}, {brings}")
    text = f"{release} is {brings}; engines need TensorRT {_dotted(OLDEST_TENSORRT)}, which comes with JetPack 6.1 or newer"
    if row is not None and row.name == "6.0":
        source = "/etc/apt/sources.list.d/nvidia-l4t-apt-source.list"
        return problem("jetpack", text, rf"sudo sed -i 's/r36\.[23]/r36.4/' {source} && sudo apt update && sudo apt dist-upgrade")
    return problem("jetpack", text, FLASH)


def _processor(facts: Facts) -> Finding:
    flags, arm = facts.processor.flags, facts.system.architecture in ("aarch64", "arm64")
    fast = [flag for flag in ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp") if flag in flags]
    said = f"{facts.processor.name}, {facts.processor.cores} cores"
    if fast:
        return ok("processor", f"{said}, with INT8 instructions ({', '.join(fast)})")
    wanted = "dot products (asimddp)" if arm else "VNNI" if "avx2" in flags else "AVX2"
    return ok("processor", f"{said}, without {wanted}: INT8 and INT4 models are slower on this CPU")


def _memory(facts: Facts) -> Finding:
    memory = facts.memory
    text = f"{gib(memory.available)} of {gib(memory.total)} free"
    if memory.available >= LOW_MEMORY:
        return ok("memory", text)
    shrink = "sudo systemctl isolate multi-user.target (stops the desktop)"
    if memory.total and memory.total <= SMALL_BOARD:
        shrink += "; against NvMap error 12, fragmented memory: echo 3 | sudo tee /proc/sys/vm/drop_caches, or sudo reboot"
    mend = shrink if facts.jetson else "ps aux --sort=-rss | head (shows what uses it)"
    return warning("memory", f"{text}; loading or building a model may fail", mend)


def _cma(facts: Facts) -> list[Finding]:
    memory = facts.memory
    if facts.jetson is None:
        return []
    if memory.cma_total is None:
        return [ok("cma", "this kernel does not reserve contiguous memory")]
    given = f", from cma={memory.cma_argument}" if memory.cma_argument else ""
    text = f"{gib(memory.cma_total)} of contiguous memory, {gib(memory.cma_free or 0)} free{given}"
    if memory.cma_total > SMALL_CMA or memory.total > SMALL_BOARD:
        return [ok("cma", text)]
    size = "950M" if memory.total > 6 * GIB else "512M"
    if facts.boot == "grub":
        change = rf"""sudo sed -i 's/cma=[^ "]*//; s/^GRUB_CMDLINE_LINUX="/&cma={size} /' /etc/default/grub && sudo update-grub"""
    else:
        change = rf"sudo sed -i 's/ cma=[^ ]*//; /^ *APPEND/ s/$/ cma={size}/' /boot/extlinux/extlinux.conf"
    return [warning("cma", f"{text}; building large engines fails with so little", f"{change} && sudo reboot")]


def _swap(facts: Facts) -> Finding:
    memory = facts.memory
    disk = memory.swap_total - memory.swap_zram
    text = gib(memory.swap_total) if memory.swap_total else "none"
    if memory.swap_zram:
        text += ", all of it compressed memory" if disk == 0 else f", {gib(memory.swap_zram)} of it compressed memory"
    if facts.jetson is None or disk >= 2 * GIB or memory.total > SMALL_BOARD:
        return ok("swap", text)
    make = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
    return warning("swap", f"{text}; a build is killed if it needs more than {gib(memory.total)} at any moment", make)


def _power_mode(facts: Facts) -> Finding:
    mode = facts.power_mode
    if mode is None or mode.current is None:
        return ok("power mode", "not visible here", "sudo nvpmodel -q")
    name, fastest = mode.name or f"mode {mode.current}", mode.fastest
    if fastest is None or fastest == mode.current:
        return ok("power mode", f"{name}, the fastest of {', '.join(mode.modes.values())}")
    return warning("power mode", f"{name}; {mode.modes[fastest]} is the fastest", f"sudo nvpmodel -m {fastest}")


def _clocks(facts: Facts) -> list[Finding]:
    """Variable clocks are right for use and wrong for measurements, so they are not a warning."""
    findings = []
    for name, clock in facts.clocks.items():
        span = f", {clock.least:.0f} to {clock.most:.0f}" if clock.least is not None and clock.most is not None else ""
        how = "fixed" if clock.pinned else f"set by {clock.governor}" if clock.governor else "variable"
        mend = None if clock.pinned else "sudo jetson_clocks (before measurements)"
        findings.append(ok(f"{name} clock", f"{clock.now:.0f} MHz{span}, {how}", mend))
    governors = facts.processor.governors
    if "powersave" in governors and facts.jetson is not None:
        mend = "echo schedutil | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
        findings.append(warning("cpu clock", "governor powersave: the clock always stays at its lowest", mend))
    elif governors:
        findings.append(ok("cpu clock", f"governor {', '.join(governors)}"))
    return findings


def _heat(facts: Facts) -> list[Finding]:
    heat, zone = facts.heat, facts.heat.hottest
    fan = "sudo jetson_clocks --fan" if facts.jetson else "clean the fans and vents, then run: fastvlm-edge doctor"
    findings = []
    if zone is None:
        findings.append(ok("heat", "no thermal zone can be read"))
    elif heat.alerts:
        findings.append(warning("heat", f"throttling now ({', '.join(heat.alerts)}); {zone} at {heat.zones[zone]:.0f} °C", fan))
    elif heat.zones[zone] >= HOT:
        findings.append(warning("heat", f"{zone} at {heat.zones[zone]:.0f} °C, near throttling", fan))
    else:
        findings.append(ok("heat", f"{zone} at {heat.zones[zone]:.0f} °C, not throttling"))
    events = {name: count for name, count in heat.over_current.items() if count}
    if events.get("oc1"):  # on Orin: the supply voltage was too low
        text = f"{events['oc1']} under-voltage events since the board started: power supply or cable is too weak for this power mode"
        modes = facts.power_mode.modes if facts.power_mode else {}
        lower = next((number for number, name in modes.items() if "MAXN" not in name), 0)
        findings.append(warning("supply", text, f"sudo nvpmodel -m {lower} (or a stronger power supply)"))
    elif events:
        counted = ", ".join(f"{name} {count}" for name, count in events.items())
        findings.append(ok("supply", f"over-current events since the board started: {counted}; each lowered the clocks for a moment"))
    return findings


def _disk(facts: Facts) -> list[Finding]:
    findings = []
    for place, free in facts.free_bytes.items():
        topic = f"disk ({place})"
        if free is None:
            findings.append(ok(topic, "free space unknown"))
        elif free < LOW_DISK:
            kind = problem if free < FULL_DISK else warning
            larger = "sudo apt clean; or set FASTVLM_EDGE_CACHE=/a/larger/disk"
            mend = larger if place == "cache" else "move the model directory to a larger disk"
            findings.append(kind(topic, f"{gib(free)} free; an engine is as large as its weights, and is stored beside them", mend))
        else:
            findings.append(ok(topic, f"{gib(free)} free"))
    return findings


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
