"""Log lines that cannot be forged, and never block the server."""

import json
import logging
import os
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamlab.server.logging import MAX_LINES, BufferedLines, LineFormatter, LogFile, SharedStream, logging_to


def record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("streamlab.test", logging.INFO, __file__, 1, message, arguments, None)
    made.created, made.msecs = 1_700_000_000.25, 250
    if fields:
        made.fields = fields
    return made


def test_text_line_escapes_line_ends_and_terminal_sequences() -> None:
    forged = "/a\nERROR forged\r\x1b[2J\x85\u2028\u202e\ufeff\udcff"
    line = LineFormatter("text").format(record("GET %s failed", forged, path="x y\n"))
    assert line == (
        "2023-11-14T22:13:20.250Z INFO streamlab.test GET /a\\x0aERROR forged\\x0d\\x1b[2J\\x85\\x2028\\x202e\\xfeff"
        '\\xdcff failed path="x y\\n"'
    )


def test_json_line_is_one_object_for_any_content() -> None:
    line = LineFormatter("json").format(record("GET %s failed", "/a\nforged", status=500, path="\u2028"))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "INFO",
        "logger": "streamlab.test",
        "message": "GET /a\nforged failed",
        "status": 500,
        "path": "\u2028",
    }


def test_traceback_is_indented_so_that_it_cannot_forge_a_line() -> None:
    try:
        raise ValueError("first\n2023-11-14T22:13:20.250Z INFO forged")
    except ValueError:
        made = record("it failed")
        made.exc_info = sys.exc_info()
    first, *rest = LineFormatter("text").format(made).split("\n")
    assert first.endswith("it failed")
    assert rest[-1] == "    2023-11-14T22:13:20.250Z INFO forged"
    assert all(line.startswith("    ") for line in rest)


class Lines(logging.Handler):
    """What was written, by call."""

    def __init__(self) -> None:
        super().__init__()
        self.written: queue.Queue[list[str]] = queue.Queue()

    def emit(self, made: logging.LogRecord) -> None:
        self.written.put([line.partition(" streamlab.test ")[2] for line in self.format(made).split("\n")])


@contextmanager
def buffered(limit: int = MAX_LINES) -> Iterator[tuple[BufferedLines, Lines]]:
    output = Lines()
    lines = BufferedLines("text", [output], limit)
    lines.start()
    try:
        yield lines, output
    finally:
        lines.close()


def test_lines_beyond_the_limit_are_dropped_and_reported() -> None:
    output = Lines()
    lines = BufferedLines("text", [output], 2)  # whose thread does not run, as if the disk did not respond
    for number in range(5):
        lines.handle(record("line %d", number))
    lines.write()
    assert output.written.get_nowait() == ["line 0", "line 1"]
    lines.handle(record("line %d", 5, path="/"))
    lines.write()
    assert output.written.get_nowait() == [
        "3 log lines were dropped: they came faster than they could be written",
        "line 5 path=/",
    ]


def test_an_error_is_written_at_once_with_the_lines_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlab.server.logging.WRITE_SECONDS", 3600)
    with buffered() as (lines, output):
        lines.handle(record("first"))
        failed = record("failed")
        failed.levelno, failed.levelname = logging.ERROR, "ERROR"
        lines.handle(failed)
        assert output.written.get(timeout=10) == ["first", "failed"]


def test_lines_are_written_together_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlab.server.logging.WRITE_SECONDS", 0.5)
    with buffered() as (lines, output):
        for number in range(3):
            lines.handle(record("line %d", number))
        assert output.written.get(timeout=10) == ["line 0", "line 1", "line 2"]


def test_lines_are_written_when_half_of_the_limit_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlab.server.logging.WRITE_SECONDS", 3600)
    with buffered(4) as (lines, output):
        lines.handle(record("first"))
        lines.handle(record("second"))
        assert output.written.get(timeout=10) == ["first", "second"]


def test_all_lines_are_written_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlab.server.logging.WRITE_SECONDS", 3600)
    with buffered() as (lines, output):
        for number in range(3):
            lines.handle(record("line %d", number))
    assert output.written.get_nowait() == ["line 0", "line 1", "line 2"]


def test_a_drain_ends_when_what_was_collected_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlab.server.logging.WRITE_SECONDS", 3600)
    with buffered() as (lines, output):
        for number in range(3):
            lines.handle(record("line %d", number))
            lines.drain(10)
            assert output.written.get_nowait() == [f"line {number}"]


def test_arguments_have_the_value_that_they_had_when_they_were_logged() -> None:
    output, found = Lines(), ["a"]
    lines = BufferedLines("text", [output])
    lines.handle(record("found %s", found))
    found.append("b")
    lines.write()
    assert output.written.get_nowait() == ["found ['a']"]


def test_log_file_that_cannot_be_written_is_reported_and_not_fatal(tmp_path: Path, capfd: object) -> None:
    (tmp_path / "file").write_text("")
    with logging_to(style="text", level="INFO", file=tmp_path / "file" / "streamlab.log"):
        logging.getLogger("streamlab.test").info("still here")
    lines = capfd.readouterr().err.splitlines()  # type: ignore[attr-defined]
    assert "cannot be written" in lines[0]
    assert lines[1].endswith("streamlab.test still here")


def test_processes_that_share_a_log_file_rotate_it_once_and_lose_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamlab.server.logging.FILE_BYTES", 1000)
    path = tmp_path / "streamlab.log"
    files = [LogFile(path), LogFile(path)]
    written = [f"line {number:03}" for number in range(800)]
    for number, line in enumerate(written):
        files[number % 3 % 2].handle(record(line))
    for file in files:
        file.close()
    rotated = [*(tmp_path / f"streamlab.log.{number}" for number in range(5, 0, -1)), path]
    assert sorted(tmp_path.iterdir()) == sorted(rotated)
    assert [len(file.read_bytes()) for file in rotated[:5]] == [999] * 5
    lines = [line for file in rotated for line in file.read_text().splitlines()]
    assert lines == written[-len(lines) :]


def test_a_log_file_that_is_moved_is_written_again_at_its_name(tmp_path: Path) -> None:
    path = tmp_path / "streamlab.log"
    file = LogFile(path)
    file.handle(record("first"))
    path.rename(tmp_path / "moved")
    file.handle(record("second"))
    file.close()
    assert ((tmp_path / "moved").read_text(), path.read_text()) == ("first\n", "second\n")


def test_lines_of_several_processes_arrive_whole() -> None:
    reader, writer = os.pipe2(os.O_DIRECT)  # each read returns one write
    with open(writer, "w") as stream, open(reader, "rb", buffering=0) as written:  # noqa: PTH123 - descriptors
        handler = SharedStream(stream)
        handler.handle(record("\n".join([*("x" * 1000 for _ in range(10)), "y" * 5000, "z"])))
        pieces: list[bytes] = []
        while not pieces or not pieces[-1].endswith(b"z\n"):
            pieces.append(written.read(65536))
    assert all(piece.endswith(b"\n") for piece in pieces if b"y" not in piece)
    assert b"".join(pieces) == b"\n".join([*[b"x" * 1000] * 10, b"y" * 5000, b"z", b""])
