"""Decide what happened to a log file, and what to do next: the table of findings.

Every look at the disk collects `Facts` about each content of a followed path. `classify` turns them into one `Finding`,
and each finding has one `Step`. Nothing here reads the disk.
"""

from dataclasses import dataclass
from enum import Enum, auto

from .content import Unread
from .position import Kind


@dataclass(frozen=True, slots=True)
class Rotation:
    """The end of a file's content."""

    kind: Kind
    file: str
    complete: bool
    """Whether the old content is known to have been read to its end."""


class Place(Enum):
    """Where the file of a content was found."""

    AT_PATH = auto()
    """At the followed path."""
    RENAMED = auto()
    """Under another name, or as a copy."""
    DELETED = auto()
    """It is still open, but has no name."""
    NOT_FOUND = auto()


class Successor(Enum):
    """Whether there is a next content."""

    NONE = auto()
    """No file was written after this one."""
    FOUND = auto()
    """A file was written after this one: at the path, or rotated since."""
    OPEN = auto()
    """The next content is open, and this one is read only for the sake of late writers."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a look at the disk shows about one content."""

    place: Place
    successor: Successor
    """Always NONE for the current content while it is at the path."""
    reported: bool
    """Whether the end of the content was reported."""
    unread: Unread
    silent: bool
    """Whether the file was neither written nor renamed for the grace period."""


class Step(Enum):
    """What to do next. What can be read is read in any case, before the next look."""

    WAIT = auto()
    """Look again after a change."""
    READ = auto()
    """Look again after reading, without waiting for a change."""
    FINISH = auto()
    """Read a last line without a line break as well."""
    OPEN_NEXT = auto()
    """Open the next content."""
    MOVE_TO_NEXT = auto()
    """Report a complete rotation, and open the next content."""
    SKIP_TO_NEXT = auto()
    """Report an incomplete rotation, and open the next content."""
    END = auto()
    """Report a complete rotation, and close all contents."""
    CLOSE = auto()
    """Close the content."""


class Finding(Enum):
    """What happened to a content, and the next step."""

    # The current content.
    IN_PLACE = "its file is at the path", Step.WAIT
    RENAMED = "its file has another name, and nothing follows it yet", Step.WAIT
    MISSING = "its file was not found, and nothing follows it yet", Step.WAIT
    ENDED = "its end was reported, and nothing follows it yet", Step.WAIT
    SUCCEEDED = "its end was reported, and a file follows it", Step.OPEN_NEXT
    LOST = "its file was not found, and a file follows it", Step.SKIP_TO_NEXT
    UNREAD = "it was replaced or deleted, and not read to its end", Step.READ
    UNSETTLED = "it was replaced or deleted, and its writer is not silent yet", Step.WAIT
    PARTIAL_LINE = "it was replaced or deleted, its writer is silent, and its last line has no line break", Step.FINISH
    REPLACED = "it was read to its end, and a file follows it", Step.MOVE_TO_NEXT
    DELETED = "it was read to its end and deleted, and nothing follows it", Step.END
    # A content before the current one.
    LATE = "its writer may still add lines", Step.WAIT
    LATE_PARTIAL_LINE = "its writer is silent, and its last line has no line break", Step.FINISH
    SILENT = "its writer is silent", Step.CLOSE
    UNTRACEABLE = "its file was not found", Step.CLOSE

    def __init__(self, meaning: str, step: Step) -> None:
        self.meaning = meaning
        self.step = step


def classify(facts: Facts) -> Finding:
    """Return the finding of the first case that matches."""
    match facts:
        case Facts(successor=Successor.OPEN, place=Place.NOT_FOUND):
            return Finding.UNTRACEABLE
        case Facts(successor=Successor.OPEN, unread=Unread.LINES) | Facts(successor=Successor.OPEN, silent=False):
            return Finding.LATE
        case Facts(successor=Successor.OPEN, unread=Unread.PARTIAL_LINE):
            return Finding.LATE_PARTIAL_LINE
        case Facts(successor=Successor.OPEN):
            return Finding.SILENT

        case Facts(place=Place.AT_PATH):
            return Finding.IN_PLACE
        case Facts(successor=Successor.NONE, reported=True):
            return Finding.ENDED
        case Facts(successor=Successor.NONE, place=Place.NOT_FOUND):
            return Finding.MISSING
        case Facts(successor=Successor.NONE, place=Place.RENAMED):
            return Finding.RENAMED
        case Facts(reported=True):
            return Finding.SUCCEEDED
        case Facts(place=Place.NOT_FOUND):
            return Finding.LOST

        # The file was renamed and another follows it, or it was deleted.
        case Facts(unread=Unread.LINES):
            return Finding.UNREAD
        case Facts(unread=Unread.PARTIAL_LINE, silent=True):
            return Finding.PARTIAL_LINE
        case Facts(unread=Unread.PARTIAL_LINE) | Facts(successor=Successor.NONE, silent=False):
            return Finding.UNSETTLED
        case Facts(successor=Successor.FOUND):
            return Finding.REPLACED
        case _:
            return Finding.DELETED
