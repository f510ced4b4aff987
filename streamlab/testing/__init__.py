"""The test classes of plugins, on real servers: Conformance for endpoints, TaskConformance for long tasks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conformance import Conformance
    from .samples import EndpointForm
    from .server import Response, Server, State
    from .task_conformance import TaskConformance
    from .upstreams import serving_app

__all__ = ["Conformance", "EndpointForm", "Response", "Server", "State", "TaskConformance", "serving_app"]


def __getattr__(name: str) -> Any:
    """Load the suite at its first use: pytest imports this package in every run, only for its plugin."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import conformance, samples, server, task_conformance, upstreams

    modules = (conformance, samples, server, task_conformance, upstreams)
    return next(vars(module)[name] for module in modules if name in vars(module))
