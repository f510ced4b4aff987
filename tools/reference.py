"""Write the tables of docs/ that come from the code: `python -m tools.reference`.

A page marks each with comments: `<!-- configuration -->` for every key of config.toml, and
`<!-- parameters: GET /path -->` for the parameters of a route; `<!-- /configuration -->` or `<!-- /parameters -->` ends
it. The tests fail while a page differs from the code.
"""

import ast
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from streamlab.config import PREFIX, Config, Table
from streamlab.server import openapi
from streamlab.server.app import create_app
from streamlab.server.site import REGISTRY

DOCS = Path(__file__).resolve().parents[1] / "docs"

BLOCK = re.compile(r"(<!-- (configuration|parameters)(?:: ([^>]+?))? -->\n).*?(<!-- /\2 -->)", re.DOTALL)

UNITS = {r"_seconds$|in seconds": "s", r"_mb$": "MB"}
"""The unit of a key, by a pattern in its name or its docstring."""

ENABLED = ["`enabled`", "boolean", "`true`", "", "`false` disables the scenario: it is not even imported."]

SIMPLE_TYPES = {"integer": "integer", "number": "number", "boolean": "boolean"}


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line).strip() + " |\n" for line in lines)


def number(value: float) -> str:
    """Return a number as it is written in a text."""
    return f"{value:,}".removesuffix(".0")


def toml(value: Any) -> str:
    """Return a default as config.toml and requests have it; empty for none."""
    return "" if value is None else f"`{json.dumps(value)}`"


def alternatives(words: Iterable[str]) -> str:
    """Return `a, b or c`."""
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


def type_of(shape: Mapping[str, Any], shown: Callable[[Any], str] = toml) -> str:
    """Return the type of a JSON Schema, in words; `shown` writes the values of an enumeration."""
    if "enum" in shape:
        return alternatives(map(shown, shape["enum"]))
    if several := [choice for choice in shape.get("anyOf", ()) if choice.get("type") != "null"]:
        return alternatives(type_of(choice, shown) for choice in several)
    if shape.get("type") == "array":
        items = type_of(shape["items"], shown)
        return f"list of {items}" if "`" in items else f"list of {items}s"
    named = "patternProperties" in shape or isinstance(shape.get("additionalProperties"), dict)
    if shape.get("type") == "object" or "$ref" in shape:
        return "tables by name" if named else "object"
    return "path" if shape.get("format") == "path" else SIMPLE_TYPES.get(shape.get("type", ""), "text")


def bounds_of(shape: Mapping[str, Any]) -> str:
    """Return the bounds of a JSON Schema, in words; empty for none."""
    if "enum" in shape:
        return ""
    for choice in shape.get("anyOf", ()):
        if choice.get("type") != "null" and (bounds := bounds_of(choice)):
            return bounds
    low, high = shape.get("minimum"), shape.get("maximum")
    words = []
    if low is not None and high is not None:
        words.append(f"{number(low)} to {number(high)}")
    else:
        words += [f"at least {number(low)}"] if low is not None else []
        above, below = shape.get("exclusiveMinimum"), shape.get("exclusiveMaximum")
        words += [f"more than {number(above)}"] if above is not None else []
        words += [f"at most {number(high)}"] if high is not None else []
        words += [f"less than {number(below)}"] if below is not None else []
    for key, unit in (("maxLength", "characters"), ("maxItems", "values"), ("maxProperties", "tables")):
        words += [f"at most {number(shape[key])} {unit}"] if key in shape else []
    return ", ".join(words)


