"""Exports of a real PostgreSQL: values arrive unchanged, cannot inject SQL, and no query outlives its export."""

import asyncio
import csv
import io
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.support import postgres_server
from tests.support.connections import read_until
from tests.support.postgres_server import Postgres
from tests.support.servers import Running, plugin_module

LOADED_PLUGINS = ("export",)

asyncpg = pytest.importorskip("asyncpg", reason="asyncpg is not installed")
postgres, postgres_cluster = postgres_server.postgres, postgres_server.postgres_cluster

module = plugin_module("export", "postgres_source")
formats = plugin_module("export", "formats")
Column = plugin_module("export", "encoder").Column
IGNORED_RANGES = plugin_module("export", "formula_guard").IGNORED_RANGES
quoted = plugin_module("export", "source").quoted
PostgresSource, Query, Selection, Statement = module.PostgresSource, module.Query, module.Selection, module.Statement
BadQuery, BadValue, Interrupted = module.BadQuery, module.BadValue, module.Interrupted
Unavailable, UnknownColumn = module.Unavailable, module.UnknownColumn

# In the select list, not after FROM, where PostgreSQL would generate all of them before the first.
ENDLESS = "SELECT i, repeat('x', 1000) AS pad FROM (SELECT generate_series(1, 1000000000) AS i) AS s"


@asynccontextmanager
async def opened(postgres: Postgres, **options: Any) -> AsyncIterator[Any]:
    source = PostgresSource(postgres.url, **{"statement_seconds": 30.0} | options)
    async with source.opened():
        yield source


@pytest.fixture(scope="module")
def shared(postgres_cluster: Path) -> Iterator[Postgres]:
    """Yield one server for all tests that do not end it."""
    with postgres_server.serving(postgres_cluster) as server:
        yield server


@pytest.fixture
async def admin(shared: Postgres) -> AsyncIterator[Any]:
    """Yield a superuser connection to an empty database."""
    connection = await asyncpg.connect(shared.url)
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public; ALTER DATABASE postgres RESET ALL")
    yield connection
    connection.terminate()


@pytest.fixture
async def own(postgres: Postgres) -> AsyncIterator[Any]:
    """Yield a source for a server that the test may end."""
    async with opened(postgres) as source:
        yield source


@pytest.fixture
async def source(shared: Postgres, admin: Any) -> AsyncIterator[Any]:
    async with opened(shared) as source:
        yield source


@dataclass
class Read:
    """An export that was read to its end."""

    body: bytes
    rows: int
    names: list[str]
    version: str

    @property
    def cells(self) -> list[list[str]]:
        """Return the CSV without its header."""
        return self.table[1:]

    @property
    def table(self) -> list[list[str]]:
        return list(csv.reader(io.StringIO(self.body.decode(), newline=""), strict=True))

    @property
    def objects(self) -> list[Any]:
        assert self.body.endswith(b"\n") or not self.body
        return [json.loads(line, parse_float=Decimal) for line in self.body.split(b"\n")[:-1]]


async def read(source: Any, sql: str, form: str = "csv", *, guard: bool = False, **options: Any) -> Read:
    """Read a complete export; `options` are those of the selection, and the `parameters` of the query."""
    query = Query(sql, options.pop("parameters", {}))
    strict = options.pop("strict", False)
    async with source.export(query, Selection(**options), form, formula_guard=guard, strict=strict) as (
        export,
        encoder,
    ):
        body = export.begin
        async for chunk in export.chunks():
            body += chunk
        body += encoder.end(export.rows, None)
    return Read(body, export.rows, [column.name for column in export.columns], export.version)


async def until(fact: Callable[[], Any], seconds: float = 10) -> float:
    """Query the server until a condition is true; return the seconds until then."""
    begun = time.monotonic()
    while not await fact():
        assert time.monotonic() < begun + seconds
        await asyncio.sleep(0.002)
    return time.monotonic() - begun


def running(admin: Any) -> Callable[[], Any]:
    """Return the number of running export queries."""
    return lambda: admin.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'streamlab' AND state = 'active'"
    )


def none_runs(admin: Any) -> Callable[[], Any]:
    async def idle() -> bool:
        return bool(await running(admin)() == 0)

    return idle


async def table(admin: Any, texts: Iterable[str | None]) -> None:
    """Create a table t with an id and a text."""
    await admin.execute("CREATE TABLE t (id int, text text)")
    await admin.executemany("INSERT INTO t VALUES ($1, $2)", list(enumerate(texts)))


NASTY = [
    "plain",
    "",
    None,
    'say "hello"',
    '"',
    '""',
    "a,b",
    "a\nb",
    "a\r\nb",
    "\r",
    "\n",
    " blanks ",
    "\\",
    "\\n",
    "\\.",
    "\\N",
    "NULL",
    "\u2028\u2029\x85",
    "\x01\x02\x1f\x7f",
    "\ud55c\U0001f600e\u0301",
    "=1+1",
    "+1",
    "-1",
    "@x",
    "\tx",
    "'x",
    "$1",
    "|",
    '|"\n',
    ',"|"\n',
    "x" * 100_000,
]


# -- describing


@pytest.mark.parametrize(
    ("expression", "type_"),
    [
        ("1::int2", "integer"),
        ("1::int4", "integer"),
        ("1::int8", "integer"),
        ("1::oid", "integer"),
        ("1::float4", "real"),
        ("1::float8", "real"),
        ("1::numeric(9, 2)", "decimal"),
        ("'a'::text", "text"),
        ("'a'::varchar(3)", "text"),
        ("'a'::char(3)", "text"),
        ("'a'::\"char\"", "text"),
        ("'a'::name", "text"),
        ("'a'", "text"),
        ("NULL", "text"),
        ("'a'::bytea", "blob"),
        ("true", "boolean"),
        ("now()::date", "date"),
        ("now()::time", "time"),
        ("now()::timestamp", "timestamp"),
        ("now()", "timestamptz"),
        ("now() - now()", "interval"),
        ("gen_random_uuid()", "uuid"),
        ("'1'::json", "json"),
        ("'1'::jsonb", "json"),
        ("ARRAY[1]", "any"),
        ("ROW(1, 2)", "any"),
        ("'1.2.3.4'::inet", "any"),
        ("int4range(1, 2)", "any"),
        ("'1'::shape", "any"),
        ("'a'::short", "text"),
    ],
)
async def test_describe_names_the_type_of_a_column(source: Any, admin: Any, expression: str, type_: str) -> None:
    await admin.execute("CREATE TYPE shape AS ENUM ('1'); CREATE DOMAIN short AS text CHECK (length(value) < 9)")
    [column] = await source.describe(Query(f"SELECT {expression} AS x"))
    assert (column.name, column.type) == ("x", type_)


