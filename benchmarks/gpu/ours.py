"""fastvlm-edge in the GPU benchmark: any of its backends, timed by the timings that its replies carry."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.gpu import workload
from benchmarks.gpu.figures import STAGES, most_memory
from benchmarks.gpu.record import Part
from benchmarks.gpu.workload import Task, demo_questions, model_directory, photograph
from fastvlm_edge.bench.record import digits, summary
from fastvlm_edge.bench.workload import question
from fastvlm_edge.machine.peak_memory import DeviceMemory

if TYPE_CHECKING:
    from fastvlm_edge import FastVLM


def speed_of_ours(task: Task, backend: str, precision: str) -> Iterator[Part]:
    """Load a model directory into a backend and measure it."""
    from fastvlm_edge import FastVLM
    from fastvlm_edge.nvidia.drivers import open_cuda

    memory = DeviceMemory(open_cuda().free_bytes)
    began = time.perf_counter()
    vlm = FastVLM.load(model_directory(task, "model", precision), backend, tune_process=True)
    yield {"load_ms": digits((time.perf_counter() - began) * 1e3), "backend": vlm.backend.description}
    yield from time_replies(vlm, workload.PROMPTS, task.runs, workload.NEW_TOKENS)
    yield most_memory(memory)
    vlm.close()


def ask_demo(vlm: FastVLM) -> list[list[int]]:
    """Ids of the greedy replies to the demo questions."""
    return [vlm.generate(prompt, image=image, max_new_tokens=16).token_ids for prompt, image in demo_questions()]


def time_replies(vlm: FastVLM, prompts: dict[str, int], runs: int, new_tokens: int) -> Iterator[Part]:
    """First token with the first of `prompts`, decoding behind each; the shortest first, because the cache's buffer only grows."""
    never_ending(vlm)
    image = photograph()
    for index, (name, positions) in enumerate(sorted(prompts.items(), key=lambda item: item[1])):
        prompt = prompt_of(vlm, positions)
        replies = [vlm.generate(prompt, image=image, max_new_tokens=new_tokens) for _ in range(runs + 2)][2:]
        if any(len(reply.token_ids) != new_tokens for reply in replies):
            raise RuntimeError(f"a reply ended after {len(replies[0].token_ids)} of {new_tokens} tokens")
        timings = [reply.timings for reply in replies]
        if index == 0:
            yield {"first_token": {stage: summary(getattr(timing, stage) for timing in timings) for stage in STAGES}}
            yield {"tokens": replies[0].token_ids[: workload.SHOWN_TOKENS]}
        speed = summary(timing.decode_tokens_per_second for timing in timings)
        yield {"decode": {name: {"prompt_tokens": timings[0].prompt_tokens, "tokens_per_second": speed}}}


def never_ending(vlm: FastVLM) -> None:
    """Random weights may sample an end of reply at any time; let no id be one."""
    from dataclasses import replace

    vlm.manifest = replace(vlm.manifest, text=replace(vlm.manifest.text, stop_ids=[]))


def prompt_of(vlm: FastVLM, positions: int) -> str:
    """A question that, with its picture and the template around both, takes that many positions."""
    return question(lambda prompt: len(vlm._template.opening()) + len(vlm._template.turn(prompt, (vlm.manifest.vision.tokens,))), positions)
