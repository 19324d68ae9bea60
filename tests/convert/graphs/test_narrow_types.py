"""What the decoder graph loses in the types that it declares, with outliers planted into random weights as trained LLMs have them.

`tests/support/graph_interpreter.py` runs the graph with every value rounded, and again in float64. The graphs that rounded scores and
residual stream to the decoder's type fail these bounds; so do the faults at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.decoder import build_decoder
from fastvlm_edge.convert.precision import FLOAT_TYPES, FP16_MAX, LARGEST_SCORE, Magnitudes, PrecisionPlan, fit, precision_plan
from fastvlm_edge.convert.reference.decoder import reference_logits
from fastvlm_edge.convert.weights.decoder import write_decoder_weights
from tests.support.checkpoints import write_checkpoint
from tests.support.graph_interpreter import Interpreter

Array = npt.NDArray[Any]

BOUND = {"fp16": 3e-4, "bf16": 1e-2}
"""Mean KL divergence in nats from the float64 result, by the decoder's type: five times what it is without outliers (6e-5 and 2e-3)."""
SINK = 7
"""The token of the massive activations: LLMs have them in a few tokens, mostly the first one (arXiv 2402.17762)."""
DIRECTION, MASSIVE, CANCELLED = 11, 77, 3
"""Channels of the residual stream: where the sink token differs from all others, where it becomes massive, where large terms cancel."""
CAPACITY, CONTEXT = 64, 128
CHUNKS = ((0, 24), (24, 40), (40, 44))


@dataclass
class Planted(Checkpoint):
    """A checkpoint with some tensors replaced."""

    changes: dict[str, Array] = field(default_factory=dict)

    def tensor(self, name: str) -> Array:
        return self.changes[name] if name in self.changes else super().tensor(name)

    def tensor_rows(self, name: str, start: int, stop: int) -> Array:
        return self.changes[name][start:stop] if name in self.changes else super().tensor_rows(name, start, stop)

    def change(self, name: str) -> Array:
        """The tensor in float32, to be changed in place."""
        self.changes[name] = self.tensor(name).astype(np.float32)
        return self.changes[name]


def add_key_bias(planted: Planted, score: float) -> None:
    """Biases on queries and keys that add `score` to every product of the first and the last layer.

    The channels turn slowest with the position and have no other input, and 256 is exact in every type. So all keys are the same there, and
    what is lost is lost in the scores.
    """
    text, bias = planted.text, 256.0
    half = text.head_dim // 2
    slow = slice(half - 4, half)
    for layer in (0, text.layers - 1):
        for part, heads, value in (("q", text.heads, score * text.head_dim**0.5 / bias / 4), ("k", text.kv_heads, bias)):
            path = f"llm.layers.{layer}.self_attn.{part}_proj"
            planted.change(f"{path}.bias").reshape(heads, -1)[:, slow] = value
            planted.change(f"{path}.weight").reshape(heads, text.head_dim, -1)[:, slow] = 0


def add_massive_activation(planted: Planted, products: tuple[float, float], added: tuple[float, float]) -> None:
    """In each of the first two layers, one neuron of the MLP makes gate * up of about `products`, for the sink token only.

    It adds `added` to the channel MASSIVE, which nothing else writes.
    """
    text = planted.text
    embedding = planted.change("llm.embed_tokens.weight")
    embedding[:, [DIRECTION, MASSIVE]] = 0
    embedding[SINK, DIRECTION] = 40
    for layer in range(text.layers):
        planted.change(f"llm.layers.{layer}.self_attn.o_proj.weight")[[DIRECTION, MASSIVE]] = 0
        planted.change(f"llm.layers.{layer}.mlp.down_proj.weight")[[DIRECTION, MASSIVE]] = 0
    for layer, (channel, product, amount) in enumerate(zip((DIRECTION, MASSIVE), products, added, strict=True)):
        for part in ("gate", "up"):
            row = planted.change(f"llm.layers.{layer}.mlp.{part}_proj.weight")[0]
            row[:] = 0
            row[channel] = math.sqrt(product / text.hidden)  # the norm makes the outlier sqrt(hidden)
        column = planted.change(f"llm.layers.{layer}.mlp.down_proj.weight")[:, 0]
        column[:] = 0
        column[MASSIVE] = amount / product


