"""/openapi.json describes the routes by their models; curl examples use them."""

import json
import re
import shlex
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from pydantic import BaseModel, ConfigDict, Field

from streamlab import Scenario, endpoint
from streamlab.config import Config
from streamlab.server import openapi
from streamlab.server.app import create_app
from streamlab.server.registry import find
from streamlab.server.site import ROUTES, version
from tests.support.servers import Running, write_plugins

Client = Callable[..., Awaitable[TestClient[Any, Any]]]

PLUGIN = '''
    from enum import Enum
    from typing import Annotated, Literal

    from aiohttp import web
    from pydantic import BaseModel, Field
    from streamlab import Scenario, endpoint, hookimpl, open_stream


    class Colour(str, Enum):
        RED = "red"
        BLUE = "blue"


    class Place(BaseModel):
        room: int = Field(ge=1, le=9, description="Which room.", examples=[4])


    class Search(BaseModel):
        limit: int = Field(10, ge=1, le=100, description="How many at most.", examples=[3])
        ratio: float | None = Field(None, gt=0, lt=1)
        colour: Colour = Colour.RED
        others: list[Colour] = Field([], description="Other colours.")
        order: Literal["up", "down"] = "up"
        word: str = Field(max_length=20, examples=["a b&c"])
        since: str = Field("", alias="from")


    class Part(BaseModel):
        weight: float = Field(ge=0, le=1000)
        inside: "list[Part]" = []


    class Order(BaseModel):
        """An order."""

        model_config = {"json_schema_extra": {"examples": [{"amount": 2, "note": "it's \\"fine\\" $HOME `x`"}]}}

        amount: int = Field(ge=1, le=10)
        note: str = ""
        parts: list[Part] = []


    class %(title)s(Scenario):
        """Sell things.

        And more.
        """

        @endpoint("GET", "/%(name)s/search", query=Search, sends=("text/csv", "application/jsonl"))
        async def search(self, request, query):
            """Search the shop.

            Slowly, but
            with care.
            """
            return web.json_response(query.model_dump(mode="json", by_alias=True))

        @endpoint("GET", r"/%(name)s/rooms/{room:\\d{1,3}}/{rest:.*}", path_model=Place, responses={204: "Nothing."})
        async def enter(self, request, path):
            return web.json_response({**path.model_dump(), "rest": request.match_info["rest"]})

        @endpoint("POST", "/%(name)s/orders", body=Order, sends="application/json")
        async def order(self, request, body):
            """Order something."""
            return web.json_response(body.model_dump())

        @endpoint("DELETE", "/%(name)s/orders", sends="application/json")
        async def cancel(self, request):
            """Order nothing."""
            return web.json_response([])


    @hookimpl
    def register_scenarios():
        return [%(title)s]
'''


def shop(name: str = "shop") -> dict[str, str]:
    return {name: PLUGIN % {"name": name, "title": name.capitalize()}}


async def document(client: Client, tmp_path: Path, plugins: dict[str, str] | None = None) -> dict[str, Any]:
    write_plugins(tmp_path, plugins or {})
    running = await client(create_app(Config.of({}, base=tmp_path)))
    async with running.get("/openapi.json") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        found: dict[str, Any] = await response.json()
        return found


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(item)


