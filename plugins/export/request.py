"""The query of an export: columns, filters and parameters, each validated before it reaches the database."""

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
    """Read an integer of 64 bits; raises ValueError."""
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
        raise ValueError("must be an integer")
    return int(text)


_REAL = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?)", re.IGNORECASE)


def real(text: str) -> float:
    """Read a number in ASCII digits, or an infinity; raises ValueError. `float` accepts the digits of every script."""
    if not _REAL.fullmatch(text):
        raise ValueError("must be a number")
    return float(text)


def truth(text: str) -> bool:
    """Read a boolean; raises ValueError."""
    if text.lower() not in _TRUTHS:
        raise ValueError("must be true or false")
    return _TRUTHS[text.lower()]


class Parameter(BaseModel):
    """A parameter of a configured SQL statement, `:name`, which requests may set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text", "integer", "real", "boolean"] = "text"
    """Its type; a request with a value of another type is rejected."""
    default: str | int | float | bool | None = None
    """Its value in a request without it; a parameter without a default is required."""
    minimum: float | None = None
    """Minimum of a number."""
    maximum: float | None = None
    """Maximum of a number."""
    max_length: int = Field(200, ge=0, le=4000)
    """Maximum length of a text, in characters."""
    choices: tuple[str, ...] = ()
    """The allowed texts; empty for any."""
    description: str = ""
    """Description for people."""

    @model_validator(mode="after")
    def _default_fits(self) -> "Parameter":
        if self.default is not None:
            given = self.default
            self.read(str(given).lower() if isinstance(given, bool) else str(given))
        return self

    def read(self, text: str) -> str | int | float | bool:
        """Read its value; raises ValueError with what is allowed."""
        if self.type == "text":
            if len(text) > self.max_length:
                raise ValueError(f"must have at most {self.max_length} characters")
            if self.choices and text not in self.choices:
                raise ValueError(f"must be one of {', '.join(self.choices)}")
            return text
        if self.type == "boolean":
            return truth(text)
        number = self._number(text)
        if (self.minimum is not None and number < self.minimum) or (self.maximum is not None and number > self.maximum):
            bounds = (("at least", self.minimum), ("at most", self.maximum))
            allowed = [f"{words} {bound:g}" for words, bound in bounds if bound is not None]
            raise ValueError(f"must be {' and '.join(allowed)}")
        return number

    def _number(self, text: str) -> int | float:
        if self.type == "integer":
            return integer(text)
        number = real(text)
        if not math.isfinite(number):
            raise ValueError("must be a finite number")
        return number


def _split(columns: object) -> object:
    """Split `columns=a,b` into a list, as for `columns=a&columns=b`."""
    if isinstance(columns, list):
        return [name for given in columns for name in (given.split(",") if isinstance(given, str) else [given])]
    return columns


class RowsQuery(BaseModel):
    """The columns and rows of a result; further members are `where.COLUMN=value` and parameters of the SQL."""

    model_config = ConfigDict(extra="allow")

    columns: Annotated[list[str], BeforeValidator(_split)] = Field(
        [], max_length=200, description="Only these columns, in this order, as `a,b` or repeated; empty for all."
    )
    limit: int | None = Field(None, ge=0, le=10**12, description="Maximum number of rows.", examples=[100])

    strict: bool = Field(
        False, description="Fail instead of altering values: invalid UTF-8, and in JSON numbers that are not finite."
    )

    def read_values(self, parameters: Mapping[str, Parameter]) -> tuple[dict[str, Any], dict[str, str]]:
        """Read the values of parameters and of filters by column; raises Problem 422 with every invalid one."""
        errors: list[dict[str, str]] = []
        values: dict[str, Any] = {}
        where: dict[str, str] = {}

        def reject(name: str, detail: str) -> None:
            errors.append({"in": "query", "name": name[:100], "detail": detail})

        for name, given in (self.model_extra or {}).items():
            match = WHERE.fullmatch(name)
            if not match and name not in parameters:
                reject(name, f"unknown parameter; known: {', '.join(known_names(parameters))}")
            elif len(given) > 1:
                reject(name, f"given {len(given)} times, expected once")
            elif match:
                where[match["dotted"] or match["bracketed"]] = given[0]
            else:
                try:
                    values[name] = parameters[name].read(given[0])
                except ValueError as error:
                    reject(name, str(error))
        for name, parameter in parameters.items():
            if name not in (self.model_extra or {}):
                if parameter.default is None:
                    reject(name, "is required")
                else:
                    values[name] = parameter.default
        if errors:
            raise Problem.of_parameters(errors)
        return values, where


RESERVED = ("columns", "limit", "strict", "end", "last_event_id")
"""Names that parameters of an SQL statement cannot have."""


def known_names(parameters: Mapping[str, Parameter]) -> Sequence[str]:
    """Return the names of all parameters in the query of an export."""
    return [*sorted(parameters), "columns", "limit", "strict", "end", "where.COLUMN"]