def add_large_residual(planted: Planted) -> None:
    """The residual stream exceeds FP16; each branch that is added to it does not."""
    add_massive_activation(planted, (7000, 7000), (50_000, 45_000))


def add_large_product(planted: Planted) -> None:
    """gate * up exceeds FP16; what the MLP adds to the residual stream does not."""
    add_massive_activation(planted, (7000, 93_000), (3000, 3000))


def add_cancelling_terms(planted: Planted) -> None:
    """Two terms of a sum in down_proj exceed FP16; their sum, and what is multiplied, does not."""
    add_massive_activation(planted, (7000, 1000), (3000, 0))
    for part in ("gate", "up"):
        rows = planted.changes[f"llm.layers.1.mlp.{part}_proj.weight"]
        rows[300] = rows[0]
    down = planted.changes["llm.layers.1.mlp.down_proj.weight"]
    down[:, 300] = 0
    down[CANCELLED, [0, 300]] = 100, -99.75


PLANTS: dict[str, Callable[[Planted], None]] = {
    "nothing": lambda planted: None,
    "scores of 2000": lambda planted: add_key_bias(planted, 2000),
    "scores below the limit": lambda planted: add_key_bias(planted, LARGEST_SCORE["fp16"] - 14),
    "large residual": add_large_residual,
    "large product": add_large_product,
    "cancelling terms": add_cancelling_terms,
}


class Model:
    """The graph of a planted checkpoint for a plan."""

    def __init__(self, checkpoint: Planted, plan: PrecisionPlan, folder: Path) -> None:
        self.text, self.dtype = checkpoint.text, np.dtype(FLOAT_TYPES[plan.decoder])
        weights = WeightsFile(folder / "decoder.weights")
        write_decoder_weights(checkpoint, plan, weights, lambda: None, context=CONTEXT)
        weights.close()
        graph = GraphBuilder("decoder", weights)
        build_decoder(graph, checkpoint.text, plan)
        self.path = folder / "decoder.onnx"
        graph.save(self.path)
        self._exact: npt.NDArray[np.float64] | None = None

    def divergence(self, talk: Talk, **options: Any) -> float:
        """Mean KL divergence in nats of the graph's answers from its own in float64; infinite if one of them is not a number."""
        if self._exact is None:
            self._exact = self._answers(talk, Interpreter(self.path, exact=True))
        found = self._answers(talk, Interpreter(self.path, **options))
        divergence = float((np.exp(self._exact) * (self._exact - found)).sum(-1).mean())
        return divergence if math.isfinite(divergence) else math.inf

    def _answers(self, talk: Talk, interpreter: Interpreter) -> npt.NDArray[np.float64]:
        """Log-probabilities [positions, vocab] of the conversation in three chunks, the last two of which read the cache."""
        text, dtype = self.text, np.dtype(np.float64) if interpreter.exact else self.dtype
        cache = np.zeros((text.layers, 2, 1, text.kv_heads, CAPACITY, text.head_dim), dtype)
        logits = []
        for start, stop in CHUNKS:
            feeds = {
                "input_ids": talk.ids[None, start:stop],
                "position_ids": np.arange(start, stop)[None],
                "image_features": talk.features.astype(dtype),
                "logit_positions": np.arange(stop - start)[None],
            }
            for layer in range(text.layers):
                feeds |= {f"past_key_values.{layer}.{part}": cache[layer, index] for index, part in enumerate(("key", "value"))}
            values = interpreter.run(feeds)
            cache[..., start:stop, :] = values["kv_new"]
            logits.append(values["logits"][0])
        return _log_softmax(np.concatenate(logits).astype(np.float64))


@dataclass(frozen=True)
class Talk:
    """A conversation with four rows of a picture; the first id is the sink token."""

    ids: npt.NDArray[np.int64]
    features: npt.NDArray[np.float32]


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        logits = logits - logits.max(-1, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="native")))


@pytest.fixture(scope="module")
def talk(checkpoint: Checkpoint) -> Talk:
    rng = np.random.default_rng(0)
    words = rng.integers(SINK + 1, 500, 40)
    ids = np.concatenate([[SINK], words[1:5], checkpoint.text.vocab + np.arange(4), words[5:]])
    features = rng.standard_normal((4, checkpoint.text.hidden)).astype(np.float32)
    features[:, [DIRECTION, MASSIVE]] = 0
    return Talk(ids, features)


