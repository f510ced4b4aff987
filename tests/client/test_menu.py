"""The menu of `streamlab client`, as a process that is controlled through a pipe, or through a terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.fake_upstream import DONE, FINISH, MODEL, USED, Exchange, event, fake_upstream
from tests.support.servers import REPOSITORY, Command, Running, command, free_port

Start = Callable[..., Running]

Result = tuple[int, list[str], list[str]]
"""Exit status of a command, and the lines of its stdout and stderr."""

PATTERN = "/download/large-file?size_mb=4"

LIAR = '''
    """Sends a wrong digest, in both places that a client checks."""

    from aiohttp import web
    from pydantic import BaseModel
    from streamlab import Scenario, endpoint, hookimpl, open_event_stream, open_stream


    class EndQuery(BaseModel):
        end: bool = False


    class Liar(Scenario):
        @endpoint("GET", "/lie", sends="application/octet-stream")
        async def lie(self, request):
            digest = "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"
            headers = {"Repr-Digest": digest, "ETag": '"a"'}
            async with open_stream(request, "application/octet-stream", headers=headers, length=5) as response:
                await response.write(b"lying")
            return response

        @endpoint("GET", "/export", sends="application/json")
        async def exports(self, request):
            return web.json_response({"exports": [{"name": name} for name in ("few", "other", "broken", "none")]})

        @endpoint("GET", "/export/{name}/jsonl", query=EndQuery, sends="application/jsonl")
        async def rows(self, request, query):
            name = request.match_info["name"]
            async with open_stream(request, "application/jsonl") as response:
                await response.write(b'{"id":1}\\n{"id":2}\\n')
                if name == "broken":
                    raise OSError
                if name != "none":
                    rows = 3 if name == "few" else 2
                    await response.write(b'{"@end":{"rows":%d,"sha256":"00"}}\\n' % rows)
            return response


    @hookimpl
    def register_scenarios():
        return [Liar]
'''


# aiohttp reads the system's certificates when it is imported, which takes a tenth of a second.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SSL_CERT_FILE": os.devnull}


ODD = '''
    """A ticker that sends every event about the stream, and then an invalid one."""

    from aiohttp import web
    from streamlab import Scenario, endpoint, hookimpl, open_event_stream, open_stream

    EVENTS = (
        'id: 1\\nevent: gap\\ndata: {"missing": 3}\\n\\n'
        'id: 2\\nevent: error\\ndata: {"detail": "no source"}\\n\\n'
        'id: 3\\ndata: {"symbol": "Ä", "price": 1, "change": null, "time": "now"}\\n\\n'
        'id: 4\\ndata: nonsense \\x9b\\n\\n'
    )


    class Odd(Scenario):
        @endpoint("GET", "/stream/stock-ticker", sends="text/event-stream")
        async def prices(self, request):
            async with open_event_stream(request) as response:
                await response.write(EVENTS.encode())
            return response


    @hookimpl
    def register_scenarios():
        return [Odd]
'''


@contextmanager
def begin(server: str, *names: str, cwd: Path, **variables: str) -> Iterator[Command]:
    """Yield the command with its input open; it ends with the block."""
    with command("client", "--url", server, *names, cwd=cwd, COLUMNS="120", **variables) as process:
        yield process


def reply(process: Command, *lines: str) -> None:
    assert process.stdin is not None
    process.stdin.write("".join(f"{line}\n" for line in lines))
    process.stdin.flush()


def end(process: Command, *lines: str) -> Result:
    """Send the last replies, and return the result."""
    out, err = process.communicate("".join(f"{line}\n" for line in lines), timeout=40)
    assert "Traceback" not in err, err
    return process.wait(), out.splitlines(), err.splitlines()


def result(server: str, *names: str, cwd: Path, replies: Sequence[str] = (), **variables: str) -> Result:
    """Run the command with these replies, as `end` returns it."""
    with begin(server, *names, cwd=cwd, **variables) as process:
        return end(process, *replies)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of the client; the server has another."""
    folder = tmp_path / "client"
    folder.mkdir()
    return folder


def run(server: Running, folder: Path, *views: str) -> Result:
    """Open views, each given as its name and its replies, separated by "|"; return the output without questions."""
    names = [view.partition("|")[0] for view in views]
    replies = [reply for view in views for reply in view.split("|")[1:]]
    status, out, err = result(server.url, *names, cwd=folder, replies=replies)
    return status, [line for line in out if not re.search(r" \[[^]]*\]: ", line)], err


