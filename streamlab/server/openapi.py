"""The declarations of endpoints as an OpenAPI 3.1 document and as curl commands."""

import json
import logging
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any
from urllib.parse import quote, urlencode

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from streamlab.problems import MEDIA_TYPE
from streamlab.scenario import Endpoint, Route

from .credentials import SESSION_COOKIE

log = logging.getLogger(__name__)

MAX_CHOICES = 1000
"""Maximum number of choices of a parameter that the document lists; with more, the parameter is any text."""

_REFERENCE = "#/components/schemas/{model}"

_NULL = {"type": "null"}

PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "An error response (RFC 9457).",
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


SECURITY_SCHEMES: dict[str, Any] = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "description": "A token, as `streamlab token NAME` prints one, or a JWT.",
    },
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": SESSION_COOKIE,
        "description": "The cookie of a browser that has signed in at /auth/session; scripts cannot read or set it.",
    },
}
"""The credentials of a request, by which pages offer to enter them."""


def document(
    routes: Iterable[Route],
    *,
    version: str,
    described: Mapping[str, str],
    path: str = "",
    is_open: bool = True,
    may: Callable[[Route, str], bool] = lambda route, resource: True,
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of all routes; `described` has a sentence for each scenario.
    The paths of the document are below `path`, where a proxy serves them.

    Unless the server `is_open`, routes that are not public need credentials. `may` returns whether the client may use a
    resource of a route: no others are listed as choices.

    Parameters and their bounds come from the models that validate them. Source: OpenAPI Specification 3.1.1.
    """
    listed = [_restricted_to(route, may) for route in routes]
    models = [model for r in listed for model in (r.endpoint.body, r.error_format and r.error_format.model) if model]
    bodies = list(dict.fromkeys(models))
    named, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    schemas = {body: named[body, "validation"] for body in bodies}
    for r in listed:
        if r.endpoint.body is not None and not r.endpoint.body.model_config.get("extra"):
            _close(schemas[r.endpoint.body], definitions["$defs"])
    _restrict_bodies(listed, schemas, definitions.get("$defs", {}))
    paths: dict[str, dict[str, Any]] = {}
    for route in listed:
        operation = _operation(route, schemas)
        if not is_open:  # what is public responds by the principal, too
            optional: list[dict[str, list[str]]] = [{}] if route.endpoint.public else []
            operation["security"] = [*optional, *({name: []} for name in SECURITY_SCHEMES)]
        paths.setdefault(route.endpoint.template, {})[route.endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "streamlab",
            "version": version,
            "description": "A streaming server for backends. Error responses are `application/problem+json`.",
        },
        **({"servers": [{"url": path}]} if path else {}),
        "tags": [{"name": name, "description": sentence} for name, sentence in described.items()],
        "paths": paths,
        "components": {
            "schemas": {"Problem": PROBLEM_SCHEMA, **definitions.get("$defs", {})},
            **({} if is_open else {"securitySchemes": SECURITY_SCHEMES}),
        },
    }


def _restricted_to(route: Route, may: Callable[[Route, str], bool]) -> Route:
    """Return a route whose choices of a resource are those that the client may use."""

    def restricted(choices: Callable[[], Collection[str] | None]) -> Collection[str] | None:
        allowed = choices()
        return None if allowed is None else [choice for choice in allowed if may(route, choice)]

    own = {name: choices for name, choices in route.choices.items() if route.endpoint.names_resource(name)}
    if not own:
        return route
    return replace(route, choices={**route.choices, **{name: partial(restricted, own[name]) for name in own}})


def _close(schema: Mapping[str, Any], definitions: Mapping[str, dict[str, Any]]) -> None:
    """Set `additionalProperties` to false in the models that a schema refers to, directly or not.

    `validation` rejects other fields of a body too, unless its model has a rule for them.
    """
    for name in re.findall(_REFERENCE.format(model='([^"]+)'), json.dumps(schema)):
        if "properties" in definitions[name] and "additionalProperties" not in definitions[name]:
            definitions[name]["additionalProperties"] = False
            _close(definitions[name], definitions)


def _restrict_bodies(
    routes: Iterable[Route], schemas: Mapping[type[BaseModel], Any], definitions: Mapping[str, dict[str, Any]]
) -> None:
    """Add choices to the schemas of bodies; a field whose choices differ between two routes gets none."""
    found: dict[tuple[str, str], list[list[str]]] = {}
    for route in routes:
        if route.endpoint.body is not None:
            name = schemas[route.endpoint.body].get("$ref", "").rpartition("/")[2]
            choices = _choices(route)
            for field in definitions.get(name, {}).get("properties", {}):
                found.setdefault((name, field), []).append(choices.get(field, []))
    for (name, field), lists in found.items():
        if lists[0] and all(choices == lists[0] for choices in lists):
            properties = definitions[name]["properties"]
            properties[field] = _restricted(properties[field], lists[0])


def _choices(route: Route) -> dict[str, list[str]]:
    """Return the choices of a route's parameters by name, as far as they are known and can be listed."""
    found: dict[str, list[str]] = {}
    for name, choices in route.choices.items():
        try:
            allowed = choices()
        except Exception:  # its scenario has not started, or failed to
            log.debug("the choices of %s of %s are unknown", name, route.endpoint.template, exc_info=True)
            continue
        if allowed and len(allowed) <= MAX_CHOICES:
            found[name] = list(allowed)
    return found


def _restricted(shape: Mapping[str, Any], choices: list[str]) -> dict[str, Any]:
    """Return the schema of a text, or of a list of texts, that allows these choices and no others."""
    if "items" in shape:
        return {**shape, "items": _restricted(shape["items"], choices)}
    if "anyOf" in shape:
        branches = [one if one == _NULL else _restricted(one, choices) for one in shape["anyOf"]]
        return {**shape, "anyOf": branches}
    default = {name: value for name, value in shape.items() if name != "default" or value in choices}
    return {**default, "enum": choices}


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
        # An extension, for pages that show the command with other parameters: its arguments, with "{url}" for the URL.
        "x-curl": _curl_arguments(endpoint),
        "parameters": [*_path_parameters(route), *_query_parameters(route)],
        "responses": {
            "200": {"description": endpoint.summary, "content": {media: {} for media in endpoint.sends}},
            **{str(status): {"description": meaning} for status, meaning in endpoint.responses.items()},
            "default": {"description": "An error of the request or of the server.", "content": errors},
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
    """Return the body of an endpoint's curl command as the `example` of a media type; nothing if it has none."""
    body = next((body for option, body in pairwise(_curl_arguments(endpoint)) if option in ("--json", "-d")), None)
    if body is None:
        return {}
    try:
        return {"example": json.loads(body)}
    except ValueError:
        return {"example": body}


def body_example(model: type[BaseModel]) -> dict[str, Any]:
    """Return an example of a body: the model's first example, or the first examples of its fields combined."""
    schema = _schema(model)
    fields = {name: shape["examples"][0] for name, shape in schema.get("properties", {}).items() if "examples" in shape}
    return dict(next(iter(schema.get("examples", ())), fields))


def _curl_arguments(endpoint: Endpoint) -> list[str]:
    try:
        return shlex.split(endpoint.curl)
    except ValueError:  # an unclosed quote must not make the complete document fail
        return endpoint.curl.split()


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    described = {one["name"]: one for one in _parameters(route.endpoint.path_model, "path", _choices(route))}
    names = re.findall(r"\{(\w+)\}", route.endpoint.template)
    plain = {"in": "path", "required": True, "schema": {"type": "string"}}
    return [{"name": name, **plain, **described.get(name, {}), "required": True} for name in names]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    return list(_parameters(route.endpoint.query, "query", _choices(route)))


def _parameters(
    model: type[BaseModel] | None, where: str, choices: Mapping[str, list[str]]
) -> Iterator[dict[str, Any]]:
    if model is None:
        return
    schema = _inlined(model)
    for name, described in schema.get("properties", {}).items():
        parameter = {"name": name, "in": where, "required": name in schema.get("required", ())}
        shape = _without_null(described)
        if description := shape.pop("description", ""):
            parameter["description"] = description
        examples = shape.pop("examples", [])
        shape.pop("title", None)
        if name in choices:
            shape = _restricted(shape, choices[name])
        if examples or (name in choices and parameter["required"]):
            parameter["example"] = _fitting(next(iter(examples), None), shape, choices.get(name))
        yield {**parameter, "schema": shape}


def _without_null(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter whose model allows None: it may be absent, but a text is never null."""
    branches = [branch for branch in shape.get("anyOf", ()) if branch != _NULL]
    if len(branches) == len(shape.get("anyOf", ())):
        return dict(shape)
    others = {key: value for key, value in shape.items() if key != "anyOf" and (key, value) != ("default", None)}
    return {**(branches[0] if len(branches) == 1 else {"anyOf": branches}), **others}


def _fitting(example: Any, shape: Mapping[str, Any], choices: list[str] | None) -> Any:
    """Return an example of a parameter that its schema allows: a list for an array, and choices that exist."""
    if shape.get("type") == "array":
        given = example if isinstance(example, list) else [] if example is None else [example]
        return given if choices is None else [one for one in given if one in choices] or choices[:1]
    return example if choices is None or example in choices else choices[0]


@lru_cache(maxsize=1024)
def _schema(model: type[BaseModel]) -> Mapping[str, Any]:
    """Return the schema of a model, which pydantic would compute again at each call."""
    return model.model_json_schema()


@lru_cache(maxsize=1024)
def _inlined(model: type[BaseModel]) -> Mapping[str, Any]:
    """Return the schema of a model, its `$defs` (enumerations) inlined: that of a parameter cannot have any."""
    schema = dict(_schema(model))
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


def curl(route: Route, origin: str, *, may: Callable[[Route, str], bool] = lambda route, resource: True) -> str:
    """Return a curl command for a route, with the examples of its models, quoted for a shell.

    `may` returns whether the client may use a resource of a route: no others are examples.
    """
    route = _restricted_to(route, may)
    endpoint = route.endpoint
    path = endpoint.template
    for parameter in _path_parameters(route):
        path = path.replace(f"{{{parameter['name']}}}", quote(str(parameter.get("example", ""))))
    query = [(item["name"], item["example"]) for item in _query_parameters(route) if "example" in item]
    address = f"{origin}{path}{'?' if query else ''}{urlencode(query, doseq=True)}"
    arguments = endpoint.curl.replace("{url}", shlex.quote(address))
    if endpoint.body is not None and "-d " not in arguments:
        example = json.dumps(body_example(endpoint.body))
        arguments = f"-H 'Content-Type: application/json' -d {shlex.quote(example)} {arguments}"
    method = f"-X {endpoint.method} " if endpoint.method not in ("GET", "POST") else ""
    return f"curl {method}{arguments}"
