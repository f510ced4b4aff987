"""Conformance: the test class that checks the promises of every stream on a real server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conformance import Conformance
    from .samples import EndpointForm
    from .server import Response, Server, State
    from .upstreams import serving_app

__all__ = ["Conformance", "EndpointForm", "Response", "Server", "State", "serving_app"]


def __getattr__(name: str) -> Any:
    """Load the suite at its first use: pytest imports this package in every run, only for its plugin."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import conformance, samples, server, upstreams

    return next(vars(module)[name] for module in (conformance, samples, server, upstreams) if name in vars(module))
