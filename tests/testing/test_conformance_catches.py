"""The conformance suite finds defects: valid plugins pass, and each plugin with one defect fails its case."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from streamlab.testing import EndpointForm
from streamlab.testing.samples import MISSING
from tests.support.pytest_runs import OPTIONS
from tests.support.servers import write_plugins

LINES = r'''
"""Lines of text, one after the other."""

import asyncio

from aiohttp import web
from pydantic import BaseModel, Field, PrivateAttr

from streamlab import Scenario, endpoint, hookimpl, open_stream


class Query(BaseModel):
    times: int = Field(30, ge=1, le=1_000_000)
    width: int = Field(6, ge=1, le=20_000)
    word: str = Field("", max_length=500)


class Lines(Scenario):
    _held: list = PrivateAttr(default_factory=list)

    @endpoint("GET", "/lines", query=Query, sends="text/plain")
    async def lines(self, request: web.Request, query: Query) -> web.StreamResponse:
        """Send lines, with a pause between those that are short."""
        async with open_stream(request, "text/plain") as response:
            for number in range(query.times):
                line = f"{number}".rjust(query.width).encode() + b"\n"
                await response.write(line)
                await asyncio.sleep(0.05 if query.width < 100 else 0.001)
        return response

    @endpoint("POST", "/lines", body=Query, sends="application/json", curl="{url}")
    async def count(self, request, body):
        """Count the bytes that the lines would have."""
        return web.json_response({"bytes": body.times * (body.width + 1)})


@hookimpl
def register_scenarios():
    return [Lines]
'''

EVENTS = r'''
"""Numbers, as events."""

import asyncio
import json
import re

from aiohttp import web
from pydantic import BaseModel, Field

from streamlab import Scenario, endpoint, hookimpl, open_event_stream


class Query(BaseModel):
    to: int = Field(20, ge=1, le=1_000_000)
    word: str = Field("", max_length=500)
    last_event_id: str = Field("", max_length=300)


class Events(Scenario):
    @endpoint("GET", "/events", query=Query, sends="text/event-stream", responses={204: "You have the end."})
    async def events(self, request: web.Request, query: Query) -> web.StreamResponse:
        """Count up to a number."""
        last = request.headers.get("Last-Event-ID") or query.last_event_id
        known = re.fullmatch(r"c-([0-9]{1,6})", last)
        number = int(known[1]) if known else 0
        if number > query.to:
            return web.Response(status=204)
        async with open_event_stream(request) as stream:
            stream.event_id = lambda kind: f"c-{number}.{kind}"
            if last and not known:
                await stream.write(b'id: c-0\nevent: gap\ndata: {"missing":null}\n\n')
            while number < query.to:
                number += 1
                data = json.dumps({"number": number, "word": query.word})
                await stream.write(f"id: c-{number}\ndata: {data}\n\n".encode())
                await asyncio.sleep(0.05)
            await stream.write(f"id: c-{number + 1}\nevent: end\ndata: {{}}\n\n".encode())
        return stream


@hookimpl
def register_scenarios():
    return [Events]
'''

DOWNLOAD = r'''
"""A file, and its parts."""

import re

from aiohttp import web

from streamlab import Problem, Scenario, endpoint, hookimpl, open_stream

BODY = bytes(range(200))


class Download(Scenario):
    @endpoint("GET", "/download", sends="application/octet-stream",
              responses={206: "A part.", 304: "You have it.", 412: "It has changed.", 416: "It has no such part."})
    async def download(self, request: web.Request) -> web.StreamResponse:
        """Send the file, or the requested part."""
        tag, size = '"one"', len(BODY)
        headers = {"Accept-Ranges": "bytes", "ETag": tag}
        if request.headers.get("If-Match", tag) != tag:
            raise Problem(412, "It has changed.")
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        begin, end, status = 0, size, 200
        part = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", request.headers.get("Range", ""))
        if part and part[0] != "bytes=-" and request.headers.get("If-Range", tag) == tag and request.method == "GET":
            begin = int(part[1]) if part[1] else size - int(part[2])
            end = min(int(part[2]) + 1, size) if part[1] and part[2] else size
            if begin >= size:
                raise Problem(416, "It has no such part.", headers={"Content-Range": f"bytes */{size}"})
            status, headers["Content-Range"] = 206, f"bytes {begin}-{end - 1}/{size}"
        async with open_stream(
            request, "application/octet-stream", status=status, headers=headers, length=end - begin
        ) as stream:
            await stream.write(BODY[begin:end])
        return stream


@hookimpl
def register_scenarios():
    return [Download]
'''


NOTES = r'''
"""Notes of clients."""

import secrets

from aiohttp import web
from pydantic import BaseModel, Field, PrivateAttr

from streamlab import ANY, PRINCIPAL, Problem, Scenario, Scope, endpoint, hookimpl, require_own


class Note(BaseModel):
    text: str = Field("", max_length=100, examples=["Hello"])


class NotePath(BaseModel):
    id: str = Field(max_length=32, examples=["0"])


class Notes(Scenario):
    _stored: dict = PrivateAttr(default_factory=dict)

    @endpoint("POST", "/notes", body=Note, sends="application/json", responses={201: "Stored."}, curl="{url}")
    async def write(self, request: web.Request, body: Note) -> web.Response:
        """Store a note."""
        if len(self._stored) >= 1000:
            raise Problem(503, "Too many notes.", headers={"Retry-After": "60"})
        id = secrets.token_hex(16)
        self._stored[id] = request[PRINCIPAL].name, body.text
        return web.json_response({"id": id}, status=201)

    @endpoint("GET", "/notes/{id}", path_model=NotePath, resource=ANY, sends="text/plain")
    async def read(self, request: web.Request, path: NotePath) -> web.Response:
        """Return a note to the client that stored it."""
        if path.id not in self._stored:
            raise Problem(404, "There is no such note.")
        owner, text = self._stored[path.id]
        require_own(request, owner, Scope(self.name, "read", path.id), "There is no such note.")
        return web.Response(text=text)


@hookimpl
def register_scenarios():
    return [Notes]
'''


class Defect(NamedTuple):
    """A valid plugin, the text to replace in it, and the case that must fail then."""

    case: str
    valid: str
    old: str
    new: str


WRITE = "                await response.write(line)\n"
OPEN = '        async with open_stream(request, "text/plain") as response:\n'
BARE = "        response = web.StreamResponse(headers={'Content-Type': 'text/plain'})\n"
PAUSE = "                await asyncio.sleep(0.05 if query.width < 100 else 0.001)\n"
EVENT = r'await stream.write(f"id: c-{number}\ndata: {data}\n\n".encode())'
END = r'await stream.write(f"id: c-{number + 1}\nevent: end'
SENT = EVENTS[EVENTS.index("async with open_event_stream") : EVENTS.index(END) + len(END)]

DEFECTS = {
    # -- every endpoint
    "another_type_than_declared": Defect(
        "responds_as_described", LINES, 'open_stream(request, "text/plain")', 'open_stream(request, "application/xml")'
    ),
    "buffered_by_proxies": Defect(
        "stream_is_neither_cached_nor_buffered",
        LINES,
        OPEN,
        BARE + "        await response.prepare(request)\n        if True:\n",
    ),
    "compressed_by_proxies": Defect(
        "stream_is_neither_cached_nor_buffered",
        EVENTS,
        "open_event_stream(request",
        'open_event_stream(request, headers={"Cache-Control": "no-store"}',
    ),
    "different_head": Defect(
        "head_has_the_headers_of_get",
        LINES,
        OPEN,
        '        if request.method == "HEAD":\n            return web.Response(text="")\n' + OPEN,
    ),
    "chunks_for_http_1_0": Defect(
        "http_1_0_has_no_chunks",
        LINES,
        OPEN,
        BARE + "        response.enable_chunked_encoding()\n"
        "        await response.prepare(request)\n        if True:\n",
    ),
    "undeclared_method": Defect(
        "other_methods_are_rejected",
        LINES,
        '    @endpoint("POST", "/lines", body',
        '    @endpoint("DELETE", "/{any:.*}", sends="text/plain")\n    async def all(self, request):\n'
        '        return web.Response(text="fine")\n\n    @endpoint("POST", "/lines", body',
    ),
    "accepts_any_parameter": Defect(
        "unknown_parameters_are_rejected_by_name",
        LINES,
        "class Query(BaseModel):\n",
        'class Query(BaseModel, extra="allow"):\n',
    ),
    "accepts_any_value": Defect(
        "invalid_values_are_rejected_by_name",
        LINES,
        "    times: int = Field(30, ge=1, le=1_000_000)\n",
        "    times: Annotated[int, BeforeValidator(lambda text: text if str(text).isdigit() else 1)] = "
        "Field(30, ge=0, le=1_000_000)\n",
    ),
    "accepts_any_body": Defect(
        "invalid_bodies_are_rejected",
        LINES,
        'body=Query, sends="application/json", curl="{url}")\n    async def count(self, request, body):\n',
        'takes="application/json", sends="application/json", curl="--json {} {url}")\n'
        "    async def count(self, request):\n        body = Query(**await request.json())\n",
    ),
    "number_without_bound": Defect(
        "numbers_have_bounds", LINES, "    times: int = Field(30, ge=1, le=1_000_000)\n", "    times: int = 30\n"
    ),
    "text_becomes_fields": Defect(
        "client_text_cannot_forge_output", EVENTS, EVENT, EVENT.replace("{data}", "{query.word}")
    ),
    "text_becomes_a_failure": Defect(
        "client_text_cannot_forge_output", LINES, OPEN, "        query.word.encode('ascii')\n" + OPEN
    ),
    "compressed_without_vary": Defect(
        "compression_is_negotiated",
        LINES,
        OPEN,
        '        if "gzip" in request.headers.get("Accept-Encoding", ""):\n'
        '            return web.Response(body=gzip.compress(b""), headers={"Content-Encoding": "gzip"})\n' + OPEN,
    ),
    # -- access
    "public_by_mistake": Defect(
        "credentials_with_the_scope_are_required",
        LINES,
        '"/lines", query=Query, sends="text/plain"',
        '"/lines", query=Query, public=True, sends="text/plain"',
    ),
    "public_and_changes_something": Defect(
        "credentials_with_the_scope_are_required",
        LINES,
        'body=Query, sends="application/json"',
        'body=Query, public=True, sends="application/json"',
    ),
    "readers_change_something": Defect(
        "credentials_with_the_scope_are_required",
        LINES,
        'body=Query, sends="application/json"',
        'body=Query, action="read", sends="application/json"',
    ),
    "works_for_rejected_requests": Defect(
        "credentials_with_the_scope_are_required",
        LINES,
        '    @endpoint("POST", "/lines", body',
        "    error_formats = (ErrorFormat('/lines', 'application/problem+json', Query, lambda problem: (\n"
        "        threading.Thread(target=threading.Event().wait, daemon=True).start(), problem)[1]),)\n\n"
        '    @endpoint("POST", "/lines", body',
    ),
    "reads_notes_of_others": Defect(
        "what_another_client_created_does_not_exist",
        NOTES,
        '        require_own(request, owner, Scope(self.name, "read", path.id), "There is no such note.")\n',
        "",
    ),
    "goes_on_without_permission": Defect(
        "stream_ends_with_its_token",
        EVENTS,
        "                await asyncio.sleep(0.05)\n",
        "                try:\n                    await asyncio.sleep(0.05)\n"
        "                except asyncio.CancelledError:\n                    pass\n",
    ),
    "farewell_of_its_own": Defect(
        "stream_ends_with_its_token",
        EVENTS,
        "                await asyncio.sleep(0.05)\n",
        "                try:\n                    await asyncio.sleep(0.05)\n"
        "                except asyncio.CancelledError:\n                    return stream\n",
    ),
    # -- streams
    "buffered": Defect(
        "first_byte_arrives_before_the_end",
        LINES,
        WRITE,
        "                self._held.append(line)\n"
        "                if number == query.times - 1:\n"
        '                    await response.write(b"".join(self._held))\n',
    ),
    "ignores_disconnects": Defect(
        "disconnected_client_stops_its_work",
        LINES,
        PAUSE,
        "                try:\n    " + PAUSE + "                except asyncio.CancelledError:\n"
        "                    await asyncio.sleep(4)\n",
    ),
    "leaks_tasks": Defect(
        "disconnected_client_stops_its_work",
        LINES,
        OPEN,
        "        self._held.append(asyncio.create_task(asyncio.sleep(3600)))\n" + OPEN,
    ),
    "leaks_files": Defect(
        "disconnected_client_stops_its_work", LINES, OPEN, "        self._held.append(open(__file__))\n" + OPEN
    ),
    "leaks_threads": Defect(
        "disconnected_client_stops_its_work",
        LINES,
        OPEN,
        "        threading.Thread(target=threading.Event().wait, daemon=True).start()\n" + OPEN,
    ),
    "leaks_children": Defect(
        "disconnected_client_stops_its_work",
        LINES,
        OPEN,
        '        self._held.append(subprocess.Popen(["sleep", "8"]))\n' + OPEN,
    ),
    "disconnect_is_a_failure": Defect(
        "disconnected_client_stops_its_work",
        LINES,
        PAUSE,
        "                try:\n    " + PAUSE + "                except asyncio.CancelledError:\n"
        "                    raise RuntimeError('the client has disconnected') from None\n",
    ),
    "ignores_back_pressure": Defect(
        "stalled_client_uses_bounded_resources",
        LINES,
        WRITE,
        "                if number < 3 or query.width < 100:\n    " + WRITE + "                else:\n"
        r"                    request.transport.write(b'%x\r\n%b\r\n' % (len(line), line))" + "\n",
    ),
    "polls_for_capacity": Defect(
        "stalled_client_uses_bounded_resources",
        LINES,
        WRITE,
        "                while request.transport.get_write_buffer_size():\n"
        "                    await asyncio.sleep(0)\n" + WRITE,
    ),
    "state_shared_by_all_clients": Defect(
        "concurrent_clients_get_the_same_response",
        LINES,
        "            for number in range(query.times):\n",
        "            self._held.clear()\n            while len(self._held) < query.times:\n"
        "                self._held.append(number := len(self._held))\n",
    ),
    "serializes_clients": Defect(
        "concurrent_clients_get_the_same_response",
        LINES,
        OPEN,
        "        self._held or self._held.append(asyncio.Lock())\n"
        '        async with open_stream(request, "text/plain") as response, self._held[0]:\n',
    ),
    "full_without_retry_after": Defect(
        "concurrent_clients_get_the_same_response",
        LINES,
        OPEN,
        '        if len(request.config_dict[STREAMS]) > 9:\n            raise Problem(503, "Full.")\n' + OPEN,
    ),
    "blocks_the_loop": Defect(
        "stream_does_not_block_other_requests",
        LINES,
        WRITE,
        WRITE + "                if number % 300 == 0 and query.width > 100:\n                    time.sleep(1.5)\n",
    ),
    # -- event streams
    "data_is_not_json": Defect("events_are_complete", EVENTS, EVENT, EVENT.replace("{data}", "number {number}")),
    "unknown_field": Defect("events_are_complete", EVENTS, EVENT, EVENT.replace("data: ", r"time: now\ndata: ")),
    "retry_alone": Defect(
        "events_are_complete", EVENTS, EVENT, r'await stream.write(b"retry: 5\n\n")' + "\n                " + EVENT
    ),
    "event_without_id": Defect("events_are_complete", EVENTS, EVENT, EVENT.replace(r"id: c-{number}\n", "")),
    "id_twice": Defect(
        "events_are_complete", EVENTS, EVENT, EVENT.replace("id: c-{number}", "id: c-{number // 2 * 2 + 1}")
    ),
    "repeats_the_last": Defect("resumes_by_header", EVENTS, "int(known[1]) if", "int(known[1]) - 1 if"),
    "skips_one_event": Defect("resumes_by_header", EVENTS, "int(known[1]) if", "int(known[1]) + 1 if"),
    "ignores_the_header": Defect("resumes_by_header", EVENTS, 'request.headers.get("Last-Event-ID") or query', "query"),
    "ignores_the_parameter": Defect("resumes_by_parameter", EVENTS, " or query.last_event_id", ' or ""'),
    "different_bytes_after_resuming": Defect(
        "resumes_by_header", EVENTS, '"word": query.word}', '"word": query.word, "again": bool(last)}'
    ),
    "rejects_bad_ids": Defect(
        "bad_ids_get_a_gap_event",
        EVENTS,
        "        async with",
        '        if last and not known:\n            raise Problem(400, "No such id.")\n        async with',
    ),
    "no_gap_for_bad_ids": Defect("bad_ids_get_a_gap_event", EVENTS, "if last and not known:", "if False:"),
    "no_heartbeat": Defect(
        "heartbeats_arrive_in_time",
        EVENTS,
        SENT,
        SENT.replace("(request)", "(request, heartbeat_seconds=None)").replace(
            END, f"await asyncio.sleep(60)\n{' ' * 12}{END}"
        ),
    ),
    "no_end": Defect("finite_stream_ends_with_end_event", EVENTS, END, "return stream\n            " + END),
    "endless_reconnects": Defect("finite_stream_ends_with_end_event", EVENTS, "if number > query.to:", "if False:"),
    # -- downloads
    "range_off_by_one": Defect("ranges_return_exact_bytes", DOWNLOAD, "int(part[2]) + 1", "int(part[2])"),
    "range_after_the_end": Defect("ranges_return_exact_bytes", DOWNLOAD, "raise Problem(416", "raise Problem(404"),
    "joins_two_versions": Defect(
        "conditions_are_evaluated", DOWNLOAD, 'request.headers.get("If-Range", tag) == tag', "True"
    ),
    "weak_etag": Defect("conditions_are_evaluated", DOWNLOAD, "'\"one\"'", "'W/\"one\"'"),
    # -- shutdown
    "aborts_events_at_shutdown": Defect(
        "stop_ends_streams_visibly",
        EVENTS,
        "open_event_stream(request)",
        'open_event_stream(request, on_stop="finish")',
    ),
    "partial_body_that_looks_complete": Defect(
        "stop_ends_streams_visibly", LINES, '(request, "text/plain")', '(request, "text/plain", on_stop="end")'
    ),
    "thread_delays_the_exit": Defect(
        "server_stops_in_time", LINES, OPEN, "        threading.Thread(target=time.sleep, args=(9,)).start()\n" + OPEN
    ),
    "lifespan_fails_at_shutdown": Defect(
        "server_stops_in_time",
        LINES,
        '    @endpoint("GET"',
        "    @hookimpl\n    @contextlib.asynccontextmanager\n    async def lifespan(self, app):\n        yield\n"
        "        raise RuntimeError('at the end')\n\n    @endpoint(\"GET\"",
    ),
    "blocks_the_loop_in_the_background": Defect(
        "event_loop_is_never_blocked",
        LINES,
        '    @endpoint("GET"',
        "    @hookimpl\n    @contextlib.asynccontextmanager\n    async def lifespan(self, app):\n"
        "        async with asyncio.TaskGroup() as group:\n            task = group.create_task(self.produce())\n"
        "            yield\n            task.cancel()\n\n"
        "    async def produce(self):\n        while True:\n            time.sleep(0.4)\n"
        '            await asyncio.sleep(0.1)\n\n    @endpoint("GET"',
    ),
    "traceback_in_the_log": Defect(
        "log_has_no_traceback",
        LINES,
        OPEN,
        "        try:\n            {}[request.path]\n        except KeyError:\n"
        "            logging.getLogger(__name__).exception('requested')\n" + OPEN,
    ),
}

IMPORTS = """
import contextlib
import gzip
import logging
import subprocess
import threading
import time
from typing import Annotated

