"""A backend over the interpreter of graphs: it computes what the graphs for a GPU say, with every value rounded to its declared type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastvlm_edge.backends.kv_cache import FIRST_CAPACITY, next_capacity
from fastvlm_edge.backends.protocol import ImageFeatures, SavedSlot, StepOutput, position_bytes
from fastvlm_edge.model_dir.engine_record import EngineRecord
from fastvlm_edge.model_dir.manifest import Manifest
from tests.support.graph_interpreter import Interpreter

TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class HeldFeatures:
    """Image features in the decoder's type."""

    def __init__(self, data: NDArray[Any]) -> None:
        self.data = data

    @property
    def rows(self) -> int:
        return len(self.data)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numpy(self) -> NDArray[np.float32]:
        return self.data.astype(np.float32)


class RoundedBackend:
    """Implements `Checked`, with one slot. As on a GPU, the cache keeps its capacity and its old contents."""

    name = "tensorrt"
    description = "interpreter"
    slots = 1
    engines: EngineRecord | None = None

    def __init__(self, directory: Path, manifest: Manifest, *, exact: bool = False) -> None:
        """With `exact`, everything is computed in float64."""
        self.spec = manifest.decoder
        self.vision = Interpreter(directory / "vision.onnx", exact=exact)
        self.decoder = Interpreter(directory / "decoder.onnx", exact=exact)
        self.dtype: Any = np.float64 if exact else TYPES[self.spec.dtype]
        self.lengths = [0]
        self.position_bytes = position_bytes(self.spec)
        self.cache = self.empty(FIRST_CAPACITY)

    def empty(self, capacity: int) -> NDArray[Any]:
        spec = self.spec
        return np.zeros((spec.layers, 2, 1, spec.kv_heads, capacity, spec.head_dim), self.dtype)

    def encode(self, pixel_values: NDArray[np.float32]) -> ImageFeatures:
        return HeldFeatures(self.vision.run({"pixel_values": pixel_values})["image_features"][0])

    def upload(self, features: NDArray[np.float32]) -> ImageFeatures:
        return HeldFeatures(features.astype(self.dtype))

    def cached(self, length: int, first: int = 0) -> NDArray[np.float32]:
        return self.cache[:, :, 0, :, first:length].astype(np.float32)

    def step(
        self,
        input_ids: Sequence[int],
        image_features: tuple[ImageFeatures, ...] = (),
        *,
        slot: int = 0,
        logit_positions: Sequence[int] | None = None,
        want_logits: bool = False,
    ) -> StepOutput:
        start = self.lengths[0]
        end = start + len(input_ids)
        pictures = [features.data for features in image_features if isinstance(features, HeldFeatures)]
        feeds = {
            "input_ids": np.array([input_ids], np.int64),
            "position_ids": np.arange(start, end)[None],
            "logit_positions": np.array([[len(input_ids) - 1] if logit_positions is None else list(logit_positions)], np.int64),
            "image_features": np.concatenate(pictures or [np.zeros((1, self.spec.hidden), self.dtype)]),
        }
        for layer in range(self.spec.layers):
            for index, part in enumerate(("key", "value")):
                feeds[f"past_key_values.{layer}.{part}"] = self.cache[layer, index]
        out = self.run(feeds)
        if end > self.cache.shape[4]:
            larger = self.empty(next_capacity(end))
            larger[..., :start, :] = self.cache[..., :start, :]
            self.cache = larger
        self.cache[..., start:end, :] = out["kv_new"]
        self.lengths = [end]
        floats = {name: out[name][0].astype(np.float32) for name in ("top_values", "log_normalizer", "logits")}
        return StepOutput(floats["top_values"], out["top_ids"][0], floats["log_normalizer"], floats["logits"] if want_logits else None)

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the decoder once; tests override this."""
        return self.decoder.run(feeds)

    def decode(self, input_ids: Sequence[int], *, want_logits: bool = False) -> StepOutput:
        (token_id,) = input_ids
        return self.step((token_id,), want_logits=want_logits)

    def copy(self, source: int, target: int, length: int) -> None:
        raise NotImplementedError

    def save(self, slot: int) -> SavedSlot | None:
        return None

    def restore(self, saved: SavedSlot, slot: int, length: int) -> None:
        raise NotImplementedError

    def truncate(self, length: int, slot: int = 0) -> None:
        self.lengths = [length]

    def reset(self, slot: int = 0) -> None:
        self.truncate(0)

    def close(self) -> None:
        pass
