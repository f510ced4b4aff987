"""Log lines that cannot be forged, and never block the server."""

import json
import logging
import queue
import sys
from pathlib import Path

from streamlab.server.logging import BoundedQueueHandler, LineFormatter, logging_to


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


def test_full_queue_drops_lines_and_reports_their_number() -> None:
    lines: queue.Queue[logging.LogRecord] = queue.Queue(2)
    handler = BoundedQueueHandler(lines)
    for number in range(5):
        handler.emit(record("line %d", number))
    assert [lines.get_nowait().getMessage() for _ in range(2)] == ["line 0", "line 1"]
    handler.emit(record("line %d", 5))
    assert [lines.get_nowait().getMessage() for _ in range(2)] == [
        "3 log lines were dropped: they came faster than they could be written",
        "line 5",
    ]


def test_log_file_that_cannot_be_written_is_reported_and_not_fatal(tmp_path: Path, capfd: object) -> None:
    (tmp_path / "file").write_text("")
    with logging_to(style="text", level="INFO", file=tmp_path / "file" / "streamlab.log"):
        logging.getLogger("streamlab.test").info("still here")
    lines = capfd.readouterr().err.splitlines()  # type: ignore[attr-defined]
    assert "cannot be written" in lines[0]
    assert lines[1].endswith("streamlab.test still here")
