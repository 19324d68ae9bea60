"""Compare two records: which figures changed by more than the noise of both.

A figure has changed if all of this is true:

- A two-sided rank-sum test (Mann-Whitney, exact) gives p < 0.01. Each process counts once, with the median of its runs, because runs of one
  process are not independent.
- The medians of all samples differ by more than 2 %. Nobody would act on less.
- They differ by more than twice the spread between processes of either record (1.4826 times the median absolute deviation, a robust
  estimate of the standard deviation). A record has many figures, so some would pass the test alone by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastvlm_edge.bench.record import figures_of, more_is_better, title_of, unit
from fastvlm_edge.bench.table import aligned, number
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.machine.description import IDENTITY

ALPHA = 0.01
LEAST = 0.02
SPREADS = 2.0
_EXACT = 64
"""Up to this many samples in total the test is exact; above, it uses the normal approximation."""
RULE = (
    f"changed: rank-sum test over the processes p < {ALPHA}, and medians apart by more than {LEAST:.0%} and {SPREADS:g} times the spread "
    "between processes (1.4826 MAD); at least 5 processes on both sides"
)
DEPENDS_ON = {
    "model": ("name", "precision", "image_size", "visual_tokens", "files"),
    "settings": ("threads", "runs", "processes", "new_tokens", "text_tokens", "image"),
}
"""What a figure depends on besides machine and versions."""
BETTER, WORSE, SAME, UNKNOWN = "better", "worse", "within the noise", "too few samples"


@dataclass(frozen=True)
class Change:
    """One figure in two records."""

    figure: str
    before: float
    after: float
    """Medians."""
    change: float
    """(after - before) / before."""
    noise: float
    """Relative change that had to be exceeded."""
    p: float
    verdict: str


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[Change]:
    """Every figure that both records have, in the order of the first."""
    before, after = figures_of(first), figures_of(second)
    return [judge(name, before[name]["samples"], after[name]["samples"]) for name in before if name in after]


def judge(figure: str, before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Change:
    """Apply the rule to the samples of one figure, which are grouped by process."""
    pooled = [[value for group in groups for value in group] for groups in (before, after)]
    medians = [statistics.median(values) for values in pooled]
    processes = [[statistics.median(group) for group in groups if group] for groups in (before, after)]
    change = (medians[1] - medians[0]) / medians[0] if medians[0] else math.copysign(math.inf, medians[1]) if medians[1] else 0.0
    noise = max(LEAST, SPREADS * max(map(spread, processes)))
    p = rank_sum_p(*processes)
    if smallest_p(*map(len, processes)) >= ALPHA:
        verdict = UNKNOWN
    elif p >= ALPHA or abs(change) <= noise:
        verdict = SAME
    else:
        verdict = BETTER if (change > 0) == more_is_better(figure) else WORSE
    return Change(figure, medians[0], medians[1], change, noise, p, verdict)


def spread(medians: Sequence[float]) -> float:
    """Spread between processes, relative to their median: 1.4826 times the median absolute deviation. 0 for one process."""
    middle = statistics.median(medians)
    if not middle:
        return 0.0
    return 1.4826 * statistics.median(abs(value - middle) for value in medians) / abs(middle)


def smallest_p(first: int, second: int) -> float:
    """The smallest possible p: every sample of one record is below every sample of the other."""
    return 2 / math.comb(first + second, first)


def rank_sum_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the Wilcoxon-Mann-Whitney test. Equal values share their rank.

    Up to 64 samples it is exact: it counts how many subsets of the ranks have each sum.
    """
    values = sorted([*first, *second])
    ranks: dict[float, int] = {}  # doubled, so that shared ones are whole numbers
    at = 0
    while at < len(values):
        end = at
        while end < len(values) and values[end] == values[at]:
            end += 1
        ranks[values[at]] = at + 1 + end
        at = end
    doubled = [ranks[value] for value in values]
    count, total = len(first), len(values)
    found = sum(ranks[value] for value in first)
    middle = count * (total + 1)  # the expected sum of doubled ranks
    if total > _EXACT:
        variance = count * len(second) / (total * (total - 1)) * sum((rank - (total + 1)) ** 2 for rank in doubled)
        return math.erfc(abs(found - middle) / math.sqrt(2 * variance)) if variance else 1.0
    ways: list[dict[int, int]] = [{0: 1}] + [{} for _ in range(count)]
    for rank in doubled:
        for size in range(count, 0, -1):
            for sum_of, number_of in ways[size - 1].items():
                ways[size][sum_of + rank] = ways[size].get(sum_of + rank, 0) + number_of
    extreme = sum(number_of for sum_of, number_of in ways[count].items() if abs(sum_of - middle) >= abs(found - middle))
    return extreme / math.comb(total, count)


def check_comparable(first: dict[str, Any], second: dict[str, Any], *, across_machines: bool) -> list[str]:
    """What differs between two records besides their figures, one line for each difference.

    Raises FastVLMError if the machines differ, unless `across_machines` allows it.
    """
    machines = [
        {key: _shown(each["machine"].get(key)) for key in IDENTITY if each["machine"].get(key) is not None} for each in (first, second)
    ]
    other = [f"{key} {a or 'none'} -> {b or 'none'}" for key in IDENTITY if (a := machines[0].get(key)) != (b := machines[1].get(key))]
    if other and not across_machines:
        raise FastVLMError(
            f"these records are from different machines ({'; '.join(other)}), so not only the software differs",
            "pass --across-machines to compare them anyway",
        )
    lines = [f"machine: {each}" for each in other]
    for part, keys in DEPENDS_ON.items():
        for key in keys:
            lines += _difference(f"{part} {key}", first[part].get(key), second[part].get(key))
    for key in ("backend", "prompt_tokens", "partial"):
        lines += _difference(key, first.get(key), second.get(key))
    versions = [each["machine"]["versions"] for each in (first, second)]
    for name in sorted({*versions[0], *versions[1]}):
        lines += _difference(name, versions[0].get(name), versions[1].get(name))
    for key in ("system", "python", "instructions", "jetson_linux"):
        lines += _difference(key, first["machine"].get(key), second["machine"].get(key))
    for key in ("governor", "power_mode"):
        lines += _difference(key, first["state"]["before"].get(key), second["state"]["before"].get(key))
    return lines


def format_changes(changes: Sequence[Change], differs: Sequence[str]) -> str:
    """Text of a table of changes, of what else differs, and of the rule."""
    rows = [("", "before", "after", "", "change", "noise", "")]
    for change in changes:
        verdict = {BETTER: "BETTER", WORSE: "WORSE"}.get(change.verdict, change.verdict)
        rows.append(
            (
                title_of(change.figure),
                number(change.before),
                number(change.after),
                unit(change.figure),
                f"{change.change:+.1%}",
                f"±{change.noise:.1%}",
                verdict,
            )
        )
    lines = aligned(rows, left=(0, 3))
    if differs:
        lines += ["", "what differs:", *(f"  {line}" for line in differs)]
    return "\n".join([*lines, "", RULE])


def _difference(name: str, first: Any, second: Any) -> list[str]:
    if first == second:
        return []
    if isinstance(first, dict) and isinstance(second, dict):  # hashes of files
        changed = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
        return [f"{name}: {', '.join(changed)}"]
    return [f"{name}: {_shown(first)} -> {_shown(second)}"]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("name", value.get("missing", value)))
    return "none" if value is None else str(value)
