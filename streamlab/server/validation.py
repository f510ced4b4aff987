"""Validation of a request by the models that its endpoint declares; one error response names every fault."""

from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, partial
from typing import Any, get_args, get_origin

from aiohttp import web
from pydantic import BaseModel, ValidationError

from streamlab.auth import PRINCIPAL
from streamlab.problems import Problem, faults
from streamlab.request_body import read_json
from streamlab.scenario import Route, labels

from .authorization import authorize_resources

MAX_LISTED = 100
"""Maximum number of allowed values that an error response lists."""


async def read_authorized(request: web.Request, route: Route) -> dict[str, BaseModel]:
    """Return the parameters of a request, as `read_parameters` does, if its principal may use what they name.

    Raises Problem 401 or 403 if it may not, even where they are invalid as well.
    """
    return await read_parameters(
        request,
        route,
        authorize=partial(authorize_resources, request, route),
        may=partial(request[PRINCIPAL].may, route.scenario, route.endpoint.action),
    )


async def read_parameters(
    request: web.Request,
    route: Route,
    *,
    authorize: Callable[[dict[str, BaseModel]], None] = lambda found: None,
    may: Callable[[str], bool] = lambda resource: True,
) -> dict[str, BaseModel]:
    """Return the keyword arguments of an endpoint's handler: `path`, `query` and `body`, as far as declared.

    `authorize` is called with what is valid, before any error is reported; `may` returns whether the client may use a
    resource: an error lists no others. Raises Problem 422 listing every bad or unknown parameter, 404 where only a
    choice in the path is wrong, and 400, 408, 413 or 415 for a body (see `read_json`).
    """
    endpoint = route.endpoint
    errors: list[dict[str, Any]] = []
    found: dict[str, BaseModel] = {}
    if endpoint.path_model is not None:
        named = {name: value for name, value in request.match_info.items() if name in endpoint.path_model.model_fields}
        _decode("path", endpoint.path_model, named, found, errors)
    query, unknown = _read_query(request, endpoint.query)
    errors += unknown
    if endpoint.query is not None:
        _decode("query", endpoint.query, query, found, errors)
    if endpoint.body is not None:
        _decode("body", endpoint.body, await read_json(request), found, errors)
    authorize(found)
    wrong = list(_wrong_choices(route, found, may))
    missing = [error for error in wrong if error["in"] == "path"]
    if missing and not errors:
        raise Problem(404, f"{missing[0]['name']}: {missing[0]['detail']}.", errors=wrong)
    if errors or wrong:
        raise Problem.of_parameters([*errors, *wrong])
    return found


def _wrong_choices(route: Route, found: dict[str, BaseModel], may: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Yield what is wrong with parameters whose values are not among the choices of the route."""
    for name, choices in route.choices.items():
        for where, model in found.items():
            field = labels(type(model)).get(name)
            if field is None or (allowed := choices()) is None:
                continue
            if route.endpoint.names_resource(name):
                allowed = [choice for choice in allowed if may(choice)]
            given = getattr(model, field)
            default = type(model).model_fields[field].get_default(call_default_factory=True)
            values = set(given) if isinstance(given, Collection) and not isinstance(given, str) else {given}
            if given != default and (unknown := sorted(values - set(allowed))):
                known = ", ".join([*allowed][:MAX_LISTED]) or "none"
                more = f" and {len(allowed) - MAX_LISTED} more" if len(allowed) > MAX_LISTED else ""
                yield {"in": where, "name": name, "detail": f"unknown: {', '.join(unknown)}; known: {known}{more}"}


def _read_query(request: web.Request, model: type[BaseModel] | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    values: dict[str, Any] = {}
    errors: list[dict[str, Any]] = []
    if not request.rel_url.raw_query_string:
        return values, errors
    fields = _query_fields(model) if model else {}
    accepts_others = model is not None and model.model_config.get("extra") == "allow"
    for name in dict.fromkeys(request.query):
        given = request.query.getall(name)
        if name not in fields and accepts_others:
            values[name] = given
        elif name not in fields:
            known = f"known: {', '.join(sorted(fields))}" if fields else "this route has none"
            errors.append({"in": "query", "name": name[:100], "detail": f"unknown parameter; {known}"})
        elif fields[name]:
            values[name] = given
        elif len(given) > 1:
            errors.append({"in": "query", "name": name, "detail": f"given {len(given)} times, expected once"})
        else:
            values[name] = given[0]
    return values, errors


@lru_cache(maxsize=1000)
def _query_fields(model: type[BaseModel]) -> dict[str, bool]:
    """Return the names that parameters have in a query, each with whether it may be given more than once."""
    return {field.alias or name: _is_list(field.annotation) for name, field in model.model_fields.items()}


def _is_list(annotation: Any) -> bool:
    lists = (list, tuple, set, frozenset)
    return get_origin(annotation) in lists or any(get_origin(choice) in lists for choice in get_args(annotation))


def _decode(
    where: str,
    model: type[BaseModel],
    values: Any,
    found: dict[str, BaseModel],
    errors: list[dict[str, Any]],
) -> None:
    reported = {error["name"] for error in errors if error["in"] == where}
    try:
        found[where] = model.model_validate(values, extra=None if model.model_config.get("extra") else "forbid")
    except ValidationError as error:
        errors += [fault for fault in faults(error, where) if fault["name"] not in reported]
