"""The verdicts of docs/performance.md: the product's own rule, applied to the samples of a record of the peers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers.run import contenders
from benchmarks.tables import load
from benchmarks.verdicts import CLAIMS, RULE, changed, enough, table, verdicts


def figure(*medians: float) -> dict[str, Any]:
    """A figure with one process per value, three runs each."""
    return {"samples": [[value, value * 1.001, value * 0.999] for value in medians]}


def record_of(rounds: int, **of: float) -> dict[str, Any]:
    """A record in which every figure of every contender is 100 with a noise of 1 %, times what `of` says for `CONTENDER__FIGURE`."""
    results: dict[str, Any] = {}
    for claim in CLAIMS:
        for name in (claim.ours, *claim.peers):
            factor = of.get(f"{name}__{claim.figure}", 1.0)
            values = [factor * (99 + (3 * turn % rounds) * 2 / (rounds - 1)) for turn in range(rounds)]
            results.setdefault(name, {})[claim.figure] = figure(*values)
    return {"rounds": rounds, "machine": {"date": "2026-11-28"}, "results": results}


def words(record: dict[str, Any], title: str, ours: str, peer: str) -> str:
    (found,) = [each for each in verdicts(record) if (each.claim.title, each.claim.ours, each.peer) == (title, ours, peer)]
    return found.words


def test_a_clear_difference_is_ahead_or_behind_by_what_is_better() -> None:
    record = record_of(7, **{"fastvlm-edge:int4__ttft_ms": 0.8, "fastvlm-edge:int4-llm__decode_tokens_per_second": 0.8})
    assert words(record, "first token", "fastvlm-edge:int4", "transformers:bfloat16") == "ahead"  # less time
    assert words(record, "decoding, LLM alone", "fastvlm-edge:int4-llm", "llama.cpp:q4_0") == "behind"  # fewer tokens/s
    assert words(record, "encoder", "fastvlm-edge:int8", "openvino:int8") == "within the noise"


@pytest.mark.parametrize(("rounds", "verdict"), [(3, "too few samples"), (4, "too few samples"), (5, "ahead"), (7, "ahead")])
def test_it_takes_five_processes(rounds: int, verdict: str) -> None:
    record = record_of(rounds, **{"fastvlm-edge:int4__ttft_ms": 0.5})
    assert words(record, "first token", "fastvlm-edge:int4", "transformers:float32") == verdict


def test_a_peer_that_failed_was_not_measured() -> None:
    record = record_of(7)
    record["results"]["openvino:bf16"] = {"error": "this CPU has no BF16"}
    del record["results"]["optimum-onnx:int8"]
    assert words(record, "encoder", "fastvlm-edge:int8", "openvino:bf16") == "not measured"
    assert words(record, "prefill, LLM alone", "fastvlm-edge:int4-llm", "optimum-onnx:int8") == "not measured"
    assert "| openvino bf16 |  |  |  | not measured |" in table(record)


def test_the_table_has_both_medians_and_the_rule() -> None:
    text = table(record_of(7, **{"llama.cpp:q4_0__peak_memory_mib": 2.0}))
    assert "| memory, LLM alone, MiB | int4 | 100 | llama.cpp q4_0 | 200 | -50% |" in text
    assert "7 processes on each side, 2026-11-28." in text and RULE in text and "p < 0.01" in RULE


def test_every_claim_names_contenders_of_the_peers_run() -> None:
    names = {each.name for each in contenders()}
    assert {name for claim in CLAIMS for name in (claim.ours, *claim.peers)} <= names
    assert len(list(verdicts(load("peers")))) == sum(len(claim.peers) for claim in CLAIMS)


def test_what_changed_within_a_record() -> None:
    before, after = {"load_ms": figure(100, 101, 99, 100, 102)}, {"load_ms": figure(130, 131, 129, 132, 133)}
    assert changed("load_ms", before, after) and changed("load_ms", after, before)
    assert not changed("load_ms", before, before)
    assert [enough(processes) for processes in (3, 4, 5, 7)] == [False, False, True, True]
