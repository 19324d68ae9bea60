"""What does asking through the server cost beside asking in Python? Time to the first piece of text, both in turns.

    python -m benchmarks.serve_latency MODEL [--rounds 5] [--out benchmarks/results/serve_latency.json]

MODEL is a model directory, such as a converted random checkpoint of the 0.5B size. Each round asks both sides a first question about a new
picture, a follow-up question, and another question about the same picture. The picture is a JPEG file of 1024 x 768 pixels: Python reads
the file, the server gets it in the request, as clients of the OpenAI API send it. The follow-up of both sides gives the reply before it as
text (`history=`): a random model's tokens are rarely those that the tokenizer gives their text, so a `chat`, which keeps the ids, has less
to compute.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

from benchmarks.common import machine
from benchmarks.conversations import FOLLOW_UP, QUESTION
from benchmarks.peers.protocol import ROOT
from benchmarks.serve_load import PATH, Server
from fastvlm_edge import ChatTurn, FastVLM
from fastvlm_edge.bench.record import digits, write_json

TOKENS = 8
OTHER = "What is this?"


def picture(number: int) -> bytes:
    """A photograph as a JPEG file. Every number is another picture."""
    pixels = np.roll(data.coffee(), 7 * number, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((1024, 768)).save(file, "JPEG", quality=90)
    return file.getvalue()


class ThroughServer:
    """Asks with one connection that stays open."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)

    def ask(self, messages: Sequence[dict[str, Any]]) -> tuple[float, str]:
        """Milliseconds to the first text, or to the end of a reply without one, and the whole text."""
        body = json.dumps({"messages": messages, "stream": True, "max_tokens": TOKENS}).encode()
        began = time.perf_counter()
        self._connection.request("POST", PATH, body, {"content-type": "application/json"})
        response = self._connection.getresponse()
        if response.status != 200:
            raise RuntimeError(response.read().decode())
        first, text = 0.0, ""
        for line in iter(response.readline, b""):
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
                    first = first or (1e3 * (time.perf_counter() - began) if text else 0.0)
        return first or 1e3 * (time.perf_counter() - began), text

    def round(self, file: bytes, _path: Path) -> dict[str, float]:
        """The three questions."""
        url = {"url": f"data:image/jpeg;base64,{base64.b64encode(file).decode()}"}

        def about(question: str) -> dict[str, Any]:
            return {"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": question}]}

        first, reply = self.ask([about(QUESTION)])
        follow, _ = self.ask([about(QUESTION), {"role": "assistant", "content": reply}, {"role": "user", "content": FOLLOW_UP}])
        return {"first_question": first, "follow_up": follow, "repeated_picture": self.ask([about(OTHER)])[0]}


class InPython:
    """Asks a model in this process."""

    def __init__(self, vlm: FastVLM) -> None:
        self._vlm = vlm

    def round(self, _file: bytes, path: Path) -> dict[str, float]:
        """The three questions."""
        first, reply = self._first(lambda: self._vlm.stream(QUESTION, path, max_new_tokens=TOKENS))
        said = [ChatTurn(QUESTION, reply, [self._vlm.encode_image(path)])]
        return {
            "first_question": first,
            "follow_up": self._first(lambda: self._vlm.chat(history=said).stream(FOLLOW_UP, max_new_tokens=TOKENS))[0],
            "repeated_picture": self._first(lambda: self._vlm.stream(OTHER, path, max_new_tokens=TOKENS))[0],
        }

    @staticmethod
    def _first(ask: Callable[[], Any]) -> tuple[float, str]:
        began = time.perf_counter()
        first, text = 0.0, ""
        for piece in ask():
            text += piece
            first = first or (1e3 * (time.perf_counter() - began) if text else 0.0)
        return first or 1e3 * (time.perf_counter() - began), text


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both sides in turns, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "serve_latency.json")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, list[float]]] = {"python": {}, "server": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.jpg"
        server = Server(options.model, Path(folder), slots=4)
        with FastVLM.load(options.model, "ort", tune_process=True) as vlm:
            manifest = vlm.manifest
            sides: dict[str, ThroughServer | InPython] = {"python": InPython(vlm), "server": ThroughServer(server)}
            for number in range(options.rounds + 1):
                file = picture(number)
                path.write_bytes(file)
                for name in sides if number % 2 else reversed(sides):
                    for what, value in sides[name].round(file, path).items():
                        if number:
                            found[name].setdefault(what, []).append(digits(value))
        server.stop()
    document = {
        "what": "time to the first text through the server and in Python, onnxruntime on a CPU",
        "machine": machine.describe(),
        "model": {"name": manifest.name, "precision": manifest.precision, "image_size": manifest.vision.image_size},
        "first_text_ms": found,
    }
    write_json(options.out, document)
    for what in found["python"]:
        python, through = (median(found[name][what]) for name in ("python", "server"))
        print(f"{what}: {python:.1f} ms in Python, {through:.1f} ms through the server")
    return 0


if __name__ == "__main__":
    sys.exit(main())
