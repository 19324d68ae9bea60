"""Clips in a request: frames spread over them are pictures of the question."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from fastvlm_edge import FastVLM
from tests.support.serving import Served, ask, serving, text

pytest.importorskip("av")

from fastvlm_edge.camera.clip import frames_of_clip
from tests.support.videos import write_video

PROMPT = "What number is shown?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two seconds."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", [number / 10 for number in range(20)]).read_bytes()


def video(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + base64.b64encode(data).decode()}}


@pytest.mark.parametrize("frames", [None, 3])
def test_a_clip_is_answered_as_its_frames_are(served: Served, demo: FastVLM, clip: bytes, frames: int | None) -> None:
    more = {} if frames is None else {"media_io_kwargs": {"video": {"num_frames": frames}}}
    answer = served.post(ask(video(clip), text(PROMPT), max_tokens=12, **more)).json
    expected = demo.generate(PROMPT, frames_of_clip(clip, frames or 8), max_new_tokens=12)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["prompt_tokens"] == expected.timings.prompt_tokens


def test_a_clip_counts_as_its_frames(vlm: FastVLM, clip: bytes) -> None:
    with serving(vlm, slots=1, max_images=4) as small:
        assert small.post(ask(video(clip), text(PROMPT), max_tokens=1)).status == 200, "as many as are allowed, unless the request says"
        many = small.post(ask(video(clip), text(PROMPT), media_io_kwargs={"video": {"num_frames": 5}}))
    assert many.status == 400 and many.error["code"] == "too_many_images"
    assert "5 pictures" in many.error["message"] and "num_frames" in many.error["message"]


def test_a_clip_that_cannot_be_read_is_named(served: Served, clip: bytes) -> None:
    answer = served.post(ask(text(PROMPT), video(clip[: len(clip) // 40])))
    assert answer.status == 400 and answer.error["param"] == "messages[0].content[1].video_url.url"


def test_a_clip_may_be_a_file_beneath_the_media_path(vlm: FastVLM, clip: bytes, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(clip)
    named = {"type": "video_url", "video_url": {"url": "clip.mp4"}}
    with serving(vlm, slots=1, media_path=tmp_path, max_image_bytes=1000) as found:
        assert found.post(ask(named, text(PROMPT), max_tokens=1)).status == 200
        found_tokens = found.post({"messages": ask(named, text(PROMPT))["messages"]}, "/tokenize")
        assert found_tokens.status == 200
    with serving(vlm, slots=1) as closed:
        assert closed.post(ask(named, text(PROMPT))).status == 400
