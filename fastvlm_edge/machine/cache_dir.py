"""Where built engines and calibration statistics are kept, and what was typed. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_dir(environ: Mapping[str, str] | None = None, home: Path | None = None) -> Path:
    """`$FASTVLM_EDGE_CACHE`, or `fastvlm-edge` in the user's cache directory (XDG base directory specification).

    `environ` and `home` are those of this process and user unless given. The directory may not exist yet, and cannot be created for a user
    without a home.
    """
    variables = os.environ if environ is None else environ
    named = variables.get("FASTVLM_EDGE_CACHE")
    base = variables.get("XDG_CACHE_HOME") or str((home_dir() if home is None else home) / ".cache")
    return Path(named) if named else Path(base) / "fastvlm-edge"


def state_dir() -> Path:
    """`fastvlm-edge` in the user's state directory (XDG base directory specification). It may not exist."""
    return Path(os.environ.get("XDG_STATE_HOME") or home_dir() / ".local" / "state") / "fastvlm-edge"


def home_dir() -> Path:
    """The user's home, or a directory that does not exist: in a container, a user may have neither HOME nor an entry in /etc/passwd."""
    home = Path(os.path.expanduser("~"))
    return home if home.is_absolute() else Path("/nonexistent")