def wait_until(reached: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the menu itself


def test_the_menu_lists_every_view_and_exits_with_0(start: Start, folder: Path) -> None:
    server = start()
    listed = [
        "",
        "  1  chat        Chat with a model; an empty line ends it.",
        "  2  comparison  Buffered compared with streamed, measured now, as bars.",
        "  3  download    Download a file with a progress bar; an interrupted one resumes.",
        "  4  export      Rows of a query, counted, in a file of CSV or JSON lines.",
        "  5  logs        Lines of a log, by level and pattern.",
        "  6  task        A long task, with a progress bar; Ctrl-C leaves it running.",
        "  7  ticker      Live prices.",
        "  8  quit",
    ]
    assert result(server.url, cwd=folder) == (0, [*listed, "view: "], [])
    wrong = result(server.url, cwd=folder, replies=["", "9", "x\x1b", "8"])
    assert wrong == (
        0,
        [*listed, "view: ", "view: 9", "view: x\x1b", "view: 8"],
        ["'9' is not in the menu", r"'x\x1b' is not in the menu"],
    )
    status, out, err = result(server.url, cwd=folder, replies=["ticker", "", "soon"])
    assert (status, out[-3:]) == (
        0,
        ["symbols, for example AAPL,MSFT [all]: ", "events [until Ctrl-C]: soon", "events [until Ctrl-C]: "],
    )
    assert err == ["'soon' is not a positive integer"]

    # An unreachable server is reported in one line, and the menu continues.
    with begin(server.url, cwd=folder) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "  8  quit\n":
            pass
        server.terminate(signal.SIGKILL)
        failure = f"streamlab: {server.url}/health: cannot connect: Connection refused"
        status, out, err = end(process, "ticker", "quit")
    assert (status, out[-1], err) == (0, "view: quit", [failure])
    assert result(server.url, cwd=folder) == (1, [], [failure])


def test_an_invalid_url_and_an_unknown_view_exit_with_2(tmp_path: Path) -> None:
    assert result("ftp://x", cwd=tmp_path) == (2, [], ["streamlab: 'ftp://x/health' is not an http(s) URL"])
    status, _, err = result("127.0.0.1:1", "tikcer", cwd=tmp_path)
    assert (status, err) == (
        2,
        ["streamlab: unknown view 'tikcer'; the views are chat, comparison, download, export, logs, task, ticker"],
    )


def test_other_commands_do_not_load_it() -> None:
    script = "import sys, streamlab.cli; sys.exit('streamlab.client.menu' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


# -- downloads


def test_a_download_is_verified_and_overwrites_only_on_confirmation(start: Start, folder: Path) -> None:
    server = start("[scenarios.file]\nsample_mb = 2")
    (folder / "large-file").write_text("mine")
    assert run(
        server, folder, "download|||no|other.bin", "download|files/none|", "download||third", "download||third|y"
    ) == (
        1,
        [f"{name}: 2,000,000 bytes, verified by SHA-256" for name in ("other.bin", "third", "third")],
        [f"streamlab: {server.url}/files/none returned 404: There is no such file."],
    )
    sample = (server.base / "var/files/large-file.bin").read_bytes()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "large-file": b"mine",
        "other.bin": sample,
        "third": sample,
    }


def test_a_download_resumes_after_the_server_was_killed(start: Start, folder: Path) -> None:
    port = free_port()
    server = start(port=port)
    part = folder / "four.part"
    with begin(server.url, cwd=folder) as process:
        reply(process, "download", f"{PATTERN}&rate=4000000", "four")
        wait_until(lambda: size(part) > 1_000_000)
        server.terminate(signal.SIGKILL)
        server = start(port=port)
        status, out, err = end(process, "quit")
    assert (status, out[12]) == (0, "four: 4,000,000 bytes, verified by SHA-256")
    at = re.fullmatch(r"resuming at byte ([\d,]+) of 4,000,000", err[-1])
    assert at is not None
    assert int(at[1].replace(",", "")) > 1_000_000
    assert all(" retrying in " in line for line in err[:-1])
    lines = server.wait_for_log(" path=/download/large-file ")
    assert re.findall(r"method=GET path=/download/large-file .*?status=(\d+)", lines) == ["206"]
    assert (folder / "four").read_bytes() == server.get(PATTERN)[2]
    assert names(folder) == ["four"]


