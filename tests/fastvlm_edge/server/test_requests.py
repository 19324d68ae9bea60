"""What a request may not be: each is refused before the model runs, in OpenAI's shape, and the field is named."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from fastvlm_edge import FastVLM
from fastvlm_edge.server import api
from tests.support.serving import CHAT, DEMO, Served, ask, data_url, image, serving, text, user

METER = DEMO / "meter.jpg"
ASK = ask("What?", max_tokens=2)


def refused(served: Served, body: Any, status: int = 400) -> Any:
    before = served.state.vlm.vlm.counters().requests
    answer = served.post(body)
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert served.state.vlm.vlm.counters().requests == before, "the model has run"
    return answer.error


# Fields -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", api.NEUTRAL)
def test_what_would_change_the_reply_is_refused_by_name(served: Served, name: str) -> None:
    values, why = api.NEUTRAL[name]
    wrong: Any = (
        [{"type": "function", "function": {"name": "f"}}] if name in ("tools", "functions") else {"x": 1} if {} in values else "required"
    )
    error = refused(served, {**ASK, name: wrong})
    assert error == {
        "message": f"{name} is not supported: {why}",
        "type": "invalid_request_error",
        "param": name,
        "code": "unsupported_parameter",
    }
    for value in (None, *values):
        assert served.post({**ASK, name: value}).status == 200, value


def test_tools_name_what_to_use_instead(served: Served) -> None:
    assert "response_format" in refused(served, {**ASK, "tools": [{"type": "function"}]})["message"]


@pytest.mark.parametrize(
    "field",
    [
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"safety_identifier": "x"},
        {"prompt_cache_key": "x"},
        {"parallel_tool_calls": True},
        {"prediction": {"type": "content", "content": "x"}},
        {"stream": False},
        {"stream": None, "stream_options": None},
        {"n": 1},
        {"top_k": -1},
        {"top_k": 0},
        {"top_p": 1},
        {"seed": 2**63 - 1},
        {"logprobs": False},
        {"model": ""},
        {"stop": None},
        {"stop": []},
        {"max_tokens": 2, "max_completion_tokens": 2},
        {"max_tokens": 10**9},
        {"temperature": 0, "top_p": 0.5, "top_k": 3},
    ],
)
def test_what_changes_nothing_is_taken(served: Served, field: dict[str, Any]) -> None:
    expected = served.post(ASK).json["choices"][0]["message"]
    answer = served.post({**ASK, **field})
    assert answer.status == 200, answer.body
    if "max_tokens" not in field:
        assert answer.json["choices"][0]["message"] == expected


@pytest.mark.parametrize(
    ("field", "param", "says"),
    [
        ({"tool": []}, "tool", "it is not a field of the API"),
        ({"max_token": 3}, "max_token", "it is not a field of the API"),
        ({"max_tokens": 0}, "max_tokens", "Expected `int` >= 1"),
        ({"max_tokens": "3"}, "max_tokens", "Expected `int | null`"),
        ({"max_tokens": 2.5}, "max_tokens", "Expected `int | null`"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "differ"),
        ({"temperature": -0.1}, "temperature", ">= 0"),
        ({"temperature": "hot"}, "temperature", "Expected `float | null`"),
        ({"top_p": 0, "temperature": 1}, "top_p", "> 0"),
        ({"top_p": 1.1, "temperature": 1}, "top_p", "<= 1"),
        ({"top_p": 0.9}, "top_p", "top_p without temperature: the most likely token is always taken"),
        ({"top_k": 5}, "top_k", "top_k without temperature"),
        ({"top_k": 65, "temperature": 1}, "top_k", "<= 64"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", ">= 0.01"),
        ({"seed": -1}, "seed", ">= 0"),
        ({"seed": 10**30}, "seed", "Expected `int` <= 9223372036854775807"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 5}, "n", "n is 5, and this server generates at most 4 replies at a time"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "length <= 4"),
        ({"stop": ""}, "stop", "Expected `str` of length >= 1"),
        ({"stop": ["a", ""]}, "stop[1]", "Expected `str` of length >= 1"),
        ({"stop": "a" * 1025}, "stop", "Expected `str` of length <= 1024"),
        ({"stop": ["a" * 1025]}, "stop[0]", "Expected `str` of length <= 1024"),
        ({"stop": [3]}, "stop[0]", "Expected `str`"),
        ({"logprobs": 3}, "logprobs", "Expected `bool | null`"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "not a field"),
        ({"model": "gpt-4o"}, "model", "there is no model 'gpt-4o', only 'fastvlm-demo'"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "Invalid value 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "it is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", "it is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer", "x-guidance": {}}}}},
            "response_format",
            "x-guidance",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
            "response_format",
            "the JSON schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "has nothing; give one of json, json_object, regex, choice, grammar"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "has nothing"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex, choice"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "the regex cannot be used"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "there are no choices"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs", "the grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "not a field"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "response_format and structured_outputs are both given",
        ),
    ],
)
def test_values_that_are_wrong(served: Served, field: dict[str, Any], param: str, says: str) -> None:
    error = refused(served, {**ASK, **field}, 404 if "model" in field else 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error") and says in error["message"], error


# Messages -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "param", "says"),
    [
        ([], "messages", "length >= 1"),
        ("What?", "messages", "Expected `array`"),
        (["What?"], "messages[0]", "Expected `object`"),
        ([{"content": "What?"}], "messages[0].role", "it is missing"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].role", "Invalid value 'tool'"),
        ([{"role": "user"}], "messages[0].content", "it is missing"),
        ([{"role": "user", "content": 3}], "messages[0].content", "Expected `str | array`"),
        ([user("")], "messages", "the prompt is empty and there is no image"),
        ([user("What?") | {"name": "Ada"}], "messages[0].name", "not a field"),
        ([user({"type": "input_audio", "input_audio": {}})], "messages[0].content[0].type", "Invalid value 'input_audio'"),
        ([user({"type": "text"})], "messages[0].content[0].text", "it is missing"),
        ([user({"type": "image_url", "image_url": data_url(b"x")})], "messages[0].content[0].image_url", "Expected `object`"),
        ([user(image(METER, detail="best"))], "messages[0].content[0].image_url.detail", "Invalid enum value 'best'"),
        ([{"role": "system", "content": [image(METER)]}, user("What?")], "messages[0].content[0].type", "Invalid value 'image_url'"),
        ([user("What?"), {"role": "system", "content": "x"}], "messages[1]", "system messages stand before all others"),
        ([{"role": "assistant", "content": "x"}, user("What?")], "messages[0]", "an assistant message follows a user message"),
        ([user("What?"), {"role": "assistant", "content": "x"}], "messages", "the last message is not one of the user"),
        ([{"role": "system", "content": "x"}], "messages", "the last message is not one of the user"),
        (
            [user("What?"), {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, user("And?")],
            "messages[1].tool_calls",
            "not a field",
        ),
        ([user("What?"), {"role": "assistant", "tool_calls": []}, user("And?")], "messages[1].content", "it is missing"),
        ([user("word " * 3000)], "messages", "leaves no room for a reply in the context of 2048"),
        ([user("x" * 300_000)], "messages", "300000 characters, which do not fit into the context"),
        ([user(*[image(METER)] * 9)], "messages", "9 pictures, and at most 8 are allowed"),
    ],
)
def test_messages_that_are_wrong(served: Served, messages: Any, param: str, says: str) -> None:
    error = refused(served, {"messages": messages, "max_tokens": 2})
    assert error["param"] == param and says in error["message"], error


def test_a_full_context_has_the_code_of_the_api(served: Served) -> None:
    for messages in ([user("word " * 3000)], [user("x" * 300_000)]):
        assert refused(served, {"messages": messages})["code"] == "context_length_exceeded"


def test_a_message_that_a_client_sends_back_is_taken(served: Served) -> None:
    sent_back: Any = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    assert served.post({"messages": [user("What?"), sent_back, user("And?")], "max_tokens": 2}).status == 200


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"not a picture", "is not an image in a format that Pillow reads"),
        (b"", "is empty (0 bytes)"),
        (METER.read_bytes()[:200], "is damaged or truncated"),
    ],
)
def test_pictures_that_cannot_be_read(served: Served, data: bytes, says: str) -> None:
    body = {"messages": [user("A"), {"role": "assistant", "content": "B"}, user(text("C"), image(METER), image(data))], "max_tokens": 2}
    error = refused(served, body)
    assert error["param"] == "messages[2].content[2].image_url.url" and says in error["message"]


def test_a_picture_that_becomes_too_large(served: Served) -> None:
    """A few kilobytes that would be 200 megapixels."""
    buffer = io.BytesIO()
    Image.new("1", (16_000, 14_000)).save(buffer, "PNG")
    assert buffer.tell() < 50_000
    assert "too large" in refused(served, ask(text("What?"), image(buffer.getvalue())))["message"]


def test_a_picture_file_that_is_too_large(served: Served) -> None:
    error = refused(served, ask(text("What?"), image(bytes(11 << 20))), 413)
    assert error["param"] == "messages[0].content[1].image_url.url"


# Bodies -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"messages"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"[" * 100_000,
        b'{"metadata": ' + b'{"a":' * 100_000,
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
    ],
)
def test_bodies_that_are_no_request(served: Served, body: bytes) -> None:
    assert refused(served, body)["type"] == "invalid_request_error"


def test_the_content_type_is_json(served: Served) -> None:
    """So a web page of another origin cannot ask without being allowed to."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = served.send("POST", CHAT, json.dumps(ASK).encode(), {"content-type": kind})
        assert answer.status == 415 and "content-type: application/json" in answer.error["message"]
    assert served.post(ASK, **{"content-type": "application/json; charset=utf-8"}).status == 200


