"""Requests built from an endpoint's OpenAPI operation: a valid one, and many invalid ones."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import quote, urlencode

from .wire import request

EVENTS = "text/event-stream"

_LONG_JSON = 100_000
"""Maximum length of a member of a body that is sent as too long, in characters."""

_LONG = 4000
"""Maximum length of a value that is sent as too long, in characters; a request line holds 8190 bytes."""


class NoSample(Exception):
    """No request can be built from an endpoint's declaration; the message says what is missing."""


MISSING = object()
"""The value of a required parameter that is left out."""

_FORMATS = {"date", "date-time", "time", "duration", "uuid", "ipv4", "ipv6"}
"""Formats of a string that `yesterday` does not have."""

_MAX_ITEMS = 100
"""Maximum length of a list that is sent as too long."""


@dataclass(frozen=True)
class InvalidValue:
    """An invalid value of a parameter, and why it is invalid."""

    name: str
    where: str
    """`path`, `query` or `body`."""
    value: Any
    """MISSING for a required parameter that is left out."""
    why: str


@dataclass(frozen=True)
class EndpointForm:
    """An endpoint with one of its media types, as its OpenAPI operation declares it."""

    method: str
    template: str
    operation: Mapping[str, Any]
    schemas: Mapping[str, Any]
    """The document's `components.schemas`."""
    methods: frozenset[str]
    """The methods of its path."""
    media: str
    """The value of Accept; empty where the endpoint has one form."""
    noun: ClassVar[str] = "endpoint"
    """What it is, for reports."""

    @property
    def endpoint(self) -> str:
        """`GET /stream/hello`."""
        return f"{self.method} {self.template}"

    @property
    def label(self) -> str:
        """The endpoint, and its form where it has several."""
        return f"{self.endpoint} as {self.media}" if self.media else self.endpoint

    @property
    def sends(self) -> tuple[str, ...]:
        """The media types of a 200."""
        return tuple(media.partition(";")[0] for media in self.operation["responses"]["200"].get("content", {}))

    @property
    def statuses(self) -> frozenset[int]:
        """Every status that is declared for success or by the protocol."""
        return frozenset(int(status) for status in self.operation["responses"] if status.isdigit())

    @property
    def carries_events(self) -> bool:
        """Whether the response is an event stream."""
        return self.media == EVENTS or self.sends == (EVENTS,)

    @property
    def parameters(self) -> list[Mapping[str, Any]]:
        """The declared parameters of path and query, as OpenAPI's Parameter Objects."""
        return list(self.operation.get("parameters", ()))

    @property
    def has_body(self) -> bool:
        """Whether a request needs a body."""
        return "requestBody" in self.operation

    @property
    def body_schema(self) -> Mapping[str, Any]:
        """The schema of a JSON body, empty where the endpoint reads the body itself."""
        content = self.operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        return self._resolved(content.get("schema", {}))

    def message(
        self,
        values: Mapping[str, Any],
        host: str,
        *,
        method: str = "",
        version: str = "1.1",
        headers: Mapping[str, str] | None = None,
        without: tuple[str, ...] = (),
        body: bytes | None = None,
    ) -> bytes:
        """Return a request: `values` by name override the declared examples, parameters in `without` are omitted.

        Raises NoSample for a required value without an example.
        """
        fields = {"Accept": self.media} if self.media else {}
        if self.has_body and body is None:
            body = json.dumps(self.body(values)).encode()
        if body is not None:
            fields["Content-Type"] = "application/json"
        return request(
            method or self.method,
            self.target(values, without=without),
            host=host,
            headers=fields | dict(headers or {}),
            body=body,
            version=version,
        )

    def target(self, values: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> str:
        """Return the path and query of a request."""
        path, query = self.template, []
        for parameter in self.parameters:
            name = parameter["name"]
            if parameter["in"] == "path":
                path = path.replace(f"{{{name}}}", quote(str(self._value(parameter, values)), safe="/"))
            elif name not in without and (name in values or "example" in parameter or parameter["required"]):
                value = self._value(parameter, values)
                query += [(name, item) for item in (value if isinstance(value, list) else [value])]
        return f"{path}{'?' if query else ''}{urlencode(query)}"

    def _value(self, parameter: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
        name = parameter["name"]
        if name in values:
            return values[name]
        if "example" in parameter:
            return parameter["example"]
        return _generated(self._resolved(parameter["schema"]), f"the parameter {name!r} of {self.endpoint}")

    def body(self, values: Mapping[str, Any]) -> Any:
        """Return a JSON body: the declared example, overridden by `values` of its members."""
        content = self.operation["requestBody"]["content"]
        media = content.get("application/json") or next(iter(content.values()))
        schema, example = self.body_schema, media.get("example", {})
        if not isinstance(example, dict):
            return example
        members, example = schema.get("properties", {}), dict(example)
        for name in schema.get("required", ()):
            if name not in example and name not in values:
                what = f"the member {name!r} of the body of {self.endpoint}"
                example[name] = _generated(self._resolved(members[name]), what)
        return example | {name: value for name, value in values.items() if name in members or name in example}

    def invalid_values(self) -> Iterator[InvalidValue]:
        """Yield invalid values of its parameters and of the members of its body."""
        for parameter in self.parameters:
            for value, why in _invalid_values(self._resolved(parameter["schema"])):
                if parameter["in"] == "query" or not isinstance(value, list):
                    yield InvalidValue(parameter["name"], parameter["in"], value, why)
            if parameter["in"] == "query" and parameter["required"]:
                yield InvalidValue(parameter["name"], "query", MISSING, "is required")
        for name, schema in self.body_schema.get("properties", {}).items():
            for value, why in _invalid_values(self._resolved(schema), typed=True):
                yield InvalidValue(name, "body", value, why)
        for name in self.body_schema.get("required", ()):
            yield InvalidValue(name, "body", MISSING, "is required")

    def numbers(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield every number of a request, with its schema."""
        members = self.body_schema.get("properties", {}).items()
        for name, schema in (*((one["name"], one["schema"]) for one in self.parameters), *members):
            for choice in _choices(self._resolved(schema)):
                if choice.get("type") in ("integer", "number") and "enum" not in choice:
                    yield name, choice

    def texts(self) -> Iterator[str]:
        """Yield the names of the query parameters that accept any text."""
        for parameter in self.parameters:
            schema = self._resolved(parameter["schema"])
            plain = [
                one for one in _choices(schema) if one.get("type") == "string" and not one.keys() & {"enum", "pattern"}
            ]
            if parameter["in"] == "query" and plain:
                yield parameter["name"]

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        name = schema.get("$ref", "").rpartition("/")[2]
        return self.schemas[name] if name else schema


def forms(document: Mapping[str, Any], scenarios: frozenset[str]) -> list[EndpointForm]:
    """Return the endpoints of scenarios in an OpenAPI document; events and other media types are separate forms."""
    found = []
    for template, operations in document["paths"].items():
        for method, operation in operations.items():
            if scenarios.isdisjoint(operation["tags"]):
                continue
            content = operation["responses"]["200"].get("content", {})
            others = [media for media in content if media != EVENTS]
            several = EVENTS in content and others
            for media in (others[0], EVENTS) if several else ("",):
                schemas = document["components"]["schemas"]
                methods = frozenset(map(str.upper, operations))
                found.append(EndpointForm(method.upper(), template, operation, schemas, methods, media))
    return found


def _choices(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the alternatives of a schema, without null."""
    return [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]


def _generated(schema: Mapping[str, Any], what: str) -> Any:
    """Return a value that a schema accepts; raises NoSample if none can be derived from it."""
    schema = _choices(schema)[0]
    if "default" in schema:
        return schema["default"]
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "boolean":
            return True
        case "integer" | "number":
            return max(schema.get("minimum", 1), min(1, schema.get("maximum", 1)))
        case "string" if "pattern" not in schema and schema.get("minLength", 0) <= 7:
            return "example"[: schema.get("maxLength")]
    raise NoSample(f"{what} needs an example: Field(examples=[...]), or `values` of the test")


def _invalid_values(schema: Mapping[str, Any], *, typed: bool = False) -> Iterator[tuple[Any, str]]:
    """Yield values that a schema excludes; `typed` where a value is JSON and not text."""
    choices = _choices(schema)
    if len(choices) != 1:
        if not any(_accepts_any_text(choice) for choice in choices):
            yield "no-such-value", "is none of the declared types"
        return
    (schema,) = choices
    if schema.keys() & {"enum", "const"}:
        yield "no-such-choice", "is not one of the choices"
        return
    match schema.get("type"):
        case "integer" | "number" as kind:
            yield "many", "is not a number"
            if kind == "integer":
                yield 1.5, "is not an integer"
            yield from _out_of_bounds(schema)
        case "boolean":
            yield "perhaps", "is neither true nor false"
        case "string":
            if typed:
                yield 5, "is not a string"
            if schema.get("format") in _FORMATS:
                yield "yesterday", f"is not a {schema['format']}"
            if "maxLength" in schema and (schema["maxLength"] < _LONG or (typed and schema["maxLength"] < _LONG_JSON)):
                yield "x" * (schema["maxLength"] + 1), f"is longer than {schema['maxLength']}"
            if schema.get("minLength"):
                yield "", "is empty"
            if "pattern" in schema:
                text = next((one for one in ("~ ~", "!", "0", "x") if not re.search(schema["pattern"], one)), None)
                if text is not None:
                    yield text, f"does not match {schema['pattern']}"
        case "array":
            for value, why in _invalid_values(schema.get("items", {}), typed=typed):
                yield [value], why
            yield from _wrong_lengths(schema)
        case "object" if typed:
            yield "no object", "is not an object"


def missing_lengths(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the maximum lengths that a schema lacks: of a text of any form, and of a list."""
    for choice in _choices(schema):
        kind = choice.get("type")
        if (
            kind == "string"
            and "maxLength" not in choice
            and not choice.keys() & {"enum", "const", "pattern", "format"}
        ):
            yield "maximum length: Field(max_length=...)"
        if kind == "array":
            if "maxItems" not in choice:
                yield "maximum number of items: Field(max_length=...)"
            yield from missing_lengths(choice.get("items", {}))


def _accepts_any_text(schema: Mapping[str, Any]) -> bool:
    """Return whether some plain text may fit a schema: it is a string without a pattern, or its type is unknown."""
    if schema.keys() & {"enum", "const"}:
        return False
    if schema.get("type") == "string":
        return schema.get("format") not in _FORMATS
    return schema.get("type") not in ("integer", "number", "boolean", "null")


def _wrong_lengths(schema: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield lists that are too long or too short, where a valid item can be derived."""
    try:
        item = _generated(schema.get("items", {}), "an item")
    except NoSample:
        return
    if schema.get("maxItems", _MAX_ITEMS) < _MAX_ITEMS and not schema.get("uniqueItems"):
        yield [item] * (schema["maxItems"] + 1), f"has more than {schema['maxItems']} items"
    if schema.get("minItems", 0) > 1:
        yield [item] * (schema["minItems"] - 1), f"has fewer than {schema['minItems']} items"


def _out_of_bounds(schema: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    if "maximum" in schema:
        yield schema["maximum"] + 1, f"is more than {schema['maximum']}"
    if "exclusiveMaximum" in schema:
        yield schema["exclusiveMaximum"], f"is not less than {schema['exclusiveMaximum']}"
    if "minimum" in schema:
        yield schema["minimum"] - 1, f"is less than {schema['minimum']}"
    if "exclusiveMinimum" in schema:
        yield schema["exclusiveMinimum"], f"is not more than {schema['exclusiveMinimum']}"
