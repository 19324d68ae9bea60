"""Multiply-accumulates and bytes of FastVLM, in closed form from its shapes; a test holds them to the graphs that the converter writes,
for a picture and for one token. Of a prompt they are a little more, see `prefill_macs`."""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.manifest import STRIDE, Manifest

FP32 = 4.0
FP16 = 2.0
INT8 = 1.0
INT4 = 0.5 + FP16 / 128
"""Bytes of a weight with its share of a scale for 128 of them."""


@dataclass(frozen=True)
class VisionShape:
    """FastViTHD (arXiv 2412.13303, section 3) and projector."""

    dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    out_dim: int = 3072
    se_dim: int = 192
    mlp_ratio: int = 4


@dataclass(frozen=True)
class TextShape:
    """A decoder of the Qwen2 kind."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def body(self) -> int:
        """Weights of all layers' matrices."""
        attention = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim + self.heads * self.head_dim * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Weights of the head, and of the embedding."""
        return self.hidden * self.vocab

    def cache_bytes(self, positions: int) -> int:
        """Of keys and values in FP16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * int(FP16) * positions


@dataclass(frozen=True)
class Shape:
    """A FastVLM."""

    name: str
    text: TextShape
    vision: VisionShape = VisionShape()


SIZES = {
    "0.5b": Shape("0.5b", TextShape(24, 896, 14, 2, 64, 4864, 151936)),
    "1.5b": Shape("1.5b", TextShape(28, 1536, 12, 2, 128, 8960, 151936)),
    "7b": Shape("7b", TextShape(28, 3584, 28, 4, 128, 18944, 152064)),
}
"""The released sizes: FastViTHD with Qwen2-0.5B, 1.5B and 7B (arXiv 2412.13303, section 4; config.json of the Qwen2 models)."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a weight by part, for one `--precision` on a GPU (docs/precision.md)."""

    vision: float
    late_vision: float
    """From stage 5 on, which is FP32 where the rest is FP16 (docs/precision.md)."""
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
    """The shape of a model directory. Raises FastVLMError where it was converted before the manifest had all sizes."""
    decoder, vision = manifest.decoder, manifest.vision
    if not (decoder.heads and decoder.intermediate and vision.dims):
        raise FastVLMError(
            f"the manifest of {manifest.name} has not all sizes, it was written by an earlier version; convert the checkpoint again, "
            f"or plan for one of: {', '.join(SIZES)}"
        )
    text = TextShape(decoder.layers, decoder.hidden, decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.intermediate, decoder.vocab)
    return Shape(manifest.name, text, VisionShape(tuple(vision.dims), tuple(vision.depths), vision.out_dim, vision.se_dim))


@dataclass(frozen=True)
class VisionWork:
    """Of one picture."""

    dense: int
    """Multiply-accumulates of dense convolutions and matrix products."""
    grouped: int
    """Of convolutions with one channel a group, which are bound by memory."""
    moved: int
    """Elements that the grouped convolutions, norms, residuals and transpositions read and write."""
    weights: int
    late_weights: int
    """Of them, from stage 5 on."""


def vision_work(shape: VisionShape, hidden: int, image_size: int) -> VisionWork:
    """FastViTHD and projector at `image_size` pixels: 243.4 billion multiply-accumulates at 1024 for the released shape."""
    dims, side = shape.dims, -(-image_size // 4)
    dense = grouped = moved = weights = 0

    def product(inputs: int, outputs: int, positions: int) -> None:
        nonlocal dense, weights
        dense += inputs * outputs * positions
        weights += inputs * outputs

    def per_channel(channels: int, kernel: int, positions: int, reads: int) -> None:
        nonlocal grouped, moved, weights
        grouped += channels * kernel**2 * positions
        moved += reads + channels * positions
        weights += channels * kernel**2

    first = dims[0]
    half = -(-image_size // 2)
    dense += 3 * first * 9 * half**2
    weights += 3 * first * 9
    per_channel(first, 3, side**2, first * half**2)
    product(first, first, side**2)
    early = 0
    for index, (dim, depth) in enumerate(zip(dims, shape.depths, strict=True)):
        if index == len(dims) - 1:
            early = weights
        if index:
            before, side = dims[index - 1] * side**2, -(-side // 2)
            per_channel(dim, 7, side**2, before)
            product(dim, dim, side**2)
        positions = side**2
        if index >= 3:
            per_channel(dim, 7, positions, dim * positions)
        for _ in range(depth):
            if index >= 3:
                product(dim, 3 * dim, positions)
                dense += 2 * dim * positions**2  # scores and sum of all heads
                product(dim, dim, positions)
                moved += 6 * dim * positions  # norm, two transpositions
            else:
                per_channel(dim, 3, positions, dim * positions)
            per_channel(dim, 7, positions, dim * positions)
            product(dim, shape.mlp_ratio * dim, positions)
            product(shape.mlp_ratio * dim, dim, positions)
            moved += 3 * dim * positions  # residual
    per_channel(shape.out_dim, 3, side**2, dims[-1] * side**2)
    product(shape.out_dim, shape.se_dim, 1)
    product(shape.se_dim, shape.out_dim, 1)
    tokens = (-(-image_size // STRIDE)) ** 2
    product(shape.out_dim, hidden, tokens)
    product(hidden, hidden, tokens)
    return VisionWork(dense, grouped, moved, weights, weights - early)


def prefill_macs(text: TextShape, positions: int) -> int:
    """Multiply-accumulates of a prompt: matrices, causal attention as it is computed (all pairs), and the head once.

    This is the work of the programs that predictions are fitted to. Our graph does less: in the last layer all positions but the last end
    after the attention. That is some 4 % of 24 layers, well within the error of a prediction.
    """
    return text.body * positions + 2 * text.layers * text.heads * text.head_dim * positions**2 + text.head


def decode_bytes(text: TextShape, body: float, head: float, positions: int) -> float:
    """Bytes that one decoded token reads: body and head, of so many bytes a weight, and the cache."""
    return text.body * body + text.head * head + text.cache_bytes(positions)


def weight_bytes(shape: Shape, weights: Weights, image_size: int) -> dict[str, float]:
    """Bytes of the weights of each graph; norms and biases, under a thousandth, are left out."""
    vision = vision_work(shape.vision, shape.text.hidden, image_size)
    text = shape.text
    return {
        "vision": (vision.weights - vision.late_weights) * weights.vision + vision.late_weights * weights.late_vision,
        "decoder": text.body * weights.body + text.head * (weights.head + weights.embedding),
    }
