"""Conformance: what a plugin's test inherits to ask a real server for every promise of a stream."""

from .conformance import Conformance
from .samples import Asked
from .server import Said, Server, State

__all__ = ["Asked", "Conformance", "Said", "Server", "State"]
