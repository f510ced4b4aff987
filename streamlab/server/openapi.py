"""One declaration of an endpoint, told as an OpenAPI 3.1 document, and as a curl command that tries it."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import quote, urlencode

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from streamlab.problems import MEDIA_TYPE
from streamlab.scenario import Endpoint, Route

_REFERENCE = "#/components/schemas/{model}"

PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "A refusal, as RFC 9457 describes it.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["in", "name", "detail"],
                "properties": {
                    "in": {"type": "string", "enum": ["path", "query", "body"]},
                    "name": {"type": "string"},
                    "detail": {"type": "string"},
                },
            },
        },
    },
}


def document(routes: Iterable[Route], *, version: str, described: Mapping[str, str]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of all routes; `described` has a sentence for each scenario.

    Parameters come from the models that validate them, bounds included. Source: OpenAPI Specification 3.1.1.
    """
    listed = list(routes)
    models = [model for r in listed for model in (r.endpoint.body, r.error_format and r.error_format.model) if model]
    bodies = list(dict.fromkeys(models))
    named, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    schemas = {body: named[body, "validation"] for body in bodies}
    for r in listed:
        if r.endpoint.body is not None and not r.endpoint.body.model_config.get("extra"):
            _close(schemas[r.endpoint.body], definitions["$defs"])
    paths: dict[str, dict[str, Any]] = {}
    for route in listed:
        paths.setdefault(route.endpoint.template, {})[route.endpoint.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "streamlab",
            "version": version,
            "description": "A streaming server for backends. Refusals are `application/problem+json`.",
        },
        "tags": [{"name": name, "description": sentence} for name, sentence in described.items()],
        "paths": paths,
        "components": {"schemas": {"Problem": PROBLEM_SCHEMA, **definitions.get("$defs", {})}},
    }


def _close(schema: Mapping[str, Any], definitions: Mapping[str, dict[str, Any]]) -> None:
    """Say of the models that a schema refers to, directly or not, that they have no other fields.

    `validation` reads a body so, where its model has no rule on other fields.
    """
    for name in re.findall(_REFERENCE.format(model='([^"]+)'), json.dumps(schema)):
        if "properties" in definitions[name] and "additionalProperties" not in definitions[name]:
            definitions[name]["additionalProperties"] = False
            _close(definitions[name], definitions)


def _operation(route: Route, schemas: Mapping[type[BaseModel], Any]) -> dict[str, Any]:
    endpoint, error_format = route.endpoint, route.error_format
    errors: dict[str, Any] = {MEDIA_TYPE: {"schema": {"$ref": _REFERENCE.format(model="Problem")}}}
    if error_format is not None:
        errors = {error_format.media_type: {"schema": schemas[error_format.model]}}
    operation: dict[str, Any] = {
        "operationId": f"{route.scenario}_{endpoint.name}",
        "tags": [route.scenario],
        "summary": endpoint.summary,
        "description": endpoint.description,
        # An extension, for pages that show the command with other parameters: its words, "{url}" among them.
        "x-curl": _words(endpoint),
        "parameters": [*_path_parameters(endpoint), *_parameters(endpoint.query, "query")],
        "responses": {
            "200": {"description": endpoint.summary, "content": {media: {} for media in endpoint.sends}},
            **{str(status): {"description": meaning} for status, meaning in endpoint.responses.items()},
            "default": {"description": "What was wrong with the request, or with the server.", "content": errors},
        },
    }
    if endpoint.body is not None:
        content = {"application/json": {"schema": schemas[endpoint.body], "example": body_example(endpoint.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    elif endpoint.takes:
        first, *others = endpoint.takes
        content = {first: _example(endpoint), **{media: {} for media in others}}
        operation["requestBody"] = {"required": True, "content": content}
    return {name: value for name, value in operation.items() if value not in ("", [])}


def _example(endpoint: Endpoint) -> dict[str, Any]:
    """The body that the curl command of an endpoint sends, as the `example` of a media type; nothing without one."""
    body = next((body for option, body in pairwise(_words(endpoint)) if option in ("--json", "-d")), None)
    if body is None:
        return {}
    try:
        return {"example": json.loads(body)}
    except ValueError:
        return {"example": body}


def body_example(model: type[BaseModel]) -> dict[str, Any]:
    """Return a body that tries an endpoint: the first of the model's examples, or those of its fields put together."""
    schema = model.model_json_schema()
    fields = {name: shape["examples"][0] for name, shape in schema.get("properties", {}).items() if "examples" in shape}
    return dict(next(iter(schema.get("examples", ())), fields))


def _words(endpoint: Endpoint) -> list[str]:
    try:
        return shlex.split(endpoint.curl)
    except ValueError:  # a quote that is not closed is its author's to mend, and no reason to describe nothing
        return endpoint.curl.split()


def _path_parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    described = {parameter["name"]: parameter for parameter in _parameters(endpoint.path_model, "path")}
    names = re.findall(r"\{(\w+)\}", endpoint.template)
    plain = {"in": "path", "required": True, "schema": {"type": "string"}}
    return [{"name": name, **plain, **described.get(name, {}), "required": True} for name in names]


def _parameters(model: type[BaseModel] | None, place: str) -> Iterator[dict[str, Any]]:
    if model is None:
        return
    schema = _inlined(model.model_json_schema())
    for name, shape in schema.get("properties", {}).items():
        parameter = {"name": name, "in": place, "required": name in schema.get("required", ())}
        if description := shape.pop("description", ""):
            parameter["description"] = description
        if examples := shape.pop("examples", []):
            parameter["example"] = examples[0]
        shape.pop("title", None)
        yield {**parameter, "schema": shape}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its `$defs` (enumerations) put where they are named: a parameter has no place for them."""
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix("#/$defs/")
            return (
                resolve({**definitions[name], **value, "$ref": None})
                if name in definitions
                else {key: resolve(item) for key, item in value.items() if item is not None or key != "$ref"}
            )
        return [resolve(item) for item in value] if isinstance(value, list) else value

    return dict(resolve(schema))


def curl(endpoint: Endpoint, origin: str) -> str:
    """Return a command that tries an endpoint: examples of its models where they give some, quoted for a shell."""
    path = endpoint.template
    for parameter in _path_parameters(endpoint):
        path = path.replace(f"{{{parameter['name']}}}", quote(str(parameter.get("example", ""))))
    query = [(item["name"], item["example"]) for item in _parameters(endpoint.query, "query") if "example" in item]
    address = f"{origin}{path}{'?' if query else ''}{urlencode(query)}"
    words = endpoint.curl.replace("{url}", shlex.quote(address))
    if endpoint.body is not None and "-d " not in words:
        example = json.dumps(body_example(endpoint.body))
        words = f"-H 'Content-Type: application/json' -d {shlex.quote(example)} {words}"
    verb = f"-X {endpoint.method} " if endpoint.method not in ("GET", "POST") else ""
    return f"curl {verb}{words}"