def operations(api: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    return ((path, method, operation) for path, item in api["paths"].items() for method, operation in item.items())


def parameters(api: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    return {parameter["name"]: parameter for parameter in api["paths"][path]["get"]["parameters"]}


def validate(api: dict[str, Any]) -> None:
    """Raise an exception if a document is not valid OpenAPI 3.1."""
    from openapi_spec_validator import OpenAPIV31SpecValidator

    OpenAPIV31SpecValidator(api).validate()


async def test_the_document_is_valid_openapi_3_1(aiohttp_client: Client, tmp_path: Path) -> None:
    api = await document(aiohttp_client, tmp_path, shop())
    assert api["openapi"].startswith("3.1.")
    assert api["info"]["version"] == version()
    validate(api)


async def test_the_document_of_the_built_in_plugins_is_valid_openapi_3_1(
    aiohttp_client: Client, tmp_path: Path
) -> None:
    validate(await document(aiohttp_client, tmp_path))


async def test_every_reference_resolves(aiohttp_client: Client, tmp_path: Path) -> None:
    api = await document(aiohttp_client, tmp_path, shop())
    references = {node["$ref"] for node in walk(api) if "$ref" in node}
    bodies = ("ChatBody", "Message", "NewTask", "Order", "Part", "Problem")
    openai = ("ChatCompletionRequest", "ChatMessage", "StreamOptions", "ResponseFormat", "NamedSchema", "JsonValue")
    texts = ("CompletionRequest", "EmbeddingRequest")
    errors = ("ErrorResponse", "ErrorObject", "StreamProblem")
    assert references == {f"#/components/schemas/{name}" for name in (*bodies, *openai, *texts, *errors)}
    for reference in references:
        assert reference.removeprefix("#/components/schemas/") in api["components"]["schemas"]


async def test_bodies_of_one_name_in_two_plugins_are_distinguished(aiohttp_client: Client, tmp_path: Path) -> None:
    other = {"kiosk": shop("kiosk")["kiosk"].replace("ge=1, le=10)", "ge=1, le=77)")}
    api = await document(aiohttp_client, tmp_path, {**shop(), **other})
    validate(api)
    largest = {}
    for name in ("shop", "kiosk"):
        reference = api["paths"][f"/{name}/orders"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = api["components"]["schemas"][reference["$ref"].removeprefix("#/components/schemas/")]
        largest[name] = schema["properties"]["amount"]["maximum"]
    assert largest == {"shop": 10, "kiosk": 77}


async def test_every_route_is_documented_with_its_summary(aiohttp_client: Client, tmp_path: Path) -> None:
    api = await document(aiohttp_client, tmp_path, shop())
    routes = create_app(Config.of({}, base=tmp_path))[ROUTES]
    assert {(path, method) for path, method, _ in operations(api)} == {
        (route.endpoint.template, route.endpoint.method.lower())
        for route in routes
        if route.scenario != "auth"  # nobody needs to sign in to an open server
    }
    search = api["paths"]["/shop/search"]["get"]
    assert (search["operationId"], search["tags"]) == ("shop_search", ["shop"])
    assert search["summary"] == "Search the shop."
    assert search["description"] == "Slowly, but\nwith care."
    assert set(search["responses"]["200"]["content"]) == {"text/csv", "application/jsonl"}
    enter = api["paths"]["/shop/rooms/{room}/{rest}"]["get"]
    assert (enter["summary"], enter["responses"]["204"]) == ("Enter", {"description": "Nothing."})


async def test_every_operation_has_a_unique_id_a_summary_and_its_error_responses(
    aiohttp_client: Client, tmp_path: Path
) -> None:
    api = await document(aiohttp_client, tmp_path, shop())
    ids = [operation["operationId"] for _, _, operation in operations(api)]
    assert len(ids) == len(set(ids))
    for path, _, operation in operations(api):
        assert operation["summary"], path
        is_openai = path.startswith("/v1/") and not path.startswith("/v1/stream")
        media_type = "application/json" if is_openai else "application/problem+json"
        assert list(operation["responses"]["default"]["content"]) == [media_type]


async def test_every_tag_is_described_by_the_first_line_of_its_scenario(aiohttp_client: Client, tmp_path: Path) -> None:
    api = await document(aiohttp_client, tmp_path, shop())
    described = {tag["name"]: tag["description"] for tag in api["tags"]}
    assert described["shop"] == "Sell things."
    assert {tag for _, _, operation in operations(api) for tag in operation["tags"]} <= set(described)
    assert all(description.strip() for description in described.values())


async def test_query_parameters_have_the_bounds_of_their_model(aiohttp_client: Client, tmp_path: Path) -> None:
    found = parameters(await document(aiohttp_client, tmp_path, shop()), "/shop/search")
    assert list(found) == ["limit", "ratio", "colour", "others", "order", "word", "from"]
    assert found["limit"] == {
        "name": "limit",
        "in": "query",
        "required": False,
        "description": "How many at most.",
        "example": 3,
        "schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": 10},
    }
    # It may be absent, but the text of a query is never null.
    assert found["ratio"]["schema"] == {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    assert found["word"]["required"] is True
    assert found["word"]["schema"] == {"type": "string", "maxLength": 20}


async def test_an_enumeration_of_the_query_is_inlined(aiohttp_client: Client, tmp_path: Path) -> None:
    found = parameters(await document(aiohttp_client, tmp_path, shop()), "/shop/search")
    colour = found["colour"]["schema"]
    assert (colour["type"], colour["enum"], colour["default"]) == ("string", ["red", "blue"], "red")
    items = found["others"]["schema"]["items"]
    assert (items["type"], items["enum"]) == ("string", ["red", "blue"])
    assert found["order"]["schema"] == {"type": "string", "enum": ["up", "down"], "default": "up"}
    assert not [node for parameter in found.values() for node in walk(parameter) if "$ref" in node]


CHOICES = """
    from typing import Annotated

    from aiohttp import web
    from pydantic import BaseModel, Field
    from streamlab import Scenario, endpoint, hookimpl


    class ShelfPath(BaseModel):
        shelf: str = Field(max_length=20, examples=["cellar"])


    class Fruit(BaseModel):
        fruit: str = Field("", max_length=20, alias="which", description="Which fruit. Default: the first one.")
        fruits: list[str] = Field([], examples=["pear,kiwi"])
        other: str | None = Field(None, max_length=20, examples=["apple"])
        anything: str = "any"


    class Basket(BaseModel):
        fruit: str
        more: list[str] = []


    class Garden(Scenario):
        \"""Grow fruit.\"""

        grown: list[str] = ["apple", "pear"]
        shelves: list[str] = ["top"]

        def _grown(self):
            return self.grown

        @endpoint(
            "GET",
            "/garden/{shelf}",
            path_model=ShelfPath,
            query=Fruit,
            choices={
                "shelf": lambda garden: garden.shelves,
                "which": _grown,
                "fruits": _grown,
                "other": _grown,
                "anything": lambda garden: None,
            },
        )
        async def pick(self, request, path, query):
            return web.json_response({**path.model_dump(), **query.model_dump(by_alias=True)})

        @endpoint("POST", "/garden", body=Basket, choices={"fruit": _grown, "more": _grown})
        async def fill(self, request, body):
            return web.json_response(body.model_dump())


    @hookimpl
    def register_scenarios():
        return [Garden]
"""


async def test_choices_of_the_configuration_are_in_the_document(aiohttp_client: Client, tmp_path: Path) -> None:
    write_plugins(tmp_path, {"garden": CHOICES})
    config = Config.of({"scenarios": {"garden": {"grown": ["plum", "fig"]}}}, base=tmp_path)
    client = await aiohttp_client(create_app(config))
    api = await (await client.get("/openapi.json")).json()
    validate(api)
    found = parameters(api, "/garden/{shelf}")
    assert {name: (one["schema"], one.get("example")) for name, one in found.items()} == {
        "shelf": ({"type": "string", "maxLength": 20, "enum": ["top"]}, "top"),
        "which": ({"type": "string", "maxLength": 20, "enum": ["plum", "fig"]}, None),
        "fruits": ({"type": "array", "items": {"type": "string", "enum": ["plum", "fig"]}, "default": []}, ["plum"]),
        "other": ({"type": "string", "maxLength": 20, "enum": ["plum", "fig"]}, "plum"),
        "anything": ({"type": "string", "default": "any"}, None),
    }
    basket = api["components"]["schemas"]["Basket"]["properties"]
    assert basket["fruit"]["enum"] == basket["more"]["items"]["enum"] == ["plum", "fig"]


async def test_a_value_that_is_not_a_choice_is_rejected_with_the_choices(
    aiohttp_client: Client, tmp_path: Path
) -> None:
    write_plugins(tmp_path, {"garden": CHOICES})
    client = await aiohttp_client(create_app(Config.of({}, base=tmp_path)))

    async def get(path: str) -> tuple[int, dict[str, Any]]:
        response = await client.get(path)
        return response.status, await response.json()

    picked = {"shelf": "top", "which": "pear", "fruits": ["apple"], "other": None, "anything": "x"}
    assert await get("/garden/top?which=pear&fruits=apple&anything=x") == (200, picked)
    assert await get("/garden/top?which=") == (200, picked | {"which": "", "fruits": [], "anything": "any"})
    status, problem = await get("/garden/top?which=kiwi&fruits=fig&fruits=apple&fruits=date")
    assert status == 422
    assert problem["errors"] == [
        {"in": "query", "name": "which", "detail": "unknown: kiwi; known: apple, pear"},
        {"in": "query", "name": "fruits", "detail": "unknown: date, fig; known: apple, pear"},
    ]
    status, problem = await get("/garden/nowhere")
    assert (status, problem["detail"]) == (404, "shelf: unknown: nowhere; known: top.")
    async with client.post("/garden", json={"fruit": "kiwi", "more": ["pear"]}) as response:
        assert (response.status, (await response.json())["errors"]) == (
            422,
            [{"in": "body", "name": "fruit", "detail": "unknown: kiwi; known: apple, pear"}],
        )


async def test_more_choices_than_a_page_can_show_are_not_listed(aiohttp_client: Client, tmp_path: Path) -> None:
    write_plugins(tmp_path, {"garden": CHOICES})
    many = [f"fruit-{number}" for number in range(openapi.MAX_CHOICES + 1)]
    config = Config.of({"scenarios": {"garden": {"grown": many}}}, base=tmp_path)
    client = await aiohttp_client(create_app(config))
    found = parameters(await (await client.get("/openapi.json")).json(), "/garden/{shelf}")
    assert "enum" not in found["which"]["schema"]
    async with client.get("/garden/top?which=x") as response:
        (error,) = (await response.json())["errors"]
    assert error["detail"] == f"unknown: x; known: {', '.join(many[:100])} and {len(many) - 100} more"


async def test_choices_that_cannot_be_read_leave_the_document_as_it_is(aiohttp_client: Client, tmp_path: Path) -> None:
    broken = CHOICES.replace("return self.grown", "raise RuntimeError('not yet')")
    found = parameters(await document(aiohttp_client, tmp_path, {"garden": broken}), "/garden/{shelf}")
    assert found["shelf"]["schema"]["enum"] == ["top"]
    assert found["which"]["schema"] == {"type": "string", "maxLength": 20, "default": ""}


def test_choices_of_a_parameter_that_does_not_exist_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"^choices of colour: GET /x has no such parameter$"):
        endpoint("GET", "/x", query=Query, choices={"colour": lambda scenario: ["red"]})(_handler)


def test_the_parameter_of_tickets_is_that_of_the_server() -> None:
    class TicketQuery(BaseModel):
        ticket: str = ""

    with pytest.raises(TypeError, match=r"^query of GET /x: 'ticket' is the server's own parameter, for tickets$"):
        endpoint("GET", "/x", query=TicketQuery)(_handler)


async def _handler(request: web.Request) -> web.Response:
    return web.Response()


async def test_built_in_plugins_list_the_names_of_their_configuration(aiohttp_client: Client, tmp_path: Path) -> None:
    settings = {
        "server": {"log_file": "var/streamlab.log"},
        "scenarios": {
            "ticker": {"symbols": ["X", "Y"]},
            "logs": {"demo": False, "sources": {"app": {"path": "app.log"}}},
            "export": {"queries": {"mine": {"sql": "SELECT 1"}}},
        },
    }
    client = await aiohttp_client(create_app(Config.of(settings, base=tmp_path)))
    api = await (await client.get("/openapi.json")).json()
    symbols = parameters(api, "/stream/stock-ticker")["symbols"]
    assert (symbols["schema"]["items"]["enum"], symbols["example"]) == (["X", "Y"], ["X"])
    for path in ("/stream/live-logs", "/logs/download"):
        assert parameters(api, path)["source"]["schema"] == {
            "type": "string",
            "maxLength": 32,
            "enum": ["app", "server"],
        }
    for path in ("/export/{name}", "/export/{name}/{format}"):
        assert parameters(api, path)["name"]["schema"]["enum"] == ["data", "mine", "results", "users"]
    kinds = ["checksum", "export", "rehearsal", "report"]
    assert parameters(api, "/process/long-task")["kind"]["schema"]["enum"] == kinds
    assert api["components"]["schemas"]["NewTask"]["properties"]["kind"]["enum"] == kinds


async def test_the_example_of_a_parameter_fits_its_type(aiohttp_client: Client, tmp_path: Path) -> None:
    api = await document(aiohttp_client, tmp_path)
    types: dict[str, Any] = {"array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    assert [
        f"{path} {one['name']}"
        for path, _, operation in operations(api)
        for one in operation.get("parameters", ())
        if "example" in one and not isinstance(one["example"], types[one["schema"]["type"]])
    ] == []


async def test_path_parameters_are_required_and_have_the_bounds_of_their_model(
    aiohttp_client: Client, tmp_path: Path
) -> None:
    found = parameters(await document(aiohttp_client, tmp_path, shop()), "/shop/rooms/{room}/{rest}")
    assert found["room"] == {
        "name": "room",
        "in": "path",
        "required": True,
        "description": "Which room.",
        "example": 4,
        "schema": {"type": "integer", "minimum": 1, "maximum": 9},
    }
    assert found["rest"] == {"name": "rest", "in": "path", "required": True, "schema": {"type": "string"}}


async def test_a_body_is_documented_with_its_bounds_and_an_example(aiohttp_client: Client, tmp_path: Path) -> None:
    api = await document(aiohttp_client, tmp_path, shop())
    body = api["paths"]["/shop/orders"]["post"]["requestBody"]
    example = {"amount": 2, "note": 'it\'s "fine" $HOME `x`'}
    media = {"schema": {"$ref": "#/components/schemas/Order"}, "example": example}
    assert body == {"required": True, "content": {"application/json": media}}
    amount = api["components"]["schemas"]["Order"]["properties"]["amount"]
    assert (amount["type"], amount["minimum"], amount["maximum"]) == ("integer", 1, 10)


async def test_bodies_that_reject_unknown_fields_declare_no_additional_properties(
    aiohttp_client: Client, tmp_path: Path
) -> None:
    schemas = (await document(aiohttp_client, tmp_path, shop()))["components"]["schemas"]
    closed = {name for name, schema in schemas.items() if schema.get("additionalProperties") is False}
    assert closed >= {"Order", "Part", "NewTask", "ChatBody", "Message"}
    assert "ChatMessage" not in closed  # its model allows other fields


def test_the_example_of_a_body_comes_from_its_model_or_its_fields() -> None:
    class Guest(BaseModel):
        name: str = Field(examples=["Ada", "Grace"])
        age: int = 3

    class Guests(BaseModel):
        model_config = ConfigDict(json_schema_extra={"examples": [{"names": ["Ada"]}]})
        names: list[str] = Field(examples=[["Grace"]])

    assert openapi.body_example(Guest) == {"name": "Ada"}
    assert openapi.body_example(Guests) == {"names": ["Ada"]}


async def test_the_arguments_and_the_body_of_a_command_are_documented(aiohttp_client: Client, tmp_path: Path) -> None:
    api = await document(aiohttp_client, tmp_path, shop())
    pushed = api["paths"]["/stream/stock-ticker"]["post"]
    assert pushed["x-curl"] == ["--json", '{"symbol": "ACME", "price": 12.5}', "{url}"]
    first, *others = pushed["requestBody"]["content"].values()
    assert (first, others) == ({"example": {"symbol": "ACME", "price": 12.5}}, [{}, {}])
    assert api["paths"]["/shop/search"]["get"]["x-curl"] == ["-N", "{url}"]
    assert api["paths"]["/export/{name}"]["get"]["x-curl"] == ["-H", "Accept: application/jsonl", "{url}"]


async def test_a_command_with_a_broken_quote_does_not_affect_others(aiohttp_client: Client, tmp_path: Path) -> None:
    source = PLUGIN % {"name": "shop", "title": "Shop"}
    broken = source.replace(
        '"/shop/orders", sends=', '"/shop/orders", takes="text/plain", curl="-d \'it {url}", sends='
    )
    api = await document(aiohttp_client, tmp_path, {"shop": broken})
    cancel = api["paths"]["/shop/orders"]["delete"]
    assert cancel["x-curl"] == ["-d", "'it", "{url}"]
    assert cancel["requestBody"]["content"] == {"text/plain": {"example": "'it"}}


async def test_every_number_in_a_built_in_query_has_a_minimum_and_a_maximum(
    aiohttp_client: Client, tmp_path: Path
) -> None:
    api = await document(aiohttp_client, tmp_path)
    unbounded = [
        f"{path} {parameter['name']}"
        for path, _, operation in operations(api)
        for parameter in operation.get("parameters", ())
        for node in walk(parameter["schema"])
        if node.get("type") in ("integer", "number")
        and not ({"minimum", "exclusiveMinimum"} & set(node) and {"maximum", "exclusiveMaximum"} & set(node))
        and "enum" not in node
        and "const" not in node
    ]
    assert unbounded == []


async def test_every_built_in_query_parameter_is_described(aiohttp_client: Client, tmp_path: Path) -> None:
    api = await document(aiohttp_client, tmp_path)
    assert [
        f"{path} {parameter['name']}"
        for path, _, operation in operations(api)
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query" and not parameter.get("description")
    ] == []


# -- curl


class Query(BaseModel):
    word: str = Field("", examples=["a b&c'd"])
    limit: int = Field(1, ge=1, le=2)


class Path_(BaseModel):
    name: str = Field(examples=["ü b"])


class Body(BaseModel):
    model_config = {"json_schema_extra": {"examples": [{"note": 'it\'s "fine" $HOME `x` \\n'}]}}

    note: str


class Examples(Scenario):
    @endpoint("GET", "/plain")
    async def plain(self, request: web.Request) -> web.Response:
        return web.Response()

    @endpoint("GET", "/query", query=Query)
    async def query(self, request: web.Request, query: Query) -> web.Response:
        return web.Response()

    @endpoint("GET", "/path/{name}", path_model=Path_, curl="-O {url}")
    async def path(self, request: web.Request, path: Path_) -> web.Response:
        return web.Response()

    @endpoint("POST", "/body", body=Body)
    async def body(self, request: web.Request, body: Body) -> web.Response:
        return web.Response()

    @endpoint("DELETE", "/delete")
    async def delete(self, request: web.Request) -> web.Response:
        return web.Response()


COMMANDS = {route.endpoint.name: openapi.curl(route, "http://localhost:8000") for route in Examples().routes()}


def test_a_plain_example_needs_no_quotes() -> None:
    assert COMMANDS["plain"] == "curl -N http://localhost:8000/plain"


def test_an_example_has_the_examples_of_its_models() -> None:
    assert shlex.split(COMMANDS["query"]) == ["curl", "-N", "http://localhost:8000/query?word=a+b%26c%27d"]
    assert shlex.split(COMMANDS["path"]) == ["curl", "-O", "http://localhost:8000/path/%C3%BC%20b"]


def test_an_example_names_a_method_that_curl_would_not_choose() -> None:
    assert shlex.split(COMMANDS["delete"])[:3] == ["curl", "-X", "DELETE"]


def test_an_example_of_a_body_survives_the_shell() -> None:
    arguments = shlex.split(COMMANDS["body"])
    assert arguments[:3] == ["curl", "-H", "Content-Type: application/json"]
    assert json.loads(arguments[arguments.index("-d") + 1]) == {"note": 'it\'s "fine" $HOME `x` \\n'}


def test_every_command_of_the_index_works_when_pasted_into_a_shell(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    others = [found.name for found in find(Config.of({}, base=tmp_path)) if found.name != "file"]
    switched_off = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in others)
    server = start(f"[scenarios.file]\nsample_mb = 1\n{switched_off}", **shop())
    folder = tmp_path / "pasted"
    folder.mkdir()
    index = server.get("/")[2].decode()
    commands = re.findall(r"^ +curl (.*)$", index, re.MULTILINE)
    assert len(commands) == 7 + 3 + 4
    script = "\n".join(f"curl -sS -f --max-time 10 {command} > body || echo {n}" for n, command in enumerate(commands))
    done = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, timeout=50)
    failed = [commands[int(number)] for number in done.stdout.split()]
    assert (failed, done.stderr) == ([], "")


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/plain", "/plain"),
        ("/files/{path:.*}", "/files/{path}"),
        (r"/a/{b:\d{1,3}}/{c}", "/a/{b}/{c}"),
    ],
)
def test_a_path_is_written_as_in_openapi(path: str, template: str) -> None:
    class Spelt(Scenario):
        @endpoint("GET", path)
        async def get(self, request: web.Request) -> web.Response:
            return web.Response()

    assert [route.endpoint.template for route in Spelt().routes()] == [template]
