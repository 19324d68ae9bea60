"""FastVLM on edge devices: load a model directory and ask questions about images, without PyTorch.

Public names are imported on first use, so that `convert` and `--version` do not load the runtime.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.extras import package_errors
from fastvlm_edge.version import __version__

if TYPE_CHECKING:
    from fastvlm_edge.generation.async_vlm import AsyncChat, AsyncFastVLM, AsyncReplyStream
    from fastvlm_edge.generation.chat import Chat
    from fastvlm_edge.generation.chat_file import ChatTurn, Turn
    from fastvlm_edge.generation.engine import Counters
    from fastvlm_edge.generation.images import EncodedImage
    from fastvlm_edge.generation.logprobs import LogProb, TokenLogProb
    from fastvlm_edge.generation.reply import Confidence, Reply, Timings
    from fastvlm_edge.generation.sampling import SamplingParams
    from fastvlm_edge.generation.stream import ReplyStream
    from fastvlm_edge.generation.vlm import BackendInfo, FastVLM

__all__ = [
    "AsyncChat",
    "AsyncFastVLM",
    "AsyncReplyStream",
    "BackendInfo",
    "Chat",
    "ChatTurn",
    "Confidence",
    "Counters",
    "EncodedImage",
    "FastVLM",
    "FastVLMError",
    "LogProb",
    "Reply",
    "ReplyStream",
    "SamplingParams",
    "Timings",
    "TokenLogProb",
    "Turn",
    "__version__",
]

# onnxruntime 1.29 and newer sends telemetry unless this is 1, true, yes, on or y when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "AsyncChat": "generation.async_vlm",
    "AsyncFastVLM": "generation.async_vlm",
    "AsyncReplyStream": "generation.async_vlm",
    "BackendInfo": "generation.vlm",
    "Chat": "generation.chat",
    "ChatTurn": "generation.chat_file",
    "Confidence": "generation.reply",
    "Counters": "generation.engine",
    "EncodedImage": "generation.images",
    "FastVLM": "generation.vlm",
    "LogProb": "generation.logprobs",
    "Reply": "generation.reply",
    "ReplyStream": "generation.stream",
    "SamplingParams": "generation.sampling",
    "Timings": "generation.reply",
    "TokenLogProb": "generation.logprobs",
    "Turn": "generation.chat_file",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with package_errors("fastvlm_edge needs"):
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
