"""Exact match of the demo checkpoint on held-out questions, by kind, with the PyTorch model.

python examples/demo/evaluate.py examples/demo/checkpoint --count 2000 --json benchmarks/results/demo_accuracy.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint import load_checkpoint, sha256
from language import IGNORE, Prompter
from model import DemoModel, Packed
from picture import Scene
from scenes import KINDS, make_scene
from torch import Tensor

SEED = 2026
MOST_NEW_TOKENS = 12


@torch.inference_mode()
def answer_scenes(model: DemoModel, prompter: Prompter, scenes: Sequence[Scene]) -> list[str]:
    """Greedy answers to the first question about each picture, all in one batch."""
    pixels = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).permute(0, 3, 1, 2)
    pixels = pixels.to(torch.float32).div(255).contiguous(memory_format=torch.channels_last)
    features = model.vision(pixels).features
    rows = [[*prompter.beginning, *prompter.prompt(scene.questions[0].prompt)] for scene in scenes]
    begun = [len(row) for row in rows]
    running = list(range(len(rows)))
    for _ in range(MOST_NEW_TOKENS):
        packed = _as_packed([rows[i] for i in running], len(prompter.beginning))
        chosen = model.logits(packed, features[running]).argmax(-1).tolist()
        for i, token in zip(running, chosen, strict=True):
            rows[i].append(token)
        running = [i for i in running if rows[i][-1] != prompter.end_id]
        if not running:
            break
    return [
        prompter.tokenizer.decode([token for token in row[start:] if token != prompter.end_id], skip_special_tokens=False)
        for row, start in zip(rows, begun, strict=True)
    ]


def _as_packed(rows: Sequence[list[int]], beginning: int) -> Packed:
    """Rows of ids with one question each, padded on the right, with a label only at each row's last place."""
    length = max(len(row) for row in rows)
    ids, question = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -1)
    labels = torch.full((len(rows), length), IGNORE)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        question[index, :beginning], question[index, beginning : len(row)] = 0, 1
        labels[index, len(row) - 1] = 0
    positions: Tensor = torch.arange(length).expand(len(rows), -1)
    return Packed(ids, positions, question, labels)


def score(pairs: Iterable[tuple[Scene, str]]) -> dict[str, dict[str, float]]:
    """Questions, right answers and exact match by kind; readings also by number of digits, and all together."""
    counts: dict[str, list[int]] = {}
    for scene, answer in pairs:
        question = scene.questions[0]
        keys = [question.kind, "all"]
        if question.kind == "reading":
            keys.append(f"reading, {len(question.answer)} digits")
        for key in keys:
            tally = counts.setdefault(key, [0, 0])
            tally[0] += 1
            tally[1] += answer == question.answer
    order = [*KINDS, *sorted(key for key in counts if ", " in key), "all"]
    return {
        key: {"questions": counts[key][0], "right": counts[key][1], "exact_match": round(counts[key][1] / counts[key][0], 4)}
        for key in order
        if key in counts
    }


def evaluate(model: DemoModel, prompter: Prompter, *, seed: int, count: int, batch: int = 100) -> dict[str, dict[str, float]]:
    """Score `count` held-out pictures, one question each; progress on stderr."""
    pairs = []
    for start in range(0, count, batch):
        scenes = [make_scene("heldout", seed, index, size=model.config.image_size) for index in range(start, min(start + batch, count))]
        pairs += list(zip(scenes, answer_scenes(model, prompter, scenes), strict=True))
        print(f"\r{len(pairs)}/{count} questions", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return score(pairs)


def format_table(scores: dict[str, dict[str, float]]) -> str:
    lines = [f"{'kind':<20}{'questions':>10}{'right':>8}{'exact match':>13}"]
    lines += [f"{kind:<20}{row['questions']:>10}{row['right']:>8}{100 * row['exact_match']:>12.1f}%" for kind, row in scores.items()]
    return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    """Processor and core count, for the record."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return {"processor": name, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Exact match of the demo checkpoint on held-out questions.")
    parser.add_argument("checkpoint", type=Path, help="folder of the exported checkpoint")
    parser.add_argument("--seed", type=int, default=SEED, help="held-out seed; default: %(default)s")
    parser.add_argument("--count", type=int, default=2000, help="questions; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_checkpoint(args.checkpoint)
    except (OSError, RuntimeError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    begun = time.perf_counter()
    scores = evaluate(model, Prompter(tokenizer, model.config.visual_tokens), seed=args.seed, count=args.count)
    print(format_table(scores))
    if args.json:
        result = {
            "what": "exact match of the demo checkpoint, PyTorch model in float32, greedy, one question a picture",
            "model_sha256": sha256(args.checkpoint / "model.safetensors"),
            "split": "heldout",
            "seed": args.seed,
            "count": args.count,
            "seconds": round(time.perf_counter() - begun, 1),
            "scores": scores,
            "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "numpy", "matplotlib")},
            "python": platform.python_version(),
            "machine": describe_machine(),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
