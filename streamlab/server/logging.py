"""Log lines: their format, and the thread that writes them."""

import copy
import fcntl
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

WRITE_SECONDS = 0.2
"""Maximum time that a line waits to be written, unless it is a warning or an error, in seconds."""

MAX_LINES = 10_000
"""Maximum number of lines that wait to be written; further ones are dropped and counted."""

WRITTEN_AT_ONCE = 200
"""Maximum number of lines of one system call."""

FILE_BYTES, OLD_FILES = 10_000_000, 5
"""Maximum size of the log file, in bytes, and the number of old ones."""

# -- log lines


_UNQUOTED = re.compile(r"[!#-<>-~]+")
"""Text that can be a value in a line as it is."""


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    """Return a Unix time as text, without the fraction: many lines have the same."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


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

    `record.fields`, if present, are its structured part, after which comes the number of the worker, if this is one;
    `record.stack`, if present, follows like a traceback.
    """

    def __init__(self, style: str, worker: int | None = None) -> None:
        super().__init__()
        self._json = style == "json"
        self._common = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        fields: Mapping[str, Any] = {**getattr(record, "fields", {}), **self._common}
        when = f"{_second(int(record.created))}.{int(record.msecs):03d}Z"
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
        return text if _UNQUOTED.fullmatch(text) else json.dumps(text)


class BufferedLines(logging.Handler):
    """Collects lines in memory and writes them in a thread, together, so that a line costs the event loop microseconds.

    A line waits for WRITE_SECONDS at most, which is what a crash can lose; one of WARNING or above is written at once,
    with all that precede it. When MAX_LINES wait, further ones are dropped and counted: nothing waits for a disk. While
    there are no lines, the thread sleeps.
    """

    def __init__(
        self, style: str, outputs: Sequence[logging.Handler], limit: int = MAX_LINES, worker: int | None = None
    ) -> None:
        super().__init__()
        self.formatter = LineFormatter(style, worker)
        self._outputs = outputs
        self._limit = limit
        self._lines: list[str | logging.LogRecord] = []
        self._dropped = 0
        self._begun, self._due = threading.Event(), threading.Event()
        """Set while lines wait, and when they must not wait any longer."""
        self._written = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._open = True

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a line, after a line that reports how many were dropped, if any were."""
        lines = self._lines
        if len(lines) >= self._limit:
            self._dropped += 1
            return
        if self._dropped:
            notice = copy.copy(record)
            notice.msg = f"{self._dropped} log lines were dropped: they came faster than they could be written"
            notice.args, notice.exc_info, notice.stack, notice.fields = (), None, "", {}
            lines.append(self.format(notice))
            self._dropped = 0
        # What refers to objects that may change, and a traceback, which keeps all of its frames, are text from here on.
        settled = not record.args and record.exc_info is None and type(record.msg) is str
        lines.append(record if settled else self.format(record))
        if not self._begun.is_set():
            self._begun.set()
        if record.levelno >= logging.WARNING or len(lines) >= self._limit // 2:
            self._due.set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Write what has been collected, and end the thread."""
        self._open = False
        self._begun.set()
        self._due.set()
        if self._thread.is_alive():
            self._thread.join()
        self.write()
        super().close()

    def drain(self, seconds: float) -> None:
        """Wait until everything is written that has been collected by now, for a time at most."""
        self._written.clear()
        self._begun.set()
        self._due.set()
        self._written.wait(seconds)

    def write(self) -> None:
        """Write what has been collected; called by the thread."""
        self.acquire()
        try:
            lines, self._lines = self._lines, []
        finally:
            self.release()
        for start in range(0, len(lines), WRITTEN_AT_ONCE):
            some = lines[start : start + WRITTEN_AT_ONCE]
            text = "\n".join(line if isinstance(line, str) else self.format(line) for line in some)
            record = logging.makeLogRecord({"msg": text})
            for output in self._outputs:
                output.handle(record)

    def _run(self) -> None:
        while self._open:
            self._begun.wait()
            self._due.wait(WRITE_SECONDS)
            self._begun.clear()  # before the lines are taken: whoever adds one sets it again
            self._due.clear()
            draining = not self._written.is_set()
            self.write()
            if draining:
                self._written.set()


class SharedStream(logging.StreamHandler[Any]):
    """A stream that several processes write to: lines arrive whole, up to PIPE_BUF bytes (pipe(7))."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write lines with as few system calls as that takes."""
        part = ""
        for line in record.getMessage().splitlines(keepends=True):
            if part and len(f"{part}{line}\n".encode()) > select.PIPE_BUF:
                super().emit(logging.makeLogRecord({"msg": part.removesuffix("\n")}))
                part = ""
            part += line
        super().emit(logging.makeLogRecord({"msg": part}))


class LogFile(logging.Handler):
    """A log file that rotates at FILE_BYTES; any number of processes may write it. Raises OSError if it cannot be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file = path.open("ab", buffering=0)

    def emit(self, record: logging.LogRecord) -> None:
        """Write lines."""
        data = record.getMessage().encode() + b"\n"
        try:
            self._lock()
            try:
                if self._file.tell() > 0 and self._file.tell() + len(data) > FILE_BYTES:
                    self._rotate()
                self._file.write(data)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        except OSError:
            self.handleError(record)

    def _lock(self) -> None:
        """Lock the file of this name, which another process may have rotated, and go to its end."""
        while True:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                    self._file.seek(0, os.SEEK_END)
                    return
            self._open()

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, OLD_FILES + 1))]
        for old, older in reversed(tuple(pairwise(names))):
            with suppress(FileNotFoundError):
                old.rename(older)
        self._lock()

    def _open(self) -> None:
        file = self._path.open("ab", buffering=0)
        self._file.close()
        self._file = file

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


@contextmanager
def logging_to(*, style: str, level: str, file: Path | None, worker: int | None = None) -> Iterator[None]:
    """Write log lines to stderr, and to a file that rotates at 10 MB, while the block runs.

    A thread writes them: the event loop never waits for a disk. The lines of a `worker` have its number.
    """
    outputs: list[logging.Handler] = [logging.StreamHandler() if worker is None else SharedStream()]
    warning = ""
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            outputs.append(LogFile(file))
        except OSError as error:
            warning = f"server.log_file - cannot be written: {file}: {error.strerror}; log lines go only to stderr"
    lines = BufferedLines(style, outputs, worker=worker)
    # No line has these: without them, a record takes half the time (Python's logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if sys.version_info >= (3, 12):
        logging.logAsyncioTasks = False
    # It logs every change that it sees: where the log itself is watched, each line would cause another one.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    root = logging.getLogger()
    before = root.level
    root.addHandler(lines)
    root.setLevel(level)
    lines.start()
    try:
        if warning:
            logging.getLogger(__name__).warning(warning)
        yield
    finally:
        root.removeHandler(lines)
        root.setLevel(before)
        lines.close()
        for output in outputs:
            output.close()
