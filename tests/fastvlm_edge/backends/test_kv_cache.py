"""The KV cache grows without losing anything, and bfloat16 bits are those of ml_dtypes. Nothing is stubbed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.backends.dtypes import from_float32, storage, to_float32
from fastvlm_edge.backends.kv_cache import KVCache


def make(context: int = 3000, dtype: str = "float32") -> KVCache:
    return KVCache(layers=2, kv_heads=3, head_dim=4, context=context, dtype=dtype)


def block(seq: int, start: int = 0) -> np.ndarray:
    return np.broadcast_to(np.arange(start, start + seq, dtype=np.float32)[:, None], (2, 2, 1, 3, seq, 4))


def test_capacity_grows_in_steps_up_to_the_context() -> None:
    cache = make()
    seen = [cache.capacity]
    for position in range(0, 3000, 100):
        grew = cache.append(block(100, position), position)
        assert grew == (cache.capacity != seen[-1])
        seen.append(cache.capacity)
        assert np.array_equal(cache.buffer[1, 1, 0, 2, : cache.length, 3], np.arange(cache.length))
    assert sorted(set(seen)) == [*range(128, 1025, 128), 1536, 2048, 2560, 3000]
    with pytest.raises(FastVLMError, match="3001 positions do not fit into the context of 3000"):
        cache.append(block(1), 3000)
    assert cache.length == 3000


def test_a_context_below_the_first_bucket() -> None:
    assert make(context=100).capacity == 100


def test_one_append_may_skip_buckets() -> None:
    cache = make()
    cache.append(block(5), 0)
    cache.append(block(1500, 5), 5)
    assert cache.capacity == 1536 and cache.buffer[0, 0, 0, 0, 1504, 0] == 1504


def test_a_graph_may_append_by_itself_where_room_was_reserved() -> None:
    cache = make(context=300)
    cache.append(block(100), 0)
    assert not cache.reserve(128)
    assert cache.reserve(129)
    cache.buffer[:, :, :, :, 100:150] = block(50, 100)
    cache.extend(150)
    assert np.array_equal(cache.buffer[0, 1, 0, 1, : cache.length, 0], np.arange(150))
    for length in (149, cache.capacity + 1):
        with pytest.raises(ValueError, match="outside"):
            cache.extend(length)
    with pytest.raises(FastVLMError, match="301 positions do not fit into the context of 300"):
        cache.reserve(301)
    assert cache.length == 150


def test_truncate_and_overwrite() -> None:
    cache = make()
    cache.append(block(10), 0)
    cache.truncate(4)
    cache.append(block(2, 90), 4)
    assert cache.length == 6 and cache.buffer[0, 1, 0, 0, :6, 0].tolist() == [0, 1, 2, 3, 90, 91]
    with pytest.raises(ValueError, match="outside the 6 positions"):
        cache.truncate(7)
    with pytest.raises(ValueError, match="outside the 6 positions"):
        cache.append(block(1), 7)


def test_reset_gives_memory_back() -> None:
    cache = make()
    cache.append(block(10), 0)
    assert not cache.reset() and cache.length == 0
    cache.append(block(600), 0)
    assert cache.reset() and cache.capacity == 128


def test_views_are_contiguous_and_share_the_buffer() -> None:
    cache = make()
    views = dict(cache.views())
    assert list(views) == [f"past_key_values.{n}.{part}" for n in range(2) for part in ("key", "value")]
    cache.append(block(3, 1), 0)
    for view in views.values():
        assert view.shape == (1, 3, 128, 4) and view.flags.c_contiguous and np.shares_memory(view, cache.buffer)
        assert view[0, 0, 2, 0] == 3


def test_positions_never_written_are_zero() -> None:
    cache = make()
    cache.append(block(300, 1), 0)
    assert not cache.buffer[..., 300:, :].any()


def test_bfloat16_rounds_like_ml_dtypes() -> None:
    random = np.random.default_rng(0)
    signs = random.choice([-1, 1], 4000)
    parts: list[Any] = [signs * 10.0 ** random.uniform(-40, 38, 4000), [0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45]]
    any_bits = random.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([*(np.asarray(part, np.float32) for part in parts), any_bits])
    bits = from_float32(values, "bfloat16")
    assert bits.dtype == np.uint16
    with np.errstate(invalid="ignore", over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(to_float32(bits, "bfloat16"), expected, equal_nan=True)


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(FastVLMError, match="'float8' is unknown"):
        storage("float8")
