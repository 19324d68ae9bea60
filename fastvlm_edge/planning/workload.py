"""Multiply-accumulates and bytes of FastVLM, in closed form from its shapes.

A test compares them with the graphs that the converter writes, for a picture and for one token. For a prompt they are a little higher, see
`prefill_macs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import STRIDE, Manifest

FP32 = 4.0
FP16 = 2.0
INT8 = 1.0
INT4 = 0.5 + FP16 / 128
"""Bytes per weight, including its share of an FP16 scale for 128 weights."""


@dataclass(frozen=True)
class VisionShape:
    """Sizes of FastViTHD (arXiv 2412.13303, section 3): channels and blocks of each stage, then of the last convolution and its gate."""

    dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    out_dim: int = 3072
    se_dim: int = 192
    mlp_ratio: int = 4


@dataclass(frozen=True)
class TextShape:
    """Sizes of a decoder with the architecture of Qwen2."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    fp32_scores: int = 0
    """Layers of a 16-bit decoder whose attention scores are FP32. A conversion chooses them; for the released sizes none is assumed."""

    @property
    def body(self) -> int:
        """Number of weights in the matrices of all layers."""
        attention = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim + self.heads * self.head_dim * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Number of weights of the head; the embedding has as many."""
        return self.hidden * self.vocab

    def cache_bytes(self, positions: int) -> int:
        """Bytes of keys and values in FP16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * int(FP16) * positions


@dataclass(frozen=True)
class Shape:
    """Sizes of a FastVLM model."""

    name: str
    text: TextShape
    vision: VisionShape = VisionShape()
    max_positions: int = 32768
    """Positions that the LLM was trained for, here those of the released sizes; 0 if it is not known."""


SIZES = {
    "0.5b": Shape("0.5b", TextShape(24, 896, 14, 2, 64, 4864, 151936)),
    "1.5b": Shape("1.5b", TextShape(28, 1536, 12, 2, 128, 8960, 151936)),
    "7b": Shape("7b", TextShape(28, 3584, 28, 4, 128, 18944, 152064)),
}
"""The released sizes: FastViTHD with Qwen2-0.5B, 1.5B and 7B (arXiv 2412.13303, section 4; config.json of the Qwen2 models)."""


@dataclass(frozen=True)
class Weights:
    """Bytes per weight of each part, for one `--precision` on a GPU (docs/precision.md)."""

    vision: float
    late_vision: float
    """From stage 5 on, which stays FP32 if the rest is FP16 (docs/precision.md)."""
    body: float
    head: float
    embedding: float


PRECISIONS = {
    "fp16": Weights(FP16, FP32, FP16, FP16, FP16),
    "bf16": Weights(FP16, FP16, FP16, FP16, FP16),
    "int8": Weights(INT8, INT8, INT8, INT8, INT8),
    "int4": Weights(INT8, INT8, INT4, INT8, INT8),
}


def shape_of(manifest: Manifest) -> Shape:
    """Shape of a model directory. Raises FastVLMError if it was converted by a version whose manifest lacks some sizes."""
    decoder, vision = manifest.decoder, manifest.vision
    if not (decoder.heads and decoder.intermediate and vision.dims):
        raise FastVLMError(
            f"the manifest of {manifest.name} lacks some sizes, because an earlier version wrote it",
            f"convert the checkpoint again, or plan for one of: {', '.join(SIZES)}",
        )
    text = TextShape(
        decoder.layers,
        decoder.hidden,
        decoder.heads,
        decoder.kv_heads,
        decoder.head_dim,
        decoder.intermediate,
        decoder.vocab,
        fp32_scores=len(manifest.activations.get("fp32_scores", ())),
    )
    return Shape(
        manifest.name, text, VisionShape(tuple(vision.dims), tuple(vision.depths), vision.out_dim, vision.se_dim), decoder.max_positions
    )


