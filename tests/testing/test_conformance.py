"""Every built-in plugin passes the conformance suite."""

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from streamlab.testing import Conformance, EndpointForm, Server, TaskConformance

pytestmark = pytest.mark.usefixtures("forked_servers")


class TestComparison(Conformance):
    plugin = "comparison"
    settings = "[scenarios.comparison]\nmax_reports = 4"  # one that a client left keeps its slot until that is noticed
    values = {"rows": 1000, "repeats": 1}
    large = {"rows": 50_000}
    skipped = {
        (
            "stalled_client_uses_bounded_resources",
            "GET /demo/comparison/buffered",
        ): "it demonstrates the cost of buffering",
        (
            "stream_ends_with_its_token",
            "GET /demo/comparison/buffered",
        ): "nothing is open before it is complete, and then it is sent at once",
    } | {
        (case, "GET /demo/comparison/report as text/event-stream"): "a report belongs to its request, and is not stored"
        for case in ("resumes_by_header", "resumes_by_parameter")
    }


class TestExport(Conformance):
    plugin = "export"
    settings = "[scenarios.export]\nsample_rows = 20000"
    values = {"name": "users", "format": "csv", "limit": 3000}
    large = {"limit": 20_000}


class TestFile(Conformance):
    plugin = "file"
    settings = "[scenarios.file]\nsample_mb = 20"
    values = {"path": "small.bin"}
    large = {"path": "large-file.bin"}

    @classmethod
    def write_files(cls, folder: Path) -> None:
        files = folder / "var" / "files"
        files.mkdir(parents=True, exist_ok=True)
        (files / "small.bin").write_bytes(bytes(range(256)))
        (files / "large-file.bin").write_bytes(bytes(20_000_000))


OPENAI = "the OpenAI API is another protocol: its events have no ids, it ends with [DONE], and has its own error format"


COMPLETIONS = ("POST /v1/chat/completions", "POST /v1/completions")
EMBEDDINGS = "POST /v1/embeddings"


class TestLlm(Conformance):
    plugin = "llm"
    settings = """
        [scenarios.llm]
        max_generations = 6
        max_waiting = 2
        max_prompt_tokens = 200
        wait_seconds = 5
        abandon_seconds = 0.1
    """
    values = {"max_tokens": 5}
    large = {"max_tokens": 150}  # of a text that is continued: some seconds
    # Concurrent generations are computed in one batch, with another order of additions than a single one: tokens may
    # differ. tests/plugins/test_llm_limits.py tests them.
    nondeterministic = {"GET /ai/chat-stream", "POST /ai/chat-stream", *COMPLETIONS}
    skipped = (
        {
            (case, endpoint): OPENAI
            for endpoint in (*COMPLETIONS, EMBEDDINGS)
            for case in (
                "invalid_bodies_are_rejected",
                "events_are_complete",
                "resumes_by_header",
                "bad_ids_get_a_gap_event",
                "finite_stream_ends_with_end_event",
            )
        }
        | {
            (case, endpoint): OPENAI  # tests/plugins/test_llm_limits.py tests all of them
            for case in (
                "other_methods_are_rejected",
                "unknown_parameters_are_rejected_by_name",
                "invalid_values_are_rejected_by_name",
            )
            for endpoint in ("GET /v1/models", "GET /v1/models/{id}", *COMPLETIONS, EMBEDDINGS)
        }
        | {
            ("first_byte_arrives_before_the_end", f"{endpoint} as application/json"): "one complete document"
            for endpoint in COMPLETIONS
        }
        | {("numbers_have_bounds", endpoint): "the configuration bounds max_tokens" for endpoint in COMPLETIONS}
        | {
            (case, EMBEDDINGS): "the embedded model has no embeddings"
            for case in ("responds_as_described", "concurrent_clients_get_the_same_response")
        }
    )

    loaded: ClassVar[set[int]] = set()
    """Ports of the servers whose model is loaded."""

    @classmethod
    def prepare(cls, server: Server, form: EndpointForm) -> Mapping[str, Any]:
        while server.port not in cls.loaded:
            if server.request("/ai/chat-stream?prompt=Hello&max_tokens=1").status == 200:
                cls.loaded.add(server.port)
        if form.template in ("/v1/chat/completions", "/v1/completions"):
            return {"stream": form.carries_events}
        if not form.template.startswith("/ai/generations/"):
            return {}
        while (started := server.request("/ai/chat-stream-sse?prompt=Hello&max_tokens=5")).status == 429:
            time.sleep(0.1)  # on a busy machine, generations of the test before still fill the short queue
        return {"id": started.headers["location"].rpartition("/")[2]}


