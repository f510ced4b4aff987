"""The examples and the code of docs/clients.md work with a real server that dies in mid-stream."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from playwright.async_api import Browser

from tests.support.browsers import wait_for
from tests.support.connections import EventStream
from tests.support.fake_upstream import DONE, FINISH, MODEL, USED, Exchange, event, fake_upstream
from tests.support.servers import REPOSITORY, Running, free_port

Start = Callable[..., Running]

EXAMPLES = REPOSITORY / "examples"

TICKER, DOWNLOAD = "/stream/stock-ticker", "/download/large-file"

CONFIG = """
    [scenarios.ticker]
    interval = 0.05
    [scenarios.file]
    sample_mb = 3
    [scenarios.logs]
    enabled = false
    [scenarios.export]
    sample_rows = 1500
"""

STORY = ["Once ", "upon ", "a time\nthere was ", "a café."]


def tell_story(exchange: Exchange) -> None:
    exchange.respond(*map(event, STORY), FINISH, USED, DONE)


@pytest.fixture
def config() -> Iterator[str]:
    """Yield the configuration of a server whose model has one response for every prompt."""
    with fake_upstream(dict.fromkeys(("Tell a story", "Hello", "Python"), tell_story)) as upstream:
        yield f'{CONFIG}\n[scenarios.llm]\nurl = "{upstream.url}"\nmodel = "{MODEL}"\n'


class Relay:
    """A proxy that cuts the connection in the middle of responses.

    `after` maps a path to the byte of its responses at which that happens, once each. With `restart`, the server is
    killed then, and `restart` returns the next one, on the same port.
    """

    def __init__(self, server: Running, after: dict[str, int], restart: Callable[[], Running] | None = None) -> None:
        self.server = server
        self._restart = restart
        self._after = dict(after)
        self._passed = dict.fromkeys(after, 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def cuts_left(self) -> dict[str, int]:
        return self._after

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._relay, args=self._listener.accept()[:1], daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        path = [""]
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self.server.port)) as server:
            threading.Thread(target=self._upwards, args=(client, server, path), daemon=True).start()
            try:
                self._downwards(client, server, path)
            finally:
                client.shutdown(socket.SHUT_RDWR)  # closing it alone would wait for the other thread

    def _downwards(self, client: socket.socket, server: socket.socket, path: list[str]) -> None:
        while chunk := server.recv(65536):
            if path[0] in self._after:
                self._passed[path[0]] += len(chunk)
                if (over := self._passed[path[0]] - self._after[path[0]]) >= 0:
                    del self._after[path[0]]
                    client.sendall(chunk[: len(chunk) - over])
                    if self._restart is not None:
                        self.server.terminate(signal.SIGKILL)
                        self.server = self._restart()
                    return
            client.sendall(chunk)

    def _upwards(self, client: socket.socket, server: socket.socket, path: list[str]) -> None:
        with suppress(OSError):
            while chunk := client.recv(65536):
                if chunk.startswith(b"GET "):
                    path[0] = chunk.split()[1].partition(b"?")[0].decode()
                server.sendall(chunk)
            server.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(start: Start, config: str) -> Iterator[Callable[..., Relay]]:
    """A relay to its own server, which it kills."""
    opened: list[Relay] = []

    def opening(after: dict[str, int]) -> Relay:
        port = free_port()
        opened.append(Relay(start(config, port=port), after, lambda: start(config, port=port)))
        return opened[-1]

    yield opening
    for one in opened:
        one.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of the clients; the server has another."""
    folder = tmp_path / "client"
    folder.mkdir()
    return folder


def run(command: Sequence[str | Path], folder: Path) -> list[str]:
    """Run a program to its end; return the lines that it printed."""
    environ = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def check_events(server: Running, lines: Sequence[str]) -> None:
    """Compare lines of id and data with the log of the server: consecutive events, each once."""
    received = [tuple(line.split("\t")) for line in lines]
    epoch, _, first = received[0][0].partition("-")
    with EventStream(server, TICKER, f"{epoch}-{int(first) - 1}") as stream:
        assert received == [(event.id, event.data) for event in stream.take(len(received))]