class Planter:
    """Checkpoints, plans and graphs by what is planted; each is made once."""

    def __init__(self, checkpoint: Checkpoint, talk: Talk, folder: Path) -> None:
        self.checkpoint, self.talk, self.folder = checkpoint, talk, folder
        self._planted: dict[str, tuple[Planted, Magnitudes]] = {}
        self._models: dict[Path, Model] = {}

    def planted(self, name: str) -> tuple[Planted, Magnitudes]:
        if name not in self._planted:
            planted = Planted(**vars(self.checkpoint))
            PLANTS[name](planted)
            self._planted[name] = planted, reference_logits(planted, self.talk.ids.tolist(), self.talk.features, [0], lambda: None)[1]
        return self._planted[name]

    def plan(self, name: str, precision: str) -> PrecisionPlan:
        """The plan that a conversion would choose."""
        return fit(precision_plan(precision), {}, self.planted(name)[1])

    def divergence(self, name: str, plan: PrecisionPlan, **options: Any) -> float:
        folder = self.folder / f"{name}-{plan.name}-{len(plan.wide_scores)}-{len(plan.up_shifts)}"
        if folder not in self._models:
            folder.mkdir()
            self._models[folder] = Model(self.planted(name)[0], plan, folder)
        return self._models[folder].divergence(self.talk, **options)


@pytest.fixture(scope="module")
def planter(checkpoint: Checkpoint, talk: Talk, tmp_path_factory: pytest.TempPathFactory) -> Planter:
    return Planter(checkpoint, talk, tmp_path_factory.mktemp("graphs"))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "bf16"])
@pytest.mark.parametrize("name", PLANTS)
def test_the_answer_survives_in_the_declared_types(planter: Planter, name: str, precision: str) -> None:
    plan = planter.plan(name, precision)
    assert planter.divergence(name, plan) < BOUND[plan.decoder]


def test_the_outliers_are_where_they_were_planted(planter: Planter) -> None:
    seen = {name: planter.planted(name)[1] for name in PLANTS}
    assert max(seen["nothing"].scores) < LARGEST_SCORE["fp16"] / 2
    assert min(seen["scores of 2000"].scores[0], seen["scores of 2000"].scores[-1]) > 1900
    assert 24 < max(seen["scores below the limit"].scores) < LARGEST_SCORE["fp16"]
    residual = seen["large residual"]
    assert max(residual.residual) > FP16_MAX > max(*residual.mlp, *residual.attention, *residual.product)
    product = seen["large product"]
    assert max(product.product) > FP16_MAX > max(product.residual)
    cancelling = seen["cancelling terms"]
    assert max(cancelling.product) * 100 > FP16_MAX > max(*cancelling.mlp, *cancelling.residual)


# Faults -------------------------------------------------------------------------------------------------------------------------


def rounded_to(dtype: npt.DTypeLike, *endings: str) -> Callable[[str], npt.DTypeLike | None]:
    return lambda node: dtype if node.endswith(endings) else None


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "scores in FP16": ("scores of 2000", {"rounded": rounded_to(np.float16, "/attn/scores/MatMul", "/attn/scores/Add")}),
    "residual stream in FP16": ("large residual", {"rounded": rounded_to(np.float16, "/residual/Add")}),
    "sums of scores in FP16": ("scores of 2000", {"narrow_sums": "all"}),
    "sums of down_proj in FP16": ("cancelling terms", {"narrow_sums": "all"}),
}


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_narrower_type_would_be_found(planter: Planter, fault: str, precision: str) -> None:
    name, options = FAULTS[fault]
    assert planter.divergence(name, planter.plan(name, precision), **options) > 10 * BOUND["fp16"]


@pytest.mark.parametrize("name", ["scores of 2000", "large product"])
def test_a_plan_that_ignores_the_probe_would_be_found(planter: Planter, name: str) -> None:
    plan = replace(planter.plan(name, "fp16"), wide_scores=frozenset(), up_shifts={})
    assert planter.divergence(name, plan) > 10 * BOUND["fp16"]
