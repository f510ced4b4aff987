"""The lab page in a real browser: it runs every route, and reports correctly what a cut has lost."""

import asyncio
import hashlib
import json
import re
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Locator, Page, Response, expect

from tests.support.browsers import SharedBrowser
from tests.support.connections import EventStream
from tests.support.fake_upstream import DONE, FINISH, USED, Exchange, FakeUpstream, event, fake_upstream
from tests.support.servers import REPOSITORY, Running, free_port, starting_in

expect.set_options(timeout=20_000)  # for busy machines

LOADED_PLUGINS: tuple[str, ...] = ()  # besides those with a table; `shared_server` loads all

Start = Callable[..., Running]
OpenLab = Callable[..., Awaitable["Lab"]]

THIRD_PARTY = '''
    """A third-party plugin: data for every view of the page, and incorrect streams."""

    import asyncio
    import json
    from typing import Literal

    from aiohttp import web
    from pydantic import BaseModel, Field
    from streamlab import Scenario, endpoint, hookimpl, open_event_stream, open_stream


    def event(data, name="", identity=""):
        lines = [f"id: {identity}"] * bool(identity) + [f"event: {name}"] * bool(name) + [f"data: {json.dumps(data)}"]
        return ("\\n".join(lines) + "\\n\\n").encode()


    class RoomQuery(BaseModel):
        count: int = Field(ge=1, le=9000, description="How many, as `3`.", examples=[3])
        kind: Literal["plain", "fancy"] = "plain"
        loud: bool = False
        words: list[str] = Field([], max_length=4)


    class RoomListQuery(BaseModel):
        floor: Literal["ground", "upper"] | None = None
        colours: list[Literal["red", "green", "blue"]] = []
        sizes: list[Literal["small", "large"]] = Field(examples=[["large"]])
        words: list[str] = Field(examples=[["tea", "room"]])
        tags: list[str] = Field([], examples=[["quiet", "bright"]])


    class Order(BaseModel):
        """An order."""

        item: str = Field(max_length=20)

        model_config = {"json_schema_extra": {"examples": [{"item": "tea"}]}}


    class RoomPath(BaseModel):
        room: int = Field(ge=1, le=9, description="Which room.", examples=[4])


    class Task(BaseModel):
        state: Literal["running", "done", "failed"] = "running"


    class FileQuery(BaseModel):
        astray: str = Field("", max_length=3)


    class ThirdParty(Scenario):
        """Things <b>unknown</b> to the page."""

        _cuts: int = 0

        async def _send(self, request, *events):
            async with open_event_stream(request) as response:
                for one in events:
                    await response.write(one)
            return response

        @endpoint("GET", "/third-party/rooms/{room}", path_model=RoomPath, query=RoomQuery, sends="application/json")
        async def room(self, request, path, query):
            """Return the request & <its> values."""
            return web.json_response({"room": path.room, "count": query.count, "kind": query.kind,
                                      "loud": query.loud, "words": query.words})

        @endpoint("GET", "/third-party/rooms", query=RoomListQuery, sends="application/json")
        async def rooms(self, request, query):
            rooms = [{"floor": query.floor, "room": room, "colours": query.colours} for room in (2, 9)]
            return web.json_response({"rooms": rooms, "next": None})

        @endpoint("DELETE", "/third-party/rooms/{room}", path_model=RoomPath, sends="application/json")
        async def close(self, request, path):
            return web.json_response({"closed": path.room})

        @endpoint("POST", "/third-party/orders", body=Order, sends="application/json", responses={201: "Stored."})
        async def order(self, request, body):
            return web.json_response({"stored": body.item}, status=201, headers={"Location": "/third-party/rooms/7"})

        @endpoint("GET", "/third-party/task", query=Task, sends="text/event-stream")
        async def task(self, request, query):
            def step(done):
                return event({"state": "running", "done": done, "total": 2000, "unit": "rows", "rate": 512.5,
                              "eta_seconds": 12.0, "message": "copying"}, "progress", f"a:9-{done}")

            steps = [step(0), event({"message": "half <done>"}, "message", "a:9-1"), step(1000)]
            if query.state == "done":
                steps += [step(2000), event({"state": "done", "result": {"rows": 2000}, "error": None}, "end")]
            if query.state == "failed":
                steps += [event({"state": "failed", "result": None, "error": "disk <full>"}, "end")]
            return await self._send(request, *steps)

        @endpoint("GET", "/third-party/log", sends="text/event-stream")
        async def log(self, request):
            return await self._send(request, event({"level": "info", "message": "up"}), event({}, "rotated"))

        @endpoint("GET", "/third-party/comparison", sends="text/event-stream")
        async def comparison(self, request):
            def measured(mode, ttfb, memory):
                return event({"mode": mode, "rows": 100000, "bytes": 5000000, "ttfb_ms": ttfb, "total_ms": 900.0,
                              "peak_rss_mb": memory, "cpu_ms": 700.0, "mb_per_s": 5.5}, "measurement")

            return await self._send(request, measured("buffered", 800.0, 400.0), measured("streamed", 8.0, 40.0),
                                    event({"verdict": "Streamed: a hundredth of the wait."}, "end"))

        @endpoint("GET", "/third-party/burst", query=RoomQuery, sends="text/event-stream")
        async def burst(self, request, query):
            """Send prices, about 900 per second."""
            async with open_event_stream(request) as response:
                clock = asyncio.get_running_loop()
                started = clock.time()
                for first in range(0, query.count, 9):
                    prices = [event({"symbol": "ABC"[n % 3], "price": 100 + n % 7}, identity=f"1-{n + 1}")
                              for n in range(first, min(first + 9, query.count))]
                    await response.write(b"".join(prices))
                    await asyncio.sleep(max(0, started + first / 900 - clock.time()))
            return response

        @endpoint("GET", "/third-party/forgets/{room}", path_model=RoomPath, sends="text/event-stream")
        async def forgets(self, request, path):
            """Continue at a wrong offset: `room` events further than the last."""
            last = int(request.headers.get("Last-Event-ID", "1-0").partition("-")[2])
            first = last + path.room - 3 if last else 1
            async with open_event_stream(request) as response:
                for n in range(first, first + 6):
                    await response.write(event({"n": n}, identity=f"1-{n}"))
                await asyncio.sleep(3600)
            return response

        @endpoint("GET", "/third-party/file", query=FileQuery, sends="application/octet-stream",
                  responses={206: "A part."})
        async def file(self, request, query):
            """Send a file whose parts do not match."""
            head = {"ETag": '"same"', "Accept-Ranges": "bytes", "Repr-Digest": "sha-256=:%s:" % ("A" * 43 + "=")}
            if "Range" in request.headers:
                start = int(request.headers["Range"].partition("=")[2].rstrip("-")) + ("astray" in request.query)
                head["Content-Range"] = f"bytes {start}-199999/200000"
                return web.Response(status=206, body=b"x" * (200000 - start), headers=head)
            async with open_stream(request, "application/octet-stream", length=200000, headers=head) as response:
                await response.write(b"y" * 100000)
                await asyncio.sleep(3600)
            return response


    @hookimpl
    def register_scenarios():
        return [ThirdParty]
'''

