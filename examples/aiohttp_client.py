"""Prices with reconnects, and rows of an export as they arrive, with aiohttp: python aiohttp_client.py [URL]."""

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import aiohttp

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

# The default of aiohttp is five minutes for a whole response; a stream has no end.
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=45)


async def events(session: aiohttp.ClientSession, path: str) -> AsyncGenerator[tuple[str, str], None]:
    """Yield the id and the data of each event, across reconnects."""
    last = ""
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        try:
            async with session.get(path, headers=headers) as response:
                if response.status == 204:  # the stream had ended before
                    return
                response.raise_for_status()
                fields: dict[bytes, bytes] = {}
                async for line in response.content:  # split at LF only
                    if line := line.rstrip(b"\n"):
                        name, _, value = line.partition(b": ")
                        fields[name] = value
                    elif b"data" in fields:
                        last = fields[b"id"].decode()
                        if b"event" not in fields:  # named events are about the stream: gap, stop, end
                            yield last, fields[b"data"].decode()
                        if fields.get(b"event") == b"end":
                            return
                        fields = {}
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
            print(f"{type(error).__name__}; retrying in 1 s", file=sys.stderr)
        await asyncio.sleep(1)


async def rows(session: aiohttp.ClientSession, path: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the rows of an export in JSON lines; raises ValueError unless the last line confirms them."""
    count, digest = 0, hashlib.sha256()
    async with session.get(path, params={"limit": 1000, "end": "true"}) as response:
        response.raise_for_status()
        async for line in response.content:
            row = json.loads(line)
            if "@end" in row:
                end = row["@end"]
                if (end["rows"], end["sha256"]) != (count, digest.hexdigest()):
                    raise ValueError("the rows do not match the end record")
                return
            count += 1
            digest.update(line)
            yield row
    raise ValueError("the export has no end record")


async def main() -> None:
    """Run both examples."""
    # A line may be twice as long as read_bufsize, whose default is 64 KiB.
    async with aiohttp.ClientSession(URL, timeout=TIMEOUT, read_bufsize=1 << 20) as session:
        count, total = 0, 0.0
        async for row in rows(session, "/export/users/jsonl"):
            count, total = count + 1, total + (row["balance"] or 0)
        print(f"{count} users have {total:.2f}")
        count = 0
        async with aclosing(events(session, "/stream/stock-ticker")) as prices:
            async for identity, data in prices:
                print(identity, data, sep="\t")
                count += 1
                if count == 20:
                    break


if __name__ == "__main__":
    asyncio.run(main())
