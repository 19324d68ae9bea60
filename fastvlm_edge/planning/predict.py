"""What a board will do with a model: memory, times and energy, from the work, the board's limits and the fitted efficiencies."""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm_edge.model_dir.manifest import STRIDE
from fastvlm_edge.planning.boards import Board, Mode
from fastvlm_edge.planning.fit import THOR, Efficiency
from fastvlm_edge.planning.published import MEASURED_SHARE_OF_POWER
from fastvlm_edge.planning.workload import (
    FP16,
    PRECISIONS,
    Shape,
    VisionShape,
    decode_bytes,
    prefill_macs,
    vision_work,
    weight_bytes,
)

DECODE = Efficiency(slope=1.3138, constant_ms=0.4853)
PREFILL = Efficiency(slope=1.765, constant_ms=18.4312)
PREFILL_ON_THOR = Efficiency(slope=10.04, constant_ms=7.3633)
VISION = Efficiency(slope=1.724, constant_ms=7.1628)
RUNTIME_BYTES = 1.0929e9
"""System, CUDA and TensorRT. All of these are what `fit` makes of the published rows (`benchmarks/plan_error.py`); a test sees to it."""
MEDIAN_ERROR = {"decode": 0.14, "prefill": 0.106, "vision": 0.293}
SPREAD = {"decode": 0.231, "prefill": 0.153, "vision": 0.42}
"""Of rows of a model or encoder that the fit had not seen (`benchmarks/results/plan_error.json`): the median error, and what four of five
rows stay within, which is the range of each prediction. Only two encoders are published, so vision's is wide."""

USABLE = 0.925
"""Of a board's memory: an Orin Nano of 8 GiB shows 7.4."""
TEXT_TOKENS = 34
"""Of the question and the conversation around it."""
REPLY = 64
"""Tokens into the reply at which decoding is predicted."""
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Prediction:
    """Of one precision, image size and context on one board. Bytes, milliseconds, joules."""

    precision: str
    image_size: int
    context: int
    build_bytes: float
    run_bytes: float
    cache_bytes: float
    """Of them, for `context` positions."""
    available_bytes: float
    vision_ms: float
    prefill_ms: float
    tokens_per_second: float
    joules_per_token: float

    @property
    def ttft_ms(self) -> float:
        """To the first token, without reading and resizing the picture."""
        return self.vision_ms + self.prefill_ms

    @property
    def ttft_range_ms(self) -> tuple[float, float]:
        """Where four of five models that were not fitted would lie."""
        off = SPREAD["vision"] * self.vision_ms + SPREAD["prefill"] * self.prefill_ms
        return self.ttft_ms - off, self.ttft_ms + off

    @property
    def tokens_per_second_range(self) -> tuple[float, float]:
        """Likewise."""
        return self.tokens_per_second / (1 + SPREAD["decode"]), self.tokens_per_second / (1 - SPREAD["decode"])

    @property
    def runs(self) -> bool:
        """Whether it fits while it answers."""
        return self.run_bytes <= self.available_bytes

    @property
    def builds(self) -> bool:
        """Whether its engines can be built in memory alone."""
        return self.build_bytes <= self.available_bytes


def predict(shape: Shape, board: Board, mode: Mode, precision: str, image_size: int, context: int, build_peak: float) -> Prediction:
    """`build_peak`: bytes of the process while it builds the larger engine, as engines/memory.py predicts them."""
    weights, text = PRECISIONS[precision], shape.text
    vision = vision_work(shape.vision, text.hidden, image_size)
    rate = board.fp16_rate(mode)
    tokens = (-(-image_size // STRIDE)) ** 2
    positions = tokens + TEXT_TOKENS
    # What is one channel a group moves bytes; dense products compute.
    moving = DECODE.slope * FP16 * vision.moved / mode.bandwidth * 1e3
    vision_ms = VISION.milliseconds(2 * (vision.dense + vision.grouped) / rate * 1e3) + moving
    prefill = PREFILL_ON_THOR if board.name == THOR else PREFILL
    prefill_ms = prefill.milliseconds(2 * prefill_macs(text, positions) / rate * 1e3)
    decode_ms = DECODE.milliseconds(decode_bytes(text, weights.body, weights.head, positions + REPLY) / mode.bandwidth * 1e3)
    stored = sum(weight_bytes(shape, weights, image_size).values())
    run = stored + text.cache_bytes(context) + activation_bytes(shape, image_size) + RUNTIME_BYTES
    return Prediction(
        precision,
        image_size,
        context,
        build_bytes=build_peak + RUNTIME_BYTES,
        run_bytes=run,
        cache_bytes=text.cache_bytes(context),
        available_bytes=USABLE * board.memory,
        vision_ms=vision_ms,
        prefill_ms=prefill_ms,
        tokens_per_second=1e3 / decode_ms,
        joules_per_token=mode.watts * MEASURED_SHARE_OF_POWER * decode_ms / 1e3,
    )


def activation_bytes(shape: Shape, image_size: int) -> float:
    """FP16, of the larger of both graphs: the widest block of the encoder, or a chunk of a prompt with the logits of one position."""
    vision: VisionShape = shape.vision
    widest = max(dim * (image_size // (4 << index)) ** 2 for index, dim in enumerate(vision.dims))
    text = shape.text
    chunk = PREFILL_CHUNK * (4 * text.hidden + 3 * text.intermediate) + 2 * text.vocab
    return FP16 * max(widest * (vision.mlp_ratio + 2), chunk)