async def test_describe_does_not_run_the_query(source: Any) -> None:
    begun = time.monotonic()
    assert [column.name for column in await source.describe(Query("SELECT pg_sleep(20), 1/0 AS x"))] == [
        "pg_sleep",
        "x",
    ]
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_columns_of_one_name_are_distinguished(source: Any, form: str) -> None:
    result = await read(source, "SELECT 1 AS a, 2 AS a, 3 AS a_2, 4, 5", form)
    assert result.names == ["a", "a_3", "a_2", "?column?", "?column?_2"]
    if form == "csv":
        assert result.table == [result.names, ["1", "2", "3", "4", "5"]]
    else:
        assert json.loads(result.body.strip(b"[]\n")) == dict(zip(result.names, range(1, 6), strict=True))


async def test_names_that_differ_only_beyond_the_limit_of_postgresql_stay_different(source: Any) -> None:
    name = "\u00e9" * 31
    result = await read(source, f'SELECT 1 AS "{name}", 2 AS "{name}", 3 AS "{name}"', "jsonl")
    [row] = result.objects
    assert list(row) == result.names
    assert list(row.values()) == [1, 2, 3]


NAMES = ['a"b', "a\\b", "a\nb", "a'b", "$1", ":x", "r", "q", "c1", "c2", "streamlab_mark", "id; DROP TABLE t", "\u2028"]


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_columns_may_have_any_name(source: Any, form: str) -> None:
    quoted = ['"' + name.replace('"', '""') + '"' for name in NAMES]
    sql = "SELECT " + ", ".join(f"{number} AS {name}" for number, name in enumerate(quoted))
    result = await read(source, sql, form)
    assert result.names == NAMES
    numbers = dict(zip(NAMES, range(len(NAMES)), strict=True))
    if form == "csv":
        assert result.table == [NAMES, [str(number) for number in numbers.values()]]
    else:
        assert json.loads(result.body.strip(b"[]\n")) == numbers
    for name, number in numbers.items():
        chosen = await read(source, sql, "jsonl", columns=[name], where={name: str(number)})
        assert chosen.objects == [{name: number}]


# -- values


async def test_csv_reads_back_unchanged(source: Any, admin: Any) -> None:
    await table(admin, NASTY)
    result = await read(source, "SELECT id, text, id % 2 = 0 AS even FROM t ORDER BY id")
    assert result.table == [["id", "text", "even"]] + [
        [str(number), text or "", "true" if number % 2 == 0 else "false"] for number, text in enumerate(NASTY)
    ]
    assert result.rows == len(NASTY)


async def test_csv_distinguishes_null_from_an_empty_text(source: Any) -> None:
    assert (await read(source, "SELECT 1, '', NULL")).body.endswith(b'\r\n1,"",\r\n')


async def test_a_single_column_has_no_empty_lines(source: Any) -> None:
    result = await read(source, "SELECT x FROM (VALUES (NULL), (''), ('a')) AS v (x)")
    assert result.body == b'x\r\n""\r\n""\r\na\r\n'
    assert result.rows == 3


async def test_every_line_of_csv_ends_in_crlf_and_no_text_is_changed_by_that(source: Any, admin: Any) -> None:
    texts = ["".join(marks) for length in range(5) for marks in itertools.product('a,"|\n', repeat=length)]
    texts += ["".join(marks) for marks in itertools.product(',"|\n', repeat=5)] + ["\r", "\r\n", '\r"', '"|"\r\n']
    await table(admin, texts)

    def cell(text: str) -> str:
        special = not text or any(mark in text for mark in ',"\r\n')
        return '"' + text.replace('"', '""') + '"' if special else text

    result = await read(source, "SELECT id, text, text AS again FROM t ORDER BY id")
    lines = ["id,text,again"] + [f"{number},{cell(text)},{cell(text)}" for number, text in enumerate(texts)]
    assert result.body.decode() == "".join(line + "\r\n" for line in lines)
    assert result.rows == len(texts)
    single = await read(source, "SELECT text FROM t ORDER BY id")
    assert single.body.decode() == "".join(line + "\r\n" for line in ["text", *map(cell, texts)])


@pytest.mark.parametrize("form", ["jsonl", "json"])
async def test_json_reads_back_unchanged(source: Any, admin: Any, form: str) -> None:
    await table(admin, NASTY)
    result = await read(source, "SELECT id, text, id % 2 = 0 AS even FROM t ORDER BY id", form)
    rows = result.objects if form == "jsonl" else json.loads(result.body)
    assert rows == [{"id": n, "text": text, "even": n % 2 == 0} for n, text in enumerate(NASTY)]
    assert result.rows == len(NASTY)


@pytest.mark.parametrize("guard", [True, False])
async def test_texts_that_a_spreadsheet_would_run_get_an_apostrophe_and_numbers_do_not(
    source: Any, admin: Any, guard: bool
) -> None:
    texts = [
        "=1",
        "+1",
        "-1",
        "@a",
        "\ta",
        "\ra",
        "\uff1d1",
        "\uff0b1",
        "\uff0d1",
        "\uff201",
        "a=1",
        "",
        None,
        "'=",
        " =",
    ]
    await admin.execute("CREATE TYPE shape AS ENUM ('=SUM(1)', 'round')")
    await table(admin, texts)
    sql = """SELECT -id AS id, text, text::char(3) AS padded, -id::numeric AS n, '=SUM(1)'::shape AS s
             FROM t ORDER BY t.id"""
    result = await read(source, sql, guard=guard)
    apostrophe = "'" if guard else ""

    def guarded(text: str) -> str:
        return (
            apostrophe + text
            if text.strip()[:1] in [*"=+-@\uff1d\uff0b\uff0d\uff20"] or (text[:1] in "\t\r" and text)
            else text
        )

    assert result.cells == [
        [
            str(-number),
            guarded(text or ""),
            guarded("" if text is None else f"{text:3}"),
            str(-number),
            apostrophe + "=SUM(1)",
        ]
        for number, text in enumerate(texts)
    ]


