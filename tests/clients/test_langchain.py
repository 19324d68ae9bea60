"""LangChain's ChatOpenAI, as it is: its replies are those of `FastVLM`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.commands.demo import MODEL

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def vlm() -> FastVLM:
    return FastVLM.load(MODEL, "ort")


@pytest.fixture(scope="module")
def replies(clients: Path, served: str, demo_question: tuple[Path, str]) -> Any:
    script = Path(__file__).with_name("langchain_client.py")
    command = [str(clients / "python"), str(script), f"{served}v1", *map(str, demo_question)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_text(replies: Any, vlm: FastVLM, demo_question: tuple[Path, str]) -> None:
    assert replies["text"] == vlm.generate(demo_question[1]).text


def test_a_picture_each_way(replies: Any, vlm: FastVLM, demo_question: tuple[Path, str]) -> None:
    picture, question = demo_question
    expected = vlm.generate(question, image=picture)
    for way in ("picture", "own_format", "async", "responses"):
        assert replies[way] == expected.text, way
    assert replies["batch"] == [expected.text] * 6
    assert replies["usage"]["output_tokens"] == len(expected.token_ids)


def test_streams_have_the_reply_in_pieces(replies: Any) -> None:
    for way in ("stream", "async_stream"):
        pieces = [piece for piece in replies[way] if piece]
        assert len(pieces) > 1 and "".join(pieces) == replies["picture"], way


def test_a_structured_reply(replies: Any, vlm: FastVLM, demo_question: tuple[Path, str]) -> None:
    picture, question = demo_question
    reading = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"reading": reading}, "required": ["reading"], "additionalProperties": False}
    expected = json.loads(vlm.generate(question, image=picture, json_schema=schema).text)
    assert replies["structured"] == replies["async_structured"] == expected


def test_several_turns(replies: Any, vlm: FastVLM, demo_question: tuple[Path, str]) -> None:
    picture, question = demo_question
    chat = vlm.chat(system="Answer briefly.")
    chat.ask(question, image=picture)
    assert replies["turns"] == chat.ask("Count the objects.").text