class TestLogs(Conformance):
    plugin = "logs"


class TestProgress(Conformance):
    plugin = "progress"
    settings = "[scenarios.progress]\nmax_running = 50\n[scenarios.export]\nsample_rows = 1000"
    scopes = ("export:read:users",)  # for the task `report`, the default of /process/long-task

    @classmethod
    def prepare(cls, server: Server, form: EndpointForm) -> Mapping[str, Any]:
        if "{id}" not in form.template:
            return {}
        # It takes half a second, but hardly any processor time.
        body = {"kind": "rehearsal", "parameters": {"steps": 10, "delay": 0.05}}
        return {"id": server.request("/process/tasks", method="POST", body=body).json["id"]}


class TestProgressTasks(TaskConformance):
    plugin = "progress"
    values = {"steps": 3, "delay": 0.05}
    large = {"steps": 100}


class TestTicker(Conformance):
    plugin = "ticker"
    settings = "[scenarios.ticker]\ninterval = 0.05"
    skipped = {("*", "POST /stream/stock-ticker"): "prices are simulated here"}


class TestPushedTicker(Conformance):
    plugin = "ticker"
    settings = '[scenarios.ticker]\nsource = "push"'
    skipped = {("*", "GET /stream/stock-ticker"): "its prices are pushed here, and none are pushed"}


READ = "GET /v1/stream/{path}"


class TestStreams(Conformance):
    plugin = "streams"
    settings = "[scenarios.streams]\nsse_seconds = 1.0"
    skipped = {  # Durable Streams is another protocol, and has its own suite
        (case, endpoint): reason
        for case, endpoint, reason in (
            ("head_has_the_headers_of_get", READ, "HEAD describes the stream, GET the part that is read"),
            ("unknown_parameters_are_rejected_by_name", READ, "the protocol ignores them: caches add some"),
            ("invalid_bodies_are_rejected", "PUT /v1/stream/{path}", "without a body the stream is empty"),
            ("invalid_bodies_are_rejected", "POST /v1/stream/{path}", "another type than that of the stream is 409"),
            (
                "events_are_complete",
                READ,
                "data and the control event after it have one id, from which both are resumed",
            ),
            ("bad_ids_get_a_gap_event", READ, "an offset that is none is 400"),
            ("bad_ids_get_a_gap_event", "GET /v1/streams", "an offset that is none is 400"),
            ("finite_stream_ends_with_end_event", "GET /v1/streams", "each stream ends by itself, `streamClosed`"),
            ("stream_ends_with_its_token", f"{READ} as text/event-stream", "it ends after a second, before or with it"),
            ("stream_ends_with_its_token", "GET /v1/streams", "it ends after a second, before or with it"),
            ("finite_stream_ends_with_end_event", READ, "a closed stream ends with a control event, `streamClosed`"),
        )
    }

    @classmethod
    def prepare(cls, server: Server, form: EndpointForm) -> Mapping[str, Any]:
        path, other = f"made/{uuid.uuid4().hex}", f"made/{uuid.uuid4().hex}"
        if form.method != "PUT":
            for made in (path, other) if form.template == "/v1/streams" else (path,):
                server.request(f"/v1/stream/{made}", method="PUT", body=[{"number": number} for number in range(20)])
        if form.template == "/v1/streams":
            return {"stream": [path, other]}
        return {"path": path, **({} if form.carries_events else {"live": []})}
