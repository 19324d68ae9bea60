"""What every contender of the GPU benchmark is asked: a picture with prompts of known length, and the demo model's questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo" / "fastvlm-demo"
PROMPTS = {"300": 290, "2000": 1900}
"""Name of a context -> positions before the reply. The reply then crosses no border of the cache's buckets once it is warm."""
NEW_TOKENS = 129
"""The first comes from prefill, the others are 128 decode steps."""
QUESTIONS, SEED = 16, 2026
SHOWN_TOKENS = 16


@dataclass(frozen=True)
class Task:
    """What a step needs to know."""

    work: Path
    checkpoint: Path
    precisions: tuple[str, ...]
    runs: int

    def arguments(self) -> list[str]:
        """For the command line of a step."""
        precisions = ",".join(self.precisions)
        return ["--work", str(self.work), "--checkpoint", str(self.checkpoint), "--precisions", precisions, "--runs", str(self.runs)]


def model_directory(task: Task, model: str, precision: str) -> Path:
    """Where the demo model or the one to measure is kept."""
    return task.work / (f"demo-{precision}" if model == "demo" else precision)


def photograph() -> Any:
    """A photograph that scikit-image ships, 600 x 400."""
    import skimage.data

    return skimage.data.coffee()


def demo_questions(count: int = QUESTIONS) -> list[tuple[str, Any]]:
    """(prompt, PIL image) of held-out scenes."""
    from examples.demo_training.scenes import make_scene

    scenes = [make_scene("heldout", SEED, index) for index in range(count)]
    return [(scene.questions[0].prompt, scene.image) for scene in scenes]
