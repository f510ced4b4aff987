"""The contract of a plugin: a scenario, whose fields are its configuration, and its endpoints."""

import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict

from .auth import TICKET_PARAMETER, Action
from .problems import ErrorFormat, error_format_of

Handler = Callable[..., Awaitable[web.StreamResponse]]
"""An endpoint's method: `async def name(self, request, ...)`, with `path=`, `query=` and `body=` as declared."""

Choices = Callable[[Any], Collection[str] | None]
"""A function of a scenario that returns the allowed values of a parameter; None while any value is allowed."""

ANY = "*"
"""The `resource` of an endpoint that returns what its principal may read, as a list of exports."""

_HandlerT = TypeVar("_HandlerT", bound=Handler)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The declaration of a route: its parameters, its responses, and its documentation."""

    method: str
    path: str
    """The path in aiohttp's syntax, so `/files/{path:.*}` too."""
    path_model: type[BaseModel] | None
    query: type[BaseModel] | None
    body: type[BaseModel] | None
    body_limit: int | None
    """Maximum request body, in bytes; None for that of the server, 1 MiB."""
    takes: tuple[str, ...]
    """Media types of a body that the handler reads itself."""
    starts_work: bool
    """Whether a GET starts work, so that it is not safe in the sense of RFC 9110 (9.2.1)."""
    action: Action
    """What a principal needs a scope for."""
    resource: str
    """The name of the parameter that names what is read or changed; "" for the scenario as a whole, or ANY."""
    public: bool
    """Whether everybody may use it, also without credentials."""
    sends: tuple[str, ...]
    responses: Mapping[int, str]
    """Documented status codes other than 200, each with its meaning."""
    choices: Mapping[str, Choices]
    """The allowed values of text parameters by name, where only the scenario knows them."""
    curl: str
    """The arguments of the curl command that tries it, with `{url}` for the URL of the route."""
    summary: str
    description: str
    name: str
    """The method's name, unique in its scenario."""

    @property
    def template(self) -> str:
        """Return the path in OpenAPI's syntax: `/files/{path}`."""
        return re.sub(r"\{(\w+):[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", r"{\1}", self.path)

    def names_resource(self, parameter: str) -> bool:
        """Return whether a parameter has resources as values: that of `resource`, or with ANY one with `choices`."""
        return parameter in self.choices if self.resource == ANY else parameter == self.resource

    @property
    def models(self) -> dict[str, type[BaseModel]]:
        """Return the models of its parameters by where these are: `path`, `query` and `body`."""
        models = {"path": self.path_model, "query": self.query, "body": self.body}
        return {where: model for where, model in models.items() if model is not None}