BROKEN = """
    from streamlab import Scenario, endpoint, hookimpl
    import no_such_module_of_the_lab


    class Broken(Scenario):
        @endpoint("GET", "/broken/stream")
        async def stream(self, request): ...
"""

LINES = "2026-01-01T00:00:00Z INFO up\n2026-01-01T00:00:01Z ERROR <b>down</b>\n2026-01-01T00:00:02Z WARNING slow\n"
QUICK = "[scenarios.ticker]\ninterval = 0.05\n[scenarios.file]\nsample_mb = 3\n[scenarios.export]\nsample_rows = 2000\n"
LOG = '[scenarios.logs]\ndemo = false\n[scenarios.logs.sources.app]\npath = "app.log"\n'


CELLS = "rows => rows.map(row => [...row.querySelectorAll('th, td')].map(cell => cell.textContent))"


@dataclass
class Lab:
    """The page, with its requests and the messages of the browser."""

    page: Page
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Locator:
        """Return an element by its id: `lab.run`."""
        return self.page.locator(f"#{name}")

    async def select(self, route: str, **values: str) -> None:
        """Select a route, and fill in its form."""
        await self.page.locator("#list").get_by_role("link", name=route, exact=True).click()
        await expect(self.route).to_have_text(route)
        for name, value in values.items():
            control = self.page.locator(f"#field-{name}")
            tag = await control.evaluate("control => control.tagName")
            if tag == "SELECT":
                await control.select_option(value)
            elif tag == "DIV":
                for one in await control.get_by_role("checkbox").all():
                    await one.set_checked(await one.get_attribute("value") in value.split("\n"))
            else:
                await control.fill(value)

    async def cells(self, row: str) -> list[list[str]]:
        found: list[list[str]] = await self.page.locator(f".panel:not([hidden]) {row}").evaluate_all(CELLS)
        return found

    async def bytes_shown(self) -> dict[int, bytes]:
        """Return the rows of the view of binary data, by their offsets."""
        rows = (await self.page.locator(".panel:not([hidden]) pre").inner_text()).split("\n")
        return {int(row[:8], 16): bytes.fromhex(row[10:57].strip()) for row in rows if row != "…"}

    async def text(self) -> str:
        """Return the complete text of the tab Bytes."""
        await self.page.get_by_role("tab", name="Bytes").click()
        return await self.page.locator(".panel:not([hidden]) pre").inner_text()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def profiles() -> AsyncIterator[dict[Browser, BrowserContext]]:
    opened: dict[Browser, BrowserContext] = {}
    yield opened
    for profile in opened.values():
        await profile.close()


@pytest_asyncio.fixture(loop_scope="session")
async def profile(
    shared_browser: SharedBrowser, shared_server: Running, profiles: dict[Browser, BrowserContext]
) -> BrowserContext:
    """Return the profile whose cache and process the pages of this module share; each page has its own session."""
    browser = await shared_browser.running()
    if browser not in profiles:
        profiles[browser] = await browser.new_context()
        tab = await profiles[browser].new_page()  # it stays open, and with it the process
        await tab.goto(f"{shared_server.url}/assets/icon.svg")
    return profiles[browser]


