"""FastVLM as a Python model of Triton Inference Server: one request is a question, its responses are the pieces of the answer.

    prompt          TYPE_STRING [1]  the question, UTF-8
    image           TYPE_STRING [1]  optional: the bytes of a picture file (JPEG, PNG, ...), not base64
    max_new_tokens  TYPE_INT32  [1]  optional: 256 unless given
    text            TYPE_STRING [1]  the next piece; the last response has the final flag and no tensor

The model directory and the number of answers at a time are `parameters` of config.pbtxt.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fastvlm_edge import FastVLM, FastVLMError

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Load the model. An exception here is what Triton reports for a model that cannot be loaded."""
        parameters = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
        slots = int(parameters["slots"])
        self.vlm = FastVLM.load(parameters["model"], slots=slots)
        self.threads = ThreadPoolExecutor(slots, thread_name_prefix="fastvlm")

    def execute(self, requests: list[Any]) -> None:
        """Begin to answer, and return: Triton calls again while answers are still being generated."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                question = _question(request)
            except Exception as error:
                _fail(sender, f"the inputs cannot be read ({error})", pb_utils.TritonError.INVALID_ARG)
            else:
                self.threads.submit(self._answer, sender, question)

    def _answer(self, sender: Any, question: dict[str, Any]) -> None:
        try:
            if sender.is_cancelled():  # while it waited
                return _fail(sender, "cancelled", pb_utils.TritonError.CANCELLED)
            stream = self.vlm.stream(**question)
            for piece in stream:
                if sender.is_cancelled():
                    stream.close()
                    return _fail(sender, "cancelled", pb_utils.TritonError.CANCELLED)
                text = pb_utils.Tensor("text", np.array([piece.encode()], np.object_))
                sender.send(pb_utils.InferenceResponse(output_tensors=[text]))
            sender.send(flags=FINAL)
        except FastVLMError as error:
            _fail(sender, str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:  # it would be lost in the thread, and the client would wait for ever
            _fail(sender, repr(error), pb_utils.TritonError.INTERNAL)

    def finalize(self) -> None:
        """Triton unloads the model. Requests are finished by then."""
        self.threads.shutdown()
        self.vlm.close()


def _question(request: Any) -> dict[str, Any]:
    """The inputs as options of `FastVLM.stream`, copied: Triton may use the memory of a tensor again."""
    values = {}
    for name in ("prompt", "image", "max_new_tokens"):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            values[name] = tensor.as_numpy().reshape(-1)[0]
    question = {"prompt": bytes(values["prompt"]).decode(), "max_new_tokens": int(values.get("max_new_tokens", 256))}
    return {**question, "image": bytes(values["image"])} if "image" in values else question


def _fail(sender: Any, message: str, code: int) -> None:
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)), flags=FINAL)
