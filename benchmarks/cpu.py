"""FastVLM-0.5B on a CPU, side by side with transformers in one run: time to first token, decode speed, memory, load time.

    python benchmarks/cpu.py [--work DIR] [--out benchmarks/results/cpu.json]

Random weights of the real 0.5B size stand in for the released ones; speed does not depend on their values. One picture of 1024 px (256
visual tokens) and 34 tokens of text, greedy, 2 threads. Every contender runs in a process of its own, all of them once a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CONTENDERS = ("transformers:float32", "transformers:bfloat16", "fastvlm-edge:fp32", "fastvlm-edge:int8", "fastvlm-edge:int4")
TEXT_TOKENS = 34
NEW_TOKENS = 33
RUNS = 2
FIELDS = ("load_ms", "preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms", "decode_tokens_per_second", "peak_memory_mib")
PIXELS = 1024


def main() -> int:
    """Run the benchmark and write its JSON, or be one contender of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where checkpoint and model directories are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        library, _, kind = options.contender.partition(":")
        result = {"transformers": measure_transformers, "fastvlm-edge": measure_ours}[library](options.work, kind, options.threads)
        print(json.dumps(result))
        return 0

    from benchmarks import machine

    prepare(options.work)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(options.rounds):
        for name in CONTENDERS:
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--work", str(options.work), "--threads", str(options.threads), "--contender", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
    document = {
        "what": "FastVLM-0.5B (random weights), 1024 px, 256 visual + 34 text tokens, greedy",
        "machine": machine.describe(),
        "limits": machine.limits(options.threads),
        "threads": options.threads,
        "results": {name: summary(runs) for name, runs in rounds.items()},
        "where_the_time_goes": where_the_time_goes(options.work, options.threads),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print_table(document)
    return 0


def summary(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median, least and most of every figure over the rounds."""
    return {
        field: {
            "median": round(statistics.median(values), 1),
            "min": round(min(values), 1),
            "max": round(max(values), 1),
        }
        for field in FIELDS
        if (values := [run[field] for run in rounds])
    }


def print_table(document: dict[str, Any]) -> None:
    """The medians, for people."""
    print(f"{'':24}" + "".join(f"{field.replace('_ms', ' ms').replace('_', ' '):>26}" for field in FIELDS))
    for name, figures in document["results"].items():
        print(f"{name:24}" + "".join(f"{figures[field]['median']:26.1f}" for field in FIELDS))
    print(f"limits: {document['limits']}")


def prepare(work: Path) -> None:
    """Make the checkpoint and the model directories once."""
    from fastvlm_edge.convert.convert import convert
    from fastvlm_edge.progress import stderr_progress
    from tests.checkpoints import write_checkpoint

    if not (work / "checkpoint" / "config.json").is_file():
        write_checkpoint(work / "checkpoint", layout="native", size="0.5b")
    for precision in ("fp32", "int8", "int4"):
        if not (work / precision).is_dir():
            convert(str(work / "checkpoint"), work / precision, precision=precision, context=2048, progress=stderr_progress())


def picture() -> Any:
    """A photograph that scikit-image ships, 600 x 400."""
    import skimage.data

    return skimage.data.coffee()


def prompt_for(work: Path) -> str:
    """A question that makes the text around the picture 34 tokens long."""
    from fastvlm_edge.manifest import read_manifest
    from fastvlm_edge.prompt import ChatTemplate
    from fastvlm_edge.tokenizer import TextTokenizer

    template = ChatTemplate(TextTokenizer(work / "int4" / "tokenizer.json"), read_manifest(work / "int4"))
    prompt = "a"
    while len(template.opening()) + len(template.turn(prompt, (1,))) - 1 < TEXT_TOKENS:
        prompt += " a"
    return prompt


def peak_memory_mib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_ours(work: Path, precision: str, threads: int) -> dict[str, float]:
    """Load, one warm-up, then the median of RUNS questions."""
    from fastvlm_edge import FastVLM

    prompt = prompt_for(work)
    image = picture()
    began = time.perf_counter()
    vlm = FastVLM.load(work / precision, backend="ort", threads=threads)
    load = (time.perf_counter() - began) * 1e3
    vlm.generate(prompt, image=image, max_new_tokens=4)
    replies = [vlm.generate(prompt, image=image, max_new_tokens=NEW_TOKENS) for _ in range(RUNS)]
    assert all(len(reply.token_ids) == NEW_TOKENS for reply in replies)
    fields = ("preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms", "decode_tokens_per_second")
    figures = {field: statistics.median(getattr(reply.timings, field) for reply in replies) for field in fields}
    return {"load_ms": load, **figures, "peak_memory_mib": peak_memory_mib()}


def measure_transformers(work: Path, dtype: str, threads: int) -> dict[str, float]:
    """The same question to `FastVlmForConditionalGeneration`, eager, its own preprocessing behind Apple's padding."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    from tests.timm_reference import import_timm

    torch.set_num_threads(threads)
    import_timm()
    from transformers import FastVlmForConditionalGeneration

    began = time.perf_counter()
    model = FastVlmForConditionalGeneration.from_pretrained(work / "checkpoint", dtype=getattr(torch, dtype)).eval()
    load = (time.perf_counter() - began) * 1e3
    tokenizer = AutoTokenizer.from_pretrained(work / "checkpoint")
    processor = CLIPImageProcessorPil.from_pretrained(work / "checkpoint", do_normalize=False)
    ids = tokenizer(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + "<image>" * (PIXELS // 64) ** 2
        + f"\n{prompt_for(work)}<|im_end|>\n<|im_start|>assistant\n",
        return_tensors="pt",
        add_special_tokens=False,
    )["input_ids"]
    assert ids.shape[1] == (PIXELS // 64) ** 2 + TEXT_TOKENS, ids.shape

    def preprocess() -> Any:
        source = Image.fromarray(picture())
        square = Image.new("RGB", (max(source.size),) * 2)
        square.paste(source, ((square.width - source.width) // 2, (square.height - source.height) // 2))
        return processor(square, return_tensors="pt")["pixel_values"].to(model.dtype)

    def generate(pixels: Any, count: int) -> None:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=count, do_sample=False)
        assert out.shape[1] == ids.shape[1] + count

    entered: list[float] = []
    left: list[float] = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: entered.append(time.perf_counter()))
    model.model.multi_modal_projector.register_forward_hook(lambda *_: left.append(time.perf_counter()))
    runs = []
    with torch.inference_mode():
        generate(preprocess(), 4)
        for _ in range(RUNS):
            entered.clear()
            left.clear()
            marks = [time.perf_counter()]
            pixels = preprocess()
            marks.append(time.perf_counter())
            generate(pixels, 1)
            marks.append(time.perf_counter())
            generate(pixels, NEW_TOKENS)
            marks.append(time.perf_counter())
            before, first, whole = (later - earlier for earlier, later in itertools.pairwise(marks))
            vision, again = (end - start for start, end in zip(entered, left, strict=True))
            decoding = (whole - again) - (first - vision)
            runs.append((before, vision, first - vision, before + first, (NEW_TOKENS - 1) / decoding))
    before, vision, prefill, ttft, speed = (statistics.median(column) for column in zip(*runs, strict=True))
    return {
        "load_ms": load,
        "preprocess_ms": before * 1e3,
        "vision_ms": vision * 1e3,
        "prefill_ms": prefill * 1e3,
        "ttft_ms": ttft * 1e3,
        "decode_tokens_per_second": speed,
        "peak_memory_mib": peak_memory_mib(),
    }


def where_the_time_goes(work: Path, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds by operator of one picture (FP32 encoder), one prefill of 290 and one decoded token (INT4) in onnxruntime's profiler."""
    from benchmarks.operators import by_operator

    return {
        "vision, fp32": by_operator(work / "fp32", "vision", threads),
        "prefill of 290, int4": by_operator(work / "int4", "prefill", threads),
        "decode at 300, int4": by_operator(work / "int4", "decode", threads),
    }


if __name__ == "__main__":
    sys.exit(main())
