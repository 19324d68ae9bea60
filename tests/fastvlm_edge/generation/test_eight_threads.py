"""Eight threads, each with its own picture, get the answers of single runs: 500 questions of the demo."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.evaluation.data import open_data

ROOT = Path(__file__).resolve().parents[3]
QUESTIONS, THREADS = 500, 8


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo model in a precision."""
    directory = tmp_path_factory.mktemp("demo") / request.param
    convert(str(ROOT / "examples" / "demo" / "fastvlm-demo"), directory, precision=request.param)
    yield directory
    shutil.rmtree(directory)


def test_eight_threads_get_the_answers_of_single_runs(demo: Path, demo_scenes: Callable[[str, int], Path]) -> None:
    asked = [(example.prompt or "", image) for example, image in open_data(demo_scenes("heldout", QUESTIONS)).read()]
    assert len(asked) == QUESTIONS
    with FastVLM.load(demo, "ort", slots=1, prefix_cache=False, image_cache=0, speculate=False) as vlm:
        alone = [vlm.generate(prompt, image, max_new_tokens=16).token_ids for prompt, image in asked]
    with FastVLM.load(demo, "ort", slots=THREADS) as vlm, ThreadPoolExecutor(THREADS) as pool:
        replies = [*pool.map(lambda pair: vlm.generate(*pair, max_new_tokens=16), asked)]
    assert [reply.token_ids for reply in replies] == alone
    assert len({tuple(ids) for ids in alone}) > 20, "the questions have many answers"
