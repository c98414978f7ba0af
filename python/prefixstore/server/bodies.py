"""From the bytes of a body to a request that says what it may, a large one off the event loop."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prefixstore.server.errors import ApiError, invalid_value
from prefixstore.server.worker import Worker

# Smaller bodies are checked on the event loop, in at most 2 ms; a thread would cost 0.1 ms more.
_SMALL_BYTES = 4096

Body = TypeVar("Body", bound=BaseModel)


async def read_body(kind: type[Body], content: bytes, worker: Worker, tenant: str) -> Body:
    """The request in `content`; `worker` reads a large one when it is the tenant's turn.

    Raises:
        ApiError: 400 if it is no JSON, or not what `kind` takes; 429 as the worker.
    """
    if len(content) <= _SMALL_BYTES:
        return _read(kind, content)
    return await worker.run(tenant, len(content), _read, kind, content)


def body_schema(path: str, kind: type[BaseModel]) -> dict[str, Any]:
    """How a route's own description, `openapi_extra`, tells what its body is."""
    place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    schema = kind.model_json_schema(ref_template=f"{place}/$defs/{{model}}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _read(kind: type[Body], content: bytes) -> Body:
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        message = f"body: expected JSON, got {error.msg} at character {error.pos}"
        raise ApiError(400, message, code="invalid_json") from None
    except (ValueError, RecursionError) as error:  # no text, a number without end, or too deep
        message = f"body: expected JSON, got what cannot be read: {error}"
        raise ApiError(400, message, code="invalid_json") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise invalid_value(first["type"], first["loc"], first["msg"]) from None
