"""What a GPU allows at most: bytes and operations that FastVLM cannot do without, over measured rates of copies and matrices."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import workload
from benchmarks.gpu.record import Part
from fastvlm_edge.bench.record import digits

if TYPE_CHECKING:
    from fastvlm_edge.convert.checkpoint.structure import TextConfig
    from fastvlm_edge.convert.precision import PrecisionPlan
    from fastvlm_edge.convert.reference.fastvithd import FastViTHDConfig

RATE_OF = {"fp32": "tf32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16", "int4": "float16"}
"""Precision -> the type whose matrix rate bounds it: integer weights are multiplied as floats, FP32 as TF32."""


def floor_of(checkpoint: Path, precisions: Iterable[str], limits: Part) -> dict[str, Any]:
    """Least milliseconds and most tokens/s that the measured rates allow, by precision."""
    from fastvlm_edge.convert.checkpoint.checkpoint import open_checkpoint
    from fastvlm_edge.convert.precision import precision_plan

    source = open_checkpoint(str(checkpoint))
    text, size = source.text, source.image_size
    vision, prompt = vision_flops(source.vision, text.hidden, size), prefill_flops(text, workload.PROMPTS["300"])
    floor: dict[str, Any] = {"vision_gflop": digits(vision / 1e9), "prefill_gflop": digits(prompt / 1e9), "by_precision": {}}
    bandwidth, rates = limits.get("copy_gb_per_second"), limits.get("matrix_tflops", {})
    for precision in precisions:
        plan, rate = precision_plan(precision), rates.get(RATE_OF[precision])
        row: dict[str, Any] = {"weights_mb": digits(weight_bytes(text, plan) / 1e6), "decode": {}}
        if rate:
            row |= {"vision_ms": digits(vision / rate / 1e9), "prefill_ms": digits(prompt / rate / 1e9)}
        for name, positions in workload.PROMPTS.items():
            read = weight_bytes(text, plan) + cache_bytes(text, plan, positions + workload.NEW_TOKENS // 2)
            row["decode"][name] = {"mb_per_token": digits(read / 1e6)}
            if bandwidth:
                row["decode"][name]["tokens_per_second"] = digits(bandwidth * 1e9 / read)
        floor["by_precision"][precision] = row
    return floor


def body_matrices(text: TextConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the matrices of one layer: q, k and v as one, then o, gate and up as one, down."""
    width, queries, keys = text.hidden, text.heads * text.head_dim, text.kv_heads * text.head_dim
    return [(width, queries + 2 * keys), (queries, width), (width, 2 * text.intermediate), (text.intermediate, width)]


def weight_bytes(text: TextConfig, plan: PrecisionPlan) -> int:
    """Bytes of weights that one decoded token reads: body with scales, biases and norms, head, and one row of the embedding."""
    item = item_bytes(plan)
    layer = sum(stored_bytes(inputs, outputs, plan.body.bits, plan.body.block, item) for inputs, outputs in body_matrices(text))
    biases = (text.heads + 2 * text.kv_heads) * text.head_dim if text.attention_bias else 0
    layer += (biases + 2 * text.hidden) * item
    head = stored_bytes(text.hidden, text.vocab, plan.head.bits, plan.head.block, item)
    row = text.hidden * plan.embedding.bits // 8 + item if plan.embedding.bits else text.hidden * item
    return text.layers * layer + text.hidden * item + head + row


def stored_bytes(inputs: int, outputs: int, bits: int, block: int, item: int) -> int:
    """Bytes of a matrix: floats of `item` bytes, or integers and one scale an output, or one for each `block` inputs of it."""
    if not bits:
        return inputs * outputs * item
    return inputs * outputs * bits // 8 + (inputs // block if block else 1) * outputs * item


def cache_bytes(text: TextConfig, plan: PrecisionPlan, positions: int) -> int:
    """Bytes of keys and values that one decoded token reads."""
    return text.layers * 2 * text.kv_heads * text.head_dim * positions * item_bytes(plan)


