"""A real browser for the tests of pages."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

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
    f"--disable-component-update --disable-sync --disable-features={FEATURES}"
)


@contextlib.asynccontextmanager
async def launched_browser() -> "AsyncIterator[Browser]":
    """Run the installed browser; skip the test if there is none."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs one of the browsers {', '.join(BROWSERS)}")
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=SWITCHES.split())
        yield browser
        await browser.close()


async def wait_for(page: "Page", condition: str) -> None:
    """Wait in the page itself: the method of playwright needs `eval`, which the policy of the page forbids."""
    async with asyncio.timeout(20):
        await page.evaluate(
            f"async () => {{ while (!({condition})) await new Promise(done => setTimeout(done, 10)); }}"
        )