@pytest_asyncio.fixture(loop_scope="session")
async def open_lab(profile: BrowserContext, browser: Browser) -> AsyncIterator[OpenLab]:
    """Open the lab of a server in a new tab; with options for a profile, in one of its own.

    At the end its policy must have blocked nothing, and no other server got a request. The profile must be open when
    the test gets the browser, which closes what has been opened since.
    """
    labs: list[tuple[Lab, str]] = []

    async def opening(server: Running, address: str = "/", **options: Any) -> Lab:
        page = await (browser.new_page(**options) if options else profile.new_page())
        lab = Lab(page)
        labs.append((lab, server.url))
        page.on("request", lambda request: lab.requests.append(request.url))
        page.on("console", lambda message: lab.messages.append(message.text))
        page.on("pageerror", lambda error: lab.messages.append(str(error)))
        await page.goto(server.url + address)
        await expect(page.locator("#bench")).not_to_have_attribute("aria-busy", "true")
        return lab

    yield opening
    for lab, _ in labs:
        await lab.page.close()
    for lab, url in labs:
        assert [request for request in lab.requests if not request.startswith((url + "/", "data:"))] == []
        assert lab.messages == []


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with the built-in plugins and a third-party one, for tests that do not change it."""
    base = tmp_path_factory.mktemp("lab")
    (base / "app.log").write_text(LINES)
    with starting_in(base) as start:
        yield start(QUICK + LOG, third_party=THIRD_PARTY)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, FakeUpstream]]:
    """A server whose model sends three words, or only one and then stalls if the prompt is `stall`."""
    base = tmp_path_factory.mktemp("llm")
    with fake_upstream({"default": send_words, "stall": stall}) as upstream, starting_in(base, ()) as start:
        yield start(f'[scenarios.llm]\nurl = "{upstream.url}"\nmodel = "fake-1"\n'), upstream


def send_words(exchange: Exchange) -> None:
    exchange.respond(event("Strea"), event("ming"), event(" <b>is</b> fun"), FINISH, USED, DONE)


def stall(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send_events(event("one"))
    exchange.wait_until_closed()


def offsets(text: str) -> list[int]:
    return [int(offset) for offset in re.findall(r"^id: .*?-(\d+)$", text, re.MULTILINE)]


# -- built-in plugins


async def test_default_route_runs_and_shows_prices(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await expect(lab.route).to_have_text("GET /stream/stock-ticker")
    await lab.run.click()
    await expect(lab.state).to_have_text("Running.")
    await expect(lab.page.locator(".legend tbody tr")).to_have_count(5)
    await expect(lab.status).to_have_text("200")
    await expect(lab.streams).to_have_text("1")
    await expect(lab.memory).to_have_text(re.compile(r"^\d+\.\d MB$"))
    await lab.stop.click()
    await expect(lab.state).to_have_text("Stopped.")
    await expect(lab.streams).to_have_text("0")


async def test_ticker_shows_prices(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /stream/stock-ticker", symbols="AAPL\nMSFT", limit="6")
    await lab.run.click()
    await expect(lab.state).to_have_text("Done: the response is complete.")
    await expect(lab.count).to_have_text("6")
    assert [row[0] for row in await lab.cells(".legend tbody tr")] == ["AAPL", "MSFT"]
    text = await lab.text()
    assert await lab.bytes.text_content() == f"{len(text.encode())} B"
    prices = [json.loads(line) for line in re.findall(r"^data: (.*)$", text, re.MULTILINE)]
    assert [price["symbol"] for price in prices] == ["AAPL", "MSFT"] * 3
    await lab.page.get_by_role("tab", name="Prices").click()
    shown = [row[1] for row in await lab.cells(".legend tbody tr")]
    assert shown == [f"{price['price']:.2f}" for price in prices[-2:]]


async def test_logs_have_levels_and_a_filter(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /stream/live-logs", source="app", tail="3", limit="3")
    await lab.run.click()
    await expect(lab.page.locator(".line")).to_have_text(
        [
            "2026-01-01T00:00:00Z INFO up",
            "2026-01-01T00:00:01Z ERROR <b>down</b>",
            "2026-01-01T00:00:02Z WARNING slow",
        ]
    )
    await expect(lab.page.locator(".line b")).to_have_text(["INFO", "ERROR", "WARNING"])
    await expect(lab.page.locator(".level-error")).to_have_count(1)
    await lab.page.get_by_label("Filter").fill("DOWN")
    await expect(lab.page.locator(".line")).to_have_text(["2026-01-01T00:00:01Z ERROR <b>down</b>"])
    await expect(lab.retained).to_have_text("1 of the last 3 lines contain the text.")
    await lab.page.locator(".lines").focus()
    await expect(lab.page.get_by_role("group", name="Lines")).to_be_focused()  # and so the keyboard scrolls them
    await lab.select("GET /third-party/log")  # whose lines do not have the level
    await lab.run.click()
    await expect(lab.page.locator(".line")).to_have_text(["INFO     up", "— rotated —"])


async def test_export_is_a_table_in_every_format(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    server = lab.page.url.rstrip("/")
    await lab.select("GET /export/{name}/{format}", name="data", columns="id,name", limit="300")
    await expect(lab.curl).to_have_text(f"curl -OJ '{server}/export/data/csv?columns=id%2Cname&limit=300'")
    tables = []
    for form in ("csv", "jsonl"):
        await lab.page.locator("#field-format").select_option(form)
        await lab.run.click()
        await expect(lab.state).to_have_text("Done: the response is complete.")
        await expect(lab.retained).to_have_text("The last 200 of 300.")
        tables.append(await lab.cells("tr"))
    assert [row[0] for row in tables[0]] == ["id", *map(str, range(101, 301))]
    assert tables[0] == tables[1]
    assert any('"' in row[1] for row in tables[0])  # quotes, which CSV writes twice
    await lab.page.locator("#field-format").select_option("json")
    await lab.run.click()
    await expect(lab.page.get_by_role("tab", selected=True)).to_have_text("Table")
    assert await lab.cells("tr") == tables[0]
    await lab.page.get_by_role("tab", name="JSON").click()
    name = json.dumps(tables[0][-1][1], ensure_ascii=False)
    await expect(lab.page.locator(".panel:not([hidden]) pre")).to_contain_text(f'"name": {name}')
    await lab.select("GET /stream/database-results", limit="3")
    await lab.page.get_by_label("Accept").select_option("text/event-stream")
    await lab.run.click()
    await expect(lab.page.get_by_role("tab", name="Table")).to_be_visible()
    await expect(lab.page.locator(".panel:not([hidden]) tbody tr")).to_have_count(3)
    await expect(lab.curl).to_have_text(
        f"curl -N -H 'Accept: text/event-stream' '{server}/stream/database-results?limit=3'"
    )


async def test_binary_data_shows_its_size_beginning_and_end(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /download/large-file")
    await lab.page.get_by_label("Read at").select_option("full speed")
    await lab.run.click()
    await expect(lab.state).to_have_text("Done: the response is complete.")
    content = (shared_server.base / "var/files/large-file.bin").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    await expect(lab.verdict).to_have_text(
        f"Nothing was lost: 3,000,000 bytes in one part, and their SHA-256 {digest[:8]}…{digest[-8:]} "
        "matches the server's."
    )
    shown = await lab.bytes_shown()
    assert len(shown) == 32
    assert all(content[at : at + 16] == found for at, found in shown.items())
    assert max(shown) == 3_000_000 - 16
    await expect(lab.retained).to_have_text(
        "3.00 MB (3,000,000 bytes): the first 256 and the last; those between were dropped."
    )


async def test_model_output_is_shown_as_text(llm: tuple[Running, FakeUpstream], open_lab: OpenLab) -> None:
    lab = await open_lab(llm[0])
    for route, tokens in [
        ("GET /ai/chat-stream", ""),
        ("POST /ai/chat-stream", ""),
        ("GET /ai/chat-stream-sse", "3 tokens"),
        ("POST /v1/chat/completions", "3 tokens"),
    ]:
        await lab.select(route)
        await lab.run.click()
        await expect(lab.page.get_by_role("tab", selected=True)).to_have_text("Text")
        await expect(lab.page.locator(".flow pre")).to_have_text("Streaming <b>is</b> fun")
        await expect(lab.state).to_have_text("Done: the response is complete.")
        await expect(lab.retained).to_contain_text(tokens)


# -- cut and resume


async def test_task_that_was_cut_resumes_as_the_same_task(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /process/long-task", kind="rehearsal", steps="60")
    await lab.page.locator("summary", has_text="More parameters").click()
    await lab.page.locator("#more").fill("delay=0.05")
    await lab.run.click()
    panel = lab.page.locator(".panel.progress")
    await expect(panel.locator(".headline")).to_have_text(re.compile(r"^running · [1-9]\d? %$"))
    await lab.cut.click()
    await expect(lab.state).to_have_text("Cut.")
    await lab.resume.click()
    await expect(lab.verdict).to_have_attribute("data-mark", "good")
    await expect(lab.state).to_have_text("Done: the response is complete.")
    await expect(panel.locator(".headline")).to_have_text("done · 100 %")
    await expect(panel.locator("li")).to_have_text(["rehearsing"])
    text = await lab.text()
    assert offsets(text) == list(range(1, len(offsets(text)) + 1))
    listed = json.loads((await asyncio.to_thread(shared_server.get, "/process/tasks"))[2])["tasks"]
    assert [task["state"] for task in listed] == ["done"]
    await lab.select("GET /process/tasks")
    await lab.run.click()
    task = lab.page.locator(".panel:not([hidden]) tbody tr")
    await expect(task.locator("td").nth(3)).to_have_text("done")
    await task.get_by_role("link", name=listed[0]["id"]).click()
    await expect(lab.route).to_have_text("GET /process/tasks/{id}")
    await lab.run.click()
    await expect(panel.locator(".headline")).to_have_text("done · 100 %")


async def test_comparison_shows_measurements_and_verdict(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /demo/comparison/report", rows="1000", repeats="1")
    await lab.run.click()
    await expect(lab.state).to_have_text("Done: the response is complete.", timeout=40_000)
    panel = lab.page.locator(".panel.comparison")
    await expect(panel.locator("caption")).to_have_count(5)
    await expect(panel.locator(".headline")).to_have_text(re.compile(r"rows.*\.$"))
    await lab.page.locator("#fields").get_by_label("Accept").select_option("text/plain")
    await lab.run.click()
    await expect(lab.state).to_have_text("Done: the response is complete.", timeout=40_000)
    await expect(lab.page.locator(".panel.flow.columns pre")).to_contain_text("streamed")


async def test_event_stream_resumes_without_loss_after_a_cut(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.run.click()
    await expect(lab.count).to_have_text(re.compile(r"\d{2}"))
    await lab.cut.click()
    await expect(lab.state).to_have_text("Cut.")
    await expect(lab.streams).to_have_text("0")
    offer = await lab.verdict.text_content()
    (last,) = re.findall(r"^Resume requests the rest \(Last-Event-ID: (\d+-\d+)\)\.$", offer or "")

    def others() -> list[str]:
        with EventStream(shared_server, "/stream/stock-ticker?limit=20", after=last) as other:
            return [received.id for received in other.take(20)]

    meanwhile = await asyncio.to_thread(others)  # published while the page was disconnected
    before, after = (int(identity.partition("-")[2]) for identity in (last, meanwhile[-1]))
    await expect(lab.resume).to_be_focused()
    await lab.page.keyboard.press("Enter")
    await expect(lab.verdict).to_have_attribute("data-mark", "good")
    await expect(lab.verdict).to_contain_text(f"offset {before} was followed by {before + 1},")
    await lab.page.get_by_role("tab", name="Events").click()
    await expect(lab.page.get_by_role("cell", name=meanwhile[-1], exact=True)).to_be_visible()
    await lab.stop.click()
    received = offsets(await lab.text())
    assert received == list(range(received[0], received[-1] + 1))
    assert received[0] < before < after <= received[-1]
    verdict = await lab.verdict.text_content()
    assert f"all {len(received):,} events from {received[0]} to {received[-1]} arrived once, in order." in (
        verdict or ""
    )
    await expect(lab.announcement).to_have_text(re.compile("^Nothing was lost"))


async def test_stream_of_two_tabs_is_followed_and_resumes_after_a_cut(
    shared_server: Running, open_lab: OpenLab
) -> None:
    follower = await open_lab(shared_server, "/lab#PUT/v1/stream/{path}")
    await follower.page.locator("#field-path").fill("team/board")
    await follower.page.keyboard.press("Control+Enter")
    await follower.page.get_by_role("button", name="Open ").click()
    await expect(follower.route).to_have_text("GET /v1/stream/{path}")
    await follower.page.keyboard.press("Enter")
    await expect(follower.state).to_have_text("Running.")

    address = await follower.page.locator("#methods").get_by_role("link", name="POST").get_attribute("href")
    first = await open_lab(shared_server, f"/lab{address}")
    second = await open_lab(shared_server, f"/lab{address}", viewport={"width": 390, "height": 844})

    async def append(tab: Lab, text: str) -> None:
        await tab.page.locator("#body").fill(json.dumps({"text": text}))
        await tab.run.click()
        await expect(tab.page.locator("#status")).to_have_text("204")
        await expect(tab.state).to_have_text("Done: the response is complete.")

    cells = follower.page.locator(".panel:not([hidden]) td")
    await append(first, "one")
    await append(second, "two")
    await expect(cells).to_have_text(["one", "two"])
    await follower.cut.click()
    await expect(follower.state).to_have_text("Cut.")
    await append(first, "three")
    await append(second, "four")
    await follower.resume.click()
    await expect(follower.verdict).to_contain_text("Nothing was lost: offset 2 was followed by 3, ")
    await expect(cells).to_have_text(["one", "two", "three", "four"])
    await follower.stop.click()


async def test_download_resumes_after_a_cut_and_matches_the_file(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /download/large-file")
    await lab.page.get_by_label("Read at").select_option("1 MB/s")
    await lab.run.click()
    await expect(lab.bytes).to_have_text(re.compile("kB$"))
    async with lab.page.expect_request(f"{shared_server.url}/download/large-file") as request:
        await lab.cut.click()
        await expect(lab.verdict).to_contain_text("Resume requests the rest (Range: bytes=")
        await lab.page.get_by_label("Read at").select_option("full speed")
        await lab.resume.click()
    headers = (await request.value).headers
    (start,) = re.findall(r"^bytes=(\d+)-$", headers["range"])
    assert 0 < int(start) < 3_000_000
    assert headers["if-range"] == shared_server.get("/download/large-file", method="HEAD")[1]["etag"]
    content = (shared_server.base / "var/files/large-file.bin").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    await expect(lab.verdict).to_have_text(
        f"Nothing was lost: 3,000,000 bytes in 2 parts, and their SHA-256 {digest[:8]}…{digest[-8:]} "
        "matches the server's."
    )
    shown = await lab.bytes_shown()
    assert max(shown) == 3_000_000 - 16
    assert all(content[at : at + 16] == found for at, found in shown.items())
    await expect(lab.retained).to_contain_text("3.00 MB (3,000,000 bytes)")
    await expect(lab.status).to_have_text("206")


async def test_changed_file_is_downloaded_from_its_beginning(start: Start, open_lab: OpenLab) -> None:
    server = await asyncio.to_thread(start, QUICK)
    lab = await open_lab(server)
    await lab.select("GET /download/large-file")
    await lab.page.get_by_label("Read at").select_option("1 MB/s")
    await lab.run.click()
    await expect(lab.bytes).to_have_text(re.compile("kB$"))
    await lab.cut.click()
    await expect(lab.resume).to_be_enabled()
    (server.base / "var/files/large-file.bin").write_bytes(b"new" * 200_000)
    await lab.page.get_by_label("Read at").select_option("100 kB/s")
    await lab.resume.click()
    await expect(lab.verdict).to_have_text("The file has changed: the server sends the new one from its first byte.")
    await lab.page.get_by_label("Read at").select_option("full speed")
    await expect(lab.verdict).to_contain_text("Nothing was lost: 600,000 bytes in one part")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_page_reconnects_after_the_server_restarts(start: Start, open_lab: OpenLab, how: int) -> None:
    port = free_port()
    server = await asyncio.to_thread(start, QUICK, port=port)
    lab = await open_lab(server)
    await lab.run.click()
    await expect(lab.count).to_have_text(re.compile(r"\d{2}"))
    await asyncio.to_thread(server.terminate, how)
    await expect(lab.state).to_have_text(re.compile(r"Reconnecting in \d+\.\d s \(try \d+\)\.$"))
    await asyncio.to_thread(start, QUICK, port=port)
    await expect(lab.verdict).to_have_attribute("data-mark", "good", timeout=20_000)
    await expect(lab.state).to_have_text("Running.")
    await lab.stop.click()
    received = offsets(await lab.text())
    assert received == list(range(received[0], received[-1] + 1))
    lab.messages.clear()  # the browser logs failed requests


async def test_verdict_reports_lost_and_repeated_events(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    for distance, mark, verdict in [
        (
            "4",
            "good",
            "Nothing was lost: offset 6 was followed by 7, and all 12 events from 1 to 12 arrived once, in order.",
        ),
        ("9", "bad", "5 events missing: offset 6 was followed by 12."),
        ("3", "bad", "1 event arrived twice."),
        ("2", "bad", "2 events arrived twice."),
    ]:
        await lab.select("GET /third-party/forgets/{room}", room=distance)
        await lab.run.click()
        await expect(lab.count).to_have_text("6")
        await lab.cut.click()
        await lab.resume.click()
        await expect(lab.count).to_have_text("12")
        await expect(lab.verdict).to_have_text(verdict)
        await expect(lab.verdict).to_have_attribute("data-mark", mark)


async def test_verdict_on_a_filtered_view_does_not_exclude_losses(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /stream/stock-ticker", symbols="AAPL")
    await lab.run.click()
    await expect(lab.count).to_have_text(re.compile(r"^\d{2}$"))
    await lab.cut.click()
    await lab.resume.click()
    await expect(lab.verdict).to_have_text(
        re.compile(
            r"^No duplicates, and no gap reported: offset \d+ was followed by \d+\. Losses cannot be excluded, since "
            r"this view filters events: offsets jump without a cut, too\.$"
        )
    )
    await expect(lab.verdict).to_have_attribute("data-mark", "")


async def test_verdict_reports_parts_that_do_not_match(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /third-party/file")
    await lab.run.click()
    await expect(lab.bytes).to_have_text("100.0 kB")
    await lab.cut.click()
    await lab.resume.click()
    mixed = hashlib.sha256(b"y" * 100_000 + b"x" * 100_000).hexdigest()
    await expect(lab.verdict).to_have_text(
        f"The SHA-256 of the 2 parts, {mixed[:8]}…{mixed[-8:]}, differs from the server's."
    )
    await expect(lab.verdict).to_have_attribute("data-mark", "bad")


async def test_resumption_at_a_wrong_byte_fails(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /third-party/file", astray="yes")
    await lab.run.click()
    await expect(lab.bytes).to_have_text("100.0 kB")
    await lab.cut.click()
    await lab.resume.click()
    await expect(lab.state).to_have_text("The server resumed at a different byte than requested.")
    await expect(lab.verdict).to_have_text("Requested byte 100,000, the server resumed at 100,001.")
    await expect(lab.verdict).to_have_attribute("data-mark", "bad")
    await expect(lab.bytes).to_have_text("100.0 kB")


async def test_response_that_cannot_be_resumed_is_reported(
    llm: tuple[Running, FakeUpstream], open_lab: OpenLab
) -> None:
    server, upstream = llm
    lab = await open_lab(server)
    await lab.select("GET /ai/chat-stream", prompt="stall")
    await lab.run.click()
    await expect(lab.page.locator(".flow pre")).to_have_text("one")
    await lab.cut.click()
    await expect(lab.verdict).to_have_text(
        "This response cannot be resumed: it has neither event ids nor ranges. The data is incomplete."
    )
    await expect(lab.resume).to_be_disabled()
    assert await asyncio.to_thread(upstream.exchanges[-1].closed.wait, 10)  # the cut has reached the source


# -- a third-party plugin


async def test_form_follows_the_models_of_the_plugin(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /third-party/rooms/{room}")
    await expect(lab.summary).to_have_text("Return the request & <its> values.")
    fields = lab.page.locator("#fields > .grid .field")
    assert [re.sub(r"\s+", " ", text) for text in await fields.all_text_contents()] == [
        "room (required)Which room. Integer, 1 to 9.",
        "count (required)How many, as 3. Integer, 1 to 9,000.",
        "kindplain (default)plainfancy",
        "loudfalse (default)true",
        "wordsOne per line.",
    ]
    assert [await control.input_value() for control in await fields.locator("input, select, textarea").all()] == [
        "4", "3", "", "", "",
    ]  # fmt: skip
    await expect(lab.curl).to_have_text(f"curl -N '{shared_server.url}/third-party/rooms/4?count=3'")
    await lab.select("GET /third-party/rooms/{room}", count="5", kind="fancy", loud="true", words="a b\nc&d")
    await expect(lab.curl).to_have_text(
        f"curl -N '{shared_server.url}/third-party/rooms/4?count=5&kind=fancy&loud=true&words=a+b&words=c%26d'"
    )
    await lab.run.click()
    await expect(lab.page.locator(".panel:not([hidden]) pre")).to_have_text(
        json.dumps({"room": 4, "count": 5, "kind": "fancy", "loud": True, "words": ["a b", "c&d"]}, indent=2)
    )


async def test_curl_command_sends_the_request_of_the_page(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server, permissions=["clipboard-read", "clipboard-write"])
    await lab.select("POST /third-party/orders")
    await expect(lab.body).to_have_value('{"item":"tea"}')
    await lab.body.fill('{"item": "it\'s $HOME"}')
    await lab.run.click()
    await expect(lab.status).to_have_text("201")
    shown = await lab.text()
    await lab.copy.click()
    await expect(lab.copy).to_have_text("Copied")
    assert await lab.page.evaluate("navigator.clipboard.readText()") == await lab.curl.text_content()
    if shutil.which("curl"):
        command = (await lab.curl.text_content() or "").replace("curl ", "curl -s ", 1)
        process = await asyncio.create_subprocess_exec("sh", "-c", command, stdout=asyncio.subprocess.PIPE)
        assert (await process.communicate())[0].decode() == shown == '{"stored": "it\'s $HOME"}'


async def test_rejected_parameter_is_marked_in_the_form(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /third-party/rooms/{room}", count="0", room="12")
    await lab.run.click()
    await expect(lab.state).to_have_text("The server rejected the request.")
    await expect(lab.page.locator("[aria-invalid=true]")).to_have_count(2)
    await expect(lab.page.locator("#field-count-fault")).to_have_text("input should be greater than or equal to 1")
    await expect(lab.page.locator(".panel.problem h3")).to_have_text("422 Unprocessable Content")
    await lab.select("GET /third-party/rooms/{room}", count="1", room="2")
    await lab.run.click()
    await expect(lab.state).to_have_text("Done: the response is complete.")
    await expect(lab.page.locator("[aria-invalid=true]")).to_have_count(0)
    (message,) = lab.messages
    assert "422 (Unprocessable Content)" in message  # the browser logs every error status
    lab.messages.clear()


async def test_location_of_a_response_can_be_opened(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("POST /third-party/orders")
    await lab.run.click()
    await lab.page.get_by_role("button", name="Open /third-party/rooms/7").click()
    await expect(lab.page).to_have_url(f"{shared_server.url}/#GET/third-party/rooms/{{room}}?room=7")
    await expect(lab.route).to_have_text("GET /third-party/rooms/{room}")
    await expect(lab.page.locator("#field-room")).to_have_value("7")


async def test_task_is_a_bar_with_rate_and_remaining_time(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /third-party/task")
    await lab.run.click()
    panel = lab.page.locator(".progress")
    await expect(panel.locator(".headline")).to_have_text("running · 50 %")
    await expect(panel.locator("progress")).to_have_js_property("value", 1000)
    await expect(panel.locator("progress")).to_have_js_property("max", 2000)
    await expect(panel.locator(".muted")).to_have_text("1,000 of 2,000 rows · 513 rows per second · about 12 s left")
    await expect(panel.locator("li")).to_have_text(["copying", "half <done>"])
    await lab.select("GET /third-party/task", state="done")
    await lab.run.click()
    await expect(panel.locator(".headline")).to_have_text("done · 100 %")
    await expect(panel.locator(".muted")).to_have_text("2,000 of 2,000 rows · 513 rows per second")
    await expect(panel.locator("pre")).to_have_text('{ "rows": 2000 }')
    await lab.select("GET /third-party/task", state="failed")
    await lab.run.click()
    await expect(panel.locator(".headline")).to_have_text("failed · 50 %")
    await expect(panel.locator(".ending")).to_have_text("disk <full>")


async def test_comparison_is_bars_side_by_side(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /third-party/comparison")
    await lab.run.click()
    panel = lab.page.locator(".comparison")
    await expect(panel.locator(".headline")).to_have_text("Streamed: a hundredth of the wait.")
    await expect(panel.locator("caption")).to_have_text(
        ["First byte", "Complete response", "Peak memory", "Processor", "Throughput"]
    )
    await expect(panel.locator("table").first.locator("tr")).to_have_text(
        ["buffered 100,000 rows800 ms", "streamed 100,000 rows8 ms"]
    )
    widths = await panel.locator(".bar").evaluate_all("bars => bars.map(bar => bar.style.width)")
    assert widths[:2] + widths[4:6] == ["100%", "1%", "100%", "10%"]


async def test_failed_plugin_is_listed_with_its_reason(start: Start, open_lab: OpenLab) -> None:
    lab = await open_lab(await asyncio.to_thread(start, tracebacks=True, broken=BROKEN))
    failed = lab.page.locator("#list .failed")
    await expect(failed).to_contain_text("needs the Python module 'no_such_module_of_the_lab'")
    await expect(failed.locator("li")).to_have_text("GET /broken/stream")


FAILS_AT_START = """
    from streamlab import Scenario, endpoint, follow, hookimpl
    from pydantic import BaseModel


    class Resumable(BaseModel):
        last_event_id: str = ""


    class Doomed(Scenario):
        @endpoint("GET", "/doomed", query=Resumable, sends="text/event-stream")
        async def watch(self, request, query): ...

        @hookimpl
        def lifespan(self, app):
            raise RuntimeError("no disk")


    @hookimpl
    def register_scenarios():
        return [Doomed]