async def test_the_guard_is_that_of_the_encoder(source: Any, admin: Any) -> None:
    ignored = [chr(code) for first, last in IGNORED_RANGES for code in (first, last)]
    marks = "=+-@\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b"
    texts = [
        f"{before}{mark}1" for before in ("", "\t", ";", "a;", "a\t", "a; \u200b", "a", *ignored) for mark in marks
    ]
    texts += [f"{before}a" for before in ignored] + [
        "=1;=2\t=3",
        ";;=",
        "\n=1",
        "\t=1",
        "\nx",
        'x;"=1',
        "a; b",
        "",
        "é-1",
    ]
    await admin.execute("CREATE TABLE t (id int, text text)")
    await admin.copy_records_to_table("t", records=list(enumerate(texts)))
    result = await read(source, "SELECT text, 1 AS one FROM t ORDER BY id", guard=True)
    encoder = formats.make("csv", [Column("text", "text"), Column("one", "integer")])
    expected = encoder.rows([(text, 1) for text in texts]).decode()
    assert [cell for cell, _ in result.cells] == [
        cell for cell, _ in csv.reader(io.StringIO(expected, newline=""), strict=True)
    ]
    nested = await read(
        source, """SELECT '{"a": "x;=1"}'::json AS j, ARRAY['x;=1'] AS a, '-5'::json AS n""", guard=True
    )
    assert nested.cells == [['{"a": "x;\'=1"}', '["x;\'=1"]', "-5"]]


async def test_a_text_that_looks_like_a_number_that_is_not_finite_is_not_one(source: Any) -> None:
    names = ["r", 'r"', 'x"r', 'x,"r', "t", 'é\n\\"', "n"]
    values = [
        "float8 'NaN'",
        "text 'Infinity'",
        "text 'NaN'",
        "text 'NaN'",
        """text ',"r":"NaN"'""",
        "float4 '-Infinity'",
    ]
    columns = [f"{value} AS {quoted(name)}" for value, name in zip([*values, "numeric 'NaN'"], names, strict=True)]
    texts = ["Infinity", "NaN", "NaN", ',"r":"NaN"']
    for selected, altered in (names, 3), (names[:5], 1):
        selection = Selection(columns=selected)
        async with source.export(Query(f"SELECT {', '.join(columns)}"), selection, "jsonl", formula_guard=True) as (
            export,
            _,
        ):
            [line] = [chunk async for chunk in export.chunks()]
            assert export.altered == altered
        assert json.loads(line) == dict(zip(selected, [None, *texts, None, None], strict=False))


async def test_numbers_that_json_cannot_represent_are_counted_or_rejected(source: Any) -> None:
    sql = """SELECT r, '{"a":\tnull\t}'::json AS j, 'null' || chr(9) AS t
             FROM (VALUES ('NaN'::float8), (1.5), (NULL), ('-Infinity')) AS v (r)"""
    for form in ("jsonl", "json"):
        async with source.export(Query(sql), Selection(), form, formula_guard=True) as (export, _):
            body = b"".join([chunk async for chunk in export.chunks()])
            assert export.altered == 2, form
        lines = body.replace(b",\n", b"\n").split(b"\n") if form == "json" else body.splitlines()
        objects = [json.loads(line) for line in lines if line.strip(b"[]")]
        assert objects == [{"r": r, "j": {"a": None}, "t": "null\t"} for r in (None, 1.5, None, None)]
        with pytest.raises(module.UnrepresentableValue, match="JSON cannot represent"):
            await read(source, sql, form, strict=True)


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_a_cell_that_is_too_large_is_rejected_by_its_column(shared: Postgres, form: str) -> None:
    async with opened(shared, max_cell=100_000) as source:
        for value in (
            "repeat('x', 100001)",
            "repeat('é', 50001)",
            "convert_to(repeat('x', 100001), 'UTF8')",
            "to_json(repeat('x', 100001))",
            "to_jsonb(repeat('x', 100001))",
            "ARRAY[repeat('x', 100001)]",
        ):
            # Rows that the query omits are not examined.
            rows = f"SELECT i, CASE WHEN i = 2 THEN {value} END AS v FROM generate_series(1, 2) AS i"
            sql = f'SELECT i, v AS "it\'s" FROM ({rows})'
            assert (await read(source, f"{sql} AS s WHERE i = 1", form)).rows == 1
            with pytest.raises(module.TooLarge, match=r"^column .*it's.* holds 100[0-9]{3} bytes$"):
                await read(source, f"{sql} AS s", form)
            assert (await read(source, f"{sql} AS s", form, columns=["i"])).rows == 2
        assert (await read(source, "SELECT repeat('x', 100000) AS v", form)).rows == 1


async def test_a_name_that_a_spreadsheet_would_run_is_guarded_too(source: Any) -> None:
    assert (await read(source, 'SELECT 1 AS "=1+1"', guard=True)).table[0] == ["'=1+1"]


VALUES = """
    SELECT 12345678901234567890123456789012345678901234567890::numeric AS huge,
           0.00000000000000000000000000000000000000000000000001::numeric AS tiny,
           1.10::numeric(9, 2) AS price, 'NaN'::numeric AS nan, '-Infinity'::numeric AS infinite,
           'NaN'::float8 AS real_nan, 'Infinity'::float8 AS real_infinite, 0.1::float4 AS short, 1e300::float8 AS long,
           '\\x00ff0a22'::bytea AS blob, decode(repeat('00', 100), 'hex') AS long_blob,
           ARRAY[[1, 2], [3, NULL]] AS numbers, ARRAY['a"b', 'c,d', E'e\nf', NULL] AS texts,
           ROW(1, 'x') AS record, '{"b":\n[1,\r\n 1.50, "\\u0000"], "a": 1, "b": 2}'::json AS json,
           '{"k": 1.50}'::jsonb AS jsonb,
           timestamptz '2024-02-29 12:34:56.789+05:30' AS zoned, timestamp '2024-02-29 12:34:56' AS naive,
           date '2024-02-29' AS day, time '12:34:56.5' AS clock, timestamp '0044-03-15 00:00:00 BC' AS ides,
           interval '1 year 2 months 3 days 04:05:06.5' AS length, interval '-1 month' AS back,
           '12345678-1234-5678-1234-567812345678'::uuid AS uuid, '1.2.3.4'::inet AS host, 7::oid AS oid,
           int4range(1, 5) AS span, 'ab'::char(4) AS padded, true AS yes, NULL::boolean AS unknown
"""


