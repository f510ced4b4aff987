"""Signing in, in a real browser: on the lab page, in Swagger UI, and by a ticket from a page of another origin."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.support.browsers import wait_for
from tests.support.certificates import Pair
from tests.support.servers import Running, free_port, starting_in
from tests.support.tokens import table

expect.set_options(timeout=20_000)  # for busy machines

LOADED_PLUGINS = ("file", "ticker")

TICKER = "[scenarios.ticker]\ninterval = 0.05\n"

Start = Callable[..., Running]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = tmp_path_factory.mktemp("sign-in")
    (base / "var/files/reports").mkdir(parents=True)
    (base / "var/files/reports/2026.txt").write_text("a report")
    with starting_in(base, LOADED_PLUGINS) as start:
        yield start(TICKER + table("alice", "ticker:read", "file:read:reports/*"))


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Browser) -> AsyncIterator[Page]:
    """Open a page of a profile without cookies; it must not report an error of a script or of its policy."""
    context = await browser.new_context(ignore_https_errors=True)
    page = await context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console", lambda message: errors.append(message.text) if "Content Security Policy" in message.text else None
    )
    yield page
    assert errors == []
    await context.close()


async def test_the_lab_shows_what_who_signed_in_may_do_until_they_sign_out(page: Page, server: Running) -> None:
    await page.goto(f"{server.url}/lab")
    ticker = page.locator("#list a", has_text="/stream/stock-ticker")
    await expect(page.locator("#list a", has_text="/health")).to_be_visible()
    await expect(ticker).to_have_count(0)
    await expect(page.locator("#bench")).not_to_have_attribute("aria-busy", "true")
    await page.get_by_role("link", name="Sign in").click()
    await page.get_by_label("Token").fill("wrong")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("alert")).to_have_text("This token is not known here.")
    await page.get_by_label("Token").fill("alice-secret")
    await page.get_by_label("Token").press("Enter")
    await expect(page).to_have_url(f"{server.url}/lab")
    await expect(page.locator("header .account")).to_have_text("Signed in as alice, sign out")
    (cookie,) = await page.context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == ("streamlab-session", True, "Strict")
    assert await page.evaluate("document.cookie") == ""
    await ticker.click()
    await page.locator("#fields").get_by_label("limit").fill("3")
    await page.get_by_role("button", name="Run", exact=True).click()
    await expect(page.locator("#state")).to_have_text("Done: the response is complete.")
    await expect(page.locator("#count")).to_have_text("3")
    await page.get_by_role("link", name="sign out").click()
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.locator("header .account")).to_have_text("Sign in")
    await expect(ticker).to_have_count(0)
    assert await page.context.cookies() == []


async def test_a_link_to_a_file_leads_over_the_sign_in_to_it(page: Page, server: Running) -> None:
    response = await page.goto(f"{server.url}/files/reports/")
    assert response is not None
    assert response.status == 401
    await page.get_by_label("Token").fill("alice-secret")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page).to_have_url(f"{server.url}/files/reports/")
    await expect(page.get_by_role("link", name="2026.txt")).to_be_visible()
    await expect(page.get_by_text("Signed in as alice")).to_be_visible()
    response = await page.goto(f"{server.url}/metrics")
    assert response is not None
    assert response.status == 403
    await expect(page.get_by_role("alert")).to_have_text("alice needs the scope site:read for this.")
    await expect(page.get_by_role("button", name="Sign out")).to_be_visible()


async def test_swagger_ui_shows_and_tries_what_a_token_allows(page: Page, server: Running) -> None:
    await page.goto(f"{server.url}/docs")
    operation = page.locator("#operations-ticker-ticker_prices")
    await expect(page.locator("#operations-site-site_health")).to_be_visible()
    await expect(operation).to_have_count(0)
    await page.get_by_role("button", name="Authorize").click()
    dialog = page.locator(".dialog-ux")
    await dialog.locator("#auth-bearer-value").fill("alice-secret")
    await dialog.get_by_role("button", name="Apply credentials").first.click()
    await dialog.get_by_role("button", name="Close").last.click()
    await expect(operation).to_be_visible()
    await operation.locator(".opblock-summary-control").click()
    await operation.get_by_role("button", name="Try it out").click()
    await operation.locator('tr[data-param-name="limit"] input').fill("2")
    async with page.expect_request(lambda request: "/stream/stock-ticker" in request.url) as sent:
        await operation.get_by_role("button", name="Execute").click()
    assert (await sent.value).headers["authorization"] == "Bearer alice-secret"
    await expect(operation.locator(".live-responses-table .response-col_status").last).to_have_text("200")
    await page.get_by_role("button", name="Authorize").first.click()
    await dialog.get_by_role("button", name="Remove authorization").click()
    await dialog.get_by_role("button", name="Close").last.click()
    await expect(operation).to_have_count(0)


OTHER_SITE = """
    <!doctype html>
    <title>another origin</title>
    <script>
    const server = "%s", received = [], opened = [];
    async function open() {
        const headers = { Authorization: "Bearer alice-secret", "Content-Type": "application/json" };
        const body = JSON.stringify({ url: "/stream/stock-ticker" });
        const issued = await (await fetch(server + "/auth/tickets", { method: "POST", headers, body })).json();
        const source = new EventSource(server + issued.url, { withCredentials: true });
        source.onopen = () => opened.push(source.url);
        source.onmessage = event => received.push(event.lastEventId);
        source.onerror = () => source.readyState === EventSource.CLOSED && opened.push("closed");
    }
    open();
    </script>
