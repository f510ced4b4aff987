"""The names a plugin author needs, and no others."""

from .config import ConfigPath
from .hookspecs import hookimpl
from .problems import Problem
from .scenario import Scenario, endpoint
from .streaming import Outcome, Stream, StreamSummary, open_stream

__all__ = [
    "ConfigPath",
    "Outcome",
    "Problem",
    "Scenario",
    "Stream",
    "StreamSummary",
    "endpoint",
    "hookimpl",
    "open_stream",
]
