"""`fastvlm-edge bench compare`: finds a change of a tenth, is silent on noise, and does not mix machines."""

from __future__ import annotations

import copy
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.bench.compare import (
    ALPHA,
    BETTER,
    SAME,
    UNKNOWN,
    WORSE,
    check_comparable,
    compare,
    judge,
    rank_sum_p,
    smallest_p,
    spread,
)
from fastvlm_edge.bench.record import Samples, document_of, write_json
from fastvlm_edge.cli import main

MACHINE = {
    **{"cpu": "AMD EPYC", "cores": 2, "memory_gib": 23.5, "architecture": "x86_64", "system": "Linux", "python": "3.11"},
    **{"versions": {"onnxruntime": "1.31.1"}, "instructions": ["avx2"], "date": "2026-01-01"},
}


def samples_like(rng: np.random.Generator, level: float, processes: int = 5, runs: int = 3, noise: float = 0.02) -> list[list[float]]:
    """Noise within a process and, half as large, between processes."""
    centres = level * (1 + noise / 2 * rng.standard_normal(processes))
    return [[float(centre * (1 + noise * rng.standard_normal())) for _ in range(runs)] for centre in centres]


def record_of(figures: dict[str, list[list[float]]], **machine: Any) -> dict[str, Any]:
    samples = Samples()
    for number in range(max(map(len, figures.values()))):
        samples.begin_process()
        for name, groups in figures.items():
            for value in groups[number]:
                samples.add(name, value)
    facts = {
        "model": {"name": "m", "precision": "int4", "image_size": 1024, "files": {"decoder.onnx": "a"}},
        "settings": {"threads": 2, "runs": 3, "processes": 5},
        "machine": MACHINE | machine,
        "state": {"before": {}},
        "backend": "ort",
    }
    return document_of(samples, facts, partial=False)


def test_a_change_of_a_tenth_is_found_whichever_way_is_better() -> None:
    rng = np.random.default_rng(0)
    found = [judge("ttft_cold_ms", samples_like(rng, 1000), samples_like(rng, 1100)).verdict for _ in range(200)]
    assert found.count(WORSE) >= 195 and BETTER not in found
    found = [judge("ttft_cold_ms", samples_like(rng, 1000), samples_like(rng, 900)).verdict for _ in range(200)]
    assert found.count(BETTER) >= 195 and WORSE not in found
    name = "decode_tokens_per_second@290"
    found = [judge(name, samples_like(rng, 80), samples_like(rng, 88)).verdict for _ in range(200)]
    assert found.count(BETTER) >= 195 and WORSE not in found


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.1])
def test_it_is_silent_on_noise(noise: float) -> None:
    rng = np.random.default_rng(1)
    verdicts = [judge("vision_ms", samples_like(rng, 50, noise=noise), samples_like(rng, 50, noise=noise)).verdict for _ in range(500)]
    assert verdicts.count(SAME) >= 495  # one in a hundred is what p < 0.01 would allow


def test_one_process_that_was_disturbed_is_no_change() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        disturbed = samples_like(rng, 100)
        disturbed[3] = [value * 1.4 for value in disturbed[3]]
        assert judge("vision_ms", samples_like(rng, 100), disturbed).verdict == SAME


def test_processes_that_differ_from_each_other_widen_the_noise() -> None:
    steady = [[100.0, 100.1, 99.9]] * 5
    wide = [[level, level + 0.1, level - 0.1] for level in (101.0, 106.0, 112.0, 118.0, 124.0)]
    change = judge("vision_ms", steady, wide)
    assert change.p < ALPHA and change.verdict == SAME and change.noise > 0.12


def test_many_runs_of_one_process_are_not_many_processes() -> None:
    rng = np.random.default_rng(6)
    slow, fast = ([[float(level + rng.standard_normal()) for _ in range(50)]] for level in (120, 100))
    assert judge("vision_ms", fast, slow).verdict == UNKNOWN


def test_five_processes_are_needed() -> None:
    assert judge("load_ms", [[1.0], [1.1], [1.2]], [[2.0], [2.1], [2.2]]).verdict == UNKNOWN
    five = [[100.0], [101.0], [99.0], [102.0], [100.5]]
    assert judge("load_ms", five, [[value * 1.1] for (value,) in five]).verdict == WORSE
    assert smallest_p(4, 4) > ALPHA > smallest_p(5, 5)


def test_equal_samples_are_no_change() -> None:
    same = [[64.0]] * 5
    assert judge("peak_memory_mib", same, same).verdict == SAME
    change = judge("peak_memory_mib", [[0.0]] * 5, [[3.0]] * 5)
    assert change.verdict == WORSE


