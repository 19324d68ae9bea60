"""Pictures at several sizes, and the cascade over them: which answer stands, what it costs, and what stops it."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from fastvlm_edge import AsyncFastVLM, FastVLM, FastVLMError
from fastvlm_edge.backends.ort_session import Setup
from fastvlm_edge.generation.answer import ContextFull
from fastvlm_edge.generation.cascade import stands
from fastvlm_edge.generation.reply import Confidence
from fastvlm_edge.model_dir.manifest import Cascade, visual_tokens
from tests.support.cascade import LARGE, MIDDLE, SIZES, SMALL, Paused, between, build_sizes, with_cascade
from tests.support.host_as_gpu import host_as_gpu

PROMPT = "What does the meter read?"
PICTURE = data.astronaut()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three sizes, the largest of which is the default. Its cascade was not fitted."""
    return build_sizes(tmp_path_factory.mktemp("sizes") / "model")


@pytest.fixture(params=["ort", "ort-cuda"])
def sized(request: pytest.FixtureRequest, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FastVLM]:
    monkeypatch.setattr("fastvlm_edge.backends.load_ort_cuda.read_reference", lambda directory: None)
    monkeypatch.setattr("fastvlm_edge.backends.load_ort_cuda.check", lambda *given: NoFindings())
    with host_as_gpu(), FastVLM.load(directory, request.param, threads=1) as loaded:
        yield loaded


class NoFindings:
    faults: tuple[()] = ()
    figures: dict[str, Any] = {}  # noqa: RUF012


@pytest.fixture
def vlm(directory: Path) -> Iterator[FastVLM]:
    with FastVLM.load(directory, "ort", threads=1) as loaded:
        yield loaded


# A size of one's choice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_question_is_answered_at_its_size(sized: FastVLM, size: int) -> None:
    text = sized.generate(PROMPT, max_new_tokens=8)
    reply = sized.generate(PROMPT, PICTURE, image_size=size, max_new_tokens=8)
    assert (text.image_size, reply.image_size, reply.tried_sizes) == (None, size, [])
    around = len(sized._template.turn(PROMPT, [0])) - len(sized._template.turn(PROMPT))
    assert reply.timings.prompt_tokens - text.timings.prompt_tokens == visual_tokens(size) + around
    encoded = sized.encode_image(PICTURE, image_size=size)
    assert (encoded.image_size, encoded.rows, encoded.numpy().shape[0]) == (size, visual_tokens(size), visual_tokens(size))
    assert sized.generate(PROMPT, encoded, max_new_tokens=8).token_ids == reply.token_ids


def test_the_default_is_that_of_the_manifest_unless_load_says_another(directory: Path) -> None:
    for given, size in ((None, LARGE), (SMALL, SMALL), ("auto", LARGE)):
        with FastVLM.load(directory, "ort", threads=1, image_size=given) as vlm:  # type: ignore[arg-type]
            assert vlm.generate(PROMPT, PICTURE, max_new_tokens=1).image_size == size
            assert vlm.encode_image(PICTURE).image_size == size
            assert vlm.generate(PROMPT, PICTURE, image_size=MIDDLE, max_new_tokens=1).image_size == MIDDLE


@pytest.mark.parametrize("size", [192, 0, True, "128", 128.0])
def test_a_size_that_the_model_lacks_is_refused_before_any_work(vlm: FastVLM, directory: Path, size: Any) -> None:
    for ask in (partial(vlm.stream, PROMPT), partial(vlm.chat().stream, PROMPT), vlm.encode_image):
        with pytest.raises(FastVLMError, match=r"64, 128, 256"):
            ask(PICTURE, image_size=size)
    with pytest.raises(FastVLMError, match=r"64, 128, 256"):
        FastVLM.load(directory, "ort", image_size=size)
    assert vlm.counters().images == 0


def test_pixel_values_of_a_size_that_the_model_lacks_are_refused(sized: FastVLM) -> None:
    with pytest.raises(FastVLMError, match="S = 64 or 128 or 256"):
        sized._engine.backend.encode(np.zeros((1, 3, 192, 192), np.float32))


