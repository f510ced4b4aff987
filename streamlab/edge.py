"""Which requests are let in: for a host of this server, and from its own pages or from programs."""

import ipaddress
import re
from contextlib import suppress
from fnmatch import fnmatchcase

from aiohttp import web

from .config import CONFIG, Server
from .problems import Problem

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing (RFC 9110, 9.2.1), unless an endpoint declares `starts_work`."""

_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{0,5}))?")

_DEFAULT_PORTS = {"http": 80, "https": 443}


def reject_other_host(request: web.Request) -> None:
    """Reject a Host that is not ours: a page of another site must not reach a server on loopback (DNS rebinding)."""
    server = request.config_dict[CONFIG].server
    host = request.headers.get("Host")
    if host is None:
        if request.version >= (1, 1):
            raise Problem(400, "A request of HTTP/1.1 needs a Host (RFC 9112 section 3.2).")
        return
    match = _HOST.fullmatch(host)
    if match is None or int(match["port"] or 0) > 65535:
        raise Problem(400, "This Host is not a host name with an optional port (RFC 9110 section 7.2).")
    if not _is_allowed(match["name"].strip("[]").rstrip(".").lower(), server):
        raise Problem(421, "This server does not answer to that Host; `server.allowed_hosts` names those it does.")


def reject_other_origin(request: web.Request) -> None:
    """Reject with 403 a request that a page of another origin caused (CSRF), for what starts work or changes something.

    Browsers send `Sec-Fetch-Site` to https and to loopback, and `Origin` with every unsafe method. A client without
    both, as curl, is not a page.
    """
    if not _is_from_own_origin(request):
        raise Problem(403, "A page of another origin may not do this (Sec-Fetch-Site, Origin).")


def _is_from_own_origin(request: web.Request) -> bool:
    """Return whether a page of this server, its user, or a program sent a request. The one place that decides it.

    `Sec-Fetch-Site` comes first, since no page can forge it and it is right behind a proxy that ends TLS, where the
    scheme of `Origin` is not that of the request. Source: W3C Fetch Metadata, 2.3 and 5; RFC 6454, 7.
    """
    site = request.headers.get("Sec-Fetch-Site", "")
    if site in ("same-origin", "none"):
        return True
    if site in ("same-site", "cross-site"):
        return False
    origin = request.headers.get("Origin")
    return origin is None or _with_port(origin) == _with_port(f"{request.scheme}://{request.host}")


def _with_port(origin: str) -> str:
    """Return an origin in lower case and with its port, so that `http://a` and `http://A:80` are equal."""
    scheme, _, host = origin.lower().partition("://")
    return f"{scheme}://{host}" if re.search(r":\d+$", host) else f"{scheme}://{host}:{_DEFAULT_PORTS.get(scheme)}"


def _is_allowed(name: str, server: Server) -> bool:
    listens_locally = _is_local(server.host)
    if listens_locally and _is_local(name):
        return True
    if not server.allowed_hosts:
        return not listens_locally
    return any(fnmatchcase(name, allowed.lower()) for allowed in server.allowed_hosts)


def _is_local(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False
