"""/tokenize and /detokenize agree with what the model is given, and /props with the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from skimage import data
from starlette.testclient import TestClient

from fastvlm_edge import ChatTurn, FastVLM
from fastvlm_edge.backends.load_engines import load_engines
from fastvlm_edge.generation.engine import Engine
from fastvlm_edge.inputs.tokenizer import TextTokenizer
from fastvlm_edge.model_dir.engine_record import read_record
from fastvlm_edge.model_dir.manifest import read_manifest
from fastvlm_edge.server import tokens
from tests.fastvlm_edge.server.serving import PROMPT, picture_url, serving
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_engine import build_engines, fake_gpu

TEXT = "Ein Zähler: 042 \U0001f600 <|im_end|>"


@pytest.fixture(scope="module")
def client(vlm: FastVLM) -> Iterator[TestClient]:
    with serving(vlm) as client:
        yield client


def post(client: TestClient, path: str, status: int = 200, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.mark.parametrize("name", ["content", "prompt"])
def test_a_text_and_back(client: TestClient, vlm: FastVLM, name: str) -> None:
    answer = client.post("/tokenize", json={name: TEXT}).json()
    assert answer == {"tokens": vlm.tokenizer.encode(TEXT), "count": len(answer["tokens"]), "max_model_len": vlm.manifest.decoder.context}
    assert post(client, "/detokenize", tokens=answer["tokens"]) == {"content": TEXT, "prompt": TEXT}


def test_special_tokens(client: TestClient, vlm: FastVLM) -> None:
    literal, read = (post(client, "/tokenize", content=TEXT, parse_special=special)["tokens"] for special in (False, True))
    end = vlm.tokenizer.control_id("<|im_end|>")
    assert end not in literal and read[-1] == end
    assert post(client, "/detokenize", tokens=read)["content"] == TEXT
    with serving(vlm, special_tokens=True) as reading:
        assert post(reading, "/tokenize", content=TEXT)["tokens"] == read


def test_pieces_of_llama_server(client: TestClient) -> None:
    pieces = post(client, "/tokenize", content=TEXT, with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == post(client, "/tokenize", content=TEXT)["tokens"]
    parts = [piece["piece"] for piece in pieces]
    assert any(isinstance(part, list) for part in parts), "a character of several tokens"
    assert b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in parts).decode() == TEXT


def test_strings_of_vllm(client: TestClient) -> None:
    answer = post(client, "/tokenize", prompt="the meter", return_token_strs=True, add_special_tokens=True)
    assert "".join(answer["token_strs"]) == "the meter"
    assert len(answer["token_strs"]) == answer["count"]


def test_a_conversation_has_the_ids_that_the_model_is_given(client: TestClient, vlm: FastVLM) -> None:
    picture = {"type": "image_url", "image_url": {"url": picture_url()}}
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": PROMPT}, picture]},
        {"role": "assistant", "content": "It reads 042."},
        {"role": "user", "content": [picture, picture, {"type": "text", "text": "And these?"}]},
    ]
    answer = post(client, "/tokenize", messages=messages)
    encoded = vlm.encode_image(data.coffee())
    chat = vlm.chat(system="Be short.", history=[ChatTurn(PROMPT, "It reads 042.", [encoded])])
    stream = chat.stream("And these?", [encoded, encoded], max_new_tokens=1)
    reply = stream.wait()
    assert stream._started is not None
    assert answer["tokens"] == stream._started.answer.ids
    assert answer["count"] == reply.timings.prompt_tokens
    completion = post(client, "/v1/chat/completions", messages=messages, max_tokens=1)
    assert completion["usage"]["prompt_tokens"] == answer["count"]
    assert post(client, "/detokenize", 400, tokens=answer["tokens"])["error"]["param"].startswith("tokens["), "visual tokens are no text"


def test_pictures_are_counted_but_not_opened(client: TestClient, vlm: FastVLM) -> None:
    def count(parts: list[Any]) -> int:
        found: int = post(client, "/tokenize", messages=[{"role": "user", "content": parts}])["count"]
        return found

    text = {"type": "text", "text": "What?"}
    nothing = {"type": "image_url", "image_url": {"url": "data:,nothing"}}
    assert count([text, nothing]) > count([text]) + vlm.manifest.vision.tokens - 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"content": "a", "prompt": "b"}, "prompt"),
        ({"content": 1}, "content"),
        ({"content": "a", "unheard": 1}, "unheard"),
        ({"content": "a", "model": "another"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template": "x"}, "chat_template"),
        ({"content": "a" * (tokens.MOST_CHARACTERS + 1)}, "content"),
    ],
)
def test_what_cannot_be_tokenized(client: TestClient, body: dict[str, Any], param: str | None) -> None:
    answer = client.post("/tokenize", json=body)
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"] == param


def test_half_a_surrogate_pair_is_no_text(client: TestClient) -> None:
    answer = client.post("/tokenize", content=b'{"content": "\\ud800"}', headers={"content-type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize("ids", [[-1], [500], [1 << 40], [1.5], ["1"], 7, [0] * (tokens.MOST_TOKENS + 1)])
def test_what_cannot_be_detokenized(client: TestClient, ids: Any) -> None:
    assert post(client, "/detokenize", 400, tokens=ids)["error"]["param"].startswith("tokens")


def test_props(client: TestClient, vlm: FastVLM) -> None:
    answer = client.get("/props").json()
    manifest = vlm.manifest
    assert answer["model"] == "demo"
    assert (answer["precision"], answer["backend"]["name"]) == (manifest.precision, "ort")
    assert (answer["total_slots"], answer["context"]) == (2, manifest.decoder.context)
    assert (answer["image_size"], answer["visual_tokens"], answer["geometry"]) == (
        manifest.vision.image_size,
        manifest.vision.tokens,
        "pad",
    )
    assert answer["engines"] is None
    assert answer["modalities"] == {"vision": True, "audio": False}
    assert answer["files"]["decoder.onnx"] == manifest.files["decoder.onnx"].sha256
    assert len(answer["model_sha256"]) == 64


def test_props_of_engines(model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model_dir, tmp_path / "model")
    build_engines(directory)
    manifest = read_manifest(directory)
    with fake_gpu(FakeCuda()):
        backend = load_engines(directory, manifest)
    (folder,) = (directory / "engines").iterdir()
    record = read_record(folder)
    with (
        FastVLM(manifest, TextTokenizer(directory / "tokenizer.json"), Engine(backend, manifest.decoder)) as vlm,
        serving(vlm, slots=1) as client,
    ):
        found = client.get("/props").json()["engines"]
    assert found == {
        "target": record.target,
        "library": record.library,
        "version": record.version,
        "compute_capabilities": record.compute_capabilities,
        "device": record.device,
        "board": record.board,
        "verified": True,
        "parity": record.parity,
    }
