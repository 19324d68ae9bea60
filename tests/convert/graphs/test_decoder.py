"""The decoder graph against an independent Qwen2 in PyTorch, and what its contract promises about cache, chunks and pictures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fastvlm_edge.backends.ort_session import session_options
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_edge.convert.graphs import decoder
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.decoder import Provider, build_decoder
from fastvlm_edge.convert.precision import on_cpu, precision_plan
from fastvlm_edge.convert.reference.decoder import reference_logits
from fastvlm_edge.convert.weights.decoder import write_decoder_weights
from tests.support.checkpoints import write_checkpoint

CONTEXT = 128
RNG = np.random.default_rng(0)
PRECISIONS = {"fp32": 1e-5, "fp16": 6e-3, "bf16": 2e-2, "int8": 0.1, "int4": 0.6}
"""Bound on the relative error of the logits, random weights."""


class Graph:
    """One decoder graph in onnxruntime, its cache managed in plain numpy as the contract says."""

    def __init__(self, path: Path, checkpoint: Checkpoint, precision: str, *, provider: Provider | None = None, **changes: Any) -> None:
        self.text = checkpoint.text
        plan = replace(precision_plan(precision), **changes)
        weights = WeightsFile(path / "decoder.weights")
        write_decoder_weights(checkpoint, plan, weights, lambda: None, context=CONTEXT)
        weights.close()
        graph = GraphBuilder("decoder", weights)
        if provider != "cuda":
            plan = on_cpu(plan)
        with patch.object(decoder, "ACCURACY_LEVEL", 1):  # rounded activations would hide small faults
            build_decoder(graph, checkpoint.text, plan, provider=provider)
        graph.save(path / "decoder.onnx")
        self.provider = provider
        self.path = str(path / "decoder.onnx")
        options = ort.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        self.dtype = np.float16 if plan.decoder == "fp16" else np.float32
        self.features = RNG.standard_normal((4, self.text.hidden)).astype(self.dtype)

    def cache(self, capacity: int, batch: int = 1) -> NDArray[Any]:
        text = self.text
        return np.zeros((text.layers, 2, batch, text.kv_heads, capacity, text.head_dim), self.dtype)

    def step(
        self,
        ids: NDArray[np.int64],
        start: int,
        cache: NDArray[Any],
        logit_positions: Sequence[int],
        position_ids: NDArray[np.int64] | None = None,
    ) -> list[NDArray[Any]]:
        """Run `ids` [batch, seq] from position `start` on, append to `cache`, return logits, top_values, top_ids, log_normalizer."""
        ids = np.atleast_2d(ids)
        batch, seq = ids.shape
        feeds = {
            "input_ids": ids,
            "position_ids": np.tile(np.arange(start, start + seq), (batch, 1)) if position_ids is None else position_ids,
            "image_features": self.features,
            "logit_positions": np.tile(logit_positions, (batch, 1)),
        }
        for layer in range(self.text.layers):
            feeds[f"past_key_values.{layer}.key"] = cache[layer, 0]
            feeds[f"past_key_values.{layer}.value"] = cache[layer, 1]
        asked = ["logits", "top_values", "top_ids", "log_normalizer"]
        if self.provider is None:
            *rest, kv_new = self.session.run([*asked, "kv_new"], feeds)
            cache[..., start : start + seq, :] = kv_new
            return rest
        binding = self.session.io_binding()
        for name, array in feeds.items():
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            binding.bind_ortvalue_input(name, value)
            if name.startswith("past_key_values"):
                assert value.data_ptr() == array.ctypes.data
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        for name in asked:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[-len(asked) :]]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="native", tied=request.param)))


@pytest.fixture(scope="module", params=[None, "cpu"], ids=["engines", "cpu"])
def graph(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph(tmp_path_factory.mktemp("graph"), checkpoint, "fp32", provider=request.param)


@pytest.fixture(scope="module")
def ids(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """Text, four rows of a picture, text."""
    vocab = checkpoint.text.vocab
    words = RNG.integers(0, vocab, 20)
    return np.concatenate([words[:5], vocab + np.arange(4), words[5:]])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_are_those_of_the_reference(checkpoint: Checkpoint, ids: NDArray[np.int64], precision: str, tmp_path: Path) -> None:
    graph = Graph(tmp_path, checkpoint, precision)
    positions = list(range(len(ids)))
    logits, values, top, normalizer = graph.step(ids, 0, graph.cache(32), positions)
    expected, _ = reference_logits(checkpoint, ids.tolist(), graph.features.astype(np.float32), positions, lambda: None)
    assert np.linalg.norm(logits[0] - expected) / np.linalg.norm(expected) < PRECISIONS[precision]
    np.testing.assert_array_equal(values, -np.sort(-logits, axis=-1)[..., :64])
    np.testing.assert_array_equal(np.take_along_axis(logits, top, -1), values)
    np.testing.assert_allclose(normalizer, np.logaddexp.reduce(logits.astype(np.float64), axis=-1), atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_graph_for_the_cpu_computes_what_the_one_for_engines_does(
    checkpoint: Checkpoint, ids: NDArray[np.int64], precision: str, tmp_path: Path
) -> None:
    logits = []
    providers: tuple[Provider | None, ...] = ("cpu", None)
    for provider in providers:
        (tmp_path / str(provider)).mkdir()
        graph = Graph(tmp_path / str(provider), checkpoint, precision, provider=provider)
        graph.features[:] = 0.5
        logits.append(graph.step(ids, 0, graph.cache(32), [3, len(ids) - 1])[0])
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_every_product_of_integers_is_one_kernel(checkpoint: Checkpoint, precision: str, tmp_path: Path) -> None:
    """In every version of onnxruntime. What its operator needs in another order is computed at load."""
    graph = Graph(tmp_path, checkpoint, precision, provider="cpu")
    options = session_options(Path(graph.path), 1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(graph.path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    counts = Counter(node.op_type for node in optimized.graph.node)
    assert counts["MatMulNBits"] == 4 * checkpoint.text.layers + 1
    assert not {"DequantizeLinear", "MatMul", "BitwiseXor", "Transpose"} & counts.keys()


@pytest.mark.parametrize("row", [64, 100, 1024])
def test_candidates_do_not_depend_on_how_a_row_of_logits_is_cut(
    checkpoint: Checkpoint, ids: NDArray[np.int64], row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary is a multiple of no row but the first. Among equal logits, the smaller id comes first."""
    monkeypatch.setattr(decoder, "TOP_ROW", row)
    graph = Graph(tmp_path, checkpoint, "fp16")  # FP16 logits have equal values
    logits, values, top, normalizer = graph.step(ids, 0, graph.cache(32), [3, 9, len(ids) - 1])
    expected = np.argsort(-logits, axis=-1, kind="stable")[..., :64]
    assert len(np.unique(logits)) < logits.size
    np.testing.assert_array_equal(top, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, -1))
    np.testing.assert_allclose(normalizer, np.logaddexp.reduce(logits.astype(np.float64), axis=-1), atol=1e-5)
    count = [node.op_type for node in onnx.load(graph.path, load_external_data=False).graph.node].count("TopK")
    assert count == (1 if row >= checkpoint.text.vocab else 2)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("cpu", [False, True])
