"""The ticker in the process that `make run` starts: simulated, pushed and replayed prices, and its parameters."""

import asyncio
import http.client
import importlib.util
import itertools
import json
import re
import signal
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from streamlab import Events, encode_event
from streamlab.events.channel import open_log
from tests.support.connections import EventStream, Received
from tests.support.servers import Running, run_streamlab

LOADED_PLUGINS = ("file", "ticker")

FOLDER = Path(__file__).resolve().parents[2] / "plugins" / "ticker"
PATH = "/stream/stock-ticker"
FIVE = ("AAPL", "AMZN", "GOOGL", "MSFT", "TSLA")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
QUIET = "[scenarios.logs]\nenabled = false\n"


def load(name: str) -> Any:
    package = sys.modules.setdefault("ticker_under_test", types.ModuleType("ticker_under_test"))
    package.__path__ = [str(FOLDER)]
    specification = importlib.util.spec_from_file_location(f"ticker_under_test.{name}", FOLDER / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


load("prices")
sources = load("sources")
once = load("once")

Serve = Callable[..., Running]


@pytest.fixture
def serve(start: Serve) -> Serve:
    """Start a server with these lines in [scenarios.ticker]."""

    def serving(ticker: str, others: str = "", **options: Any) -> Running:
        return start(f"{QUIET}{others}\n[scenarios.ticker]\n{ticker}\n", **options)

    return serving


def first_events(server: Running, count: int, query: str = "") -> list[Received]:
    """Return the first `count` events of the channel, without the gap that the id 0-0 causes."""
    with EventStream(server, f"{PATH}?limit={count}{query}", after="0-0") as stream:
        return [event for event in stream if event.event != "gap"]


def offsets(events: list[Received]) -> list[int]:
    return [int(event.id.partition("-")[2]) for event in events]


def post(server: Running, body: bytes | str, content_type: str = "application/json", **headers: str) -> tuple[int, Any]:
    body = body.encode() if isinstance(body, str) else body
    status, _, response = server.get(PATH, {"Content-Type": content_type, **headers}, method="POST", body=body)
    return status, json.loads(response)


def publish(server: Running, *prices: Any) -> list[str]:
    """Push prices, each a JSON text or an object, and return their ids."""
    lines = [price if isinstance(price, str) else json.dumps(price) for price in prices]
    status, response = post(server, "\n".join(lines), "application/x-ndjson")
    assert status == 202, response
    return list(response["ids"])


def health_of_ticker(server: Running, state: str) -> dict[str, Any]:
    """Return the scenarios of /health, once the ticker has this state."""
    deadline = time.monotonic() + 10
    while True:
        found: dict[str, Any] = json.loads(server.get("/health")[2])["scenarios"]
        if found["ticker"]["state"] == state:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


# -- simulated prices


def simulated(steps: int, *, seed: int, interval: float, symbols: tuple[str, ...] = FIVE) -> list[dict[str, Any]]:
    """Return the prices of a simulation that never stops, without their time."""
    simulation = sources.Simulation(symbols, interval=interval, seed=seed, checkpoint=None)
    return [json.loads(price.text) for _ in range(steps) for price in simulation.step()]


def without_time(events: list[Received]) -> list[dict[str, Any]]:
    return [{name: value for name, value in event.json.items() if name != "time"} for event in events]


def test_a_simulated_price_has_a_symbol_a_price_a_change_and_a_time(serve: Serve) -> None:
    server = serve("interval = 0.01")
    events = first_events(server, 500)
    assert [event.json["symbol"] for event in events] == list(FIVE) * 100
    for event in events:
        assert re.fullmatch(
            rf'id: \d{{13}}-\d+\ndata: {{"symbol": "[A-Z]+", "price": \d+\.\d{{1,2}}, '
            rf'"change": -?\d+\.\d{{1,2}}, "time": "{TIME}"}}\n\n',
            event.raw.decode(),
        )
    assert offsets(events) == list(range(1, 501))
    for before, after in zip(events, events[5:], strict=False):
        assert after.json["change"] == round(after.json["price"] - before.json["price"], 2)
    assert any(event.json["change"] > 0 for event in events)
    assert any(event.json["change"] < 0 for event in events)


def test_the_same_seed_gives_the_same_prices_and_another_seed_others(serve: Serve) -> None:
    fresh = '[events]\nurl = "sqlite://"\n'
    one, same, other = (serve(f"interval = 0.01\nseed = {seed}", fresh) for seed in (7, 7, 8))
    prices = without_time(first_events(one, 100))
    assert prices == without_time(first_events(same, 100)) == simulated(20, seed=7, interval=0.01)
    assert not any(price in prices for price in without_time(first_events(other, 100)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_after_a_restart_the_simulation_continues_as_if_uninterrupted(serve: Serve, number: signal.Signals) -> None:
    server = serve("interval = 0.005")
    with EventStream(server, PATH) as stream:
        stream.take(50)
        server.terminate(number)
    server = serve("interval = 0.005")
    events = first_events(server, 500)
    assert offsets(events) == list(range(1, 501))
    assert without_time(events) == simulated(100, seed=1, interval=0.005)


def test_two_processes_with_one_log_publish_each_step_once_and_take_over_from_each_other(serve: Serve) -> None:
    first, second = serve("interval = 0.01"), serve("interval = 0.01")
    with EventStream(first, PATH) as one, EventStream(second, PATH) as other:
        seen = other.take(200)
        concurrent = one.take(5)
        first.terminate(signal.SIGKILL)
        seen += other.take(200)
    events = first_events(second, offsets(seen)[-1])
    assert events[-400:] == seen
    assert set(concurrent) <= set(events)
    assert offsets(events) == list(range(1, len(events) + 1))
    assert without_time(events) == simulated(len(events), seed=1, interval=0.01)[: len(events)]


def test_prices_stay_positive_and_changes_exact_over_100_000_steps() -> None:
    simulation = sources.Simulation(["ACME"], interval=3600, seed=3, checkpoint=None)
    before: float | None = None
    for _ in range(100_000):
        (price,) = simulation.step()
        change = json.loads(price.text)["change"]
        assert price.price > 0
        assert before is None or round(change * 100) == round(price.price * 100) - round(before * 100)
        before = price.price


def test_a_simulation_resumes_from_any_step_to_the_last_digit() -> None:
    uninterrupted = simulated(50, seed=5, interval=1)
    checkpoint, made = None, []
    for _ in range(50):
        simulation = sources.Simulation(FIVE, interval=1, seed=5, checkpoint=checkpoint)
        made += [json.loads(price.text) for price in simulation.step()]
        checkpoint = simulation.checkpoint
    assert made == uninterrupted


def test_a_price_cannot_be_pushed_into_a_simulation(serve: Serve) -> None:
    server = serve("")
    status, problem = post(server, '{"symbol": "ACME", "price": 1}')
    assert status == 409
    assert problem["detail"] == 'The prices of this ticker come from source = "simulate", not by POST.'


# -- parameters


def test_symbols_are_chosen_by_a_list_or_by_repetition(serve: Serve) -> None:
    server = serve("interval = 0.01")
    chosen = first_events(server, 20, "&symbols=AAPL,MSFT")
    assert [event.json["symbol"] for event in chosen] == ["AAPL", "MSFT"] * 10
    assert first_events(server, 20, "&symbols=MSFT&symbols=AAPL") == chosen
    assert first_events(server, 20, "&symbols=MSFT,AAPL&symbols=AAPL") == chosen
    everything = first_events(server, 50)
    assert [event for event in everything if event.json["symbol"] in ("AAPL", "MSFT")] == chosen
    assert [event.json["symbol"] for event in first_events(server, 3, "&symbols=TSLA")] == ["TSLA"] * 3


def test_an_unknown_symbol_is_reported_with_the_known_ones(serve: Serve) -> None:
    status, _, body = serve("").get(f"{PATH}?symbols=NOPE,AAPL,ACME")
    assert status == 422
    assert json.loads(body)["errors"] == [
        {"in": "query", "name": "symbols", "detail": f"unknown: ACME, NOPE; known: {', '.join(FIVE)}"}
    ]


def test_a_symbol_that_was_not_pushed_yet_can_be_followed(serve: Serve) -> None:
    server = serve('source = "push"')
    with EventStream(server, f"{PATH}?symbols=ACME&limit=1", after="0-0") as stream:
        publish(server, {"symbol": "OTHER", "price": 1}, {"symbol": "ACME", "price": 2})
        assert [event.json["symbol"] for event in stream] == ["ACME"]


def test_invalid_parameters_are_rejected_by_name(serve: Serve) -> None:
    server = serve("")
    wrong = {
        "limit": ["0", "-1", "1000001", "x", "", "1.5", "9" * 400],
        "conflate": ["-0.1", "3600.1", "x", "", "nan", "inf", "-inf"],
        "symbols": ["A%20B", "-A", "A" * 33, "%C3%A9", "A%0A", "AAPL,,MSFT", ",", "", ",".join(["AAPL"] * 101)],
        "last_event_id": ["x" * 201],
    }
    for name, values in wrong.items():
        for value in values:
            status, headers, body = server.get(f"{PATH}?{name}={value}")
            problem = json.loads(body)
            assert (status, headers["content-type"]) == (422, "application/problem+json; charset=utf-8"), (name, value)
            assert {error["name"].partition(".")[0] for error in problem["errors"]} == {name}
    many = "&".join(["symbols=AAPL"] * 101)
    assert server.get(f"{PATH}?{many}")[0] == 422
    status, _, body = server.get(f"{PATH}?symbol=AAPL&tail=3")
    assert status == 422
    assert [error["name"] for error in json.loads(body)["errors"]] == ["symbol", "tail"]
    known = "unknown parameter; known: conflate, last_event_id, limit, symbols"
    assert {error["detail"] for error in json.loads(body)["errors"]} == {known}


def test_an_id_may_be_in_the_query_and_the_header_takes_precedence(serve: Serve) -> None:
    server = serve('source = "push"')
    ids = publish(server, *({"symbol": "ACME", "price": number} for number in range(5)))
    with EventStream(server, f"{PATH}?limit=3&last_event_id={ids[1]}") as stream:
        assert [event.id for event in stream] == ids[2:]
    with EventStream(server, f"{PATH}?limit=1&last_event_id={ids[0]}", after=ids[3]) as stream:
        assert [event.id for event in stream] == ids[4:]


# -- pushed prices


def test_a_pushed_price_is_published_byte_for_byte(serve: Serve) -> None:
    server = serve('source = "push"')
    texts = [
        '{"symbol":"ACME","price":1.10,"change":0.00,"time":"now"}',
        '{ "price" : 1E2,\t"symbol" : "ACME" , "time":null,"change":"none" }',
        '{"time":1,"change":-1,"symbol":"BRK.B","price":123456789012345678901234567890,'
        '"deep":{"a":[1.10,-0.0,1e400,{"b":{}}]},"pi":3.141592653589793238462643383279}',
        '{"symbol":"X:Y/Z=F","price":-37.63,"change":0,"time":0,"name":"é\u2028\U0001f600","lone":"\\ud800","esc":"\\u00e9\\n"}',
    ]
    with EventStream(server, f"{PATH}?limit=4", after="0-0") as stream:
        ids = publish(server, *texts)
        events = list(stream)
    assert [event.raw for event in events] == [
        f"id: {identity}\ndata: {text}\n\n".encode() for identity, text in zip(ids, texts, strict=True)
    ]
    assert offsets(events) == [1, 2, 3, 4]


def test_change_and_time_are_added_at_the_end_where_they_are_missing(serve: Serve) -> None:
    server = serve('source = "push"')
    texts = [
        '{"symbol":"ACME","price":1.10,"n":1.10 }',
        '{"symbol":"ACME","price":1.30}',
        '{"symbol":"OTHER","price":5}',
        '{"symbol":"ACME","price":1,"time":"t"}',
        '{"symbol":"ACME","price":7,"change":"kept"}',
        '{"symbol":"ACME","price":6.5}',
    ]
    publish(server, *texts[:3])
    publish(server, *texts[3:])
    expected = [
        '{"symbol":"ACME","price":1.10,"n":1.10, "change": null, "time": "TIME"}',
        '{"symbol":"ACME","price":1.30, "change": 0.2, "time": "TIME"}',
        '{"symbol":"OTHER","price":5, "change": null, "time": "TIME"}',
        '{"symbol":"ACME","price":1,"time":"t", "change": -0.3}',
        '{"symbol":"ACME","price":7,"change":"kept", "time": "TIME"}',
        '{"symbol":"ACME","price":6.5, "change": -0.5, "time": "TIME"}',
    ]
    events = first_events(server, 6)
    assert [re.sub(rf'"{TIME}"', '"TIME"', event.data) for event in events] == expected
    assert abs(datetime.fromisoformat(events[0].json["time"]).timestamp() - time.time()) < 60


def test_each_change_is_against_the_price_before_however_fast_they_are_pushed(serve: Serve) -> None:
    server = serve('source = "push"')
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with closing(connection):
        for number in range(500):
            price = json.dumps({"symbol": "ACME", "price": number * number})
            connection.request("POST", PATH, price, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                assert response.status == 202
                response.read()
    assert [event.json["change"] for event in first_events(server, 500)][1:] == [2 * n - 1 for n in range(1, 500)]


def test_the_first_price_after_a_restart_changes_against_the_last_before_it(serve: Serve) -> None:
    server = serve('source = "push"')
    publish(server, *({"symbol": f"S{n % 9000}", "price": n} for n in range(9990)))  # enough to make reading slow
    server.terminate(signal.SIGKILL)
    server = serve('source = "push"')
    ids = publish(server, {"symbol": "S8999", "price": 9000}, {"symbol": "S0", "price": 9001})
    with EventStream(server, f"{PATH}?limit=2", after=ids[0].replace("-9991", "-9990")) as stream:
        assert [(event.id, event.json["change"]) for event in stream] == [(ids[0], 1.0), (ids[1], 1.0)]


def test_a_process_learns_the_prices_that_were_pushed_to_another(serve: Serve) -> None:
    one, other = serve('source = "push"'), serve('source = "push"')
    deadline = time.monotonic() + 10
    with EventStream(other, PATH, after="0-0") as stream:
        events = iter(stream)
        for number in range(1000):  # the other process receives it at an unknown time, not always in the first round
            publish(one, {"symbol": f"S{number}", "price": 1})
            assert next(events).json["change"] is None
            publish(other, {"symbol": f"S{number}", "price": 3})
            if next(events).json["change"] == 2:
                break
            assert time.monotonic() < deadline


def test_prices_with_a_key_are_published_once_by_whichever_process_and_after_a_crash(serve: Serve) -> None:
    one, other = serve('source = "push"'), serve('source = "push"')
    body, key = '{"symbol": "A", "price": 1}\n{"symbol": "B", "price": 2}', {"Idempotency-Key": "é" * 100}
    with ThreadPoolExecutor(8) as threads:
        sent = [threads.submit(post, server, body, "application/x-ndjson", **key) for server in (one, other) * 4]
        ((status, first), *others) = [each.result() for each in sent]
    assert (status, len(first["ids"])) == (202, 2)
    assert others == [(202, first)] * 7
    one.terminate(signal.SIGKILL)
    assert post(serve('source = "push"'), body, "application/x-ndjson", **key) == (202, first)
    assert post(other, '{"symbol": "A", "price": 9}', **key)[0] == 422
    assert post(other, body, "application/x-ndjson", **{"Idempotency-Key": "x" * 256})[0] == 400
    last = publish(other, {"symbol": "C", "price": 3})
    assert [event.id for event in first_events(other, 3)] == [*first["ids"], *last]


async def test_the_oldest_key_is_forgotten_for_a_new_one() -> None:
    events = Events(open_log("sqlite://"))
    async with events.opened():
        channel = events.channel("c")
        keys = once.Keys(channel, remembered=3)

        async def publish(claim: Any) -> list[str]:
            last = await channel.append(
                [encode_event("x")], checkpoints=claim.checkpoints, expected=claim.expected, located=claim.located
            )
            return channel.ids(last, 1)

        async def send(key: str) -> int:
            (id,) = await keys.once("client", key, b"", 1, publish)  # noqa: A001
            return int(id.partition("-")[2])

        assert [await send(key) for key in "abcabc"] == [1, 2, 3, 1, 2, 3]
        assert [await send(key) for key in "dbcda"] == [4, 2, 3, 4, 5]


def test_a_change_that_overflows_is_null(serve: Serve) -> None:
    server = serve('source = "push"')
    publish(server, '{"symbol":"ACME","price":1e308}', '{"symbol":"ACME","price":-1e308}')
    assert [event.json["change"] for event in first_events(server, 2)] == [None, None]


def test_one_object_may_span_lines_and_many_objects_have_one_line_each(serve: Serve) -> None:
    server = serve('source = "push"')
    pretty = '\n\n{\r\n  "symbol": "ACME",\n\n  "price": 1.10,\r  "change": 0, "time": [\n1\n]\n}\n'
    lines = '{"symbol":"A","price":1,"change":0,"time":0}\r\n\n \t\n{"symbol":"B","price":2,"change":0,"time":0}'
    for content_type in ("application/json", "application/x-ndjson; charset=utf-8", "application/jsonl"):
        assert post(server, pretty, content_type)[0] == 202
        status, response = post(server, lines, content_type)
        assert (status, len(response["ids"])) == (202, 2)
    events = first_events(server, 9)
    assert [event.data for event in events] == 3 * [
        '{    "symbol": "ACME",    "price": 1.10,   "change": 0, "time": [ 1 ] }',
        '{"symbol":"A","price":1,"change":0,"time":0}',
        '{"symbol":"B","price":2,"change":0,"time":0}',
    ]


GOOD = '{"symbol":"ACME","price":1}'


def assert_nothing_was_published(server: Running) -> None:
    assert publish(server, GOOD)[0].endswith("-1")


def test_a_body_that_is_not_json_is_400_and_nothing_is_published(serve: Serve) -> None:
    server = serve('source = "push"')
    deep = 100_000
    bodies = {
        '{"symbol":"ACME","price":': "The body is not JSON",
        f'{GOOD}\n{GOOD}\n{{"symbol":"ACME" "price":1}}\n{GOOD}\n{GOOD}': "Line 3 of the body is not JSON",
        '{\n"symbol": "ACME",\n"price" 1}': "line 3 column 9",
        '{"symbol":"ACME","price":NaN}': "NaN is not JSON",
        f'{GOOD}\n{{"symbol":"ACME","price":1,"x":Infinity}}': "Infinity is not JSON",
        '{"symbol":"ACME","price":1,"x":[-Infinity]}': "-Infinity is not JSON",
        '{"symbol":"ACME","price":1,"symbol":"OTHER"}': "an object has a field twice",
        '{"symbol":"ACME","price":1,"x":{"y":1,"y":1}}': "an object has a field twice",
        '{"symbol":"ACME","price":1,"x":' + "[" * deep + "]" * deep + "}": "it is nested too deeply",
        '{"symbol":"ACME","price":1,"x":"\n"}': "The body is not JSON",
        f"{GOOD} {GOOD}": "The body is not JSON",
        f"\ufeff{GOOD}": "The body is not JSON",
        f"\u00a0{GOOD}": "The body is not JSON",
        '{"symbol":"ACME","price":01}': "The body is not JSON",
        "": "The body is empty",
        " \r\n\t\n": "The body is empty",
    }
    for body, reason in bodies.items():
        status, problem = post(server, body)
        assert (status, problem["status"]) == (400, 400), body[:100]
        assert reason in problem["detail"], problem
        assert "errors" not in problem
    status, problem = post(server, GOOD.encode() + b"\xff")
    assert (status, problem["detail"]) == (400, f"The body is not UTF-8 (at byte {len(GOOD)}).")
    status, problem = post(server, "not gzip", **{"Content-Encoding": "gzip"})
    assert (status, problem["status"]) == (400, 400)
    assert_nothing_was_published(server)


def test_every_invalid_price_is_reported_by_line_and_field_and_nothing_is_published(serve: Serve) -> None:
    server = serve('source = "push"')
    wrong = ["true", '"1"', "null", "1e999", "-1e999", "1" + "0" * 400, "[]", "{}"]
    lines = [GOOD, *(f'{{"symbol":"ACME","price":{price}}}' for price in wrong), '{"symbol":"ACME"}', '{"price":1}']
    lines += ['{"symbol":"A B","price":1}', '{"symbol":"","price":false}', '{"symbol":1,"price":1}', "[1]", "1", GOOD]
    status, problem = post(server, "\n".join(lines), "application/jsonl")
    assert status == 422
    assert [error["name"] for error in problem["errors"]] == [
        *(f"line {number}: price" for number in range(2, 11)),
        "line 11: symbol",
        "line 12: symbol",
        "line 13: symbol",
        "line 13: price",
        "line 14: symbol",
        "line 15: body",
        "line 16: body",
    ]
    assert {error["in"] for error in problem["errors"]} == {"body"}
    assert all(error["detail"].startswith("must be ") for error in problem["errors"])
    status, problem = post(server, '{"symbol":"ACME","price":"1"}')
    assert (status, problem["errors"]) == (422, [{"in": "body", "name": "price", "detail": "must be a number"}])
    status, problem = post(server, f"[{GOOD}]")
    assert (status, problem["errors"][0]["detail"]) == (422, "must be a JSON object")
    status, problem = post(server, "{}\n" * 1000)
    assert (status, len(problem["errors"])) == (422, 50)
    assert_nothing_was_published(server)


def test_a_deeply_nested_object_does_not_affect_the_next(serve: Serve) -> None:
    server = serve('source = "push"')
    statuses: dict[int, int] = {}
    sizes: dict[int, int] = {}

    def push(depth: int) -> int:
        nested = f'{{"symbol":"S{depth}","price":1,"x":{"[" * depth}{"]" * depth}}}'
        sizes[depth], statuses[depth] = len(nested), post(server, nested)[0]
        publish(server, {"symbol": f"S{depth}", "price": 2})
        return statuses[depth]

    accepted, rejected = 100, 100_000
    while rejected - accepted > 1:  # how deep Python reads differs from version to version
        depth = (accepted + rejected) // 2
        accepted, rejected = (depth, rejected) if push(depth) == 202 else (accepted, depth)
    for depth in range(accepted - 40, accepted + 10):
        if depth not in statuses:
            push(depth)
    for depth, status in statuses.items():
        rejections = {400, 422} if sizes[depth] > 16 * 1024 else {400}  # Python 3.13 reads more levels than fit
        assert status in ({202} if depth <= accepted else rejections), (depth, status)
    count = len(statuses) + sum(status == 202 for status in statuses.values())
    changes = {re.search(r'"change": ([^,]+)', event.data)[1] for event in first_events(server, count)}  # type: ignore[index]
    assert changes == {"null", "1.0"}


def test_a_body_of_1_mib_is_accepted_and_of_one_byte_more_is_413(serve: Serve) -> None:
    server = serve('source = "push"')
    head, tail = '{"symbol":"ACME","price":1,"x":"', '"}'
    price = head + "x" * (16 * 1024 - len(head) - len(tail)) + tail
    body = "\n".join([*[price] * 63, price[: -len(tail) - 63] + tail])
    body += " " * (1024 * 1024 - len(body))
    assert post(server, body + " ")[0] == 413
    assert post(server, body)[0] == 202
    assert [event.data.startswith(price[:-1] + ", ") for event in first_events(server, 64)] == [True] * 63 + [False]


def test_a_price_of_16_kib_is_accepted_and_of_one_byte_more_is_422(serve: Serve) -> None:
    server = serve('source = "push"')
    head, tail = '{"symbol":"ACME","price":1,"x":"', '"}'
    price = head + "x" * (16 * 1024 - len(head) - len(tail)) + tail
    status, answer = post(server, price.replace("xx", "xxx", 1))
    assert (status, answer["errors"][0]["detail"]) == (422, "must have at most 16384 bytes")
    assert post(server, price)[0] == 202


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", ""])
def test_a_body_of_another_type_is_415(serve: Serve, content_type: str) -> None:
    server = serve('source = "push"')
    headers = {"Content-Type": content_type} if content_type else {}
    status, response, body = server.get(PATH, headers, method="POST", body=GOOD.encode())
    assert (status, response["accept"]) == (415, "application/json, application/x-ndjson, application/jsonl")
    assert json.loads(body)["detail"] == (
        "The body must be application/json or application/x-ndjson or application/jsonl."
    )
    assert_nothing_was_published(server)


# -- replayed prices

REPLAY = 'source = "replay"\nfile = "prices.csv"\n'


def test_a_file_is_replayed_with_its_own_times_and_further_columns(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "prices.csv").write_bytes(
        b"\xef\xbb\xbfvolume,time,price,symbol,note\r\n"
        b"10,2026-01-01T00:00:00Z,1.50,ACME,\r\n"
        b'"1,000",1767225660,2,"ACME","say ""hi"",\r\n\xc3\xa9"\r\n'
        b"\r\n"
        b"7,2026-01-01T02:02:00+02:00,3e2,BRK.B\r\n"
        b"8,2026-01-01T00:03:00,1.25,ACME,x,surplus,cells\r\n"
    )
    server = serve(REPLAY + "speed = 10000\nrepeat = false")
    events = first_events(server, 4)
    assert [event.data for event in events] == [
        '{"symbol": "ACME", "price": 1.5, "volume": "10", "time": "2026-01-01T00:00:00Z", "note": "", "change": null}',
        '{"symbol": "ACME", "price": 2.0, "volume": "1,000", "time": "1767225660", '
        '"note": "say \\"hi\\",\\r\\né", "change": 0.5}',
        '{"symbol": "BRK.B", "price": 300.0, "volume": "7", "time": "2026-01-01T02:02:00+02:00", '
        '"note": null, "change": null}',
        '{"symbol": "ACME", "price": 1.25, "volume": "8", "time": "2026-01-01T00:03:00", "note": "x", "change": -0.75}',
    ]
    assert [event.json["symbol"] for event in first_events(server, 1, "&symbols=BRK.B")] == ["BRK.B"]


async def replayed(path: Path, count: int, *, speed: float, repeat: bool) -> list[tuple[float, list[str], str]]:
    """Return for each of the first `count` batches its time, its symbols and its checkpoint."""
    loop, made = asyncio.get_running_loop(), list[tuple[float, list[str], str]]()
    async with (
        asyncio.timeout(10),
        aclosing(sources.Replay(path, speed=speed, repeat=repeat, checkpoint=None).prices()) as it,
    ):
        async for prices, checkpoint in it:
            made.append((loop.time(), [price.symbol for price in prices], checkpoint))
            if len(made) == count:
                break
    return made


async def test_rows_are_published_at_their_times_divided_by_the_speed_and_equal_times_together(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text(
        "time,symbol,price\n2026-01-01T00:00:00Z,A,1\n1767225700,B,1\n2026-01-01T01:01:40+01:00,C,1\n"
        "2026-01-01T00:01:40.000,D,1\n1767225800.5,E,1\n"
    )
    made = await replayed(path, 3, speed=1000, repeat=False)
    assert [(symbols, checkpoint) for _, symbols, checkpoint in made] == [
        (["A"], "1"),
        (["B", "C", "D"], "4"),
        (["E"], "5"),
    ]
    first, second, third = (moment for moment, _, _ in made)
    assert 0.099 < second - first < 2
    assert 0.199 < third - first < 4


async def test_a_file_with_one_time_is_not_repeated_without_a_pause(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text("time,symbol,price\n1,A,1\n1,B,2\n")
    (first, *_), (second, *_) = await replayed(path, 2, speed=5, repeat=True)
    assert second - first > 0.199


def test_invalid_rows_are_skipped_and_logged(serve: Serve, tmp_path: Path) -> None:
    wrong = [
        "x,1,A",
        "1,x,A",
        "1,nan,A",
        "1,inf,A",
        "1,1e999,A",
        "1,,A",
        "1,1,",
        "1,1",
        "1",
        "nan,1,A",
        "2026-13-01,1,A",
    ]
    (tmp_path / "prices.csv").write_text("\n".join(["time,price,symbol", "1,1,FIRST", *wrong, "1,1,LAST", ""]))
    server = serve(REPLAY + "repeat = false")
    assert [event.json["symbol"] for event in first_events(server, 2)] == ["FIRST", "LAST"]
    log = server.wait_for_log(f"row {len(wrong) + 1} of prices.csv")
    skipped = re.findall(r"WARNING \S+ row (\d+) of prices\.csv is skipped: \S", log)
    assert [int(number) for number in skipped] == list(range(2, 2 + len(wrong)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"prices\.csv cannot be read: No such file or directory"),
        (b"time,symbol\n1,A\n", r"prices\.csv has no column price"),
        (b"", r"prices\.csv has no column price, symbol, time"),
        (b"time,symbol,price\n", r"prices\.csv has no valid row"),
        (b"time,symbol,price\nx,A,1\n", r"prices\.csv has no valid row"),
        (b"time,symbol,price\n1,\xff,1\n", r"prices\.csv cannot be read: 'utf-8' codec can't decode byte 0xff.*"),
    ],
)
def test_a_file_that_cannot_be_replayed_takes_the_ticker_out_of_service_and_nothing_else(
    serve: Serve, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "prices.csv").write_bytes(content)
    (tmp_path / "var" / "files").mkdir(parents=True)
    (tmp_path / "var" / "files" / "hello.txt").write_text("hello")
    server = serve(REPLAY)
    health = health_of_ticker(server, "failed")
    assert re.fullmatch(reason, health["ticker"]["reason"])
    server.wait_for_log(f"plugin ticker failed: {health['ticker']['reason']}\n")
    assert health["file"] == {"state": "ready"}
    status, _, body = server.get(PATH)
    assert (status, json.loads(body)["detail"]) == (
        503,
        f"The plugin ticker is out of service: {health['ticker']['reason']}",
    )
    assert server.get("/files/hello.txt")[::2] == (200, b"hello")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"time,symbol\n", "has no column price"),
        (b"\xff\n", "cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_check_reports_a_file_that_cannot_be_replayed(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "prices.csv"
    if content is not None:
        path.write_bytes(content)
    (tmp_path / "config.toml").write_text(f"[scenarios.ticker]\n{REPLAY}")
    status, output, errors = run_streamlab("check", cwd=tmp_path)
    assert (status, errors) == (
        2,
        f"config.toml: scenarios.ticker.file - {path} {reason}\nstreamlab: 1 fault; nothing was started\n",
    )
    assert "ticker: 1 fault" in output.splitlines()
    path.write_text("time,symbol,price\n1,A,1\n")
    assert run_streamlab("check", cwd=tmp_path)[0] == 0


async def test_without_repeat_a_replay_stops_after_the_last_row(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text("time,symbol,price\n1,A,1\n2,B,2\n")
    for checkpoint, expected in ((None, ["A", "B"]), ("1", ["B"]), ("2", [])):
        replay, made = sources.Replay(path, speed=1e9, repeat=False, checkpoint=checkpoint), list[str]()
        async with aclosing(replay.prices()) as batches:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    async for prices, _ in batches:
                        made += [price.symbol for price in prices]
                    pytest.fail("it ended instead of waiting: another process would replay the file again")
        assert made == expected


def test_with_repeat_a_replay_starts_again_after_the_last_row(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "prices.csv").write_text("time,symbol,price\n1,A,1\n2,B,10\n3,A,4\n")
    server = serve(REPLAY + "speed = 100")
    events = first_events(server, 10)
    assert [(event.json["time"], event.json["symbol"], event.json["change"]) for event in events] == [
        ("1", "A", None),
        ("2", "B", None),
        ("3", "A", 3.0),
        ("1", "A", -3.0),
        ("2", "B", 0.0),
        ("3", "A", 3.0),
        ("1", "A", -3.0),
        ("2", "B", 0.0),
        ("3", "A", 3.0),
        ("1", "A", -3.0),
    ]


def test_a_replay_that_is_killed_resumes_and_publishes_every_row_once(serve: Serve, tmp_path: Path) -> None:
    rows = 300
    symbols = [f"S{number % 7}" for number in range(rows)]
    table = [f"{number * 5},{symbols[number]},{number}" for number in range(rows)]
    (tmp_path / "prices.csv").write_text("\n".join(["time,symbol,price", *table, ""]))
    config = REPLAY + "speed = 1000\nrepeat = false"
    server = serve(config)
    for seen in (50, 150):
        with EventStream(server, PATH, after="0-0") as stream:
            stream.take(seen)
            server.terminate(signal.SIGKILL)
        server = serve(config)
    events = first_events(server, rows)
    assert offsets(events) == list(range(1, rows + 1))
    assert [(event.json["symbol"], event.json["price"]) for event in events] == list(
        zip(symbols, range(rows), strict=True)
    )
    assert [event.json["change"] for event in events] == [None] * 7 + [7.0] * (rows - 7)
    server.terminate()
    server = serve(config)
    with EventStream(server, f"{PATH}?limit=1", after=events[-1].id) as stream:
        server.terminate()
        assert [event.event for event in stream] == ["stop"]  # and no row is repeated


def test_another_file_begins_with_its_first_row(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "prices.csv").write_text("time,symbol,price\n1,A,1\n1,A,2\n1,A,3\n")
    (tmp_path / "more.csv").write_text("time,symbol,price\n1,B,1\n1,B,2\n")
    server = serve(REPLAY + "repeat = false")
    first_events(server, 3)
    server.terminate()
    server = serve('source = "replay"\nfile = "more.csv"\nrepeat = false')
    assert [event.json["symbol"] for event in first_events(server, 5)] == ["A", "A", "A", "B", "B"]


# -- conflation


def test_conflation_sends_the_latest_price_of_a_symbol_once_per_window(serve: Serve) -> None:
    window, interval = 0.5, 0.02
    server = serve(f'interval = {interval}\nsymbols = ["A", "B"]')
    received: list[tuple[float, Received]] = []
    with EventStream(server, f"{PATH}?conflate={window}&limit=12") as stream:
        for event in stream:
            received.append((time.time(), event))
    every = {event.id: event for event in first_events(server, max(offsets([event for _, event in received])))}
    assert all(event == every[event.id] for _, event in received)
    made = {symbol: [e for _, e in received if e.json["symbol"] == symbol] for symbol in "AB"}
    for events in made.values():
        moments = [datetime.fromisoformat(event.json["time"]).timestamp() for event in events]
        apart = [after - before for before, after in itertools.pairwise(moments[1:])]
        assert min(apart) > window / 2
    # Both move in every step, so that the latest of each is of the same one,
    assert [offset + 1 for offset in offsets(made["A"])] == offsets(made["B"])
    # and it is young when it comes; the first of its window would be as old as the window is long.
    ages = [moment - datetime.fromisoformat(event.json["time"]).timestamp() for moment, event in received]
    assert min(ages[2:]) < window / 2
