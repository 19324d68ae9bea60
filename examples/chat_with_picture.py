"""Ask several questions about one picture. The picture is encoded once, and every turn computes only its own tokens.

python examples/chat_with_picture.py model sign.jpg

Type a question per line; an empty line or Ctrl-D ends the conversation.
"""

import argparse
import sys

from fastvlm_edge import FastVLM, FastVLMError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="model directory, written by `fastvlm-edge convert`")
    parser.add_argument("picture")
    arguments = parser.parse_args()

    with FastVLM.load(arguments.model) as vlm:
        chat = vlm.chat()
        picture = vlm.encode_image(arguments.picture)
        print("> ", end="", flush=True)
        for line in sys.stdin:
            question = line.strip()
            if not question:
                break
            try:
                first_turn = chat.token_count == 0
                for piece in chat.stream(question, image=picture if first_turn else None, max_new_tokens=128):
                    print(piece, end="", flush=True)
            except FastVLMError as error:  # for example: the context is full
                print(f"{error}; starting a new conversation", file=sys.stderr)
                chat.reset()
            print(f"\n[{chat.token_count} of {vlm.manifest.decoder.context} positions used]\n> ", end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main()
    except FastVLMError as error:
        sys.exit(f"error: {error}")
