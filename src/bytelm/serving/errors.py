"""Errors of requests, in the shape of OpenAI's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from bytelm.errors import ConfigError, PatchingError
from bytelm.inference import RequestTooLongError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Types of errors by status; other statuses below 500 are invalid requests."""
CLIENT_GONE = 499
"""Status under which requests are counted whose clients disconnected."""
MAX_MESSAGE = 500
"""Longest message, in characters."""


class QueueFullError(Exception):
    """Too many requests are in progress or waiting."""


class EngineFailedError(Exception):
    """An exception in a step of the engine ended the request."""


class StoppingError(Exception):
    """The server stops before the request could be completed."""


class ClientGoneError(Exception):
    """The client disconnected."""


class ApiError(Exception):
    """An error with which a request is answered.

    Args:
        status: HTTP status.
        message: what is wrong, and the remedy.
        param: field of the request that is wrong.
        code: name of the error for programs.
        headers: headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API shows it."""
        other = "invalid_request_error" if self.status < 500 else "server_error"
        message = self.message
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}..."
        return {
            "error": {
                "message": message,
                "type": TYPES.get(self.status, other),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """Return the error as a response."""
        return JSON(self.body, self.status, self.headers)


EXPECTED = (
    ApiError,
    ClientGoneError,
    ConfigError,
    EngineFailedError,
    PatchingError,
    QueueFullError,
    StoppingError,
    TimeoutError,
)
"""Exceptions that are not logged when a request is answered with them."""


class JSON(Response):
    """Response of JSON in ASCII, which any string can be written in."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(json.dumps(content, allow_nan=False), status_code, headers)


def internal_error() -> ApiError:
    """Return the error for mistakes that are the server's, whose details only its log has."""
    return ApiError(500, "the server could not answer this request; its log says why")


def api_error(error: Exception) -> ApiError:
    """Return the error that a request is answered with when an exception was raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, ConfigError | PatchingError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFullError):
        return ApiError(
            503,
            "too many requests are in progress or waiting: retry later",
            code="queue_full",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, StoppingError):
        return ApiError(503, "the server is stopping", code="stopping")
    if isinstance(error, ClientGoneError):
        return ApiError(CLIENT_GONE, "the client disconnected")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than the server allows; ask for fewer bytes")
    return internal_error()


def invalid_request(errors: Sequence[Any]) -> ApiError:
    """Return the error for a request that does not match its schema."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"unknown field {name!r}: leave it out", param=name, code="unknown_parameter"
        )
    message = first["msg"].removeprefix("Value error, ")
    if not name:
        return ApiError(400, f"the body must be a JSON object with Content-Type JSON: {message}")
    return ApiError(400, f"{name}: {message}", param=name)


def add_handlers(app: FastAPI) -> None:
    """Answer all errors of an application in OpenAI's shape."""

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.url.path} does not accept {request.method}",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return invalid_request(error.errors()).response()

    async def on_error(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    for kind in (*EXPECTED, Exception):
        app.add_exception_handler(kind, on_error)
