"""Many requests at once give what each gives alone, whatever is cancelled, shared, saved or refused in between."""

from __future__ import annotations

import gc
import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage import data

from fastvlm_edge import FastVLM, FastVLMError, Reply, ReplyStream
from fastvlm_edge.generation import engine as engine_module
from fastvlm_edge.generation import slots
from tests.support.fake_model import TOKENS

PROMPT = "What does the meter read?"
PICTURES: list[Any] = [data.coffee(), data.astronaut(), data.chelsea(), data.rocket(), None]


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> Iterator[Callable[..., Reply]]:
    """Answers one question at a time, and computes everything anew."""
    with FastVLM.load(model_dir, "ort", threads=1, slots=1, prefix_cache=False, image_cache=0) as vlm:
        known: dict[Any, Reply] = {}

        def answer(prompt: str, picture: int = 4, **options: Any) -> Reply:
            key = (prompt, picture, *sorted(options.items()))
            if key not in known:
                known[key] = vlm.generate(prompt, PICTURES[picture], **options)
            return known[key]

        yield answer


@pytest.fixture
def engine(model_dir: Path) -> Iterator[FastVLM]:
    with FastVLM.load(model_dir, "ort", threads=1, slots=4) as vlm:
        yield vlm


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_threads_with_their_own_pictures_get_the_answers_of_single_runs(engine: FastVLM, alone: Callable[..., Reply]) -> None:
    jobs = [(f"{PROMPT} {number % 7}", number % 5, 5 + number % 40) for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda job: engine.generate(job[0], PICTURES[job[1]], max_new_tokens=job[2]), jobs))
    for (prompt, picture, tokens), reply in zip(jobs, replies, strict=True):
        assert reply.token_ids == alone(prompt, picture, max_new_tokens=tokens).token_ids
    counters = engine.counters()
    assert (counters.requests, counters.running, counters.waiting) == (60, 0, 0)
    assert counters.new_tokens == sum(len(reply.token_ids) for reply in replies)
    assert counters.images == 48 and counters.cached_images == 44, "four pictures, each encoded once"


