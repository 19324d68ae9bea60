"""A systemd unit that prepares a bundle at every boot, so that the first question is answered quickly. It is not a server."""

from __future__ import annotations

import os
import re
import shutil
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


def unit_name(bundle: Path) -> str:
    """Name of the systemd unit of a bundle, from the name of the file."""
    return f"fastvlm-edge-{re.sub(r'[^A-Za-z0-9_.-]', '-', bundle.name)}.service"


def install(bundle: Path, root: Path | None) -> str:
    """Write the unit, enable it and start it. With `root`, the file system of another machine, it is only written and enabled.

    Returns a sentence that says what was done. Raises FastVLMError if this user may not do it, or if there is no systemd.
    """
    path = (root or Path("/")) / _FOLDER / unit_name(bundle)
    wants = path.parent / "multi-user.target.wants" / path.name
    text = _UNIT.format(
        name=_escape(bundle.name), mounts=_quote(str(bundle.parent)), program=_quote(str(bundle), command=True), state=SYSTEM
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        if root is not None:
            wants.parent.mkdir(exist_ok=True)
            wants.unlink(missing_ok=True)
            wants.symlink_to(Path("/") / _FOLDER / path.name)
            return f"{path}: written and enabled; {bundle} must be at the same path there"
    except PermissionError:
        raise FastVLMError(f"only root can write to {path.parent}", f"run: sudo {bundle} install") from None
    _systemctl("daemon-reload")
    _systemctl("enable", path.name)
    _systemctl("start", "--no-block", path.name)
    return f"{path}: enabled and started; building engines takes minutes. To watch it, run: journalctl -fu {path.name}"


def uninstall(bundle: Path, root: Path | None) -> str:
    """Undo `install`; unpacked files stay. Raises FastVLMError if there is no such unit, or if this user may not do it."""
    path = (root or Path("/")) / _FOLDER / unit_name(bundle)
    if not path.exists():
        raise FastVLMError(f"{path} does not exist: this bundle is not installed under this name", f"run: sudo {bundle} install")
    if not os.access(path.parent, os.W_OK):
        raise FastVLMError(f"only root can write to {path.parent}", f"run: sudo {bundle} uninstall")
    if root is None:
        _systemctl("disable", "--now", path.name)
    (path.parent / "multi-user.target.wants" / path.name).unlink(missing_ok=True)
    path.unlink()
    if root is None:
        _systemctl("daemon-reload")
    return f"{path}: removed; the unpacked files and engines are still in {SYSTEM}, remove them by hand"


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
