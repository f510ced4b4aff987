"""JSON Schemas that the embedded model can follow at a bounded cost.

llama.cpp makes a grammar of a schema, and tries every token of its vocabulary against every state that the grammar may
be in. An ambiguous grammar (the pattern `^(a?){1,500}$`, two alternatives that begin alike in an array of arrays) has
enough states that one token takes minutes, during which no other request gets any. So only keywords are accepted that
lead to one state: no patterns, no recursion, alternatives that differ in their first character.
"""

from typing import Any

DEPTH = 12
"""Maximum depth of a schema, references followed."""

NODES = 300
"""Maximum number of schemas within a schema, references followed."""

COUNT = 1000
"""Maximum of minItems, maxItems, minLength and maxLength."""

_IGNORED = frozenset({"$defs", "definitions", "$schema", "$id", "title", "description", "default", "examples"})
_KNOWN = _IGNORED | {
    "$ref", "type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "oneOf",
    "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
}  # fmt: skip
_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})


def check_schema(schema: dict[str, Any]) -> None:
    """Raise ValueError where a schema is too large, or has keywords that the embedded model does not support."""
    definitions = {
        f"#/{section}/{name}": definition
        for section in ("$defs", "definitions")
        if isinstance(defined := schema.get(section), dict)
        for name, definition in defined.items()
    }
    _Checker(definitions).check(schema, 0)


class _Checker:
    def __init__(self, definitions: dict[str, Any]) -> None:
        self._definitions = definitions
        self._nodes = 0

    def check(self, schema: Any, depth: int) -> set[str]:
        """Check a schema and its parts; return the JSON types of the values that it allows."""
        self._nodes += 1
        if depth > DEPTH or self._nodes > NODES:
            raise ValueError(f"is deeper than {DEPTH} levels (or recursive), or has more than {NODES} parts")
        if not isinstance(schema, dict):
            raise ValueError("every part of it must be an object")
        if unknown := sorted(set(schema) - _KNOWN):
            raise ValueError(f"the keyword {unknown[0][:50]!r} is not supported by this model")
        if "$ref" in schema:
            if not isinstance(schema["$ref"], str) or schema["$ref"] not in self._definitions:
                raise ValueError("a $ref must name one of its $defs, as #/$defs/Name")
            return self.check(self._definitions[schema["$ref"]], depth + 1)
        for name in ("minItems", "maxItems", "minLength", "maxLength"):
            count = schema.get(name, 0)
            if not isinstance(count, int) or not 0 <= count <= COUNT:
                raise ValueError(f"{name} must be 0 to {COUNT}")
        alternatives = schema.get("anyOf") or schema.get("oneOf")
        if alternatives is not None:
            return self._alternatives(alternatives, depth)
        return self._plain(schema, depth)

    def _alternatives(self, alternatives: Any, depth: int) -> set[str]:
        types: set[str] = set()
        for alternative in alternatives if isinstance(alternatives, list) else ():
            more = self.check(alternative, depth + 1)
            if types & more:
                raise ValueError("the alternatives of anyOf and oneOf must have different types")
            types |= more
        return types

    def _plain(self, schema: dict[str, Any], depth: int) -> set[str]:
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise ValueError("properties must be an object")
        for part in properties.values():
            self.check(part, depth + 1)
        for name in ("items", "additionalProperties"):
            if name in schema and not isinstance(schema[name], bool):
                self.check(schema[name], depth + 1)
        if "enum" in schema or "const" in schema:
            values = schema.get("enum", [schema.get("const")])
            if not isinstance(values, list) or not values:
                raise ValueError("enum must be a list of values")
            return {_type_of(value) for value in values}
        types = schema.get("type", sorted(_TYPES))
        types = types if isinstance(types, list) else [types]
        if not all(isinstance(name, str) and name in _TYPES for name in types):
            raise ValueError(f"type must be one of {', '.join(sorted(_TYPES))}")
        return {"number" if name == "integer" else name for name in types}


def _type_of(value: Any) -> str:
    """Return the JSON type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]
