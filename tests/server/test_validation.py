"""A request is validated by the models of its endpoint, or rejected with everything that is wrong with it."""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from streamlab import request_body
from streamlab.config import Config
from streamlab.server.app import create_app
from tests.support.servers import Running, disabled, write_plugins

Client = TestClient[Any, Any]

PLUGIN = """
    from enum import Enum

    from aiohttp import web
    from pydantic import BaseModel, Field
    from streamlab import Scenario, endpoint, hookimpl


    class Colour(str, Enum):
        RED = "red"
        BLUE = "blue"


    class Place(BaseModel):
        room: int = Field(ge=1, le=9)
        door: str = Field(pattern="^[a-z]+$")


    class Room(BaseModel):
        room: int = Field(ge=1, le=9)


    class Search(BaseModel):
        limit: int = Field(10, ge=1, le=100)
        ratio: float = Field(0.5, ge=0, le=1)
        word: str = Field("", max_length=5)
        loud: bool = False
        colour: Colour = Colour.RED
        tag: list[str] = Field([], max_length=3)
        size: list[int] | None = None
        since: str = Field("", alias="from")


    class Part(BaseModel):
        weight: float = Field(ge=0, le=1000)


    class Order(BaseModel):
        amount: int = Field(ge=1, le=10)
        note: str = ""
        parts: list[Part] = []


    class Shop(Scenario):
        @endpoint("GET", "/search", query=Search)
        async def search(self, request, query):
            return web.json_response(query.model_dump(mode="json"))

        @endpoint("GET", "/rooms/{room}/{door}", path_model=Place, query=Search)
        async def enter(self, request, path, query):
            return web.json_response(path.model_dump())

        @endpoint("GET", "/floors/{floor}/rooms/{room}", path_model=Room)
        async def measure(self, request, path):
            return web.json_response({**path.model_dump(), "floor": request.match_info["floor"]})

        @endpoint("POST", "/orders", body=Order, query=Search)
        async def order(self, request, body, query):
            return web.json_response(body.model_dump())

        @endpoint("POST", "/notes", takes="text/plain")
        async def note(self, request):
            return web.Response(text=await request.text())

        @endpoint("GET", "/plain")
        async def plain(self, request):
            return web.Response(text="plain")


    @hookimpl
    def register_scenarios():
        return [Shop]
"""

DEFAULTS = {
    "limit": 10,
    "ratio": 0.5,
    "word": "",
    "loud": False,
    "colour": "red",
    "tag": [],
    "size": None,
    "since": "",
}


@pytest.fixture
async def client(tmp_path: Path, aiohttp_client: Callable[..., Awaitable[Client]]) -> Client:
    write_plugins(tmp_path, {"shop": PLUGIN})
    return await aiohttp_client(create_app(Config.of({"scenarios": disabled()}, base=tmp_path)))


async def problem(client: Client, method: str, path: str, status: int, **options: Any) -> dict[str, Any]:
    """Return the problem document of a request that is rejected with `status`."""
    async with client.request(method, path, **options) as response:
        assert (response.status, response.content_type) == (status, "application/problem+json"), await response.text()
        assert response.headers["Cache-Control"] == "no-store"
        document: dict[str, Any] = await response.json(content_type=None)
        assert (document["type"], document["status"]) == ("about:blank", status)
        return document


async def errors(client: Client, path: str) -> list[tuple[str, str, str]]:
    document = await problem(client, "GET", path, 422)
    return [(error["in"], error["name"], error["detail"]) for error in document["errors"]]


# -- the query


@pytest.mark.parametrize(
    ("query", "changed"),
    [
        ("", {}),
        ("?limit=1&ratio=1&word=abcde", {"limit": 1, "ratio": 1.0, "word": "abcde"}),
        ("?limit=100&loud=true&colour=blue", {"limit": 100, "loud": True, "colour": "blue"}),
        ("?tag=a&tag=b&tag=b", {"tag": ["a", "b", "b"]}),
        ("?tag=a", {"tag": ["a"]}),
        ("?size=2&size=1", {"size": [2, 1]}),
        ("?word=%C3%A9%26%3D", {"word": "é&="}),
        ("?word=a+b", {"word": "a b"}),
        ("?word=", {}),
        ("?from=3", {"since": "3"}),
    ],
)
async def test_a_valid_query_reaches_the_handler_as_its_model(
    query: str, changed: dict[str, Any], client: Client
) -> None:
    async with client.get(f"/search{query}") as response:
        assert (response.status, await response.json()) == (200, {**DEFAULTS, **changed})