from pydantic import BeforeValidator

from streamlab import ErrorFormat, Problem
from streamlab.streaming.drain import STREAMS
"""

TEST = """
from streamlab.testing import Conformance


class TestIt(Conformance):
    plugin = "it"
    large = {"times": 1_000_000, "width": 10_000, "to": 1_000_000}

    @classmethod
    def prepare(cls, server, form):
        if "{id}" not in form.template:
            return {}
        return {"id": server.request("/notes", method="POST", body={"text": "mine"}).json["id"]}
"""


TIMEOUT_SECONDS = 5.0
"""Maximum time for a first byte that does not arrive because of a defect, in seconds."""

STALL_INTERVALS = 2
"""Maximum number of seconds for which a defect may occupy a processor while clients are stalled."""

pytestmark = pytest.mark.usefixtures("forked_servers")


def write(folder: Path, source: str) -> None:
    """Write a plugin and its conformance test."""
    write_plugins(folder, {"it": source})
    (folder / "tests").mkdir()
    (folder / "tests" / "test_it.py").write_text(TEST)
    (folder / "config.toml").touch()
    (folder / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")


@pytest.mark.timeout(150)
@pytest.mark.parametrize("source", [LINES, EVENTS, DOWNLOAD, NOTES], ids=["lines", "events", "download", "notes"])
def test_valid_plugin_passes(pytester: pytest.Pytester, source: str) -> None:
    write(pytester.path, source)
    done = pytester.runpytest_inprocess(*OPTIONS, "tests")
    assert done.ret == 0
    assert "skipped" not in done.parseoutcomes()


def failed_cases(pytester: pytest.Pytester, name: str, *cases: str) -> set[str]:
    """Run cases for the plugin with a defect; return those that failed."""
    _, valid, old, new = DEFECTS[name]
    assert valid.count(old) == 1, "the defect does not apply"
    header, imports, body = valid.partition("from streamlab import")
    write(pytester.path, header + IMPORTS + imports + body.replace(old, new) if old in body else "")
    done = pytester.runpytest_inprocess(*OPTIONS, "tests", "-k", " or ".join(cases))
    assert done.ret == 1
    return {line.split("::test_")[1].partition("[")[0] for line in done.outlines if line.startswith("FAILED")}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_caught(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("streamlab.testing.streams.TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    monkeypatch.setattr("streamlab.testing.streams.STALL_INTERVALS", STALL_INTERVALS)
    case = DEFECTS[name].case
    assert failed_cases(pytester, name, "responds_as_described", case) == {case}


def test_traceback_is_found_after_another_server_stopped(pytester: pytest.Pytester) -> None:
    cases = ("responds_as_described", "stop_ends_streams_visibly", "log_has_no_traceback")
    assert failed_cases(pytester, "traceback_in_the_log", *cases) == {"log_has_no_traceback"}


def test_errors_of_fixtures_count_as_broken_promises(pytester: pytest.Pytester) -> None:
    write(pytester.path, LINES)
    test = pytester.path / "tests" / "test_it.py"
    test.write_text(
        TEST.partition("\n    @classmethod")[0] + "\n    @classmethod\n    def prepare(cls, server, form):\n"
        "        if form.method == 'POST':\n            raise RuntimeError('no such thing')\n        return {}\n"
    )
    done = pytester.runpytest_inprocess(*OPTIONS, "tests", "-k", "numbers_have_bounds")
    done.stdout.fnmatch_lines(["TestIt: 1 of 2 promises *; broken: numbers_have_bounds"])
    assert (done.parseoutcomes()["passed"], done.parseoutcomes()["errors"]) == (1, 1)


def parameter(schema: dict[str, Any], *, where: str = "query", required: bool = False) -> dict[str, Any]:
    return {"name": "it", "in": where, "schema": schema, "required": required}


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "string", "format": "date"}, ["yesterday"]),
        ({"const": "EUR", "type": "string"}, ["no-such-choice"]),
        ({"anyOf": [{"type": "integer"}, {"type": "boolean"}, {"type": "null"}]}, ["no-such-value"]),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, []),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 1}, [["many"], [1.5], [1, 1]]),
        ({"type": "array", "items": {"enum": ["a"]}, "minItems": 2}, [["no-such-choice"], ["a"]]),
    ],
)
def test_invalid_values_of_every_kind_of_parameter_are_requested(schema: dict[str, Any], values: list[Any]) -> None:
    form = EndpointForm("GET", "/it", {"parameters": [parameter(schema)]}, {}, frozenset({"GET"}), "")
    assert [bad.value for bad in form.invalid_values()] == values


def test_required_parameters_are_left_out() -> None:
    body = {"properties": {"word": {"type": "boolean"}}, "required": ["word"]}
    operation = {
        "parameters": [parameter({"type": "boolean"}, required=True), parameter({}, where="path", required=True)],
        "requestBody": {"content": {"application/json": {"schema": body}}},
    }
    form = EndpointForm("POST", "/{it}", operation, {}, frozenset({"POST"}), "")
    missing = [(bad.name, bad.where) for bad in form.invalid_values() if bad.value is MISSING]
    assert missing == [("it", "query"), ("word", "body")]
