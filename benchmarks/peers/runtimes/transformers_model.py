"""FastVLM in transformers: decoded by its own `generate`, and by a greedy loop over a static cache that `torch.compile` can take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Loaded:
    """A model of transformers and what it takes to ask it."""

    torch: Any
    model: Any
    device: str
    """`cpu` or `cuda`."""

    def ids(self, ids: list[int], vocab: int) -> Any:
        """The toolkit's ids, where `vocab + k` is row k of the image features, as transformers wants them: [1, n]."""
        picture = self.model.config.image_token_id
        return self.torch.tensor([[picture if each >= vocab else each for each in ids]], device=self.device)

    def wait(self) -> float:
        """Wait until the GPU has finished all its work, and return the time in seconds."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()


Reply = Callable[[Loaded, Any, Any, int], list[int]]
"""(model, ids [1, n], pixel_values, count) -> `count` greedy ids: `generate` or `reply_by_static_loop`."""


def load_transformers(checkpoint: Path, dtype: str, device: str = "cpu") -> Loaded:
    """Load `FastVlmForConditionalGeneration`; no id ends its replies. Raises RuntimeError if `device` is cuda and PyTorch has no CUDA."""
    import torch

    from examples.checkpoints.in_transformers import import_timm

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch has no CUDA; install one that has, see pytorch.org")
    import_timm()
    from transformers import FastVlmForConditionalGeneration

    model = FastVlmForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval().to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.do_sample = False
    return Loaded(torch, model, device)


def generate(loaded: Loaded, ids: Any, pixels: Any, count: int) -> list[int]:
    """`count` greedy ids by transformers' own `generate`."""
    mask = loaded.torch.ones_like(ids)
    out = loaded.model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=count, do_sample=False)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    if len(tokens) != count:
        raise RuntimeError(f"transformers gave {len(tokens)} tokens instead of {count}")
    return tokens


def time_decoding(loaded: Loaded, ids: Any, pixels: Any, count: int) -> tuple[list[int], float]:
    """Greedy ids, and how many of them are decoded per second.

    The time is one interval, from entering the second pass through the language model to entering the last: `count - 2` whole steps with
    what `generate` does between them. The difference of a long and a short reply would have the noise of both, and may be negative. The GPU
    is waited for only at both ends.
    """
    passes = 0
    marks: list[float] = []

    def enter(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes in (2, count):
            marks.append(loaded.wait())

    hook = loaded.model.model.language_model.register_forward_pre_hook(enter)
    try:
        tokens = generate(loaded, ids, pixels, count)
    finally:
        hook.remove()
    if passes != count:
        raise RuntimeError(f"transformers passed {passes} times through the language model for {count} tokens")
    return tokens, (count - 2) / (marks[1] - marks[0])


def reply_by_static_loop(loaded: Loaded, ids: Any, pixels: Any, count: int) -> list[int]:
    """`count` greedy ids by `StaticLoop`, not compiled."""
    loop = StaticLoop(loaded, ids.shape[1] + count, compiled=False)
    return [loop.prefill(ids, loop.encode(pixels)), *loop.decode(ids.shape[1], count - 1)]


class StaticLoop:
    """Greedy decoding with a cache of fixed size, as gpt-fast and transformers' guide to torch.compile do it.

    Compiled, it is `torch.compile(mode="reduce-overhead")` of the encoder, of prefill and of a decode step.
    """

    def __init__(self, loaded: Loaded, length: int, *, compiled: bool) -> None:
        """`length` is the most positions that prompt and reply may take."""
        from transformers import StaticCache

        self._loaded, model, torch = loaded, loaded.model, loaded.torch
        text = model.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._cache = StaticCache(config=text, max_cache_len=length)
        # Now, not inside compiled code: only then its addresses become static, and without that there are no CUDA graphs.
        self._cache.early_initialization(1, text.num_key_value_heads, head_dim, model.dtype, model.device)
        self._token: Any = None
        self._position = torch.zeros((1, 1), dtype=torch.int64, device=model.device)

        def encode(pixels: Any) -> Any:
            features = model.model.get_image_features(pixels)
            features = getattr(features, "pooler_output", features)
            return (features[0] if isinstance(features, (list, tuple)) else features).reshape(
                -1, model.config.get_text_config().hidden_size
            )

        def embed(ids: Any, features: Any) -> Any:
            embeds = model.get_input_embeddings()(ids)
            embeds[0, ids[0] == model.config.image_token_id] = features.to(embeds.dtype)
            return embeds

        def forward(embeds: Any, positions: Any, cache: Any) -> Any:
            hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True)
            return model.lm_head(hidden.last_hidden_state[:, -1:]).argmax(-1)

        def step(token: Any, positions: Any, cache: Any) -> Any:
            return forward(model.get_input_embeddings()(token), positions, cache)

        def compile_(function: Any) -> Any:
            return torch.compile(function, mode="reduce-overhead", dynamic=False) if compiled else function

        self._encode, self._embed, self._forward, self._step = compile_(encode), embed, compile_(forward), compile_(step)

    def encode(self, pixels: Any) -> Any:
        """Image features [tokens, hidden]."""
        self._mark()
        return self._encode(pixels).clone()

    def prefill(self, ids: Any, features: Any) -> int:
        """Start anew with `ids` [1, n] and return the first token of the reply."""
        torch = self._loaded.torch
        self._cache.reset()
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self._mark()
        self._token = self._forward(self._embed(ids, features), positions, self._cache).clone()
        return int(self._token)

    def decode(self, start: int, count: int) -> list[int]:
        """Decode `count` more tokens, the first of them at position `start`."""
        tokens = []
        self._position.fill_(start)
        for _ in range(count):
            self._mark()
            self._token = self._step(self._token, self._position, self._cache).clone()
            self._position.add_(1)
            tokens.append(int(self._token))
        return tokens

    def _mark(self) -> None:
        self._loaded.torch.compiler.cudagraph_mark_step_begin()