def test_a_download_that_was_stopped_resumes_when_it_is_chosen_again(start: Start, folder: Path) -> None:
    server = start()
    part = folder / "four.part"
    with begin(server.url, cwd=folder) as process:
        reply(process, "3", f"{PATTERN}&rate=200000", "four")
        wait_until(lambda: size(part) > 100_000)
        process.send_signal(signal.SIGINT)
        server.wait_for_open_streams(0)
        there = size(part)
        assert 100_000 < there < 4_000_000
        status, out, err = end(process, "3", PATTERN, "four", "quit")
    assert status == 0
    assert "[stopped]" in out
    assert err == [f"resuming at byte {there:,} of 4,000,000"]
    assert "four: 4,000,000 bytes, verified by SHA-256" in out
    assert (folder / "four").read_bytes() == server.get(PATTERN)[2]
    assert names(folder) == ["four"]


def test_a_part_file_is_resumed_only_if_it_is_of_the_same_version(start: Start, folder: Path) -> None:
    server = start()
    whole, etag = server.get(PATTERN)[2], server.get(PATTERN, method="HEAD")[1]["etag"]
    parts = {
        "every byte, not proven yet": (whole, etag),
        "another state of the file": (b"old" * 100, etag.replace("generated", "another")),
        "nothing is known of it": (b"old" * 100, None),
        "other bytes": (b"x" * 100, etag),
    }
    for name, (content, tag) in parts.items():
        (folder / f"{name}.part").write_bytes(content)
        if tag is not None:
            (folder / f"{name}.part.etag").write_text(tag)
    first, second, third, fourth = parts
    assert run(server, folder, *(f"download|{PATTERN}|{name}" for name in parts)) == (
        1,
        [f"{name}: 4,000,000 bytes, verified by SHA-256" for name in (first, second, third)],
        [
            "resuming at byte 4,000,000",
            "resuming at byte 100 of 4,000,000",
            f"streamlab: {fourth}: the SHA-256 does not match the server's; the file was deleted",
        ],
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        first: whole,
        second: whole,
        third: whole,
    }


def test_a_body_that_fails_verification_is_deleted(start: Start, folder: Path) -> None:
    server = start("[scenarios.export]\nenabled = false", tracebacks=True, liar=LIAR)
    digest = "the SHA-256 does not match the server's; the file was deleted"
    status, out, err = run(
        server, folder, "download|lie|", "export|||", "export|other||", "export|broken||", "export|none||"
    )
    assert (status, err) == (
        1,
        [
            f"streamlab: lie: {digest}",
            "streamlab: few.jsonl: received 2 rows, expected 3; the file was deleted",
            f"streamlab: other.jsonl: {digest}",
            f"streamlab: {server.url}/export/broken/jsonl?end=true: connection lost",
        ],
    )
    assert names(folder) == ["none.jsonl"]
    assert re.fullmatch(r"none.jsonl: 2 rows, 18 bytes in .* s \(.* MB/s\), verified by last chunk", out[0])
    assert (folder / "none.jsonl").read_bytes() == b'{"id":1}\n{"id":2}\n'


# -- events


def push(server: Running, *prices: dict[str, object]) -> None:
    body = "\n".join(map(json.dumps, prices)).encode()
    path, headers = "/stream/stock-ticker", {"Content-Type": "application/jsonl"}
    assert server.get(path, headers, method="POST", body=body)[0] == 202


def test_the_ticker_reconnects_after_the_server_was_killed(start: Start, folder: Path) -> None:
    port, config = free_port(), '[scenarios.ticker]\nsource = "push"'
    server = start(config, port=port)
    at = "2026-01-01T00:00:00Z"
    with begin(server.url, "ticker", cwd=folder) as process:
        reply(process, "ACME,BOLT", "4")
        server.wait_for_followers(1)
        push(
            server,
            {"symbol": "ACME", "price": 12.5, "time": at},
            {"symbol": "OTHER", "price": 1},
            {"symbol": "ACME", "price": 12.25, "time": "\x1b[31m\x9bred"},
        )
        assert process.stdout is not None
        shown = [process.stdout.readline() for _ in range(4)]
        server.terminate(signal.SIGKILL)
        server = start(config, port=port)
        push(server, {"symbol": "BOLT", "price": 3, "time": at}, {"symbol": "BOLT", "price": 4, "time": at})
        status, out, err = end(process)
    assert status == 0
    assert shown[2:] == [f"ACME 12.5 - {at}\n", "ACME 12.25 -0.25 \\x1b[31m\\x9bred\n"]
    assert out == [f"BOLT 3 - {at}", f"BOLT 4 +1 {at}"]
    assert all(" retrying in " in line for line in err)