def endpoint(
    method: str,
    path: str,
    *,
    path_model: type[BaseModel] | None = None,
    query: type[BaseModel] | None = None,
    body: type[BaseModel] | None = None,
    body_limit: int | None = None,
    takes: str | tuple[str, ...] = (),
    starts_work: bool = False,
    action: Action | None = None,
    resource: str = "",
    public: bool = False,
    sends: str | tuple[str, ...] = "text/plain",
    responses: Mapping[int, str] | None = None,
    choices: Mapping[str, Choices] | None = None,
    curl: str = "-N {url}",
) -> Callable[[_HandlerT], _HandlerT]:
    """Declare a method of a scenario as the handler of `method path`.

    The models are validated before the handler runs and passed to it by keyword: `path_model` as `path`, `query` as
    `query`, `body` (a JSON document) as `body`. An invalid request is rejected with 400, 413 or 422 and every fault in
    it; unknown parameters are rejected by name. (A query model with `extra="allow"` gets them as lists of strings, for
    the handler to check.) The route of a GET serves HEAD too.

    `starts_work` declares that a GET starts work, as a task or a generation: HEAD validates the parameters and sends
    the headers without the handler, and pages of another origin are rejected with 403, as they are with every method
    that is not safe.

    `action` is what a principal needs a scope for, `SCENARIO:ACTION[:RESOURCE]`: by default `read` for GET, and `write`
    for other methods and for a GET that starts work. `resource` is the name of the parameter whose value is the
    RESOURCE of that scope, as the name of an export; without one, a scope that names a RESOURCE does not suffice. With
    `resource=ANY` every scope of the action does, and the handler restricts what it returns by `request[PRINCIPAL]`;
    values of parameters with `choices` are resources then, which need a scope. The server decides before the handler
    runs: 401 without credentials, 403 with such as do not suffice. Endpoints that are `public` are open to everybody.

    `takes` lists the media types of a body that the handler reads itself (see `read_json`), instead of `body`. Either
    has at most `body_limit` bytes (default: 1 MiB), however the handler reads it. `sends` lists the media types of a
    200; the method's docstring becomes summary and description. Write method and path as literals: they are read from
    the source when the plugin cannot be imported.

    `choices` gives parameters the values that only the scenario knows, as names of its configuration: by the
    parameter's name, a function that is called with the scenario and returns the allowed texts, or None while any is
    allowed. They are the `enum` of the OpenAPI document, and so a drop-down of the pages. Any other value, except the
    default of the parameter, is rejected with 422, or 404 in the path, and the allowed ones.

    Source: OpenAPI 3.1, Operation Object; RFC 9110 section 9 (methods).
    """

    def mark(handler: _HandlerT) -> _HandlerT:
        summary, _, description = (handler.__doc__ or "").strip().partition("\n")
        declared = Endpoint(
            method=method.upper(),
            path=path,
            path_model=path_model,
            query=query,
            body=body,
            body_limit=body_limit,
            takes=(takes,) if isinstance(takes, str) else takes,
            starts_work=starts_work,
            action=action or ("write" if starts_work or method.upper() not in ("GET", "HEAD") else "read"),
            resource=resource,
            public=public,
            sends=(sends,) if isinstance(sends, str) else sends,
            responses=responses or {},
            choices=choices or {},
            curl=curl,
            summary=summary.strip() or handler.__name__.replace("_", " ").capitalize(),
            description=re.sub(r"\n[ \t]+", "\n", description.strip()),
            name=handler.__name__,
        )
        if query is not None and TICKET_PARAMETER in labels(query):
            raise TypeError(
                f"query of {method} {path}: {TICKET_PARAMETER!r} is the server's own parameter, for tickets"
            )
        known = {label for model in declared.models.values() for label in labels(model)}
        if resource not in ("", ANY, *known):
            raise TypeError(f"resource {resource}: {method} {path} has no such parameter")
        if unknown := sorted(set(declared.choices) - known):
            raise TypeError(f"choices of {', '.join(unknown)}: {method} {path} has no such parameter")
        handler.__dict__.setdefault("__endpoints__", []).append(declared)
        return handler

    return mark


@dataclass(frozen=True, slots=True)
class Route:
    """An endpoint bound to its scenario, ready for the router."""

    endpoint: Endpoint
    scenario: str
    handler: Handler = field(repr=False)
    error_format: ErrorFormat | None = None
    """The form of its error responses; None for problem documents."""
    choices: Mapping[str, Callable[[], Collection[str] | None]] = field(default_factory=dict, repr=False)
    """The endpoint's `choices`, bound to the scenario."""


@lru_cache(maxsize=1000)
def labels(model: type[BaseModel]) -> Mapping[str, str]:
    """Return the names of a model's fields by the names that they have in a request."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


def snake_case(class_name: str) -> str:
    """Return `PriceFeed` as `price_feed`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name).lower()


class Scenario(BaseModel):
    """Base of every scenario. Fields are its table `[scenarios.NAME]` in config.toml, validated strictly and frozen.

    NAME is the class name in snake case (`Countdown`: `countdown`) unless `name` is set. One instance serves one
    application. State that changes while serving goes into pydantic private attributes (`_name`); what must be opened
    and closed, into a method `lifespan(self, app)` marked with `hookimpl`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]

    error_formats: ClassVar[tuple[ErrorFormat, ...]] = ()
    """Forms of error responses other than problem documents, each for the paths that begin with its prefix."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Set the name of the class."""
        super().__pydantic_init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)

    if not TYPE_CHECKING:  # or mypy would accept every attribute

        def __getattr__(self, name: str) -> Any:
            """Return a private attribute as pydantic does, in a third of the time: every request reads some."""
            if not name.startswith("__") and (private := self.__pydantic_private__) is not None and name in private:
                return private[name]
            return super().__getattr__(name)

    def routes(self) -> list[Route]:
        """Return the endpoints of this scenario in the order of their declaration, bound to it."""
        declared = {name: attribute for base in reversed(type(self).__mro__) for name, attribute in vars(base).items()}
        return [
            Route(
                endpoint,
                self.name,
                getattr(self, name),
                error_format_of(endpoint.path, self.error_formats),
                {label: partial(choices, self) for label, choices in endpoint.choices.items()},
            )
            for name, attribute in declared.items()
            for endpoint in getattr(attribute, "__endpoints__", ())
        ]
