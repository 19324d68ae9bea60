"""A finding: one thing about the machine, whether it is well, and the command that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

STATUSES = ("ok", "warning", "problem")
"""From good to bad. A warning costs speed or may fail later; with a problem something that this machine is for does not work."""


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    topic: str
    status: str
    """One of STATUSES."""
    text: str
    mend: str | None = None
    """A command, with a few words around it where it runs elsewhere. Every warning and every problem has one."""


def ok(topic: str, text: str, mend: str | None = None) -> Finding:
    """All is well; `mend` is then what one may do about it."""
    return Finding(topic, "ok", text, mend)


def warning(topic: str, text: str, mend: str) -> Finding:
    """It works, though not as well as it could."""
    return Finding(topic, "warning", text, mend)


def problem(topic: str, text: str, mend: str) -> Finding:
    """Something does not work."""
    return Finding(topic, "problem", text, mend)


def worst(findings: Iterable[Finding]) -> str:
    """The worst status; `ok` where there is nothing."""
    return max((finding.status for finding in findings), key=STATUSES.index, default="ok")
