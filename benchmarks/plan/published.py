"""Published measurements of other models on Jetson boards. The predictions of `plan` are fitted to them and checked against them.

Shapes are from the config.json of each model. What a source leaves open is noted beside the row as an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastvlm_edge.planning.workload import FP16, INT4, TextShape, decode_bytes, prefill_macs

EDGE_LLM = "TensorRT-Edge-LLM 0.9.0, docs/source/user_guide/performance/performance-benchmarks.md: JetPack 7.2, INT4 weights, FP16 head"
EDGE_LLM_4 = "TensorRT-Edge-LLM 0.4.0, the same page: Thor, INT4 AWQ, batch 1"
SUPER_BLOG = "NVIDIA's blog on the Orin Nano Super (developer.nvidia.com, December 2024): MLC, INT4, before and with the Super modes"
COSMOS = "github.com/hokwangchoi/jetson-orin-nano-benchmarks: TensorRT-Edge-LLM W4A16, JetPack 6.2.2, Super, medians of five"

MLC_INT4 = 0.5 + FP16 / 32
"""Bytes per weight of MLC's q4f16_1, head included: 4 bits, and an FP16 scale for 32 weights. An assumption: the blog only says INT4."""
NVFP4 = 0.5 + 1 / 16
"""Bytes per weight: 4 bits, and an FP8 scale for 16 weights."""

MODELS = {
    "Llama 3.1 8B": TextShape(32, 4096, 32, 8, 128, 14336, 128256),
    "Llama 3.2 3B": TextShape(28, 3072, 24, 8, 128, 8192, 128256),
    "Qwen2.5 7B": TextShape(28, 3584, 28, 4, 128, 18944, 152064),
    "Gemma 2 2B": TextShape(26, 2304, 8, 4, 256, 9216, 256000),
    "Gemma 2 9B": TextShape(42, 3584, 16, 8, 256, 14336, 256000),
    "Phi 3.5 3B": TextShape(32, 3072, 32, 32, 96, 8192, 32064),
    "SmolLM2 1.7B": TextShape(24, 2048, 32, 32, 64, 8192, 49152),
    "Qwen3 0.6B": TextShape(28, 1024, 16, 8, 128, 3072, 151936),
    "Qwen3 4B": TextShape(36, 2560, 32, 8, 128, 9728, 151936),
    "Qwen3 8B": TextShape(36, 4096, 32, 8, 128, 12288, 151936),
    "Qwen3-VL 2B": TextShape(28, 2048, 16, 8, 128, 6144, 151936),
    "Qwen3-VL 4B": TextShape(36, 2560, 32, 8, 128, 9728, 151936),
    "Qwen3-VL 8B": TextShape(36, 4096, 32, 8, 128, 12288, 151936),
}

Stage = Literal["decode", "prefill", "vision"]


@dataclass(frozen=True)
class Row:
    """One measurement. `work` is in bytes for decoding, and in multiply-accumulates for prefill and vision."""

    stage: Stage
    model: str
    board: str
    mode: str
    work: float
    milliseconds: float
    source: str


def _decode(
    model: str, board: str, mode: str, tokens_per_second: float, body: float, head: float, source: str, positions: int = 300
) -> Row:
    work = decode_bytes(MODELS[model], body, head, positions)
    return Row("decode", model, board, mode, work, 1e3 / tokens_per_second, source)


def _prefill(model: str, board: str, mode: str, milliseconds: float, positions: int, source: str = EDGE_LLM) -> Row:
    return Row("prefill", model, board, mode, prefill_macs(MODELS[model], positions), milliseconds, source)


def _vit(layers: int, hidden: int, intermediate: int, patches: int) -> int:
    """Multiply-accumulates of a plain vision transformer, without patch embedding and merger, which are a few percent."""
    return layers * (patches * (4 * hidden**2 + 2 * hidden * intermediate) + 2 * patches**2 * hidden)


_PATCHES = 265 * 4
"""About 265 visual tokens of four patches each."""
_VITS = {
    "Qwen3-VL 2B": _vit(24, 1024, 4096, _PATCHES),
    "Qwen3-VL 4B": _vit(24, 1024, 4096, _PATCHES),
    "Qwen3-VL 8B": _vit(27, 1152, 4304, _PATCHES),
}

# The source does not name the Orin Nano's power mode. With the 102 GB/s of the Super modes it would reach half the share of the bandwidth
# that an Orin NX reaches at the same bandwidth; with 68 GB/s it reaches about the same share. So the mode must be 15W.
_NANO = ("orin-nano", "15W")
_NX = ("orin-nx", "MAXN")
_AGX = ("orin", "MAXN")
_THOR = ("thor", "MAXN")

