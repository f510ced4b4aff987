"""Conformance: what a plugin's test inherits to ask a real server for every promise of a stream."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conformance import Conformance
    from .samples import Asked
    from .server import Said, Server, State

__all__ = ["Asked", "Conformance", "Said", "Server", "State"]


def __getattr__(name: str) -> Any:
    """Load the suite when it is first asked for: pytest imports this package in every run, for its plugin alone."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import conformance, samples, server

    return next(vars(module)[name] for module in (conformance, samples, server) if name in vars(module))
