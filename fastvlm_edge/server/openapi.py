"""GET /openapi.json: the addresses of the server for programs, described by the types that validate its requests and make its answers."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastvlm_edge.server import api, responses_api, tokens
from fastvlm_edge.server.errors import ErrorBody
from fastvlm_edge.server.settings import Settings
from fastvlm_edge.server.state import ServerState
from fastvlm_edge.version import __version__

_BODY = (400, 408, 413, 415)
"""What any request with a body may be answered."""
_REPLY = (429, 500, 503)
"""What a request for a reply may be answered."""
_TYPES = (
    *(ErrorBody, api.ChatRequest, api.ChatCompletion, api.ChatCompletionChunk, api.Models, api.Model, api.Health),
    *(responses_api.ResponsesRequest, responses_api.ResponseObject, responses_api.Event),
    *(tokens.TokenizeRequest, tokens.TokenizeAnswer, tokens.DetokenizeRequest, tokens.DetokenizeAnswer, tokens.Props),
)


def routes(state: ServerState) -> list[Route]:
    """GET /openapi.json."""
    body = msgspec.json.encode(describe(state.settings))

    async def openapi(request: Request) -> Response:
        return Response(body, media_type="application/json")

    return [Route("/openapi.json", openapi, methods=["GET"])]


def describe(settings: Settings) -> dict[str, Any]:
    """The OpenAPI description of a server with these settings."""
    found, components = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(_TYPES, found, strict=True))
    for kind, neutral in (
        (api.ChatRequest, api.NEUTRAL),
        (responses_api.ResponsesRequest, responses_api.NEUTRAL),
        (tokens.TokenizeRequest, tokens.NEUTRAL),
    ):
        _add_neutral(components[kind.__name__], neutral)
    late = (504,) if settings.timeout_seconds is not None else ()

    def operation(
        name: str, summary: str, answer: Any, *errors: int, asked: Any = None, stream: Any = None, media: str = "application/json"
    ) -> dict[str, Any]:
        content = {media: {"schema": schemas.get(answer, {"type": "object" if answer is dict else "string"})}}
        if stream is not None:
            content["text/event-stream"] = {"schema": _event(schemas[stream], schemas[ErrorBody])}
        documented: dict[str, Any] = {
            "operationId": name,
            "summary": summary,
            "responses": {
                "200": {
                    "description": "The data of each event of a stream, or the answer." if stream else "The answer.",
                    "content": content,
                }
            },
        }
        if asked is not None:
            documented["requestBody"] = {"required": True, "content": {"application/json": {"schema": schemas[asked]}}}
        closed = bool(settings.api_keys) and name not in _OPEN
        if closed:
            documented["security"] = [{"key": []}]
        for status in sorted({*errors, *((401,) if closed else ()), *((403,) if settings.names is not None else ())}):
            documented["responses"][str(status)] = _error(status, schemas[ErrorBody])
        return documented

    paths: dict[str, Any] = {
        "/v1/chat/completions": {
            "post": operation(
                *("chat", "Answer the last question of a conversation.", api.ChatCompletion, 404, *_BODY, *_REPLY, *late),
                asked=api.ChatRequest,
                stream=api.ChatCompletionChunk,
            )
        },
        "/v1/responses": {
            "post": operation(
                *("responses", "The same, as OpenAI's newer interface has it.", responses_api.ResponseObject, 404, *_BODY, *_REPLY, *late),
                asked=responses_api.ResponsesRequest,
                stream=responses_api.Event,
            )
        },
        "/v1/models": {"get": operation("models", "The model that is served.", api.Models)},
        "/v1/models/{name}": {
            "get": operation("model", "The model that is served, by its name.", api.Model, 404),
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
        },
        "/health": {"get": operation("health", "Whether the model is ready.", api.Health, 503)},
        "/health/ready": {"get": operation("ready", "The same.", api.Health, 503)},
        "/tokenize": {
            "post": operation(
                "tokenize", "The tokens of a text or of a conversation.", tokens.TokenizeAnswer, 404, *_BODY, asked=tokens.TokenizeRequest
            )
        },
        "/detokenize": {
            "post": operation("detokenize", "The text of tokens.", tokens.DetokenizeAnswer, 404, *_BODY, asked=tokens.DetokenizeRequest)
        },
        "/props": {"get": operation("props", "What runs.", tokens.Props)},
        "/metrics": {"get": operation("metrics", "Figures for Prometheus.", None, media="text/plain")},
        "/openapi.json": {"get": operation("openapi", "This description.", dict)},
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "fastvlm-edge serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if settings.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


_OPEN = ("health", "ready")
"""Operations that need no key."""


def _event(data: Mapping[str, Any], error: Mapping[str, Any]) -> dict[str, Any]:
    """A server-sent event, as OpenAPI 3.2 describes one (section "Server-Sent Events"). 3.1 says nothing about them."""
    content = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [data, error]}}
    description = "Each event of a stream. The last one of chat completions has the data [DONE]. There may be comments."
    properties = {"event": {"type": "string"}, "data": content}
    return {"type": "object", "description": description, "required": ["data"], "properties": properties}


def _error(status: int, schema: Mapping[str, Any]) -> dict[str, Any]:
    error: dict[str, Any] = {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": schema}}}
    if status in (429, 503):
        error["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return error


def _add_neutral(schema: dict[str, Any], neutral: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Fields that are only taken with a value that changes nothing."""
    for name, (values, why) in neutral.items():
        schema["properties"].setdefault(name, {"enum": [*values, None], "description": f"Other values are refused: {why}."})