def test_the_rank_sum_test_counts_every_arrangement() -> None:
    rng = np.random.default_rng(3)
    for ties in (False, True):
        for _ in range(20):
            first, second = (rng.integers(0, 6, size).tolist() if ties else rng.random(size).tolist() for size in (4, 6))
            pooled = [*first, *second]
            ranks = [sum(other < value for other in pooled) + (sum(other == value for other in pooled) + 1) / 2 for value in pooled]
            middle, observed = 4 * 11 / 2, sum(ranks[:4])
            sums = [sum(chosen) for chosen in combinations(ranks, 4)]
            expected = sum(abs(each - middle) >= abs(observed - middle) - 1e-9 for each in sums) / len(sums)
            assert rank_sum_p(first, second) == pytest.approx(expected)


def test_the_rank_sum_test_agrees_with_scipy_where_it_is_approximate() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    first, second = rng.normal(0, 1, 50).tolist(), rng.normal(0.4, 1, 40).tolist()
    expected = stats.mannwhitneyu(first, second, method="asymptotic", use_continuity=False).pvalue
    assert rank_sum_p(first, second) == pytest.approx(expected, rel=1e-6)


def test_spread_is_robust() -> None:
    assert spread([2.0, 2.0, 2.0, 2.0, 900.0]) == 0.0
    assert spread([98.0, 100.0, 102.0]) == pytest.approx(1.4826 * 0.02)
    assert spread([5.0]) == 0.0 and spread([0.0, 0.0]) == 0.0


def test_only_common_figures_are_compared_and_decoding_by_depth() -> None:
    groups = [[1.0, 1.0, 1.0]] * 5
    first = record_of({"ttft_cold_ms": groups, "decode_tokens_per_second@290": groups, "decode_tokens_per_second@512": groups})
    second = record_of({"ttft_cold_ms": groups, "decode_tokens_per_second@290": groups, "load_ms": groups})
    assert [change.figure for change in compare(first, second)] == ["ttft_cold_ms", "decode_tokens_per_second@290"]


def test_other_machines_are_refused_unless_it_is_meant() -> None:
    record = record_of({"load_ms": [[1.0]] * 5})
    board = record_of({"load_ms": [[1.0]] * 5}, cpu="Cortex-A78AE", cores=6, board="Orin Nano")
    with pytest.raises(FastVLMError, match=r"cpu AMD EPYC -> Cortex-A78AE.*--across-machines"):
        check_comparable(record, board, across_machines=False)
    lines = check_comparable(record, board, across_machines=True)
    assert "machine: cpu AMD EPYC -> Cortex-A78AE" in lines and "machine: board none -> Orin Nano" in lines


def test_what_else_differs_is_listed() -> None:
    first, second = (record_of({"load_ms": [[1.0]] * 5}) for _ in range(2))
    assert check_comparable(first, second, across_machines=False) == []
    second = copy.deepcopy(second)
    second["machine"]["versions"] = {"onnxruntime": "1.32.0"}
    second["model"]["precision"] = "int8"
    second["model"]["files"] = {"decoder.onnx": "b"}
    second["settings"]["threads"] = 1
    assert check_comparable(first, second, across_machines=False) == [
        "model precision: int4 -> int8",
        "model files: decoder.onnx",
        "settings threads: 2 -> 1",
        "onnxruntime: 1.31.1 -> 1.32.0",
    ]


def test_the_command_prints_a_table_or_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(5)
    vision = samples_like(rng, 500)
    write_json(tmp_path / "a.json", record_of({"ttft_cold_ms": samples_like(rng, 1000), "vision_ms": vision}))
    write_json(tmp_path / "b.json", record_of({"ttft_cold_ms": samples_like(rng, 800), "vision_ms": vision[::-1]}))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(["bench", "compare", *files]) == 0
    table = capsys.readouterr().out
    assert "BETTER" in table and "within the noise" in table and "p < 0.01" in table
    assert main(["bench", "compare", *files, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [change["verdict"] for change in document["changes"]] == [BETTER, SAME] and document["differs"] == []
    write_json(tmp_path / "c.json", record_of({"load_ms": [[1.0]] * 5}, cores=64))
    assert main(["bench", "compare", files[0], str(tmp_path / "c.json")]) == 1
    assert "different machines" in capsys.readouterr().err
    assert main(["bench", "compare", files[0], str(tmp_path / "c.json"), "--across-machines"]) == 1
    assert "no figure in common" in capsys.readouterr().err
    write_json(tmp_path / "two.json", {"results": [json.loads((tmp_path / "a.json").read_text())] * 2})
    assert main(["bench", "compare", files[0], str(tmp_path / "two.json")]) == 1
    assert "records of 2 models" in capsys.readouterr().err
