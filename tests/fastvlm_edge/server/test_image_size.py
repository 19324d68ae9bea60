"""`detail` of a picture: which size the model sees, what a cascade over the sizes answers, and what the server says about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import ChatTurn, FastVLM
from fastvlm_edge.model_dir.manifest import visual_tokens
from tests.support.cascade import LARGE, MIDDLE, SIZES, SMALL, Paused, between, build_sizes, with_cascade
from tests.support.serving import DEMO, Served, ask, data_url, events, image, serving, text, user, wait_until

PROMPT = "What does the meter read?"
METER = DEMO / "meter.jpg"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sizes(tmp_path_factory.mktemp("sizes") / "model")


@pytest.fixture(scope="module")
def sized(directory: Path) -> Iterator[FastVLM]:
    with FastVLM.load(directory, "ort", threads=1, slots=2) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def plain(sized: FastVLM) -> Iterator[Served]:
    """No cascade was fitted."""
    with serving(sized, slots=2) as found:
        yield found


def expected(vlm: FastVLM, size: int, prompt: str = PROMPT) -> tuple[str, int]:
    reply = vlm.generate(prompt, METER, image_size=size, max_new_tokens=8)
    return reply.text, reply.timings.prompt_tokens


def shown(document: Any) -> tuple[str, int]:
    return document["choices"][0]["message"]["content"], document["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("detail", "size"),
    [({"detail": "low"}, SMALL), ({"detail": "high"}, LARGE), ({"detail": "original"}, LARGE), ({"detail": "auto"}, LARGE), ({}, LARGE)],
)
def test_detail_is_a_size(plain: Served, sized: FastVLM, detail: dict[str, str], size: int) -> None:
    document = plain.post(ask(image(METER, **detail), text(PROMPT), max_tokens=8)).json
    assert shown(document) == expected(sized, size)
    assert (document["timings"]["image_size"], document["timings"]["tried_sizes"]) == (size, [])
    part = {"type": "input_image", "image_url": data_url(METER), **detail}
    asked = {"input": [{"role": "user", "content": [part, {"type": "input_text", "text": PROMPT}]}], "max_output_tokens": 8}
    answer = plain.post(asked, "/v1/responses").json
    assert (answer["output"][0]["content"][0]["text"], answer["usage"]["input_tokens"]) == expected(sized, size)
    counted = plain.post({"messages": ask(image(METER, **detail), text(PROMPT))["messages"]}, "/tokenize").json
    assert counted["count"] == document["usage"]["prompt_tokens"]


def test_a_server_has_a_size_of_its_own(sized: FastVLM) -> None:
    with serving(sized, slots=2, image_size=MIDDLE) as found:
        for detail in ({}, {"detail": "auto"}):
            assert shown(found.post(ask(image(METER, **detail), text(PROMPT), max_tokens=8)).json) == expected(sized, MIDDLE)
        assert shown(found.post(ask(image(METER, detail="low"), text(PROMPT), max_tokens=8)).json) == expected(sized, SMALL)
        props = found.get("/props").json
    assert (props["image_size"], props["visual_tokens"], props["image_sizes"], props["cascade"]) == (MIDDLE, 4, SIZES, None)


def test_without_a_picture_there_is_no_size(plain: Served) -> None:
    timings = plain.post(ask(text(PROMPT), max_tokens=2)).json["timings"]
    assert (timings["image_size"], timings["tried_sizes"]) == (None, [])


def test_a_cascade_answers_where_nothing_else_is_asked_for(sized: FastVLM) -> None:
    prompt, threshold = between(sized, METER, PROMPT)
    with serving(with_cascade(sized, threshold), slots=2) as found:
        body = ask(image(METER), text(prompt), max_tokens=8)
        for _ in range(2):  # also with pictures that are known
            document = found.post(body).json
            assert shown(document) == expected(sized, MIDDLE, prompt)
            assert (document["timings"]["image_size"], document["timings"]["tried_sizes"]) == (MIDDLE, [SMALL, MIDDLE])
        assert document["timings"]["vision_ms"] == 0
        high = found.post(ask(image(METER, detail="high"), text(prompt), max_tokens=8)).json
        assert shown(high) == expected(sized, LARGE, prompt) and high["timings"]["tried_sizes"] == []
        mixed = found.post(ask(image(METER), image(METER, detail="low"), text(prompt), max_tokens=8)).json["timings"]
        assert mixed["tried_sizes"] == []
        props = found.get("/props").json
        lines = found.get("/metrics").body.decode().splitlines()
    assert props["cascade"] == {"sizes": SIZES, "threshold": threshold, "confidence": "mean"} and props["image_size"] == SMALL
    counts = [line.rpartition(" ")[2] for size in SIZES for line in lines if f'image_size="{size}"' in line]
    assert counts == ["1.0", "2.0", "1.0"]


@pytest.mark.parametrize(("threshold", "size"), [(0.0, SMALL), (1.0, LARGE)])
def test_a_stream_has_the_text_that_stands(sized: FastVLM, threshold: float, size: int) -> None:
    with serving(with_cascade(sized, threshold), slots=2) as found:
        body = ask(image(METER), text(PROMPT), max_tokens=8, stream=True, logprobs=True, n=2, seed=3, temperature=0.5)
        chunks = [json.loads(data) for name, data in events(found.post(body).body) if data not in ("[DONE]", "")]
        whole = found.post({name: value for name, value in body.items() if name != "stream"}).json
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        said = "".join(choice["delta"].get("content") or "" for choice in mine)
        alone = sized.generate(PROMPT, METER, image_size=size, max_new_tokens=8, temperature=0.5, seed=3 + index)
        assert said == alone.text == whole["choices"][index]["message"]["content"]
        tokens = [token for choice in mine for token in (choice["logprobs"] or {"content": []})["content"]]
        assert len(tokens) == len(alone.token_ids)
        assert (len([choice for choice in mine if choice["delta"].get("content")]) == 1) == (size == SMALL)
    assert chunks[-1]["timings"]["tried_sizes"] == [each for each in SIZES if each <= size]


def test_a_follow_up_question_keeps_the_size_that_stood(sized: FastVLM) -> None:
    prompt, threshold = between(sized, METER, PROMPT)
    first = sized.generate(prompt, METER, image_size=MIDDLE, max_new_tokens=8)
    seen = {size: sized.encode_image(METER, image_size=size) for size in (MIDDLE, LARGE)}
    second = {
        size: sized.chat(history=[ChatTurn(prompt, first.text, [picture])]).ask("And now?", max_new_tokens=8).timings.prompt_tokens
        for size, picture in seen.items()
    }
    with serving(with_cascade(sized, threshold), slots=2) as found:
        asked = user(image(METER), text(prompt))
        assert found.post({"messages": [asked], "max_tokens": 8}).json["choices"][0]["message"]["content"] == first.text
        messages = [asked, {"role": "assistant", "content": first.text}, user("And now?")]
        again = found.post({"messages": messages, "max_tokens": 8}).json
        assert again["timings"]["image_size"] == MIDDLE
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > visual_tokens(MIDDLE)
        assert again["usage"]["prompt_tokens"] == second[MIDDLE]
    with serving(with_cascade(sized, threshold), slots=2) as other:  # which does not know the size
        assert other.post({"messages": messages, "max_tokens": 8}).json["usage"]["prompt_tokens"] == second[LARGE]


def test_room_for_pictures_is_that_of_their_size(tmp_path: Path) -> None:
    with FastVLM.load(build_sizes(tmp_path / "model", context=90), "ort", threads=1, slots=1) as vlm, serving(vlm, slots=1) as found:
        full = found.post(ask(*[image(METER)] * 6, text(PROMPT)))
        assert full.status == 400 and full.error["code"] == "context_length_exceeded"
        assert "6 pictures take 96 tokens; the context of 90 has room for 5; a picture of detail low takes 1" in full.error["message"]
        assert found.post(ask(*[image(METER, detail="low")] * 6, text(PROMPT), max_tokens=1)).status == 200


def test_a_clip_is_answered_by_a_cascade(sized: FastVLM, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from fastvlm_edge.camera.clip import frames_of_clip
    from tests.support.videos import write_video

    data = write_video(tmp_path / "clip.mp4", [number / 10 for number in range(8)]).read_bytes()
    frames = frames_of_clip(data, 3)
    for detail, threshold, size in (({}, 1.0, LARGE), ({}, 0.0, SMALL), ({"detail": "low"}, 1.0, SMALL)):
        alone = sized.generate(PROMPT, frames, image_size=size, max_new_tokens=8)
        with serving(with_cascade(sized, threshold), slots=2) as found:
            clip = {"type": "video_url", "video_url": {"url": data_url(data), **detail}}
            document = found.post(ask(clip, text(PROMPT), max_tokens=8, media_io_kwargs={"video": {"num_frames": 3}})).json
        assert shown(document) == (alone.text, alone.timings.prompt_tokens)
        assert document["timings"]["image_size"] == size


def test_a_client_that_goes_away_ends_the_attempt(sized: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(with_cascade(sized, 1.0), slots=2) as found, monkeypatch.context() as patch:
        before, paused = sized.counters(), Paused(sized, patch)
        connection = found.open(ask(image(METER), text("A question of its own"), max_tokens=200))
        assert paused.begun.wait(20)
        connection.close()
        wait_until(lambda: found.state.metrics.ended["cancelled"] == 1)
        paused.go.set()
        wait_until(lambda: sized.counters().running == 0)
        assert sized.counters().images == before.images + 1 and sized.counters().new_tokens <= before.new_tokens + 2
