"""A download that resumes, and events line by line, with requests: python requests_client.py [URL]."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import requests

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

# Connect and read timeout in seconds; requests has no default for either, and would wait forever.
TIMEOUT = (10, 45)

BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def download(url: str, path: Path) -> None:
    """Download a file, and resume when the connection breaks; a file that has changed is downloaded again."""
    have, etag = 0, ""
    while True:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-", "If-Range": etag} if etag else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                response.raise_for_status()
                resumed = response.status_code == 206
                etag = response.headers["ETag"]
                size = int(response.headers["Content-Length"]) + (have if resumed else 0)
                with path.open("ab" if resumed else "wb") as file:
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
        except BROKEN as error:
            print(f"{type(error).__name__}; retrying in 1 s", file=sys.stderr)
            time.sleep(1)
        if (
            etag and (have := path.stat().st_size) == size
        ):  # not every version of urllib3 detects a body that is too short
            return


def events(url: str) -> Iterator[tuple[str, str]]:
    """Yield the id and the data of each event, across reconnects."""
    last = ""
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                if response.status_code == 204:  # the stream had ended before
                    return
                response.raise_for_status()
                fields: dict[bytes, bytes] = {}
                for line in response.iter_lines():  # bytes: text would also be split at U+2028 within JSON
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
        except BROKEN as error:
            print(f"{type(error).__name__}; retrying in 1 s", file=sys.stderr)
        time.sleep(1)


if __name__ == "__main__":
    target = Path("large-file.bin")
    download(f"{URL}/download/large-file", target)
    print(f"{target}: {target.stat().st_size} bytes")
    for identity, data in itertools.islice(events(f"{URL}/stream/stock-ticker"), 20):
        print(identity, data, sep="\t")
