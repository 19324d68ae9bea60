"""`examples/triton/fastvlm/1/model.py` against Triton's documented contract for decoupled Python models (`tests/support/triton.py`)."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_edge import FastVLM
from fastvlm_edge.commands.demo import HOME, MODEL
from tests.support import triton
from tests.support.serving import wait_until
from tests.support.triton import InferenceRequest, TritonError

REPOSITORY = Path(__file__).resolve().parents[2] / "examples" / "triton"
QUESTION = "What number is shown?"
SECONDS = 60


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """The loaded model, as Triton makes it: the file is imported, and `initialize` gets the configuration as JSON."""
    config = {"name": "fastvlm", "parameters": {"model": {"string_value": str(MODEL)}, "slots": {"string_value": "2"}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", triton)
        spec = importlib.util.spec_from_file_location("model", REPOSITORY / "fastvlm" / "1" / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = module.TritonPythonModel()
        made.initialize({"model_config": json.dumps(config), "model_name": "fastvlm", "model_version": "1"})
        yield made
        made.finalize()


@pytest.fixture(scope="module")
def expected() -> str:
    with FastVLM.load(MODEL, "ort") as vlm:
        return vlm.generate(QUESTION, HOME / "meter.jpg").text


def request(prompt: bytes = QUESTION.encode(), picture: bytes | None = None, **more: Any) -> InferenceRequest:
    inputs: dict[str, Any] = {"prompt": np.array([prompt], np.object_)}
    if picture is not None:
        inputs["image"] = np.array([picture], np.object_)
    return InferenceRequest({**inputs, **more})


def execute(model: Any, *requests: InferenceRequest) -> list[list[bytes]]:
    """Run requests together; the texts of each, whose last response had the final flag."""
    assert model.execute(list(requests)) is None
    for each in requests:
        each.release()
    assert all(each.sender.final.wait(SECONDS) for each in requests)
    return [[_text(response) for response in each.sender.sent if response.error is None] for each in requests]


def _text(response: triton.InferenceResponse) -> bytes:
    (tensor,) = response.tensors
    assert tensor.name() == "text" and tensor.as_numpy().shape == (1,) and tensor.as_numpy().dtype == np.object_
    text: bytes = tensor.as_numpy()[0]
    return text


def failure(each: InferenceRequest) -> TritonError:
    error = each.sender.sent[-1].error
    assert error is not None
    return error


def test_an_answer_comes_in_pieces(model: Any, expected: str) -> None:
    picture = (HOME / "meter.jpg").read_bytes()
    (pieces,) = execute(model, request(picture=picture))
    assert len(pieces) > 1 and b"".join(pieces).decode() == expected
    limited = request(picture=picture, max_new_tokens=np.array([1], np.int32))
    assert len(b"".join(execute(model, limited)[0])) < len(expected)


def test_more_requests_than_slots_all_get_their_own_answer(model: Any, expected: str) -> None:
    with_picture = [request(picture=(HOME / "meter.jpg").read_bytes()) for _ in range(4)]
    without = request(b"Hello", max_new_tokens=np.array([3], np.int32))
    *answers, other = execute(model, *with_picture, without)
    assert [b"".join(pieces).decode() for pieces in answers] == [expected] * 4
    assert b"".join(other).decode() != expected


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_client_that_cancels_frees_its_slot(model: Any, pieces: int, expected: str) -> None:
    left = request(picture=(HOME / "meter.jpg").read_bytes())
    left.sender.cancelled_after = pieces
    assert len(execute(model, left)[0]) == pieces
    assert failure(left).code() == TritonError.CANCELLED
    wait_until(lambda: model.vlm.counters().running == 0)
    assert b"".join(execute(model, request(picture=(HOME / "meter.jpg").read_bytes()))[0]).decode() == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request(picture=b"no picture"), "is not an image"),
        (request(max_new_tokens=np.array([0], np.int32)), "max_new_tokens"),
        (request(b"\xff"), "the inputs cannot be read"),
        (InferenceRequest({}), "the inputs cannot be read"),
    ],
)
def test_what_the_client_can_correct_is_an_error_of_its_request(model: Any, wrong: InferenceRequest, message: str) -> None:
    assert execute(model, wrong) == [[]]
    assert failure(wrong).code() == TritonError.INVALID_ARG and message in failure(wrong).message()


def test_a_bug_ends_its_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_options: Any) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(model.vlm, "stream", fail)
    faulty = request()
    assert execute(model, faulty) == [[]]
    assert failure(faulty).code() == TritonError.INTERNAL and "ZeroDivisionError" in failure(faulty).message()