def test_events_about_the_stream_are_shown_on_stderr(start: Start, folder: Path) -> None:
    server = start("[scenarios.ticker]\nenabled = false", odd=ODD)
    assert result(server.url, "ticker", cwd=folder, replies=["", ""], PYTHONIOENCODING="ascii") == (
        1,
        ["symbols, for example AAPL,MSFT [all]: ", "events [until Ctrl-C]: ", r"\xc4 1 - now"],
        [
            "gap: 3 events are no longer retained",
            "error: no source",
            r"streamlab: invalid event of /stream/stock-ticker: nonsense \x9b",
        ],
    )


def test_logs_are_filtered_and_show_no_control_character(start: Start, folder: Path, tmp_path: Path) -> None:
    lines = ["INFO begin a", "ERROR a \x1b[2Jfire", "WARNING b", "ERROR b", "CRITICAL a end"]
    (tmp_path / "app.log").write_text("".join(f"2026-01-01T00:00:0{n}Z {line}\n" for n, line in enumerate(lines)))
    server = start('[scenarios.logs.sources.app]\npath = "app.log"')
    status, out, err = run(server, folder, "logs|app|error|ERROR a|1", "logs|app|error| a|2", "logs|app|loud||")
    assert (status, out.pop(0)) == (1, r"2026-01-01T00:00:01Z ERROR a \x1b[2Jfire")
    assert out == [r"2026-01-01T00:00:01Z ERROR a \x1b[2Jfire", "2026-01-01T00:00:04Z CRITICAL a end"]
    assert err[0].startswith(f"streamlab: {server.url}/stream/live-logs?source=app&level=LOUD returned 422: ")


# -- exports, a chat, tasks, the comparison


def test_exports_are_written_counted_and_verified(start: Start, folder: Path) -> None:
    server = start(
        """
        [scenarios.export]
        sample_rows = 3000
        [scenarios.export.queries.notes]
        database = "sample"
        sql = "SELECT 'a \\"quoted\\"\\n line' AS note, 2 AS number UNION ALL SELECT '\\n\\"', 3"
        """
    )
    status, out, err = run(
        server, folder, "export|||", "export|users|70|some.csv", "export|notes||notes.csv", "export|users||users.xlsx"
    )
    assert (status, err) == (
        1,
        ["streamlab: users.xlsx: unknown format '.xlsx' (.csv or .jsonl)"],
    )
    written = {
        "users.jsonl": server.get("/export/users/jsonl")[2],
        "some.csv": server.get("/export/users/csv?limit=70")[2],
        "notes.csv": server.get("/export/notes/csv")[2],
    }
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    expected = [
        ("users.jsonl", "3,000", "row count and SHA-256"),
        ("some.csv", "70", "last chunk"),
        ("notes.csv", "2", "last chunk"),  # a line break in quotes ends no row
    ]
    for line, (name, rows, proof) in zip(out, expected, strict=True):
        pattern = rf"{name}: {rows} rows, {len(written[name]):,} bytes in \S+ s \(\S+ MB/s\), verified by {proof}"
        assert re.fullmatch(pattern, line), line


def test_a_conversation_includes_its_earlier_messages(start: Start, folder: Path) -> None:
    def respond(exchange: Exchange) -> None:
        texts = [message["content"] for message in exchange.body["messages"]]
        exchange.respond(
            event(f"heard {exchange.body['max_tokens']}: "), event("\x1b, ".join(texts)), FINISH, USED, DONE
        )

    with fake_upstream({"one": respond, "two": respond, "three": respond}) as upstream:
        server = start(f'[scenarios.llm]\nurl = "{upstream.url}"\nmodel = "{MODEL}"\n')
        status, out, err = result(server.url, cwd=folder, replies=["chat", "7", "one", "two", "", "quit"])
    assert (status, err) == (0, [])
    assert out[10:15] == [
        "maximum tokens of a response [200]: 7",
        "you: one",
        "heard 7: one",
        "you: two",
        r"heard 7: one\x1b, heard 7: one\x1b, two",
    ]


