"""Exact match on held-out questions by kind: checked during training, and recorded by `benchmarks/demo_accuracy.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from examples.demo_training.drawing.picture import Scene
from examples.demo_training.language import IGNORE, Prompter
from examples.demo_training.model import DemoModel, Packed
from examples.demo_training.scenes import KINDS

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
    """Rows of ids with one question each, padded on the right; only the last place of each row has a label."""
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
    """Number of questions, right answers and exact match: by kind, for readings also by number of digits, and in total."""
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
