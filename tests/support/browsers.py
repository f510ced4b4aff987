"""A real browser for the tests of pages."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser, CDPSession, Page

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""The first that is installed is used: the shell has the engine, and no windows, which cost a fifth of the time."""

FEATURES = (
    # The pages of the address bar's pop-up, which each context loads in a process: more than half of a page's cost.
    "WebUIOmniboxPopup,WebUIOmniboxAimPopup,"
    # What playwright disables: only the last list counts.
    "AvoidUnnecessaryBeforeUnloadCheckSync,DestroyProfileOnBrowserClose,HttpsUpgrades,HttpsFirstBalancedModeAutoEnable,"
    "LensOverlay,MediaRouter,PaintHolding,ThirdPartyStoragePartitioning,AvoidCorsURLLoaderRestartOnRedirect,"
    "OptimizationHints,NetworkTimeServiceQuerying,AimEnabled,PreconnectToSearch"
)
"""Features of the browser that are disabled."""

SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    # Pages of one site and one profile share a process, which has compiled their scripts.
    f"--renderer-process-limit=1 --disable-component-update --disable-sync --disable-features={FEATURES}"
)


def installed_browser() -> str | None:
    """Return the path of the browser that is used, if one is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.asynccontextmanager
async def launched_browser() -> "AsyncIterator[Browser]":
    """Run the installed browser; skip the test if there is none."""
    executable = installed_browser()
    if executable is None:
        pytest.skip(f"needs one of the browsers {', '.join(BROWSERS)}")
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=SWITCHES.split())
        yield browser
        await browser.close()


class SharedBrowser:
    """The browser of all tests of a process: a launch takes a second or two of processor time.

    All of its methods are called on one event loop.
    """

    def __init__(self) -> None:
        self._launched = contextlib.AsyncExitStack()
        self._running: tuple[Browser, CDPSession] | None = None

    @contextlib.asynccontextmanager
    async def lent(self) -> "AsyncIterator[Browser]":
        """Lend the browser to a test, and end whatever the test has begun in it or on the event loop."""
        browser = await self.running()
        from playwright.async_api import Error

        contexts, before = browser.contexts, asyncio.all_tasks()
        try:
            yield browser
        finally:
            # A test that was interrupted, as by its timeout, would continue in the next one.
            if left := asyncio.all_tasks() - before - {asyncio.current_task()}:
                for task in left:
                    task.cancel()
                await asyncio.wait(left)
            try:
                for context in browser.contexts:
                    if context not in contexts:
                        await context.close()
            except Error:
                if await self._runs():
                    raise

    async def close(self) -> None:
        """End the browser, if it runs, and its driver."""
        self._running = None
        await self._launched.aclose()

    async def running(self) -> "Browser":
        """Return the browser; launch it if it does not run yet or has died."""
        if self._running is None or not await self._runs():
            await self.close()
            browser = await self._launched.enter_async_context(launched_browser())
            self._running = browser, await browser.new_browser_cdp_session()
        return self._running[0]

    async def _runs(self) -> bool:
        """Ask the browser: one that died while the loop did not run, or whose driver died, seems connected."""
        from playwright.async_api import Error

        if self._running is None:
            return False
        try:
            await self._running[1].send("Browser.getVersion")
        except Error:
            return False
        return True


async def wait_for(page: "Page", condition: str) -> None:
    """Wait in the page itself: the method of playwright needs `eval`, which the policy of the page forbids."""
    async with asyncio.timeout(20):
        await page.evaluate(
            f"async () => {{ while (!({condition})) await new Promise(done => setTimeout(done, 10)); }}"
        )