def test_running_answers_are_decoded_together(engine: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    decode = engine._engine.backend.decode
    monkeypatch.setattr(engine._engine.backend, "decode", lambda ids, **options: rows.append(len(ids)) or decode(ids, **options))
    streams = [engine.stream(f"{PROMPT} {number}", max_new_tokens=300) for number in range(6)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.wait()
    assert max(rows) == 4


def test_an_older_stream_goes_on_while_newer_questions_are_answered(engine: FastVLM, alone: Callable[..., Reply]) -> None:
    stream = engine.stream(PROMPT, PICTURES[0], max_new_tokens=60)
    first = next(stream)
    for number in range(10):
        engine.generate(f"Another {number}.", PICTURES[number % 5], max_new_tokens=4)
    assert first + "".join(stream) == alone(PROMPT, 0, max_new_tokens=60).text


def test_sampling_does_not_depend_on_who_else_asks(engine: FastVLM, alone: Callable[..., Reply]) -> None:
    options: list[dict[str, Any]] = [
        {"temperature": 0.8, "seed": 3, "max_new_tokens": 25},
        {"repetition_penalty": 4.0, "max_new_tokens": 25},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "seed": 11, "max_new_tokens": 30},
        {"max_new_tokens": 40},
    ]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda each: engine.generate(PROMPT, PICTURES[1], **each), options))
    assert [reply.token_ids for reply in replies] == [alone(PROMPT, 1, **each).token_ids for each in options]


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_cancellations_and_shared_beginnings(model_dir: Path, alone: Callable[..., Reply], seed: int) -> None:
    """Against a model that recomputes everything. The cache has room for two and a half contexts, so that slots wait and copies leave."""
    chance = random.Random(seed)
    prompts = [
        PROMPT,
        PROMPT + " And why?",
        "Describe the picture. " * 30,
        "Describe the picture. " * 30 + "Briefly.",
        "déjà vu \u6c34\u9053",
    ]
    context_bytes = 2048 * 3 * 2 * 2 * 4 * 4
    wrong: list[str] = []
    with FastVLM.load(model_dir, "ort", threads=1, slots=3, cache_memory=context_bytes * 5 // 2, image_cache=2000) as vlm:

        def client(chance: random.Random) -> None:
            for _ in range(12):
                prompt, picture, tokens = chance.choice(prompts), chance.randrange(5), chance.choice((1, 3, 20, 90))
                expected = alone_locked(prompt, picture, tokens)
                stream = vlm.stream(prompt, PICTURES[picture], max_new_tokens=tokens)
                read = ""
                for piece in stream:
                    read += piece
                    if chance.random() < 0.05:
                        stream.close()
                if not expected.startswith(read) or (stream.reply.stop_reason != "cancelled" and read != expected):
                    wrong.append(prompt)

        lock = threading.Lock()

        def alone_locked(prompt: str, picture: int, tokens: int) -> str:
            with lock:
                return alone(prompt, picture, max_new_tokens=tokens).text

        threads = [threading.Thread(target=client, args=(random.Random(chance.random()),)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: vlm.counters().running == 0)
        assert not wrong
        assert vlm.counters().saved_bytes <= context_bytes * 5 // 2


def test_what_has_no_slot_waits_in_order(model_dir: Path) -> None:
    with FastVLM.load(model_dir, "ort", threads=1, slots=1) as vlm:
        order: list[int] = []
        streams = [vlm.stream(f"{PROMPT} {number}", max_new_tokens=30) for number in range(5)]
        longest = vlm.stream("First.", max_new_tokens=400)
        next(longest)
        threads = []
        for number, stream in enumerate(streams):
            threads.append(threading.Thread(target=lambda stream=stream, number=number: (next(stream), order.append(number))))
            threads[-1].start()
            wait_until(lambda number=number: vlm.counters().waiting > number or bool(order))  # type: ignore[misc]
        longest.close()
        for thread in threads:
            thread.join()
        assert order == sorted(order)


def test_memory_bounds_how_many_are_answered_together(model_dir: Path, alone: Callable[..., Reply]) -> None:
    """One whole context: questions that may grow that far are answered one after the other, short ones together."""
    with FastVLM.load(model_dir, "ort", threads=1, slots=4, cache_memory=2048 * 3 * 2 * 2 * 4 * 4) as vlm:
        rows: list[int] = []
        decode = vlm._engine.backend.decode
        vlm._engine.backend.decode = lambda ids, **options: rows.append(len(ids)) or decode(ids, **options)  # type: ignore
        for tokens, together in ((1000, 1), (200, 4)):
            rows.clear()
            streams = [vlm.stream(f"{PROMPT} {number}", max_new_tokens=tokens) for number in range(4)]
            texts = [next(stream) for stream in streams[:1]]
            threads = [threading.Thread(target=stream.wait) for stream in streams]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert max(rows) == together and texts
            for number, stream in enumerate(streams):
                assert stream.reply.token_ids == alone(f"{PROMPT} {number}", max_new_tokens=tokens).token_ids


def test_cache_memory_that_holds_no_context_is_refused(model_dir: Path) -> None:
    with pytest.raises(FastVLMError, match=r"cache_memory is 1,000 bytes, but one conversation of 2048 positions takes 393,216; give more"):
        FastVLM.load(model_dir, "ort", cache_memory=1000)
    for options, says in (
        ({"slots": 0}, "slots is 0"),
        ({"cache_memory": "1G"}, "cache_memory is '1G'"),
        ({"image_cache": -1}, "image_cache"),
    ):
        with pytest.raises(FastVLMError, match=says):
            FastVLM.load(model_dir, "ort", **options)


# Reuse --------------------------------------------------------------------------------------------------------------------------


def test_a_repeated_picture_costs_no_vision_and_a_repeated_question_one_position(engine: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine.generate(PROMPT, PICTURES[0], max_new_tokens=9)
    assert (first.timings.cached_tokens, first.timings.cached_images) == (0, 0)
    monkeypatch.setattr(engine._engine.backend, "encode", None)
    again = engine.generate(PROMPT, PICTURES[0].copy(), max_new_tokens=9)
    assert again.token_ids == first.token_ids
    assert (again.timings.prefilled_tokens, again.timings.cached_images) == (1, 1)
    other = engine.generate("How many?", PICTURES[0], max_new_tokens=9)
    assert other.timings.cached_tokens >= TOKENS, "the picture comes before the question"


def test_two_pictures_of_one_size_under_one_prompt_never_meet(engine: FastVLM) -> None:
    pictures = [np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8).repeat(64, 0).repeat(64, 1) for number in range(12)]
    fresh = FastVLM(engine.manifest, engine._tokenizer, engine._engine, prefix_cache=False, image_cache=0)
    expected = [fresh.generate(PROMPT, picture, max_new_tokens=12).token_ids for picture in pictures]
    assert len({tuple(ids) for ids in expected}) == 12
    for number in random.Random(0).choices(range(12), k=60):
        assert engine.generate(PROMPT, pictures[number], max_new_tokens=12).token_ids == expected[number]
    buffer = pictures[0].copy()  # one array that a program fills again and again
    for number, picture in enumerate(pictures):
        buffer[:] = picture
        assert engine.generate(PROMPT, buffer, max_new_tokens=12).token_ids == expected[number]


def test_the_number_of_kept_conversations_is_bounded(engine: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MOST_SAVED", 5)
    for number in range(20):
        engine.generate(f"{number} {PROMPT}", max_new_tokens=1)
    assert len(engine._engine._slots._saved) == 5
    kept, left = (engine.generate(f"{number} {PROMPT}", max_new_tokens=1).timings for number in (19, 1))
    assert kept.prefilled_tokens == 1 and left.prefilled_tokens > 5


def test_the_engine_has_one_thread_while_questions_follow_each_other(engine: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.generate(PROMPT, max_new_tokens=1)
    first = engine._engine._thread
    assert first is not None and first.is_alive()
    monkeypatch.setattr(engine_module, "LINGER", 0.01)
    engine.generate(PROMPT, max_new_tokens=1)
    wait_until(lambda: engine._engine._thread is None)
    first.join(20)
    assert not first.is_alive()
    assert engine.generate(PROMPT, max_new_tokens=1).token_ids


def test_a_question_that_comes_when_the_thread_is_about_to_end_is_answered(engine: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    wake, submitted = engine._engine._wake, threading.Event()
    submit, asking = engine._engine.submit, ThreadPoolExecutor(1)

    def late(_seconds: float) -> bool:
        """The time is over; before the thread has the lock again, a question is handed in."""
        monkeypatch.undo()
        monkeypatch.setattr(engine._engine, "submit", lambda work: (submit(work), submitted.set()))
        wake.release()
        answers.append(asking.submit(engine.generate, PROMPT, max_new_tokens=1))
        assert submitted.wait(20)
        wake.acquire()
        return False

    answers: list[Any] = []
    monkeypatch.setattr(wake, "wait", late)
    engine.generate(PROMPT, max_new_tokens=1)
    wait_until(lambda: bool(answers))
    assert answers[0].result(20).token_ids
    asking.shutdown()


def test_a_conversation_comes_back_after_others_took_its_slot(model_dir: Path) -> None:
    with FastVLM.load(model_dir, "ort", threads=1, slots=1) as vlm:
        chats = [vlm.chat() for _ in range(3)]
        lengths = [0, 0, 0]
        for turn in range(4):
            for number, chat in enumerate(chats):
                reply = chat.ask(f"Turn {turn}?", PICTURES[number] if not turn else None, max_new_tokens=10)
                if turn:
                    assert reply.timings.cached_tokens >= lengths[number] - 1
                lengths[number] = chat.token_count
        assert vlm.counters().saved_bytes > 0


def test_the_cache_of_pictures_is_bounded_and_the_oldest_leaves(model_dir: Path) -> None:
    size = TOKENS * 8 * 4
    with FastVLM.load(model_dir, "ort", threads=1, image_cache=2 * size) as vlm:
        asked = (0, 1, 0, 2, 0, 1)  # 2 drives out 1, because 0 was asked for later
        found = [vlm.generate(PROMPT, PICTURES[number], max_new_tokens=1).timings.cached_images for number in asked]
        assert found == [0, 0, 1, 0, 1, 0]
        assert vlm._images.nbytes == 2 * size


def test_an_encoded_image_of_another_model_is_never_taken_for_one_of_this(model_dir: Path) -> None:
    with FastVLM.load(model_dir, "ort", threads=1) as vlm, FastVLM.load(model_dir, "ort", threads=1) as other:
        encoded = other.encode_image(PICTURES[0])
        assert encoded.key == vlm.encode_image(PICTURES[0]).key, "the same model"
        other.manifest.files["vision.onnx"] = other.manifest.files["decoder.onnx"]
        changed = FastVLM(other.manifest, other._tokenizer, other._engine)
        assert changed.encode_image(PICTURES[0]).key != encoded.key


@pytest.mark.parametrize("count", [200, pytest.param(700, marks=pytest.mark.slow)])
def test_memory_is_flat_over_many_requests(engine: FastVLM, count: int) -> None:
    import resource

    def ask(count: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: engine.generate(f"{PROMPT} {number % 50}", PICTURES[number % 5], max_new_tokens=20), range(count)))

    ask(100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    objects = len(gc.get_objects())
    ask(count)
    gc.collect()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10
    assert len(gc.get_objects()) - objects < 2000
    assert threading.active_count() < 6


# Cancelling ---------------------------------------------------------------------------------------------------------------------


def test_close_from_another_thread_ends_a_reader_that_waits(engine: FastVLM) -> None:
    blocked = threading.Event()
    step = engine._engine.backend.step

    def slow(*given: Any, **options: Any) -> Any:
        blocked.wait(10)
        return step(*given, **options)

    engine._engine.backend.step = slow  # type: ignore[method-assign]
    stream = engine.stream(PROMPT, max_new_tokens=2000)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    wait_until(lambda: engine.counters().running == 1)
    stream.close()
    blocked.set()
    reader.join(10)
    assert not reader.is_alive()
    wait_until(lambda: engine.counters().running == 0)


def test_a_waiting_request_that_is_cancelled_never_gets_a_slot(model_dir: Path) -> None:
    with FastVLM.load(model_dir, "ort", threads=1, slots=1) as vlm:
        running = vlm.stream("First.", max_new_tokens=1500)
        next(running)
        waiting = vlm.stream("Second.", max_new_tokens=5)
        reader = threading.Thread(target=lambda: list(waiting))
        reader.start()
        wait_until(lambda: vlm.counters().waiting == 1)
        waiting.close()
        reader.join(10)
        assert not reader.is_alive()
        running.close()
        wait_until(lambda: vlm.counters().running == 0)
        assert vlm.counters().requests == 1


def test_a_stream_that_nothing_refers_to_stops(engine: FastVLM) -> None:
    for _ in engine.stream(PROMPT, max_new_tokens=2000):
        break
    wait_until(lambda: engine.counters().running == 0)
    assert engine.counters().requests == 1


def test_closing_the_model_from_another_thread_ends_all_replies(model_dir: Path) -> None:
    vlm = FastVLM.load(model_dir, "ort", threads=1, slots=2)
    errors: list[str] = []

    def ask() -> None:
        try:
            vlm.generate(PROMPT, max_new_tokens=2000)
        except FastVLMError as error:
            errors.append(error.what)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: vlm.counters().running + vlm.counters().waiting == 4)
    vlm.close()
    for thread in threads:
        thread.join(10)
    assert errors == ["this model was closed"] * 4


def test_ctrl_c_ends_the_question_and_not_the_model(engine: FastVLM) -> None:
    def ask_for_ever() -> None:
        threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,)).start()
        while True:
            engine.generate(PROMPT, PICTURES[0], max_new_tokens=1500)

    with pytest.raises(KeyboardInterrupt):
        ask_for_ever()
    wait_until(lambda: engine.counters().running == 0)
    assert engine.generate(PROMPT, max_new_tokens=3).token_ids


def test_one_failing_request_does_not_end_the_others(engine: FastVLM, alone: Callable[..., Reply]) -> None:
    """The decode call of all fails because of one; alone, the others go on."""
    backend = engine._engine.backend
    decode, step = backend.decode, backend.step
    bad = alone("Bad.", max_new_tokens=5).token_ids[3]

    def failing_decode(ids: Any, **options: Any) -> Any:
        if bad in ids:
            raise FastVLMError("the GPU failed")
        return decode(ids, **options)

    def failing_step(ids: Any, *rest: Any, **options: Any) -> Any:
        if list(ids) == [bad]:
            raise FastVLMError("the GPU failed")
        return step(ids, *rest, **options)

    backend.decode, backend.step = failing_decode, failing_step  # type: ignore[method-assign, assignment]
    prompts = ["Bad.", *(f"{PROMPT} {number}" for number in range(3))]
    expected = [alone(prompt, max_new_tokens=60).token_ids for prompt in prompts]
    assert bad in expected[0][:-1]
    streams = [engine.stream(prompt, max_new_tokens=60) for prompt in prompts]

    def read(stream: ReplyStream) -> list[int] | str:
        try:
            return stream.wait().token_ids
        except FastVLMError as error:
            return error.what

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, streams))
    for ids, each in zip(expected, found, strict=True):
        assert each == ("the GPU failed" if bad in ids[:-1] else ids)


