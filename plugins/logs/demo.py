"""A small simulated service that writes a real, rotating log file."""

import asyncio
import errno
import logging
import os
import random
import traceback
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from streamlab import Threads

log = logging.getLogger(__name__)

_ROUTES = (
    ("GET", "/products", 200, 12),
    ("GET", "/products/{product}", 200, 8),
    ("GET", "/cart", 200, 5),
    ("POST", "/cart/items", 201, 15),
    ("DELETE", "/cart/items/{product}", 204, 9),
    ("POST", "/orders", 201, 60),
    ("GET", "/orders/{order}", 200, 14),
)
"""Method, path, status without an error, and usual duration in milliseconds."""

_REMARKS = (
    ("DEBUG", "shop.cache", "hit products:{product}"),
    ("DEBUG", "shop.database", "connection {connection} taken from the pool"),
    ("INFO", "shop.stock", "product {product}: {left} left"),
    ("INFO", "shop.mail", "confirmation of order {order} sent to user={user}"),
    ("INFO", "shop.payment", "order {order} paid by user={user}"),
    ("WARNING", "shop.stock", "product {product}: only {few} left"),
    ("WARNING", "shop.database", "slow query: {slow} ms"),
    ("WARNING", "shop.payment", "order {order}: provider did not respond, trying again"),
)
_WEIGHTS = (4, 3, 4, 3, 3, 1, 1, 1)

_FRAMES = (
    ("shop/web.py", 118, "handle", "response = route.handler(request)"),
    ("shop/orders.py", 57, "place", "receipt = payment.charge(order.user, order.total)"),
    ("shop/payment.py", 203, "charge", "raise PaymentError(answer.reason) from error"),
)
"""Stack of the exceptions of the simulated service: file, line, function, source."""

_CAUSE = (("shop/payment.py", 199, "charge", "answer = provider.post(card, total)"),)


FIRST_RECORDS = 20
"""Number of records that are written without a pause, so that there is something to see."""

UNREAD_SECONDS = 10.0
"""Time between two records that nobody reads, in seconds."""


async def serve(
    path: Path,
    *,
    interval: float = 0.5,
    seed: int | None = None,
    max_bytes: int = 64 * 1024,
    backups: int = 3,
    pause: Callable[[float], Awaitable[None]] | None = None,
) -> None:
    """Append a record of a simulated shop about every `interval` seconds, until cancelled.

    Most records are one line; a failed request has a traceback of several. Before the file would exceed
    `max_bytes` it is renamed to `path.1`, that to `path.2`, and so on up to `backups`. The folder is created. A record
    that cannot be written is dropped, with one warning until writing succeeds again. The same `seed` gives the same
    records, except for their times. After the first ones, `pause` is called between two with the time for which it may
    wait, in seconds: while nobody reads them.
    """
    chance = random.Random(seed)  # noqa: S311 - a simulation, not a secret
    failing = False
    async with Threads("demo-log", 1) as threads:
        for number, (level, logger, message) in enumerate(_records(chance)):
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            try:
                await threads.run(_append, path, f"{now} {level} {logger} {message}\n".encode(), max_bytes, backups)
                failing = False
            except OSError as error:
                if not failing:
                    log.warning("The demo log %s cannot be written for now: %s", path.name, error.strerror)
                failing = True
            await asyncio.sleep(interval * chance.uniform(0.5, 1.5))
            if pause is not None and number >= FIRST_RECORDS:
                await pause(UNREAD_SECONDS)


class PaymentError(Exception):
    """An occasional failure in the simulated shop."""

    __module__ = "shop.payment"


def _records(chance: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yield level, logger and message of one record after the other, without end; a message may have several lines."""
    while True:
        names = {
            "product": chance.randint(100, 999),
            "order": chance.randint(10_000, 99_999),
            "user": chance.randint(1000, 1999),
            "connection": chance.randint(1, 8),
            "left": chance.randint(10, 400),
            "few": chance.randint(1, 9),
            "slow": chance.randint(500, 4000),
        }
        if chance.random() < 0.35:
            ((level, logger, message),) = chance.choices(_REMARKS, _WEIGHTS)
            yield level, logger, message.format_map(names)
            continue
        method, route, status, usual = chance.choice(_ROUTES)
        milliseconds = usual * chance.lognormvariate(0, 0.5)
        level, report = "INFO", ""
        fate = chance.random()
        if fate < 0.15 and status == 201 and route == "/orders":
            level, status, report = "ERROR", 500, "\n" + _traceback(f"card of user {names['user']} declined")
        elif fate < 0.01:
            level, status, milliseconds = "ERROR", 504, 30_000.0
        elif fate < 0.08 and "{" in route:
            level, status = "WARNING", 404
        path = route.format_map(names)
        yield level, "shop.web", f"{method} {path} {status} {milliseconds:.0f} ms user={names['user']}{report}"


def _traceback(reason: str) -> str:
    """Return the traceback of a real exception, with the stack of the simulated service."""
    try:
        try:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        except ConnectionResetError as error:
            raise PaymentError(reason) from error
    except PaymentError as error:
        report = traceback.TracebackException.from_exception(error)
    report.stack = traceback.StackSummary.from_list(_FRAMES)
    if report.__cause__ is not None:
        report.__cause__.stack = traceback.StackSummary.from_list(_CAUSE)
    return "".join(report.format()).rstrip("\n")


def _append(path: Path, record: bytes, max_bytes: int, backups: int) -> None:
    """Write one record, or nothing of it. The file is opened each time, so that a deleted file is created again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = 0
    if size and size + len(record) > max_bytes:
        _rotate(path, backups)
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if file.write(record) != len(record):
            # The next record would continue an incomplete line.
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _rotate(path: Path, backups: int) -> None:
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, backups + 1))]
    names[-1].unlink(missing_ok=True)
    for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
        if newer.exists():
            newer.rename(older)
