"""The body of a request that holds JSON: its media type, its size, its time, and its text."""

import asyncio
import json
from collections.abc import Collection
from typing import Any

from aiohttp import web

from .problems import Problem

BODY_SECONDS = 60.0
"""Maximum time for the body of a request to arrive, in seconds."""


async def read_json(request: web.Request, limit: int | None = None) -> Any:
    """Return the JSON document in the body of a request.

    Raises Problem: 415 for another media type, 413 for more than `limit` bytes (that of the endpoint counts as well),
    408 for a body that does not arrive within BODY_SECONDS, 400 for one that is not JSON.
    """
    is_json = request.content_type == "application/json" or request.content_type.endswith("+json")
    body = await read_body(request, (request.content_type if is_json else "application/json",), limit)
    try:
        document = json.loads(body, parse_constant=_reject_constant)
        if b"\\u" in body:  # half a surrogate pair is not a character and cannot be encoded (RFC 8259, 8.2)
            json.dumps(document, ensure_ascii=False).encode()
        return document
    except UnicodeEncodeError:
        raise Problem(400, "The body has half a surrogate pair, which is not a character.") from None
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise Problem(400, f"The body is not JSON{where}.") from None


async def read_body(request: web.Request, media_types: Collection[str], limit: int | None = None) -> bytes:
    """Return the body of a request that is of one of `media_types`, for a format that the handler parses itself.

    Raises Problem as `read_json` does, except 400.
    """
    # Without a Content-Type as well: a page of another site can send that without a preflight (WHATWG Fetch, 4.10).
    if request.content_type not in media_types:
        types = ", ".join(media_types)
        raise Problem(415, f"The body must be {types.replace(', ', ' or ')}.", headers={"Accept": types})
    if limit is not None and (request.content_length or 0) > limit:
        raise _too_large(limit)
    try:
        if request.content.is_eof():  # it has arrived with the head, as most do
            body = await request.read()
        else:
            async with asyncio.timeout(BODY_SECONDS):
                body = await request.read()
    except TimeoutError:
        detail = f"The body did not arrive within {BODY_SECONDS:g} s."
        raise Problem(408, detail, headers={"Connection": "close"}) from None
    if limit is not None and len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> Problem:
    return Problem(413, f"The body is larger than {limit} bytes.")


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
