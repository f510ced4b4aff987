"""The credentials of a request: a token, a ticket in its URL, or the cookie of a session; and what caches may store."""

import re
import time
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlencode

from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from streamlab.auth import PRINCIPAL, TICKET_PARAMETER, Principal, unauthorized
from streamlab.events.log import EventLogError
from streamlab.pages import public_path

from .authorization import AUTHORIZATION
from .cors import CORS
from .sessions import SESSION, SESSIONS, Session

SESSION_COOKIE = "streamlab-session"
"""Name of the cookie of a session."""

TICKET_COOKIE = "streamlab-ticket-"
"""Beginning of the name of the cookie of a redeemed ticket; a part of the ticket follows."""

MAX_TICKET_COOKIES = 32
"""Maximum number of cookies of tickets that a browser has for one path: one more removes the oldest."""

TICKET = web.RequestKey("ticket", str)
"""Key of the request: the ticket of its URL."""

_COOKIES = web.RequestKey("cookies", list[str])
"""Key of the request: the values of Set-Cookie of its response."""

_INVALID_TICKET = (
    "This ticket is not valid: it has expired, was used by another client, or is for another URL. "
    "POST /auth/tickets returns another."
)


def take_ticket(request: web.Request) -> None:
    """Move the ticket from the URL of a request to `request[TICKET]`, so that nothing else sees it."""
    if TICKET_PARAMETER not in request.rel_url.raw_query_string:
        return
    parts = request.rel_url.raw_query_string.split("&")
    given = [part for part in parts if part.partition("=")[0] == TICKET_PARAMETER]
    if given:
        request[TICKET] = given[0].partition("=")[2]
        rest = "&".join(part for part in parts if part not in given)
        url = URL.build(path=request.rel_url.raw_path, query_string=rest, encoded=True)
        request._rel_url, cache = url, request._cache  # where aiohttp has its attributes that were read before
        for name in ("query", "query_string", "path_qs"):
            cache.pop(name, None)
        cache.update(rel_url=url, raw_path=str(url))
        if "url" in cache:  # that of an absolute target
            cache["url"] = cache["url"].origin().join(url)


def comparable(url: URL) -> str:
    """Return the path and query of a URL so that two are equal if a server cannot tell them apart."""
    path = "/".join(quote(unquote_to_bytes(part), safe="") for part in url.raw_path.split("/"))
    query = parse_qsl(url.raw_query_string, keep_blank_values=True, errors="surrogateescape")
    return f"{path}?{urlencode(query, errors='surrogateescape')}"


async def authenticate(request: web.Request, *, is_public: bool) -> bool:
    """Set the principal of a request; return whether its credentials are such as no other page can send unasked.

    Those are a ticket, and a token of a page in [cors], whose preflight was permitted. In a request of any other page,
    a proxy has added the token, by its own cookie.

    A token comes before a ticket, and that before the cookie of a session. A cookie that is not valid counts as no
    credentials, and is removed. Raises Problem 401 for a token or ticket that is not valid, and EventLogError, except
    for what is public, where the event log does not respond.
    """
    authorization = request.app[AUTHORIZATION]
    if not (authorization.is_open or "Authorization" in request.headers):
        if TICKET in request:
            request[PRINCIPAL] = await _redeem(request)
            return True
        if "Cookie" in request.headers and (principal := await _signed_in(request, is_public=is_public)) is not None:
            request[PRINCIPAL] = principal
            return False
    request[PRINCIPAL] = await authorization.authenticate(request)
    if authorization.is_open or "Authorization" not in request.headers:
        return False
    return request.app[CORS].lists(request.headers.get("Origin", ""))


