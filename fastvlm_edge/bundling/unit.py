"""The systemd units of a bundle: one prepares it at every boot, so that the first question is answered quickly, and one serves it."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

from fastvlm_edge.bundling.start import SYSTEM
from fastvlm_edge.errors import FastVLMError

_FOLDER = Path("etc/systemd/system")
_UNIT = """[Unit]
Description=fastvlm-edge: unpack and check {name}, build its missing engines
After=local-fs.target
RequiresMountsFor={mounts}

[Service]
Type=oneshot
RemainAfterExit=yes
StateDirectory=fastvlm-edge
Environment=FASTVLM_EDGE_STATE={state} FASTVLM_EDGE_CACHE={state}/cache
ExecStart=/bin/sh {program} prepare
TimeoutStartSec=infinity

[Install]
WantedBy=multi-user.target
"""

SETTINGS = Path("/etc/fastvlm-edge.env")
"""Environment variables of `fastvlm-edge serve`, read by systemd as root, so that other users cannot read the API key."""
CACHE = "fastvlm-serve"
"""Directory in /var/cache that the server may write to, for its certificate."""
DRAIN = 30
"""Seconds that `serve` lets requests end in, unless FASTVLM_EDGE_DRAIN says otherwise."""
_CLOSING = 30
"""Seconds to close the model after that. What still runs then is killed."""
_GROUPS = ("video", "render")
"""Groups that may open GPUs and cameras."""

# PrivateDevices, DeviceAllow and ProtectClock, which implies DeviceAllow, would hide the GPU: the devices of a Jetson have no fixed names.
# The groups decide instead. MemoryDenyWriteExecute would forbid the compilers in CUDA and TensorRT.
_SERVE_UNIT = """[Unit]
Description=fastvlm-edge: answer questions over HTTP with {name}
Requires={prepare}
After={prepare} network.target
RequiresMountsFor={mounts}

[Service]
Type=exec
Environment=FASTVLM_EDGE_STATE={state} FASTVLM_EDGE_CACHE=%C/{cache}
EnvironmentFile=-{settings}
ExecStart=/bin/sh {program} serve
Restart=on-failure
RestartSec=5
TimeoutStopSec={stop}

DynamicUser=yes
SupplementaryGroups={groups}
CacheDirectory={cache}
CacheDirectoryMode=0700
UMask=0077

MemoryMax=80%
TasksMax=512

NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def unit_name(bundle: Path) -> str:
    """Name of the systemd unit that prepares a bundle, from the name of the file."""
    return f"fastvlm-edge-{_word(bundle)}.service"


def serve_unit_name(bundle: Path) -> str:
    """Name of the systemd unit that serves a bundle."""
    return f"fastvlm-serve-{_word(bundle)}.service"


def _word(bundle: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", bundle.name)


def install(bundle: Path, root: Path | None, *, serve: bool = False) -> str:
    """Write the unit that prepares the bundle, with `serve` also the one that serves it, enable them and start them.

    With `root`, the file system of another machine, they are only written and enabled. Returns a sentence that says what was done. Raises
    FastVLMError if this user may not do it, if there is no systemd, or if the user of the server could not read the bundle.
    """
    mounts, program = _quote(str(bundle.parent)), _quote(str(bundle), command=True)
    common = {"name": _escape(bundle.name), "mounts": mounts, "program": program, "state": SYSTEM}
    units = {unit_name(bundle): _UNIT.format(**common)}
    if serve:
        _check_readable(bundle)
        groups = " ".join(name for name in _GROUPS if name in _groups_of(root or Path("/")))
        stop = _drain_in(root or Path("/")) + _CLOSING
        own = {"prepare": unit_name(bundle), "settings": SETTINGS, "groups": groups, "cache": CACHE, "stop": stop}
        units[serve_unit_name(bundle)] = _SERVE_UNIT.format(**common, **own)
    folder = (root or Path("/")) / _FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in units.items():
            partial = folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)
            if root is not None:
                wants = folder / "multi-user.target.wants" / name
                wants.parent.mkdir(exist_ok=True)
                wants.unlink(missing_ok=True)
                wants.symlink_to(Path("/") / _FOLDER / name)
    except PermissionError:
        raise FastVLMError(f"only root can write to {folder}", f"run: sudo {bundle} install{' --serve' if serve else ''}") from None
    written = " and ".join(str(folder / name) for name in units)
    if root is not None:
        return f"{written}: written and enabled; {bundle} must be at the same path there"
    _systemctl("daemon-reload")
    last = list(units)[-1]
    for name in units:
        _systemctl("enable", name)
    _systemctl("restart" if serve else "start", "--no-block", last)
    where = f" Then it serves on http://127.0.0.1:8000; {SETTINGS} changes that." if serve else ""
    return f"{written}: enabled and started; building engines takes minutes.{where} To watch it, run: journalctl -fu {last}"


