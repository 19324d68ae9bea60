"""The report of `doctor`, as text and as one JSON object."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from fastvlm_edge.doctor.facts import Facts
from fastvlm_edge.doctor.findings import STATUSES, Finding, worst
from fastvlm_edge.version import __version__

WIDTH = 110


def to_text(findings: Sequence[Finding]) -> str:
    """One line for each finding, its command below it, and the counts at the end."""
    topics = max((len(finding.topic) for finding in findings), default=0)
    indent = " " * (len("problem") + topics + 4)
    lines = []
    for finding in findings:
        head = f"{finding.status:7}  {finding.topic:{topics}}  "
        lines += textwrap.wrap(finding.text, WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False)
        if finding.mend is not None:
            lines.append(f"{indent}-> {finding.mend}")
    counts = {status: sum(finding.status == status for finding in findings) for status in STATUSES}
    lines += ["", ", ".join(f"{count} {status if count == 1 or status == 'ok' else status + 's'}" for status, count in counts.items())]
    return "\n".join(lines)


def to_json(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """`status` is the worst status of all findings; `machine` is what was read."""
    return {
        "version": __version__,
        "status": worst(findings),
        "findings": [vars(finding) for finding in findings],
        "machine": facts.to_json(),
    }
