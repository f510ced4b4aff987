"""Parser of event streams, without I/O (WHATWG HTML 9.2)."""

from dataclasses import dataclass

MAX_BYTES = 16 * 1024 * 1024
"""Maximum size of a line, and of the data of an event, in bytes."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream."""

    event: str
    """Name of the event; `message` by default."""
    data: str
    """Data lines, joined by LF."""
    id: str
    """Last id so far, of this event or of an earlier one: a request with it resumes after this event."""
    retry: int | None
    """Milliseconds of `retry:`, if this event has one."""


class Parser:
    """Parses the bytes of an event stream into events, in chunks of any size (WHATWG HTML 9.2.6).

    One parser reads one response. `last_event_id` is the id to reconnect with, `retry` the milliseconds to wait
    before that, None until the stream sets them. An event without its blank line is never emitted.

    Lines are split before they are decoded, since no byte of a longer UTF-8 character is CR or LF: so no character
    is ever split, and invalid bytes become U+FFFD as if the stream were decoded at once.
    """

    def __init__(self, last_event_id: str = "", *, max_bytes: int = MAX_BYTES) -> None:
        self.last_event_id = last_event_id
        self.retry: int | None = None
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._at_start = True
        self._after_cr = False
        self._event = ""
        self._data = bytearray()
        # The standard starts each response with an empty id; an event without an id would then reset the position of
        # a client that has reconnected. Browsers start with the last id, and so does this parser.
        self._id = last_event_id
        self._event_retry: int | None = None

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that these bytes complete, in order.

        Raises ValueError when a line, or the data of an event, has more than `max_bytes` (default 16 MiB); the
        parser cannot be used after that.
        """
        if self._after_cr and chunk:  # a CR ends its line at once, without waiting for an LF
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr |= chunk.endswith(b"\r")
        events = []
        for part in chunk.splitlines(keepends=True):  # of bytes: at CR, LF and CRLF, and at nothing else
            content = part.rstrip(b"\r\n")
            if len(self._line) + len(content) > self._max_bytes:
                raise ValueError(f"a line of more than {self._max_bytes} bytes")
            if len(content) == len(part):
                self._line += content
                continue
            if self._line:
                content = bytes(self._line + content)
                self._line.clear()
            event = self._take(content)
            if event is not None:
                events.append(event)
        return events

    def _take(self, line: bytes) -> Event | None:
        if self._at_start:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")  # of a comment, the name is empty
        value = value.removeprefix(b" ")
        if name == b"data":
            if len(self._data) + len(value) > self._max_bytes:
                raise ValueError(f"an event of more than {self._max_bytes} bytes")
            self._data += value
            self._data += b"\n"
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit():
            # Python converts no more than 4300 digits; 18 digits are enough for any pause.
            digits = value.lstrip(b"0")
            self.retry = self._event_retry = int(digits or b"0") if len(digits) <= 18 else 10**18
        return None

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        event = None
        if self._data:
            data = self._data[:-1].decode("utf-8", "replace")
            event = Event(self._event or "message", data, self._id, self._event_retry)
        self._event = ""
        self._data.clear()
        self._event_retry = None
        return event