def uninstall(bundle: Path, root: Path | None) -> str:
    """Undo `install`; unpacked files stay. Raises FastVLMError if there is no such unit, or if this user may not do it."""
    folder = (root or Path("/")) / _FOLDER
    path = folder / unit_name(bundle)
    if not path.exists():
        raise FastVLMError(f"{path} does not exist: this bundle is not installed under this name", f"run: sudo {bundle} install")
    if not os.access(folder, os.W_OK):
        raise FastVLMError(f"only root can write to {folder}", f"run: sudo {bundle} uninstall")
    units = [each for each in (folder / serve_unit_name(bundle), path) if each.exists()]
    for each in units:
        if root is None:
            _systemctl("disable", "--now", each.name)
        (folder / "multi-user.target.wants" / each.name).unlink(missing_ok=True)
        each.unlink()
    if root is None:
        _systemctl("daemon-reload")
    removed = " and ".join(map(str, units))
    return f"{removed}: removed; the unpacked files and engines are still in {SYSTEM}, remove them by hand"


def _check_readable(bundle: Path) -> None:
    """The server runs as a user of its own, which must reach the file."""
    closed = [path for path in bundle.parents if not path.stat().st_mode & stat.S_IXOTH]
    if not bundle.stat().st_mode & stat.S_IROTH:
        closed.insert(0, bundle)
    if closed:
        place = Path("/usr/local/bin") / bundle.name
        what = f"{closed[0]} is closed to other users, and the server runs as a user of its own"
        raise FastVLMError(what, f"run: sudo install {bundle} {place} && sudo {place} install --serve")


def _drain_in(root: Path) -> int:
    """Seconds of FASTVLM_EDGE_DRAIN in SETTINGS of a machine, where the last line counts, as in systemd.exec(5)."""
    try:
        text = (root / SETTINGS.relative_to("/")).read_text("utf-8", "replace")
    except OSError:
        return DRAIN
    found = re.findall(r"""^\s*FASTVLM_EDGE_DRAIN\s*=\s*["']?(\d+)["']?\s*$""", text, re.MULTILINE)
    return int(found[-1]) if found else DRAIN


def _groups_of(root: Path) -> set[str]:
    """Names of the groups of a machine: systemd refuses to start a unit that names another one."""
    try:
        lines = (root / "etc" / "group").read_text("utf-8", "replace").splitlines()
    except OSError:
        return set()
    return {line.partition(":")[0] for line in lines}


def _systemctl(*words: str) -> None:
    if shutil.which("systemctl") is None:
        raise FastVLMError("systemctl was not found: this machine does not run systemd", "run `prepare` at boot in another way")
    run = subprocess.run(["systemctl", *words], capture_output=True, text=True)
    if run.returncode != 0:
        raise FastVLMError(
            f"systemctl {' '.join(words)} failed: {' '.join(run.stderr.split())}",
            "check that systemd runs here: systemctl is-system-running",
        )


def _escape(text: str) -> str:
    """Escape %, which begins a specifier in systemd.unit(5)."""
    return text.replace("%", "%%")


def _quote(text: str, *, command: bool = False) -> str:
    """Quote a word as in systemd.syntax(7). In a command line (systemd.service(5)), $ begins a variable and is doubled."""
    quoted = _escape(text).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + (quoted.replace("$", "$$") if command else quoted) + '"'