@dataclass
class VisionWork:
    """Work of the encoder and projector for one picture."""

    dense: int = 0
    """Multiply-accumulates of dense convolutions and matrix products."""
    grouped: int = 0
    """Multiply-accumulates of convolutions with one channel per group, which are bound by memory."""
    moved: int = 0
    """Elements that the grouped convolutions, norms, residuals and transpositions read and write."""
    weights: int = 0
    late_weights: int = 0
    """The part of `weights` from stage 5 on."""

    def product(self, inputs: int, outputs: int, positions: int) -> None:
        """Add a matrix product, which is also a 1 x 1 convolution, at every position."""
        self.dense += inputs * outputs * positions
        self.weights += inputs * outputs

    def per_channel(self, channels: int, kernel: int, positions: int, reads: int) -> None:
        """Add a convolution with one channel per group; `positions` are those of its output, `reads` the elements of its input."""
        self.grouped += channels * kernel**2 * positions
        self.moved += reads + channels * positions
        self.weights += channels * kernel**2


def vision_work(shape: VisionShape, hidden: int, image_size: int) -> VisionWork:
    """FastViTHD and projector at `image_size` pixels: 243.4 billion multiply-accumulates at 1024 for the released shape."""
    work = VisionWork()
    side = _stem(work, shape.dims[0], image_size)
    before_last = 0
    for index, (dim, depth) in enumerate(zip(shape.dims, shape.depths, strict=True)):
        if index == len(shape.dims) - 1:
            before_last = work.weights
        if index:
            reads, side = shape.dims[index - 1] * side**2, -(-side // 2)
            work.per_channel(dim, 7, side**2, reads)
            work.product(dim, dim, side**2)
        has_attention = index >= 3
        if has_attention:  # positions by a convolution
            work.per_channel(dim, 7, side**2, dim * side**2)
        for _ in range(depth):
            _block(work, dim, side**2, shape.mlp_ratio, attention=has_attention)
    work.per_channel(shape.out_dim, 3, side**2, shape.dims[-1] * side**2)
    work.product(shape.out_dim, shape.se_dim, 1)
    work.product(shape.se_dim, shape.out_dim, 1)
    tokens = (-(-image_size // STRIDE)) ** 2
    work.product(shape.out_dim, hidden, tokens)
    work.product(hidden, hidden, tokens)
    work.late_weights = work.weights - before_last
    return work


def _stem(work: VisionWork, channels: int, image_size: int) -> int:
    """Add the three convolutions that make a quarter of the resolution; returns the side of their output."""
    half, side = -(-image_size // 2), -(-image_size // 4)
    work.dense += 3 * channels * 9 * half**2
    work.weights += 3 * channels * 9
    work.per_channel(channels, 3, side**2, channels * half**2)
    work.product(channels, channels, side**2)
    return side


def _block(work: VisionWork, dim: int, positions: int, mlp_ratio: int, *, attention: bool) -> None:
    """Add one block: attention or a convolution over 3 x 3 positions, then a convolution over 7 x 7 and an MLP."""
    if attention:
        work.product(dim, 3 * dim, positions)
        work.dense += 2 * dim * positions**2  # scores and sum of all heads
        work.product(dim, dim, positions)
        work.moved += 6 * dim * positions  # norm, two transpositions
    else:
        work.per_channel(dim, 3, positions, dim * positions)
    work.per_channel(dim, 7, positions, dim * positions)
    work.product(dim, mlp_ratio * dim, positions)
    work.product(mlp_ratio * dim, dim, positions)
    work.moved += 3 * dim * positions  # residual


def prefill_macs(text: TextShape, positions: int) -> int:
    """Multiply-accumulates of a prompt: matrices, causal attention as it is computed (all pairs), and the head once.

    This is the work of the programs that predictions are fitted to. Our graph does less: in the last layer, all positions but the last end
    after the attention. With 24 layers that is about 4 %, well within the error of a prediction.
    """
    return text.body * positions + 2 * text.layers * text.heads * text.head_dim * positions**2 + text.head


def decode_bytes(text: TextShape, body: float, head: float, positions: int) -> float:
    """Bytes that are read for one decoded token: weights and KV cache. `body` and `head` are bytes per weight."""
    return text.body * body + text.head * head + text.cache_bytes(positions)


def weight_bytes(shape: Shape, weights: Weights, image_size: int) -> dict[str, float]:
    """Bytes of the weights of each graph, without norms, biases and rotary tables, which are less than a hundredth."""
    vision = vision_work(shape.vision, shape.text.hidden, image_size)
    text = shape.text
    return {
        "vision": (vision.weights - vision.late_weights) * weights.vision + vision.late_weights * weights.late_vision,
        "decoder": text.body * weights.body + text.head * (weights.head + weights.embedding),
    }
