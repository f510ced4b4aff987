"""One log line for each stream and request."""

import logging
from typing import Any

from aiohttp import web

from streamlab.auth import PRINCIPAL
from streamlab.hookspecs import hookimpl
from streamlab.streaming.outcome import StreamSummary

access_log = logging.getLogger("streamlab.access")


def _client(request: web.Request) -> dict[str, str | None]:
    """Return the address of a client, `unix` at a Unix socket, and its name if it has credentials."""
    name = request[PRINCIPAL].name if PRINCIPAL in request else ""
    return {"client": request.remote or "unix", **({"principal": name} if name else {})}


def _write(level: int, message: str, fields: dict[str, Any]) -> None:
    """Write a line; unlike `access_log.log`, without a search for the line of code that it comes from."""
    if access_log.isEnabledFor(level):
        extra = {"fields": fields}
        access_log.handle(access_log.makeRecord(access_log.name, level, "", 0, message, (), None, extra=extra))


class AccessLog:
    """One log line per stream, and one per request without a stream, both without the query: prompts stay private."""

    @hookimpl
    def on_stream_end(self, request: web.Request, summary: StreamSummary) -> None:
        """Write the line of a stream that has ended."""
        first_byte = summary.first_byte_seconds
        fields = {
            "scenario": summary.scenario,
            "method": summary.method,
            "path": request.path,
            "route": summary.route,
            "status": summary.status,
            "outcome": summary.outcome.value,
            "seconds": round(summary.seconds, 3),
            "first_byte_ms": None if first_byte is None else round(first_byte * 1000, 1),
            "bytes": summary.bytes,
            **_client(request),
        }
        _write(logging.INFO, "stream", fields)

    @staticmethod
    def request(request: web.Request, route: str, status: int, seconds: float) -> None:
        """Write the line of a request whose response was not a stream; probes only at DEBUG."""
        level = logging.DEBUG if route in ("/health", "/metrics") else logging.INFO
        if not access_log.isEnabledFor(level):
            return
        fields = {
            "method": request.method,
            "path": request.path,
            "status": status,
            "seconds": round(seconds, 4),
            **_client(request),
        }
        _write(level, "request", fields)
