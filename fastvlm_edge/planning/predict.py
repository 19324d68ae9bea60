"""Predict memory, times and energy of a model on a board, from the work, the limits of the board and the fitted efficiencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastvlm_edge.machine.boards.rates import Board, Mode
from fastvlm_edge.model_dir.manifest import visual_tokens
from fastvlm_edge.planning.workload import (
    FP16,
    FP32,
    PRECISIONS,
    Shape,
    decode_bytes,
    prefill_macs,
    vision_work,
    weight_bytes,
)

THOR = "thor"
"""Board whose prefill is fitted separately: it reaches far less of its rate."""


@dataclass(frozen=True)
class Efficiency:
    """How near one stage comes to the limit of the board: slope 1 and constant 0 would be the limit itself."""

    slope: float
    constant_ms: float

    def milliseconds(self, ideal_ms: float) -> float:
        """Predicted time of work that takes `ideal_ms` at the limit of the board."""
        return self.slope * ideal_ms + self.constant_ms


DECODE = Efficiency(slope=1.3138, constant_ms=0.4853)
PREFILL = Efficiency(slope=1.765, constant_ms=18.4312)
PREFILL_ON_THOR = Efficiency(slope=10.04, constant_ms=7.3633)
VISION = Efficiency(slope=1.724, constant_ms=7.1628)
RUNTIME_BYTES = 1.0929e9
"""Memory of system, CUDA and TensorRT. `benchmarks/plan_error.py` fits it and the efficiencies to published rows; a test compares them."""
MEDIAN_ERROR = {"decode": 0.14, "prefill": 0.106, "vision": 0.293}
SPREAD = {"decode": 0.231, "prefill": 0.153, "vision": 0.42}
"""Median error, and the error that 80 % of the rows stay within, for models and encoders that were not in the fit
(`benchmarks/results/plan_error.json`). The second is the range of each prediction. Only two encoders are published, so the range of vision
is wide."""
MEASURED_SHARE_OF_POWER = 21.1 / 25
"""Mean watts while the GPU was busy over the budget of the 25 W mode: the only published figure, by tegrastats
(github.com/hokwangchoi/jetson-orin-nano-benchmarks)."""

USABLE = 0.925
"""Share of a board's memory that programs can use: Linux on an Orin Nano of 8 GiB has 7.4."""
TEXT_TOKENS = 34
"""Text tokens of the prompt: the question and the chat template."""
REPLY = 64
"""Decoding is predicted after this many tokens of the reply."""
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Prediction:
    """One precision, image size and context on one board. Sizes in bytes, times in milliseconds, energy in joules."""

    precision: str
    image_size: int
    context: int
    build_bytes: float
    run_bytes: float
    cache_bytes: float
    """The part of `run_bytes` for `context` positions of the KV cache."""
    available_bytes: float
    vision_ms: float
    prefill_ms: float
    tokens_per_second: float
    """With kernels that read integer weights as well as those of the programs in the fit, which were written by hand (MLC, Edge-LLM)."""
    tokens_per_second_as_fp16: float
    """The same if TensorRT stores or expands integer weights as FP16. Nobody has measured which."""
    joules_per_token: float

    @property
    def ttft_ms(self) -> float:
        """Time to the first token, without reading and resizing the picture."""
        return self.vision_ms + self.prefill_ms

    @property
    def ttft_range_ms(self) -> tuple[float, float]:
        """Range that covers 80 % of the models that were not in the fit."""
        off = SPREAD["vision"] * self.vision_ms + SPREAD["prefill"] * self.prefill_ms
        return self.ttft_ms - off, self.ttft_ms + off

    @property
    def tokens_per_second_range(self) -> tuple[float, float]:
        """From the error of models that were not in the fit; its lower end is that of integer weights that are read as FP16."""
        return self.tokens_per_second_as_fp16 / (1 + SPREAD["decode"]), self.tokens_per_second / (1 - SPREAD["decode"])

    @property
    def runs(self) -> bool:
        """Whether the model fits into the memory of the board while it answers."""
        return self.run_bytes <= self.available_bytes

    @property
    def builds(self) -> bool:
        """Whether its engines can be built without swap."""
        return self.build_bytes <= self.available_bytes


