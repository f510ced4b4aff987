"""Names for clients in Python, and for the commands and terminal views of plugins.

`follow`, `download` and `request_json` need no terminal: `async for event in follow(url)`.
"""

from .credentials import authorization_header
from .follow import Pause, follow
from .http import ConnectionLost, RequestRejected, request_json, stream_response
from .sse import Event, Parser
from .terminal import LOCAL_URL, UrlOption, exit_on_error, one_line, print_error, printable
from .transfer import IntegrityError, TransferProgress, download
from .views import (
    EndOfInput,
    Terminal,
    ViewError,
    describe_event,
    prompt,
    prompt_choice,
    prompt_file,
    prompt_number,
    url_with_query,
)

__all__ = [
    "LOCAL_URL",
    "ConnectionLost",
    "EndOfInput",
    "Event",
    "IntegrityError",
    "Parser",
    "Pause",
    "RequestRejected",
    "Terminal",
    "TransferProgress",
    "UrlOption",
    "ViewError",
    "authorization_header",
    "describe_event",
    "download",
    "exit_on_error",
    "follow",
    "one_line",
    "print_error",
    "printable",
    "prompt",
    "prompt_choice",
    "prompt_file",
    "prompt_number",
    "request_json",
    "stream_response",
    "url_with_query",
]
