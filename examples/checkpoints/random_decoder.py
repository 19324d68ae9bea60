"""Write the decoder of a random checkpoint as `fastvlm-edge convert` writes it, without encoder, tokenizer and comparison.

A few layers of a released size take a second, the whole 0.5B some twenty. It serves to see what a builder makes of the graph.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from examples.checkpoints.random_checkpoint import POOL, SIZES, RandomWeights
from fastvlm_edge.convert.checkpoint.checkpoint import Checkpoint, TextConfig
from fastvlm_edge.convert.checkpoint.structure import expected_shapes
from fastvlm_edge.convert.graphs.builder import GraphBuilder, WeightsFile
from fastvlm_edge.convert.graphs.decoder import CANDIDATES, build_decoder
from fastvlm_edge.convert.precision import FLOAT_TYPES, NUMPY_NAMES, PrecisionPlan, precision_plan
from fastvlm_edge.convert.weights.decoder import write_decoder_weights
from fastvlm_edge.convert.weights.round_to_nearest import Quantized, stored_type
from fastvlm_edge.model_dir.manifest import DecoderSpec, Manifest, Source, TextSpec, VisionSpec

CONTEXT = 4096


class RandomTensors:
    """The tensors of a decoder by canonical name, for `write_decoder_weights`."""

    def __init__(self, size: str, text: TextConfig) -> None:
        spec = SIZES[size]
        self.text = text
        self.shapes = expected_shapes(spec.vision, text, train_form=False)
        self.weights = RandomWeights(0, replace(spec, tokens=min(spec.tokens, text.vocab)), "float32", tied=text.tied)

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """All values of a tensor, float32."""
        return np.concatenate(list(self.weights.blocks(name, self.shapes[name]))).reshape(self.shapes[name])

    def tensor_rows(self, name: str, start: int, end: int) -> npt.NDArray[Any]:
        """Rows of the embedding or head, float32. The same rows for every `start`: only their number matters here."""
        rows, hidden = end - start, self.shapes[name][1]
        return np.resize(_turned(self.weights.pool, name), (rows, hidden)) / np.float32(hidden**0.5)


class RandomIntegers:
    """Integers for the matrices that a plan does not store as floats, instead of rounding each of them: `QuantizedMatrices`."""

    def __init__(self, text: TextConfig, plan: PrecisionPlan) -> None:
        queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
        self.scale_type = np.dtype(FLOAT_TYPES[plan.decoder])
        self.plan = plan
        self.pool = np.random.default_rng(0).integers(-7, 8, POOL, dtype=np.int8)
        self.shapes = {
            "qkv": (text.hidden, queries + 2 * keys),
            "o_proj": (queries, text.hidden),
            "gate_up": (text.hidden, 2 * text.intermediate),
            "down": (text.intermediate, text.hidden),
            "head": (text.hidden, text.vocab),
        }

    def matrix(self, name: str) -> Quantized:
        """Integers [inputs, outputs] and scales of a matrix."""
        part = name.rpartition(".")[2]
        inputs, outputs = self.shapes[part]
        kind = stored_type(self.plan.head if part == "head" else self.plan.body, inputs)
        values = np.resize(_turned(self.pool, name), (inputs, outputs))
        scales = np.full((inputs // kind.block, outputs) if kind.block else outputs, inputs**-0.5 / 4, np.float32)
        return Quantized(values.astype(ml_dtypes.int4) if kind.bits == 4 else values, scales)


def _turned(pool: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """The pool from another start for each name: TensorRT stores equal matrices once."""
    return np.roll(pool, zlib.crc32(name.encode()) % POOL)


def write_decoder(
    directory: Path, precision: str, *, size: str = "0.5b", layers: int = 0, vocab: int = 0, wide_scores: Collection[int] = ()
) -> Manifest:
    """Write `decoder.onnx` and `decoder.weights` into `directory`, and return a manifest of the shapes that an engine is built for.

    `size` is a key of `random_checkpoint.SIZES`. `layers` and `vocab` are those of the size if they are 0. `wide_scores` are the layers
    whose attention scores stay in FP32.
    """
    spec = SIZES[size]
    text = replace(spec.text(vocab or spec.rows, tied=spec.tied), layers=layers or spec.layers)
    plan = replace(precision_plan(precision), wide_scores=frozenset(wide_scores))
    directory.mkdir(parents=True, exist_ok=True)
    weights = WeightsFile(directory / "decoder.weights")
    source = cast(Checkpoint, RandomTensors(size, text))
    write_decoder_weights(source, plan, weights, lambda: None, RandomIntegers(text, plan) if plan.body.bits else None, context=CONTEXT)
    weights.close()
    graph = GraphBuilder("decoder", weights)
    build_decoder(graph, text, plan)
    graph.save(directory / "decoder.onnx")
    return describe(size, precision, text)


def describe(size: str, precision: str, text: TextConfig) -> Manifest:
    """A manifest whose sizes are true; it names no files."""
    spec = SIZES[size]
    tokens = (spec.image_size // 64) ** 2
    dtype = NUMPY_NAMES[precision_plan(precision).decoder]
    decoder = DecoderSpec(
        text.layers,
        text.kv_heads,
        text.head_dim,
        text.hidden,
        text.vocab,
        CONTEXT,
        CANDIDATES,
        dtype,
        text.heads,
        text.intermediate,
    )
    return Manifest(
        name=f"random {size}",
        toolkit_version="",
        source=Source("", "", {}),
        precision=precision,
        plan={},
        vision=VisionSpec(spec.image_size, "pad", tokens, text.hidden),
        decoder=decoder,
        text=TextSpec("", [], text.vocab),
        files={},
    )
