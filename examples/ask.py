"""Ask one question about one picture.

python examples/ask.py model meter.jpg "What does the meter read?"
"""

import argparse
import sys

from fastvlm_edge import FastVLM, FastVLMError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="model directory, written by `fastvlm-edge convert`")
    parser.add_argument("picture")
    parser.add_argument("question")
    arguments = parser.parse_args()

    with FastVLM.load(arguments.model) as vlm:
        reply = vlm.generate(arguments.question, image=arguments.picture, max_new_tokens=64)
    print(reply.text)
    print(f"{reply.timings.ttft_ms:.0f} ms to the first token; {reply.timings.new_tokens} tokens", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except FastVLMError as error:  # a sentence for the user: what is wrong and what to do
        sys.exit(f"error: {error}")
