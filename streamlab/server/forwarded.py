"""What a trusted reverse proxy reports of a request: the client's address, the scheme and host, and a path prefix."""

import ipaddress
import re
from collections.abc import Iterable

from aiohttp import web

from streamlab.config import SOCKET_PREFIX
from streamlab.pages import PREFIX

_PREFIX = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+")
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[(?P<six>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{0,5}))?")


class Proxies:
    """The trusted proxies: addresses, and those that connect to the Unix socket, whose address is ""."""

    def __init__(self, listed: Iterable[str]) -> None:
        networks = set(listed)
        self._has_socket = SOCKET_PREFIX in networks
        self._networks = [ipaddress.ip_network(text) for text in networks - {SOCKET_PREFIX}]

    def __bool__(self) -> bool:
        return self._has_socket or bool(self._networks)

    def __contains__(self, address: str) -> bool:
        if not address:
            return self._has_socket
        parsed = ipaddress.ip_address(address)
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._networks)


def take_forwarded(request: web.Request, trusted: Proxies) -> None:
    """Take the fields X-Forwarded-For, -Proto, -Host and -Prefix of a request from a trusted proxy; ignore others.

    The client is the last address of the list that is not a trusted proxy: what is before that, anybody may have
    written.
    """
    if not trusted or (request.remote or "") not in trusted:
        return
    # aiohttp keeps these attributes of a request here, as those that `clone` is given. There is no public way to set
    # them, and a clone is another request: the connection would not see what is noted on it, as the limit of its body.
    attributes = request._cache
    for hop in reversed(_values(request, "X-Forwarded-For")):
        address = _address(hop)
        if address is None:
            break
        attributes["remote"] = address
        if address not in trusted:
            break
    for name, field, is_valid in (("scheme", "Proto", ("http", "https").__contains__), ("host", "Host", host_of)):
        values = _values(request, f"X-Forwarded-{field}")
        if values and is_valid(values[-1]):
            attributes[name] = values[-1]
    prefixes = _values(request, "X-Forwarded-Prefix")
    if prefixes and _PREFIX.fullmatch(prefix := prefixes[-1].rstrip("/")):
        request[PREFIX] = prefix


def host_of(authority: str) -> str | None:
    """Return the name or the address of a host with an optional port; None for any other text (RFC 9110, 7.2)."""
    match = _HOST.fullmatch(authority)
    if match is None or int(match["port"] or 0) > 65535:
        return None
    if match["six"] is not None:
        try:
            ipaddress.IPv6Address(match["six"])
        except ValueError:
            return None
    return match["six"] or match["name"]


def _values(request: web.Request, field: str) -> list[str]:
    joined = ",".join(request.headers.getall(field, ()))
    return [value.strip() for value in joined.split(",") if value.strip()]


def _address(hop: str) -> str | None:
    """Return the address of an entry, which may have a port."""
    match = re.fullmatch(r"\[(?P<six>[^\]]+)\](:[0-9]+)?|(?P<four>[0-9.]+)(:[0-9]+)?|(?P<plain>[0-9A-Fa-f:.]+)", hop)
    try:
        return str(ipaddress.ip_address(next(filter(None, match.groupdict().values())))) if match else None
    except ValueError:
        return None
