"""The logs scenario on the process that `make run` starts: real files and commands, followed by real clients."""

import gzip
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.connections import EventStream, Received
from tests.support.latency import assert_health_is_prompt_during
from tests.support.servers import Running, run_streamlab, starting_in

LOADED_PLUGINS = ("logs",)

CONFIG = """
    [scenarios.ticker]
    enabled = false
    [scenarios.logs]
    demo = false
    server = false
    [scenarios.logs.sources.app]
    path = "logs/app.log"
"""

LIVE = "/stream/live-logs"


@pytest.fixture
def app_log(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "app.log"


def write(path: Path, *lines: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def texts(events: Sequence[Received]) -> list[str]:
    """Return the lines of events; the names of events about the log itself are in brackets."""
    return [f"[{event.event}]" if event.event else event.json["line"] for event in events]


def followed(server: Running, query: str, count: int, **options: Any) -> list[Received]:
    with EventStream(server, f"{LIVE}?{query}", **options) as stream:
        return stream.take(count)


# -- following


def test_a_stream_starts_with_the_last_lines_and_continues_with_new_ones(
    start: Callable[..., Running], app_log: Path
) -> None:
    write(app_log, *(f"line {number}" for number in range(30)))
    server = start(CONFIG)
    followed(server, "source=app&tail=1", 1)  # the file has been read
    with EventStream(server, LIVE) as stream:
        assert texts(stream.take(10)) == [f"line {number}" for number in range(20, 30)]
        write(app_log, "line 30", "line 31")
        assert texts(stream.take(2)) == ["line 30", "line 31"]
    with EventStream(server, f"{LIVE}?tail=0") as stream:
        write(app_log, "line 32")
        assert texts(stream.take(1)) == ["line 32"]


def test_an_event_has_the_level_time_and_file_of_its_line(start: Callable[..., Running], app_log: Path) -> None:
    record = "2026-11-25T10:00:00.5+02:00 ERROR shop.payment refused\n"
    traceback = 'Traceback (most recent call last):\n  File "x.py", line 1, in y\nValueError: no\n'
    app_log.write_text(record + traceback + "plain\xe9\x00\n", encoding="latin-1")
    server = start(CONFIG)
    events = followed(server, "tail=5", 5)
    host = events[0].json["host"]
    assert events[0].json == {
        "source": "app",
        "file": "app.log",
        "level": "ERROR",
        "time": "2026-11-25T08:00:00.500Z",
        "line": record.rstrip(),
        "host": host,
    }
    assert [event.json["level"] for event in events[:4]] == ["ERROR"] * 4, "a traceback has the level of its record"
    assert events[4].json["line"] == "plain\ufffd\x00"


def test_rotation_is_reported_and_no_line_is_lost(start: Callable[..., Running], app_log: Path) -> None:
    write(app_log, "one")
    server = start(CONFIG)
    with EventStream(server, LIVE) as stream:
        assert texts(stream.take(1)) == ["one"]
        write(app_log, "two")
        app_log.rename(app_log.with_name("app.log.1"))
        write(app_log, "three")
        assert texts(stream.take(3)) == ["two", "[rotated]", "three"]
        shutil.copy(app_log, app_log.with_name("app.log.2"))
        os.truncate(app_log, 0)
        write(app_log, "four")
        rest = stream.take(2)
        assert texts(rest) == ["[truncated]", "four"]
        assert rest[0].json["complete"] is True


def test_a_stream_waits_for_a_file_that_does_not_exist_yet(start: Callable[..., Running], tmp_path: Path) -> None:
    server = start(CONFIG)
    with EventStream(server, LIVE) as stream:
        (tmp_path / "logs").mkdir()
        (event,) = stream.take(1)
        assert (event.event, event.json["reason"]) == ("unreadable", "there is no file app.log")
        write(tmp_path / "logs" / "app.log", "at last")
        assert texts(stream.take(2)) == ["[readable]", "at last"]


def test_a_line_of_a_megabyte_is_one_event(start: Callable[..., Running], app_log: Path) -> None:
    long = "x" * 1_000_000
    write(app_log, "before")
    server = start(CONFIG)
    with EventStream(server, LIVE) as stream:
        assert texts(stream.take(1)) == ["before"]
        write(app_log, long, "after")
        assert texts(stream.take(2)) == [long, "after"]
        write(app_log, long + "é" * 200_000)
        chunks = stream.take(2)
    assert [chunk.json.get("continued", False) for chunk in chunks] == [True, False]
    assert "".join(texts(chunks)) == long + "é" * 200_000


# -- resuming


def test_every_line_is_sent_once_across_killed_servers_and_rotations(
    start: Callable[..., Running], app_log: Path
) -> None:
    write(app_log, "0")
    server = start(CONFIG)
    seen: list[Received] = []
    last = "0-0"
    number = 1
    for _ in range(3):
        with EventStream(server, LIVE, after=last) as stream:
            for event in stream:
                if event.event != "gap":
                    seen.append(event)
                if event.event == "" and event.json["line"] == str(number - 1):
                    break
            write(app_log, *(str(n) for n in range(number, number + 50)))
            seen += stream.take(10)
            server.process.kill()
        server.process.wait()
        last = seen[-1].id
        write(app_log, *(str(n) for n in range(number + 50, number + 60)))
        app_log.rename(app_log.with_name(f"app.log.{number}"))
        write(app_log, *(str(n) for n in range(number + 60, number + 70)))
        number += 70
        server = start(CONFIG)
    with EventStream(server, LIVE, after=last) as stream:
        for event in stream:
            seen.append(event)
            if event.event == "" and event.json["line"] == str(number - 1):
                break
    assert [text for text in texts(seen) if text != "[rotated]"] == [str(n) for n in range(number)]
    assert texts(seen).count("[rotated]") == 3
    assert len({event.id for event in seen}) == len(seen)


def test_two_servers_that_share_a_log_read_a_file_once(start: Callable[..., Running], app_log: Path) -> None:
    write(app_log, "one")
    servers = [start(CONFIG), start(CONFIG)]
    assert [texts(followed(server, "tail=5", 1)) for server in servers] == [["one"], ["one"]]
    with EventStream(servers[0], f"{LIVE}?tail=0") as first, EventStream(servers[1], f"{LIVE}?tail=0") as second:
        write(app_log, "two", "three")
        events = first.take(2)
        assert texts(events) == ["two", "three"]
        assert second.take(2) == events


# -- filters

LINES = (
    "2026-11-25T10:00:00Z DEBUG a debugging",
    "2026-11-25T10:01:00Z INFO a user=1 ok",
    "2026-11-25T10:02:00Z WARNING a user=2 slow",
    "2026-11-25T10:03:00Z ERROR a user=1 failed",
    "  because of this",
    "2026-11-25T10:04:00Z CRITICAL a user=12 burning",
)


@pytest.fixture(scope="module")
def filtered_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with these lines in its log, for the tests that only read them."""
    base = tmp_path_factory.mktemp("filtered")
    (base / "logs").mkdir()
    write(base / "logs" / "app.log", *LINES)
    with starting_in(base) as start:
        server = start(CONFIG)
        followed(server, "tail=6", 6)
        yield server


@pytest.mark.parametrize(
    ("query", "selected"),
    [
        ("level=INFO", [1, 2, 3, 4, 5]),
        ("level=ERROR", [3, 4, 5]),
        ("grep=user%3D1%5Cb", [1, 3]),
        ("grep=(%3Fi)BECAUSE", [4]),
        ("grep=user&level=ERROR", [3, 5]),
        ("since=2026-11-25T10:03:00Z", [3, 4, 5]),
        ("since=2026-11-25T12:03:00%2B02:00", [3, 4, 5]),
        ("since=2026-11-25T12:03:00+02:00", [3, 4, 5]),
        ("since=1795600980", [3, 4, 5]),
        ("since=2026-11-25T10:01:30Z&tail=2", [4, 5]),
        ("tail=2&grep=user", [3, 5]),
    ],
)
def test_stream_and_download_select_the_same_lines(filtered_log: Running, query: str, selected: list[int]) -> None:
    wanted = [LINES[number] for number in selected]
    past = "" if "tail" in query or "since" in query else "&tail=100"
    assert texts(followed(filtered_log, f"{query}{past}", len(wanted))) == wanted
    if "tail" not in query:
        status, headers, body = filtered_log.get(f"/logs/download?source=app&{query}")
        assert (status, body.decode()) == (200, "".join(f"{line}\n" for line in wanted))
        assert headers["content-disposition"] == 'attachment; filename="app.log"'


def test_a_download_contains_rotated_files_and_can_be_compressed(start: Callable[..., Running], app_log: Path) -> None:
    app_log.with_name("app.log.2").write_bytes(b"1\n2\r\n\xff\xfe\n")
    app_log.with_name("app.log.1").write_bytes(b"3\nhalf")
    app_log.with_name("app.log.3.gz").write_bytes(gzip.compress(b"0\n"))
    app_log.write_bytes(b"4\n" + b"y" * 3_000_000 + b"\nlast")
    for number, name in enumerate(("app.log.2", "app.log.1", "app.log")):
        os.utime(app_log.with_name(name), (1000 + number, 1000 + number))
    server = start(CONFIG)
    everything = b"1\n2\r\n\xff\xfe\n3\nhalf\n4\n" + b"y" * 3_000_000 + b"\nlast\n"
    assert server.get("/logs/download")[2] == everything
    _, headers, body = server.get("/logs/download", {"Accept-Encoding": "gzip"})
    assert (headers["content-encoding"], gzip.decompress(body)) == ("gzip", everything)
    assert server.get("/logs/download?grep=yy")[2] == b"y" * 3_000_000 + b"\n"


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("source=nothing", "source"),
        ("source=..%2Fetc", "source"),
        ("grep=(", "grep"),
        ("grep=(%3F%3Da)", "grep"),
        ("grep=(a)%5C1", "grep"),
        ("grep=((a%7B1000%7D)%7B1000%7D)%7B1000%7D", "grep"),
        (f"grep={'a' * 1001}", "grep"),
        ("level=LOUD", "level"),
        ("level=info", "level"),
        ("since=yesterday", "since"),
        ("since=99999-01-01", "since"),
        ("since=5y", "since"),
        ("since=%D9%A1%D9%A5m", "since"),
        ("since=%D9%A1%D9%A7", "since"),
        ("colour=red", "colour"),
    ],
)
def test_an_invalid_parameter_is_422_with_its_name(filtered_log: Running, query: str, name: str) -> None:
    for path in (LIVE, "/logs/download"):
        status, _, body = filtered_log.get(f"{path}?{query}")
        assert (status, [error["name"] for error in json.loads(body)["errors"]]) == (422, [name])
    for wrong in ("tail=-1", "tail=10001", "limit=0", "limit=x"):
        assert filtered_log.get(f"{LIVE}?{wrong}")[0] == 422


def test_a_hostile_pattern_does_not_block_the_server(start: Callable[..., Running], app_log: Path) -> None:
    write(app_log, "a" * 5000 + "!")  # minutes for an engine that backtracks
    server = start(CONFIG)
    followed(server, "tail=1", 1)
    begun = time.monotonic()
    with EventStream(server, f"{LIVE}?grep=(a%2B)%2B%24&tail=1") as stream:
        write(app_log, "b" + "a" * 100)
        assert texts(stream.take(1)) == ["b" + "a" * 100]
    assert server.get("/logs/download?grep=(a*)*b%24")[2] == b""
    assert time.monotonic() - begun < 5


COSTLY = "|".join(["[a-z]{1,50}q"] * 70)
"""A pattern that takes half a second for a line of 8 kB: its automaton has too many states for any memory limit."""


def test_costly_patterns_of_many_followers_do_not_delay_other_clients(
    start: Callable[..., Running], app_log: Path
) -> None:
    """An attack with twenty patterns that are too large, a hundred that are not, and lines of 8 kB."""
    write(app_log, "begun")
    server = start(CONFIG)
    followed(server, "tail=1", 1)
    lines = ["ab" * 4000, "abcdefghijklmnop" * 500]

    def attack() -> None:
        with ExitStack() as stack:
            follow = partial(EventStream, server, timeout=60)
            for number in range(20):
                status, _, body = server.get(f"{LIVE}?grep={number}%7C{quote(COSTLY)}")
                assert (status, json.loads(body)["errors"][0]["name"]) == (422, "grep")
            for number in range(99):
                pattern = quote(f"[ab][^c]{{150}}x{number}$")
                stream = stack.enter_context(follow(f"{LIVE}?tail=0&grep={pattern}"))
                assert stream.status == 200
            plain = stack.enter_context(follow(f"{LIVE}?tail=0&grep=a"))
            write(app_log, *lines)
            assert texts(plain.take(2)) == lines

    assert_health_is_prompt_during(server, attack)


def test_rejected_patterns_are_cheap(start: Callable[..., Running], app_log: Path) -> None:
    """Each pattern would take 50 ms to compile."""
    write(app_log, "begun")
    server = start(CONFIG)

    def attack() -> None:
        paths = [f"{LIVE}?grep=" + quote(f"{number}" + r"\pL" * 300) for number in range(100)]
        with ThreadPoolExecutor(20) as clients:
            assert {status for status, *_ in clients.map(server.get, paths)} == {422}

    assert_health_is_prompt_during(server, attack)


# -- sources


def test_the_demo_log_needs_no_configuration(start: Callable[..., Running]) -> None:
    server = start("[scenarios.ticker]\nenabled = false")
    first = followed(server, "tail=1", 2)
    assert {event.json["source"] for event in first} == {"demo"}
    assert all(event.json["level"] for event in first)
    assert (server.base / "var/demo/service.log").is_file()


def test_following_the_server_s_own_log_does_not_add_lines_to_it(start: Callable[..., Running]) -> None:
    server = start("[scenarios.ticker]\nenabled = false\n[scenarios.logs]\ndemo = false")
    with EventStream(server, f"{LIVE}?source=server&grep=path%3D/nowhere&tail=0") as stream:
        server.get("/nowhere")
        (event,) = stream.take(1)
        assert event.json.get("level") == "INFO", event
    lines = server.complete_log().count("\n")
    assert followed(server, "source=server&tail=1", 1)
    assert server.complete_log().count("\n") - lines <= 3


def test_a_server_without_a_log_file_does_not_serve_its_own_log(start: Callable[..., Running]) -> None:
    server = start('[server]\nlog_file = ""\n[scenarios.ticker]\nenabled = false')
    status, _, body = server.get(f"{LIVE}?source=server")
    assert (status, "known: demo" in body.decode()) == (422, True)


COMMAND = """
    import os, sys, time
    print("begun", os.getpid(), flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    sys.stdout.write("half"); sys.stdout.flush()
    if "--end" in sys.argv:
        sys.exit(3)
    time.sleep(1000)
"""


def test_a_command_s_lines_are_followed_and_it_is_restarted_when_it_ends(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    (tmp_path / "talk.py").write_text("\n".join(line[4:] for line in COMMAND.splitlines()))
    words = json.dumps([sys.executable, str(tmp_path / "talk.py"), "--end"])
    server = start(CONFIG + f"[scenarios.logs.sources.talk]\ncommand = {words}\n")
    events = followed(server, "source=talk&since=0", 8)
    begun, *rest = texts(events)
    assert begun.startswith("begun ")
    assert rest[:3] == ["to stderr", "half", "[exited]"]
    assert events[3].json["status"] == 3
    assert server.get("/logs/download?source=talk&grep=stderr")[2].startswith(b"to stderr\nto stderr\n")
    assert rest[3].startswith("begun ")
    assert rest[3] != begun


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_ends_with_the_server(start: Callable[..., Running], tmp_path: Path, number: int) -> None:
    (tmp_path / "talk.py").write_text("\n".join(line[4:] for line in COMMAND.splitlines()))
    command = f"{sys.executable} {tmp_path}/talk.py"
    server = start(CONFIG + f"[scenarios.logs.sources.talk]\ncommand = {json.dumps(command)}\n")
    (event,) = followed(server, "source=talk&since=0", 1)
    pid = int(event.json["line"].split()[1])
    assert Path(f"/proc/{pid}").exists() or sys.platform != "linux"
    assert server.terminate(number)[0] == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_command_that_cannot_be_started_is_logged_and_does_not_affect_other_sources(
    start: Callable[..., Running], app_log: Path
) -> None:
    write(app_log, "one")
    server = start(CONFIG + '[scenarios.logs.sources.talk]\ncommand = "/no/such/program"\n')
    server.wait_for_log("the command program cannot be started: No such file or directory")
    assert texts(followed(server, "source=app", 1)) == ["one"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[scenarios.logs.sources.a]\n", "scenarios.logs.sources.a - a source needs either a path or a command"),
        ('[scenarios.logs.sources.a]\npath = "x"\ncommand = "y"\n', "a source has both a path and a command"),
        ('[scenarios.logs.sources.a]\npaht = "x"\n', "did you mean 'path'?"),
        ('[scenarios.logs.sources."A B"]\npath = "x"\n', "scenarios.logs.sources.A B"),
    ],
)
def test_an_invalid_source_is_rejected_at_the_start(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(table)
    status, _, output = run_streamlab("check", cwd=tmp_path)
    assert status == 2
    assert message in output


# -- logs that cannot be read

UNPRIVILEGED = '''
    """Drop the capabilities that let root read every file: a service of an ordinary user does not have them."""

    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, capabilities) == 0
    capabilities[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of the effective set
    assert libc.capset(header, capabilities) == 0
'''

linux = pytest.mark.skipif(sys.platform != "linux", reason="takes capabilities from a process")


def rejection(server: Running, path: str) -> tuple[int, str]:
    status, headers, body = server.get(path)
    assert headers["content-type"].startswith("application/problem+json")
    assert str(server.base) not in body.decode()
    return status, json.loads(body)["detail"]


def health(server: Running) -> tuple[str, str]:
    report = json.loads(server.get("/health")[2])
    return report["status"], report["scenarios"]["logs"].get("reason", "")


@linux
def test_a_log_without_permission_is_403_until_it_is_readable(start: Callable[..., Running], app_log: Path) -> None:
    write(app_log, "secret")
    app_log.chmod(0)
    server = start(CONFIG, unprivileged=UNPRIVILEGED)
    reason = "app.log cannot be read: Permission denied"
    assert health(server) == ("degraded", f"app: {reason}")
    for path in (LIVE, "/logs/download", f"{LIVE}?grep=x", "/logs/download?grep=x"):
        assert rejection(server, path) == (403, f"This log cannot be read: {reason}.")
    app_log.chmod(0o600)
    with EventStream(server, f"{LIVE}?tail=5") as stream:
        assert (stream.status, texts(stream.take(3))) == (200, ["[unreadable]", "[readable]", "secret"])
    assert server.get("/logs/download")[::2] == (200, b"secret\n")
    assert health(server) == ("ok", "")


@linux
def test_a_log_that_becomes_unreadable_reports_it_in_band(start: Callable[..., Running], app_log: Path) -> None:
    write(app_log, "one")
    server = start(CONFIG, unprivileged=UNPRIVILEGED)
    with EventStream(server, LIVE) as stream:
        assert texts(stream.take(1)) == ["one"]
        app_log.unlink()
        event = next(event for event in stream if event.event == "unreadable")
        assert (event.json["source"], event.json["reason"]) == ("app", "there is no file app.log")
        assert health(server) == ("degraded", "app: there is no file app.log")
        write(app_log, "two")
        assert [text for text in texts(stream.take(3)) if text != "[rotated]"] == ["[readable]", "two"]


def test_a_download_of_a_missing_log_is_404_and_a_missing_command_is_503(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    command = '[scenarios.logs.sources.talk]\ncommand = "/no/such/program -f"\n'
    server = start(CONFIG + command + '[scenarios.logs.sources.many]\npath = "logs/*.txt"\n')
    assert rejection(server, "/logs/download") == (404, "This log cannot be read: there is no file app.log.")
    assert rejection(server, "/logs/download?source=many") == (404, "This log cannot be read: there is no file *.txt.")
    for path in (LIVE, "/logs/download"):
        reason = "This log cannot be read: the command program cannot be started: it was not found."
        assert rejection(server, f"{path}?source=talk") == (503, reason)
    status, out, err = run_streamlab("check", cwd=tmp_path)
    assert (status, "logs: 3 faults" in out.splitlines()) == (2, True)
    key, folder = "config.toml: scenarios.logs.sources", tmp_path / "logs"
    assert err.splitlines() == [
        f"{key}.app.path - {folder}/app.log: there is no file app.log",
        f"{key}.talk.command - /no/such/program -f: the command program cannot be started: it was not found",
        f"{key}.many.path - {folder}/*.txt: there is no file *.txt",
        "streamlab: 3 faults; nothing was started",
    ]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "app.log").touch()
    assert server.get("/logs/download")[::2] == (200, b"")  # readable and empty
