"""Clients that leave, stall or come too many, a model that fails, and a server that stops: places become free, and others get answers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.server import limits, sse
from tests.support.serving import DEMO, Served, ask, events, image, serving, text, wait_until

LONG = {"max_tokens": 1900}
"""A reply of noise that outlives every test, if nothing stops it."""
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture
def vlm(model_dir: Path) -> Iterator[FastVLM]:
    """A model whose replies are noise and never end by themselves."""
    with FastVLM.load(model_dir, "ort", threads=1, slots=1) as vlm:
        yield vlm


@pytest.fixture
def slow(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> FastVLM:
    """The same, with steps of a hundredth of a second."""
    backend = vlm._engine.backend
    for name in ("step", "decode"):
        original = getattr(backend, name)

        def delayed(*given: Any, original: Any = original, **options: Any) -> Any:
            time.sleep(0.01)
            return original(*given, **options)

        monkeypatch.setattr(backend, name, delayed)
    return vlm


def check_free(served: Served) -> None:
    """Nothing runs or waits any more, and the server answers."""
    counters, admission = served.state.vlm.vlm.counters, served.state.admission
    wait_until(lambda: (admission.running, admission.waiting, counters().running, counters().waiting) == (0, 0, 0, 0))
    assert max(served.state.vlm.vlm._engine.backend.lengths) < 1900, "a reply was generated to its end"
    answer = served.post(ask("And now?", max_tokens=3))
    assert answer.status == 200 and answer.json["usage"]["completion_tokens"] == 3
    metrics = served.state.metrics
    wait_until(lambda: (metrics.waiting, metrics.running) == (0, 0))


def until_text(connection: socket.socket) -> bytes:
    """Read until a stream has text."""
    found = b""
    while b'"delta":{"content"' not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found


# Clients that leave -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(slow: FastVLM, stream: bool) -> None:
    with serving(slow, slots=1) as served:
        before = slow.counters().requests
        connection = served.open(ask("Tell me.", stream=stream, **LONG))
        wait_until(lambda: slow.counters().requests > before)
        if stream:
            until_text(connection)
        connection.close()
        check_free(served)
        assert served.state.metrics.ended["cancelled"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_frees_the_queue(slow: FastVLM, stream: bool) -> None:
    with serving(slow, slots=1, queue=1) as served:
        running = served.open(ask("Tell me.", stream=True, **LONG))
        until_text(running)
        waiting = served.open(ask("Me too.", stream=stream, **LONG))
        wait_until(lambda: served.state.admission.waiting == 1)
        waiting.close()
        wait_until(lambda: served.state.admission.waiting == 0)
        assert served.state.admission.running == 1
        running.close()
        check_free(served)
        assert served.state.metrics.ended["cancelled"] == 2


def test_a_client_that_leaves_in_the_middle_of_its_body(vlm: FastVLM, caplog: pytest.LogCaptureFixture) -> None:
    with serving(vlm, slots=1) as served:
        connection = socket.create_connection(("127.0.0.1", served.port))
        connection.sendall(HEAD % 500 + b"{")
        time.sleep(0.05)
        connection.close()
        check_free(served)
        assert served.state.metrics.ended == {"length": 1}
    assert not caplog.records, "uvicorn logs a traceback for what nobody handled"


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n"])
def test_a_head_that_does_not_end_is_given_up(vlm: FastVLM, whole: bool, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first request of a connection, and after a whole one."""
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    with serving(vlm, slots=1) as served:
        served.server.config.timeout_keep_alive = 1  # without anything after a whole request, this one counts
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            if whole:
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
            connection.sendall(sent)
            began = time.monotonic()
            while connection.recv(65536):
                pass
            assert time.monotonic() - began < 4, "uvicorn's own limits are 5 seconds and more"
        assert served.get("/health").status == 200


