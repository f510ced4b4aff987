"""The names a plugin author needs, and no others."""

from .auth import PRINCIPAL, Action, Principal, Scope, client_of, may_be_proxy, require, require_own
from .config import CONFIG, ConfigPath
from .events.channel import EVENTS, Channel, Events, encode_event
from .events.follow import follow
from .events.log import (
    END,
    FOREVER,
    LATEST,
    ORIGIN,
    Batch,
    Conflict,
    Copy,
    EncodedEvent,
    Event,
    EventLogError,
    LeaseLost,
    Position,
    Retention,
)
from .events.ownership import Ownership
from .events.views import View
from .hookspecs import hookimpl
from .negotiation import wants_events, weights
from .pages import account_link, public_path
from .problems import ErrorFormat, Problem
from .request_body import read_body, read_json
from .scenario import ANY, Scenario, endpoint
from .served_files import FILES
from .server.metrics import METRICS
from .slots import Slots
from .sse import sse_event
from .streaming.drain import waiting
from .streaming.event_stream import EventStream, open_event_stream
from .streaming.outcome import Outcome, StreamSummary
from .streaming.resume import ResumeQuery, no_more_events, resume_id
from .streaming.stream import Stream, open_stream
from .tally import SHARED, Shared
from .tasks import TASKS, Progress, Task
from .threads import Threads, shielded

__all__ = [
    "ANY",
    "CONFIG",
    "END",
    "EVENTS",
    "FILES",
    "FOREVER",
    "LATEST",
    "METRICS",
    "ORIGIN",
    "PRINCIPAL",
    "SHARED",
    "TASKS",
    "Action",
    "Batch",
    "Channel",
    "ConfigPath",
    "Conflict",
    "Copy",
    "EncodedEvent",
    "ErrorFormat",
    "Event",
    "EventLogError",
    "EventStream",
    "Events",
    "LeaseLost",
    "Outcome",
    "Ownership",
    "Position",
    "Principal",
    "Problem",
    "Progress",
    "ResumeQuery",
    "Retention",
    "Scenario",
    "Scope",
    "Shared",
    "Slots",
    "Stream",
    "StreamSummary",
    "Task",
    "Threads",
    "View",
    "account_link",
    "client_of",
    "encode_event",
    "endpoint",
    "follow",
    "hookimpl",
    "may_be_proxy",
    "no_more_events",
    "open_event_stream",
    "open_stream",
    "public_path",
    "read_body",
    "read_json",
    "require",
    "require_own",
    "resume_id",
    "shielded",
    "sse_event",
    "waiting",
    "wants_events",
    "weights",
]
