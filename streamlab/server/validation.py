"""A request, read into the models its endpoint declared, or one refusal that names everything wrong with it."""

from typing import Any, get_args, get_origin

from aiohttp import web
from pydantic import BaseModel, ValidationError

from streamlab.problems import Problem, faults
from streamlab.request_body import read_json
from streamlab.scenario import Endpoint


async def read_parameters(request: web.Request, endpoint: Endpoint) -> dict[str, BaseModel]:
    """Return the keyword arguments of an endpoint's handler: `path`, `query` and `body`, as far as declared.

    Raises Problem 422 listing every bad or unknown parameter, 400 for a body that is not JSON, 408 for one that
    does not arrive within `BODY_SECONDS`, 413 for one that is too large, 415 for another type.
    """
    errors: list[dict[str, Any]] = []
    found: dict[str, BaseModel] = {}
    if endpoint.path_model is not None:
        named = {name: value for name, value in request.match_info.items() if name in endpoint.path_model.model_fields}
        _decode("path", endpoint.path_model, named, found, errors)
    query, unknown = _query(request, endpoint.query)
    errors += unknown
    if endpoint.query is not None:
        _decode("query", endpoint.query, query, found, errors)
    if endpoint.body is not None:
        _decode("body", endpoint.body, await read_json(request), found, errors)
    if errors:
        raise Problem.of_parameters(errors)
    return found


def _query(request: web.Request, model: type[BaseModel] | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    fields = {field.alias or name: field for name, field in model.model_fields.items()} if model else {}
    takes_others = model is not None and model.model_config.get("extra") == "allow"
    values: dict[str, Any] = {}
    errors: list[dict[str, Any]] = []
    for name in dict.fromkeys(request.query):
        given = request.query.getall(name)
        if name not in fields and takes_others:
            values[name] = given
        elif name not in fields:
            known = f"known: {', '.join(sorted(fields))}" if fields else "this route has none"
            errors.append({"in": "query", "name": name[:100], "detail": f"unknown parameter; {known}"})
        elif _takes_many(fields[name].annotation):
            values[name] = given
        elif len(given) > 1:
            errors.append({"in": "query", "name": name, "detail": f"given {len(given)} times, expected once"})
        else:
            values[name] = given[0]
    return values, errors


def _takes_many(annotation: Any) -> bool:
    many = (list, tuple, set, frozenset)
    return get_origin(annotation) in many or any(get_origin(choice) in many for choice in get_args(annotation))


def _decode(
    place: str,
    model: type[BaseModel],
    values: Any,
    found: dict[str, BaseModel],
    errors: list[dict[str, Any]],
) -> None:
    refused = {error["name"] for error in errors if error["in"] == place}
    try:
        found[place] = model.model_validate(values, extra=None if model.model_config.get("extra") else "forbid")
    except ValidationError as error:
        errors += [fault for fault in faults(error, place) if fault["name"] not in refused]
