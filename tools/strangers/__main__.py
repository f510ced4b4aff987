"""Run third-party tools against a server: `make strangers`, or `make strangers ARGS="--quick"` in three minutes."""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.servers import Running, running, streamlab

from . import contract, openai_calls, redbot_notes
from .finding import Finding, Outcome

PROTOCOL_TESTS = "tests/server/test_protocol.py"

CONFIG = """
[scenarios.ticker]
interval = 0.05
[scenarios.export]
sample_rows = 2000
[scenarios.llm]
max_tokens = 200
[scenarios.streams]
long_poll_seconds = 0.2
sse_seconds = 1.0
[scenarios.logs.sources.app]
path = "var/app.log"
"""
"""Like `make run`, with faster and shorter streams, and a log that does not grow."""

PUSH_CONFIG = """
[scenarios.ticker]
source = "push"
"""
"""For POST /stream/stock-ticker, which is rejected unless prices are pushed."""


def main() -> int:
    """Run the selected tools; return 1 if any has a finding."""
    parser = argparse.ArgumentParser(prog="make strangers ARGS=", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests, without the tests of `make test`; for CI")
    parser.add_argument("--only", choices=TOOLS, help="one tool")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda caught, _: sys.exit(128 + caught))  # ends the servers, as Ctrl-C does
    failed = 0
    chosen = [options.only] if options.only else [name for name in TOOLS if not (options.quick and name == "protocol")]
    with tempfile.TemporaryDirectory(prefix="streamlab-strangers-") as folder:
        with (
            running(streamlab("server", _configured, llm=True), Path(folder, "server"), None) as server,
            running(streamlab("push", lambda _: PUSH_CONFIG), Path(folder, "push"), None) as push,
        ):
            for name in chosen:
                started = time.monotonic()
                outcome = TOOLS[name](server, push, options.quick)
                failed += bool(outcome.findings)
                _show(name, outcome, time.monotonic() - started)
        outcome = _read_logs(server, push)
        failed += bool(outcome.findings)
        _show("logs", outcome, 0)
    print(f"{len(chosen) + 1 - failed} passed, {failed} failed")
    return 1 if failed else 0


def _configured(folder: Path) -> str:
    """Write the files of a server into its folder, and return its configuration."""
    served = folder / "var" / "files"
    served.mkdir(parents=True)
    (served / "notes.txt").write_text("a line of a file that is long enough for ranges\n" * 100, encoding="utf-8")
    (folder / "var" / "app.log").write_text("2026-11-28T12:00:00Z INFO a line of a log\n" * 500, encoding="utf-8")
    return CONFIG


def _show(name: str, outcome: Outcome, seconds: float) -> None:
    verdict = f"{len(outcome.findings)} findings" if outcome.findings else "passed"
    print(f"== {name}: {verdict}; {outcome.tested}, {seconds:.0f} s", flush=True)
    for finding in outcome.findings:
        print(f"{finding}\n", flush=True)


def _url(server: Running) -> str:
    return f"http://127.0.0.1:{server.port}"


# -- tools


def _contract(server: Running, push: Running, quick: bool) -> Outcome:
    examples = 3 if quick else 100
    return contract.run(_url(server), examples=examples)


def _pushes(server: Running, push: Running, quick: bool) -> Outcome:
    only = ["--include-name", "POST /stream/stock-ticker"]
    return contract.run(_url(push), examples=10 if quick else 200, only=only)


def _redbot(server: Running, push: Running, quick: bool) -> Outcome:
    return redbot_notes.run(_url(server))


def _openai(server: Running, push: Running, quick: bool) -> Outcome:
    return openai_calls.run(_url(server))


def _protocol(server: Running, push: Running, quick: bool) -> Outcome:
    """Run the project's own tests of grammar and request smuggling, which start their own server."""
    command = [sys.executable, "-m", "pytest", "-n0", PROTOCOL_TESTS]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    last = ran.stdout.strip().rpartition("\n")[2]
    if ran.returncode == 0:
        return Outcome(f"{PROTOCOL_TESTS}: {last}")
    return Outcome(PROTOCOL_TESTS, [Finding(ran.stdout + ran.stderr, f'make test ARGS="{PROTOCOL_TESTS}"')])


def _read_logs(*servers: Running) -> Outcome:
    """Look for tracebacks in the logs of servers that have ended."""
    bad = ("Traceback", "never retrieved", "was destroyed", "never awaited")
    lines = [line for server in servers for line in server.log.read_text(errors="replace").splitlines()]
    bad_lines = [index for index, line in enumerate(lines) if any(text in line for text in bad)]
    return Outcome(
        f"{len(lines)} lines of {len(servers)} servers",
        [
            Finding("\n       ".join(lines[max(0, index - 2) : index + 40]), "see the requests above")
            for index in bad_lines[:3]
        ],
    )


TOOLS: dict[str, Callable[[Running, Running, bool], Outcome]] = {
    "redbot": _redbot,
    "openai": _openai,
    "protocol": _protocol,
    "schemathesis": _contract,
    "schemathesis-push": _pushes,
}


if __name__ == "__main__":
    sys.exit(main())