async def test_values_of_all_types_in_csv(source: Any, admin: Any) -> None:
    await admin.execute("ALTER DATABASE postgres SET TimeZone = 'Europe/Berlin'")
    await admin.execute("ALTER DATABASE postgres SET DateStyle = 'German'")
    await admin.execute("ALTER DATABASE postgres SET IntervalStyle = 'postgres_verbose'")
    result = await read(source, VALUES, guard=True)
    [cells] = result.cells
    assert dict(zip(result.names, cells, strict=True)) == {
        "huge": "1234567890" * 5,
        "tiny": "0." + "0" * 49 + "1",
        "price": "1.10",
        "nan": "NaN",
        "infinite": "-Infinity",
        "real_nan": "NaN",
        "real_infinite": "Infinity",
        "short": "0.1",
        "long": "1e+300",
        "blob": "AP8KIg==",
        "long_blob": "A" * 134 + "==",
        "numbers": "[[1,2],[3,null]]",
        "texts": '["a\\"b","c,d","e\\nf",null]',
        "record": '{"f1":1,"f2":"x"}',
        "json": '{"b":\n[1,\r\n 1.50, "\\u0000"], "a": 1, "b": 2}',
        "jsonb": '{"k": 1.50}',
        "zoned": "2024-02-29 08:04:56.789+01",
        "naive": "2024-02-29 12:34:56",
        "day": "2024-02-29",
        "clock": "12:34:56.5",
        "ides": "0044-03-15 00:00:00 BC",
        "length": "P1Y2M3DT4H5M6.5S",
        "back": "P-1M",
        "uuid": "12345678-1234-5678-1234-567812345678",
        "host": "1.2.3.4",
        "oid": "7",
        "span": "[1,5)",
        "padded": "ab  ",
        "yes": "true",
        "unknown": "",
    }


JSON_VALUES = {
    "huge": int("1234567890" * 5),
    "tiny": Decimal("1E-50"),
    "price": Decimal("1.10"),
    "nan": None,
    "infinite": None,
    "real_nan": None,
    "real_infinite": None,
    "short": Decimal("0.1"),
    "long": Decimal("1E+300"),
    "blob": "AP8KIg==",
    "long_blob": "A" * 134 + "==",
    "numbers": [[1, 2], [3, None]],
    "texts": ['a"b', "c,d", "e\nf", None],
    "record": {"f1": 1, "f2": "x"},
    "json": {"a": 1, "b": 2},
    "jsonb": {"k": Decimal("1.50")},
    "zoned": "2024-02-29T07:04:56.789+00:00",
    "clock": "12:34:56.5",
    "ides": "0044-03-15T00:00:00 BC",
    "naive": "2024-02-29T12:34:56",
    "day": "2024-02-29",
    "length": "P1Y2M3DT4H5M6.5S",
    "back": "P-1M",
    "uuid": "12345678-1234-5678-1234-567812345678",
    "host": "1.2.3.4",
    "oid": 7,
    "span": "[1,5)",
    "padded": "ab  ",
    "yes": True,
    "unknown": None,
}


@pytest.mark.parametrize("form", ["jsonl", "json"])
async def test_values_of_all_types_in_json(source: Any, form: str) -> None:
    result = await read(source, VALUES, form)
    [row] = result.objects if form == "jsonl" else json.loads(result.body, parse_float=Decimal)
    assert list(row) == result.names
    assert row == JSON_VALUES
    assert b'"json":{"b": [1,   1.50, "\\u0000"], "a": 1, "b": 2}' in result.body, "a json is passed on as it is"
    assert b'"price":1.10,' in result.body


async def test_values_that_a_format_cannot_represent_are_rejected(source: Any) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for value in (
        "date 'infinity'",
        "timestamp '-infinity'",
        "timestamptz 'infinity'",
        "date '0044-03-15 BC'",
        "timestamp '20000-01-01'",
        "time '24:00:00'",
    ):
        with pytest.raises(module.UnrepresentableValue):
            await read(source, f"SELECT {value} AS x", "arrow")
        assert (await read(source, f"SELECT {value} AS x", "json")).rows == 1


async def test_arrow_has_the_types_of_the_columns(source: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    sql = "SELECT i, i / 2.0::float8 AS half, now() AS t, interval '1 month' AS length, ARRAY[i] AS a FROM (SELECT "
    result = await read(source, sql + "generate_series(1, 5000) AS i) AS s", "arrow")
    read_back = pyarrow.ipc.open_stream(result.body).read_all()
    types = ["int64", "double", "timestamp[us, tz=UTC]", "string", "string"]
    assert [str(kind) for kind in read_back.schema.types] == types
    assert read_back.column("i").to_pylist() == list(range(1, 5001))
    assert read_back.column("length")[0].as_py() == "P1M"
    assert read_back.column("a")[0].as_py() == "[1]"


async def test_a_json_inside_of_an_array_or_a_record_cannot_break_its_line(source: Any, admin: Any) -> None:
    await admin.execute("CREATE TYPE pair AS (a json, b text)")
    sql = """SELECT ARRAY['{"a":\n1}'::json, '[\r\n]'] AS many, ROW('{\n}', E'x\ny')::pair AS one"""
    result = await read(source, sql, "jsonl")
    assert result.objects == [{"many": [{"a": 1}, []], "one": {"a": {}, "b": "x\ny"}}]
    assert result.rows == 1


# -- selections


async def test_columns_values_limit_and_skip_choose(source: Any, admin: Any) -> None:
    await table(admin, ["a", "b", "a", "a", "a"])
    sql = "SELECT id, text, id * 2 AS double FROM t ORDER BY id"
    result = await read(source, sql, columns=["double", "id", "double"], where={"text": "a"}, skip=1, limit=2)
    assert result.table == [["double", "id"], ["4", "2"], ["6", "3"]]
    assert result.rows == 2
    assert (await read(source, sql, limit=0)).table == [["id", "text", "double"]]
    assert (await read(source, sql, "jsonl", limit=0)).body == b""
    assert (await read(source, sql, "json", limit=0)).body == b"[\n]\n"


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_the_order_of_the_query_is_preserved(source: Any, admin: Any, form: str) -> None:
    await table(admin, [str(number % 7) for number in range(5000)])
    await admin.execute("ALTER DATABASE postgres SET debug_parallel_query = on")
    result = await read(source, "SELECT id FROM t ORDER BY text, id DESC", form)
    ids = [int(row[0]) for row in result.cells] if form == "csv" else [
        json.loads(line.rstrip(b","))["id"] for line in result.body.split(b"\n") if line.startswith(b"{")
    ]  # fmt: skip
    assert ids == sorted(range(5000), key=lambda number: (number % 7, -number))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("i", "7"),
        ("f", "0.5"),
        ("n", "1.10"),
        ("n", "1.1"),
        ("b", "true"),
        ("b", "1"),
        ("d", "2024-02-29"),
        ("ts", "2024-02-29T12:34:56"),
        ("tz", "2024-02-29T12:34:56+01:00"),
        ("tz", "2024-02-29T11:34:56Z"),
        ("u", "12345678-1234-5678-1234-567812345678"),
        ("x", "it's"),
        ("v", "abc"),
        ("p", "ab"),
        ("s", "round"),
        ("a", "{1,2}"),
        ("h", "1.2.3.4"),
    ],
)
async def test_a_value_is_compared_as_the_type_of_its_column(source: Any, admin: Any, column: str, value: str) -> None:
    await admin.execute("CREATE TYPE shape AS ENUM ('round', 'square')")
    sql = """SELECT * FROM (VALUES
        (7, 0.5::float8, 1.10, true, date '2024-02-29', timestamp '2024-02-29 12:34:56',
         timestamptz '2024-02-29 11:34:56+00', '12345678-1234-5678-1234-567812345678'::uuid, 'it''s', 'abc'::varchar(3),
         'ab'::char(4), 'round'::shape, ARRAY[1, 2], '1.2.3.4'::inet),
        (8, 1.5, 2.10, false, '2025-02-28', '2025-02-28 12:34:56', '2025-02-28 11:34:56+00',
         '00000000-1234-5678-1234-567812345678', 'its', 'abd', 'abc', 'square', ARRAY[2], '1.2.3.5'),
        (NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)
        ) AS v (i, f, n, b, d, ts, tz, u, x, v, p, s, a, h)"""
    result = await read(source, sql, columns=["i"], where={column: value})
    assert result.cells == [["7"]]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("i", "x"),
        ("i", "1.5"),
        ("i", "99999999999"),
        ("i", ""),
        ("i", "1 OR 1=1"),
        ("f", "1e999"),
        ("n", "one"),
        ("b", "maybe"),
        ("d", "2023-02-29"),
        ("ts", "noon"),
        ("u", "1"),
        ("x", "nul\0"),
        ("x", "\ud800"),
        ("j", "{}"),
        ("y", "a"),
        ("r", "(1)"),
    ],
)
async def test_a_value_of_another_type_than_its_column_is_rejected_by_name(
    source: Any, column: str, value: str
) -> None:
    sql = """SELECT 1 AS i, 1::float8 AS f, 1.5 AS n, true AS b, now()::date AS d, now()::timestamp AS ts,
             gen_random_uuid() AS u, 'a' AS x, '{}'::json AS j, 'a'::bytea AS y, ROW(1) AS r"""
    with pytest.raises(BadValue) as rejected:
        await read(source, sql, where={column: value})
    assert rejected.value.column == column
    assert rejected.value.detail
    assert "\n" not in rejected.value.detail


