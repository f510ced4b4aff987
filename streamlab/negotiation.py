"""What a client accepts: the weights of Accept and Accept-Encoding, and whether it wants events."""

import re

from aiohttp import web

from . import sse

_WEIGHT = re.compile(r"0(?:\.[0-9]*)?|1(?:\.0*)?")
"""A weight of RFC 9110 section 12.4.2, with any number of decimals; `float` takes more, as the digits of any script."""


def weights(field: str) -> dict[str, float]:
    """Return the members of an Accept or Accept-Encoding in lower case, each with its weight, 0 to 1.

    Parameters other than `q` are left out; a weight that is not valid counts as 0. Source: RFC 9110 section 12.4.2.
    """
    found: dict[str, float] = {}
    for member in field.lower().split(","):
        name, *parameters = (part.strip() for part in member.split(";"))
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                weight = float(value) if _WEIGHT.fullmatch(value) else 0.0
        if name:
            found[name] = weight
    return found


def wants_events(request: web.Request) -> bool:
    """Return whether the client prefers an event stream: Accept names it, and nothing else with a greater weight.

    A route that sends events or another media type by this needs `Vary: Accept`. Source: RFC 9110 section 12.5.1.
    """
    accepted = weights(", ".join(request.headers.getall("Accept", ())))
    weight = accepted.get(sse.MEDIA_TYPE, 0.0)
    return weight > 0 and weight == max(accepted.values())
