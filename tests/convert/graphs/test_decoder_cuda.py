"""The graph for onnxruntime's CUDA provider, run on its CPU provider, which has the same operators. It has not yet run on a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fastvlm_edge.backends.ort_session import session_options
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_edge.convert.graphs.decoder import has_cuda_graph
from fastvlm_edge.convert.precision import PLANS
from fastvlm_edge.convert.reference.decoder import reference_logits
from tests.convert.graphs.test_decoder import CONTEXT, PRECISIONS, RNG, Graph
from tests.support.checkpoints import write_checkpoint


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="native", tied=request.param)))


@pytest.fixture(scope="module")
def ids(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """Text, four rows of a picture, text."""
    vocab = checkpoint.text.vocab
    words = RNG.integers(0, vocab, 20)
    return np.concatenate([words[:5], vocab + np.arange(4), words[5:]])


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_chunks_and_single_steps_over_a_cache_of_the_whole_context(
    checkpoint: Checkpoint, ids: NDArray[np.int64], precision: str, tmp_path: Path
) -> None:
    graph = Graph(tmp_path, checkpoint, precision, provider="cuda")
    cache = graph.cache(CONTEXT)
    cache[:] = np.nan  # positions that were never written must not matter
    found = []
    for start, stop in ((0, 9), (9, 20), *((i, i + 1) for i in range(20, len(ids)))):
        logits, values, top, normalizer = graph.step(ids[start:stop], start, cache, range(stop - start))
        np.testing.assert_array_equal(values, -np.sort(-logits, axis=-1)[..., :64])
        np.testing.assert_array_equal(np.take_along_axis(logits, top, -1), values)
        np.testing.assert_allclose(normalizer, np.logaddexp.reduce(logits.astype(np.float64), axis=-1), atol=1e-4)
        found.append(logits[0])
    features = graph.features.astype(np.float32)
    expected, _ = reference_logits(checkpoint, ids.tolist(), features, list(range(len(ids))), lambda: None)
    difference = np.concatenate(found) - expected
    assert np.linalg.norm(difference) / np.linalg.norm(expected) < PRECISIONS[precision]


@pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 25),
    reason="before onnxruntime 1.25, FP16 products of integers are not joined (docs/run.md)",
)
@pytest.mark.parametrize(("precision", "bits"), [("int8", {8}), ("int4", {4, 8})])
def test_every_integer_matrix_becomes_one_product(checkpoint: Checkpoint, precision: str, bits: set[int], tmp_path: Path) -> None:
    """onnxruntime joins DequantizeLinear and MatMul for the CUDA provider by the same rule as for the CPU (DQMatMulToMatMulNBits)."""
    graph = Graph(tmp_path, checkpoint, precision, provider="cuda")
    options = session_options(tmp_path / "decoder.cuda.onnx", 1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(graph.path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    count = Counter(node.op_type for node in nodes)
    layers = checkpoint.text.layers
    assert (count["MatMulNBits"], count["GroupQueryAttention"]) == (4 * layers + 1, layers)
    assert not count["DequantizeLinear"] and not count["MatMul"] and not count["Gemm"]
    found = {each.i for node in nodes if node.op_type == "MatMulNBits" for each in node.attribute if each.name == "bits"}
    assert found == bits


def test_products_have_no_casts_and_the_host_needs_no_number_from_the_device(checkpoint: Checkpoint, tmp_path: Path) -> None:
    graph = Graph(tmp_path, checkpoint, "int4", provider="cuda")
    nodes = onnx.load(graph.path, load_external_data=False).graph.node
    makers = {output: node for node in nodes for output in node.output}
    for node in nodes:
        if node.op_type == "MatMul":
            assert makers[node.input[1]].op_type == "DequantizeLinear"
    attention = next(node for node in nodes if node.op_type == "GroupQueryAttention")
    total = makers[attention.input[6]]
    assert total.op_type == "Cast" and makers[total.input[0]].op_type == "Shape"


def test_only_plans_whose_attention_the_provider_has() -> None:
    assert {name for name, plan in PLANS.items() if has_cuda_graph(plan)} == {"fp16", "bf16", "int8", "int4"}