def test_curl(relay: Callable[..., Relay], folder: Path) -> None:
    between = relay({DOWNLOAD: 1_500_000, TICKER: 1100})
    download, *prices, verified, task, one, two = run(["sh", EXAMPLES / "curl.sh", between.url], folder)
    assert between.cuts_left == {}
    assert download == "large-file.bin: 3000000 bytes"
    assert (folder / "large-file.bin").read_bytes() == between.server.get(DOWNLOAD)[2]
    assert len(prices) == 20
    check_events(between.server, prices)
    assert verified == "users.jsonl: verified"
    assert (folder / "users.jsonl").read_bytes() == between.server.get("/export/users/jsonl?limit=1000&end=true")[2]
    assert json.loads(task)["result"] == {"steps": 5}
    assert f"{one}\n{two}" == "".join(STORY)


def test_requests(relay: Callable[..., Relay], folder: Path) -> None:
    between = relay({DOWNLOAD: 1_500_000, TICKER: 1100})
    download, *prices = run([sys.executable, EXAMPLES / "requests_client.py", between.url], folder)
    assert between.cuts_left == {}
    assert download == "large-file.bin: 3000000 bytes"
    assert (folder / "large-file.bin").read_bytes() == between.server.get(DOWNLOAD)[2]
    assert len(prices) == 20
    check_events(between.server, prices)


def test_httpx(relay: Callable[..., Relay], folder: Path) -> None:
    between = relay({TICKER: 1100})
    one, two, *prices = run([sys.executable, EXAMPLES / "httpx_client.py", between.url], folder)
    assert between.cuts_left == {}
    assert f"{one}\n{two}" == "".join(STORY)
    assert len(prices) == 20
    check_events(between.server, prices)


def test_aiohttp(relay: Callable[..., Relay], folder: Path) -> None:
    between = relay({TICKER: 1100})
    total, *prices = run([sys.executable, EXAMPLES / "aiohttp_client.py", between.url], folder)
    assert between.cuts_left == {}
    rows = [json.loads(line) for line in between.server.get("/export/users/jsonl?limit=1000")[2].splitlines()]
    assert total == f"1000 users have {sum(row['balance'] or 0 for row in rows):.2f}"
    assert len(prices) == 20
    check_events(between.server, prices)


async def test_browser(start: Start, config: str, browser: Browser, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "browser", tmp_path / "plugins/browser", ignore=shutil.ignore_patterns("__pycache__"))
    port, pushed = free_port(), config.replace("interval = 0.05", 'source = "push"')
    server = await asyncio.to_thread(start, pushed, port=port)

    async def push(*prices: int) -> None:
        body = "\n".join(json.dumps({"symbol": "ACME", "price": price}) for price in prices).encode()
        headers = {"Content-Type": "application/jsonl"}
        status, _, _ = await asyncio.to_thread(server.get, TICKER, headers, method="POST", body=body)
        assert status == 202

    page = await browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    await page.goto(f"{server.url}/browser/")
    await wait_for(page, "document.getElementById('state').textContent == 'open'")
    await push(*range(10))
    await wait_for(page, "document.getElementById('prices').children.length == 10")
    await asyncio.to_thread(server.terminate, signal.SIGKILL)
    server = await asyncio.to_thread(start, pushed, port=port)
    await push(*range(10, 20))
    await wait_for(page, "document.getElementById('prices').children.length == 20")
    shown = await page.evaluate("[...document.getElementById('prices').children].map(line => line.textContent)")
    assert shown == [f"ACME {price}" for price in reversed(range(20))]

    await page.click("#chat button")
    await wait_for(page, "document.getElementById('response').textContent.endsWith('.')")
    assert await page.evaluate("document.getElementById('response').textContent") == "".join(STORY)

    await page.click("#start")
    await wait_for(page, "document.getElementById('result').textContent")
    assert await page.evaluate("document.getElementById('result').textContent") == '{"steps":20}'
    assert await page.evaluate("document.getElementById('bar').value") == 20
    assert complaints == []


# -- naive clients


NAIVE_CLIENTS = """
import asyncio
import sys

import httpx
import requests

url = sys.argv[1]

with requests.get(f"{url}/download/large-file", stream=True) as r, open("output.bin", "wb") as f:
    for chunk in r.iter_content(chunk_size=8192):
        f.write(chunk)

with requests.get(f"{url}/stream/stock-ticker", stream=True) as r:
    for number, line in zip(range(30), r.iter_lines()):
        if line.startswith(b"data: "):
            print(line[6:].decode())


async def stream_ai_response():
    async with httpx.AsyncClient() as client:
        async with client.stream("GET", f"{url}/ai/chat-stream?prompt=Python") as response:
            async for chunk in response.aiter_text():
                print(chunk, end="", flush=True)


asyncio.run(stream_ai_response())
"""


