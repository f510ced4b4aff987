"""The names a plugin author needs, and no others."""

from .config import CONFIG, ConfigPath
from .events.channel import EVENTS, Channel, Events, encode_event
from .events.follow import follow
from .events.log import END, ORIGIN, EncodedEvent, Event, EventLogError, LeaseLost, Position, Retention
from .events.views import View
from .hookspecs import hookimpl
from .negotiation import wants_events, weights
from .problems import ErrorFormat, Problem
from .request_body import read_body, read_json
from .scenario import Scenario, endpoint
from .server.metrics import METRICS
from .slots import Slots
from .sse import sse_event
from .streaming.outcome import Outcome, StreamSummary
from .streaming.stream import Stream, open_stream
from .tasks import TASKS, Progress, Task
from .threads import Threads, shielded

__all__ = [
    "CONFIG",
    "END",
    "EVENTS",
    "METRICS",
    "ORIGIN",
    "TASKS",
    "Channel",
    "ConfigPath",
    "EncodedEvent",
    "ErrorFormat",
    "Event",
    "EventLogError",
    "Events",
    "LeaseLost",
    "Outcome",
    "Position",
    "Problem",
    "Progress",
    "Retention",
    "Scenario",
    "Slots",
    "Stream",
    "StreamSummary",
    "Task",
    "Threads",
    "View",
    "encode_event",
    "endpoint",
    "follow",
    "hookimpl",
    "open_stream",
    "read_body",
    "read_json",
    "shielded",
    "sse_event",
    "wants_events",
    "weights",
]
