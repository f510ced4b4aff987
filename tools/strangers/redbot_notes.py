"""REDbot: whether the headers of finite responses conform to HTTP (caching, validation, ranges, negotiation).

A note of the level `bad` or `warning` is a finding, unless it is accepted below.
"""

from configparser import ConfigParser

import thor
from httplint.note import Note, levels
from redbot.resource import HttpResource

from .finding import Finding, Outcome

SECONDS = 60
"""Maximum time for all resources together."""

PATHS = (
    "/",
    "/lab",
    "/docs",
    "/assets/lab.js",
    "/openapi.json",
    "/health",
    "/metrics",
    "/v1/models",
    "/export",
    "/export/users/csv?limit=50",
    "/export/users/jsonl?limit=50",
    "/demo/comparison/buffered?rows=50",
    "/process/kinds",
    "/process/tasks",
    "/files/",
    "/files/notes.txt",
    "/download/large-file?size_mb=1",
    "/logs/download?source=app",
    "/no/such/route",
)

ACCEPTED: dict[str, dict[str, str]] = {
    "FRESHNESS_NO_CACHE_NO_VALIDATOR": {
        "/export": "generated for each request; hashing it to save a transfer would delay the first byte",
        "/export/users/csv?limit=50": "the result is streamed, and its digest is unknown before the last row",
        "/export/users/jsonl?limit=50": "like csv",
        "/demo/comparison/buffered?rows=50": "has the headers of the streamed response, for comparison",
        "/files/": "a listing is read for each request, and has no version",
        "/logs/download?source=app": "grows while it is sent",
        "/v1/models": "a list of one model, smaller than the headers",
        "/lab": "7 kB from the same machine or network; its scripts, which are larger, have validators",
        "/docs": "2 kB from the same machine or network; its scripts, which are larger, have validators",
    },
    "CSP_UNSAFE_INLINE": {
        "/docs": "Swagger UI, third-party code, sets styles inline",
    },
}
"""Reasons for accepted notes, by the name of the note and the resource."""


def run(server: str) -> Outcome:
    """Check all resources of a server."""
    config = ConfigParser()
    config.read_dict({"redbot": {"enable_local_access": "True"}})
    resources = {path: HttpResource(config["redbot"]) for path in PATHS}
    unfinished = set(PATHS)

    def finish(path: str) -> None:
        unfinished.discard(path)
        if not unfinished:
            thor.stop()

    for path, resource in resources.items():
        resource.set_request(server + path)
        resource.on("check_done", lambda path=path: finish(path))
        resource.check()
    thor.schedule(SECONDS, thor.stop)
    thor.run()
    findings = [
        Finding(f"GET {path}: {problem}", f"redbot '{server}{path}'")
        for path, resource in resources.items()
        for problem in _problems(path, resource)
    ]
    findings += [Finding(f"GET {path}: not done in {SECONDS} s", f"curl -i '{server}{path}'") for path in unfinished]
    return Outcome(f"{len(PATHS)} resources", findings)


def _problems(path: str, resource: HttpResource) -> list[str]:
    if resource.fetch_error is not None or not resource.response.complete:
        return [f"no complete response: {resource.fetch_error}"]
    notes: list[Note] = [each for note in resource.response.notes for each in (note, *note.subnotes)]
    return [
        f"{type(note).__name__} ({note.level.value}): {note.summary}"
        for note in notes
        if note.level in (levels.BAD, levels.WARN) and path not in ACCEPTED.get(type(note).__name__, {})
    ]