"""


@pytest.fixture
def serving_page() -> Iterator[Callable[[str], str]]:
    """Return a function that serves a page on a port of its own, and returns its origin."""
    with ExitStack() as stack:

        def serve(page: str) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    self.send_response(200)
                    self.send_header("Content-Type", "text/html")
                    self.end_headers()
                    self.wfile.write(page.encode())

                def log_message(self, *_: object) -> None:
                    pass

            server = stack.enter_context(HTTPServer(("127.0.0.1", 0), Handler))
            thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://localhost:{server.server_port}"

        yield serve


TLS = '[server]\ntls_certificate = "server.pem"\ntls_key = "server.key"\n'


@pytest.mark.parametrize(
    ("host", "tls", "attributes"),
    [
        ("http://localhost", "", ("Lax", False, None)),
        ("https://127.0.0.1", TLS, ("None", True, "http://localhost")),
    ],
    ids=["another port", "another site"],
)
async def test_an_event_source_of_another_origin_resumes_by_itself(
    host: str,
    tls: str,
    attributes: tuple[str, bool, str | None],
    page: Page,
    start: Start,
    serving_page: Callable[[str], str],
    tmp_path: Path,
) -> None:
    port = free_port()
    other = serving_page(OTHER_SITE % f"{host}:{port}")
    Pair().write(tmp_path / "server.pem", tmp_path / "server.key")
    config = f'{tls}{TICKER}[cors]\norigins = ["{other}"]\ncredentials = true\n{table("alice", "ticker:read")}'
    server = start(config, port=port)
    await page.goto(f"{other}/")
    await wait_for(page, "received.length > 5")
    (cookie,) = await page.context.cookies()
    assert (cookie["sameSite"], cookie["secure"], cookie.get("partitionKey")) == attributes
    assert (cookie["path"], cookie["httpOnly"]) == ("/stream/stock-ticker", True)
    server.process.kill()
    server.process.wait()
    seen = await page.evaluate("received.length")
    again = start(config, port=port)
    await wait_for(page, f"received.length > {seen} + 5")
    received, opened = await page.evaluate("[received, opened]")
    assert len(opened) == 2
    assert opened[0] == opened[1]  # with the spent ticket, and its cookie
    assert "ticket=" in opened[0]
    epochs = {text.partition("-")[0] for text in received}
    offsets = [int(text.partition("-")[2]) for text in received]
    assert len(epochs) == 1
    assert offsets == list(range(offsets[0], offsets[0] + len(offsets)))
    await page.context.close()
    again.wait_for_log('outcome="client left"')
