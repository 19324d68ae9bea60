"""transformers' own FastVLM: eager in two types by `generate`, and compiled over a static cache."""

from __future__ import annotations

import io
import itertools
import sys
import time
from typing import Any

from benchmarks.peers.protocol import Peer, Samples, Workload, main_of, timed_load

COMPILED = "-compile"


def measure(workload: Workload, variant: str) -> Samples:
    """`float32`, `bfloat16`, or a type with `-compile`: torch.compile of the encoder, of prefill and of a decode step."""
    import torch

    from benchmarks.gpu.transformers_model import load_transformers

    torch.set_num_threads(workload.threads)
    dtype = variant.removesuffix(COMPILED)
    loaded, samples = timed_load(lambda: load_transformers(workload.checkpoint, dtype, workload.image_size, "cpu"))
    ids = loaded.ids(workload.ids, workload.vocab)
    time_replies = time_compiled if variant.endswith(COMPILED) else time_eager
    with torch.no_grad():
        return samples | time_replies(workload, loaded, ids, preprocessor(workload, loaded))


def preprocessor(workload: Workload, loaded: Any) -> Any:
    """The picture's file to pixels: transformers' own preprocessing behind Apple's padding."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    from fastvlm_edge.bench.workload import Pictures

    pictures = Pictures()
    processor = CLIPImageProcessorPil.from_pretrained(workload.checkpoint, do_normalize=False)

    def preprocess(file: bytes) -> Any:
        source = Image.open(io.BytesIO(file)).convert("RGB")
        square = Image.new("RGB", (max(source.size),) * 2)
        square.paste(source, ((square.width - source.width) // 2, (square.height - source.height) // 2))
        return processor(square, return_tensors="pt")["pixel_values"].to(loaded.model.dtype)

    return pictures.new, preprocess


def time_eager(workload: Workload, loaded: Any, ids: Any, picture: Any) -> Samples:
    """By `generate`, as anyone would use it."""
    from benchmarks.gpu.eager import generate, time_decoding

    new, preprocess = picture
    entered: list[float] = []
    left: list[float] = []
    loaded.model.model.vision_tower.register_forward_pre_hook(lambda *_: entered.append(time.perf_counter()))
    loaded.model.model.multi_modal_projector.register_forward_hook(lambda *_: left.append(time.perf_counter()))
    rows, speeds = [], []
    for number in range(workload.runs + 1):
        file = new()
        entered.clear()
        left.clear()
        marks = [time.perf_counter()]
        pixels = preprocess(file)
        marks.append(time.perf_counter())
        generate(loaded, ids, pixels, 1)
        marks.append(time.perf_counter())
        before, first = (later - earlier for earlier, later in itertools.pairwise(marks))
        vision = left[0] - entered[0]
        _, speed = time_decoding(loaded, ids, pixels, workload.new_tokens)
        if number:
            rows.append((before, vision, first - vision, before + first))
            speeds.append(speed)
    return columns(rows, speeds)


def time_compiled(workload: Workload, loaded: Any, ids: Any, picture: Any) -> Samples:
    """By the static loop of the GPU benchmark; compiling is in the warm-up."""
    from benchmarks.gpu.static_loop import StaticLoop

    new, preprocess = picture
    positions = ids.shape[1]
    loop = StaticLoop(loaded, -(-(positions + workload.new_tokens) // 128) * 128, compiled=True)
    rows, speeds = [], []
    for number in range(workload.runs + 2):
        file = new()
        marks = [time.perf_counter()]
        pixels = preprocess(file)
        marks.append(time.perf_counter())
        features = loop.encode(pixels)
        marks.append(time.perf_counter())
        loop.prefill(ids, features)
        marks.append(time.perf_counter())
        loop.decode(positions, workload.new_tokens - 1)
        marks.append(time.perf_counter())
        before, vision, prefill, decoding = (later - earlier for earlier, later in itertools.pairwise(marks))
        if number >= 2:
            rows.append((before, vision, prefill, before + vision + prefill))
            speeds.append((workload.new_tokens - 1) / decoding)
    return columns(rows, speeds)


def columns(rows: list[tuple[float, float, float, float]], speeds: list[float]) -> Samples:
    """Rows of seconds as lists of milliseconds by name."""
    names = ("preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms")
    found = {name: [1e3 * value for value in column] for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return {**found, "decode_tokens_per_second": speeds}


PEER = Peer(
    "all",
    ("bfloat16", "bfloat16-compile", "float32", "float32-compile"),
    packages=("torch==2.13.0", "transformers", "pillow", "onnxruntime", "tokenizers"),  # the last two: what the toolkit's pictures import
    bare=("timm",),
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(main_of(PEER))
