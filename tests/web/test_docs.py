"""/docs in a real browser: the routes can be tried, and values that the server knows are drop-downs."""

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, expect

from tests.support.browsers import launched_browser
from tests.support.servers import Running, starting_in

pytestmark = pytest.mark.asyncio(loop_scope="module")

expect.set_options(timeout=20_000)  # for machines that have other things to do


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with starting_in(tmp_path_factory.mktemp("docs")) as start:
        yield start("[scenarios.ticker]\ninterval = 0.01")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with launched_browser() as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser) -> AsyncIterator[Page]:
    context = await browser.new_context()
    yield await context.new_page()
    await context.close()


async def opened(page: Page, server: Running, operation: str) -> Locator:
    """Open an operation of /docs, and press "Try it out"."""
    scenario, _, name = operation.partition("/")
    await page.goto(f"{server.url}/docs#/{scenario}/{name}")
    block = page.locator(f"#operations-{scenario}-{name}")
    await block.get_by_role("button", name="Try it out").click()
    return block


async def choices(block: Locator, parameter: str) -> list[str]:
    """Return the values of a parameter's drop-down, without the empty one."""
    drop_down = block.locator(f'tr[data-param-name="{parameter}"] select')
    await expect(drop_down).to_have_count(1)
    return [text for text in await drop_down.locator("option").all_inner_texts() if text != "--"]


async def test_the_ticker_can_be_tried(page: Page, server: Running) -> None:
    block = await opened(page, server, "ticker/ticker_prices")
    assert await choices(block, "symbols") == ["AAPL", "AMZN", "GOOGL", "MSFT", "TSLA"]
    async with page.expect_request(lambda request: "/stream/stock-ticker" in request.url) as sent:
        await block.get_by_role("button", name="Execute").click()
    assert (await sent.value).url == f"{server.url}/stream/stock-ticker?symbols=AAPL&symbols=MSFT&limit=10&conflate=0"
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
    page: Page, server: Running, operation: str, parameter: str, expected: list[str]
) -> None:
    assert await choices(await opened(page, server, operation), parameter) == expected
