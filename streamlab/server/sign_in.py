"""The sign-in of browsers: its page, and the routes that begin and end sessions and issue tickets."""

import re
from datetime import UTC, datetime
from html import escape
from typing import Any
from urllib.parse import parse_qs

from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD
from pydantic import BaseModel, Field, PrivateAttr
from yarl import URL

from streamlab.auth import PRINCIPAL, TICKET_PARAMETER, unauthorized
from streamlab.pages import NEXT_LENGTH, SIGN_IN, public_path, wants_page
from streamlab.problems import Problem, phrase
from streamlab.request_body import read_body
from streamlab.scenario import Route, Scenario, endpoint

from .authorization import AUTHORIZATION, authorize
from .credentials import comparable, cookie_session, set_session_cookie
from .limits import RequestRate
from .sessions import SESSION, SESSIONS
from .site import CONTENT_SECURITY_POLICY, ROUTES, template
from .validation import read_authorized

TICKETS_PER_MINUTE = 1000
"""Maximum number of tickets that a process issues to one principal in a minute; one more gets 429."""

FORM = "application/x-www-form-urlencoded"

FORM_BYTES = 16 * 1024
"""Maximum form of a sign-in, in bytes."""

HOME = "/lab"
"""The page that follows the sign-in where none is named."""

_LOCAL = re.compile(r"/(?![/\\])[!-\[\]-~]*")
"""A path of this server: not `//host`, and without the characters that browsers remove or take for slashes."""

_POLICY = CONTENT_SECURITY_POLICY.replace("form-action 'none'", "form-action 'self'")


class SignInQuery(BaseModel):
    """The query of the sign-in."""

    next: str = Field("", max_length=4 * NEXT_LENGTH, description="The path of this server to return to.")


class TicketRequest(BaseModel):
    """A URL that needs a ticket."""

    url: str = Field(
        min_length=1,
        max_length=4096,
        description="Path and query of a GET of this server, which the ticket is for.",
        examples=["/health"],
    )


class SignIn(Scenario):
    """Browsers: sign in with a token, and tickets for pages of other sites."""

    name = "auth"

    _tickets: RequestRate = PrivateAttr(
        default_factory=lambda: RequestRate(TICKETS_PER_MINUTE, "requested {limit} tickets")
    )

    @endpoint("GET", SIGN_IN, public=True, query=SignInQuery, sends=("application/json", "text/html"), curl="{url}")
    async def who(self, request: web.Request, query: SignInQuery) -> web.Response:
        """Report who is signed in, and until when; for a browser, the page to sign in and out."""
        if wants_page(request):
            return page(request, next_path=query.next)
        return web.json_response(_state(request), headers={"Vary": "Accept, Sec-Fetch-Mode"})

    @endpoint(
        "POST",
        SIGN_IN,
        public=True,
        takes=FORM,
        body_limit=FORM_BYTES,
        sends="application/json",
        responses={303: "A form was sent: the page that it names as `next` follows.", 401: "The token is not valid."},
        curl="-d token=slt_... {url}",
    )
    async def begin(self, request: web.Request) -> web.Response:
        """Sign in: exchange a token for the cookie of a session.

        The token is in the header Authorization, or in a form as `token`; `next` of the form is the path to return to.
        The page signs out by a form with `end`.
        """
        if "Authorization" in request.headers:
            await self._sign_in(request)
            return web.json_response(_state(request))
        body = await read_body(request, (FORM,))
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=10)
        form = {name: values[0] for name, values in fields.items()}
        request[NEXT] = form.get("next", "")
        if "end" in form:
            await self._sign_out(request)
        elif not request.app[AUTHORIZATION].is_open:
            request[PRINCIPAL] = await request.app[AUTHORIZATION].identify(form.get("token", "").strip())
            await self._sign_in(request)
        return web.Response(status=303, headers={"Location": _local(request[NEXT])})

    async def _sign_in(self, request: web.Request) -> None:
        """Begin a session of the principal of a request in place of that of its cookie."""
        if request.app[AUTHORIZATION].is_open:
            return
        if not request[PRINCIPAL].name:
            raise unauthorized("Signing in needs a token: Authorization: Bearer TOKEN.")
        await self._sign_out(request)
        secret, expires = await request.app[SESSIONS].begin(request[PRINCIPAL])
        set_session_cookie(request, secret, expires)

    @endpoint("DELETE", SIGN_IN, public=True, responses={204: "There is no session any more."}, curl="{url}")
    async def end(self, request: web.Request) -> web.Response:
        """Sign out: end the session of the cookie, with its open streams and tickets, and remove the cookie."""
        await self._sign_out(request)
        set_session_cookie(request, "", 0)
        return web.Response(status=204)

    async def _sign_out(self, request: web.Request) -> None:
        if (session := await cookie_session(request)) is not None:
            request.pop(SESSION, None)  # or this request would be cut with its session
            await request.app[SESSIONS].end(session)
            set_session_cookie(request, "", 0)

    @endpoint(
        "POST",
        "/auth/tickets",
        public=True,
        body=TicketRequest,
        sends="application/json",
        responses={
            201: "The URL with a ticket.",
            401: "This needs credentials.",
            403: "The client may not use that URL.",
            404: "No GET is served there.",
            422: "The URL is not one of this server, or its parameters are invalid.",
            429: "The client has requested too many tickets.",
        },
    )
    async def ticket(self, request: web.Request, body: TicketRequest) -> web.Response:
        """Issue a ticket: a URL that works once within 30 s, for what cannot send a token, as an EventSource.

        It is for a GET of exactly this path and query that the client may use now. A browser gets a cookie with it, so
        that it can repeat the request, as an EventSource does when it reconnects.
        """
        principal, prefix = request[PRINCIPAL], public_path(request, "")
        path = body.url.removeprefix(prefix) if body.url.startswith(f"{prefix}/") else body.url
        url = _local_url(path)
        if not request.app[AUTHORIZATION].is_open:
            if not principal.name:
                raise unauthorized("A ticket needs a token or a session: it is for what its client may read.")
            await _check(request, url)
            self._tickets.admit(principal.name)
            ticket, expires = await request.app[SESSIONS].issue(principal, comparable(url), request.get(SESSION))
            path += f"{'&' if '?' in path else '?'}{TICKET_PARAMETER}={ticket}"
        else:  # it needs no ticket
            expires = datetime.now(UTC).timestamp()
        return web.json_response({"url": f"{prefix}{path}", "expires": _rfc3339(expires)}, status=201)