"""


async def test_failed_plugin_is_not_the_default_route(start: Start, open_lab: OpenLab) -> None:
    lab = await open_lab(await asyncio.to_thread(start, QUICK, tracebacks=True, doomed=FAILS_AT_START))
    await expect(lab.page.locator("#list .failed li")).to_have_text("GET /doomed")
    await expect(lab.route).to_have_text("GET /stream/stock-ticker")


# -- single modules

PARSE = """
    async chunks => {
        const { EventStreamParser } = await import("/assets/sse.js");
        const parser = new EventStreamParser();
        const events = chunks.flatMap(chunk => [...parser.feed(chunk)]);
        return [events.map(({ id, event, data }) => [id, event, data]), parser.lastId, parser.retry];
    }
"""


async def test_event_stream_is_parsed_alike_wherever_it_is_split(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    stream = (
        "\ufeff: hello\r\n\r\nid: 1-1\r\ndata: one\r\ndata:  two\r\n\r\n"
        "event: cr\rdata\rdata:\r\rid: 1-\0\ndata: nul\nretry: x1\nretry: 250\nunknown: z\n\n"
        "id: 1-2\nevent: empty\n\ndata: \u2028 is no line end\n\nid\ndata: none\n\ndata: never ended\n"
    )
    expected = [
        [
            ["1-1", "message", "one\n two"],
            ["1-1", "cr", "\n"],
            ["1-1", "message", "nul"],
            ["1-2", "message", "\u2028 is no line end"],
            ["", "message", "none"],
        ],
        "",
        250,
    ]
    splits: list[list[str]] = [[stream], list(stream)]
    splits += [[stream[:at], stream[at:]] for at in range(len(stream))]
    for chunks in splits:
        assert await lab.page.evaluate(PARSE, chunks) == expected


async def test_digest_of_chunks_is_sha_256(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    sizes = [*range(132), 1000, 65537]
    digests = await lab.page.evaluate(
        """async sizes => {
            const { Sha256 } = await import("/assets/proof.js");
            return sizes.map(size => {
                const bytes = Uint8Array.from({ length: size }, (_, at) => at * 7);
                const hash = new Sha256();
                for (let from = 0, step = 1; from < size; from += step++)
                    hash.update(bytes.subarray(from, from + step));
                return [...hash.digest()];
            });
        }""",
        sizes,
    )
    expected = [hashlib.sha256(bytes(at * 7 % 256 for at in range(size))).digest() for size in sizes]
    assert [bytes(digest) for digest in digests] == expected


# -- links, the history of runs, and the search


async def test_link_has_the_values_of_the_form_and_survives_a_reload(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /third-party/rooms/{room}", count="5", kind="fancy", words="a b\nc&d")
    await lab.page.locator("summary", has_text="More parameters").click()
    await lab.page.locator("#more").fill("x=%26")
    await lab.page.get_by_label("Read at").select_option("1 MB/s")
    address = (
        "/#GET/third-party/rooms/{room}?count=5&kind=fancy&words=a+b&words=c%26d&%40more=x%3D%2526&%40pace=1000000"
    )
    await expect(lab.page).to_have_url(shared_server.url + address)
    command = await lab.curl.text_content()
    assert command is not None
    assert "words=a+b&words=c%26d&x=%26" in command
    await lab.page.reload()
    await expect(lab.curl).to_have_text(command)
    await expect(lab.pace).to_have_value("1000000")
    await expect(lab.page.locator("#more")).to_be_visible()
    await expect(lab.state).to_be_empty()  # a link fills in a form, and runs nothing
    await lab.select("GET /third-party/rooms/{room}")  # the link without values leads to the empty form
    await expect(lab.page.locator("#field-count")).to_have_value("3")

    body = '{"item": "gr\u00fcn & 100%"}'
    await lab.select("POST /third-party/orders")
    await lab.body.fill(body)
    await lab.run.click()
    await expect(lab.status).to_have_text("201")
    elsewhere = await open_lab(shared_server, lab.page.url.removeprefix(shared_server.url))
    await expect(elsewhere.body).to_have_value(body)
    await elsewhere.body.fill("x" * 9000)  # too long for a link
    async with elsewhere.page.expect_console_message():  # the browser logs the 400
        await elsewhere.run.click()
    await expect(elsewhere.page).to_have_url(f"{shared_server.url}/#POST/third-party/orders")
    elsewhere.messages.clear()


async def test_choices_of_the_document_are_drop_downs_and_checkboxes(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server, "/#GET/third-party/rooms?floor=attic&colours=blue")
    floor = lab.page.get_by_label("floor")
    assert await floor.locator("option").all_text_contents() == ["not set", "ground", "upper", "attic"]
    await expect(floor).to_have_value("attic")  # the server, and not the page, decides whether that is valid
    await floor.select_option("upper")
    colours = lab.page.get_by_role("group", name="colours").get_by_role("checkbox")
    assert [await one.is_checked() for one in await colours.all()] == [False, False, True]
    await lab.page.get_by_role("checkbox", name="red").check()
    await expect(lab.curl).to_have_text(
        f"curl -N '{shared_server.url}/third-party/rooms"
        "?sizes=large&words=tea&words=room&floor=upper&colours=red&colours=blue'"
    )
    await expect(lab.page.get_by_label("tags")).to_have_attribute("placeholder", "e.g. quiet, bright")


async def test_list_is_a_table_whose_items_can_be_opened(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.select("GET /third-party/rooms", floor="upper", colours="green")
    await lab.run.click()
    await expect(lab.page.get_by_role("tab", selected=True)).to_have_text("Table")
    assert await lab.cells("tr") == [
        ["floor", "Methods", "room", "colours"],
        ["upper", "DELETE ", "2", '["green"]'],
        ["upper", "DELETE ", "9", '["green"]'],
    ]
    await lab.page.get_by_role("link", name="DELETE", exact=True).nth(1).click()
    await expect(lab.route).to_have_text("DELETE /third-party/rooms/{room}")
    await expect(lab.page.locator("#field-room")).to_have_value("9")
    await lab.page.go_back()
    await expect(lab.curl).to_contain_text("&floor=upper&colours=green")
    await lab.run.click()
    await lab.page.get_by_role("link", name="2", exact=True).click()
    await expect(lab.route).to_have_text("GET /third-party/rooms/{room}")
    await expect(lab.curl).to_contain_text("/third-party/rooms/2?count=3")


async def test_runs_are_listed_with_their_figures_and_two_are_compared(
    shared_server: Running, open_lab: OpenLab
) -> None:
    lab = await open_lab(shared_server)
    history = lab.page.locator("#history")
    await expect(history).to_be_hidden()
    await lab.select("GET /third-party/burst", count="9")
    for count in ("9", "90"):
        await lab.page.locator("#field-count").fill(count)
        await lab.run.click()
        await expect(lab.state).to_have_text("Done: the response is complete.")
    await lab.select("GET /stream/stock-ticker")
    await lab.run.click()
    await expect(lab.state).to_have_text("Running.")
    await lab.select("GET /health")
    requests = ["GET /stream/stock-ticker", "GET /third-party/burst?count=90", "GET /third-party/burst?count=9"]
    await expect(history.locator(".request")).to_have_text(requests)
    await expect(history.locator("td:nth-child(4)")).to_have_text(["stopped 200", "done 200", "done 200"])
    await expect(history.locator("td:nth-child(9)").nth(1)).to_have_text("90")
    await lab.page.reload()
    await expect(history.locator(".request")).to_have_text(requests)
    compared = history.locator(".pair-of-runs tr")
    boxes = history.get_by_role("checkbox")
    await boxes.nth(0).check()
    await expect(compared).to_have_count(0)
    await boxes.nth(2).check()
    await boxes.nth(1).check()
    await expect(boxes.nth(0)).not_to_be_checked()  # the third choice replaces the first
    rows = {row[0]: row[1:] for row in await compared.evaluate_all(CELLS)}
    assert rows["Request"] == [requests[2], requests[1], ""]
    assert rows["Events"] == ["9", "90", "10 times"]
    assert rows["State"] == ["done 200", "done 200", ""]
    assert all(rate.endswith("B/s") for rate in rows["Rate"][:2])
    await history.get_by_role("link", name=requests[2], exact=True).click()
    await expect(lab.route).to_have_text("GET /third-party/burst")
    await expect(lab.page.locator("#field-count")).to_have_value("9")
    await history.get_by_role("button", name="Clear").click()
    await expect(history).to_be_hidden()


async def test_history_of_runs_is_bounded(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    shown = await lab.page.evaluate(
        """async () => {
            const { History } = await import("/assets/history.js");
            const section = document.getElementById("history");
            const runs = new History(section);
            const ended = { startedAt: 0, endedAt: 1, state: "done", status: 200, firstByte: 1, bytes: 1, gaps: [] };
            for (let at = 0; at < 30; at++)
                runs.add(ended, { method: "GET", url: `http://a/${at}${"x".repeat(9000)}`, headers: {} }, "#GET/a");
            return [section.querySelectorAll("tbody tr").length, JSON.stringify(sessionStorage).length];
        }"""
    )
    assert shown[0] == 20
    assert shown[1] < 60_000


async def test_routes_are_found_by_words_of_their_path_summary_or_plugin(
    shared_server: Running, open_lab: OpenLab
) -> None:
    lab = await open_lab(shared_server)
    links = lab.page.locator("#list a:visible")
    everything = await links.count()
    for words, found in [
        ("ORDERS", ["POST /third-party/orders"]),
        ("logs follow", ["GET /stream/live-logs"]),
        ("ticker prices publish post", ["POST /stream/stock-ticker"]),
    ]:
        await lab.search.fill(words)
        await expect(links).to_have_text(found)
    await expect(lab.found).to_have_text("1 found.")
    await lab.search.fill("no such route")
    await expect(lab.found).to_have_text("No route has all of these words.")
    await expect(lab.page.locator("#list section:visible")).to_have_count(0)
    await lab.search.fill("")
    await expect(links).to_have_count(everything)


# -- the page itself


async def test_page_says_what_it_is_and_the_form_of_logs_fits_a_phone(
    shared_server: Running, open_lab: OpenLab
) -> None:
    lab = await open_lab(shared_server, "/#GET/stream/live-logs", viewport={"width": 390, "height": 844})
    await expect(lab.purpose).to_have_text(re.compile(r"^Run every route of this streaming server [^.]+\.$"))
    box = await lab.run.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 800
    description = lab.page.locator("#field-grep-help")
    short = await description.evaluate("one => one.clientHeight")
    assert short < await description.evaluate("one => one.scrollHeight")
    await lab.page.locator("#field-grep").focus()
    assert await description.evaluate("one => [one.clientHeight, one.scrollHeight - one.clientHeight]") > [short, 0]
    await lab.stop.focus()
    assert await description.evaluate("one => one.clientHeight") > short  # the button does not move under the finger


WATCH = """
    window.shifts = [];
    window.violations = [];
    new PerformanceObserver(list => window.shifts.push(...list.getEntries().map(entry => entry.value)))
        .observe({ type: "layout-shift", buffered: true });
    document.addEventListener("securitypolicyviolation", event => window.violations.push(event.blockedURI));
