"""What pages share: addresses as a client sees them, which requests want a page, and the link to sign in."""

from html import escape
from urllib.parse import quote

from aiohttp import web

from .auth import EVERYBODY, PRINCIPAL
from .negotiation import weights

PREFIX = web.RequestKey("prefix", str)
"""Key of the request: the path at which a trusted proxy serves this server, as `/stream`; absent without one."""

SIGN_IN = "/auth/session"
"""The path of the sign-in."""

NEXT_LENGTH = 2000
"""Maximum length of the path to which the sign-in returns, in characters."""


def public_path(request: web.Request, path: str) -> str:
    """Return a path of this server, as `/files/a.txt`, as the client of a request has to send it.

    For what a response contains. Header fields `Location` are completed by the server.
    """
    return f"{request.get(PREFIX, '')}{path}"


def account_link(request: web.Request) -> str:
    """Return HTML for a page: who is signed in, and a link to the sign-in, which leads back to the page.

    It is empty where everybody may do everything.
    """
    principal = request[PRINCIPAL]
    if principal is EVERYBODY:
        return ""
    here = quote(str(request.rel_url), safe="/")
    target = public_path(request, SIGN_IN) + (f"?next={here}" if len(here) <= NEXT_LENGTH else "")
    if principal.name:
        return f'Signed in as {escape(principal.name)}, <a href="{escape(target)}">sign out</a>'
    return f'<a href="{escape(target)}">Sign in</a>'


def wants_page(request: web.Request) -> bool:
    """Return whether a browser sent a request to show the response: a link that was followed, a form, an address.

    Source: W3C Fetch Metadata, 2.2; without these fields, Accept prefers HTML to everything else that it names.
    """
    if mode := request.headers.get("Sec-Fetch-Mode"):
        return mode == "navigate"
    accepted = weights(", ".join(request.headers.getall("Accept", ())))
    html = accepted.pop("text/html", 0.0)
    return html > accepted.get("application/json", 0.0) and html >= max(accepted.values(), default=0.0)
