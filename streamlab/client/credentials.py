"""The token that commands send, and to which servers they send it."""

import os
from pathlib import Path

from yarl import URL

from streamlab.config import TOKEN_VARIABLE

_given = ""
"""The token of `--token`, which is for every URL of the command."""

_server: URL | None = None
"""The server at `--url`, which the token of the variable is for."""


def use_token(token: str) -> None:
    """Send a token with every request of this process, whatever its server.

    `@FILE` is the token in that file. Raises OSError where it cannot be read, ValueError where it is no token.
    """
    global _given
    _given = _read(token)


def use_server(url: str) -> None:
    """Send the token of the variable with requests to this server."""
    global _server
    _server = URL(url if "://" in url else f"http://{url}")


def authorization_header(url: URL | str) -> dict[str, str]:
    """Return the header field with the token for a URL; nothing where there is no token for that server.

    The token of the variable goes to the server at `--url` only, so that a command with the URL of another server does
    not reveal it.
    """
    token = _given
    if not token and _server is not None and URL(url).origin() == _server.origin():
        token = _read(os.environ.get(TOKEN_VARIABLE, ""))
    return {"Authorization": f"Bearer {token}"} if token else {}


def _read(token: str) -> str:
    if token.startswith("@"):
        token = Path(token[1:]).expanduser().read_text(encoding="utf-8").strip()
    if not token.isascii() or any(character <= " " or character == "\x7f" for character in token):
        raise ValueError("the token has characters that no header can carry")
    return token