async def test_an_unknown_column_is_rejected_with_the_known_ones(source: Any) -> None:
    for selection in ({"columns": ["a", "A"]}, {"where": {"A": "1"}}):
        with pytest.raises(UnknownColumn) as rejected:
            await read(source, "SELECT 1 AS a, 2 AS b", **selection)
        assert (rejected.value.name, rejected.value.known) == ("A", ("a", "b"))


HOSTILE = [
    "'; DROP TABLE t; --",
    "' OR '1'='1",
    "x') TO PROGRAM 'touch /tmp/x' --",
    "\\'; DROP TABLE t; --",
    "$$; DROP TABLE t; $$",
    "$1",
    "current_setting('streamlab.w0')",
    '"; DROP TABLE t; --',
    "/*",
    "--",
    "\n",
    "1); DROP TABLE t; --",
]


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_no_value_becomes_sql(source: Any, admin: Any, hostile: str) -> None:
    await table(admin, [hostile, "other"])
    sql = "SELECT id, text FROM t WHERE text = :text OR :text = '$1 :text'  -- $1 :text"
    for form in ("csv", "jsonl", "json"):
        chosen = await read(source, "SELECT id, text FROM t", form, where={"text": hostile})
        named = await read(source, sql, form, parameters={"text": hostile})
        assert (chosen.rows, named.rows) == (1, 1)
        with pytest.raises(UnknownColumn):
            await read(source, "SELECT id, text FROM t", form, columns=[hostile])
        with pytest.raises(UnknownColumn):
            await read(source, "SELECT id, text FROM t", form, where={hostile: "1"})
        with pytest.raises(BadValue):
            await read(source, "SELECT id, text FROM t", form, where={"id": hostile})
        with pytest.raises(ValueError, match="format"):
            await read(source, "SELECT id, text FROM t", form, limit=hostile)
    assert await admin.fetchval("SELECT count(*) FROM t") == 2


# -- parameters

LEXED = [
    ("SELECT :x", ["x"]),
    ("SELECT ':x'", []),
    ("SELECT 'it''s :x'", []),
    ("SELECT '\\', :x, '\\'", ["x"]),
    (r"SELECT E'\':x', :y", ["y"]),
    (r"SELECT e'\\', :x", ["x"]),
    ("SELECT E'a'\n'\\':x', :y", ["y"]),
    ("SELECT E'a' -- '\n  '\\':x', :y", ["y"]),
    ("SELECT 'a'\n'\\', :x", ["x"]),
    (r"SELECT U&'\0061:x', :y", ["y"]),
    (r"SELECT U&'\\', :y", ["y"]),
    (r"SELECT N'a:x', :y", ["y"]),
    ("SELECT B'01', X'ff', :y", ["y"]),
    ('SELECT 1 AS ":x", 2 AS "a"":x", :y', ["y"]),
    ('SELECT 1 AS U&"a:x", :y', ["y"]),
    ("SELECT :y -- :x '", ["y"]),
    ("SELECT 1 -- '\n, :x -- '\r, :y", ["x", "y"]),
    ("SELECT /* :x ' */ :y", ["y"]),
    ("SELECT /* /* */ :x */ :y", ["y"]),
    ("SELECT /*/* :x */*/ :y /**/", ["y"]),
    ("SELECT 2*/* :x */3, 3-/**/-1, :y", ["y"]),
    ("SELECT $$ :x ' $$, :y", ["y"]),
    ("SELECT $a$ :x $b$ $$ :x $a$, :y", ["y"]),
    ("SELECT $\u00e9$ :x $\u00e9$, :y", ["y"]),
    ("SELECT 1 AS a$b, 2 AS c$b, :y", ["y"]),
    ("SELECT 1 AS abce'x'", []),
    ("SELECT '1'::int, :x::int, CAST(:y AS text)", ["x", "y"]),
    ("SELECT make_interval(days := :x), make_interval(hours=>:y)", ["x", "y"]),
    ("SELECT (ARRAY[1,2,3])[1: :x], :x", ["x", "x"]),
    ("SELECT :x_1, :X1, :_y", ["x_1", "X1", "_y"]),
    ("SELECT 1 WHERE 1=:x AND 2>:y", ["x", "y"]),
    ("SELECT :x; ", ["x"]),
    ("SELECT :x; -- done\n /* ; */", ["x"]),
    ("SELECT ';' || :x", ["x"]),
]


