"""Does a server stay right, fast and small under a mixed load of good, malformed, huge, slow and vanishing clients?

    python -m benchmarks.serve_load MODEL [--requests 2000] [--connections 8] [--out benchmarks/results/serve_load.json]

MODEL is a model directory; the demo in FP32 (`fastvlm-edge convert examples/demo/fastvlm-demo --precision fp32`) gives every good request
the answer that it gets alone. The server runs in a process of its own. Every client picks what it sends by its own seed.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from benchmarks.common import machine
from benchmarks.peers.protocol import ROOT
from examples.demo_training.scenes import scene_questions
from fastvlm_edge import FastVLM
from fastvlm_edge.bench.record import digits, write_json
from fastvlm_edge.evaluation.data import open_data

PATH = "/v1/chat/completions"
TOKENS = 16
QUESTIONS = 64
KINDS = {"good": 8, "stream": 8, "malformed": 4, "huge": 1, "slow": 1, "vanishing": 3}
"""What a client sends -> how often, in parts."""
MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"messages": 1}',
    b'{"messages": []}',
    b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "robot", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "no_such_field": true}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}',
    b"[" * 100_000,
    b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
)
HUGE = 40 << 20
"""Bytes of a body beyond the limit."""


class Server:
    """`fastvlm-edge serve` in a process of its own."""

    def __init__(self, model: Path, folder: Path, slots: int) -> None:
        self.log = folder / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "fastvlm_edge", "serve", str(model), "--port", str(self.port), "--slots", str(slots)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, "--backend", "ort", "--no-access-log"], stderr=log)
        end = time.monotonic() + 120
        while self.health() != 200:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(self.log.read_text())
            time.sleep(0.1)

    def health(self) -> int:
        """Status of /health, or 0 if nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def memory_mib(self) -> float:
        """Resident memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("no VmRSS")

    def open_files(self) -> int:
        """File descriptors in use."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        """SIGTERM. Returns the exit status."""
        self.process.terminate()
        return self.process.wait(60)


class Client:
    """One connection that sends one request after the other, and opens itself again."""

    def __init__(self, server: Server, seed: int, good: Sequence[tuple[bytes, bytes, str]]) -> None:
        self.server, self.good, self.random = server, good, random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.first_token_ms: list[float] = []
        self.whole_ms: list[float] = []
        self.faults: list[str] = []
        self.connection: http.client.HTTPConnection | None = None

    def send(self) -> None:
        """One request of a random kind."""
        kind = self.random.choices([*KINDS], [*KINDS.values()])[0]
        try:
            status = getattr(self, f"_{kind}")()
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.drop()
            status = type(error).__name__
            if kind in ("good", "stream", "malformed"):
                self.faults.append(f"{kind}: {error!r}")
        self.seen[f"{kind}: {status}"] += 1

    def drop(self) -> None:
        """Close the connection."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _post(self, body: bytes) -> http.client.HTTPResponse:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        self.connection.request("POST", PATH, body, {"content-type": "application/json"})
        return self.connection.getresponse()

    def _good(self) -> str:
        body, _, expected = self.random.choice(self.good)
        began = time.perf_counter()
        response = self._post(body)
        data = response.read()
        if response.status == 429:
            return "429"
        if response.status != 200:
            self.faults.append(f"good: {response.status} {data[:200]!r}")
            return str(response.status)
        self.whole_ms.append(1e3 * (time.perf_counter() - began))
        self._compare(json.loads(data)["choices"][0]["message"]["content"], expected)
        return "200"

    def _stream(self) -> str:
        _, body, expected = self.random.choice(self.good)
        began = time.perf_counter()
        response = self._post(body)
        if response.status != 200:
            data = response.read()
            if response.status != 429:
                self.faults.append(f"stream: {response.status} {data[:200]!r}")
            return str(response.status)
        text, first = "", 0.0
        for line in iter(response.readline, b""):
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
                    if text and not first:
                        first = 1e3 * (time.perf_counter() - began)
        self.first_token_ms.append(first)
        self._compare(text, expected)
        return "200"

    def _compare(self, text: str, expected: str) -> None:
        if text != expected:
            self.faults.append(f"answer {text!r} instead of {expected!r}")

    def _malformed(self) -> str:
        body = self.random.choice(MALFORMED)
        response = self._post(body)
        answer = response.read()
        if not 400 <= response.status < 500 or "message" not in json.loads(answer).get("error", {}):
            self.faults.append(f"malformed {body[:80]!r}: {response.status} {answer[:200]!r}")
        return str(response.status)

    def _huge(self) -> str:
        self.drop()
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as raw:
            raw.sendall(head(HUGE))
            try:
                for _ in range(HUGE >> 20):
                    raw.sendall(b" " * (1 << 20))
            except OSError:
                pass  # it has refused already
            return raw.recv(64).split(b" ")[1].decode()

    def _slow(self) -> str:
        """A body that comes in pieces, with pauses."""
        body = self.random.choice(self.good)[0]
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=120) as raw:
            raw.sendall(head(len(body)))
            for part in range(8):
                raw.sendall(body[part * len(body) // 8 : (part + 1) * len(body) // 8])
                time.sleep(0.05)
            return raw.recv(64).split(b" ")[1].decode()

    def _vanishing(self) -> str:
        """It goes away: in the middle of its body, while it waits, or after the first bytes of the answer."""
        whole, streamed, _ = self.random.choice(self.good)
        moment = self.random.choice(("body", "waiting", "answer"))
        body = streamed if moment == "answer" else whole
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as raw:
            raw.sendall(head(len(body)))
            raw.sendall(body[: len(body) // 2] if moment == "body" else body)
            if moment == "waiting":
                time.sleep(self.random.random() * 0.02)
            if moment == "answer":
                raw.recv(32)
        return moment


def head(length: int) -> bytes:
    """What comes before a body of so many bytes."""
    return f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode()


def good_requests(model: Path, questions: Path) -> list[tuple[bytes, bytes, str]]:
    """(body, body with stream, what the model answers alone)."""
    found = []
    lines = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()][:QUESTIONS]
    with FastVLM.load(model, "ort", slots=1, prefix_cache=False, image_cache=0, speculate=False) as vlm:
        for line, (example, image) in zip(lines, open_data(questions).read(), strict=False):
            file = (questions.parent / line["image"]).read_bytes()
            url = f"data:image/png;base64,{base64.b64encode(file).decode()}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": example.prompt}]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
            answer = vlm.generate(example.prompt or "", image, max_new_tokens=TOKENS).text
            found.append((json.dumps(body).encode(), json.dumps({**body, "stream": True}).encode(), answer))
    return found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    return {"count": len(values), "p50": digits(median(values)), "p99": digits(quantiles(values, n=100)[98])}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load and write the record. Returns 1 if a good request failed, or an answer was not the one of a single run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--work", type=Path, default=Path("build/serve_load"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "serve_load.json")
    options = parser.parse_args(arguments)
    good = good_requests(options.model, scene_questions(options.work, "heldout", QUESTIONS))
    left, lock = [options.requests], threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.model, Path(folder), options.slots)
        clients = [Client(server, seed, good) for seed in range(options.connections)]
        memory: list[float] = []

        def work(client: Client) -> None:
            while True:
                with lock:
                    if not left[0]:
                        client.drop()
                        return
                    left[0] -= 1
                    if left[0] % (options.requests // 10) == 0:
                        memory.append(round(server.memory_mib(), 1))
                        print(left[0], memory[-1], "MiB", file=sys.stderr, flush=True)
                client.send()

        began = time.perf_counter()
        threads = [threading.Thread(target=work, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        time.sleep(1)
        health, files = server.health(), server.open_files()
        status = server.stop()
        log = server.log.read_text(encoding="utf-8", errors="replace")
    faults = [fault for client in clients for fault in client.faults]
    document = {
        "what": "mixed load on fastvlm-edge serve: good, malformed, huge, slow and vanishing clients, onnxruntime on a CPU",
        "machine": machine.describe(),
        "requests": options.requests,
        "connections": options.connections,
        "slots": options.slots,
        "seconds": digits(seconds),
        "answers": dict(sorted(sum((client.seen for client in clients), Counter[str]()).items())),
        "first_token_ms": percentiles([value for client in clients for value in client.first_token_ms]),
        "whole_answer_ms": percentiles([value for client in clients for value in client.whole_ms]),
        "memory_mib": memory,
        "faults": len(faults),
        "tracebacks": log.count("Traceback"),
        "after": {"health": health, "open_files": files, "exit_status": status},
    }
    write_json(options.out, document)
    print(json.dumps({name: value for name, value in document.items() if name != "machine"}, indent=1))
    for fault in faults[:10]:
        print(fault, file=sys.stderr)
    print(log[-3000:], file=sys.stderr)
    return 1 if faults or document["tracebacks"] else 0


if __name__ == "__main__":
    sys.exit(main())