def item_bytes(plan: PrecisionPlan) -> int:
    """Bytes of a float of the decoder."""
    return 4 if plan.decoder == "fp32" else 2


def prefill_flops(text: TextConfig, positions: int) -> int:
    """Of one causal pass over that many positions, with the logits of the last; a multiply-accumulate is two.

    In the last layer all positions but the last are wanted for their keys and values alone.
    """
    layer = sum(inputs * outputs for inputs, outputs in body_matrices(text))
    keys_and_values = text.hidden * 2 * text.kv_heads * text.head_dim
    body = (text.layers - 1) * layer * positions + keys_and_values * (positions - 1) + layer
    attention = 2 * text.heads * text.head_dim * ((text.layers - 1) * positions * (positions + 1) // 2 + positions)
    return 2 * (body + attention + text.hidden * text.vocab)


def vision_flops(config: FastViTHDConfig, hidden: int, image_size: int) -> int:
    """Of encoder and projector for one picture; convolutions, matrices and attention, a multiply-accumulate is two."""
    dims, ratio = config.dims, config.mlp_ratio
    side = image_size // 4
    total = (image_size // 2) ** 2 * dims[0] * 3 * 9 + side**2 * dims[0] * (9 + dims[0])
    for index, (depth, dim) in enumerate(zip(config.depths, dims, strict=True)):
        if index:
            side //= 2
            total += side**2 * dim * (49 + dim)
        positions, feed_forward = side**2, dim * (49 + 2 * ratio * dim)
        if index >= 3:
            total += positions * dim * 49
            mixer = 4 * dim * dim + 2 * positions * dim
        else:
            mixer = 9 * dim
        total += depth * positions * (mixer + feed_forward)
    positions = side**2
    total += positions * config.out_dim * 9 + 2 * config.out_dim * config.se_dim
    return 2 * (total + positions * hidden * (config.out_dim + hidden))


def measure_limits() -> Iterator[Part]:
    """Device-to-device copies through our own CUDA module, bytes read and bytes written; matrix products by PyTorch where it has CUDA."""
    yield {"copy_gb_per_second": digits(copy_rate() / 1e9)}
    try:
        import torch
    except ImportError:
        yield {"matrix_tflops_missing": "PyTorch is not installed"}
        return
    if not torch.cuda.is_available():
        yield {"matrix_tflops_missing": "this PyTorch has no CUDA"}
        return
    for name in ("float16", "bfloat16", "tf32", "float32"):
        yield {"matrix_tflops": {name: digits(matrix_rate(torch, name) / 1e12)}}


def copy_rate(nbytes: int = 512 << 20, copies: int = 20) -> float:
    """Bytes a second that a copy within device memory reads and writes, the best of three."""
    from fastvlm_edge.nvidia.drivers import open_cuda

    cuda = open_cuda()
    nbytes = min(nbytes, cuda.free_bytes() // 8)
    stream = cuda.create_stream()
    source, destination = cuda.allocate(nbytes), cuda.allocate(nbytes)
    best = 0.0
    try:
        cuda.zero(source, nbytes, stream)
        cuda.copy(destination, source, nbytes, stream)
        cuda.synchronize(stream)
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(copies):
                cuda.copy(destination, source, nbytes, stream)
            cuda.synchronize(stream)
            best = max(best, 2 * nbytes * copies / (time.perf_counter() - began))
    finally:
        for address in (source, destination):
            cuda.free(address)
        cuda.destroy_stream(stream)
        cuda.close()
    return best


def matrix_rate(torch: Any, name: str, size: int = 8192) -> float:
    """Floating point operations a second of a square product, the best of ten after a warm-up."""
    if torch.cuda.mem_get_info()[0] < 16 * size**2:
        size //= 4
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = float("inf")
    for run in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.matmul(a, b, out=out)
        end.record()
        torch.cuda.synchronize()
        if run >= 3:
            best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * size**3 / best