def test_a_divided_mlp_gives_the_same_logits(
    checkpoint: Checkpoint, ids: NDArray[np.int64], precision: str, cpu: bool, tmp_path: Path
) -> None:
    logits = []
    for name, shifts in (("plain", {}), ("divided", {0: 3, checkpoint.text.layers - 1: 1})):
        (tmp_path / name).mkdir()
        graph = Graph(tmp_path / name, checkpoint, precision, provider="cpu" if cpu and precision != "fp16" else None, up_shifts=shifts)
        graph.features[:] = 0.5
        logits.append(graph.step(ids, 0, graph.cache(32), [3, len(ids) - 1])[0])
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)  # powers of two round nothing


def test_wide_scores_change_types_and_not_results(checkpoint: Checkpoint, ids: NDArray[np.int64], tmp_path: Path) -> None:
    logits, casts = [], []
    for name, layers in (("narrow", set()), ("wide", {0})):
        (tmp_path / name).mkdir()
        graph = Graph(tmp_path / name, checkpoint, "fp16", wide_scores=frozenset(layers))
        graph.features[:] = 0.5
        logits.append(graph.step(ids, 0, graph.cache(32), [3, len(ids) - 1])[0])
        nodes = onnx.load(graph.path, load_external_data=False).graph.node
        casts.append([node.name for node in nodes if node.name.endswith("/scores/narrow/Cast")])
    assert np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0]) < PRECISIONS["fp16"]
    every = [f"/layers.{layer}/attn/scores/narrow/Cast" for layer in range(checkpoint.text.layers)]
    assert casts == [every, every[1:]]


