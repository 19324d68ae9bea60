"""Optimisation profiles: the ranges of shapes that the two engines are built for."""

from __future__ import annotations

from fastvlm_edge.backends.kv_cache import FIRST_CAPACITY, next_capacity
from fastvlm_edge.generation.session import PREFILL_CHUNK
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.nvidia.tensorrt_library import Profile

LOGIT_POSITIONS = 16
"""Largest number of positions per call whose logits may be requested: enough to verify a draft of 15 ids at once."""


def vision_profiles(manifest: Manifest) -> tuple[Profile, ...]:
    """The profile of the vision engine, one static shape."""
    size = manifest.vision.image_size
    shape = (1, 3, size, size)
    return ({"pixel_values": (shape, shape, shape)},)


def decoder_profiles(manifest: Manifest, *, separate: bool) -> tuple[Profile, ...]:
    """One profile for prefill and decoding, or two if `separate`: the first for prefill, the second for one id at a time.

    A single profile is optimised for decoding, which takes most of the time of an answer. If there are two, the first is optimised for the
    prefill of a question about one picture.
    """
    spec, tokens = manifest.decoder, manifest.vision.tokens
    longest = next_capacity(spec.context)
    usual = min(next_capacity(tokens + FIRST_CAPACITY), longest)
    prompt = min(tokens + FIRST_CAPACITY // 2, PREFILL_CHUNK)

    def profile(seq: tuple[int, int, int], positions: tuple[int, int, int]) -> Profile:
        cache = tuple((1, spec.kv_heads, capacity, spec.head_dim) for capacity in (FIRST_CAPACITY, usual, longest))
        rows = tuple((count, spec.hidden) for count in (1, tokens, spec.context))
        past = {f"past_key_values.{layer}.{part}": cache for layer in range(spec.layers) for part in ("key", "value")}
        ids, asked = tuple((1, count) for count in seq), tuple((1, count) for count in positions)
        shapes = {"input_ids": ids, "position_ids": ids, "logit_positions": asked, "image_features": rows, **past}
        return {name: (low, optimal, high) for name, (low, optimal, high) in shapes.items()}

    one = (1, 1, 1)
    if separate:
        return profile((1, prompt, PREFILL_CHUNK), (1, 1, LOGIT_POSITIONS)), profile(one, one)
    return (profile((1, 1, PREFILL_CHUNK), (1, 1, LOGIT_POSITIONS)),)
