"""Errors as OpenAI's clients expect them: a status, and `{"error": {...}}` that names the field."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
UNSUPPORTED = "unsupported_parameter"  # type of a validation error, and `code` of the answer


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: Of HTTP.
        body: What the client is sent.
        headers: What goes with it.
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
        self.status = status
        self.body = error_body(status, message, param, code)
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; the type follows from the status."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def internal_error() -> ApiError:
    """For what went wrong in the server; what it was stands in the log."""
    return ApiError(500, "internal error: the server's log says more", code="internal_error")


def shutting_down() -> ApiError:
    """For requests that come, or are cut off, while the server ends."""
    headers = {"connection": "close"}
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)


def context_exceeded(param: str, max_model_len: int, got: int | str) -> ApiError:
    """For a prompt that leaves no room for an answer."""
    message = (
        f"{param}: expected fewer tokens than the model's context of {max_model_len}, got {got}"
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def overloaded(message: str, retry_after_s: float) -> ApiError:
    """For a request that found all places taken."""
    headers = {"retry-after": str(math.ceil(retry_after_s))}
    return ApiError(429, message, code="engine_overloaded", headers=headers)


def invalid_value(kind: str, location: Sequence[str | int], message: str) -> ApiError:
    """For the first thing that is wrong with a request, as pydantic tells it."""
    param = field_path(location)
    message = message.removeprefix("Value error, ")
    code = UNSUPPORTED if kind in (UNSUPPORTED, "extra_forbidden") else "invalid_value"
    return ApiError(400, f"{param or 'body'}: {message}", param=param, code=code)


def install_handlers(app: FastAPI) -> None:
    """Let every error of `app` be answered in OpenAI's form."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)


async def _answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return invalid_value(first["type"], first["loc"][1:], first["msg"]).response()


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404 and message == "Not Found":  # no route, and nobody's own words
        message = f"expected a path that is served, got {request.url.path[:128]}"
    return ApiError(error.status_code, message, headers=error.headers).response()


def field_path(location: Sequence[str | int]) -> str | None:
    """Where in the body an error is, as `messages[0].content`; None for the body itself."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or None
