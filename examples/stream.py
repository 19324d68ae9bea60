"""Print an answer while it is generated.

python examples/stream.py model photo.jpg "Describe the picture."
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
        stream = vlm.stream(arguments.question, image=arguments.picture, max_new_tokens=256)
        try:
            for piece in stream:  # strings; together they are the whole answer
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()  # Ctrl-C ends the answer; what has been generated so far is the reply
        print()
        timings = stream.reply.timings
    print(f"{timings.ttft_ms:.0f} ms to the first token, then {timings.decode_tokens_per_second:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except FastVLMError as error:
        sys.exit(f"error: {error}")
