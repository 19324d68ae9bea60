"""transformers under `torch.compile`, in the GPU benchmark: a greedy loop of our own over its static cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import workload
from benchmarks.gpu.figures import first_token, most_memory
from benchmarks.gpu.record import Part
from benchmarks.gpu.transformers_model import Loaded, begin_transformers, preprocessor, template_ids
from benchmarks.gpu.workload import Task
from fastvlm_edge.bench.record import digits, summary


def speed_of_compiled(task: Task, dtype: str, device: str = "cuda", *, compiled: bool = True) -> Iterator[Part]:
    """`torch.compile(mode="reduce-overhead")` of the encoder, of prefill and of a decode step; compiling is in the warm-up."""
    loaded, part, memory = begin_transformers(task, dtype, device)
    yield part
    preprocess = preprocessor(task, loaded)
    with loaded.torch.no_grad():
        for index, (name, positions) in enumerate(workload.PROMPTS.items()):
            ids = template_ids(task, loaded, positions)
            began = loaded.wait()
            loop = StaticLoop(loaded, -(-(positions + workload.NEW_TOKENS) // 128) * 128, compiled=compiled)
            for _ in range(3):  # compile, record, replay
                loop.prefill(ids, loop.encode(preprocess()))
                loop.decode(positions, 3)
            yield {"compile_seconds": {name: digits(loaded.wait() - began)}}
            rows, speeds = [], []
            for _ in range(task.runs):
                marks = [loaded.wait()]
                pixels = preprocess()
                marks.append(loaded.wait())
                features = loop.encode(pixels)
                marks.append(loaded.wait())
                tokens = [loop.prefill(ids, features)]
                marks.append(loaded.wait())
                tokens += loop.decode(positions, workload.NEW_TOKENS - 1)
                marks.append(loaded.wait())
                before, vision, prefill, decoding = (later - earlier for earlier, later in itertools.pairwise(marks))
                rows.append((before + vision + prefill, before, vision, prefill))
                speeds.append((workload.NEW_TOKENS - 1) / decoding)
            if index == 0:
                yield first_token(rows)
                yield {"tokens": tokens[: workload.SHOWN_TOKENS]}
            yield {"decode": {name: {"prompt_tokens": positions, "tokens_per_second": summary(speeds)}}}
            if memory is not None:
                yield most_memory(memory)


def reply_by_static_loop(loaded: Loaded, ids: Any, pixels: Any, count: int) -> list[int]:
    """Greedy ids by the loop, not compiled."""
    loop = StaticLoop(loaded, ids.shape[1] + count, compiled=False)
    return [loop.prefill(ids, loop.encode(pixels)), *loop.decode(ids.shape[1], count - 1)]


class StaticLoop:
    """Greedy decoding with a cache of fixed size, as gpt-fast and transformers' guide to torch.compile do it."""

    def __init__(self, loaded: Loaded, length: int, *, compiled: bool) -> None:
        from transformers import StaticCache

        self._loaded, model, torch = loaded, loaded.model, loaded.torch
        text = model.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._cache = StaticCache(config=text, max_cache_len=length)
        # Now, not inside compiled code: only so do its addresses become static, and without them there are no CUDA graphs.
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
        """Begin anew with `ids` [1, n]; the first token of the reply."""
        torch = self._loaded.torch
        self._cache.reset()
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self._mark()
        self._token = self._forward(self._embed(ids, features), positions, self._cache).clone()
        return int(self._token)

    def decode(self, start: int, count: int) -> list[int]:
        """That many more tokens; the next stands at position `start`."""
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
