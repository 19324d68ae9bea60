"""`fastvlm-edge demo`: asks the demo model, which comes with the package, about three pictures. It needs only the runtime."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import TORCH_PAGE, install_command
from fastvlm_edge.generation.vlm import FastVLM

HOME = Path(__file__).resolve().parents[1] / "demo"
"""Written by `python -m examples.demo.renew` in a clone."""
MODEL = HOME / "model"
QUESTIONS = HOME / "questions.jsonl"
"""One JSON object per line: `image`, `prompt`, `answer`."""
PRECISION = "int4"


def main(arguments: Sequence[str]) -> int:
    """Stream the answers and print what to type next. Raises FastVLMError if an answer is not the expected one."""
    parser().parse_args(arguments)
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    right = 0
    with FastVLM.load(MODEL, "ort", tune_process=True) as vlm:
        print(f"{vlm.manifest.name} ({vlm.manifest.precision}) on {vlm.backend.description}\n")
        for row in rows:
            print(f"{row['image']}: {row['prompt']}\n  answer    ", end="", flush=True)
            stream = vlm.stream(row["prompt"], HOME / row["image"], max_new_tokens=16)
            for text in stream:
                print(text, end="", flush=True)
            right += stream.reply.text == row["answer"]
            print(f"\n  expected  {row['answer']}")
            print(f"  first token after {stream.reply.timings.ttft_ms:.0f} ms\n")
    if right < len(rows):
        raise FastVLMError(
            f"{len(rows) - right} of {len(rows)} answers are not the expected ones", f"run: fastvlm-edge doctor {_shown(MODEL)}"
        )
    print(_next_steps(rows[-1]["image"]))
    return 0


def _next_steps(picture: str) -> str:
    """What to type next."""
    install = "" if find_spec("torch") else f"  {install_command('convert')}  # after PyTorch's CPU build, see {TORCH_PAGE}\n"
    return (
        "Next, ask this small model something else. It knows meters, dials, signs, labels and coloured shapes:\n"
        f'  fastvlm-edge run {_shown(MODEL)} --image {_shown(HOME / picture)} "What colour is the circle?"\n'
        "Or convert a FastVLM that knows the world (Apple licenses its weights for research only), and ask about a picture of yours:\n"
        f"{install}"
        "  fastvlm-edge convert apple/FastVLM-0.5B -o model\n"
        '  fastvlm-edge run model --image PICTURE.jpg "What is in this picture?"'
    )


def _shown(path: Path) -> str:
    """A path for a shell, relative where that is shorter."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):  # the working directory is gone
        relative = str(path)
    return shlex.quote(min(relative, str(path), key=len))


def parser() -> argparse.ArgumentParser:
    """The command has no options."""
    return argparse.ArgumentParser(
        prog="fastvlm-edge demo",
        description="Ask the demo model, which comes with the package, three questions about three pictures. It takes seconds on a CPU.",
    )
