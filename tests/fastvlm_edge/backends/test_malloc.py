"""A load returns heap memory to the system, its threads sleep when idle, and it changes the process only when asked.

The memory and thread tests use the real glibc and onnxruntime; the others record calls of the C library instead of making them.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest

from fastvlm_edge import FastVLM, FastVLMError
from fastvlm_edge.backends import malloc

on_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")


def kept_mib(context: str) -> int:
    """MiB that a process still holds after it freed every second one of 128 blocks of 2 MiB within `context`."""
    script = """
    import contextlib
    from pathlib import Path
    from fastvlm_edge.backends import malloc

    def resident():
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) >> 10

    before = resident()
    bytes(bytearray(2 << 20))  # freed: from here on glibc has blocks of this size in its heap, as while a model is loaded
    with {context}:
        blocks = [bytearray(b"x" * (2 << 20)) for _ in range(128)]
        del blocks[::2]
    print(resident() - before)
    """
    code = textwrap.dedent(script).replace("{context}", context)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout)


@on_glibc
def test_what_a_load_frees_goes_back_to_the_system() -> None:
    assert kept_mib("contextlib.nullcontext()") > 240  # so there is something to win
    assert kept_mib("malloc.loading()") < 140


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    calls: list[tuple[str, int]] = []
    library = SimpleNamespace(mallopt=lambda option, _: calls.append(("mallopt", option)), malloc_trim=lambda _: calls.append(("trim", 0)))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    return calls


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "65536"), ("MALLOC_TRIM_THRESHOLD_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536:x.y=1")],
)
def test_a_threshold_of_the_user_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    calls = record_calls(monkeypatch)
    with malloc.loading():
        pass
    assert [name for name, _ in calls] == ["mallopt"] * 3 + ["trim"]
    calls.clear()
    monkeypatch.setenv(name, value)
    with malloc.loading():
        pass
    assert calls == [("trim", 0)]


def test_a_load_that_fails_gives_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    with pytest.raises(FastVLMError), malloc.loading():
        raise FastVLMError("no")
    assert [name for name, _ in calls] == ["mallopt"] * 3 + ["trim"]


def test_a_c_library_without_these_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    with malloc.loading():
        pass


LOAD = """
import ctypes, json, sys
import onnxruntime as ort
from fastvlm_edge import FastVLM

calls = []

class Library:
    def __init__(self, name):
        self.malloc_trim = lambda size: calls.append("malloc_trim")
        self.mallopt = lambda option, value: calls.append("mallopt")

def register(*arguments, real=ort.create_and_register_allocator):
    calls.append("create_and_register_allocator")
    real(*arguments)

def session(*arguments, real=ort.InferenceSession, **options):
    made = real(*arguments, **options)
    calls.append(made.get_session_options().get_session_config_entry("session.use_env_allocators"))
    return made

ctypes.CDLL, ort.create_and_register_allocator, ort.InferenceSession = Library, register, session
load = {"ask": {"tune_process": True}, "default": {}}[sys.argv[2]]
with FastVLM.load(sys.argv[1], "ort", threads=2, **load) as vlm:
    ids = vlm.generate("What is this?", max_new_tokens=24).token_ids
print(json.dumps([ids, calls]))
"""


def load_in_a_process(model_dir: Path, way: str) -> tuple[list[int], list[str]]:
    """Token ids of an answer, and what the load changed: calls that concern the process, and each session's session.use_env_allocators."""
    command = [sys.executable, "-c", LOAD, str(model_dir), way]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    ids, calls = json.loads(done.stdout)
    return ids, calls


def test_only_a_load_that_is_asked_to_tunes_the_process(model_dir: Path) -> None:
    ids, calls = load_in_a_process(model_dir, "default")
    assert calls == ["0", "0"]
    tuned, calls = load_in_a_process(model_dir, "ask")
    assert calls == ["create_and_register_allocator", "mallopt", "1", "1", "mallopt", "mallopt", "malloc_trim"]
    assert len(ids) == 24 and tuned == ids


@pytest.mark.skipif(tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 26), reason="onnxruntime 1.26 is the first that can")
def test_threads_sleep_soon(model_dir: Path) -> None:
    time.sleep(0.1)  # threads of earlier tests
    with FastVLM.load(model_dir, "ort", threads=3):
        began = time.process_time()
        time.sleep(0.1)
        assert time.process_time() - began < 0.03  # four threads that wait as onnxruntime has it take 0.06 and more