async def test_every_bad_parameter_is_listed_at_once(client: Client) -> None:
    path = "/rooms/10/A1?limit=0&ratio=2&word=abcdef&colour=green&tag=1&tag=2&tag=3&tag=4&size=x&loud=perhaps&lmit=1"
    document = await problem(client, "GET", path, 422)
    assert document == {
        "type": "about:blank",
        "title": document["title"],
        "status": 422,
        "detail": "Invalid parameters: room, door, lmit, limit, ratio, word, loud, colour, tag, size.0.",
        "errors": [
            {"in": "path", "name": "room", "detail": "input should be less than or equal to 9"},
            {"in": "path", "name": "door", "detail": "string should match pattern '^[a-z]+$'"},
            {
                "in": "query",
                "name": "lmit",
                "detail": "unknown parameter; known: colour, from, limit, loud, ratio, size, tag, word",
            },
            {"in": "query", "name": "limit", "detail": "input should be greater than or equal to 1"},
            {"in": "query", "name": "ratio", "detail": "input should be less than or equal to 1"},
            {"in": "query", "name": "word", "detail": "string should have at most 5 characters"},
            {
                "in": "query",
                "name": "loud",
                "detail": "input should be a valid boolean, unable to interpret input",
            },
            {"in": "query", "name": "colour", "detail": "input should be 'red' or 'blue'"},
            {
                "in": "query",
                "name": "tag",
                "detail": "list should have at most 3 items after validation, not 4",
            },
            {
                "in": "query",
                "name": "size.0",
                "detail": "input should be a valid integer, unable to parse string as an integer",
            },
        ],
    }


@pytest.mark.parametrize("value", ["0", "101", "-1", "1.5", "ten", "", "NaN", "1e2", "0x10", "9" * 400, "9" * 5000])
async def test_an_integer_out_of_bounds_or_malformed_is_rejected_by_name(value: str, client: Client) -> None:
    ((place, name, _),) = await errors(client, f"/search?limit={value}")
    assert (place, name) == ("query", "limit")


@pytest.mark.parametrize("value", ["NaN", "inf", "-inf", "1e400", "-0.1", "1.0001", "half", ""])
async def test_a_number_out_of_bounds_or_malformed_is_rejected_by_name(value: str, client: Client) -> None:
    ((place, name, _),) = await errors(client, f"/search?ratio={value}")
    assert (place, name) == ("query", "ratio")


async def test_an_unknown_parameter_is_rejected_with_the_known_ones(client: Client) -> None:
    known = "unknown parameter; known: colour, from, limit, loud, ratio, size, tag, word"
    assert await errors(client, "/search?lmit=5") == [("query", "lmit", known)]
    assert await errors(client, "/search?Limit=5") == [("query", "Limit", known)]
    assert await errors(client, "/search?limit[]=5") == [("query", "limit[]", known)]


async def test_every_unknown_parameter_is_listed_once(client: Client) -> None:
    assert [name for _, name, _ in await errors(client, "/search?a=1&b=2&a=3")] == ["a", "b"]


async def test_a_field_with_an_alias_is_not_accepted_by_its_python_name(client: Client) -> None:
    assert [name for _, name, _ in await errors(client, "/search?since=1")] == ["since"]


async def test_a_route_without_a_query_accepts_no_parameter(client: Client) -> None:
    assert await errors(client, "/plain?x=1") == [("query", "x", "unknown parameter; this route has none")]
    async with client.get("/plain?") as response:
        assert response.status == 200


async def test_a_repeated_single_value_is_rejected(client: Client) -> None:
    assert await errors(client, "/search?limit=1&limit=2") == [("query", "limit", "given 2 times, expected once")]
    assert await errors(client, "/search?limit=1&limit=1") == [("query", "limit", "given 2 times, expected once")]


async def test_a_bad_value_in_a_list_is_rejected_by_its_index(client: Client) -> None:
    assert [name for _, name, _ in await errors(client, "/search?size=1&size=x&size=2&size=y")] == ["size.1", "size.3"]


async def test_the_name_of_an_unknown_parameter_is_shortened(client: Client) -> None:
    ((_, name, _),) = await errors(client, f"/search?{'x' * 5000}=1")
    assert name == "x" * 100


async def test_an_unknown_name_in_any_bytes_is_rejected_as_json(client: Client) -> None:
    for name in ("%00", "%ff", "%ED%A0%80", "%3Cscript%3E", "%0d%0aX:1", "%E2%80%A8"):
        assert len(await errors(client, f"/search?{name}=1")) == 1


