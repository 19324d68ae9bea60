"""Compare two conversions of one checkpoint on a picture: size, speed, and whether the answers agree.

python examples/compare_two_precisions.py model-fp32 model-int4 meter.jpg "What does the meter read?"

`fastvlm-edge bench` with `bench compare` says whether a difference in speed is more than noise; `fastvlm-edge eval` measures accuracy.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from fastvlm_edge import FastVLM, FastVLMError, Reply

RUNS = 5


def measure(model: Path, picture: str, question: str) -> Reply:
    """Load a model, ask RUNS times after one warm-up, and print its row of the table."""
    with FastVLM.load(model) as vlm:
        replies = [vlm.generate(question, image=picture, max_new_tokens=64) for _ in range(RUNS + 1)][1:]
    mebibytes = sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) / 2**20
    first_token = median(reply.timings.ttft_ms for reply in replies)
    speed = median(reply.timings.decode_tokens_per_second for reply in replies)
    print(f"{model.name:20} {replies[0].precision:>6} {mebibytes:9.1f} {first_token:15.0f} {speed:9.1f}  {replies[0].text}")
    return replies[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs=2, type=Path, metavar="MODEL", help="model directory, written by `fastvlm-edge convert`")
    parser.add_argument("picture")
    parser.add_argument("question")
    arguments = parser.parse_args()

    print(f"{'model':20} {'':>6} {'MiB':>9} {'first token ms':>15} {'tokens/s':>9}  answer")
    first, second = (measure(model, arguments.picture, arguments.question) for model in arguments.models)
    print("the same tokens" if first.token_ids == second.token_ids else "the tokens differ")


if __name__ == "__main__":
    try:
        main()
    except FastVLMError as error:
        sys.exit(f"error: {error}")
