"""A price as it is told: which fields it has, and how one that was pushed is read."""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from streamlab import Position

_SPACE = " \t\r\n"
"""What JSON calls white space."""


class Unreadable(ValueError):
    """What was pushed cannot be published. `errors` names every bad field; empty where it is not JSON."""

    def __init__(self, message: str, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.errors = errors or []


@dataclass(frozen=True, slots=True)
class Price:
    """A price of a symbol. `text` is the JSON object it was pushed as; it is carried through as it is written."""

    symbol: str
    price: float
    text: str
    has_change: bool = False
    has_time: bool = False

    @classmethod
    def of(cls, symbol: str, price: float, **others: Any) -> "Price":
        """Make a price of values."""
        fields = {"symbol": symbol, "price": price, **others}
        text = json.dumps(fields, ensure_ascii=False)
        return cls(symbol, price, text, has_change="change" in others, has_time="time" in others)

    def data(self, before: float | None) -> str:
        """The event's data: `change` against the price before (null where none is known) and `time`, if missing."""
        added = []
        if not self.has_change:
            change = None if before is None else round(self.price - before, 10)
            if change is not None and not math.isfinite(change):  # of two prices at the ends of what floats can say
                change = None
            added.append(f'"change": {json.dumps(change)}')
        if not self.has_time:
            added.append(f'"time": "{now()}"')
        text = self.text
        if "\n" in text or "\r" in text:  # between two words of JSON, where a space says the same
            text = text.replace("\r", " ").replace("\n", " ")
        return ", ".join([text[:-1].rstrip(), *added]) + "}" if added else text


def now() -> str:
    """The time in UTC, as ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class LastPrices:
    """The last price of each symbol, of so many symbols at most: what the next one is a change against.

    Prices of the log are noted as they are seen there, and may be seen late; one that is on its way into the log is
    newer than all of them.
    """

    def __init__(self, symbols: int) -> None:
        self._most = symbols
        self._kept: OrderedDict[str, tuple[Position, float | bytes]] = OrderedDict()
        self._coming: dict[str, Price] = {}

    def note(self, symbol: str, position: Position, price: float | bytes) -> None:
        """Remember a price of the log unless a newer one is known; an event's data is read when it is asked for."""
        known = self._kept.get(symbol)
        if known is not None and known[0] >= position:
            return
        self._kept[symbol] = position, price
        self._kept.move_to_end(symbol)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def tell(self, prices: Sequence[Price]) -> list[str]:
        """The data of new prices, which are on their way into the log until they are settled."""
        told: list[str] = []
        for price in prices:
            told.append(price.data(None if price.has_change else self._before(price.symbol)))
            self._coming[price.symbol] = price
        return told

    def settle(self, prices: Sequence[Price], last: Position | None) -> None:
        """Say where the last of some prices was kept; None where they were not."""
        for symbol, price in {price.symbol: price for price in prices}.items():
            if self._coming.get(symbol) is price:
                del self._coming[symbol]
            if last is not None:
                self.note(symbol, last, price.price)

    def _before(self, symbol: str) -> float | None:
        if symbol in self._coming:
            return self._coming[symbol].price
        price = self._kept[symbol][1] if symbol in self._kept else None
        if not isinstance(price, bytes):
            return price
        try:
            return float(json.loads(price)["price"])
        except RecursionError:  # whoever took it stood less deep in calls than this
            return None


def read_prices(body: bytes, symbol: str) -> list[Price]:
    """Read one JSON object, or JSON lines; raises Unreadable, naming everything that is wrong.

    `symbol` is the pattern that symbols match.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"The body is not UTF-8 (at byte {error.start}).") from None
    lines = [(number, stripped) for number, line in enumerate(text.split("\n"), 1) if (stripped := line.strip(_SPACE))]
    if not lines:
        raise Unreadable("The body is empty: it must be a JSON object, or one a line.")
    objects: list[tuple[int, str, Any]] = []
    try:
        objects = [(0, text.strip(_SPACE), _loads(text))]
    except ValueError as whole:
        for number, line in lines:
            try:
                objects.append((number, line, _loads(line)))
            except ValueError as error:
                # Where not even the first line is JSON, it is one object over many lines.
                where, reason = (f"Line {number} of the body", error) if objects else ("The body", whole)
                raise Unreadable(f"{where} is not JSON: {reason}.") from None
    prices: list[Price] = []
    errors: list[dict[str, str]] = []
    for number, line, found in objects:
        price = _price(number, line, found, symbol, errors)
        prices += [price] if price else []
    if errors:
        raise Unreadable("Nothing was published: some prices will not do.", errors[:50])
    return prices


def _price(number: int, text: str, found: Any, symbol: str, errors: list[dict[str, str]]) -> Price | None:
    where = f"line {number}: " if number else ""
    if not isinstance(found, dict):
        errors.append({"in": "body", "name": f"{where}body", "detail": "must be a JSON object"})
        return None
    named, price = found.get("symbol"), _number(found.get("price"))
    good_name = isinstance(named, str) and re.fullmatch(symbol, named)
    if not good_name:
        rule = "must be 1 to 32 letters, digits and .:/=^_- that begin with a letter or digit"
        errors.append({"in": "body", "name": f"{where}symbol", "detail": rule})
    if price is None:
        errors.append({"in": "body", "name": f"{where}price", "detail": "must be a number"})
    if price is None or not good_name:
        return None
    return Price(str(named), price, text, has_change="change" in found, has_time="time" in found)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has a field twice")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_once_each)


def _loads(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
