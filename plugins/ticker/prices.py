"""A price: the fields of its event, and how pushed prices are read."""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from streamlab import Position

_WHITE_SPACE = " \t\r\n"
"""White space of JSON (RFC 8259, section 2)."""

MAX_BYTES = 16 * 1024
"""Maximum size of a pushed price, in bytes: thousands of them are stored."""

MAX_ERRORS = 50
"""Maximum number of invalid fields that are reported."""


class InvalidPrices(ValueError):
    """A body that cannot be published. `errors` lists every invalid field; it is empty if the body is not JSON."""

    def __init__(self, message: str, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.errors = errors or []


@dataclass(frozen=True, slots=True)
class Price:
    """A price of a symbol. `text` is the JSON object as it was pushed; it is published byte for byte."""

    symbol: str
    price: float
    text: str
    has_change: bool = False
    has_time: bool = False

    @classmethod
    def of(cls, symbol: str, price: float, **others: Any) -> "Price":
        """Return a price made of values."""
        fields = {"symbol": symbol, "price": price, **others}
        text = json.dumps(fields, ensure_ascii=False)
        return cls(symbol, price, text, has_change="change" in others, has_time="time" in others)

    def with_change(self, previous: float | None) -> str:
        """Return the JSON of the event; adds `time`, and `change` (null if `previous` is unknown), if missing."""
        added = []
        if not self.has_change:
            change = None if previous is None else round(self.price - previous, 10)
            if change is not None and not math.isfinite(change):  # the difference overflows a float
                change = None
            added.append(f'"change": {json.dumps(change)}')
        if not self.has_time:
            added.append(f'"time": "{now()}"')
        text = self.text
        if "\n" in text or "\r" in text:  # only between JSON tokens, where a space means the same
            text = text.replace("\r", " ").replace("\n", " ")
        return ", ".join([text[:-1].rstrip(), *added]) + "}" if added else text


def now() -> str:
    """Return the time in UTC, as ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class LastPrices:
    """The last price of each symbol, to compute the change of the next one. At most `limit` symbols are remembered.

    A price is pending while it is being published, then it has a position in the event log. A pending price is newer
    than any stored one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stored: OrderedDict[str, tuple[Position, float | bytes]] = OrderedDict()
        self._pending: dict[str, Price] = {}

    def record(self, symbol: str, position: Position, price: float | bytes) -> None:
        """Remember a stored price unless a newer one is known; `price` may be the data of its event, parsed later."""
        known = self._stored.get(symbol)
        if known is not None and known[0] >= position:
            return
        self._stored[symbol] = position, price
        self._stored.move_to_end(symbol)
        if len(self._stored) > self._limit:
            self._stored.popitem(last=False)

    def add_changes(self, prices: Sequence[Price]) -> list[str]:
        """Return the JSON of each new price. The prices are pending until they are settled."""
        texts: list[str] = []
        for price in prices:
            texts.append(price.with_change(None if price.has_change else self._previous(price.symbol)))
            self._pending[price.symbol] = price
        return texts

    def settle(self, prices: Sequence[Price], last: Position | None) -> None:
        """Record pending prices as stored; `last` is the position of the last one, or None if publishing failed."""
        for symbol, price in {price.symbol: price for price in prices}.items():
            if self._pending.get(symbol) is price:
                del self._pending[symbol]
            if last is not None:
                self.record(symbol, last, price.price)

    def _previous(self, symbol: str) -> float | None:
        if symbol in self._pending:
            return self._pending[symbol].price
        price = self._stored[symbol][1] if symbol in self._stored else None
        if not isinstance(price, bytes):
            return price
        try:
            return float(json.loads(price)["price"])
        except RecursionError:  # it was accepted at a lower call depth than this one
            return None


def read_prices(body: bytes, symbol_pattern: str) -> list[Price]:
    """Parse one JSON object, or JSON lines. Raise InvalidPrices, which lists everything that is wrong."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidPrices(f"The body is not UTF-8 (at byte {error.start}).") from None
    prices: list[Price] = []
    errors: list[dict[str, str]] = []
    for number, line, value in _parse(text):
        price = _price(number, line, value, symbol_pattern, errors)
        prices += [price] if price else []
    if errors:
        raise InvalidPrices("Nothing was published: some prices are invalid.", errors[:MAX_ERRORS])
    return prices


def _parse(text: str) -> list[tuple[int, str, Any]]:
    """Return each JSON value with its line number and its text. The number is 0 if the whole text is one value."""
    lines = [
        (number, stripped) for number, line in enumerate(text.split("\n"), 1) if (stripped := line.strip(_WHITE_SPACE))
    ]
    if not lines:
        raise InvalidPrices("The body is empty: it must be a JSON object, or one object per line.")
    try:
        return [(0, text.strip(_WHITE_SPACE), _decode(text))]
    except ValueError as error:
        whole = error
    values: list[tuple[int, str, Any]] = []
    for number, line in lines:
        try:
            values.append((number, line, _decode(line)))
        except ValueError as error:
            # If the first line is not JSON, the body was meant as one object that spans lines.
            where, reason = (f"Line {number} of the body", error) if values else ("The body", whole)
            raise InvalidPrices(f"{where} is not JSON: {reason}.") from None
    return values


def _price(number: int, text: str, value: Any, symbol_pattern: str, errors: list[dict[str, str]]) -> Price | None:
    """Return the price of a JSON value, or None after adding what is invalid to `errors`."""
    where = f"line {number}: " if number else ""
    if not isinstance(value, dict):
        errors.append({"in": "body", "name": f"{where}body", "detail": "must be a JSON object"})
        return None
    if len(text.encode()) > MAX_BYTES:
        errors.append({"in": "body", "name": f"{where}body", "detail": f"must have at most {MAX_BYTES} bytes"})
        return None
    symbol, price = value.get("symbol"), _number(value.get("price"))
    is_symbol = isinstance(symbol, str) and re.fullmatch(symbol_pattern, symbol)
    if not is_symbol:
        rule = "must be 1 to 32 letters, digits and .:/=^_- starting with a letter or digit"
        errors.append({"in": "body", "name": f"{where}symbol", "detail": rule})
    if price is None:
        errors.append({"in": "body", "name": f"{where}price", "detail": "must be a number"})
    if price is None or not is_symbol:
        return None
    return Price(str(symbol), price, text, has_change="change" in value, has_time="time" in value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has a field twice")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_reject_duplicates)


def _decode(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
