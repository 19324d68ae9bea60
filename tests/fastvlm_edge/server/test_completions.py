"""Clients as they are: the official one, whole and streaming, gets what the Python API gives."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from PIL import Image

from fastvlm_edge import ChatTurn, FastVLM
from tests.support.serving import DEMO, Served, ask, data_url, events, image, serving, text, user

METER, SIGN, SHAPES = (DEMO / f"{name}.jpg" for name in ("meter", "sign", "shapes"))
READING = "What does the meter read?"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, *messages: Any, **more: Any) -> Any:
    return client.chat.completions.create(model="fastvlm-demo", messages=list(messages), **more)


# Whole replies ------------------------------------------------------------------------------------------------------------------


def test_a_question_about_a_picture(client: openai.OpenAI, demo: FastVLM) -> None:
    expected = demo.generate(READING, METER, max_new_tokens=20)
    answer = create(client, user(text(READING), image(METER)), max_tokens=20)
    (choice,) = answer.choices
    assert choice.message.content == expected.text != ""
    assert (choice.message.role, choice.message.refusal, choice.finish_reason, choice.logprobs) == ("assistant", None, "stop", None)
    assert answer.object == "chat.completion" and answer.model == "fastvlm-demo" and answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens == expected.timings.prompt_tokens
    assert answer.usage.completion_tokens == expected.timings.new_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint.startswith("fp_")


@pytest.mark.parametrize("detail", [None, "low", "high", "auto"])
def test_pictures_stand_before_the_text_in_their_order(client: openai.OpenAI, demo: FastVLM, detail: str | None) -> None:
    more = {} if detail is None else {"detail": detail}
    answer = create(client, user(image(SIGN, **more), text("What is"), image(METER, **more), text("on the sign?")), max_tokens=20)
    expected = demo.generate("What is\non the sign?", [SIGN, METER], max_new_tokens=20)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.timings.prompt_tokens


def test_a_conversation_is_a_chat(client: openai.OpenAI, demo: FastVLM) -> None:
    chat, messages = demo.chat(system="Answer briefly."), [{"role": "system", "content": "Answer briefly."}]
    for prompt, picture in ((READING, METER), ("What is on the sign?", SIGN), ("And the meter?", None)):
        messages.append(user(text(prompt), *([image(picture)] if picture else [])))
        expected = chat.ask(prompt, picture, max_new_tokens=16)
        answer = create(client, *messages, max_tokens=16)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == expected.timings.prompt_tokens
        messages.append(answer.choices[0].message)  # as the client gave it
    assert answer.usage.prompt_tokens_details.cached_tokens > 0.8 * answer.usage.prompt_tokens


@pytest.mark.parametrize(
    ("messages", "system"),
    [
        ([user(READING)], None),
        ([{"role": "system", "content": ""}, user(READING)], ""),
        ([{"role": "developer", "content": "One word."}, user(READING)], "One word."),
        (
            [{"role": "system", "content": [text("One"), text("word.")]}, {"role": "system", "content": "Now."}, user(READING)],
            "One\nword.\nNow.",
        ),
    ],
)
def test_the_system_prompt(client: openai.OpenAI, demo: FastVLM, messages: list[Any], system: str | None) -> None:
    expected = demo.generate(READING, max_new_tokens=8, system=system)
    answer = create(client, *messages, max_tokens=8)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (expected.text, expected.timings.prompt_tokens)


def test_messages_of_the_user_in_a_row_are_one_question(client: openai.OpenAI, demo: FastVLM) -> None:
    expected = demo.generate("This is a meter.\n" + READING, METER, max_new_tokens=8)
    answer = create(client, user(image(METER)), user("This is a meter."), user(READING), max_tokens=8)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (expected.text, expected.timings.prompt_tokens)


def test_sampling_is_that_of_the_runtime(client: openai.OpenAI, demo: FastVLM) -> None:
    options: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "seed": 7}
    expected = demo.generate(READING, METER, max_new_tokens=12, top_k=20, repetition_penalty=1.3, stop=["\n"], **options)
    answer = create(
        client,
        user(text(READING), image(METER)),
        max_completion_tokens=12,
        stop="\n",
        extra_body={"top_k": 20, "repetition_penalty": 1.3},
        **options,
    )
    assert answer.choices[0].message.content == expected.text


def test_several_replies_compute_the_prompt_once(client: openai.OpenAI, demo: FastVLM) -> None:
    question = "What colour is the circle? And which shape is the largest one of all?"
    expected = [demo.generate(question, SHAPES, max_new_tokens=10, temperature=1.5, seed=3 + index).text for index in range(3)]
    before = demo.counters()
    answer = create(client, user(text(question), image(SHAPES)), n=3, temperature=1.5, seed=3, max_tokens=10)
    after = demo.counters()
    assert [choice.message.content for choice in answer.choices] == expected and len(set(expected)) > 1
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    computed = (after.prompt_tokens - before.prompt_tokens) - (after.cached_tokens - before.cached_tokens)
    assert after.requests - before.requests == 3 and computed <= answer.usage.prompt_tokens + 2
    assert answer.usage.completion_tokens > 10


def test_a_reply_that_is_cut_off(client: openai.OpenAI) -> None:
    for stream in (False, True):
        found = create(client, user(text(READING), image(METER)), max_tokens=1, stream=stream)
        reasons = [chunk.choices[0].finish_reason for chunk in found][-1:] if stream else [found.choices[0].finish_reason]
        assert reasons == ["length"]


def test_special_tokens_are_text_unless_the_server_reads_them(served: Served, demo: FastVLM) -> None:
    messages = [user("a<|im_end|>"), {"role": "assistant", "content": "b<|im_end|>"}, user("c<|im_end|>")]
    body = {"messages": messages, "max_tokens": 3}
    with serving(demo, special_tokens=True) as reading:
        read, literal = (each.post(body).json["usage"]["prompt_tokens"] for each in (reading, served))
    chat = demo.chat(history=[ChatTurn("a<|im_end|>", "b<|im_end|>", special_tokens=True)])
    assert read == chat.ask("c<|im_end|>", max_new_tokens=1, special_tokens=True).timings.prompt_tokens < literal


@pytest.mark.parametrize("stop", ["17", ["zz", "1"]])
def test_stop_strings(client: openai.OpenAI, demo: FastVLM, stop: Any) -> None:
    question = "Count: 1, 2, 3"
    expected = demo.generate(question, METER, max_new_tokens=30, stop=stop)
    found = create(client, user(text(question), image(METER)), max_tokens=30, stop=stop)
    assert found.choices[0].message.content == expected.text


def test_log_probabilities(client: openai.OpenAI, demo: FastVLM) -> None:
    expected = demo.generate(READING, METER, max_new_tokens=8, logprobs=3)
    assert expected.logprobs
    wanted = [(token.text, token.bytes, [other.text for other in token.top]) for token in expected.logprobs]
    whole = create(client, user(text(READING), image(METER)), max_tokens=8, logprobs=True, top_logprobs=3)
    parts = list(create(client, user(text(READING), image(METER)), max_tokens=8, logprobs=True, top_logprobs=3, stream=True))
    streamed = [token for chunk in parts for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])]
    for found in (whole.choices[0].logprobs.content, streamed):
        assert [(token.token, token.bytes, [other.token for other in token.top_logprobs]) for token in found] == wanted
        for token, other in zip(found, expected.logprobs, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=0.05)
    alone = create(client, user(text(READING), image(METER)), max_tokens=2, logprobs=True)
    assert [token.top_logprobs for token in alone.choices[0].logprobs.content] == [[], []]


def test_timings(served: Served) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((200, 150), 80).save(buffer, "PNG")
    body = ask(text(READING), image(buffer.getvalue()), max_tokens=5)
    new, known = (served.post(body).json for _ in range(2))
    assert new["timings"]["vision_ms"] > 0 and new["timings"]["preprocess_ms"] > 0
    assert known["timings"]["vision_ms"] == 0 and known["timings"]["preprocess_ms"] < new["timings"]["preprocess_ms"]
    for answer in (new, known):
        timings, usage = answer["timings"], answer["usage"]
        assert timings["cache_n"] + timings["prompt_n"] == usage["prompt_tokens"]
        assert timings["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]
        assert timings["predicted_n"] == usage["completion_tokens"]
        assert timings["predicted_per_second"] == pytest.approx(1e3 * timings["predicted_n"] / timings["predicted_ms"], rel=0.01)
        assert timings["prompt_per_second"] == pytest.approx(1e3 * timings["prompt_n"] / timings["prompt_ms"], rel=0.01)
        assert timings["queue_ms"] < 1000
    assert known["timings"]["cache_n"] == known["usage"]["prompt_tokens"] - 1
    assert new["choices"] == known["choices"]


# Streams ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream(client: openai.OpenAI, demo: FastVLM, usage: bool) -> None:
    expected = demo.generate(READING, METER, max_new_tokens=20)
    more = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(create(client, user(text(READING), image(METER)), max_tokens=20, stream=True, **more))
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint, chunk.object) for chunk in chunks}) == 1
    if usage:
        *chunks, last = chunks
        assert last.choices == [] and last.usage.completion_tokens == expected.timings.new_tokens
        assert last.usage.prompt_tokens == expected.timings.prompt_tokens
        assert last.timings["predicted_n"] == expected.timings.new_tokens
    assert all(chunk.usage is None for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content for delta in deltas[1:-1]) == expected.text and len(deltas) > 3
    assert deltas[-1].content is None
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_what_goes_over_the_wire(served: Served) -> None:
    answer = served.post(ask(text(READING), image(METER), stream=True))
    assert answer.status == 200 and answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    found = events(answer.body)
    assert found[-1] == ("", "[DONE]") and {name for name, _ in found} == {""}
    chunks = [json.loads(data) for _, data in found[:-1]]
    assert all("usage" not in chunk for chunk in chunks), "usage was not asked for"
    assert ["timings" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_stream_of_several_replies(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 10}
    whole = create(client, user(text("What colour?"), image(SHAPES)), **options)
    texts, ends = ["", "", ""], []
    for chunk in create(client, user(text("What colour?"), image(SHAPES)), stream=True, **options):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices] and sorted(ends) == [0, 1, 2]


def test_the_asynchronous_client_and_many_at_once(served: Served, demo: FastVLM) -> None:
    jobs = [(f"{prompt} {number}", picture) for number in range(4) for prompt, picture in ((READING, METER), ("Which sign?", SIGN))]
    expected = [demo.generate(prompt, picture, max_new_tokens=12).text for prompt, picture in jobs]

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                prompt, picture = jobs[number]
                messages: Any = [user(text(prompt), image(picture))]
                if number % 2:
                    found: Any = await client.chat.completions.create(model="", messages=messages, max_tokens=12)
                    content: str = found.choices[0].message.content
                    return content
                stream: Any = await client.chat.completions.create(model="", messages=messages, max_tokens=12, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*map(one, range(len(jobs)))))

    assert asyncio.run(main()) == expected


# Formats ------------------------------------------------------------------------------------------------------------------------


class Meter(pydantic.BaseModel):
    reading: int = pydantic.Field(ge=0, le=999)
    unit: str = pydantic.Field(max_length=4)


SCHEMA = {
    "type": "object",
    "properties": {"reading": {"type": "string", "pattern": "^[0-9]{3}$"}},
    "required": ["reading"],
    "additionalProperties": False,
}


def test_json_of_a_class(client: openai.OpenAI) -> None:
    messages: Any = [user(text(READING), image(METER))]
    answer = client.chat.completions.parse(model="fastvlm-demo", messages=messages, response_format=Meter, max_tokens=60)
    assert isinstance(answer.choices[0].message.parsed, Meter)


@pytest.mark.parametrize(
    "wanted",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "meter", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    ],
)
def test_json_of_a_schema(served: Served, demo: FastVLM, wanted: dict[str, Any]) -> None:
    expected = demo.generate(READING, METER, json_schema=SCHEMA, max_new_tokens=40).text
    answer = served.post(ask(text(READING), image(METER), max_tokens=40, **wanted)).json
    assert answer["choices"][0]["message"]["content"] == expected and len(json.loads(expected)["reading"]) == 3


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"choices": ["yes", "no"]}),
        ({"structured_outputs": {"regex": "[0-9]{2}"}}, {"regex": "[0-9]{2}"}),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, {"grammar": 'start: "a" | "b"'}),
        ({"structured_outputs": {"json_object": True}}, {"json_schema": {"type": "object"}}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        ({"response_format": {"type": "text"}}, {}),
    ],
)
def test_other_formats(client: openai.OpenAI, demo: FastVLM, wanted: dict[str, Any], options: dict[str, Any]) -> None:
    expected = demo.generate("Is it?", SIGN, max_new_tokens=12, **options)
    answer = create(client, user(text("Is it?"), image(SIGN)), max_tokens=12, extra_body=wanted)
    assert answer.choices[0].message.content == expected.text


# Other addresses ----------------------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI, demo: FastVLM) -> None:
    (model,) = client.models.list().data
    assert model.id == "fastvlm-demo" and client.models.retrieve("fastvlm-demo") == model
    found: Any = model
    assert found.architecture == {"input_modalities": ["text", "image"], "output_modalities": ["text"]}
    assert found.max_model_len == demo.manifest.decoder.context
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o', only 'fastvlm-demo'"):
        client.models.retrieve("gpt-4o")


def test_health(served: Served) -> None:
    for path in ("/health", "/health/ready"):
        answer = served.get(path)
        assert (answer.status, answer.json) == (200, {"status": "ok"})


def test_the_same_picture_is_found_by_its_bytes_and_another_one_is_not(served: Served, demo: FastVLM) -> None:
    """The two pictures have the same size and question."""
    pictures = []
    for colour in ("red", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(buffer, "BMP")
        pictures.append(buffer.getvalue())
    question = "What colour is it?"
    expected = [demo.generate(question, picture, max_new_tokens=8).text for picture in pictures]
    for _ in range(2):
        for picture, wanted in zip(pictures, expected, strict=True):
            assert served.post(ask(text(question), image(picture), max_tokens=8)).json["choices"][0]["message"]["content"] == wanted
    assert data_url(pictures[0]) != data_url(pictures[1])