def test_ids_that_only_fill_up_a_call_are_not_seen(checkpoint: Checkpoint, ids: NDArray[np.int64], tmp_path: Path) -> None:
    """A call of a fixed length: ids after the real ones, at any position, change nothing of what comes before them."""
    graph = Graph(tmp_path, checkpoint, "fp32")
    cache, filled = graph.cache(32), graph.cache(64)
    graph.step(ids[:7], 0, cache, [0])
    filled[..., :7, :] = cache[..., :7, :]
    expected, *_ = graph.step(ids[7:], 7, cache, [2, len(ids) - 8])
    count = len(ids) - 7
    positions = np.full((1, 20), CONTEXT - 1)
    positions[0, :count] = np.arange(7, len(ids))
    found, *_ = graph.step(np.concatenate([ids[7:], np.zeros(20 - count, np.int64)]), 7, filled, [2, count - 1], positions)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(filled[..., : len(ids), :], cache[..., : len(ids), :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(1,), (5, 9), (7,), tuple(range(1, 24))])
def test_chunked_prefill_equals_one_shot(graph: Graph, ids: NDArray[np.int64], cuts: tuple[int, ...]) -> None:
    whole = graph.cache(32)
    expected, *_ = graph.step(ids, 0, whole, [len(ids) - 1])
    cache, start = graph.cache(32), 0
    for stop in (*cuts, len(ids)):
        logits, *_ = graph.step(ids[start:stop], start, cache, [stop - start - 1])
        start = stop
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cache, whole, rtol=1e-4, atol=1e-4)


def test_what_lies_beyond_the_valid_cache_does_not_matter(graph: Graph, ids: NDArray[np.int64]) -> None:
    clean, dirty = graph.cache(24), graph.cache(64)
    graph.step(ids[:10], 0, clean, [0])
    graph.step(ids[:10], 0, dirty, [0])
    dirty[..., 10:, :] = 50.0
    first, *_ = graph.step(ids[10:], 10, clean, [3])
    second, *_ = graph.step(ids[10:], 10, dirty, [3])
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_rolling_back_is_a_matter_of_the_counter(graph: Graph, ids: NDArray[np.int64]) -> None:
    cache = graph.cache(32)
    graph.step(ids[:12], 0, cache, [0])
    expected, *_ = graph.step(ids[12:15], 12, cache, [2])
    graph.step(ids[15:], 15, cache, [0])
    again, *_ = graph.step(ids[12:15], 12, cache, [2])
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_do_not_see_each_other(graph: Graph, ids: NDArray[np.int64]) -> None:
    other = np.roll(ids, 3)
    both, *_ = graph.step(np.stack([ids, other]), 0, graph.cache(32, batch=2), [5, len(ids) - 1])
    for row, single in zip(both, (ids, other), strict=True):
        alone, *_ = graph.step(single, 0, graph.cache(32), [5, len(ids) - 1])
        np.testing.assert_allclose(row, alone[0], rtol=1e-4, atol=1e-4)


def test_the_last_layer_computes_what_is_asked_for_alone(graph: Graph, ids: NDArray[np.int64]) -> None:
    every, *_ = graph.step(ids, 0, graph.cache(32), list(range(len(ids))))
    some, *_ = graph.step(ids, 0, graph.cache(32), [7, 2, 7])
    np.testing.assert_allclose(some, every[:, [7, 2, 7]], rtol=1e-4, atol=1e-4)
    nodes = onnx.load(graph.path, load_external_data=False).graph.node
    made_by = {output: node.op_type for node in nodes for output in node.output}
    inputs = [made_by[node.input[0]] for node in nodes if node.name.endswith("/attn/o_proj/MatMul")]
    assert inputs == ["GroupQueryAttention" if graph.provider else "Reshape"] * (len(inputs) - 1) + ["GatherND"] and len(inputs) > 1


def test_only_standard_operators_of_one_opset_but_for_attention_on_the_cpu(graph: Graph) -> None:
    model = onnx.load(graph.path, load_external_data=False)
    own = {node.op_type for node in model.graph.node if node.domain}
    assert own == ({"GroupQueryAttention"} if graph.provider else set())
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)] + [("com.microsoft", 1)] * bool(graph.provider)
    onnx.checker.check_model(graph.path)
