"""transformers as anyone would use it, in the GPU benchmark: eager, by its own `generate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import workload
from benchmarks.gpu.figures import first_token, most_memory
from benchmarks.gpu.record import Part
from benchmarks.gpu.transformers_model import Loaded, begin_transformers, preprocessor, template_ids
from benchmarks.gpu.workload import Task
from fastvlm_edge.bench.record import summary


def generate(loaded: Loaded, ids: Any, pixels: Any, count: int) -> list[int]:
    """Greedy ids by transformers' own `generate`."""
    mask = loaded.torch.ones_like(ids)
    out = loaded.model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=count, do_sample=False)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    if len(tokens) != count:
        raise RuntimeError(f"transformers gave {len(tokens)} tokens instead of {count}")
    return tokens


def time_decoding(loaded: Loaded, ids: Any, pixels: Any, count: int) -> tuple[list[int], float]:
    """Greedy ids, and how many of them a second are decoded: from entering the second pass through the language model to entering the last,
    so `count - 2` whole steps with what `generate` does between them. One interval: the difference of a long reply and a short one would
    have the noise of both, and may be negative. The GPU is waited for at both ends only."""
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


def speed_of_transformers(task: Task, dtype: str, device: str = "cuda") -> Iterator[Part]:
    """Eager, by `generate`, as anyone would use it."""
    loaded, part, memory = begin_transformers(task, dtype, device)
    yield part
    preprocess, tower = preprocessor(task, loaded), loaded.model.model
    entered: list[float] = []
    left: list[float] = []
    tower.vision_tower.register_forward_pre_hook(lambda *_: entered.append(loaded.wait()))
    tower.multi_modal_projector.register_forward_hook(lambda *_: left.append(loaded.wait()))
    with loaded.torch.inference_mode():
        for index, (name, positions) in enumerate(workload.PROMPTS.items()):
            ids = template_ids(task, loaded, positions)
            generate(loaded, ids, preprocess(), 8)
            rows, speeds = [], []
            for _ in range(task.runs):
                entered.clear()
                left.clear()
                marks = [loaded.wait()]
                pixels = preprocess()
                marks.append(loaded.wait())
                generate(loaded, ids, pixels, 1)
                marks.append(loaded.wait())
                before, first = (later - earlier for earlier, later in itertools.pairwise(marks))
                (vision,) = (end - start for start, end in zip(entered, left, strict=True))
                rows.append((before + first, before, vision, first - vision))
                tokens, speed = time_decoding(loaded, ids, pixels, workload.NEW_TOKENS)
                speeds.append(speed)
            if index == 0:
                yield first_token(rows)
                yield {"tokens": tokens[: workload.SHOWN_TOKENS]}
            yield {"decode": {name: {"prompt_tokens": positions, "tokens_per_second": summary(speeds)}}}
            if memory is not None:
                yield most_memory(memory)
