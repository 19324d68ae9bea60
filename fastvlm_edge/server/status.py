"""`GET /health`, and `GET /v1/models`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastvlm_edge.server import api
from fastvlm_edge.server.state import ServerState


def routes(state: ServerState) -> list[Route]:
    """The addresses."""

    async def health(_request: Request) -> Response:
        state.check_ready()
        return _json(api.Health())

    async def models(_request: Request) -> Response:
        return _json(api.Models(data=[_model(state)]))

    async def model(request: Request) -> Response:
        state.check_model(request.path_params["name"])
        return _json(_model(state))

    return [
        Route("/health", health),
        Route("/health/ready", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def _model(state: ServerState) -> api.Model:
    return api.Model(
        id=state.model_name,
        created=state.started,
        max_model_len=state.vlm.vlm.manifest.decoder.context,
        architecture=api.Architecture(input_modalities=["text", "image"], output_modalities=["text"]),
    )


def _json(document: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
