"""Cases for the process of a server under test, after all others: its event loop, and its log."""

import asyncio
from typing import TYPE_CHECKING

from .loop_watch import BLOCKED_SECONDS
from .promise import Broken, promise

if TYPE_CHECKING:
    from .subject import Subject

WATCH_SECONDS = 3.0
"""Minimum time for which the event loop is watched, in seconds."""

MAX_BLOCKS = 3
"""Number of times that the same code must block the event loop to fail: what is created once may block it once."""


class ServerProcess:
    """Cases for the server, whatever is tested on it."""

    @promise("streamlab: nothing blocks the event loop; asyncio, Developing with asyncio", once=True)
    async def test_event_loop_is_never_blocked(self, subject: "Subject") -> str:
        """No code, in a handler or in the background, blocks the event loop for more than 250 ms again and again."""
        state = await asyncio.to_thread(
            subject.server.wait_for_state, lambda state: state.watched >= WATCH_SECONDS, seconds=2 * WATCH_SECONDS
        )
        times: dict[str, list[float]] = {}
        for block in state.blocks:
            times.setdefault(block["code"], []).append(block["seconds"])
            if len(times[block["code"]]) == MAX_BLOCKS:
                longest = max(times[block["code"]])
                raise Broken(
                    f"blocked {MAX_BLOCKS} times for more than {BLOCKED_SECONDS:g} s, once for {longest:.2f} s, "
                    f"by\n{block['stack']}"
                )
        return f"watched for {state.watched:.0f} s; blocked {len(state.blocks)} times by code that ran once or twice"

    @promise("streamlab: an action of a client is not a fault of the server", once=True)
    async def test_log_has_no_traceback(self, subject: "Subject") -> str:
        """At the end, the server's log has no traceback and no Python warning."""
        log = subject.server.log
        for text in ("Traceback", "Warning: ", "never retrieved"):
            if text in log:
                raise Broken(f"in its log: {log[max(0, log.index(text) - 500) :][:1500]}")
        return f"{len(log.splitlines())} lines, none of them a traceback"
