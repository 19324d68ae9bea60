"""`examples/ray_serve/app.py` on a Ray of this machine: `python ray_serve_client.py MODEL PORT PICTURE QUESTION` prints answers as JSON."""

from __future__ import annotations

import base64
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import ray
from ray import serve

from examples.ray_serve.app import build


def main(model: str, port: int, picture: Path, question: str) -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"model": model, "cpus": "1"}))
        base = f"http://127.0.0.1:{port}"
        replies = _ask(base, picture, question)
    finally:
        serve.shutdown()
        ray.shutdown()
    print(json.dumps(replies))  # the last line: Ray writes to stdout, too


def _ask(base: str, picture: Path, question: str) -> Any:
    while _status(f"{base}/health") != 200:
        time.sleep(0.1)
    url = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}]}
    reply = json.loads(_post(f"{base}/v1/chat/completions", body)[0])
    events = _post(f"{base}/v1/chat/completions", {**body, "stream": True})
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in events if line.startswith(b"data: {")]
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    return {"text": reply["choices"][0]["message"]["content"], "pieces": [piece for piece in pieces if piece]}


def _post(url: str, body: Any) -> list[bytes]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return list(answer)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
