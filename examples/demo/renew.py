"""Makes what `fastvlm-edge demo` shows: the converted demo model, three pictures with a question each, and the answers.

    python -m examples.demo.renew

It replaces fastvlm_edge/demo/, which the wheel carries. Run it from the root of a clone after a change to the conversion or to the demo
checkpoint. A test compares the answers of the packaged model with those of a new conversion.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from examples.demo_training.scenes import make_scene
from fastvlm_edge.commands.demo import HOME, MODEL, PRECISION, QUESTIONS
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.model_dir.verified import VERIFIED_NAME
from fastvlm_edge.progress import stderr_progress

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = Path("examples", "demo", "fastvlm-demo")
"""Relative to ROOT, because the manifest keeps it."""
SCENES = {"meter.jpg": ("reading", 3), "sign.jpg": ("sign", 1), "shapes.jpg": ("count", 2)}
"""Picture -> kind and index of a held-out scene: none of them was seen in training."""
JPEG_QUALITY = 95


def write_pictures(folder: Path) -> None:
    """Draw the pictures, and write their questions and answers in the format of `eval --data`."""
    rows = []
    for name, (kind, index) in SCENES.items():
        scene = make_scene("heldout", 0, index, kind=kind)
        scene.image.save(folder / name, quality=JPEG_QUALITY)
        rows.append({"image": name, "prompt": scene.questions[0].prompt, "answer": scene.questions[0].answer})
    (folder / QUESTIONS.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Replace the packaged demo."""
    os.chdir(ROOT)
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    write_pictures(HOME)
    convert(str(CHECKPOINT), MODEL, precision=PRECISION, progress=stderr_progress())
    (MODEL / VERIFIED_NAME).unlink(missing_ok=True)  # it belongs to one copy
    print(f"{HOME}: {sum(path.stat().st_size for path in HOME.rglob('*') if path.is_file()) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FastVLMError as error:
        sys.exit(f"renew: {error}")
