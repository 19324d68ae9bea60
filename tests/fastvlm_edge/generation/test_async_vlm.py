"""asyncio: tasks get the answers of single runs, and whatever cancels a task stops its work and frees the slot."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from skimage import data

from fastvlm_edge import AsyncFastVLM, AsyncReplyStream, Chat, FastVLM, FastVLMError

PROMPT = "What does the meter read?"
PICTURES: list[Any] = [data.coffee(), data.astronaut(), data.chelsea(), None]
LONG = 1900
"""Tokens of a reply that outlives every test, if nothing stops it."""
R = TypeVar("R")


@pytest.fixture
def vlm(model_dir: Path) -> Iterator[FastVLM]:
    with FastVLM.load(model_dir, "ort", threads=1, slots=2) as vlm:
        yield vlm


def run(main: Coroutine[Any, Any, R]) -> R:
    """`asyncio.run`, but a deadlock is an error."""
    return asyncio.run(asyncio.wait_for(main, 60))


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


async def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


def check_free(vlm: FastVLM, requests: int | None = None) -> None:
    """Nothing runs or waits any more, long before the replies would have ended, and the model still answers."""
    wait_until(lambda: (vlm.counters().running, vlm.counters().waiting) == (0, 0))
    assert max(vlm._engine.backend.lengths) < LONG, "no reply was generated to its end"
    if requests is not None:
        assert vlm.counters().requests == requests
    assert vlm.generate(PROMPT, max_new_tokens=3).token_ids


class Gate:
    """Stands before a method of the backend, until it is opened."""

    def __init__(self, vlm: FastVLM, method: str) -> None:
        self.entered, self._open, self.calls = threading.Event(), threading.Event(), 0
        original = getattr(vlm._engine.backend, method)

        def wait(*given: Any, **options: Any) -> Any:
            self.calls += 1
            self.entered.set()
            assert self._open.wait(20)
            return original(*given, **options)

        setattr(vlm._engine.backend, method, wait)

    def open(self) -> None:
        self._open.set()


# Answers ------------------------------------------------------------------------------------------------------------------------


def test_twenty_tasks_at_once_get_the_answers_of_single_runs(vlm: FastVLM, model_dir: Path) -> None:
    jobs = [(f"{PROMPT} {number % 7}", PICTURES[number % 4], 5 + 2 * number) for number in range(20)]
    with FastVLM.load(model_dir, "ort", threads=1, slots=1, prefix_cache=False, image_cache=0) as alone:
        expected = [alone.generate(prompt, picture, max_new_tokens=tokens) for prompt, picture, tokens in jobs]
    model = AsyncFastVLM(vlm)

    async def streamed(prompt: str, picture: Any, tokens: int) -> tuple[str, list[int]]:
        stream = model.stream(prompt, picture, max_new_tokens=tokens)
        text = "".join([piece async for piece in stream])
        assert text == stream.reply.text
        return text, stream.reply.token_ids

    async def whole(prompt: str, picture: Any, tokens: int) -> tuple[str, list[int]]:
        reply = await model.generate(prompt, picture, max_new_tokens=tokens)
        return reply.text, reply.token_ids

    async def main() -> list[tuple[str, list[int]]]:
        return await asyncio.gather(*((streamed if number % 2 else whole)(*job) for number, job in enumerate(jobs)))

    assert run(main()) == [(reply.text, reply.token_ids) for reply in expected]
    check_free(vlm, 20)


def test_options_and_errors_are_those_of_the_other_api(vlm: FastVLM) -> None:
    model = AsyncFastVLM(vlm)
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 4, "stop": ["zz"]}
    expected = vlm.generate(PROMPT, PICTURES[0], **options)

    async def main() -> None:
        reply = await model.generate(PROMPT, PICTURES[0], **options)
        assert (reply.token_ids, reply.stop_reason) == (expected.token_ids, expected.stop_reason)
        with pytest.raises(FastVLMError, match="temperature"):
            model.stream(PROMPT, temperature=-1.0)
        with pytest.raises(FastVLMError, match="no-such-picture"):
            await model.generate(PROMPT, "no-such-picture.jpg")
        with pytest.raises(TypeError, match="unknown"):
            await model.generate(PROMPT, unknown=1)  # type: ignore[call-arg]
        with pytest.raises(FastVLMError, match="not finished"):
            _ = model.stream(PROMPT).reply

    run(main())
    check_free(vlm)


def test_the_signatures_are_those_of_the_other_api() -> None:
    for name, other in (("generate", FastVLM.generate), ("stream", FastVLM.stream), ("load", FastVLM.load)):
        method = getattr(AsyncFastVLM, name)
        assert inspect.signature(method).parameters == inspect.signature(other).parameters
        assert inspect.iscoroutinefunction(method) == (name != "stream")
    assert inspect.signature(AsyncFastVLM.stream).return_annotation == "AsyncReplyStream"


def test_load_close_and_encode_image(model_dir: Path) -> None:
    async def main() -> None:
        async with await AsyncFastVLM.load(model_dir, "ort", threads=1, slots=3) as model:
            assert model.vlm._engine.backend.slots == 3
            image = await model.encode_image(PICTURES[0])
            stream = model.stream(PROMPT, image, max_new_tokens=8)
            reply = await stream.wait()
            assert reply.timings.vision_ms == 0 and repr(stream) == "<AsyncReplyStream, finished>"
            assert repr(model).startswith("<AsyncFastVLM fake, fp32, ort")
            open_stream = model.stream(PROMPT, max_new_tokens=LONG)
            await anext(open_stream)
        with pytest.raises(FastVLMError, match="this model was closed"):
            [piece async for piece in open_stream]
        with pytest.raises(FastVLMError, match="this model was closed"):
            await model.generate(PROMPT)
        await model.close()
        with pytest.raises(FastVLMError, match="missing"):
            await AsyncFastVLM.load(model_dir / "missing")

    run(main())


def test_a_chat_goes_on_where_it_was(vlm: FastVLM) -> None:
    turns = [(PROMPT, PICTURES[0]), ("And why?", None), ("Briefly.", None)]
    other: Chat = vlm.chat()
    expected = [other.ask(prompt, image, max_new_tokens=12).token_ids for prompt, image in turns]

    async def main() -> None:
        chat = AsyncFastVLM(vlm).chat()
        assert [(await chat.ask(prompt, image, max_new_tokens=12)).token_ids for prompt, image in turns] == expected
        assert chat.token_count == other.token_count
        stream = chat.stream("Again?", max_new_tokens=LONG)
        first = await anext(stream)
        with pytest.raises(FastVLMError, match="still open"):
            await chat.ask("And now?")
        chat.cancel()
        assert (stream.reply.text, stream.reply.stop_reason) == (first, "cancelled")
        assert (await chat.ask("And now?", max_new_tokens=4)).timings.cached_tokens > other.token_count
        chat.reset()
        assert chat.token_count == 0

    run(main())
    check_free(vlm)


def test_a_chat_of_its_own_system_prompt_is_saved_and_loaded(vlm: FastVLM, tmp_path: Path) -> None:
    async def main() -> None:
        model = AsyncFastVLM(vlm)
        chat = model.chat(system="Be brief.", context="slide")
        await chat.ask(PROMPT, PICTURES[0], max_new_tokens=12)
        await chat.save(tmp_path / "chat.json")
        loaded = await model.load_chat(tmp_path / "chat.json")
        assert [turn.reply for turn in loaded.turns] == [turn.reply for turn in chat.turns] and loaded.token_count == chat.token_count
        again = [await each.ask("And why?", max_new_tokens=12) for each in (chat, loaded)]
        assert again[0].token_ids == again[1].token_ids

    run(main())
    check_free(vlm)


def test_waiting_for_tokens_takes_no_thread_and_leaves_the_loop_free(vlm: FastVLM) -> None:
    gate = Gate(vlm, "step")

    async def main() -> int:
        model = AsyncFastVLM(vlm)
        before = threading.active_count()
        tasks = [asyncio.create_task(model.generate(f"{PROMPT} {number}", max_new_tokens=5)) for number in range(50)]
        await until(lambda: vlm.counters().waiting + vlm.counters().running == 50)
        more = threading.active_count() - before
        gate.open()
        await asyncio.gather(*tasks)
        return more

    assert run(main()) == 1, "the engine's own"


def test_a_text_question_does_not_wait_for_pictures(vlm: FastVLM) -> None:
    gate = Gate(vlm, "encode")

    async def main() -> None:
        model = AsyncFastVLM(vlm)
        tasks = [asyncio.create_task(model.generate(PROMPT, picture, max_new_tokens=3)) for picture in PICTURES[:3]]
        await until(gate.entered.is_set)
        assert (await model.generate(PROMPT, max_new_tokens=3)).token_ids
        assert not any(task.done() for task in tasks)
        gate.open()
        await asyncio.gather(*tasks)

    run(main())


def test_two_loops_in_two_threads_share_a_model(vlm: FastVLM) -> None:
    expected = [vlm.generate(f"{PROMPT} {number}", PICTURES[number % 4], max_new_tokens=20).token_ids for number in range(6)]
    model = AsyncFastVLM(vlm)
    found: list[list[list[int]]] = []

    async def main() -> None:
        asked = [model.generate(f"{PROMPT} {number}", PICTURES[number % 4], max_new_tokens=20) for number in range(6)]
        found.append([reply.token_ids for reply in await asyncio.gather(*asked)])

    threads = [threading.Thread(target=lambda: run(main())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected]
    check_free(vlm)


# Cancelling ---------------------------------------------------------------------------------------------------------------------


async def read(stream: AsyncReplyStream, pieces: list[str]) -> None:
    async for piece in stream:
        pieces.append(piece)


def test_a_task_that_is_cancelled_while_it_reads_frees_its_slot(vlm: FastVLM) -> None:
    async def main() -> None:
        stream, pieces = AsyncFastVLM(vlm).stream(PROMPT, PICTURES[0], max_new_tokens=LONG), list[str]()
        task = asyncio.create_task(read(stream, pieces))
        await until(lambda: len(pieces) > 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (stream.reply.text, stream.reply.stop_reason) == ("".join(pieces), "cancelled")
        await until(lambda: vlm.counters().running == 0)

    run(main())
    check_free(vlm, 1)


def test_a_timeout_stops_the_work(vlm: FastVLM) -> None:
    gate = Gate(vlm, "decode")

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(AsyncFastVLM(vlm).generate(PROMPT, max_new_tokens=LONG), 0.05)
        gate.open()

    run(main())
    check_free(vlm, 1)
    assert gate.calls <= 3, "one step, and two of the question in check_free"


def test_aclose_and_a_stream_that_was_left(vlm: FastVLM) -> None:
    async def main() -> None:
        model = AsyncFastVLM(vlm)
        stream = model.stream(PROMPT, max_new_tokens=LONG)
        first = await anext(stream)
        await stream.aclose()
        assert stream.reply.text == first and [piece async for piece in stream] == []
        await until(lambda: vlm.counters().running == 0)
        async for _ in model.stream(PROMPT, max_new_tokens=LONG):
            break
        gc.collect()
        await until(lambda: vlm.counters().running == 0)
        async with aclosing(model.stream(PROMPT, max_new_tokens=LONG)) as left:
            async for _ in left:
                break
        assert left.reply.stop_reason == "cancelled"
        await until(lambda: vlm.counters().running == 0)
        unread = model.stream(PROMPT, max_new_tokens=LONG)
        await unread.aclose()
        assert [piece async for piece in unread] == []
        with pytest.raises(FastVLMError, match="closed before its first piece"):
            _ = unread.reply

    run(main())
    check_free(vlm, 3)


def test_another_task_may_close_a_stream_that_is_read(vlm: FastVLM) -> None:
    gate = Gate(vlm, "decode")

    async def main() -> None:
        stream, pieces = AsyncFastVLM(vlm).stream(PROMPT, max_new_tokens=LONG), list[str]()
        task = asyncio.create_task(read(stream, pieces))
        await until(gate.entered.is_set)
        await stream.aclose()
        gate.open()
        await task

    run(main())
    check_free(vlm, 1)


def test_a_task_that_is_cancelled_while_it_waits_never_gets_a_slot(vlm: FastVLM) -> None:
    async def main() -> None:
        model = AsyncFastVLM(vlm)
        running = [model.stream(f"{PROMPT} {number}", max_new_tokens=LONG) for number in range(2)]
        for stream in running:
            await anext(stream)
        waiting = asyncio.create_task(model.generate("Third.", max_new_tokens=5))
        await until(lambda: vlm.counters().waiting == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: vlm.counters().waiting == 0)
        assert vlm.counters().running == 2
        for stream in running:
            await stream.aclose()

    run(main())
    check_free(vlm, 2)


def test_a_task_that_is_cancelled_while_its_picture_is_encoded_asks_nothing(vlm: FastVLM) -> None:
    gate = Gate(vlm, "encode")

    model = AsyncFastVLM(vlm)

    async def main() -> None:
        # Pictures of the first are encoded, the second waits for the encoder, the third for a thread.
        tasks = [asyncio.create_task(model.generate(PROMPT, PICTURES[number : number + 2], max_new_tokens=LONG)) for number in range(2)]
        tasks.append(asyncio.create_task(model.generate(PROMPT, PICTURES[2], max_new_tokens=LONG)))
        await until(gate.entered.is_set)
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        for task in tasks:
            with pytest.raises(asyncio.CancelledError):
                await task
        gate.open()

    run(main())
    model._pictures.shutdown(wait=True)
    check_free(vlm, 0)
    assert gate.calls <= 2, "of five pictures, those whose turn had come"


def test_close_in_another_thread_while_a_picture_is_encoded_asks_nothing(vlm: FastVLM) -> None:
    gate = Gate(vlm, "encode")
    stream = vlm.stream(PROMPT, PICTURES[0], max_new_tokens=LONG)
    pieces: list[str] = []
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    assert gate.entered.wait(20)
    stream.close()
    gate.open()
    reader.join(20)
    assert not reader.is_alive() and pieces == []
    check_free(vlm, 0)


def test_close_in_the_moment_of_asking_stops_the_answer(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = vlm._engine.submit

    def submit_and_close(work: Any) -> None:
        submit(work)
        stream.close()

    monkeypatch.setattr(vlm._engine, "submit", submit_and_close)
    stream = vlm.stream(PROMPT, max_new_tokens=LONG)
    assert list(stream) == []
    monkeypatch.undo()
    check_free(vlm)


def test_a_loop_that_ends_or_is_closed_leaves_no_work_behind(vlm: FastVLM) -> None:
    kept: list[AsyncReplyStream] = []
    tasks: list[asyncio.Task[None]] = []  # asyncio.run cancels them

    async def main() -> None:
        model = AsyncFastVLM(vlm)
        for number in range(3):  # the third waits for a slot
            kept.append(model.stream(f"{PROMPT} {number}", max_new_tokens=LONG))
            tasks.append(asyncio.create_task(read(kept[-1], [])))
        await until(lambda: vlm.counters().waiting == 1)

    run(main())
    check_free(vlm)

    loop = asyncio.new_event_loop()
    kept.append(AsyncFastVLM(vlm).stream(PROMPT, max_new_tokens=LONG))
    loop.run_until_complete(anext(kept[-1]))
    loop.close()  # while the engine still puts pieces into it, and the stream is referred to
    check_free(vlm)


def test_memory_is_flat_over_many_tasks(vlm: FastVLM) -> None:
    model = AsyncFastVLM(vlm)

    async def main(count: int) -> None:
        for _ in range(count):
            tasks = [asyncio.create_task(model.generate(PROMPT, PICTURES[number % 4], max_new_tokens=9)) for number in range(10)]
            await tasks[0]
            tasks[5].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(main(5))
    gc.collect()
    objects = len(gc.get_objects())
    run(main(20))
    gc.collect()
    assert len(gc.get_objects()) - objects < 500
    check_free(vlm)