ROWS: tuple[Row, ...] = (
    *(
        _decode(model, "orin-nano", mode, speed, MLC_INT4, MLC_INT4, SUPER_BLOG)
        for model, before, with_super in (
            ("Llama 3.1 8B", 14.0, 19.14),
            ("Llama 3.2 3B", 27.7, 43.07),
            ("Qwen2.5 7B", 14.2, 21.75),
            ("Gemma 2 2B", 21.5, 34.97),
            ("Gemma 2 9B", 7.2, 9.21),
            ("Phi 3.5 3B", 24.7, 38.1),
            ("SmolLM2 1.7B", 41.0, 64.5),
        )
        for mode, speed in (("15W", before), ("MAXN_SUPER", with_super))
    ),
    *(
        _decode(model, board, mode, speed, INT4, FP16, EDGE_LLM)
        for model, (board, mode), speed in (
            ("Qwen3 0.6B", _NANO, 72.8),
            ("Qwen3-VL 2B", _NANO, 36.9),
            ("Qwen3-VL 2B", _NX, 60.1),
            ("Qwen3-VL 4B", _NX, 31.2),
            ("Qwen3-VL 2B", _AGX, 98.4),
            ("Qwen3-VL 4B", _AGX, 52.4),
            ("Qwen3-VL 8B", _AGX, 32.3),
        )
    ),
    _decode("Qwen3-VL 2B", "orin-nano", "MAXN_SUPER", 60, INT4, FP16, COSMOS),
    _decode("Qwen3-VL 2B", "thor", "MAXN", 151.9, NVFP4, FP16, EDGE_LLM),
    _decode("Qwen3-VL 4B", "thor", "MAXN", 79.4, NVFP4, FP16, EDGE_LLM),
    *(
        _prefill(model, board, mode, milliseconds, positions)
        for model, (board, mode), milliseconds, positions in (
            ("Qwen3 0.6B", _NANO, 28.7, 61),
            ("Qwen3-VL 2B", _NANO, 190.9, 294),
            ("Qwen3-VL 2B", _NX, 103, 294),
            ("Qwen3-VL 4B", _NX, 245, 294),
            ("Qwen3-VL 2B", _AGX, 50, 294),
            ("Qwen3-VL 4B", _AGX, 124, 294),
            ("Qwen3-VL 8B", _AGX, 225, 294),
        )
    ),
    *(
        _prefill(model, *_THOR, milliseconds, positions, EDGE_LLM_4)
        for model, milliseconds, positions in (
            ("Llama 3.1 8B", 215.5, 383),
            ("Qwen3 0.6B", 21.0, 366),
            ("Qwen3 4B", 116.2, 364),
            ("Qwen3 8B", 212.0, 366),
            ("Qwen2.5 7B", 195.1, 376),
            ("Qwen3-VL 2B", 39.4, 283),
        )
    ),
    *(
        Row("vision", model, board, mode, _VITS[model], milliseconds, EDGE_LLM)
        for model, (board, mode), milliseconds in (
            ("Qwen3-VL 2B", _NANO, 151.1),
            ("Qwen3-VL 2B", _NX, 82),
            ("Qwen3-VL 4B", _NX, 84),
            ("Qwen3-VL 2B", _AGX, 39),
            ("Qwen3-VL 4B", _AGX, 39),
            ("Qwen3-VL 8B", _AGX, 57),
            ("Qwen3-VL 2B", _THOR, 12),
            ("Qwen3-VL 4B", _THOR, 12),
        )
    ),
)
"""Left out: Qwen3.5-0.8B (its linear attention has no shape here), prefill on Thor in NVFP4 (products of a type that no plan of ours has),
Qwen2.5-VL-7B with EAGLE3, and its 57.7 tokens/s of an older release on Thor, which are above the bandwidth with an FP16 head."""

CONTRADICTING: tuple[Row, ...] = (
    Row("vision", "Qwen3-VL 2B", "orin-nano", "MAXN_SUPER", _VITS["Qwen3-VL 2B"], 208, COSMOS),
    _prefill("Qwen3-VL 2B", "orin-nano", "MAXN_SUPER", 211, 294, COSMOS),
    Row("vision", "Qwen3-VL 2B", "thor", "MAXN", _VITS["Qwen3-VL 2B"], 19.0, EDGE_LLM_4),
)
"""Not fitted, but recorded with their errors: they are slower in a faster mode, or in an older release, than rows above. The number of
visual tokens of COSMOS is not published; it is assumed to be that of the others."""
MEMORY = (
    ("Qwen3-VL 2B", "orin-nano", 4380e6, 0.405e9),
    ("Qwen3-VL 2B", "orin-nx", 4344e6, 0.405e9),
    ("Qwen3-VL 4B", "orin-nx", 5903e6, 0.415e9),
)
"""Model, board, bytes in use while it answers (EDGE_LLM, which reports twice as much on AGX Orin), number of weights of the encoder."""
MEMORY_POSITIONS = 4096
"""Capacity of the KV cache in these rows: --maxKVCacheCapacity in the example of the source."""
