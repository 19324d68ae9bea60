"""POST /v1/responses: the answers of chat completions in the shape of OpenAI's newer interface, by hand and through its client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from starlette.testclient import TestClient

from fastvlm_edge import FastVLM
from fastvlm_edge.server import responses
from tests.fastvlm_edge.server.serving import PROMPT, events_of, picture_url, serving

PICTURE = {"type": "input_image", "image_url": picture_url()}


@pytest.fixture(scope="module")
def client(vlm: FastVLM) -> Iterator[TestClient]:
    with serving(vlm, max_tokens=8) as client:
        yield client


@pytest.fixture(scope="module")
def official(client: TestClient) -> openai.OpenAI:
    """The client of OpenAI, whose connections come to the application."""
    return openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=client, max_retries=0)


def post(client: TestClient, status: int = 200, **body: Any) -> Any:
    answer = client.post("/v1/responses", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def chat(client: TestClient, messages: list[Any], **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": messages, **body}).json()


def test_a_text(client: TestClient) -> None:
    answer = post(client, input=PROMPT)
    other = chat(client, [{"role": "user", "content": PROMPT}])
    (item,) = answer["output"]
    assert item["content"] == [
        {"type": "output_text", "text": other["choices"][0]["message"]["content"], "annotations": [], "logprobs": []}
    ]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "incomplete", "demo")
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["usage"]["input_tokens"] == other["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == 8
    assert (answer["store"], answer["tools"], answer["previous_response_id"]) == (False, [], None)
    assert (answer["temperature"], answer["top_p"], answer["text"]) == (0, 1, {"format": {"type": "text"}})


def test_a_whole_conversation_is_that_of_chat_completions(client: TestClient) -> None:
    first = post(client, instructions="Be short.", input=[{"role": "user", "content": [PICTURE, {"type": "input_text", "text": PROMPT}]}])
    answer = post(
        client,
        instructions="Be short.",
        input=[
            {"role": "developer", "content": [{"type": "input_text", "text": "In digits."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": PROMPT}, PICTURE]},
            first["output"][0],
            {"role": "user", "content": "And the next one?"},
        ],
    )
    picture = {"type": "image_url", "image_url": {"url": PICTURE["image_url"]}}
    text = first["output"][0]["content"][0]["text"]
    other = chat(
        client,
        [
            {"role": "system", "content": "Be short."},
            {"role": "system", "content": "In digits."},
            {"role": "user", "content": [{"type": "text", "text": PROMPT}, picture]},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "And the next one?"},
        ],
    )
    assert answer["output"][0]["content"][0]["text"] == other["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == other["usage"]["prompt_tokens"]
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert answer["instructions"] == "Be short."


def test_the_events_of_a_stream(client: TestClient) -> None:
    whole = post(client, input=PROMPT)
    answer = client.post("/v1/responses", json={"input": PROMPT, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    names = [name for name, _ in events]
    assert names[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert names[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"]
    assert set(names[4:-4]) == {"response.output_text.delta"}
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert all(data["type"] == name for name, data in events)
    text = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    last = events[-1][1]["response"]
    assert text == events[-4][1]["text"] == events[-3][1]["part"]["text"] == whole["output"][0]["content"][0]["text"]
    assert last["output"] == [events[-2][1]["item"]]
    assert {data.get("item_id", last["output"][0]["id"]) for _, data in events} == {last["output"][0]["id"]}
    assert {data["response"]["id"] for _, data in events if "response" in data} == {last["id"]}
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert events[0][1]["response"]["status"] == "in_progress" and events[0][1]["response"]["output"] == []


def test_log_probabilities(client: TestClient) -> None:
    wanted = {"input": PROMPT, "include": ["message.output_text.logprobs"], "top_logprobs": 3}
    content = client.post("/v1/responses", json=wanted).json()["output"][0]["content"][0]
    assert len(content["logprobs"]) == 8
    assert all(len(token["top_logprobs"]) == 3 and token["logprob"] <= 0 for token in content["logprobs"])
    events = events_of(client.post("/v1/responses", json={**wanted, "stream": True}).text)
    pieces = [token for name, data in events if name == "response.output_text.delta" for token in data["logprobs"]]
    assert pieces == content["logprobs"][: len(pieces)]
    assert events[-4][1]["logprobs"] == content["logprobs"]


def test_formats(client: TestClient) -> None:
    schema = {
        "type": "object",
        "properties": {"reading": {"type": "integer", "maximum": 9}},
        "required": ["reading"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "name": "reading", "schema": schema, "strict": True}
    answer = post(client, input=PROMPT, text={"format": wanted}, max_output_tokens=64)
    assert answer["status"] == "completed" and answer["incomplete_details"] is None
    assert set(json.loads(answer["output"][0]["content"][0]["text"])) == {"reading"}
    assert answer["text"]["format"]["schema"] == schema
    bad = post(client, 400, input=PROMPT, text={"format": {**wanted, "schema": {"$ref": "#/missing"}}})
    assert bad["error"]["param"] == "text.format"


def test_what_has_no_effect_is_taken(client: TestClient) -> None:
    plain = post(client, input=PROMPT)["output"][0]["content"]
    answer = post(
        client,
        input=PROMPT,
        model="demo",
        store=True,
        user="somebody",
        metadata={"a": "b"},
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        truncation="disabled",
        background=False,
        reasoning={"effort": None},
        previous_response_id=None,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="x",
        top_p=1.0,
    )
    assert answer["output"][0]["content"] == plain
    assert answer["store"] is False
    assert (answer["user"], answer["metadata"]) == ("somebody", {"a": "b"})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": PROMPT, "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": PROMPT, "conversation": {"id": "conv_1"}}, "conversation"),
        ({"input": PROMPT, "prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": PROMPT, "background": True}, "background"),
        ({"input": PROMPT, "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": PROMPT, "tool_choice": "required"}, "tool_choice"),
        ({"input": PROMPT, "reasoning": {"effort": "low"}}, "reasoning"),
        ({"input": PROMPT, "truncation": "auto"}, "truncation"),
        ({"input": PROMPT, "unheard_of": 1}, "unheard_of"),
        ({"input": PROMPT, "top_logprobs": 2}, "top_logprobs"),
        ({"input": PROMPT, "top_p": 0.5}, "top_p"),
        ({"input": PROMPT, "temperature": -1}, "temperature"),
        ({"input": PROMPT, "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": PROMPT, "text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": [{"role": "assistant", "content": "a"}]}, "input[0]"),
        ({"instructions": "a", "input": [{"role": "assistant", "content": "a"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "input"),
        ({"input": [{"role": "system", "content": [PICTURE]}, {"role": "user", "content": "a"}]}, "input[0].content[0]"),
        (
            {"instructions": "a", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,a"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}]}, "input[0].content[0].file_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio", "data": ""}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, None),
        ({"input": "a " * 100_000}, "input"),
    ],
)
def test_what_cannot_be_honoured_is_refused(client: TestClient, body: dict[str, Any], param: str | None) -> None:
    for stream in (False, True):
        error = post(client, 400, **body, stream=stream)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        if param is not None:
            assert error["param"] == param, error


def test_options_of_a_stream_need_one(client: TestClient) -> None:
    assert post(client, 400, input=PROMPT, stream_options={})["error"]["param"] == "stream_options"


def test_another_model(client: TestClient) -> None:
    assert post(client, 404, input=PROMPT, model="gpt-5")["error"]["code"] == "model_not_found"


def test_a_fault_after_the_first_byte_is_an_event(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> Any:
        raise MemoryError("no memory for the reply")

    monkeypatch.setattr(responses._Answer, "_finished", breaks)
    events = events_of(client.post("/v1/responses", json={"input": PROMPT, "stream": True}).text)
    name, data = events[-1]
    assert name == "response.failed"
    assert data["response"]["status"] == "failed"
    assert data["response"]["error"]["code"] == "server_error"
    assert "no memory" in data["response"]["error"]["message"]
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))


def test_the_client_of_openai(official: openai.OpenAI, client: TestClient) -> None:
    answer = official.responses.create(
        model="demo",
        instructions="Be short.",
        input=[
            {
                "role": "user",
                "content": [{"type": "input_text", "text": PROMPT}, {"type": "input_image", "image_url": picture_url(), "detail": "auto"}],
            }
        ],
        temperature=0.7,
        top_p=0.9,
        max_output_tokens=6,
    )
    assert answer.output_text
    assert answer.usage is not None and answer.usage.output_tokens == 6
    said: Any = [{"role": "user", "content": PROMPT}, *answer.output, {"role": "user", "content": "Really?"}]
    again = official.responses.create(model="demo", input=said)
    assert again.status == "incomplete"


def test_the_client_of_openai_streams(official: openai.OpenAI) -> None:
    whole = official.responses.create(model="demo", input=PROMPT).output_text
    text, last = "", None
    for event in official.responses.create(model="demo", input=PROMPT, stream=True):
        if event.type == "response.output_text.delta":
            text += event.delta
        last = event
    assert text == whole
    assert last is not None and last.type == "response.incomplete"


class Reading(pydantic.BaseModel):
    digit: Literal[0, 1]


def test_the_client_of_openai_parses(official: openai.OpenAI) -> None:
    answer = official.responses.parse(model="demo", input=PROMPT, text_format=Reading, max_output_tokens=64)
    assert isinstance(answer.output_parsed, Reading)
    with official.responses.stream(model="demo", input=PROMPT, text_format=Reading, max_output_tokens=64) as stream:
        names = [event.type for event in stream]
        assert stream.get_final_response().output_parsed == answer.output_parsed
    assert names[-1] == "response.completed"


def test_the_client_of_openai_sees_errors(official: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        official.responses.create(model="demo", input=PROMPT, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        official.responses.create(model="another", input=PROMPT)