# -- the page

NEXT = web.RequestKey("next", str)
"""Key of the request: the path that the form names to return to."""


def page(request: web.Request, *, next_path: str, status: int = 200, reason: str = "") -> web.Response:
    """Return the page to sign in and out; it returns to `next_path`, if that is a path of this server."""
    principal = request.get(PRINCIPAL)
    if request.app[AUTHORIZATION].is_open:
        state, form = "No sign-in is needed here: everybody who can connect may do everything.", ""
    elif principal is not None and principal.name:
        state = f"Signed in as {principal.name}."
        form = '<p><button name="end" value="1" formnovalidate>Sign out</button></p>'
    else:
        state, form = "Sign in with a token of this server.", ""
    if not request.app[AUTHORIZATION].is_open and (reason or not form):
        form = template("sign-in-form.html") + form
    values = {
        "reason": f'<p class="reason" role="alert">{escape(reason)}</p>' if reason else "",
        "state": escape(state),
        "form": form,
        "action": escape(public_path(request, SIGN_IN)),
        "next": escape(_local(next_path)),
        "back": HOME if reason else escape(_local(next_path)),  # not to what was denied
        "prefix": escape(public_path(request, "")),
    }
    text = template("sign-in.html")
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], text)
    headers = {"Content-Security-Policy": _POLICY, "Vary": "Accept, Sec-Fetch-Mode", "Cache-Control": "no-store"}
    return web.Response(status=status, reason=phrase(status), text=text, content_type="text/html", headers=headers)


def denied_page(request: web.Request, problem: Problem) -> web.Response | None:
    """Return the page of a 401 or 403 for a browser that shows it: the reason, and the form to sign in; or None."""
    if problem.status not in (401, 403) or request.app[AUTHORIZATION].is_open or not wants_page(request):
        return None
    target = request.get(NEXT, "") or (str(request.rel_url) if request.method == "GET" else "")
    response = page(request, next_path=target, status=problem.status, reason=problem.detail)
    response.headers.update(problem.headers)
    return response


def _local(path: str) -> str:
    """Return a path of this server, HOME for anything else: the sign-in must not lead to another site."""
    return path if len(path) <= NEXT_LENGTH and _LOCAL.fullmatch(path) else HOME


# -- states and tickets


def _state(request: web.Request) -> dict[str, Any]:
    """Return who sent a request."""
    principal, session = request[PRINCIPAL], request.get(SESSION)
    is_open = request.app[AUTHORIZATION].is_open
    times = [moment for moment in (principal.expires, session and session.expires) if moment is not None]
    return {
        "open": is_open,
        "name": principal.name or None,
        "scopes": [str(scope) for scope in principal.scopes],
        "expires": _rfc3339(min(times)) if times else None,
    }


def _rfc3339(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _local_url(text: str) -> URL:
    """Return the URL that a ticket is requested for; raises Problem 422 where it is not a path of this server."""
    url = URL(text, encoded=True) if _LOCAL.fullmatch(text) and "#" not in text else None
    if url is None or {".", ".."} & set(url.raw_path.split("/")):
        raise Problem.parameter("url", "must be a path and query of this server, as /health?name=value", "body")
    if any(part.partition("=")[0] == TICKET_PARAMETER for part in url.raw_query_string.split("&")):
        raise Problem.parameter("url", "has a ticket already", "body")
    return url


async def _check(request: web.Request, url: URL) -> None:
    """Raise Problem 401, 403, 404 or 422 unless the principal of a request may GET a URL now, with its parameters."""
    given = request._message._replace(method="GET", url=url, path=str(url))
    get = web.Request(
        given, EMPTY_PAYLOAD, request.protocol, request.writer, request.task, request._loop, state=dict(request._state)
    )
    found = await request.app.router.resolve(get)
    resource = found.route.resource
    route = None if resource is None else _route(request, resource.canonical)
    if found.http_exception is not None or route is None:
        raise Problem(404, f"No GET is served at {url.path}.")
    found.add_app(request.app)
    get._match_info = found
    authorize(get, route)
    await read_authorized(get, route)


def _route(request: web.Request, template: str) -> Route | None:
    """Return the GET of a path."""
    routes = request.app[ROUTES]
    return next((r for r in routes if r.endpoint.template == template and r.endpoint.method == "GET"), None)