"""

FIRST_PAINT = """
    () => new Promise(resolve =>
        new PerformanceObserver(list =>
            list.getEntriesByName("first-contentful-paint").forEach(entry => resolve(entry.startTime))
        ).observe({ type: "paint", buffered: true })
    )
"""  # may come after the page is ready: a busy browser reports it late


async def test_900_points_per_second_shift_no_layout_and_lose_nothing(shared_server: Running, browser: Browser) -> None:
    page = await browser.new_page(viewport={"width": 1280, "height": 800})
    await page.add_init_script(WATCH)
    await page.goto(f"{shared_server.url}/lab#GET/third-party/burst")
    lab = Lab(page)
    await expect(lab.route).to_have_text("GET /third-party/burst")
    await page.locator("#field-count").fill("2700")
    await lab.run.click()
    await expect(lab.state).to_have_text("Running.")
    await page.evaluate("window.shifts.length = 0")
    await expect(lab.state).to_have_text("Done: the response is complete.", timeout=15_000)
    await expect(lab.count).to_have_text("2,700")
    assert await page.locator(".legend tbody tr").count() == 3
    assert await page.evaluate("[window.shifts, window.violations]") == [[], []]
    painted = await page.locator(".prices canvas").evaluate(
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)"
    )
    assert painted


async def test_page_is_small_and_paints_without_layout_shifts(shared_server: Running, browser: Browser) -> None:
    page = await browser.new_page()
    await page.add_init_script(WATCH)
    responses: list[Response] = []
    page.on("response", lambda response: responses.append(response))
    paints = []
    for _ in range(3):
        responses.clear()
        await page.goto(f"{shared_server.url}/lab")
        await expect(page.locator("#bench")).not_to_have_attribute("aria-busy", "true")
        paints.append(await page.evaluate(FIRST_PAINT))
        assert await page.evaluate("[window.shifts, window.violations]") == [[], []]
        if len(paints) == 1:  # the others come from the browser's cache
            sizes = {response.url: len(await response.body()) for response in responses}
    description = sizes.pop(f"{shared_server.url}/openapi.json")  # grows with each route
    assert description < 50_000
    assert sum(sizes.values()) < 140_000, sizes
    assert len(sizes) > 10
    assert all(paint > 0 for paint in paints)


async def test_content_security_policy_is_strict(shared_server: Running) -> None:
    for path in ("/", "/lab"):
        policy = shared_server.get(path, {"Accept": "text/html"})[1]["content-security-policy"]
        assert policy == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )


async def test_without_javascript_the_page_lists_every_route_with_its_command(
    shared_server: Running, browser: Browser
) -> None:
    page = await browser.new_page(java_script_enabled=False)
    await page.goto(shared_server.url)
    await expect(page.locator("#bench")).not_to_be_visible()
    document = json.loads(shared_server.get("/openapi.json")[2])
    routes = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    names = await page.locator("#list li a").all_text_contents()
    assert sorted(names) == sorted(routes)
    assert names[0] == "GET /stream/stock-ticker"
    assert names[-1] == "GET /assets/{name}"
    commands = [
        line.strip() for line in shared_server.get("/")[2].decode().splitlines() if line.startswith("       curl")
    ]
    shown = page.locator("#list pre")
    assert [await one.inner_text() for one in await shown.all() if await one.is_visible()] == commands


LOOK = """
    async key => {
        location.hash = key;
        const route = document.getElementById("route");
        while (route.textContent.replace(" ", "") !== key) await new Promise(done => setTimeout(done));
        const unnamed = [...document.querySelectorAll("input, select, textarea, button")]
            .filter(one => !(one.labels?.length || one.textContent.trim()));
        unnamed.push(...document.querySelectorAll("canvas:not([role=img][aria-label])"));
        return [route.textContent, document.documentElement.scrollWidth, unnamed.map(one => one.outerHTML)];
    }
