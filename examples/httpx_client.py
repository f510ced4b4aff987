"""Tokens of a language model and events with reconnects, with httpx: python httpx_client.py [URL]."""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import httpx

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

# The default read timeout of httpx is 5 s. An event stream sends something every 15 s at the latest.
TIMEOUT = httpx.Timeout(10, read=45)


async def tokens(client: httpx.AsyncClient, prompt: str) -> AsyncIterator[str]:
    """Yield the texts of a response; a failure raises, also in mid-stream, so that an incomplete one is detected."""
    async with client.stream("GET", "/ai/chat-stream", params={"prompt": prompt, "max_tokens": 40}) as response:
        response.raise_for_status()
        async for text in response.aiter_text():
            yield text


async def events(client: httpx.AsyncClient, path: str) -> AsyncGenerator[tuple[str, str], None]:
    """Yield the id and the data of each event, across reconnects."""
    last = ""
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        try:
            async with client.stream("GET", path, headers=headers) as response:
                if response.status_code == 204:  # the stream had ended before
                    return
                response.raise_for_status()
                fields: dict[bytes, bytes] = {}
                rest = b""
                async for chunk in response.aiter_bytes():  # aiter_lines would also split at U+2028 within JSON
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        if line:
                            name, _, value = line.partition(b": ")
                            fields[name] = value
                        elif b"data" in fields:
                            last = fields[b"id"].decode()
                            if b"event" not in fields:  # named events are about the stream: gap, stop, end
                                yield last, fields[b"data"].decode()
                            if fields.get(b"event") == b"end":
                                return
                            fields = {}
        except httpx.TransportError as error:
            print(f"{type(error).__name__}; retrying in 1 s", file=sys.stderr)
        await asyncio.sleep(1)


async def main() -> None:
    """Run both examples."""
    async with httpx.AsyncClient(base_url=URL, timeout=TIMEOUT) as client:
        async for text in tokens(client, "Tell a story"):
            print(text, end="", flush=True)
        print()
        count = 0
        async with aclosing(events(client, "/stream/stock-ticker")) as prices:
            async for identity, data in prices:
                print(identity, data, sep="\t")
                count += 1
                if count == 20:
                    break


if __name__ == "__main__":
    asyncio.run(main())
