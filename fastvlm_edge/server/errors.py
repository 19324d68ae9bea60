"""Errors of requests, in the shape of the OpenAI API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.generation.answer import ContextFull


class ErrorDetail(msgspec.Struct, kw_only=True, frozen=True):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    """The field that is to blame."""
    code: str | None


class ErrorBody(msgspec.Struct, kw_only=True, frozen=True):
    """The body of a response that is an error, and the data of an error event."""

    error: ErrorDetail


class RequestError(Exception):
    """A request that is refused or failed."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after` is in seconds."""
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.detail = ErrorDetail(message=message, type=type, param=param, code=code)

    def at(self, param: str) -> RequestError:
        """The same, with the field that is to blame if none is named yet."""
        if self.detail.param is None:
            self.detail = msgspec.structs.replace(self.detail, param=param)
        return self

    @property
    def body(self) -> bytes:
        """The JSON object."""
        return msgspec.json.encode(ErrorBody(error=self.detail))

    @property
    def response(self) -> Response:
        """The whole response."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return Response(self.body, self.status, headers, media_type="application/json")


class ClientGone(Exception):
    """The client closed the connection before its response was complete."""


def refused(error: FastVLMError, param: str | None = None) -> RequestError:
    """The error for a question that the runtime does not accept, or a picture that it cannot read."""
    if isinstance(error, ContextFull):
        return RequestError(400, str(error), param="messages", code="context_length_exceeded")
    return RequestError(400, str(error), param=param)


def invalid_format(error: FastVLMError, param: str | None = None) -> RequestError:
    """The error for a format of a reply that is not supported."""
    return RequestError(400, str(error), param=param, code="invalid_format")


def failed(error: BaseException) -> RequestError:
    """The error for a reply that failed while it was generated."""
    if isinstance(error, RequestError):
        return error
    message = str(error) if isinstance(error, FastVLMError) else f"the server failed: {type(error).__name__}: {error}"
    return RequestError(500, message, type="server_error", code="generation_failed")


def not_ready(why: str) -> RequestError:
    """The error for a request that came too early."""
    return RequestError(503, why, type="unavailable_error", code="loading", retry_after=1)


async def on_request_error(request: Request, error: Exception) -> Response:
    """Handler for RequestError."""
    assert isinstance(error, RequestError)
    request.app.state.server.metrics.rejected(error.status)
    return error.response


async def on_http_error(request: Request, error: Exception) -> Response:
    """Handler for what Starlette refuses itself: an unknown address, or a method that it does not have."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {404: f"there is no {path}", 405: f"{path} does not take {request.method}"}.get(error.status_code, error.detail)
    response = RequestError(error.status_code, message, code="not_found" if error.status_code == 404 else None).response
    response.headers.update(error.headers or {})
    return response


async def on_bug(_request: Request, error: Exception) -> Response:
    """Handler for everything else."""
    return failed(error).response