@pytest.mark.parametrize(("sql", "names"), LEXED)
def test_parameters_are_found_where_they_are_and_nowhere_else(sql: str, names: list[str]) -> None:
    statement = Statement.parse(sql)
    assert list(statement.names) == names
    rebuilt = statement.text(lambda name: f":{name}")
    assert rebuilt.replace(" ", "").replace(";", "") == sql.replace(" ", "").replace(";", "")


@pytest.mark.parametrize(("sql", "names"), [entry for entry in LEXED if "abce" not in entry[0]])
async def test_postgresql_reads_the_same_parameters(source: Any, sql: str, names: list[str]) -> None:
    await source.describe(Query(sql, dict.fromkeys(names, "1")))
    result = await read(source, sql, parameters=dict.fromkeys(names, "1"))
    assert result.rows in (0, 1)


@pytest.mark.parametrize(
    ("expression", "value", "cell"),
    [
        (":v + 1", 41, "42"),
        (":v::int8", 2**62, str(2**62)),
        (":v::numeric", Decimal("1.50"), "1.50"),
        (":v::float8", 1e300, "1e+300"),
        ("NOT :v", True, "false"),
        (":v::date + 1", date(2024, 2, 28), "2024-02-29"),
        (":v::timestamptz = '2024-02-29 00:00:00Z'", datetime(2024, 2, 29, tzinfo=UTC), "true"),
        (":v::uuid", UUID(int=1), str(UUID(int=1))),
        (":v::bytea", b"\x00'", "ACc="),
        (":v", "a\\'\"$1\n:v", "a\\'\"$1\n:v"),
        (":v", "", ""),
        (":v::int IS NULL", None, "true"),
        ("2 = ANY (:v::int[])", "{1,2}", "true"),
    ],
)
async def test_a_parameter_has_the_type_that_its_context_requires(
    source: Any, expression: str, value: object, cell: str
) -> None:
    for form in ("csv", "jsonl", "json"):
        result = await read(source, f"SELECT {expression} AS x, 1 AS y", form, parameters={"v": value})
        assert result.rows == 1
        if form == "csv":
            assert result.cells == [[cell, "1"]]


async def test_a_parameter_that_does_not_fit_is_rejected_by_name(source: Any) -> None:
    with pytest.raises(BadValue, match=r"^v: .*invalid input syntax"):
        await read(source, "SELECT 1 LIMIT :v", parameters={"v": "many"})
    with pytest.raises(BadQuery, match="type list"):
        await read(source, "SELECT 1 LIMIT :v", parameters={"v": [1]})


async def test_unknown_parameters_are_rejected(source: Any) -> None:
    with pytest.raises(BadQuery, match="unknown parameter :w; known: :v"):
        await source.describe(Query("SELECT :w", {"v": 1}))
    with pytest.raises(BadQuery, match="as :name"):
        await source.describe(Query("SELECT $1", {"v": 1}))


# -- invalid queries

REFUSED = [
    ("SELECT 1) TO PROGRAM 'touch {file}' --", "syntax error"),
    ("SELECT 1) TO '{file}' --", "syntax error"),
    ("SELECT 1; DROP TABLE t", "multiple commands"),
    ("SELECT 1; DROP TABLE t; --", "multiple commands"),
    ("SELECT 1) AS a, (SELECT 2", "syntax error"),
    ("SELECT 1) AS q; DROP TABLE t; SELECT * FROM (SELECT 1", "syntax error"),
    ("SELECT (1", "syntax error"),
    ("SELECT 1)", "syntax error"),
    ("SELECT 1 /* open", "unterminated"),
    ("SELECT 'open", "unterminated"),
    ("SELECT $$open", "unterminated"),
    ('SELECT 1 AS "open', "unterminated"),
    ("", "syntax error"),
    ("-- nothing", "syntax error"),
    ("SELECT", "no columns"),
    ("SELECT nothing", 'column "nothing" does not exist'),
    ("DROP TABLE t", "syntax error"),
    ("DELETE FROM t RETURNING *", "syntax error"),
    ("WITH gone AS (DELETE FROM t RETURNING *) SELECT * FROM gone", "data-modifying"),
    ("SELECT * INTO u FROM t", "INTO"),
    ("COPY t TO PROGRAM 'touch {file}'", "syntax error"),
    ("DO $$ BEGIN DELETE FROM t; END $$", "syntax error"),
    ("SET default_transaction_read_only = off", "syntax error"),
    ("EXPLAIN SELECT 1", "syntax error"),
    ("SELECT wipe()", "read-only transaction"),
    ("SELECT nextval('s')", "read-only transaction"),
    ("SELECT * FROM t FOR UPDATE", "read-only transaction"),
    ("SELECT lo_create(0)", "read-only transaction"),
    ("SELECT set_config('transaction_read_only', 'off', false), wipe()", "read-write mode"),
    ("SELECT set_config('default_transaction_read_only', 'off', false), wipe()", "read-only transaction"),
    ("SELECT 1 / 0", "division by zero"),
]


@pytest.mark.parametrize("form", ["csv", "json"])
async def test_a_query_that_does_not_only_read_is_rejected_before_the_first_byte(
    source: Any, admin: Any, tmp_path: Path, form: str
) -> None:
    await table(admin, ["a"])
    await admin.execute("CREATE SEQUENCE s")
    await admin.execute("CREATE FUNCTION wipe() RETURNS int LANGUAGE plpgsql AS 'BEGIN DELETE FROM t; RETURN 1; END'")
    for sql, message in REFUSED:
        with pytest.raises(BadQuery, match=message) as rejected:
            await read(source, sql.replace("{file}", str(tmp_path / "made")), form)
        assert "\n" not in str(rejected.value)
        assert await admin.fetchval("SELECT count(*) FROM t") == 1
        assert not list(tmp_path.iterdir())
    assert (await read(source, "SELECT count(*) AS n FROM t", form)).rows == 1, "the connections are as good as before"


@pytest.mark.parametrize(
    "sql", ["SELECT 1 AS x --", "SELECT 1 AS x -- )", "VALUES (1)", "(SELECT 1)", "WITH a AS (SELECT 1) TABLE a"]
)
async def test_queries_that_end_in_a_comment_or_read_without_select_run(source: Any, sql: str) -> None:
    assert (await read(source, sql)).cells == [["1"]]


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_a_query_that_takes_too_long_is_rejected_before_the_first_byte(
    shared: Postgres, admin: Any, form: str
) -> None:
    async with opened(shared, statement_seconds=0.2) as source:
        begun = time.monotonic()
        with pytest.raises(Interrupted, match=r"it exceeded the limit of 0\.2 s"):
            await read(source, "SELECT pg_sleep(30)", form)
        assert time.monotonic() - begun < 5
        await until(none_runs(admin))
        assert (await read(source, "SELECT 1 AS x", form)).rows == 1


