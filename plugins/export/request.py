"""What a client asks of an export: columns, values, parameters, each checked before the database hears of it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from streamlab import Problem

WHERE = re.compile(r"where(?:\.(?P<dotted>.+)|\[(?P<bracketed>.+)\])", re.DOTALL)
"""`where.country=DE`; and `where[country]=DE`, as OpenAPI's deepObject spells it."""

_TRUTHS = {"true": True, "false": False, "1": True, "0": False}


def integer(text: str) -> int:
    """Read an integer that a database can hold; raises ValueError."""
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
        raise ValueError("must be an integer")
    return int(text)


_REAL = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?)", re.IGNORECASE)


def real(text: str) -> float:
    """Read a number in ASCII digits, or an infinity; raises ValueError. `float` takes the digits of every script."""
    if not _REAL.fullmatch(text):
        raise ValueError("must be a number")
    return float(text)


def truth(text: str) -> bool:
    """Read a boolean; raises ValueError."""
    if text.lower() not in _TRUTHS:
        raise ValueError("must be true or false")
    return _TRUTHS[text.lower()]


class Parameter(BaseModel):
    """A value that a configured SQL names as `:name`, and that requests may give."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text", "integer", "real", "boolean"] = "text"
    """What it is; a request that gives something else is refused."""
    default: str | int | float | bool | None = None
    """What it is in a request without it; a parameter without a default must be given."""
    minimum: float | None = None
    maximum: float | None = None
    max_length: int = Field(200, ge=0, le=4000)
    """Characters of a text at most."""
    choices: tuple[str, ...] = ()
    """The only texts it takes."""
    description: str = ""

    @model_validator(mode="after")
    def _default_fits(self) -> "Parameter":
        if self.default is not None:
            given = self.default
            self.read(str(given).lower() if isinstance(given, bool) else str(given))
        return self

    def read(self, text: str) -> str | int | float | bool:
        """Read its value; raises ValueError saying what would be right."""
        if self.type == "text":
            if len(text) > self.max_length:
                raise ValueError(f"must have no more than {self.max_length} characters")
            if self.choices and text not in self.choices:
                raise ValueError(f"must be one of {', '.join(self.choices)}")
            return text
        if self.type == "boolean":
            return truth(text)
        number = self._number(text)
        if (self.minimum is not None and number < self.minimum) or (self.maximum is not None and number > self.maximum):
            bounds = (("at least", self.minimum), ("at most", self.maximum))
            said = [f"{words} {bound:g}" for words, bound in bounds if bound is not None]
            raise ValueError(f"must be {' and '.join(said)}")
        return number

    def _number(self, text: str) -> int | float:
        if self.type == "integer":
            return integer(text)
        number = real(text)
        if not math.isfinite(number):
            raise ValueError("must be a finite number")
        return number


def _split(columns: object) -> object:
    """`columns=a,b` and `columns=a&columns=b` say the same."""
    if isinstance(columns, list):
        return [name for given in columns for name in (given.split(",") if isinstance(given, str) else [given])]
    return columns


class Wanted(BaseModel):
    """What a client wants of a result. `where.COLUMN=value` and the query's own parameters come beside these."""

    model_config = ConfigDict(extra="allow")

    columns: Annotated[list[str], BeforeValidator(_split)] = Field(
        [], max_length=200, description="Only these columns, in this order, as `a,b` or repeated; none for all."
    )
    limit: int | None = Field(None, ge=0, le=10**12, description="Rows at most.", examples=[100])

    strict: bool = Field(
        False, description="Fail instead of altering values: invalid UTF-8, and in JSON numbers that are not finite."
    )

    def others(self, parameters: Mapping[str, Parameter]) -> tuple[dict[str, Any], dict[str, str]]:
        """Read the values of parameters, and of columns; raises Problem 422 naming everything that is wrong."""
        errors: list[dict[str, str]] = []
        values: dict[str, Any] = {}
        where: dict[str, str] = {}

        def refuse(name: str, detail: str) -> None:
            errors.append({"in": "query", "name": name[:100], "detail": detail})

        for name, given in (self.model_extra or {}).items():
            match = WHERE.fullmatch(name)
            if not match and name not in parameters:
                refuse(name, f"unknown parameter; known: {', '.join(known_names(parameters))}")
            elif len(given) > 1:
                refuse(name, f"given {len(given)} times, expected once")
            elif match:
                where[match["dotted"] or match["bracketed"]] = given[0]
            else:
                try:
                    values[name] = parameters[name].read(given[0])
                except ValueError as error:
                    refuse(name, str(error))
        for name, parameter in parameters.items():
            if name not in (self.model_extra or {}):
                if parameter.default is None:
                    refuse(name, "is required")
                else:
                    values[name] = parameter.default
        if errors:
            raise Problem.of_parameters(errors)
        return values, where


RESERVED = ("columns", "limit", "strict", "end", "last_event_id")


def known_names(parameters: Mapping[str, Parameter]) -> Sequence[str]:
    """What an export takes in its query."""
    return [*sorted(parameters), "columns", "limit", "strict", "end", "where.COLUMN"]
