"""Does any request body, or any damaged picture, get more out of the server than an answer or a sentence?

    python -m benchmarks.serve_fuzz [MODEL] [--bodies 100000] [--pictures 100000] [--seed 0] [--out benchmarks/results/serve_fuzz.json]

The application is called in this process, without sockets. Bodies are valid requests of which a few values, keys or bytes are changed;
pictures are small jpeg, png, webp and gif files of which a few bytes are changed, cut off or repeated, as `data:` addresses in a request.
Every answer has to be JSON with a status that a client can understand: 200, or 4xx with an error in the API's form.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import machine
from benchmarks.peers.protocol import ROOT
from fastvlm_edge import AsyncFastVLM
from fastvlm_edge.bench.record import digits, write_json
from fastvlm_edge.server.app import make_app
from fastvlm_edge.server.settings import Settings

LONGEST = 60.0
"""Seconds for an answer."""
PATHS = ("/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")
FORMATS = ("jpeg", "png", "webp", "gif")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, -0.0, 0.5, 1e308, "", " ", "a", "\x00", "\ud800", "é" * 50, "<|im_end|>"),
    *([], {}, [[]], [None], {"a": {}}, {"type": "text"}, {"type": "image_url"}, {"url": "data:,"}, "data:image/png;base64,!!", "x" * 5000),
)
KEYS = ("", "messages", "role", "content", "type", "text", "image_url", "url", "stream", "n", "seed", "stop", "tools", "__class__", "x")


class Asked:
    """What an ASGI application answers to one body."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        sent, status, answer = False, 0, bytearray()
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await gone.wait()
                return {"type": "http.disconnect"}
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event: dict[str, Any]) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
            else:
                answer.extend(event.get("body", b""))

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
        }
        scope |= {
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("x", 80),
            "scheme": "http",
            "root_path": "",
        }
        await self.app(scope, receive, send)
        gone.set()
        return status, bytes(answer)