def test_a_slot_that_cannot_be_moved_ends_what_runs_and_not_the_engine(engine: FastVLM, alone: Callable[..., Reply]) -> None:
    def failing(*given: Any) -> None:
        raise FastVLMError("there is not enough memory")

    copy = engine._engine.backend.copy
    long, short = engine.stream("Long.", max_new_tokens=1900), engine.stream("Short.", max_new_tokens=1900)
    next(short), next(long)
    engine._engine.backend.copy = failing  # type: ignore[method-assign, assignment]
    short.close()  # the other one has to move to its slot
    with pytest.raises(FastVLMError, match="not enough memory"):
        list(long)
    engine._engine.backend.copy = copy  # type: ignore[method-assign]
    wait_until(lambda: engine.counters().running == 0)
    assert engine.generate(PROMPT, PICTURES[0], max_new_tokens=20).token_ids == alone(PROMPT, 0, max_new_tokens=20).token_ids


# Chats --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_chat_stream_that_was_left_never_comes_back(engine: FastVLM, rounds: int) -> None:
    chat, lost = engine.chat(), 0
    for number in range(rounds):
        chat.reset()
        for _ in chat.stream(PROMPT, PICTURES[number % 5], max_new_tokens=50):
            break
        if number % 2:
            chat.reset()
        chat.ask("What number is shown?", PICTURES[(number + 1) % 5], max_new_tokens=4)
        count = chat.token_count
        gc.collect()
        lost += chat.token_count != count
    assert not lost