def test_a_task_is_run_and_reports_why_it_fails(start: Start, folder: Path) -> None:
    server = start()
    status, out, err = run(
        server, folder, "task|rehearsal|steps=2 delay=0.01", "task|rehearsal|fail_at=1 delay=0", "task||steps=0"
    )
    failure = "streamlab: the task is failed: Step 1 failed, as requested."
    assert (status, out, err[:-1]) == (1, ["{", ' "steps": 2', "}"], ["rehearsing", "rehearsing", failure])
    assert err[-1].startswith(f"streamlab: {server.url}/process/tasks returned 422: ")


def test_the_comparison_is_drawn_as_bars(start: Start, folder: Path) -> None:
    server = start()
    status, out, err = run(server, folder, "comparison|1000|1")
    assert (status, len(err)) == (0, 6)
    assert err[0] == "measuring 10 rows, buffered"
    title, heading, *rows, verdict = out
    assert (title.rstrip(), heading.split()) == (
        "measured",
        ["rows", "mode", "first", "byte", "total", "peak", "memory"],
    )
    sizes = [tuple(row.split()[:2]) for row in rows]
    assert sizes == [(count, way) for count in ("10", "100", "1,000") for way in ("buffered", "streamed")]
    assert verdict.startswith("Streaming ")
    waits = [re.search(r"([\d,.]+) ms (█*)", row) for row in rows]
    bars = [(float(wait[1].replace(",", "")), len(wait[2])) for wait in waits if wait is not None]
    assert len(bars) == 6
    assert max(bars)[1] == 16, "the longest has all cells there are"
    assert [cells for _, cells in sorted(bars)] == sorted(cells for _, cells in bars)


# -- a terminal


class Terminal:
    """The command in its own terminal."""

    def __init__(self, server: Running, folder: Path, *names: str) -> None:
        self._master, slave = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamlab", "client", "--url", server.url, *names],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
            cwd=folder,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal, for Ctrl-C
        )
        os.close(slave)

    def wait_for(self, pattern: str) -> str:
        """Return the output up to a match of `pattern`; the rest is for the next call."""
        while (found := re.search(pattern, self.shown, re.DOTALL)) is None:
            try:
                self.shown += os.read(self._master, 65536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"no {pattern!r} in {self.shown!r}") from None
        shown, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return shown

    def interrupt_question(self) -> None:
        """Press Ctrl-C at a question; again, where the first came after the question and before `input` listened."""
        self.shown = ""
        self.type("\x03")
        while "\n" not in self.shown:
            if select.select([self._master], [], [], 1)[0]:
                self.shown += os.read(self._master, 65536).decode(errors="replace")
            else:
                self.type("\x03")

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def opening(server: Running, *names: str) -> Terminal:
        opened.append(Terminal(server, folder, *names))
        return opened[-1]

    yield opening
    for one in opened:
        one.close()


def test_views_are_drawn_live_and_ctrl_c_leads_back_to_the_menu(
    start: Start, folder: Path, terminal: Callable[..., Terminal]
) -> None:
    port, config = free_port(), '[scenarios.ticker]\nsource = "push"\n[scenarios.export]\nsample_rows = 10\n'
    server = start(config, port=port)
    shown = terminal(server)
    shown.wait_for("quit.*view: ")
    shown.type("ticker\n\n\n")
    shown.wait_for("0 symbols, 0.0 events/s")
    server.wait_for_followers(1)
    push(server, {"symbol": "ACME", "price": 12.5, "time": "\x1b]0;title\x07"}, {"symbol": "ACME", "price": 13})
    shown.wait_for(r"1 symbols, \d.*ACME.* 13 .*\+0\.5")
    assert "\x1b]0;" not in shown.shown
    server.terminate(signal.SIGKILL)
    server = start(config, port=port)
    shown.wait_for("retrying in")
    server.wait_for_followers(1)
    push(server, {"symbol": "BOLT", "price": 7})
    shown.wait_for("2 symbols.*BOLT")
    shown.type("\x03")
    shown.wait_for(r"\[stopped\].*quit.*view: ")

    shown.type(f"3\n{PATTERN}&rate=4000000\nfour\n")
    shown.wait_for(r"four.*━.*4\.0 MB.*four: 4,000,000 bytes, verified by SHA-256.*view: ")
    assert (folder / "four").read_bytes() == server.get(PATTERN)[2]
    shown.type("export\n")
    shown.wait_for(r"which of data, results, users \[users\]: ")
    shown.interrupt_question()
    shown.wait_for(r"\[stopped\].*view: ")
    shown.interrupt_question()
    assert shown.process.wait(10) == 130