async def test_a_value_is_never_echoed(client: Client) -> None:
    async with client.get("/search?limit=sesame&word=open-sesame&colour=sesame") as response:
        assert response.status == 422
        assert "sesame" not in await response.text()


async def test_head_is_validated_like_get(client: Client) -> None:
    async with client.head("/search?limit=0") as response:
        assert (response.status, await response.read()) == (422, b"")


# -- the path


async def test_a_valid_path_reaches_the_handler_as_its_model(client: Client) -> None:
    async with client.get("/rooms/3/oak") as response:
        assert (response.status, await response.json()) == (200, {"room": 3, "door": "oak"})


async def test_an_invalid_path_is_rejected_by_name(client: Client) -> None:
    assert await errors(client, "/rooms/x/oak") == [
        ("path", "room", "input should be a valid integer, unable to parse string as an integer")
    ]
    assert [name for _, name, _ in await errors(client, "/rooms/3/oak%0a")] == ["door"]


async def test_a_part_of_the_path_that_the_model_omits_is_not_validated(client: Client) -> None:
    async with client.get("/floors/attic/rooms/3") as response:
        assert (response.status, await response.json()) == (200, {"room": 3, "floor": "attic"})


# -- the body


JSON = {"Content-Type": "application/json"}


async def test_a_valid_body_reaches_the_handler_as_its_model(client: Client) -> None:
    async with client.post("/orders", json={"amount": 3, "parts": [{"weight": 1}]}) as response:
        assert (response.status, await response.json()) == (
            200,
            {"amount": 3, "note": "", "parts": [{"weight": 1.0}]},
        )


async def test_every_fault_of_the_body_and_the_query_is_listed_at_once(client: Client) -> None:
    body = {"amount": 11, "nte": "x", "parts": [{"weight": 1}, {"weight": -1, "wieght": 2}, {}]}
    document = await problem(client, "POST", "/orders?limit=0&x=1", 422, json=body)
    assert [(error["in"], error["name"]) for error in document["errors"]] == [
        ("query", "x"),
        ("query", "limit"),
        ("body", "amount"),
        ("body", "parts.1.weight"),
        ("body", "parts.1.wieght"),
        ("body", "parts.2.weight"),
        ("body", "nte"),
    ]


async def test_one_name_that_is_bad_in_query_and_body_is_listed_for_both(client: Client) -> None:
    document = await problem(client, "POST", "/orders?amount=1", 422, json={"amount": 0})
    assert [(error["in"], error["name"]) for error in document["errors"]] == [("query", "amount"), ("body", "amount")]


async def test_an_unknown_name_of_the_body_is_rejected(client: Client) -> None:
    document = await problem(client, "POST", "/orders", 422, json={"amount": 1, "colour": "red"})
    assert [(error["in"], error["name"]) for error in document["errors"]] == [("body", "colour")]


@pytest.mark.parametrize("body", ["[]", "null", "3", '"text"', "true"])
async def test_a_body_that_is_not_an_object_is_rejected(body: str, client: Client) -> None:
    document = await problem(client, "POST", "/orders", 422, data=body, headers=JSON)
    assert [(error["in"], error["name"]) for error in document["errors"]] == [("body", "body")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'amount': 1}",
        b'{"amount": 1,}',
        b'{"amount": NaN}',
        b'{"amount": Infinity}',
        b'{"amount": -Infinity}',
        b'{"amount": 1} {}',
        b'{"amount": "\xff"}',
        b"amount=1",
        b"[" * 100_000,
        b'{"amount": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
async def test_a_body_that_is_not_json_is_400(body: bytes, client: Client) -> None:
    document = await problem(client, "POST", "/orders", 400, data=body, headers=JSON)
    assert document["title"] == "Bad Request"
    assert document["detail"].startswith("The body is not JSON")


async def test_half_a_surrogate_pair_in_a_body_is_400(client: Client) -> None:
    document = await problem(client, "POST", "/orders", 400, data=rb'{"amount": "\ud83d"}', headers=JSON)
    assert document["detail"] == "The body has half a surrogate pair, which is not a character."
    await problem(client, "POST", "/orders", 422, data=rb'{"amount": "\ud83d\ude00"}', headers=JSON)


async def test_the_error_for_a_body_that_is_not_json_has_the_position(client: Client) -> None:
    document = await problem(client, "POST", "/orders", 400, data=b'{\n"amount": }', headers=JSON)
    assert document["detail"] == "The body is not JSON (line 2, column 11)."