"""


async def test_every_route_fits_on_a_phone_and_every_control_has_a_name(
    shared_server: Running, open_lab: OpenLab
) -> None:
    lab = await open_lab(shared_server, viewport={"width": 360, "height": 740}, color_scheme="dark")
    document = json.loads(shared_server.get("/openapi.json")[2])
    routes = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    assert len(routes) > 20
    for route in routes:
        found = await lab.page.evaluate(LOOK, route.replace(" ", ""))
        assert found == [route, 360, []]


async def test_route_is_selected_and_run_by_the_keyboard_alone(shared_server: Running, open_lab: OpenLab) -> None:
    lab = await open_lab(shared_server)
    await lab.page.locator("#list").get_by_role("link", name="GET /health", exact=True).focus()
    await lab.page.keyboard.press("Enter")
    await expect(lab.route).to_have_text("GET /health")
    await expect(lab.bench).to_be_focused()
    await lab.page.keyboard.press("Enter")
    await expect(lab.state).to_have_text("Done: the response is complete.")
    await lab.page.keyboard.press("Tab")
    await expect(lab.copy).to_be_focused()
    outline = await lab.copy.evaluate("button => getComputedStyle(button).outlineStyle")
    assert outline == "solid"
    await lab.page.keyboard.press("Tab")
    await lab.page.keyboard.press("Enter")
    await expect(lab.state).to_have_text("Done: the response is complete.")
    tabs = lab.page.get_by_role("tab")
    await tabs.first.focus()
    await lab.page.keyboard.press("ArrowRight")
    await expect(tabs.nth(1)).to_be_focused()
    await expect(tabs.nth(1)).to_have_attribute("aria-selected", "true")
    await lab.search.focus()
    await lab.page.keyboard.type("orders")
    await lab.page.keyboard.press("Enter")
    await expect(lab.route).to_have_text("POST /third-party/orders")
    await lab.body.focus()
    await lab.page.keyboard.press("Control+End")
    await lab.page.keyboard.press("Enter")
    await expect(lab.state).to_be_empty()
    await lab.page.keyboard.press("Control+Enter")
    await expect(lab.status).to_have_text("201")


def palettes() -> Iterator[dict[str, str]]:
    for block in re.findall(r":root \{(.*?)\}", (REPOSITORY / "streamlab/web/site.css").read_text(), re.DOTALL):
        yield dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb`. Source: WCAG 2.2."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


async def test_every_text_colour_has_enough_contrast_in_light_and_dark() -> None:
    light, dark = palettes()
    for palette in (light, light | dark):
        inks = ["ink", "muted", "mark", "good", "warn", "bad"]
        pairs = [(ink, ground) for ink in inks for ground in ("paper", "panel", "code")]
        pairs += [("on-mark", "mark"), *((f"series-{number}", "panel") for number in range(1, 9))]
        faint = {pair: contrast(palette[pair[0]], palette[pair[1]]) for pair in pairs}
        assert {pair: ratio for pair, ratio in faint.items() if ratio < 4.5} == {}