def test_a_second_question_while_a_reply_is_open_is_refused(engine: FastVLM) -> None:
    chat = engine.chat()
    stream = chat.stream(PROMPT, max_new_tokens=40)
    for ask in (chat.stream, chat.ask):
        with pytest.raises(FastVLMError, match=r"reply before this question is still open.*; read its stream to the end or close it"):
            ask("And now?")
    first = next(stream)
    chat.cancel()
    assert stream.reply.text == first and list(stream) == []
    assert chat.ask("And now?", max_new_tokens=4).token_ids
    stream = chat.stream("Again?", max_new_tokens=400)
    next(stream)
    chat.reset()
    assert (chat.token_count, stream.reply.stop_reason) == (0, "cancelled")


def test_a_cut_reply_leaves_exactly_what_was_read(engine: FastVLM) -> None:
    chat = engine.chat()
    whole = chat.ask(PROMPT, PICTURES[0], max_new_tokens=40)
    tokenizer, prompt = engine._tokenizer, whole.timings.prompt_tokens

    def said() -> str:
        return b"".join(tokenizer.token_bytes(token_id) for token_id in chat._ids[prompt:]).decode("utf-8", "replace")

    for start in (4, 9, 15, 22):
        chat.reset()
        stop = whole.text[start : start + 2]
        reply = chat.ask(PROMPT, PICTURES[0], max_new_tokens=40, stop=stop)
        assert reply.stop_string == stop and said() == reply.text
        chat.reset()
        stream = chat.stream(PROMPT, PICTURES[0], max_new_tokens=40)
        read = ""
        while len(read) < start:
            read += next(stream)
        time.sleep(0.01)  # the engine is ahead
        stream.close()
        assert said() == read == stream.reply.text
        follow = chat.ask("Go on.", max_new_tokens=5)
        assert follow.timings.prompt_tokens == chat.token_count - 5


# Other processes ----------------------------------------------------------------------------------------------------------------


def _ask_in_child(vlm: FastVLM, queue: Any) -> None:
    try:
        vlm.generate(PROMPT)
    except FastVLMError as error:
        queue.put(str(error))
    vlm.close()


def test_a_model_in_a_forked_process_is_refused(engine: FastVLM) -> None:
    engine.generate(PROMPT, max_new_tokens=2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_ask_in_child, args=(engine, queue))
    child.start()
    assert "loaded before the process forked" in queue.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0
    assert engine.generate(PROMPT, max_new_tokens=2).token_ids
