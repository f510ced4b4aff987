"""The browser that tests share: nothing of one test reaches the next one, and a browser that has died is replaced."""

import asyncio
import os
import signal

import pytest
from playwright.async_api import Error

from tests.support.browsers import SharedBrowser


async def test_a_loan_ends_what_was_begun_in_it_and_nothing_else(shared_browser: SharedBrowser) -> None:
    async with shared_browser.lent() as browser:
        kept = await browser.new_page()
        forever = asyncio.create_task(asyncio.Event().wait())
        async with shared_browser.lent() as same:
            assert same is browser
            page = await same.new_page()
            left = asyncio.create_task(page.evaluate("new Promise(() => {})"))
            await page.evaluate("1")
        assert left.cancelled()
        assert page.is_closed()
        assert not forever.done()
        assert await kept.evaluate("6 * 7") == 42
        assert browser.contexts == [kept.context]
    assert forever.cancelled()
    assert browser.contexts == []


async def test_a_browser_that_died_is_replaced(shared_browser: SharedBrowser) -> None:
    async with shared_browser.lent() as browser:
        page = await browser.new_page()
        session = await browser.new_browser_cdp_session()
        processes = (await session.send("SystemInfo.getProcessInfo"))["processInfo"]
        (number,) = (process["id"] for process in processes if process["type"] == "browser")
        os.kill(number, signal.SIGKILL)
        with pytest.raises(Error, match="closed"):
            await page.evaluate("new Promise(() => {})")
    async with shared_browser.lent() as another:
        assert another is not browser
        assert await (await another.new_page()).evaluate("6 * 7") == 42