# -- endings


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_closing_an_export_stops_its_query(source: Any, admin: Any, form: str) -> None:
    async with source.export(Query(ENDLESS), Selection(), form, formula_guard=True) as (export, _):
        async with aclosing(export.chunks()) as chunks:
            assert await anext(chunks)
        if form != "json":  # a cursor is idle between two batches
            assert await running(admin)() == 1
        begun = time.monotonic()
    assert time.monotonic() - begun < 0.5
    assert await until(none_runs(admin)) < 0.5
    assert (await read(source, "SELECT 1 AS x", form)).rows == 1


async def test_closing_before_the_first_row_stops_the_query(source: Any, admin: Any) -> None:
    task = asyncio.create_task(read(source, "SELECT pg_sleep(20)"))
    await until(running(admin))
    task.cancel()
    begun = time.monotonic()
    await asyncio.wait([task])
    assert task.cancelled()
    assert time.monotonic() - begun < 0.5
    assert await until(none_runs(admin)) < 0.5 + module.CHECK_MILLISECONDS / 1000


async def test_an_error_of_the_consumer_is_raised_unchanged(source: Any, admin: Any) -> None:
    async def consume() -> None:
        async with source.export(Query(ENDLESS), Selection(), "csv", formula_guard=True) as (export, _):
            async for _chunk in export.chunks():
                raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await consume()
    assert await until(none_runs(admin)) < 0.5


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_an_export_that_breaks_in_the_middle_does_not_look_complete(source: Any, form: str) -> None:
    sql = "SELECT 1 / (100000 - i) AS x, i FROM generate_series(1, 200000) AS i"
    async with source.export(Query(sql), Selection(), form, formula_guard=True) as (export, _):
        with pytest.raises(Interrupted, match=r"after \d{3,} rows: division by zero"):
            async for _chunk in export.chunks():
                pass
    assert (await read(source, "SELECT 1 AS x", form)).rows == 1


