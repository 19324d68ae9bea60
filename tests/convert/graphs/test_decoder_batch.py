"""Several conversations in one call of the decoder: rows of different lengths give what each gives alone.

Nothing is stubbed: both graphs run in onnxruntime. The cache is one buffer [layers, 2, batch, kv_heads, capacity, head_dim].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tests.convert.graphs.test_decoder import Graph
from tests.support.checkpoints import write_checkpoint

CAPACITY = 48
LENGTHS = (20, 35, 7)
DECODED = 6
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="native")))


@pytest.fixture(scope="module", params=[None, "cpu"], ids=["decoder.onnx", "decoder.cpu.onnx"])
def graph(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph(tmp_path_factory.mktemp("graph"), checkpoint, "fp32", provider=request.param)


def alone(graph: Graph, ids: NDArray[np.int64], length: int) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """The cache after a prefill of `length` ids, and the outputs of DECODED single ids after it."""
    cache = graph.cache(CAPACITY)
    graph.step(ids[:length], 0, cache, [length - 1])
    filled = cache.copy()
    return filled, [graph.step(ids[at : at + 1], at, cache, [0])[0] for at in range(length, length + DECODED)]


def test_rows_of_different_lengths_give_what_each_gives_alone(graph: Graph) -> None:
    """Decoding three conversations at once; each row of `kv_new` goes to its own place in the common buffer."""
    vocab = graph.text.vocab
    ids = RNG.integers(0, vocab, (3, max(LENGTHS) + DECODED))
    ids[1, 4:8] = vocab + np.arange(4)  # one of them has a picture
    ids[:, max(LENGTHS) :] = RNG.integers(0, vocab, (3, DECODED))
    singles = [alone(graph, ids[row], length) for row, length in enumerate(LENGTHS)]
    cache = np.concatenate([filled for filled, _ in singles], axis=2)
    assert cache.shape[2] == 3 and cache.flags.c_contiguous
    for step in range(DECODED):
        ends = np.array(LENGTHS) + step
        call = np.stack([ids[row, end : end + 1] for row, end in enumerate(ends)])
        found = run_rows(graph, call, ends, cache)
        for row in range(3):
            np.testing.assert_allclose(found[row], singles[row][1][step][0], rtol=1e-4, atol=1e-4)


def test_the_rows_of_a_call_do_not_see_each_other(graph: Graph) -> None:
    vocab = graph.text.vocab
    ids = RNG.integers(0, vocab, (3, max(LENGTHS) + DECODED))
    filled = [alone(graph, ids[row], length)[0] for row, length in enumerate(LENGTHS)]
    call = np.stack([ids[row, end : end + 1] for row, end in enumerate(LENGTHS)])
    before = run_rows(graph, call, np.array(LENGTHS), np.concatenate(filled, axis=2))
    filled[2] = filled[2] + 1
    call[2] = (call[2] + 1) % vocab
    after = run_rows(graph, call, np.array(LENGTHS), np.concatenate(filled, axis=2))
    np.testing.assert_allclose(before[:2], after[:2], rtol=1e-5, atol=1e-5)
    assert np.abs(before[2] - after[2]).max() > 1e-2


def run_rows(graph: Graph, ids: NDArray[np.int64], ends: NDArray[np.int64], cache: NDArray[Any]) -> NDArray[Any]:
    """One id per row, at position `ends[row]`; keys and values go into `cache`. Returns the logits [batch, 1, vocab]."""
    feeds: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": ends[:, None],
        "image_features": graph.features,
        "logit_positions": np.zeros((len(ids), 1), np.int64),
    }
    for layer in range(graph.text.layers):
        for part, name in enumerate(("key", "value")):
            feeds[f"past_key_values.{layer}.{name}"] = cache[layer, part]
    if graph.provider == "cpu":
        names = [f"present.{layer}.{name}" for layer in range(graph.text.layers) for name in ("key", "value")]
        logits, *present = graph.session.run(["logits", *names], feeds)
        for index, value in enumerate(present):
            cache[index // 2, index % 2][:] = value[:, :, : cache.shape[4]]
        return np.asarray(logits)
    logits, kv_new = graph.session.run(["logits", "kv_new"], feeds)
    for row, end in enumerate(ends):
        cache[:, :, row, :, end] = kv_new[:, :, row, :, 0]
    return np.asarray(logits)
