"""Log lines: one JSON object each, with the id of the request, and of the trace, that they were said for."""

import json
import logging
import re
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from uuid import uuid4

from basalt import tracing

REQUEST_ID_HEADER = "X-Request-Id"
QUIET = ("/healthz", "/health", "/readyz", "/metrics")  # asked every few seconds by machines: neither logged nor traced

request_id: ContextVar[str] = ContextVar("request_id", default="")

_CLIENTS_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own id of a request, where it is one that may stand in logs and headers; else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _CLIENTS_ID.fullmatch(value):
            return value.decode()
    return f"req_{uuid4().hex}"


class JSONLines(logging.Formatter):
    """What a line tells besides its message comes as `extra={"told": {…}}`; what is empty is left out."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
            "trace_id": tracing.trace_id(),
            **getattr(record, "told", {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in told.items() if value != ""}, ensure_ascii=False)


def log_to_stderr(level: str = "INFO") -> None:
    """Everything from WARNING on, and Basalt's own from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("basalt").setLevel(level)
