"""Logs as lines of JSON: one for each request, without a word of its text."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

logger = logging.getLogger(__name__)


def log_request(**fields: Any) -> None:
    """One line of one request; a value of None is left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    logger.info("request", extra={"fields": given})


class JsonFormatter(logging.Formatter):
    """A record as one JSON object, with the fields it was given beside its message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, separators=(",", ":"))


def log_json_lines(level: int = logging.INFO) -> None:
    """Let this process log lines of JSON on its standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
