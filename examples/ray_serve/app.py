"""`fastvlm-edge serve` as a deployment of Ray Serve: the same OpenAI API, with Ray's replicas, restarts and scaling in front of it.

    pip install ".[serve]" "ray[serve]"
    serve run examples.ray_serve.app:build model=/models/fastvlm-0.5b replicas=2

Every replica loads the model on its node: the directory must be there on all of them. Ray's proxy listens on port 8000, `/health` included.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from ray.serve import Application

from fastvlm_edge import AsyncFastVLM
from fastvlm_edge.server.app import make_app
from fastvlm_edge.server.settings import Settings


class Server:
    """The server as an ASGI application that is made where it runs, because a loaded model cannot be sent to another process."""

    def __init__(self, model: str, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        async with await AsyncFastVLM.load(self.model, slots=self.settings.slots) as vlm:
            self.app = make_app(vlm, self.settings)
            await self.app(scope, receive, send)  # returns when the replica stops


def build(arguments: dict[str, str]) -> Application:
    """The application for `serve run`: `model` is a model directory; `replicas` (1) and `cpus` of each (2) are numbers."""
    settings = Settings(access_log=False)
    deployment = serve.deployment(
        name="fastvlm",
        num_replicas=int(arguments.get("replicas", 1)),
        ray_actor_options={"num_cpus": int(arguments.get("cpus", 2))},
        max_ongoing_requests=settings.slots + settings.queue,
    )
    return deployment(serve.ingress(Server(os.path.abspath(arguments["model"]), settings))()).bind()
