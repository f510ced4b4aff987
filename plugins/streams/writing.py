"""Appending to streams: decided on what is known, and stored only if that is still so."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from aiohttp import web

from streamlab import Conflict, Position, Problem

from .producers import Plan, checkpoint_of, names_for, plan_append
from .protocol import CLOSED as CLOSED_FIELD
from .protocol import NEXT_OFFSET, AppendRequest, format_offset
from .store import ATTEMPTS, CLOSED, CONFIG, Store, decode_config

KNOWN_STREAMS = 1000
"""Maximum number of streams whose state this process remembers."""

KNOWN_NAMES = 1000
"""Maximum number of checkpoints of a stream that it remembers."""

KNOWN_SECONDS = 1.0
"""Time after which they are read again, since other processes change what is counted, in seconds."""


@dataclass(slots=True)
class _Known:
    texts: dict[str, str | None]
    """Checkpoints by name; None for one that does not exist."""
    read_at: float


class Writer:
    """Appends of one process.

    It decides on the state that it remembers, so that most appends cost one commit and no read. The log stores an
    append only if the state is as it was decided on; else it is decided again on what the log has now, as is everything
    that would be rejected. Appends of one producer, and those with a `Stream-Seq`, take turns: they depend on each
    other. All others of a stream are committed together.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def append(self, path: str, request: AppendRequest) -> web.Response:
        """Append to a stream, or close it, and return the response; raises Problem for what cannot be done."""
        async with self._turn(path, request):
            plan, last = await self._append(path, request)
        headers = {NEXT_OFFSET: format_offset(last), **plan.fields}
        return web.Response(status=plan.status, headers=headers)

    @asynccontextmanager
    async def _turn(self, path: str, request: AppendRequest) -> AsyncIterator[None]:
        if request.producer is None and not request.seq:
            yield
            return
        key = path, checkpoint_of(request.producer) if request.producer else ""
        async with self._turns.setdefault(key, asyncio.Lock()):
            yield

    async def _append(self, path: str, request: AppendRequest) -> tuple[Plan, Position]:
        names = names_for(request)
        state = self._recall(path, names)
        for _ in range(ATTEMPTS):
            remembered, last = state is not None, Position(0, 0)
            if state is None:
                state, last = await self._read(path, names)
            try:
                plan = plan_append(state, request, self._store.limits)
                if not plan.is_duplicate:
                    channel = self._store.channel(path, decode_config(state[CONFIG]))
                    last = await channel.append(
                        plan.drafts, checkpoints=plan.checkpoints, expected=plan.expected, counts=plan.counts
                    )
                    self._learn(path, plan)
                    return plan, last
                if not remembered:
                    return plan, last
            except Conflict:
                pass
            except Problem as problem:
                if not remembered:
                    raise _completed(problem, last, is_closed=CLOSED in state) from None
            self._known.pop(path, None)
            state = None
        raise Problem(503, "Other clients change this stream all the time.", headers={"Retry-After": "1"})

    async def _read(self, path: str, names: tuple[str, ...]) -> tuple[dict[str, str], Position]:
        stream = await self._store.find(path, names=names)
        found = stream.batch.checkpoints
        known = self._known.get(path)
        if known is None or len(known.texts) > KNOWN_NAMES:
            known = self._known[path] = _Known({}, 0)
        known.texts |= {name: found.get(name) for name in names}
        known.read_at = asyncio.get_running_loop().time()
        self._known.move_to_end(path)
        if len(self._known) > KNOWN_STREAMS:
            self._known.popitem(last=False)
        return dict(found), stream.batch.last

    def _recall(self, path: str, names: tuple[str, ...]) -> dict[str, str] | None:
        known = self._known.get(path)
        if known is None or asyncio.get_running_loop().time() - known.read_at > KNOWN_SECONDS:
            self._known.pop(path, None)
            return None
        if any(name not in known.texts for name in names):
            return None
        return {name: text for name in names if (text := known.texts[name]) is not None}

    def _learn(self, path: str, plan: Plan) -> None:
        """Remember the state after an append of this process."""
        if (known := self._known.get(path)) is not None:
            known.texts |= plan.checkpoints
            for name, count in plan.counts.items():
                if name in known.texts:
                    known.texts[name] = str(int(known.texts[name] or 0) + count)


def _completed(problem: Problem, last: Position, *, is_closed: bool) -> Problem:
    """Add where the stream ends to the Problem of one that is closed."""
    if is_closed and problem.status == 409:
        problem.headers |= {NEXT_OFFSET: format_offset(last), CLOSED_FIELD: "true"}
    return problem
