"""/docs in a real browser: the routes can be tried, and values that the server knows are drop-downs."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, expect

from tests.support.browsers import SharedBrowser
from tests.support.servers import Running, starting_in

expect.set_options(timeout=20_000)  # for machines that have other things to do


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with starting_in(tmp_path_factory.mktemp("docs")) as start:
        yield start("[scenarios.ticker]\ninterval = 0.05")


FIRST = "ticker/ticker_prices"
"""The operation that the page is opened with."""

EMPTY = "about:blank"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tabs() -> AsyncIterator[dict[Browser, Page]]:
    opened: dict[Browser, Page] = {}
    yield opened
    for page in opened.values():
        await page.close()


@pytest_asyncio.fixture(loop_scope="session")
async def page(shared_browser: SharedBrowser, server: Running, tabs: dict[Browser, Page]) -> Page:
    """Return the page, loaded once for all tests by the link of an operation: a second of a processor."""
    browser = await shared_browser.running()
    if browser not in tabs:
        tabs[browser] = await browser.new_page()
    page = tabs[browser]
    if page.url == EMPTY:
        await page.goto(f"{server.url}/docs#/{FIRST}")
        await expect(page.locator(f"#operations-{FIRST.replace('/', '-')} .opblock-body")).to_be_visible()
    return page


@asynccontextmanager
async def opened(page: Page, operation: str) -> AsyncIterator[Locator]:
    """Open an operation of /docs, and press "Try it out"; close it at the end."""
    block = page.locator(f"#operations-{operation.replace('/', '-')}")
    await expect(block).to_have_count(1)
    if not await block.locator(".opblock-body").count():
        await block.locator(".opblock-summary-control").click()
    await block.get_by_role("button", name="Try it out").click()
    try:
        yield block
    except BaseException:
        await page.goto(EMPTY)  # the next test loads it again
        raise
    await block.get_by_role("button", name="Cancel").click()
    await block.locator(".opblock-summary-control").click()
    await expect(block.locator(".opblock-body")).to_have_count(0)


async def choices(block: Locator, parameter: str) -> list[str]:
    """Return the values of a parameter's drop-down, without the empty one."""
    drop_down = block.locator(f'tr[data-param-name="{parameter}"] select')
    await expect(drop_down).to_have_count(1)
    return [text for text in await drop_down.locator("option").all_inner_texts() if text != "--"]


async def test_the_ticker_can_be_tried(page: Page, server: Running) -> None:
    async with opened(page, FIRST) as block:
        assert await choices(block, "symbols") == ["AAPL", "AMZN", "GOOGL", "MSFT", "TSLA"]
        async with page.expect_request(lambda request: "/stream/stock-ticker" in request.url) as sent:
            await block.get_by_role("button", name="Execute").click()
        query = "symbols=AAPL&symbols=MSFT&limit=10&conflate=0"
        assert (await sent.value).url == f"{server.url}/stream/stock-ticker?{query}"
        await expect(block.locator(".live-responses-table .response-col_status").last).to_have_text("200")


@pytest.mark.parametrize(
    ("operation", "parameter", "expected"),
    [
        ("logs/logs_live", "source", ["demo", "server"]),
        ("logs/logs_live", "level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]),
        ("progress/progress_long_task", "kind", ["checksum", "export", "rehearsal", "report"]),
        ("export/export_export", "name", ["data", "results", "users"]),
    ],
)
async def test_what_the_server_knows_is_a_drop_down(
    page: Page, operation: str, parameter: str, expected: list[str]
) -> None:
    async with opened(page, operation) as block:
        assert await choices(block, parameter) == expected


CONTRAST = """elements => elements.map(element => {
    const luminance = colour => {
        const [r, g, b] = colour.match(/\\d+/g).slice(0, 3).map(value => value / 255)
            .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const { color, backgroundColor } = getComputedStyle(element);
    const [light, dark] = [luminance(color), luminance(backgroundColor)].sort((one, other) => other - one);
    return [element.textContent.trim(), (light + 0.05) / (dark + 0.05)];
})"""
"""A function that returns the text of elements and the contrast with their background (WCAG 2.2, 1.4.3)."""


async def test_the_page_can_be_used_with_a_screen_reader(page: Page) -> None:
    async with opened(page, FIRST) as block:
        await expect(page.get_by_role("main").locator("h2.title")).to_have_attribute("aria-level", "1")
        headings = page.get_by_role("main").get_by_role("heading")
        levels = await headings.evaluate_all("all => all.map(one => Number(one.ariaLevel ?? one.tagName[1]))")
        assert levels[0] == 1
        assert len(levels) > 10
        assert [pair for pair in pairwise(levels) if pair[1] > pair[0] + 1] == []
        await expect(block.get_by_role("listbox", name="symbols")).to_have_count(1)
        await expect(block.locator("select:not([aria-label])")).to_have_count(0)
        await expect(page.locator("button a[href]")).to_have_count(0)
        badges = page.locator(".opblock-summary-method, .btn.execute, .version")
        found = await badges.evaluate_all(CONTRAST)
        assert {"GET", "POST", "DELETE", "Execute", "OAS 3.1"} <= {text for text, _ in found}
        assert [(text, ratio) for text, ratio in found if ratio < 4.5] == []
