"""The KV cache grows without losing anything, and bfloat16 bits are those of ml_dtypes. Nothing is stubbed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fastvlm_edge import FastVLMError
from fastvlm_edge.backends.dtypes import from_float32, storage, to_float32
from fastvlm_edge.backends.kv_cache import KVCache


def make(context: int = 3000, dtype: str = "float32", slots: int = 1) -> KVCache:
    return KVCache(layers=2, kv_heads=3, head_dim=4, context=context, dtype=dtype, slots=slots)


def block(seq: int, start: int = 0, rows: int = 1) -> np.ndarray:
    return np.broadcast_to(np.arange(start, start + seq, dtype=np.float32)[:, None], (2, 2, rows, 3, seq, 4))


def append(cache: KVCache, seq: int, start: int = 0, slot: int = 0) -> bool:
    changed = cache.reserve(slot, cache.lengths[slot] + seq)
    cache.append(block(seq, start), slot)
    return changed


def held(cache: KVCache, slot: int) -> list[float]:
    rows = cache.buffer[:, :, slot, :, : cache.lengths[slot]]
    assert all(
        np.array_equal(rows[0, 0, 0, :, 0], rows[layer, part, head, :, 3]) for layer in (0, 1) for part in (0, 1) for head in range(3)
    )
    return [float(value) for value in rows[0, 0, 0, :, 0]]


def test_capacity_grows_in_steps_up_to_the_context() -> None:
    cache = make()
    seen = [cache.capacity]
    for position in range(0, 3000, 100):
        changed = append(cache, 100, position)
        assert changed == (cache.capacity != seen[-1])
        seen.append(cache.capacity)
        assert held(cache, 0) == list(range(position + 100))
    assert sorted(set(seen)) == [*range(128, 1025, 128), 1536, 2048, 2560, 3000]
    with pytest.raises(FastVLMError, match="3001 positions do not fit into the context of 3000"):
        cache.reserve(0, 3001)
    assert cache.lengths == [3000]


def test_a_context_below_the_first_bucket() -> None:
    assert make(context=100).capacity == 100


def test_one_append_may_skip_buckets() -> None:
    cache = make()
    append(cache, 5)
    append(cache, 1500, 5)
    assert cache.capacity == 1536 and held(cache, 0) == list(range(1505))


def test_a_graph_may_append_by_itself_where_room_was_reserved() -> None:
    cache = make(context=300)
    append(cache, 100)
    assert not cache.reserve(0, 128)
    assert cache.reserve(0, 129)
    cache.buffer[:, :, :, :, 100:150] = block(50, 100)
    cache.extend(150)
    assert held(cache, 0) == list(range(150))
    for length in (149, cache.capacity + 1):
        with pytest.raises(ValueError, match="outside"):
            cache.extend(length)
    assert cache.lengths == [150]


def test_truncate_and_overwrite() -> None:
    cache = make()
    append(cache, 10)
    cache.truncate(4)
    append(cache, 2, 90)
    assert held(cache, 0) == [0, 1, 2, 3, 90, 91]
    with pytest.raises(ValueError, match="outside the 6 positions"):
        cache.truncate(7)


def test_rows_are_added_as_slots_are_used_and_each_keeps_its_own() -> None:
    cache = make(slots=4)
    append(cache, 20, 100)
    assert (cache.rows, cache.capacity) == (1, 128)
    assert append(cache, 140, 200, slot=2)
    assert (cache.rows, cache.capacity, cache.lengths) == (3, 256, [20, 0, 140, 0])
    append(cache, 3, 300, slot=1)
    cache.reserve(2, 141)
    cache.append(block(1, 900, rows=3))  # one decode step of three slots
    assert held(cache, 0) == [*range(100, 120), 900]
    assert held(cache, 1) == [300, 301, 302, 900]
    assert held(cache, 2) == [*range(200, 340), 900]


def test_a_slot_is_copied_saved_and_restored() -> None:
    cache = make(slots=3)
    append(cache, 200, 500)
    cache.copy(0, 2, 150)
    assert held(cache, 2) == list(range(500, 650)) and held(cache, 0) == list(range(500, 700))
    saved = cache.save(0)
    assert (saved.length, saved.nbytes) == (200, 2 * 2 * 3 * 200 * 4 * 4)
    cache.truncate(0)
    append(cache, 200, 7)
    assert cache.restore(saved, 1, 130) is False  # the row is there
    assert held(cache, 1) == list(range(500, 630)) and held(cache, 0) == list(range(7, 207))


def test_reset_gives_the_memory_back_that_no_other_slot_needs() -> None:
    cache = make(slots=3)
    append(cache, 10)
    assert not cache.reset() and cache.lengths == [0, 0, 0]
    append(cache, 600)
    append(cache, 50, 40, slot=1)
    append(cache, 10, slot=2)
    assert cache.reset(2) is False and (cache.rows, cache.capacity) == (3, 640), "a copy of a long slot for one row is not worth it"
    assert cache.reset(0) and (cache.rows, cache.capacity) == (2, 128)
    assert held(cache, 1) == list(range(40, 90))
    assert cache.reset(1) and (cache.rows, cache.capacity) == (1, 128)


def test_views_are_contiguous_and_share_the_buffer() -> None:
    cache = make(slots=3)
    for slot in range(3):
        append(cache, 3, 10 * slot, slot)
    for slot, rows in ((0, 1), (0, 3), (1, 2), (2, 1)):
        views = dict(cache.views(slot, rows))
        assert list(views) == [f"past_key_values.{n}.{part}" for n in range(2) for part in ("key", "value")]
        for view in views.values():
            assert view.shape == (rows, 3, 128, 4) and view.flags.c_contiguous and np.shares_memory(view, cache.buffer)
            assert view[:, 0, 2, 0].tolist() == [10 * number + 2 for number in range(slot, slot + rows)]


def test_positions_never_written_are_zero() -> None:
    cache = make()
    append(cache, 300, 1)
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