def predict(
    shape: Shape,
    board: Board,
    mode: Mode,
    precision: str,
    image_size: int,
    context: int,
    build_peak: float,
    other_sizes: Sequence[int] = (),
) -> Prediction:
    """`build_peak`: bytes of the process while it builds the larger engine, as predicted by engines/memory.py.

    Times are those of pictures of `image_size`. All sizes share the weights, and the largest needs the most scratch memory.
    """
    weights, text = PRECISIONS[precision], shape.text
    vision = vision_work(shape.vision, text.hidden, image_size)
    rate = board.fp16_rate(mode)
    positions = visual_tokens(image_size) + TEXT_TOKENS
    # Convolutions with one channel per group are bound by memory, dense products by the compute rate.
    moving = DECODE.slope * FP16 * vision.moved / mode.bandwidth * 1e3
    vision_ms = VISION.milliseconds(2 * (vision.dense + vision.grouped) / rate * 1e3) + moving
    prefill = PREFILL_ON_THOR if board.name == THOR else PREFILL
    prefill_ms = prefill.milliseconds(2 * prefill_macs(text, positions) / rate * 1e3)
    decode_ms = DECODE.milliseconds(decode_bytes(text, weights.body, weights.head, positions + REPLY) / mode.bandwidth * 1e3)
    as_fp16_ms = DECODE.milliseconds(decode_bytes(text, FP16, FP16, positions + REPLY) / mode.bandwidth * 1e3)
    stored = sum(weight_bytes(shape, weights, image_size).values())
    run = stored + text.cache_bytes(context) + activation_bytes(shape, max((image_size, *other_sizes)), context) + RUNTIME_BYTES
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
        tokens_per_second_as_fp16=1e3 / as_fp16_ms,
        joules_per_token=mode.watts * MEASURED_SHARE_OF_POWER * decode_ms / 1e3,
    )


def activation_bytes(shape: Shape, image_size: int, context: int, *, fused: bool = True, prefills: int = 1) -> float:
    """Scratch memory of the engine that needs more, as TensorRT for RTX plans it (`benchmarks/results/engine_builds.json`).

    The decoder's is that of a prefill chunk against the whole cache: the mask, the joined keys and values of a layer, and its attention
    or its MLP. A fused attention needs nothing more. That of a layer with FP32 scores has these scores and their softmax in memory. One
    mask does for both kinds of layers, unless there are at least two of each. `fused` is False for FP32, where no attention is fused.
    `prefills` is the number of conversations that a prefill call takes, and multiplies the decoder's memory.
    """
    vision, text = shape.vision, shape.text
    narrow = FP16 if fused else FP32
    widest = max(dim * (image_size // (4 << index)) ** 2 for index, dim in enumerate(vision.dims))
    keys = context + PREFILL_CHUNK
    pairs = PREFILL_CHUNK * keys
    wide = text.fp32_scores if fused else text.layers
    masks = 2 if wide >= 2 and text.layers - wide >= 2 else 1
    mask = masks * FP32 * text.heads // text.kv_heads * pairs
    joined = narrow * 2 * text.kv_heads * text.head_dim * (keys + text.layers * PREFILL_CHUNK)
    mlp = PREFILL_CHUNK * (narrow * 3 * text.intermediate + FP32 * 2 * text.hidden)
    scores = (FP32 + narrow) * text.heads * pairs + PREFILL_CHUNK * (narrow + FP32) * text.hidden if wide else 0
    return max(narrow * widest * (vision.mlp_ratio + 3), prefills * (mask + joined + max(mlp, scores)))
