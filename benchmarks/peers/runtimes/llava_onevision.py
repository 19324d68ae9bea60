"""LLaVA-OneVision-0.5B in transformers: what the paper's headline compares with. Random weights of its real structure, one 1152 px picture.

SigLIP-SO400M sees nine tiles of 384 px and the whole picture once more, 27 x 27 tokens each: 7,290 visual tokens, and 81 for the ends of
the rows, which transformers adds and the paper does not count.
"""

from __future__ import annotations

import io
import itertools
import sys
import time
from typing import Any

from benchmarks.peers.protocol import Peer, Samples, Workload, main_of, timed_load

TILE, GRID, PATCH = 384, 3, 14
SIDE = TILE // PATCH
VISUAL_TOKENS = (GRID * GRID + 1) * SIDE * SIDE
ROW_ENDS = GRID * SIDE
IMAGE_TOKEN = 151646


def config_of(size: str) -> Any:
    """The released encoder and grid, which are the defaults of the class, with Qwen2-0.5B. Other sizes are for smoke tests."""
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    text: dict[str, Any] = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    }
    if size == "0.5b":
        vision = LlavaOnevisionConfig().vision_config
    else:
        text |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = SiglipVisionConfig(image_size=TILE, patch_size=PATCH, vision_use_head=False, **shape)
    text |= {"vocab_size": 152000, "rope_theta": 1e6, "tie_word_embeddings": True, "max_position_embeddings": 32768}
    return LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_index=IMAGE_TOKEN, tie_word_embeddings=True
    )


def measure(workload: Workload, variant: str) -> Samples:
    """Time the first token of new pictures, eager, in `bfloat16` or `float32`."""
    import torch
    from transformers import LlavaOnevisionForConditionalGeneration

    torch.set_num_threads(workload.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, variant)

    def load() -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlavaOnevisionForConditionalGeneration(config_of(workload.size)).eval()
        finally:
            torch.set_default_dtype(before)

    model, _ = timed_load(load)  # making random weights is not loading
    model.generation_config.eos_token_id = None
    text = [token for token in workload.ids if token < workload.vocab]
    ids = torch.tensor([[*text[:17], *[IMAGE_TOKEN] * (VISUAL_TOKENS + ROW_ENDS), *text[17:]]])
    with torch.no_grad():
        samples = time_pictures(workload, torch, model, ids)
    return {**samples, "encoder_parameters": [float(sum(each.numel() for each in model.model.vision_tower.parameters()))]}


def time_pictures(workload: Workload, torch: Any, model: Any, ids: Any) -> Samples:
    """Time `runs` pictures after one warm-up."""
    from fastvlm_edge.bench.workload import Pictures

    pictures = Pictures()
    entered: list[float] = []
    left: list[float] = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: entered.append(time.perf_counter()))
    model.model.multi_modal_projector.register_forward_hook(lambda *_: left.append(time.perf_counter()))
    samples: Samples = {name: [] for name in ("preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms")}
    for number in range(workload.runs + 1):
        file = pictures.new()
        entered.clear()
        left.clear()
        marks = [time.perf_counter()]
        pixels = torch.from_numpy(tiles(file)).to(model.dtype)
        marks.append(time.perf_counter())
        inputs = {"pixel_values": pixels[None], "image_sizes": torch.tensor([[GRID * TILE, GRID * TILE]])}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, max_new_tokens=1, do_sample=False)
        marks.append(time.perf_counter())
        if out.shape[1] != ids.shape[1] + 1:
            raise RuntimeError(f"transformers gave {out.shape[1] - ids.shape[1]} tokens instead of 1")
        before, first = (later - earlier for earlier, later in itertools.pairwise(marks))
        vision = left[0] - entered[0]
        if number:
            for name, seconds in zip(samples, (before, vision, first - vision, before + first), strict=True):
                samples[name].append(seconds * 1e3)
    return samples


def tiles(file: bytes) -> Any:
    """A picture's file -> float32 [10, 3, 384, 384] in -1..1: the whole picture first, then its tiles row by row."""
    import numpy as np
    from PIL import Image

    source = Image.open(io.BytesIO(file)).convert("RGB")
    large = source.resize((GRID * TILE, GRID * TILE), Image.Resampling.BICUBIC)
    cuts = [large.resize((TILE, TILE), Image.Resampling.BICUBIC)]
    for row, column in itertools.product(range(GRID), repeat=2):
        cuts.append(large.crop((column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE)))
    return np.stack([np.asarray(cut).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1 for cut in cuts])


PEER = Peer("all", ("bfloat16", "float32"), measure, packages=("torch==2.13.0", "transformers"), environment="transformers_fastvlm")

if __name__ == "__main__":
    sys.exit(main_of(PEER))