def documented(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings below the fields of a model and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = typing.cast(ast.ClassDef, tree).body
        for item, following in itertools.pairwise(body):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                value = following.value if isinstance(following, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[item.target.id] = " ".join(value.value.split())
    return found


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation, as `Database` in `dict[str, Database]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def keys(name: str, model: type[BaseModel]) -> str:
    """Return the section of a table of config.toml, followed by those of the tables in it."""
    texts, shapes = documented(model), model.model_json_schema()["properties"]
    rows = [ENABLED] if re.fullmatch(r"scenarios\.\w+", name) else []
    inner = ""
    for key, field in model.model_fields.items():
        shape = shapes[field.alias or key]
        unit = next(
            (f", {unit}" for sign, unit in UNITS.items() if re.search(sign, key) or re.search(sign, texts[key])), ""
        )
        default = "required" if field.is_required() else toml(shape.get("default")) or "none"
        is_table = typing.get_origin(field.annotation) is types.UnionType and any(models_in(field.annotation))
        kind = "table" if is_table else type_of(shape) + unit
        rows.append([f"`{key}`", kind, default, bounds_of(shape), texts[key]])
        for nested in models_in(field.annotation):
            inner += "\n" + keys(f"{name}.{key}{'' if is_table else '.NAME'}", nested)
    variable = f"{PREFIX}{name.upper().replace('.', '__')}__"
    example = variable + next(iter(model.model_fields)).upper()
    about = " ".join((inspect.getdoc(model) or "").partition("\n\n")[0].split())
    about = re.sub(r"^`\[[\w.]+\]`: (.)", lambda found: found[1].upper(), about)
    columns = ("key", "type, unit", "default", "allowed", "meaning")
    return f"### `[{name}]`\n\n{about} Environment variables: `{example}` ...\n\n{table(columns, rows)}{inner}"


class Reference:
    """The tables of a server with its default configuration and the plugins that ship."""

    def __init__(self) -> None:
        self._registry = create_app(Config.of({"plugins": {"path": []}}))[REGISTRY]
        routes = [route for plugin in self._registry.plugins for route in plugin.routes]
        self._document = openapi.document(routes, version="", described={})

    def configuration(self) -> str:
        """Return the keys of every table of config.toml."""
        core = {name: kind for name, kind in typing.get_type_hints(Config).items() if inspect.isclass(kind)}
        models: dict[str, type[BaseModel]] = {name: kind for name, kind in core.items() if issubclass(kind, Table)}
        scenarios = [scenario for plugin in self._registry.plugins for scenario in plugin.scenarios]
        models |= {f"scenarios.{each.name}": type(each) for each in scenarios if type(each).model_fields}
        return "\n".join(keys(name, model) for name, model in models.items())

    def parameters(self, method_and_path: str) -> str:
        """Return the parameters of a route, those in a JSON body included."""
        method, path = method_and_path.split()
        operation = self._document["paths"][path][method.lower()]
        shapes = [
            (parameter["name"], parameter["required"], parameter.get("description", ""), parameter["schema"])
            for parameter in operation.get("parameters", ())
        ]
        for content in operation.get("requestBody", {}).get("content", {}).values():
            model = self._document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
            for name, shape in model["properties"].items():
                shapes.append((name, name in model.get("required", ()), shape.get("description", ""), shape))
        rows = []
        for name, is_required, description, shape in shapes:
            default = "required" if is_required else toml(shape.get("default") or None)
            allowed = ", ".join(filter(None, [type_of(shape, lambda value: f"`{value}`"), bounds_of(shape)]))
            rows.append([f"`{name}`", allowed, default, description])
        return table(("parameter", "allowed", "default", "meaning"), rows)

    def filled(self, page: str) -> str:
        """Return a page with its tables as the code defines them."""

        def fill(found: re.Match[str]) -> str:
            begin, kind, argument, end = found.groups()
            text = self.configuration() if kind == "configuration" else self.parameters(argument)
            return f"{begin}\n{text}\n{end}"

        return BLOCK.sub(fill, page)


def main() -> None:
    """Write the tables into the pages."""
    reference = Reference()
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        if (after := reference.filled(before)) != before:
            path.write_text(after, encoding="utf-8")
            print(f"updated docs/{path.name}")


if __name__ == "__main__":
    main()
