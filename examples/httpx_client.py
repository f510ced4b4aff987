"""Words of a language model as they are made, and events with reconnects, with httpx: python httpx_client.py [URL]."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

# Five seconds without a byte are an error to httpx. An event stream says something every 15 s at the latest.
TIMEOUT = httpx.Timeout(10, read=45)


async def tokens(client: httpx.AsyncClient, prompt: str) -> AsyncIterator[str]:
    """Yield pieces of an answer; a failure raises, here or in the middle, so that a part is never taken for it all."""
    async with client.stream("GET", "/ai/chat-stream", params={"prompt": prompt, "max_tokens": 40}) as response:
        response.raise_for_status()
        async for text in response.aiter_text():
            yield text


async def events(client: httpx.AsyncClient, path: str) -> AsyncIterator[tuple[str, str]]:
    """Yield the id and the data of each event, from one connection to the next."""
    last = ""
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        try:
            async with client.stream("GET", path, headers=headers) as response:
                if response.status_code == 204:  # it was over already
                    return
                response.raise_for_status()
                fields: dict[bytes, bytes] = {}
                rest = b""
                async for piece in response.aiter_bytes():  # aiter_lines would also break lines at U+2028 within JSON
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        if line:
                            name, _, value = line.partition(b": ")
                            fields[name] = value
                        elif b"data" in fields:
                            last = fields[b"id"].decode()
                            if b"event" not in fields:  # what has a name is about the stream: gap, stop, end
                                yield last, fields[b"data"].decode()
                            if fields.get(b"event") == b"end":
                                return
                            fields = {}
        except httpx.TransportError as error:
            print(f"{type(error).__name__}; again in 1 s", file=sys.stderr)
        await asyncio.sleep(1)


async def main() -> None:
    """Show both."""
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
