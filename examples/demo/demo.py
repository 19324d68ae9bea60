"""The demo: convert the demo checkpoint, ask three questions about three pictures, print answers, what was expected, and timings.

make demo
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from examples.demo_training.scenes import make_scene
from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.convert.pipeline import convert
from fastvlm_edge.progress import stderr_progress

CHECKPOINT = Path(__file__).resolve().parent / "fastvlm-demo"
ASKED = (("reading", 3), ("sign", 1), ("count", 2))
"""Kind and index of held-out scenes: none of them was seen in training."""


def main() -> int:
    """Run the demo; 0 when it ran, whatever the answers were."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        began = time.perf_counter()
        manifest = convert(str(CHECKPOINT), work / "model", progress=stderr_progress())
        print(f"converted {CHECKPOINT.name} to {manifest.precision} in {time.perf_counter() - began:.1f} s\n")
        with FastVLM.load(work / "model", tune_process=True) as vlm:
            print(f"{vlm.backend.description}\n")
            for kind, index in ASKED:
                scene = make_scene("heldout", 0, index, kind=kind)
                question = scene.questions[0]
                picture = work / f"{kind}.png"
                scene.image.save(picture)
                reply = vlm.generate(question.prompt, image=picture, max_new_tokens=16)
                timings = reply.timings
                print(f"{picture.name}: {question.prompt}")
                print(f"  answer    {reply.text}")
                print(f"  expected  {question.answer}")
                speed = f"{timings.decode_tokens_per_second:.0f} tokens/s"
                print(f"  first token after {timings.ttft_ms:.0f} ms (vision {timings.vision_ms:.0f}), then {speed}\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FastVLMError as error:
        sys.exit(f"demo: {error}")