def test_a_long_reply_is_not_an_unfinished_head(slow: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    with serving(slow, slots=1) as served:
        assert served.post(ask("Tell me.", max_tokens=60)).json["usage"]["completion_tokens"] == 60


def test_bodies_that_wait_take_bounded_memory(slow: FastVLM) -> None:
    with serving(slow, slots=1, queue=100, max_body_bytes=1000) as served:
        running = served.open(ask("Tell me." + " " * 700, stream=True, **LONG))
        until_text(running)
        waiting: list[socket.socket] = []
        while served.post(ask("Me too." + " " * 700, max_tokens=1), path="/v1/models").status == 405 and len(waiting) < 20:
            waiting.append(served.open(ask("Me too." + " " * 700, stream=True, max_tokens=1)))
            wait_until(lambda: served.state.admission.waiting + served.state.metrics.refused.get(429, 0) >= len(waiting))
        assert 9 <= served.state.admission.waiting <= 11 and served.state.metrics.refused[429] > 5
        answer = served.post(ask("Me too." + " " * 700))
        assert answer.status == 429 and answer.headers["retry-after"] == "1" and "all the memory" in answer.error["message"]
        for connection in (running, *waiting):
            connection.close()
        check_free(served)


@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_a_mixed_load(vlm: FastVLM, count: int) -> None:
    """Good, malformed and vanishing clients at the same time: every good request gets the reply of a run alone."""
    pictures = [DEMO / f"{name}.jpg" for name in ("meter", "sign", "shapes")]
    jobs = [(f"Number {number}?", pictures[number % 4] if number % 4 < 3 else None, 3 + number) for number in range(16)]
    expected = [vlm.generate(prompt, picture, max_new_tokens=most).text for prompt, picture, most in jobs]

    def one(number: int) -> int:
        prompt, picture, most = jobs[number % 16]
        parts = [text(prompt)] + ([image(picture)] if picture else [])
        if number % 5 == 3:
            served.open(ask(*parts, stream=number % 2 == 0, **LONG)).close()
            return 0
        if number % 5 == 4:
            return served.post(b'{"messages": ' + bytes([number % 256])).status
        stream = number % 3 == 0
        answer = served.post(ask(*parts, max_tokens=most, stream=stream))
        if stream:
            chunks = [json.loads(data)["choices"][0]["delta"] for _, data in events(answer.body)[:-1]]
            assert "".join(chunk.get("content") or "" for chunk in chunks) == expected[number % 16]
        else:
            assert answer.json["choices"][0]["message"]["content"] == expected[number % 16]
        return answer.status

    with serving(vlm, slots=1, queue=50) as served, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(count)))
        assert (found.count(200), found.count(400), found.count(0)) == (3 * count // 5, count // 5, count // 5)
        check_free(served)


def test_a_body_that_stalls_is_given_up(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.1)
    with serving(vlm, slots=1) as served, socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(HEAD % 50)
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_byte_by_byte_is_given_up(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its silence is never long, but it would go on for ever."""
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.5)
    with serving(vlm, slots=1) as served, socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(HEAD % 5000)
        connection.settimeout(0.05)
        began, answer = time.monotonic(), b""
        while not answer and time.monotonic() - began < 5:
            connection.sendall(b" ")
            with suppress(TimeoutError):
                answer = connection.recv(65536)
        assert 0.4 < time.monotonic() - began < 4
        connection.settimeout(10)
        while b"}" not in answer and (more := connection.recv(65536)):
            answer += more
        assert answer.startswith(b"HTTP/1.1 408 ") and b"the body comes too slowly: " in answer


def test_a_large_body_may_take_longer(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    body = json.dumps(ask("Tell me.", max_tokens=2)).encode()
    with serving(vlm, slots=1) as served, socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(HEAD % (8 * 2000 + len(body)))
        for _ in range(8):  # 2,000 bytes each 0.1 s are more than BODY_RATE
            connection.sendall(b" " * 2000)
            time.sleep(0.1)
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_takes_nothing_is_given_up(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SEND_SECONDS", 0.1)
    with serving(vlm, slots=1) as served:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", served.port))
        data = json.dumps(ask("Tell me.", stream=True, logprobs=True, top_logprobs=20, **LONG)).encode()
        connection.sendall(HEAD % len(data) + data)
        wait_until(lambda: served.state.admission.running == 1)
        wait_until(lambda: served.state.admission.running == 0)
        connection.close()
        check_free(served)


# Too many -----------------------------------------------------------------------------------------------------------------------


def test_a_full_queue(slow: FastVLM) -> None:
    with serving(slow, slots=1, queue=1) as served, ThreadPoolExecutor(2) as pool:
        running = served.open(ask("Tell me.", stream=True, **LONG))
        until_text(running)
        waiting = pool.submit(served.post, ask("Me too.", max_tokens=2))
        wait_until(lambda: served.state.admission.waiting == 1)
        for stream in (False, True):
            answer = served.post(ask("And me.", stream=stream))
            assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
            assert (answer.error["type"], answer.error["code"]) == ("rate_limit_error", "queue_full")
        assert served.state.metrics.refused == {429: 2}
        running.close()
        assert waiting.result(20).status == 200
        check_free(served)


def test_those_who_wait_are_answered_in_order(slow: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    original = slow._ask

    def recorded(history: Any, earlier: Any, prompt: str, *given: Any, **options: Any) -> Any:
        order.append(prompt)
        return original(history, earlier, prompt, *given, **options)

    with serving(slow, slots=1, queue=8) as served, ThreadPoolExecutor(8) as pool:
        running = served.open(ask("Tell me.", stream=True, **LONG))
        until_text(running)
        monkeypatch.setattr(slow, "_ask", recorded)
        jobs = []
        for number in range(6):
            jobs.append(pool.submit(served.post, ask(f"Number {number}", max_tokens=2)))
            wait_until(lambda: served.state.admission.waiting == len(jobs))
        running.close()
        assert [job.result(20).status for job in jobs] == [200] * 6
        assert order == [f"Number {number}" for number in range(6)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(slow: FastVLM, stream: bool) -> None:
    with serving(slow, slots=1, timeout_seconds=0.5) as served:
        answer = served.post(ask("Tell me.", stream=stream, **LONG))
        if stream:
            assert answer.status == 200
            name, data = events(answer.body)[-1]
            assert name == "error"
            error = json.loads(data)["error"]
        else:
            assert answer.status == 504
            error = answer.error
        assert (error["type"], error["code"]) == ("timeout_error", "timeout") and "more than 0.5 seconds" in error["message"]
        check_free(served)


def test_waiting_counts_as_time(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, backend = threading.Event(), vlm._engine.backend
    original = backend.encode

    def waiting(*given: Any) -> Any:
        assert gate.wait(20)
        return original(*given)

    question = ask(text("What?"), image(DEMO / "meter.jpg"), stream=True)
    with serving(vlm, slots=1, timeout_seconds=1.0) as served:
        monkeypatch.setattr(backend, "encode", waiting)
        try:
            running = served.open(question)
            wait_until(lambda: served.state.admission.running == 1)
            began = time.monotonic()
            assert served.post(question).status == 504, "before the first byte"
            assert time.monotonic() - began < 1.8, "its time began when it had a place"
            assert running.recv(100).startswith(b"HTTP/1.1 504 "), "its picture takes too long, and is not waited for"
            running.close()
        finally:
            gate.set()
        check_free(served)


# A model that fails -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [FastVLMError("the device is gone", "reboot"), MemoryError("no memory"), ValueError("a bug")])
def test_a_failure_before_the_first_byte(vlm: FastVLM, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(vlm, slots=1) as served:

        def fail(*_given: Any, **_options: Any) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(vlm._engine.backend, "step", fail)
            answer = served.post(ask("Tell me."))
        assert answer.status == 500 and (answer.error["type"], answer.error["code"]) == ("server_error", "generation_failed")
        assert str(error) in answer.error["message"] and "Traceback" not in answer.error["message"]
        check_free(served)
        assert served.state.metrics.ended == {"error": 1, "length": 1}


def test_a_failure_after_the_first_byte_is_an_event(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(vlm, slots=1) as served:
        backend, steps = vlm._engine.backend, iter(range(100))
        original = {name: getattr(backend, name) for name in ("step", "decode")}

        def failing(name: str) -> Any:
            def run(*given: Any, **options: Any) -> Any:
                if next(steps) == 5:
                    raise FastVLMError("the device is gone", "reboot")
                return original[name](*given, **options)

            return run

        with monkeypatch.context() as patch:
            for name in original:
                patch.setattr(backend, name, failing(name))
            answer = served.post(ask("Tell me.", stream=True, **LONG))
        assert answer.status == 200
        found = events(answer.body)
        name, data = found[-1]
        assert name == "error" and json.loads(data) == {
            "error": {"message": "the device is gone; reboot", "type": "server_error", "param": None, "code": "generation_failed"}
        }
        said = [json.loads(data)["choices"][0]["delta"].get("content") for _, data in found[:-1]]
        assert any(said), "text came before"
        check_free(served)


def test_a_stream_pings_while_nothing_comes(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_edge.server.completions.PING_SECONDS", 0.02)
    with serving(vlm, slots=1) as served:
        backend = vlm._engine.backend
        original = backend.step

        def late(*given: Any, **options: Any) -> Any:
            time.sleep(0.2)
            return original(*given, **options)

        monkeypatch.setattr(backend, "step", late)
        found = events(served.post(ask("Tell me.", stream=True, max_tokens=2)).body)
    names = [name for name, _ in found]
    assert names[0] == "" and names[1:4] == [":"] * 3 and found[-1] == ("", "[DONE]")


# Beginning and end --------------------------------------------------------------------------------------------------------------


def test_it_is_not_ready_before_vision_and_decoder_have_run(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, backend, ran = threading.Event(), vlm._engine.backend, []
    for name in ("encode", "step", "decode"):

        def waiting(*given: Any, name: str = name, original: Any = getattr(backend, name), **options: Any) -> Any:
            assert gate.wait(20)
            ran.append(name)
            return original(*given, **options)

        monkeypatch.setattr(backend, name, waiting)
    with serving(vlm, ready=False, slots=1) as served:
        for answer in (served.get("/health"), served.get("/health/ready"), served.post(ask("Tell me."))):
            assert answer.status == 503 and answer.headers["retry-after"] == "1"
            assert (answer.error["type"], answer.error["code"]) == ("unavailable_error", "loading")
        assert served.get("/v1/models").status == 200
        gate.set()
        wait_until(served.state.ready.is_set)
        assert {"encode", "step"} <= set(ran)
        assert served.get("/health").status == 200 and served.post(ask("Tell me.", max_tokens=2)).status == 200


def test_a_model_that_fails_its_first_run_stops_the_server(vlm: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_given: Any, **_options: Any) -> Any:
        raise FastVLMError("the device is gone")

    monkeypatch.setattr(vlm._engine.backend, "encode", fail)
    stopped = threading.Event()
    with serving(vlm, ready=False, slots=1) as served:
        served.state.stop = stopped.set
        wait_until(lambda: served.state.failure is not None)
        answer = served.get("/health")
        assert answer.status == 503 and answer.error["message"] == "the model failed its first run: the device is gone"


def test_what_runs_is_finished_when_the_server_stops(slow: FastVLM) -> None:
    with serving(slow, slots=1, queue=4) as served, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(served.post, ask(f"Number {number}", max_tokens=30, stream=bool(number))) for number in range(2)]
        wait_until(lambda: (served.state.admission.running, served.state.admission.waiting) == (1, 1))
        served.server.should_exit = True
        whole, streamed = (job.result(20) for job in jobs)
        assert whole.status == 200 and events(streamed.body)[-1] == ("", "[DONE]")
        with pytest.raises(ConnectionError):
            served.get("/health")


def test_what_is_not_finished_in_time_is_told(slow: FastVLM) -> None:
    with serving(slow, slots=1, queue=4) as served, ThreadPoolExecutor(2) as pool:
        served.server.config.timeout_graceful_shutdown = 1
        streamed = pool.submit(served.post, ask("Tell me.", stream=True, **LONG))
        wait_until(lambda: served.state.admission.running == 1)
        waiting = pool.submit(served.post, ask("Me too."))
        wait_until(lambda: served.state.admission.waiting == 1)
        served.server.should_exit = True
        name, data = events(streamed.result(20).body)[-1]
        assert name == "error" and json.loads(data)["error"]["code"] == "stopping"
        answer = waiting.result(20)
        assert answer.status == 503 and answer.error["code"] == "stopping"
