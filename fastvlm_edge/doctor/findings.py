"""A finding: one fact about the machine, its status, and the command that puts it right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

STATUSES = ("ok", "warning", "problem")
"""From good to bad. A warning costs speed or may cause a failure later; with a problem, something does not work."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    status: str
    """One of STATUSES."""
    text: str
    mend: str | None = None
    """A command, with a few words around it if it must run elsewhere. Every warning and every problem has one."""


def ok(topic: str, text: str, mend: str | None = None) -> Finding:
    """Nothing is wrong; `mend`, if given, is what the user may still want to do."""
    return Finding(topic, "ok", text, mend)


def warning(topic: str, text: str, mend: str) -> Finding:
    """It works, but not as well as it could."""
    return Finding(topic, "warning", text, mend)


def problem(topic: str, text: str, mend: str) -> Finding:
    """Something does not work."""
    return Finding(topic, "problem", text, mend)


def worst(findings: Iterable[Finding]) -> str:
    """The worst status; `ok` without findings."""
    return max((finding.status for finding in findings), key=STATUSES.index, default="ok")
