"""Log lines: their format, and the thread that writes them."""

import copy
import json
import logging
import logging.handlers
import queue
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# -- log lines


def _escape(text: str) -> str:
    """Return a text with each character escaped that is not printable, so that no input can forge a log line.

    Those are controls, line separators, marks that reverse the direction of a text, and halves of surrogate pairs,
    which cannot be encoded.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


class LineFormatter(logging.Formatter):
    """A record as one line: `time LEVEL logger message key=value`, or a JSON object; tracebacks follow indented.

    `record.fields`, if present, are its structured part; `record.stack`, if present, follows like a traceback.
    """

    def __init__(self, style: str) -> None:
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        trace = self.formatException(record.exc_info) if record.exc_info else getattr(record, "stack", "")
        if self._json:
            entry = {"time": when, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
            return json.dumps(entry | dict(fields) | ({"traceback": trace} if trace else {}), default=str)
        pairs = "".join(f" {name}={self._value(value)}" for name, value in fields.items() if value is not None)
        line = f"{when} {record.levelname} {record.name} {_escape(record.getMessage())}{pairs}"
        return line + "".join(f"\n    {_escape(row)}" for row in trace.splitlines())

    @staticmethod
    def _value(value: Any) -> str:
        text = str(value)
        return json.dumps(text) if re.search(r"[^!#-<>-~]", text) or not text else text


class BoundedQueueHandler(logging.handlers.QueueHandler):
    """Passes lines to the writing thread. When its queue is full, lines are dropped and counted; nothing waits."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put a line into the queue, after a line that reports how many were dropped, if any were."""
        try:
            if self.dropped:
                notice = copy.copy(record)
                notice.msg = notice.message = (
                    f"{self.dropped} log lines were dropped: they came faster than they could be written"
                )
                self.queue.put_nowait(notice)
                self.dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


@contextmanager
def logging_to(*, style: str, level: str, file: Path | None) -> Iterator[None]:
    """Write log lines to stderr, and to a file that rotates at 10 MB, while the block runs.

    A thread writes them: the event loop never waits for a disk.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    warning = ""
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(
                logging.handlers.RotatingFileHandler(file, maxBytes=10_000_000, backupCount=5, encoding="utf-8")
            )
        except OSError as error:
            warning = f"server.log_file - cannot be written: {file}: {error.strerror}; log lines go only to stderr"
    queue_handler = BoundedQueueHandler(queue.Queue(10_000))
    queue_handler.setFormatter(LineFormatter(style))
    listener = logging.handlers.QueueListener(queue_handler.queue, *handlers)
    # It logs every change that it sees: where the log itself is watched, each line would cause another one.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    root = logging.getLogger()
    before = root.level
    root.addHandler(queue_handler)
    root.setLevel(level)
    listener.start()
    try:
        if warning:
            logging.getLogger(__name__).warning(warning)
        yield
    finally:
        listener.stop()
        root.removeHandler(queue_handler)
        root.setLevel(before)
        for handler in handlers:
            handler.close()