def test_naive_clients_work(start: Start, config: str, folder: Path) -> None:
    server = start(config)
    (folder / "naive.py").write_text(NAIVE_CLIENTS)
    lines = run([sys.executable, "naive.py", server.url], folder)
    assert (folder / "output.bin").read_bytes() == server.get(DOWNLOAD)[2]
    assert [sorted(json.loads(line)) for line in lines[:-2]] == [["change", "price", "symbol", "time"]] * 10
    assert "\n".join(lines[-2:]) == "".join(STORY)


# -- docs/clients.md

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (REPOSITORY / "docs/clients.md").read_text(), re.MULTILINE | re.DOTALL)

RUNNERS = {
    "sh": (["bash"], "sh"),
    "python": ([sys.executable], "py"),
    "js": (["node"], "mjs"),
    "java": (["java"], "java"),
}
"""The command that runs a block, and the extension of its file."""

NEEDS = {
    "js": ["node", "-e", "process.exit(typeof fetch === 'function' ? 0 : 1)"],
    "java": ["java", "--describe-module", "jdk.compiler"],  # runs a program from its source
}
"""Commands that succeed where programs of a language can be run; other languages only need their command."""


@cache
def can_run(language: str) -> bool:
    command, _ = RUNNERS[language]
    if not shutil.which(command[0]):
        return False
    probe = NEEDS.get(language)
    return probe is None or subprocess.run(probe, capture_output=True, timeout=20, check=False).returncode == 0


def programs(folder: Path, part: str) -> Iterator[tuple[str, list[str]]]:
    """Return the blocks with `part` as programs: a name, and a command whose last argument is its file."""
    for number, (language, code) in enumerate(BLOCKS):
        if language in RUNNERS and part in code and can_run(language):
            command, suffix = RUNNERS[language]
            path = folder / str(number) / f"block.{suffix}"
            path.parent.mkdir()
            path.write_text(code)
            yield f"{language} {number}", [*command, str(path)]


def point_at(command: list[str], url: str) -> Path:
    """Make a block request `url`; return the folder to run it in."""
    path = Path(command[-1])
    path.write_text(path.read_text().replace("http://127.0.0.1:8000", url))
    return path.parent


def test_the_page_has_two_blocks_of_each_language_that_is_run() -> None:
    count = Counter(language for language, _ in BLOCKS)
    assert count == {
        "sh": 2,
        "python": 6,
        "javascript": 2,
        "js": 2,
        "java": 2,
        "go": 1,
        "csharp": 1,
        "rust": 1,
        "ruby": 1,
    }


def test_every_block_that_follows_events_misses_none(start: Start, config: str, folder: Path) -> None:
    server = start(config)
    running = []
    for name, command in programs(folder, TICKER):
        between = Relay(server, {TICKER: 1100})
        where = point_at(command, between.url)
        process = subprocess.Popen(
            command,
            cwd=where,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # so that the curl of a shell can be ended with it
        )
        running.append((name, between, process))
    try:
        for name, between, process in running:
            assert process.stdout is not None
            lines = [process.stdout.readline().rstrip("\n") for _ in range(20)]
            assert between.cuts_left == {}, name
            check_events(server, lines)
    finally:
        for _, between, process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            between.close()


def test_every_block_that_reads_a_body_reads_all_of_it(start: Start, config: str, folder: Path) -> None:
    server = start(config)
    ran = 0
    for name, command in programs(folder, "/ai/chat-stream"):
        lines = run(command, point_at(command, server.url))
        assert "\n".join(lines) == "".join(STORY), name
        ran += 1
    assert ran >= 4


async def test_the_blocks_of_the_page_for_a_browser_run_in_one(start: Start, config: str, browser: Browser) -> None:
    server = await asyncio.to_thread(start, config)
    page = await browser.new_page()
    logged: list[str] = []
    page.on("console", lambda message: logged.append(message.text) if message.type == "log" else None)
    await page.goto(f"{server.url}/", wait_until="domcontentloaded")
    prices, words = (code for language, code in BLOCKS if language == "javascript")
    await page.evaluate(f"async () => {{ {words} }}")
    await page.evaluate(f"() => {{ {prices} }}")
    async with asyncio.timeout(20):
        while len(logged) < 12:
            await asyncio.sleep(0.01)
    assert logged[0] == "".join(STORY)
    await asyncio.to_thread(check_events, server, logged[1:12])
