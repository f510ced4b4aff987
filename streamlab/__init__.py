"""The names a plugin author needs, and no others."""

from .coding import weights
from .config import CONFIG, ConfigPath
from .eventlog import END, ORIGIN, Draft, Event, EventLogError, LeaseLost, Position, Retention
from .events import EVENTS, Channel, Events, draft, follow
from .hookspecs import hookimpl
from .observe import METRICS
from .problems import ErrorFormat, Problem
from .scenario import Scenario, endpoint
from .sse import frame
from .streaming import Outcome, Stream, StreamSummary, open_stream
from .tasks import TASKS, Progress, Task
from .threads import Threads, shielded
from .views import View

__all__ = [
    "CONFIG",
    "END",
    "EVENTS",
    "METRICS",
    "ORIGIN",
    "TASKS",
    "Channel",
    "ConfigPath",
    "Draft",
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
    "Stream",
    "StreamSummary",
    "Task",
    "Threads",
    "View",
    "draft",
    "endpoint",
    "follow",
    "frame",
    "hookimpl",
    "open_stream",
    "shielded",
    "weights",
]