async def test_a_name_that_is_not_text_is_rejected_as_json(client: Client) -> None:
    async with client.post("/orders", data=b'{"amount": 1, "\\ud800": 2}', headers=JSON) as response:
        assert response.status in (400, 422)
        assert response.content_type == "application/problem+json"
        await response.json(content_type=None)


async def test_the_name_of_an_unknown_member_is_shortened(client: Client) -> None:
    body = json.dumps({"amount": 1, "x" * 100_000: 2})
    async with client.post("/orders", data=body, headers=JSON) as response:
        assert response.status == 422
        assert len(await response.read()) < 2000


async def test_a_body_of_one_mebibyte_is_accepted(client: Client) -> None:
    body = b'{"amount": 1}'.ljust(1024 * 1024)
    async with client.post("/orders", data=BytesIO(body), headers=JSON) as response:
        assert response.status == 200


async def test_a_body_over_one_mebibyte_is_413(client: Client) -> None:
    body = b'{"amount": 1}'.ljust(1024 * 1024 + 1)
    document = await problem(client, "POST", "/orders", 413, data=BytesIO(body), headers=JSON)
    assert document["detail"] == "The body is larger than 1048576 bytes."


async def test_a_chunked_body_over_one_mebibyte_is_413(client: Client) -> None:
    async def body() -> Any:
        for _ in range(17):
            yield b" " * 65536

    await problem(client, "POST", "/orders", 413, data=body(), headers=JSON)


async def test_a_compressed_body_of_more_than_one_mebibyte_is_413(client: Client) -> None:
    body = gzip.compress(b" " * 20_000_000)
    assert len(body) < 1024 * 1024
    await problem(client, "POST", "/orders", 413, data=body, headers={**JSON, "Content-Encoding": "gzip"})


def test_a_body_that_does_not_match_its_coding_is_400_and_not_a_server_error(
    start: Callable[..., Running],
) -> None:
    server = start(shop=PLUGIN)
    for path in ("/orders", "/notes"):  # read for a handler, and by one
        broken = {**JSON, "Content-Encoding": "gzip"}
        status, headers, text = server.get(path, broken, method="POST", body=b'{"amount": 1}')
        assert (status, headers["content-type"]) == (400, "application/problem+json; charset=utf-8")
        assert (headers["connection"], b"cannot be read" in text) == ("close", True)
    assert server.get("/plain")[0] == 200
    server.wait_for_log("path=/plain")
    assert (" ERROR " in server.log, "Traceback" in server.log) == (False, False), server.log


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml"],
)
async def test_a_body_of_another_type_is_415(content_type: str, client: Client) -> None:
    async with client.post("/orders", data=b'{"amount": 1}', headers={"Content-Type": content_type}) as response:
        assert (response.status, response.content_type) == (415, "application/problem+json")
        assert response.headers["Accept"] == "application/json"
        assert (await response.json(content_type=None))["detail"] == "The body must be application/json."


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "application/merge-patch+json"]
)
async def test_a_body_of_any_json_type_is_accepted(content_type: str, client: Client) -> None:
    async with client.post("/orders", data=b'{"amount": 1}', headers={"Content-Type": content_type}) as response:
        assert response.status == 200


async def test_a_body_without_a_type_is_415(client: Client) -> None:
    async with client.post("/orders", data=b'{"amount": 1}', skip_auto_headers=["Content-Type"]) as response:
        assert response.status == 415


async def test_a_body_that_does_not_arrive_in_time_is_408(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "BODY_SECONDS", 0.05)

    async def half() -> Any:
        yield b'{"amount":'
        await asyncio.Event().wait()

    async with client.post("/orders", data=half(), headers=JSON) as response:
        assert (response.status, response.headers["Connection"]) == (408, "close")
        assert (await response.json(content_type=None))["detail"] == "The body did not arrive within 0.05 s."


async def test_a_value_of_the_body_is_never_echoed(client: Client) -> None:
    body = {"amount": "sesame", "note": 5, "parts": "sesame"}
    async with client.post("/orders", json=body) as response:
        assert response.status == 422
        assert "sesame" not in await response.text()


async def test_a_connection_continues_after_every_error_response(client: Client) -> None:
    for _ in range(2):
        await problem(client, "POST", "/orders", 413, data=BytesIO(bytes(2_000_000)), headers=JSON)
        await problem(client, "POST", "/orders", 415, data=b"x", headers={"Content-Type": "text/plain"})
    async with client.get("/plain") as response:
        assert response.status == 200
