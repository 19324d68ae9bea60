"""Ask the same question about every picture in a folder; one JSON object per line on stdout.

python examples/batch_over_folder.py model photos "What does the meter read?" > answers.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

from fastvlm_edge import FastVLM, FastVLMError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="model directory, written by `fastvlm-edge convert`")
    parser.add_argument("folder", type=Path)
    parser.add_argument("question")
    arguments = parser.parse_args()

    pictures = sorted(path for path in arguments.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    with FastVLM.load(arguments.model) as vlm:
        for number, path in enumerate(pictures, 1):
            try:
                reply = vlm.generate(arguments.question, image=path, max_new_tokens=64)
                line = {"picture": path.name, "answer": reply.text, "seconds": round(reply.timings.ttft_ms / 1e3, 3)}
            except FastVLMError as error:  # one damaged picture does not end the batch
                line = {"picture": path.name, "error": str(error)}
            print(json.dumps(line, ensure_ascii=False), flush=True)
            print(f"{number} of {len(pictures)}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except FastVLMError as error:
        sys.exit(f"error: {error}")