def seeds(url: str) -> list[tuple[str, Any]]:
    """Valid requests: (path, body)."""
    picture = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "Sure?"},
    ]
    common = {"messages": messages, "max_tokens": 2}
    return [
        (PATHS[0], {**common, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "stop": ["a", "b"], "n": 2}),
        (PATHS[0], {**common, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 3}),
        (PATHS[0], {**common, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
        (PATHS[0], {**common, "structured_outputs": {"choice": ["yes", "no"]}, "user": "me", "model": None}),
        (
            PATHS[1],
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "max_output_tokens": 2, "stream": True},
        ),
        (PATHS[1], {"input": "Hi", "instructions": "Be short.", "max_output_tokens": 2, "stream": True}),
        (PATHS[2], {"prompt": "Hello there"}),
        (PATHS[3], {"tokens": [1, 2, 3]}),
    ]


def changed(value: Any, random: random.Random) -> Any:
    """The value with one part of it replaced, removed, repeated or renamed."""
    if isinstance(value, dict) and value and random.random() < 0.97:
        key = random.choice([*value])
        act = random.randrange(6)
        if act == 0:
            return {name: each for name, each in value.items() if name != key}
        if act == 1:
            return {**value, random.choice(KEYS): random.choice(VALUES)}
        if act == 2:
            return {random.choice(KEYS) if name == key else name: each for name, each in value.items()}
        return {**value, key: changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.97:
        place = random.randrange(len(value))
        if random.randrange(5) == 0:
            return [*value, *value[place:]]
        return [*value[:place], changed(value[place], random), *value[place + 1 :]]
    return random.choice(VALUES)


def body_of(document: Any, random: random.Random) -> bytes:
    """The document as JSON, with up to three changes of values, and sometimes damaged."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        document = changed(document, random)
    data = json.dumps(document, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return damaged(data, random) if random.random() < 0.15 else data


def damaged(data: bytes, random: random.Random) -> bytes:
    """Some bytes changed, cut off, or repeated."""
    found = bytearray(data)
    for _ in range(random.randrange(1, 6)):
        if not found:
            break
        place = random.randrange(len(found))
        act = random.randrange(5)
        if act < 2:
            found[place] = random.randrange(256)
        elif act == 2:
            found[place] ^= 1 << random.randrange(8)
        elif act == 3:
            del found[place : place + random.randrange(1, 64)]
        else:
            found[place:place] = found[place : place + random.randrange(1, 64)]
    return bytes(found[: random.randrange(len(found) + 1)] if random.random() < 0.1 else found)


def pictures(random: random.Random) -> list[tuple[str, bytes]]:
    """Small files of every format and several modes: (format, file)."""
    found = []
    for name in FORMATS:
        for size in ((1, 1), (40, 30), (97, 201)):
            for mode in ("RGB", "L", "P") if name in ("png", "gif") else ("RGB", "L"):
                image = Image.frombytes("RGB", size, random.randbytes(size[0] * size[1] * 3)).convert(mode)
                file = io.BytesIO()
                image.save(file, name)
                found.append((name, file.getvalue()))
    return found


def fault_of(status: int, answer: bytes) -> str | None:
    """What is wrong with an answer."""
    if status == 200:
        return None if answer else "an empty answer"
    if not 400 <= status < 500 or status == 429:
        return f"status {status}"
    try:
        error = json.loads(answer)["error"]
        return None if error["message"] and error["type"] else "an error without a message"
    except (ValueError, KeyError, TypeError):
        return "an answer in another form"


async def fuzz(asked: Asked, count: int, make: Callable[[], tuple[str, str, bytes]], what: str) -> dict[str, Any]:
    """Send `count` bodies, each of which `make` gives as (group, path, body). Returns what became of them."""
    seen: Counter[str] = Counter()
    faults: list[str] = []
    slowest, began = 0.0, time.perf_counter()
    for number in range(count):
        group, path, body = make()
        start = time.perf_counter()
        try:
            status, answer = await asyncio.wait_for(asked(path, body), LONGEST)
            fault = fault_of(status, answer)
            seen[f"{group} {status}"] += 1
        except Exception as error:
            fault = repr(error)
        slowest = max(slowest, time.perf_counter() - start)
        if fault is not None:
            faults.append(f"{path} {body[:400]!r}: {fault}")
        if number % (count // 10 or 1) == 0:
            print(what, number, dict(seen), len(faults), file=sys.stderr, flush=True)
    return {
        "count": count,
        "seconds": digits(time.perf_counter() - began),
        "slowest_ms": digits(1e3 * slowest),
        "answers": dict(sorted(seen.items())),
        "faults": faults[:20],
    }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Fuzz bodies, then pictures."""
    chance = random.Random(options.seed)
    files = pictures(chance)
    async with await AsyncFastVLM.load(options.model, "ort", slots=2) as vlm:
        app = make_app(vlm, Settings(slots=2, access_log=False))
        async with app.router.lifespan_context(app):
            await app.state.server.ready.wait()
            asked = Asked(app)

            def a_body() -> tuple[str, str, bytes]:
                name, file = chance.choice(files)
                path, document = chance.choice(seeds(address(name, file)))
                return path, path, body_of(document, chance)

            def a_picture() -> tuple[str, str, bytes]:
                name, file = chance.choice(files)
                part = {"type": "image_url", "image_url": {"url": address(name, damaged(file, chance))}}
                return name, PATHS[0], json.dumps({"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}).encode()

            return {
                "bodies": await fuzz(asked, options.bodies, a_body, "bodies"),
                "pictures": await fuzz(asked, options.pictures, a_picture, "pictures"),
            }


def address(name: str, file: bytes) -> str:
    """A file as a `data:` address."""
    return f"data:image/{name};base64,{base64.b64encode(file).decode()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz and write the record. Returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "fastvlm_edge" / "demo" / "model")
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "serve_fuzz.json")
    options = parser.parse_args(arguments)
    found = asyncio.run(run(options))
    what = "random changes of request bodies and of pictures, sent to the server's application"
    write_json(options.out, {"what": what, "machine": machine.describe(), "seed": options.seed, **found})
    for part, each in found.items():
        print(part, {name: value for name, value in each.items() if name != "faults"})
        print(*each["faults"], sep="\n")
    return 1 if any(each["faults"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