async def _redeem(request: web.Request) -> Principal:
    """Return the principal of a ticket; a browser gets the cookie with which it may repeat the request."""
    if request.method != "GET":
        raise unauthorized("A ticket is for GET only.", error="invalid_token")
    ticket = request[TICKET]
    name = TICKET_COOKIE + re.sub(r"[^A-Za-z0-9.-]", "_", ticket.rpartition(".")[0])
    found = await request.app[SESSIONS].redeem(ticket, comparable(request.rel_url), _cookie(request, name))
    principal = found and request.app[AUTHORIZATION].current(found[0].principal)
    if found is None or principal is None:
        raise unauthorized(_INVALID_TICKET, error="invalid_token")
    session, secret = found
    request[SESSION] = session
    if secret:
        others = re.findall(rf"(?:^|;\s*)({TICKET_COOKIE}[\w.-]+)=", request.headers.get("Cookie", ""))
        # A browser sends those first that it has had for the longest time (RFC 6265, 5.4).
        for other in others[: max(0, len(others) + 1 - MAX_TICKET_COOKIES)]:
            _set_ticket_cookie(request, other, "", 0)
        _set_ticket_cookie(request, name, secret, session.expires)
    return principal


async def _signed_in(request: web.Request, *, is_public: bool) -> Principal | None:
    """Return the principal of the session of a request; None without one."""
    if not _cookie(request, SESSION_COOKIE):
        return None
    try:
        session = await cookie_session(request)
    except EventLogError:
        if is_public:
            return None
        raise
    if session is None:
        set_session_cookie(request, "", 0)
        return None
    request[SESSION] = session
    return request.app[AUTHORIZATION].current(session.principal)


async def cookie_session(request: web.Request) -> Session | None:
    """Return the session that the cookie of a request names, also where other credentials come first."""
    return await request.app[SESSIONS].find(_cookie(request, SESSION_COOKIE))


# -- cookies


def _cookie(request: web.Request, name: str) -> str:
    """Return the value of a cookie of a request; "" for none."""
    match = re.search(rf"(?:^|;\s*){re.escape(name)}=([A-Za-z0-9._-]*)", request.headers.get("Cookie", ""))
    return match[1] if match else ""


def set_session_cookie(request: web.Request, secret: str, expires: float) -> None:
    """Set the cookie of a session in the response to a request, until a Unix time; remove it by 0."""
    site = "SameSite=Strict; Secure" if request.scheme == "https" else "SameSite=Strict"
    _set_cookie(request, f"{SESSION_COOKIE}={secret}; Path={public_path(request, '') or '/'}", expires, site)


def _set_ticket_cookie(request: web.Request, name: str, secret: str, expires: float) -> None:
    """Set the cookie of a ticket, which the pages of other sites may use: each site has its own (CHIPS)."""
    path = public_path(request, request.rel_url.raw_path)
    if not re.fullmatch(r"[!-:<-~]+", path):  # a cookie can only be for a folder around it
        path = re.sub(r"/[^/]*[^!-:<-~].*", "/", path, flags=re.DOTALL)
    site = "SameSite=None; Secure; Partitioned" if request.scheme == "https" else "SameSite=Lax"
    _set_cookie(request, f"{name}={secret}; Path={path}", expires, site)


def _set_cookie(request: web.Request, cookie: str, expires: float, site: str) -> None:
    age = max(0, int(expires - time.time()))
    request.setdefault(_COOKIES, []).append(f"{cookie}; Max-Age={age}; HttpOnly; {site}")


# -- responses


def complete(request: web.Request, headers: CIMultiDict[str]) -> None:
    """Add the cookies of a response, and let no cache send it to another client.

    Where credentials decide about responses, a shared cache stores none, unless it says that it is `public`. Source:
    RFC 9111, 3.5 (which protects responses to Authorization only) and 4.1.
    """
    cookies = request.get(_COOKIES, ())
    for cookie in cookies:
        headers.add("Set-Cookie", cookie)
    if TICKET in request:
        headers.setdefault("Referrer-Policy", "same-origin")
    control = headers.get("Cache-Control", "")
    if not cookies and (request.app[AUTHORIZATION].is_open or "public" in control):
        return
    headers["Vary"] = ", ".join([*headers.getall("Vary", ()), "Authorization", "Cookie"])
    if not re.search("no-store|private", control):
        headers["Cache-Control"] = f"private, {control.removeprefix('public, ')}"
