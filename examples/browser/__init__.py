"""A page that shows streams in a browser, served as a plugin: cp -r examples/browser plugins/, then open /browser/."""

from pathlib import Path

from aiohttp import web

from streamlab import Scenario, endpoint, hookimpl

HERE = Path(__file__).parent

# A page can only read streams of its own origin, so this plugin serves it. It runs no other script.
POLICY = {"Content-Security-Policy": "default-src 'self'", "Cache-Control": "no-cache"}


class Browser(Scenario):
    """Prices, model output and the progress of a task on one page."""

    @endpoint("GET", "/browser/", sends="text/html")
    async def page(self, request: web.Request) -> web.Response:
        """Show streams in a browser."""
        return web.Response(text=(HERE / "page.html").read_text(), content_type="text/html", headers=POLICY)

    @endpoint("GET", "/browser/client.js", sends="text/javascript")
    async def script(self, request: web.Request) -> web.Response:
        """Send the script of the page."""
        return web.Response(text=(HERE / "client.js").read_text(), content_type="text/javascript", headers=POLICY)


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Return the scenario."""
    return [Browser]
