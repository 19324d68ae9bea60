"""transformers' own FastVLM: eager by `generate` in two types, and compiled over a static cache; on the CPU or on a GPU."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.peers.protocol import DECODE, DEEP, Peer, Samples, Workload, main_of, timed_load
from benchmarks.peers.runtimes.transformers_model import (
    Loaded,
    StaticLoop,
    generate,
    load_transformers,
    reply_by_static_loop,
    time_decoding,
)

COMPILED = "-compile"
STAGES = ("preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms")

Picture = tuple[Callable[[], bytes], Callable[[bytes], Any]]
"""Makes the file of a new picture; preprocesses a file to pixel_values on the device."""


def measure(workload: Workload, variant: str) -> Samples:
    """`float32`, `bfloat16` or `float16`; with `-compile`, torch.compile of the encoder, of prefill and of a decode step."""
    import torch

    torch.set_num_threads(workload.threads)
    device = "cuda" if workload.device == "gpu" else "cpu"
    free = device_memory() if device == "cuda" else None
    loaded, samples = timed_load(lambda: load_transformers(workload.checkpoint, variant.removesuffix(COMPILED), device))
    time_replies = time_compiled if variant.endswith(COMPILED) else time_eager
    with torch.no_grad():
        samples |= time_replies(workload, loaded, workload.ids, DECODE, preprocessor(workload, loaded))
        if device == "cuda":
            deep = time_replies(workload, loaded, deep_ids(workload), f"{DECODE}@{DEEP}", preprocessor(workload, loaded))
            samples[f"{DECODE}@{DEEP}"] = deep[f"{DECODE}@{DEEP}"]
    if free is not None:
        samples["peak_device_memory_mib"] = [free.look()]
    return samples


def device_memory() -> Any:
    """Watches free device memory. PyTorch's allocator gives nothing back, so one look at the end sees its peak."""
    import torch

    from fastvlm_edge.machine.peak_memory import DeviceMemory

    if not torch.cuda.is_available():
        return None  # loading says so
    torch.cuda.init()
    return DeviceMemory(lambda: int(torch.cuda.mem_get_info()[0]))


def deep_ids(workload: Workload) -> list[int]:
    """The prompt with more text at its end, DEEP positions in all."""
    return [*workload.ids, *[workload.ids[-1]] * (DEEP - len(workload.ids))]


def preprocessor(workload: Workload, loaded: Loaded) -> Picture:
    """The picture's file to pixels: transformers' own preprocessing after Apple's padding."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    from fastvlm_edge.bench.workload import Pictures

    pictures = Pictures()
    processor = CLIPImageProcessorPil.from_pretrained(workload.checkpoint, do_normalize=False)

    def preprocess(file: bytes) -> Any:
        source = Image.open(io.BytesIO(file)).convert("RGB")
        square = Image.new("RGB", (max(source.size),) * 2)
        square.paste(source, ((square.width - source.width) // 2, (square.height - source.height) // 2))
        return processor(square, return_tensors="pt")["pixel_values"].to(loaded.device, loaded.model.dtype)

    return pictures.new, preprocess


def time_eager(workload: Workload, loaded: Loaded, prompt: list[int], decode: str, picture: Picture) -> Samples:
    """Time replies by `generate`, as anyone would use it. `decode` is the name of the speed in the samples."""
    new, preprocess = picture
    ids = loaded.ids(prompt, workload.vocab)
    entered: list[float] = []
    left: list[float] = []
    hooks = [
        loaded.model.model.vision_tower.register_forward_pre_hook(lambda *_: entered.append(loaded.wait())),
        loaded.model.model.multi_modal_projector.register_forward_hook(lambda *_: left.append(loaded.wait())),
    ]
    rows, speeds = [], []
    for number in range(workload.runs + 1):
        file = new()
        entered.clear()
        left.clear()
        marks = [loaded.wait()]
        pixels = preprocess(file)
        marks.append(loaded.wait())
        generate(loaded, ids, pixels, 1)
        marks.append(loaded.wait())
        before, first = (later - earlier for earlier, later in itertools.pairwise(marks))
        vision = left[0] - entered[0]
        _, speed = time_decoding(loaded, ids, pixels, workload.new_tokens)
        if number:
            rows.append((before, vision, first - vision, before + first))
            speeds.append(speed)
    for hook in hooks:
        hook.remove()
    return {**columns(rows), decode: speeds}


def time_compiled(
    workload: Workload, loaded: Loaded, prompt: list[int], decode: str, picture: Picture, *, compiled: bool = True
) -> Samples:
    """Time replies by `StaticLoop`. Compiling, recording and the first replay are the warm-up."""
    new, preprocess = picture
    ids = loaded.ids(prompt, workload.vocab)
    positions = len(prompt)
    loop = StaticLoop(loaded, -(-(positions + workload.new_tokens) // 128) * 128, compiled=compiled)
    warm_up = 3 if workload.device == "gpu" else 2
    rows, speeds = [], []
    for number in range(workload.runs + warm_up):
        file = new()
        marks = [loaded.wait()]
        pixels = preprocess(file)
        marks.append(loaded.wait())
        features = loop.encode(pixels)
        marks.append(loaded.wait())
        loop.prefill(ids, features)
        marks.append(loaded.wait())
        loop.decode(positions, workload.new_tokens - 1)
        marks.append(loaded.wait())
        before, vision, prefill, decoding = (later - earlier for earlier, later in itertools.pairwise(marks))
        if number >= warm_up:
            rows.append((before, vision, prefill, before + vision + prefill))
            speeds.append((workload.new_tokens - 1) / decoding)
    return {**columns(rows), decode: speeds}


def columns(rows: list[tuple[float, float, float, float]]) -> Samples:
    """Rows of seconds, in the order of STAGES, as lists of milliseconds by name."""
    return {name: [1e3 * value for value in column] for name, column in zip(STAGES, zip(*rows, strict=True), strict=True)}


def check(workload: Workload, variant: str) -> dict[str, Any]:
    """Compare greedy replies about the demo's pictures with those of onnxruntime on the CPU; compiled variants run uncompiled."""
    from benchmarks.peers.demo import DEMO, NEW_TOKENS, compare_replies, prompts

    loaded = load_transformers(DEMO, variant.removesuffix(COMPILED), "cuda" if workload.device == "gpu" else "cpu")
    reply = reply_by_static_loop if variant.endswith(COMPILED) else generate
    replies = []
    with loaded.torch.inference_mode():
        for ids, pixels, stop_ids, vocab in prompts(workload.folder):
            tokens = reply(
                loaded, loaded.ids(ids, vocab), loaded.torch.from_numpy(pixels).to(loaded.device, loaded.model.dtype), NEW_TOKENS
            )
            end = next((index for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
            replies.append(tokens[:end])
    return compare_replies(workload.folder, replies)


PEER = Peer(
    "all",
    ("bfloat16", "bfloat16-compile", "float32", "float32-compile"),
    measure,
    gpu_variants=("float16", "bfloat16", "float16-compile"),
    packages=("torch==2.13.0", "transformers", "pillow", "onnxruntime", "tokenizers"),  # the last two: what the toolkit's pictures import
    bare=("timm",),
    check=check,
)

if __name__ == "__main__":
    sys.exit(main_of(PEER))