def test_one_encoder_serves_all_sizes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are in memory once."""
    parts: list[str] = []
    load = Setup.load

    def recorded(self: Setup, part: str) -> Any:
        parts.append(part)
        return load(self, part)

    monkeypatch.setattr(Setup, "load", recorded)
    with FastVLM.load(directory, "ort", threads=1, image_size=SMALL) as vlm:
        for size in SIZES:
            vlm.generate(PROMPT, PICTURE, image_size=size, max_new_tokens=1)
    assert sorted(parts) == ["decoder", "vision"]


def test_two_sizes_of_one_picture_never_meet(vlm: FastVLM) -> None:
    black = np.zeros((300, 300, 3), np.uint8)  # the bytes of a smaller one are the beginning of those of a larger one
    encoded = [vlm.encode_image(black, image_size=size) for size in SIZES]
    assert len({image.key for image in encoded}) == 3
    alone = [vlm.generate(PROMPT, image, max_new_tokens=8).token_ids for image in encoded]
    assert len(set(map(tuple, alone))) == 3
    for size, token_ids in zip(SIZES * 2, alone * 2, strict=True):
        reply = vlm.generate(PROMPT, black, image_size=size, max_new_tokens=8)
        assert reply.token_ids == token_ids and reply.timings.cached_images == 1
    assert vlm.counters().images - vlm.counters().cached_images == 3


# Which answer stands ------------------------------------------------------------------------------------------------------------


def test_the_first_answer_that_is_certain_enough_is_the_reply(vlm: FastVLM) -> None:
    prompt, threshold = between(vlm, PICTURE, PROMPT)
    for least, tried in ((0.0, [SMALL]), (threshold, [SMALL, MIDDLE]), (1.0, SIZES)):
        auto = with_cascade(vlm, least)
        reply = auto.generate(prompt, PICTURE, image_size="auto", max_new_tokens=8)
        alone = vlm.generate(prompt, PICTURE, image_size=tried[-1], max_new_tokens=8)
        assert (reply.tried_sizes, reply.image_size) == (tried, tried[-1])
        assert (reply.token_ids, reply.text) == (alone.token_ids, alone.text)
        assert reply.confidence is not None and alone.confidence is not None
        assert reply.confidence.mean == pytest.approx(alone.confidence.mean, rel=1e-4)  # other sums, with what is in the cache
        assert reply.timings.prompt_tokens == alone.timings.prompt_tokens and reply.timings.new_tokens == alone.timings.new_tokens


def test_confidence_is_compared_as_the_cascade_says() -> None:
    sure = Confidence(mean=0.6, least=0.3)
    assert stands(sure, Cascade(SIZES, 0.5, "mean")) and not stands(sure, Cascade(SIZES, 0.5, "least"))
    assert stands(sure, Cascade(SIZES, 0.3, "least")) and not stands(None, Cascade(SIZES, 0.0, "mean"))


def test_an_attempt_ends_with_the_token_that_decides_against_it(vlm: FastVLM) -> None:
    alone = vlm.generate(PROMPT, PICTURE, image_size=LARGE, max_new_tokens=30)
    before = vlm.counters().new_tokens
    reply = with_cascade(vlm, 1.0, "least").generate(PROMPT, PICTURE, image_size="auto", max_new_tokens=30)
    assert reply.token_ids == alone.token_ids and reply.tried_sizes == SIZES
    assert vlm.counters().new_tokens - before == len(alone.token_ids) + 2


def test_text_is_shown_once_it_stands(vlm: FastVLM) -> None:
    certain = list(with_cascade(vlm, 0.0).stream(PROMPT, PICTURE, image_size="auto", max_new_tokens=20))
    assert certain == [vlm.generate(PROMPT, PICTURE, image_size=SMALL, max_new_tokens=20).text]
    stream = with_cascade(vlm, 1.0).stream(PROMPT, PICTURE, image_size="auto", max_new_tokens=20)
    pieces = list(stream)
    assert len(pieces) > 1 and "".join(pieces) == vlm.generate(PROMPT, PICTURE, image_size=LARGE, max_new_tokens=20).text


def test_an_answer_without_a_token_does_not_stand(vlm: FastVLM) -> None:
    first = vlm.generate(PROMPT, PICTURE, image_size=SMALL, max_new_tokens=1).token_ids
    text = dataclasses.replace(vlm.manifest.text, stop_ids=[*vlm.manifest.text.stop_ids, *first])
    silent = FastVLM(dataclasses.replace(vlm.manifest, text=text), vlm.tokenizer, vlm._engine)
    assert silent.generate(PROMPT, PICTURE, image_size=SMALL).token_ids == []
    assert with_cascade(silent, 0.0).generate(PROMPT, PICTURE, image_size="auto", max_new_tokens=4).tried_sizes[:2] == [SMALL, MIDDLE]


@pytest.mark.parametrize("options", [{"temperature": 0.9, "seed": 5}, {"json_schema": {"type": "boolean"}}, {"logprobs": 2}])
def test_every_attempt_has_the_options_of_the_question(vlm: FastVLM, options: dict[str, Any]) -> None:
    for threshold, size in ((0.0, SMALL), (1.0, LARGE)):
        reply = with_cascade(vlm, threshold).generate(PROMPT, PICTURE, image_size="auto", max_new_tokens=8, **options)
        alone = vlm.generate(PROMPT, PICTURE, image_size=size, max_new_tokens=8, **options)
        assert (reply.image_size, reply.token_ids) == (size, alone.token_ids)
        assert [token.text for token in reply.logprobs or ()] == [token.text for token in alone.logprobs or ()]


def test_without_a_fitted_cascade_auto_is_the_default_size(vlm: FastVLM, directory: Path) -> None:
    reply = vlm.generate(PROMPT, PICTURE, image_size="auto", max_new_tokens=2)
    assert (reply.image_size, reply.tried_sizes) == (LARGE, [])
    with FastVLM.load(directory, "ort", threads=1, image_size=SMALL) as small:
        assert small.generate(PROMPT, PICTURE, image_size="auto", max_new_tokens=2).image_size == SMALL


def test_there_is_no_cascade_about_an_encoded_image_or_none(vlm: FastVLM) -> None:
    auto = with_cascade(vlm, 1.0)
    for images, size in (([], None), ([auto.encode_image(PICTURE, image_size=MIDDLE)], MIDDLE)):
        reply = auto.generate(PROMPT, images, image_size="auto", max_new_tokens=2)
        assert (reply.image_size, reply.tried_sizes) == (size, [])


def test_all_pictures_of_a_question_have_the_same_size(vlm: FastVLM) -> None:
    pictures = [PICTURE, data.coffee()]
    reply = with_cascade(vlm, 1.0, sizes=[SMALL, MIDDLE]).generate(PROMPT, pictures, image_size="auto", max_new_tokens=4)
    alone = vlm.generate(PROMPT, pictures, image_size=MIDDLE, max_new_tokens=4)
    assert (reply.tried_sizes, reply.token_ids) == ([SMALL, MIDDLE], alone.token_ids)
    assert reply.timings.prompt_tokens == alone.timings.prompt_tokens


def test_a_picture_that_can_be_read_only_once_is_seen_at_every_size(vlm: FastVLM, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "PNG")
    auto = with_cascade(vlm, 1.0)
    expected = vlm.generate(PROMPT, file.getvalue(), image_size=LARGE, max_new_tokens=4).token_ids
    file.seek(0)
    assert auto.generate(PROMPT, file, image_size="auto", max_new_tokens=4).token_ids == expected
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(file.getvalue(),))
    writer.start()
    with pipe.open("rb") as opened:
        assert auto.generate(PROMPT, opened, image_size="auto", max_new_tokens=4).token_ids == expected
    writer.join()


# What it costs, and what ends it ------------------------------------------------------------------------------------------------


def test_the_time_to_the_first_token_has_all_attempts(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = vlm._engine.backend.encode

    def slow(pixel_values: Any) -> Any:
        time.sleep(0.05)
        return encode(pixel_values)

    monkeypatch.setattr(vlm._engine.backend, "encode", slow)
    timings = with_cascade(vlm, 1.0).generate(PROMPT, PICTURE, image_size="auto", max_new_tokens=4).timings
    assert timings.ttft_ms >= 150 and 50 <= timings.vision_ms < 100
    stands = with_cascade(vlm, 0.0).generate(PROMPT, PICTURE, image_size="auto", max_new_tokens=40).timings
    whole = stands.vision_ms + stands.prefill_ms + 39e3 / stands.decode_tokens_per_second
    assert stands.ttft_ms == pytest.approx(whole + stands.preprocess_ms + stands.queue_ms, abs=20)


@pytest.mark.parametrize(("too_large", "tried"), [(LARGE, [SMALL, MIDDLE]), (MIDDLE, [SMALL]), (SMALL, None)])
def test_a_size_that_leaves_no_room_ends_the_cascade_before_it(vlm: FastVLM, tmp_path: Path, too_large: int, tried: Any) -> None:
    context = vlm.generate(PROMPT, PICTURE, image_size=too_large, max_new_tokens=1).timings.prompt_tokens
    directory = build_sizes(tmp_path / "model", context=context)
    with FastVLM.load(directory, "ort", threads=1) as narrow:
        auto = with_cascade(narrow, 1.0)
        with pytest.raises(ContextFull):
            auto.generate(PROMPT, PICTURE, image_size=too_large)
        if tried is None:
            with pytest.raises(ContextFull):
                auto.generate(PROMPT, PICTURE, image_size="auto")
        else:
            reply = auto.generate(PROMPT, PICTURE, image_size="auto", max_new_tokens=1)
            assert (reply.tried_sizes, reply.image_size) == (tried, tried[-1])


@pytest.mark.parametrize("how", ["close the stream", "cancel the chat", "close the model"])
def test_closing_from_another_thread_ends_the_attempt_and_begins_no_other(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    paused, auto = Paused(vlm, monkeypatch), with_cascade(vlm, 1.0)
    chat = auto.chat()
    stream = chat.stream(PROMPT, PICTURE, image_size="auto", max_new_tokens=200)
    found: list[Any] = []

    def read() -> None:
        try:
            found.append(list(stream))
        except FastVLMError as error:
            found.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert paused.begun.wait(20)
    closing = threading.Thread(target={"close the stream": stream.close, "cancel the chat": chat.cancel}.get(how, auto.close))
    closing.start()
    time.sleep(0.05)
    paused.go.set()
    closing.join(20)
    reader.join(20)
    assert not reader.is_alive() and vlm.counters().images == 1 and vlm.counters().new_tokens <= 2
    assert isinstance(found[0], FastVLMError) if how == "close the model" else found == [[]]
    assert chat.turns == ()
    with pytest.raises(FastVLMError, match="closed before its first piece"):
        _ = stream.reply


def test_an_error_of_an_attempt_is_that_of_the_question(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **options: Any) -> Any:
        raise FastVLMError("the graph failed")

    chat = with_cascade(vlm, 1.0).chat()
    with monkeypatch.context() as broken:
        broken.setattr(vlm._engine.backend, "step", fails)
        with pytest.raises(FastVLMError, match="the graph failed"):
            chat.ask(PROMPT, PICTURE, image_size="auto")
    assert vlm.counters().images == 1 and chat.turns == ()
    assert chat.ask(PROMPT, PICTURE, image_size="auto", max_new_tokens=2).tried_sizes == SIZES


def test_tasks_ask_at_every_size_and_can_be_cancelled(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = vlm.generate(PROMPT, PICTURE, image_size=LARGE, max_new_tokens=8).text
    small = vlm.generate(PROMPT, PICTURE, image_size=SMALL, max_new_tokens=8).text

    async def ask() -> None:
        auto, certain = AsyncFastVLM(with_cascade(vlm, 1.0)), AsyncFastVLM(with_cascade(vlm, 0.0))
        replies = await asyncio.gather(*[auto.generate(PROMPT, PICTURE, image_size="auto", max_new_tokens=8) for _ in range(6)])
        assert [(reply.text, reply.tried_sizes) for reply in replies] == [(expected, SIZES)] * 6
        pieces = [piece async for piece in auto.stream(PROMPT, PICTURE, image_size="auto", max_new_tokens=8)]
        assert len(pieces) > 1 and "".join(pieces) == expected
        assert [piece async for piece in certain.stream(PROMPT, PICTURE, image_size="auto", max_new_tokens=8)] == [small]
        assert (await auto.encode_image(PICTURE, image_size=MIDDLE)).image_size == MIDDLE
        paused, before = Paused(vlm, monkeypatch), vlm.counters().images
        task = asyncio.create_task(auto.generate("Another question", PICTURE, image_size="auto", max_new_tokens=200))
        await asyncio.to_thread(paused.begun.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        paused.go.set()
        await asyncio.sleep(0.1)
        assert vlm.counters().images == before + 1

    asyncio.run(ask())


# Conversations ------------------------------------------------------------------------------------------------------------------


def test_a_conversation_keeps_the_size_that_stood(vlm: FastVLM) -> None:
    prompt, threshold = between(vlm, PICTURE, PROMPT)
    chat, alone = with_cascade(vlm, threshold).chat(), vlm.chat()
    replies = [chat.ask(prompt, PICTURE, image_size="auto", max_new_tokens=8)]
    replies += [chat.ask("And now?", max_new_tokens=8), chat.ask("This one?", data.coffee(), image_size=SMALL, max_new_tokens=8)]
    expected = [alone.ask(prompt, PICTURE, image_size=MIDDLE, max_new_tokens=8)]
    expected += [alone.ask("And now?", max_new_tokens=8), alone.ask("This one?", data.coffee(), image_size=SMALL, max_new_tokens=8)]
    assert [(reply.image_size, reply.token_ids) for reply in replies] == [(reply.image_size, reply.token_ids) for reply in expected]
    assert [reply.image_size for reply in replies] == [MIDDLE, MIDDLE, SMALL]
    assert [[image.image_size for image in turn.images] for turn in chat.turns] == [[MIDDLE], [], [SMALL]]
    assert [image.pixels.shape for turn in chat.turns for image in turn.images if image.pixels is not None] == [
        (MIDDLE, MIDDLE, 3),
        (SMALL, SMALL, 3),
    ]
    assert chat.token_count == alone.token_count


@pytest.mark.parametrize("pictures", ["embed", "hash"])
def test_a_saved_conversation_has_the_size_of_each_picture(vlm: FastVLM, tmp_path: Path, pictures: Any) -> None:
    path = tmp_path / "chat.json"
    chat = vlm.chat()
    for size in (SMALL, LARGE, MIDDLE):
        chat.ask(PROMPT, PICTURE if size != MIDDLE else data.coffee(), image_size=size, max_new_tokens=4)
    chat.save(path, pictures=pictures)
    given = [] if pictures == "embed" else [PICTURE, vlm.encode_image(data.coffee(), image_size=MIDDLE)]
    loaded = vlm.load_chat(path, given)
    assert [image.image_size for turn in loaded.turns for image in turn.images] == [SMALL, LARGE, MIDDLE]
    assert loaded.ask("And now?", max_new_tokens=8).token_ids == chat.ask("And now?", max_new_tokens=8).token_ids
    if pictures == "hash":
        with pytest.raises(FastVLMError, match="image 1 is not a picture"):
            vlm.load_chat(path, [data.camera()])


@pytest.mark.parametrize("wrong", [lambda sizes: sizes.update({"00" * 32: 64}), lambda sizes: sizes.update(dict.fromkeys(sizes, 192))])
def test_a_saved_conversation_with_other_sizes_is_damaged(vlm: FastVLM, tmp_path: Path, wrong: Callable[[Any], None]) -> None:
    path = tmp_path / "chat.json"
    chat = vlm.chat()
    chat.ask(PROMPT, PICTURE, image_size=SMALL, max_new_tokens=4)
    chat.save(path)
    document = json.loads(path.read_text())
    assert list(document["image_sizes"].values()) == [SMALL]
    wrong(document["image_sizes"])
    path.write_text(json.dumps(document, indent=1))
    with pytest.raises(FastVLMError, match="damaged"):
        vlm.load_chat(path)


def test_sliding_makes_room_for_the_largest_size(tmp_path: Path) -> None:
    directory = build_sizes(tmp_path / "model", context=110)
    with FastVLM.load(directory, "ort", threads=1) as vlm:
        chat = with_cascade(vlm, 1.0).chat(context="slide")
        dropped = [chat.ask("Again?", PICTURE, image_size="auto", max_new_tokens=4) for _ in range(4)]
        assert all(reply.tried_sizes == SIZES for reply in dropped) and dropped[-1].dropped_turns > 0