@pytest.fixture(scope="module")
def small(demo: FastVLM) -> Iterator[Served]:
    with serving(demo, max_body_bytes=1000, max_images=1, max_tokens=3) as served:
        yield served


def test_a_body_is_bounded_while_it_is_read(small: Served) -> None:
    large = json.dumps(ask("x" * 2000)).encode()
    for body in (large, iter([large[:100]] * 30)):  # the second one in chunks
        answer = small.send("POST", CHAT, body, {"content-type": "application/json"})
        assert answer.status == 413 and answer.error["code"] == "request_too_large"
        assert "more than 1,000 bytes" in answer.error["message"]
    assert small.post(ask("x" * 500, max_tokens=1)).status == 200


def test_many_small_values_are_refused_before_they_take_memory(served: Served) -> None:
    many = b"[],{},1," * (api.MOST_VALUES // 4)
    for field in (b'"metadata": {"a": [%s0]}', b'"prediction": [%s0]', b'"messages": [%s0]'):
        body = b'{"messages": [{"role": "user", "content": "What?"}], ' + field % many + b"}"
        assert refused(served, body, 413)["message"] == "the body has more than 262,144 commas and brackets"


def test_the_limits_are_those_of_the_settings(small: Served) -> None:
    answer = small.post(ask("Count from one to a hundred."))
    assert answer.json["usage"]["completion_tokens"] <= 3
    assert refused(small, ask(*[{"type": "image_url", "image_url": {"url": "data:,"}}] * 2))["code"] == "too_many_images"


def test_web_pages_of_other_origins_may_ask_only_if_allowed(served: Served, demo: FastVLM) -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert served.send("OPTIONS", CHAT, None, asks).status == 405
    assert "access-control-allow-origin" not in served.post(ASK, origin="https://a.example").headers
    with serving(demo, cors_origins=("https://a.example",)) as open_to_one:
        answer = open_to_one.send("OPTIONS", CHAT, None, asks)
        assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
        assert open_to_one.post(ASK, origin="https://a.example").headers["access-control-allow-origin"] == "https://a.example"
        assert open_to_one.send("OPTIONS", CHAT, None, {**asks, "origin": "https://b.example"}).status == 400


def test_unknown_addresses_and_methods(served: Served) -> None:
    answer = served.get("/v1/completions")
    assert (answer.status, answer.error["message"], answer.error["code"]) == (404, "there is no /v1/completions", "not_found")
    answer = served.get(CHAT)
    assert (answer.status, answer.error["message"]) == (405, f"{CHAT} does not take GET") and answer.headers["allow"] == "POST"


def test_the_official_client_raises_what_it_should(served: Served) -> None:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="fastvlm-demo", messages=[user("What?")], presence_penalty=1)  # type: ignore[list-item]
        assert (caught.value.param, caught.value.code) == ("presence_penalty", "unsupported_parameter")


def test_only_base64_is_a_data_address(served: Served) -> None:
    data = base64.b64encode(METER.read_bytes()).decode()
    for url in ("data:image/jpeg;base64,?" + data, "https://example.com/meter.jpg", "file:///etc/passwd", "meter.jpg", ""):
        body = ask(text("What?"), {"type": "image_url", "image_url": {"url": url}}, max_tokens=2)
        assert refused(served, body)["param"] == "messages[0].content[1].image_url.url"
