"""Eight threads, each with its own picture, get the answers of single runs. `make test-slow` asks more, in three precisions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.commands.demo import MODEL
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.evaluation.data import open_data

ROOT = Path(__file__).resolve().parents[3]
THREADS = 8


def check(demo: Path, questions: Path, count: int) -> None:
    """Ask so many questions, alone and in threads."""
    asked = [(example.prompt or "", image) for example, image in open_data(questions).read()]
    assert len(asked) == count
    with FastVLM.load(demo, "ort", slots=1, prefix_cache=False, image_cache=0, speculate=False) as vlm:
        alone = [vlm.generate(prompt, image, max_new_tokens=16).token_ids for prompt, image in asked]
    with FastVLM.load(demo, "ort", slots=THREADS) as vlm, ThreadPoolExecutor(THREADS) as pool:
        replies = [*pool.map(lambda pair: vlm.generate(*pair, max_new_tokens=16), asked)]
    assert [reply.token_ids for reply in replies] == alone
    assert len({tuple(ids) for ids in alone}) > 20, "the questions have many answers"


def test_eight_threads_get_the_answers_of_single_runs(demo_scenes: Callable[[str, int], Path]) -> None:
    check(MODEL, demo_scenes("heldout", 80), 80)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_500_questions_get_the_answers_of_single_runs(precision: str, demo_scenes: Callable[[str, int], Path], tmp_path: Path) -> None:
    convert(str(ROOT / "examples" / "demo" / "fastvlm-demo"), tmp_path / "model", precision=precision)
    check(tmp_path / "model", demo_scenes("heldout", 500), 500)
