"""Who is ahead where: the claims of docs/performance.md, each judged by the rule of `fastvlm-edge bench compare`.

    python -m benchmarks.verdicts [RECORD]

Every claim compares one figure of two contenders in a record of `benchmarks.peers.run`. The rule needs at least five processes on each
side.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_edge.bench.compare import ALPHA, BETTER, LEAST, SPREADS, WORSE, Change, judge, smallest_p
from fastvlm_edge.bench.record import read_json, unit
from fastvlm_edge.bench.table import number

RECORD = Path(__file__).parent / "results" / "peers.json"
NOT_MEASURED = "not measured"
WORDS = {BETTER: "ahead", WORSE: "behind"}
"""Verdict of `judge`, from the peer to ours -> what the table says."""
RULE = (
    f"Ahead or behind: a two-sided rank-sum test over the processes gives p < {ALPHA}, and the medians differ by more than {LEAST:.0%} and "
    f"by more than {SPREADS:g} times the spread between the processes of either side (`fastvlm-edge bench compare`, [bench.md](bench.md))."
)


@dataclass(frozen=True)
class Claim:
    """Our contender against others in one figure."""

    title: str
    figure: str
    ours: str
    peers: tuple[str, ...]


CLAIMS = (
    Claim(
        "first token",
        "ttft_ms",
        "fastvlm-edge:int4",
        ("transformers:bfloat16", "transformers:bfloat16-compile", "transformers:float32", "transformers:float32-compile"),
    ),
    Claim(
        "decoding, LLM alone",
        "decode_tokens_per_second",
        "fastvlm-edge:int4-llm",
        ("onnxruntime-genai:int4", "llama.cpp:q4_0", "optimum-onnx:int8"),
    ),
    *(
        Claim(
            "prefill, LLM alone",
            "prefill_ms",
            f"fastvlm-edge:{precision}-llm",
            ("optimum-onnx:int8", "onnxruntime-genai:int4", "llama.cpp:q4_0", "llama.cpp:q8_0"),
        )
        for precision in ("int4", "int8")
    ),
    Claim("encoder", "vision_ms", "fastvlm-edge:fp32", ("openvino:fp32",)),
    Claim("encoder", "vision_ms", "fastvlm-edge:int8", ("openvino:fp32", "openvino:bf16", "openvino:int8")),
    Claim("memory, LLM alone", "peak_memory_mib", "fastvlm-edge:int4-llm", ("llama.cpp:q4_0",)),
    Claim("memory, LLM alone", "peak_memory_mib", "fastvlm-edge:int8-llm", ("llama.cpp:q8_0",)),
)


@dataclass(frozen=True)
class Verdict:
    """One claim against one peer."""

    claim: Claim
    peer: str
    change: Change | None
    """From the peer to ours; None if the record lacks one of the two."""

    @property
    def words(self) -> str:
        """`ahead`, `behind`, `within the noise`, `too few samples` or `not measured`."""
        return NOT_MEASURED if self.change is None else WORDS.get(self.change.verdict, self.change.verdict)


def verdicts(record: Mapping[str, Any]) -> Iterator[Verdict]:
    """All claims against all their peers, in the order of CLAIMS."""
    for claim in CLAIMS:
        ours = samples_of(record, claim.ours, claim.figure)
        for peer in claim.peers:
            theirs = samples_of(record, peer, claim.figure)
            yield Verdict(claim, peer, judge(claim.figure, theirs, ours) if ours and theirs else None)


def samples_of(record: Mapping[str, Any], contender: str, figure: str) -> list[list[float]]:
    """Samples by process; empty if the contender failed, or has no such figure."""
    samples: list[list[float]] = record["results"].get(contender, {}).get(figure, {}).get("samples", [])
    return samples


def table(record: Mapping[str, Any]) -> str:
    """The verdicts as Markdown."""
    lines = [
        f"{record['rounds']} processes on each side, {record['machine']['date']}. {RULE}",
        "",
        "| | ours | median | peer | median | change | p | ours is |",
        "| --- " * 8 + "|",
    ]
    for each in verdicts(record):
        cells = [f"{each.claim.title}, {unit(each.claim.figure)}", shown(each.claim.ours)]
        if each.change is None:
            cells += ["", shown(each.peer), "", "", ""]
        else:
            change = each.change
            cells += [number(change.after), shown(each.peer), number(change.before), f"{change.change:+.0%}", f"{change.p:.2g}"]
        lines.append(f"| {' | '.join(cells)} | {each.words} |")
    return "\n".join(lines)


def shown(contender: str) -> str:
    """`llama.cpp q4_0`; the part that is measured stands in the title of the claim."""
    return contender.removesuffix("-llm").replace(":", " ").removeprefix("fastvlm-edge ")


def enough(processes: int) -> bool:
    """Whether that many processes on each side can show a difference at all."""
    return smallest_p(processes, processes) < ALPHA


def changed(figure: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a figure of two contenders in a record differs by the rule."""
    return judge(figure, before[figure]["samples"], after[figure]["samples"]).verdict in WORDS


def main() -> int:
    """Print the table of a record."""
    print(table(read_json(Path(sys.argv[1]) if sys.argv[1:] else RECORD)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