async def test_a_time_limit_in_the_middle_raises(shared: Postgres) -> None:
    async with (
        opened(shared, statement_seconds=0.3) as source,
        source.export(Query(ENDLESS), Selection(), "csv", formula_guard=True) as (export, _),
    ):
        with pytest.raises(Interrupted, match=r"after \d+ rows: it exceeded the limit of 0\.3 s"):
            async for _chunk in export.chunks():
                pass


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_a_server_that_dies_in_the_middle_raises_and_is_used_again(
    postgres: Postgres, own: Any, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    source = own
    async with source.export(Query(ENDLESS), Selection(), form, formula_guard=True) as (export, _):
        chunks = export.chunks()
        assert await anext(chunks)
        postgres.kill()
        with pytest.raises(Interrupted, match="does not respond"):
            async for _chunk in chunks:
                pass
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with pytest.raises(Unavailable):
                await source.describe(Query("SELECT 1"))
            with pytest.raises(Unavailable):
                await read(source, "SELECT 1", form)
        postgres.start()
        assert (await read(source, "SELECT 1 AS x", form)).rows == 1
        assert [column.name for column in await source.describe(Query("SELECT 1 AS x"))] == ["x"]
    assert [record.message.partition(" (")[0] for record in caplog.records if record.name == module.__name__] == [
        "the PostgreSQL server of an export is unreachable",
        "the PostgreSQL server of an export is reachable again",
    ]


async def test_a_restart_between_two_exports_is_not_noticed(postgres: Postgres, own: Any) -> None:
    source = own
    assert (await read(source, "SELECT 1 AS x")).rows == 1
    postgres.stop()
    postgres.start()
    # Without a turn of the event loop the pool has not noticed that its connection is closed.
    assert (await read(source, "SELECT 1 AS x")).rows == 1


async def test_a_server_that_does_not_respond_times_out(postgres: Postgres) -> None:
    assert postgres.process is not None
    async with opened(postgres, statement_seconds=0.3, connect_seconds=0.3) as source:
        async with source.export(Query(ENDLESS), Selection(), "csv", formula_guard=True) as (export, _):
            chunks = export.chunks()
            assert await anext(chunks)
            admin = await asyncpg.connect(postgres.url)
            backend = await admin.fetchval("SELECT pid FROM pg_stat_activity WHERE application_name = 'streamlab'")
            await admin.close()
            os.kill(backend, signal.SIGSTOP)
            os.kill(postgres.process.pid, signal.SIGSTOP)
            try:
                with pytest.raises(Interrupted, match="does not respond"):
                    async for _chunk in chunks:
                        pass
                with pytest.raises(Unavailable):
                    await source.describe(Query("SELECT 1"))
            finally:
                os.kill(backend, signal.SIGCONT)
                os.kill(postgres.process.pid, signal.SIGCONT)
        assert (await read(source, "SELECT 1 AS x")).rows == 1


async def test_no_more_exports_run_than_there_are_connections(shared: Postgres) -> None:
    async with opened(shared, connections=1, connect_seconds=0.2) as source:
        async with source.export(Query(ENDLESS), Selection(), "csv", formula_guard=True):
            with pytest.raises(Unavailable, match="All connections"):
                await read(source, "SELECT 1 AS x")
        assert (await read(source, "SELECT 1 AS x")).rows == 1


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_a_consumer_that_does_not_read_uses_bounded_memory(source: Any, admin: Any, form: str) -> None:
    async def is_stalled() -> bool:
        """Return whether PostgreSQL waits, in fifty samples: it could have sent many megabytes in that time."""
        wait = "SELECT wait_event FROM pg_stat_activity WHERE application_name = 'streamlab'"
        waits = "ClientRead" if form == "json" else "ClientWrite"
        return all([await admin.fetchval(wait) == waits for _ in range(50)])

    tracemalloc.start()
    try:
        async with source.export(Query(ENDLESS), Selection(), form, formula_guard=True) as (export, _):
            chunks = export.chunks()
            size = len(await anext(chunks))
            await until(is_stalled)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
            for _ in range(20):
                size = max(size, len(await anext(chunks)))
            assert size < 2 * module.PENDING_BYTES + (1 << 20)
    finally:
        tracemalloc.stop()


# -- the rest


async def test_the_version_changes_with_the_content(source: Any, admin: Any) -> None:
    await table(admin, ["a"])
    first, same = [await read(source, "SELECT * FROM t") for _ in range(2)]
    await admin.execute("UPDATE t SET text = 'b'")
    assert first.version == same.version
    assert (await read(source, "SELECT * FROM t")).version != first.version


async def test_an_export_is_one_snapshot(source: Any, admin: Any) -> None:
    await admin.execute("CREATE TABLE t AS SELECT i, repeat('x', 100) AS pad FROM generate_series(1, 50000) AS i")
    for form in ("csv", "json"):
        async with source.export(Query("SELECT i, pad FROM t"), Selection(), form, formula_guard=False) as (export, _):
            await admin.execute("INSERT INTO t SELECT * FROM t LIMIT 1000")
            before = await admin.fetchval("SELECT count(*) FROM t") - 1000
            async for _chunk in export.chunks():
                pass
            assert export.rows == before


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
async def test_a_query_runs_in_a_session_that_only_reads_and_has_limits(source: Any, form: str) -> None:
    expected = {
        "transaction_isolation": "repeatable read",
        "transaction_read_only": "on",
        "default_transaction_read_only": "on",
        "statement_timeout": "30s",
        "client_connection_check_interval": "500ms",
        "application_name": "streamlab",
        "search_path": '"$user", public',
    }
    sql = "SELECT 1" + "".join(f" WHERE current_setting('{name}') = '{value}'" for name, value in expected.items())
    assert (await read(source, sql.replace(" WHERE", " AND").replace("AND", "WHERE", 1), form)).rows == 1


async def test_no_part_of_the_url_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    source = PostgresSource("postgresql://user:secret@127.0.0.1:1/base", statement_seconds=1)
    with caplog.at_level(logging.DEBUG, logger=module.__name__):
        async with source.opened():
            with pytest.raises(Unavailable) as rejected:
                await source.describe(Query("SELECT 1"))
    for word in ("secret", "user", "127.0.0.1", "base:"):
        assert word not in str(rejected.value)
        assert word not in caplog.text


async def test_a_server_that_does_not_know_the_user_is_unavailable(shared: Postgres) -> None:
    source = PostgresSource(shared.url.replace("postgres@", "nobody@"), statement_seconds=1)
    async with source.opened():
        with pytest.raises(Unavailable, match=r"^The database does not respond\.$"):
            await source.describe(Query("SELECT 1"))


def test_an_invalid_url_is_rejected_at_once() -> None:
    with pytest.raises(ValueError, match="postgresql://"):
        PostgresSource("mysql://x", statement_seconds=1)


def test_without_asyncpg_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(module.MissingLibrary, match=r"pip install 'streamlab\[postgres\]'"):
        PostgresSource("postgresql://x", statement_seconds=1)


# -- the scenario on top of it

SERVED = """
    [scenarios.ticker]
    enabled = false
    [scenarios.logs]
    enabled = false
    [scenarios.export]
    sample = false
    [scenarios.export.databases.shop]
    url = "{url}"
    [scenarios.export.queries.numbers]
    database = "shop"
    sql = "SELECT i, 'text, ' || i AS t FROM (SELECT generate_series(1, 10000000) AS i) AS s WHERE i % :every = 0"
    parameters.every = {{ type = "integer", default = 1, minimum = 1 }}
    [scenarios.export.queries.evil]
    database = "shop"
    sql = "DELETE FROM pg_class"
"""


def test_curl_sees_a_killed_server_as_exit_18_and_the_next_request_as_503_until_it_is_back(
    start: Callable[..., Running], postgres: Postgres
) -> None:
    server = start(SERVED.format(url=postgres.url))
    for options in ([], ["--compressed"]):
        command = ["curl", "-sS", "-N", *options, f"{server.url}/export/numbers/csv"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as curl:
            assert curl.stdout is not None
            assert curl.stdout.read(1000).startswith(b'i,t\r\n1,"text, 1"\r\n')
            postgres.kill()
            curl.communicate(timeout=20)
        assert curl.returncode == 18
        status, headers, body = server.get("/export/numbers/csv?limit=1")
        assert (status, headers["retry-after"]) == (503, "5")
        assert str(postgres.folder) not in body.decode()
        postgres.start()
        assert server.get("/export/numbers/csv?limit=1")[2] == b'i,t\r\n1,"text, 1"\r\n'
    server.wait_for_log("the export numbers was interrupted")


def test_formats_parameters_and_errors_are_those_of_sqlite(start: Callable[..., Running], postgres: Postgres) -> None:
    server = start(SERVED.format(url=postgres.url))
    assert server.get("/export/numbers/jsonl?every=5&limit=2")[2] == (
        b'{"i":5,"t":"text, 5"}\n{"i":10,"t":"text, 10"}\n'
    )
    assert json.loads(server.get("/export/numbers/json?where.i=7&columns=t")[2]) == [{"t": "text, 7"}]
    rows = server.get("/export/numbers/jsonl?limit=1&end=true")[2].split(b"\n")
    assert json.loads(rows[1])["@end"]["rows"] == 1
    assert server.get("/export/numbers/csv?every=0")[0] == 422
    for query, name in (("where.i=x", "where.i"), ("every=2147483648", "every"), ("where.t=%00", "where.t")):
        status, _, body = server.get(f"/export/numbers/csv?{query}")
        assert (status, [error["name"] for error in json.loads(body)["errors"]]) == (422, [name])
    assert server.get("/export/numbers/csv?columns=nothing")[0] == 422
    assert server.get("/export/evil/csv")[0] == 500
    listed = {entry["name"]: entry for entry in json.loads(server.get("/export")[2])["exports"]}
    assert listed["numbers"]["columns"] == [{"name": "i", "type": "integer"}, {"name": "t", "type": "text"}]


def test_without_its_library_only_its_own_exports_are_rejected(start: Callable[..., Running]) -> None:
    hide = "import sys; sys.modules['asyncpg'] = None"
    server = start(SERVED.format(url="postgresql://nobody@127.0.0.1:1/x"), hide=hide)
    status, _, body = server.get("/export/numbers/csv")
    assert (status, "pip install 'streamlab[postgres]'" in body.decode()) == (501, True)
    listed = {entry["name"]: entry for entry in json.loads(server.get("/export")[2])["exports"]}
    assert "streamlab[postgres]" in listed["numbers"]["unavailable"]


def test_a_client_that_disconnects_stops_the_copy(start: Callable[..., Running], postgres: Postgres) -> None:
    server = start(SERVED.format(url=postgres.url))
    with server.send("GET /export/numbers/csv HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"\r\n\r\n")
    server.wait_for_log('outcome="client left"')
    assert server.get("/export/numbers/csv?limit=1")[0] == 200
