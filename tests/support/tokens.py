"""Tokens for the tests: their tables in config.toml, and the header field that sends one."""

import hashlib
import json
from datetime import UTC, datetime

EXPIRED = datetime(2020, 1, 1, tzinfo=UTC)


def table(name: str, *allow: str, expires: datetime | None = None) -> str:
    """Return the table of a token, which is its name with `-secret`."""
    digest = hashlib.sha256(f"{name}-secret".encode()).hexdigest()
    until = "" if expires is None else f"expires = {expires:%Y-%m-%dT%H:%M:%S.%fZ}\n"
    return f'[auth.tokens."{name}"]\nsha256 = "{digest}"\nallow = {json.dumps(allow)}\n{until}'


def bearer(name: str) -> dict[str, str]:
    """Return the field that sends the token of a name."""
    return {"Authorization": f"Bearer {name}-secret"}
