"""Optimisation profiles: the ranges of shapes that the engines are built for."""

from __future__ import annotations

from collections.abc import Sequence

from fastvlm_edge.backends.engine_files import static_part
from fastvlm_edge.backends.kv_cache import FIRST_CAPACITY, next_capacity
from fastvlm_edge.backends.protocol import LOGIT_POSITIONS, PREFILL_CHUNK
from fastvlm_edge.model_dir.manifest import Manifest
from fastvlm_edge.nvidia.tensorrt_library import Profile

Range = tuple[int, int, int]
"""Smallest, optimal and largest size of a dimension."""

STATIC_IDS = 2
"""Ids and positions of logits of a static decode step."""
STATIC_CAPACITY = 1024


def vision_profiles(manifest: Manifest) -> tuple[Profile, ...]:
    """The profiles of the vision engine: one static shape for each size of pictures, the default size first."""
    return tuple({"pixel_values": ((1, 3, size, size),) * 3} for size in manifest.vision.every_size)


def decoder_profiles(manifest: Manifest, *, separate: bool, max_batch: int = 1) -> tuple[Profile, ...]:
    """One profile for prefill and decoding, or two if `separate`: the first for prefill, the second for 1 to LOGIT_POSITIONS ids of text.

    The second is for one id, or a draft to verify. If it took only one id, TensorRT for RTX would write integer matrices out as floats at
    every run (docs/tensorrt.md).

    A single profile is optimised for decoding, which takes most of the time of an answer. If there are two, the first is optimised for the
    prefill of a question about one picture. Calls are for 1 to `max_batch` conversations, but a separate prefill is for one at a time.
    """
    spec, tokens = manifest.decoder, manifest.vision.tokens
    longest = next_capacity(spec.context)
    usual = min(next_capacity(tokens + FIRST_CAPACITY), longest)
    prompt = min(tokens + FIRST_CAPACITY // 2, PREFILL_CHUNK)

    def profile(batch: int, seq: Range, rows: Range) -> Profile:
        return _profile(manifest, (1, 1, batch), seq, (1, 1, LOGIT_POSITIONS), rows, (FIRST_CAPACITY, usual, longest))

    pictures = (1, tokens, spec.context)
    if separate:
        return profile(1, (1, prompt, PREFILL_CHUNK), pictures), profile(max_batch, (1, 1, LOGIT_POSITIONS), (1, 1, 1))
    return (profile(max_batch, (1, 1, PREFILL_CHUNK), pictures),)


def static_capacities(context: int, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """Capacities of the cache that static engines are built for, in ascending order: `wanted`, or STATIC_CAPACITY, and the whole context.

    They are rounded up to those of `next_capacity`. Those beyond the context are left out.
    """
    longest = next_capacity(context)
    rounded = {next_capacity(size) for size in wanted or (STATIC_CAPACITY,)}
    return tuple(sorted({longest, *(capacity for capacity in rounded if capacity < longest)}))


def static_profiles(manifest: Manifest, capacities: Sequence[int]) -> dict[str, tuple[Profile, ...]]:
    """Static engines of the decoder: part -> its only profile, one shape for each input.

    Decoding takes STATIC_IDS ids of which the first counts. With one id or one position of logits, TensorRT for RTX writes matrices out as
    floats at every run (docs/tensorrt.md).
    """
    prefill = ((PREFILL_CHUNK,) * 3, (LOGIT_POSITIONS,) * 3, (manifest.decoder.context,) * 3)
    decode = ((STATIC_IDS,) * 3, (STATIC_IDS,) * 3, (1, 1, 1))
    return {
        static_part(kind, capacity): (_profile(manifest, (1, 1, 1), *sizes, (capacity,) * 3),)
        for capacity in capacities
        for kind, sizes in (("prefill", prefill), ("decode", decode))
    }


def _profile(manifest: Manifest, batch: Range, seq: Range, positions: Range, rows: Range, capacity: Range) -> Profile:
    spec = manifest.decoder
    ids = tuple(zip(batch, seq, strict=True))
    cache = tuple((size, spec.kv_heads, places, spec.head_dim) for size, places in zip(batch, capacity, strict=True))
    shapes = {
        "input_ids": ids,
        "position_ids": ids,
        "logit_positions": tuple(zip(batch, positions, strict=True)),
        "image_features": tuple((count, spec.hidden) for count in rows),
        **{f"past_key_values.{layer}.{part}": cache for layer in range(spec.layers) for part in ("key", "value")},
    }
    return {name: (low, optimal, high) for name, (low, optimal, high) in shapes.items()}
