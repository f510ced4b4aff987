"""The export scenario on the process that `make run` starts: real databases, read back and compared row by row."""

import csv
import hashlib
import io
import json
import re
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest

from streamlab.config import Config
from streamlab.server.app import create_app
from streamlab.server.site import REGISTRY
from tests.support.connections import read_all, read_until
from tests.support.servers import Running, plugin_module, run_streamlab, starting_in

LOADED_PLUGINS = ("export",)

ROWS = 20_000

CONFIG = """
    [scenarios.ticker]
    enabled = false
    [scenarios.logs]
    enabled = false
    [scenarios.export]
    sample_rows = 20000
"""

SLOW = "WITH RECURSIVE n (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
"""Endless rows."""

STUCK = "WITH RECURSIVE n (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0"
"""Endless without a row."""

FAILS = "SELECT i, abs(CASE WHEN i = 5000 THEN -9223372036854775807 - 1 ELSE i END) AS a FROM ({SLOW})".replace(
    "{SLOW}", SLOW
)
"""Fails in its 5000th row: integer overflow."""


def configured(**queries: str) -> str:
    tables = [f"[scenarios.export.queries.{name}]\nsql = '''{sql}'''\n" for name, sql in queries.items()]
    return CONFIG + "".join("    " + line + "\n" for table in tables for line in table.splitlines())


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.db"
    plugin_module("export", "sample").make(path, ROWS)
    return path


@pytest.fixture
def serve(start: Callable[..., Running], sample: Path, tmp_path: Path) -> Callable[..., Running]:
    (tmp_path / "var").mkdir()
    shutil.copy(sample, tmp_path / "var" / "sample.db")

    def serving(config: str = CONFIG, **options: Any) -> Running:
        return start(config, **options)

    return serving


@pytest.fixture(scope="module")
def shared(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield a server of the sample, for tests that do not change it."""
    base = tmp_path_factory.mktemp("shared")
    (base / "var").mkdir()
    shutil.copy(sample, base / "var" / "sample.db")
    with starting_in(base) as start:
        yield start(CONFIG)


def rows_of(path: Path, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(sql, values).fetchall()


USERS = "SELECT id, name, email, country, balance, created, active, note FROM users ORDER BY id"


def guarded(cell: Any) -> str:
    text = "" if cell is None else str(cell)
    return "'" + text if isinstance(cell, str) and re.match("[=+\\-@\t\r]", text) else text


# -- the three routes


def test_the_three_routes_stream_the_content_of_the_database(shared: Running, sample: Path) -> None:
    status, headers, body = shared.get("/export/users/csv")
    assert (status, headers["content-type"]) == (200, "text/csv; charset=utf-8")
    assert headers["content-disposition"] == 'attachment; filename="users.csv"'
    assert headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers
    header, *rows = csv.reader(io.StringIO(body.decode(), newline=""))
    assert header == ["id", "name", "email", "country", "balance", "created", "active", "note"]
    assert rows == [[guarded(cell) for cell in row] for row in rows_of(sample, USERS)]
    assert body.count(b"\r\n") >= ROWS + 1
    assert body.endswith(b"\r\n")

    status, headers, body = shared.get("/export/data/jsonl")
    assert (status, headers["content-type"]) == (200, "application/jsonl")
    names = ["id", "name", "country", "balance", "created"]
    lines = [json.loads(line) for line in body.decode().split("\n")[:-1]]
    data = rows_of(sample, f"SELECT {', '.join(names)} FROM users ORDER BY id")
    assert lines == [dict(zip(names, row, strict=True)) for row in data]

    status, headers, body = shared.get("/stream/database-results")
    assert (status, headers["content-type"]) == (200, "application/jsonl")
    assert body.count(b"\n") == rows_of(sample, "SELECT count(*) FROM users WHERE active")[0][0]


def test_the_sample_is_created_once_at_its_first_use(start: Callable[..., Running], tmp_path: Path) -> None:
    server = start(CONFIG)
    assert not (tmp_path / "var/sample.db").exists()
    with ThreadPoolExecutor(4) as threads:
        bodies = list(threads.map(lambda _: server.get("/export/users/csv")[2], range(4)))
    assert len(set(bodies)) == 1
    assert server.complete_log().count("created a sample database of 20000 users") == 1
    assert not list((tmp_path / "var").glob(".sample-*"))


def test_the_sample_has_every_kind_of_cell_that_breaks_careless_exports(sample: Path) -> None:
    text = " ".join(str(cell) for row in rows_of(sample, USERS) for cell in row)
    for kind in ('"', ",", "\n", "\r\n", "=1+2", "@home", "+49", "小明", "👋"):
        assert kind in text
    assert rows_of(sample, "SELECT count(*) FROM users WHERE note IS NULL")[0][0] > 0
    assert rows_of(sample, "SELECT count(*) FROM users WHERE note = ''")[0][0] > 0


# -- formats


def test_every_format_has_every_row(shared: Running, sample: Path) -> None:
    ipc = pytest.importorskip("pyarrow.ipc", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    names = ["id", "name", "email", "country", "balance", "created", "active", "note"]
    expected = [dict(zip(names, row, strict=True)) for row in rows_of(sample, USERS)]
    assert json.loads(shared.get("/export/users/json")[2]) == expected
    arrow = ipc.open_stream(shared.get("/export/users/arrow")[2]).read_all().to_pylist()
    assert arrow == expected
    assert parquet.read_table(io.BytesIO(shared.get("/export/users/parquet")[2])).to_pylist() == expected


def test_pandas_reads_the_csv_back(serve: Callable[..., Running], sample: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    server = serve(CONFIG + "    formula_guard = false\n")
    frame = pandas.read_csv(
        io.BytesIO(server.get("/export/users/csv")[2]), keep_default_na=False, na_values={"balance": [""]}
    )
    with closing(sqlite3.connect(sample)) as database:
        wanted = pandas.read_sql_query(USERS, database)
    wanted["note"] = wanted["note"].fillna("")
    pandas.testing.assert_frame_equal(frame, wanted, check_dtype=False)


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", "text/csv; charset=utf-8"),
        ("*/*", "text/csv; charset=utf-8"),
        ("application/jsonl", "application/jsonl"),
        ("text/csv;q=0.5, application/json", "application/json"),
        ("text/html, application/*;q=0.2", "application/jsonl"),
    ],
)
def test_accept_chooses_the_format(shared: Running, accept: str, media: str) -> None:
    status, headers, _ = shared.get("/export/users?limit=1", {"Accept": accept} if accept else {})
    assert (status, headers["content-type"]) == (200, media)
    assert "Accept" in headers["vary"]


def test_a_format_that_is_not_installed_is_501_and_not_offered(serve: Callable[..., Running]) -> None:
    server = serve(hide="import sys; sys.modules['pyarrow'] = None")
    for form in ("parquet", "arrow"):
        status, headers, body = server.get(f"/export/users/{form}?limit=5")
        assert (status, "retry-after" in headers) == (501, False)
        assert "pip install 'streamlab[arrow]'" in json.loads(body)["detail"]
    index = json.loads(server.get("/export")[2])
    assert set(index["unavailable_formats"]) == {"arrow", "parquet"}
    assert {form for entry in index["exports"] for form in entry["urls"]} == {"csv", "jsonl", "json"}
    parquet = "application/vnd.apache.parquet"
    assert server.get("/export/users", {"Accept": parquet})[0] == 406
    assert server.get("/export/users?limit=1", {"Accept": f"{parquet}, text/csv;q=0.1"})[1]["content-type"] == (
        "text/csv; charset=utf-8"
    )
    responses = json.loads(server.get("/openapi.json")[2])["paths"]["/export/{name}/{format}"]["get"]["responses"]
    assert "not installed" in responses["501"]["description"]


def test_accept_without_an_available_format_is_406(shared: Running) -> None:
    assert shared.get("/export/users?limit=1", {"Accept": "image/png"})[0] == 406


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_compressed_rows_arrive_as_they_are_generated(serve: Callable[..., Running], coding: str) -> None:
    import zlib

    if coding == "zstd":
        zstd = pytest.importorskip("backports.zstd", reason="no zstd: Python 3.14 or backports.zstd has it")
        decoder: Any = zstd.ZstdDecompressor()
    else:
        decoder = zlib.decompressobj(wbits=31)
    server = serve(configured(endless=SLOW))
    request = f"GET /export/endless/jsonl HTTP/1.0\nHost: localhost\nAccept-Encoding: {coding}"
    with server.send(request) as connection:
        body = read_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")[2]
        text = decoder.decompress(body)
        while b'{"i":9}\n' not in text:
            text += decoder.decompress(connection.recv(4096))
    assert text.startswith(b'{"i":1}\n{"i":2}\n')


# -- selections


def test_columns_values_and_limit_choose_rows(shared: Running, sample: Path) -> None:
    expected = rows_of(sample, "SELECT name, id FROM users WHERE country = 'DE' AND active = 0 ORDER BY id LIMIT 5")
    for query in (
        "columns=name,id&where.country=DE&where.active=0&limit=5",
        "columns=name&columns=id&where%5Bcountry%5D=DE&where.active=0&limit=5",
    ):
        lines = shared.get(f"/export/users/jsonl?{query}")[2].decode().split("\n")[:-1]
        assert [tuple(json.loads(line).values()) for line in lines] == expected
    assert shared.get("/export/users/csv?limit=0")[2].count(b"\r\n") == 1
    assert shared.get("/export/users/jsonl?limit=0")[2] == b""


def test_parameters_of_a_query_are_typed_bounded_and_bound(serve: Callable[..., Running], sample: Path) -> None:
    table = """
    [scenarios.export.queries.rich]
    sql = "SELECT id, balance FROM users WHERE balance >= :least AND country = :country ORDER BY id"
    parameters.least = { type = "real", minimum = 0, maximum = 1000000 }
    parameters.country = { default = "DE", choices = ["DE", "FR"] }
    """
    server = serve(CONFIG + table)
    sql = "SELECT id, balance FROM users WHERE balance >= ? AND country = ? ORDER BY id"
    for query, values in (("least=14000", (14000.0, "DE")), ("least=1e4&country=FR", (10000.0, "FR"))):
        lines = server.get(f"/export/rich/jsonl?{query}")[2].decode().split("\n")[:-1]
        assert [tuple(json.loads(line).values()) for line in lines] == rows_of(sample, sql, values)
    for query, name, detail in (
        ("", "least", "is required"),
        ("least=-1", "least", "must be at least 0 and at most 1e+06"),
        ("least=x", "least", "must be a number"),
        ("least=nan", "least", "must be a number"),
        ("least=%D9%A1", "least", "must be a number"),
        ("least=1_0", "least", "must be a number"),
        ("least=inf", "least", "must be a finite number"),
        ("least=1&least=2", "least", "given 2 times, expected once"),
        ("least=1&country=IT", "country", "must be one of DE, FR"),
        (
            "least=1&city=Rome",
            "city",
            "unknown parameter; known: country, least, columns, limit, strict, end, where.COLUMN",
        ),
    ):
        status, _, body = server.get(f"/export/rich/jsonl?{query}")
        assert (status, json.loads(body)["errors"]) == (422, [{"in": "query", "name": name, "detail": detail}])


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/export/nothing/csv", 404, "name: unknown: nothing; known: data, results, users."),
        ("/export/users/xml", 422, "'csv', 'jsonl', 'json', 'arrow' or 'parquet'"),
        ("/export/users/csv?columns=id,nome", 422, "no column 'nome'; known: id, name, email"),
        ("/export/users/csv?where.nome=x", 422, "no column 'nome'"),
        ("/export/users/csv?where.id=x", 422, "must be an integer"),
        ("/export/users/csv?where.balance=x", 422, "must be a number"),
        ("/export/users/csv?where.balance=%D9%A1", 422, "must be a number"),
        ("/export/users/csv?where.id=%D9%A1", 422, "must be an integer"),
        ("/export/users/csv?offset=5", 422, "unknown parameter"),
        ("/export/users/csv?limit=-1", 422, "greater than or equal to 0"),
        ("/export/users/csv?where.id=1&where.id=2", 422, "given 2 times"),
        ("/export/users/csv?end=true", 422, "only jsonl has an end record, not csv"),
    ],
)
def test_invalid_requests_are_rejected_with_the_reason(shared: Running, path: str, status: int, message: str) -> None:
    found, headers, body = shared.get(path)
    assert (found, headers["content-type"]) == (status, "application/problem+json; charset=utf-8")
    assert message in body.decode()


HOSTILE = [
    "'; DROP TABLE users; --",
    '"; DROP TABLE users; --',
    "1 OR 1=1",
    "x' OR 'a'='a",
    "1); ATTACH DATABASE 'evil.db' AS evil; --",
    "\x00",
    "%' UNION SELECT sql FROM sqlite_master --",
    ":least",
    "?",
]


def test_hostile_strings_stay_data(serve: Callable[..., Running], tmp_path: Path) -> None:
    from urllib.parse import quote

    table = """
    [scenarios.export.queries.named]
    sql = "SELECT id, name FROM users WHERE name = :name"
    parameters.name = { default = "" }
    """
    server = serve(CONFIG + table)
    for text in HOSTILE:
        value = quote(text)
        assert server.get(f"/export/users/jsonl?where.name={value}")[2] == b""
        assert server.get(f"/export/named/jsonl?name={value}")[2] == b""
        assert server.get(f"/export/users/jsonl?columns={value}")[0] == 422
        assert server.get(f"/export/users/jsonl?where.{value}=1")[0] == 422
        assert server.get(f"/export/users/jsonl?limit={value}")[0] == 422
        assert server.get(f"/export/{value}/jsonl")[0] in (404, 422)
    assert server.get("/export/users/jsonl")[2].count(b"\n") == ROWS
    assert not (tmp_path / "evil.db").exists()


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM users",
        "INSERT INTO users (id) VALUES (0)",
        "UPDATE users SET name = ''",
        "DROP TABLE users",
        "ATTACH DATABASE 'evil.db' AS evil",
        "PRAGMA writable_schema = 1",
        "VACUUM INTO 'evil.db'",
        "SELECT 1; DROP TABLE users",
        "SELECT 1) ; DROP TABLE users; --",
        "SELECT 1) SELECT * FROM q; DELETE FROM users --",
        "SELECT load_extension('evil')",
        "SELECT * FROM pragma_table_info('users')",
        "SELEC 1",
        "SELECT nothing FROM users",
        "SELECT 1 --",
    ],
)
def test_sql_that_is_more_than_a_select_is_rejected_by_the_connection_itself(
    serve: Callable[..., Running], tmp_path: Path, sample: Path, sql: str
) -> None:
    server = serve(configured(evil=sql))
    before = (tmp_path / "var/sample.db").read_bytes()
    status, _, body = server.get("/export/evil/jsonl")
    if sql == "SELECT 1 --":
        assert (status, body) == (200, b'{"1 --":1}\n')  # the name that SQLite gives the column
    else:
        assert (status, json.loads(body)["detail"]) == (
            500,
            "The database rejects the SQL of this export; see the server's log.",
        )
        server.wait_for_log("the SQL of the export evil is invalid")
    assert (tmp_path / "var/sample.db").read_bytes() == before
    assert not (tmp_path / "evil.db").exists()


# -- correctness


def test_an_end_record_has_the_rows_and_a_digest(shared: Running) -> None:
    plain = shared.get("/export/users/jsonl")[2]
    body = shared.get("/export/users/jsonl?end=true")[2]
    assert body.startswith(plain)
    end = json.loads(body[len(plain) :])
    assert end == {"@end": {"rows": ROWS, "sha256": hashlib.sha256(plain).hexdigest(), "altered": 0}}


@pytest.mark.parametrize(
    ("options", "status"),
    [(["--http1.1"], 18), (["--http1.1", "--compressed"], 18), (["--http1.0"], 56)],
)
def test_a_query_that_fails_in_the_middle_never_looks_complete(
    serve: Callable[..., Running], options: list[str], status: int
) -> None:
    server = serve(configured(fails=FAILS))
    for form in ("csv", "jsonl", "json"):
        done = subprocess.run(
            ["curl", "-sS", *options, f"{server.url}/export/fails/{form}"], capture_output=True, check=False
        )
        assert done.returncode == status, done.stderr
    server.wait_for_log("the export fails was interrupted: the query failed after")


def test_an_unavailable_database_is_503_until_it_is_available(
    serve: Callable[..., Running], sample: Path, tmp_path: Path
) -> None:
    server = serve(
        CONFIG
        + """
    [scenarios.export.databases.shop]
    url = "sqlite:///shop.db"
    [scenarios.export.queries.shop]
    database = "shop"
    sql = "SELECT id FROM users LIMIT 3"
    """
    )
    status, headers, body = server.get("/export/shop/csv")
    assert (status, headers["retry-after"]) == (503, "5")
    assert str(tmp_path) not in body.decode()
    (tmp_path / "shop.db").write_text("no database " * 100)
    assert server.get("/export/shop/csv")[0] == 503
    shutil.copy(sample, tmp_path / "shop.db")
    assert server.get("/export/shop/csv")[2] == b"id\r\n1\r\n2\r\n3\r\n"


def test_one_export_is_one_snapshot(serve: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "var/sample.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
    server = serve()
    with server.send("GET /export/users/jsonl HTTP/1.0\nHost: localhost", receive_buffer=4096) as connection:
        begun = read_until(connection, b"}\n")
        with closing(sqlite3.connect(path)) as database:
            database.execute("DELETE FROM users WHERE id > 100")
            database.commit()
        body = begun + read_all(connection)
    assert body.partition(b"\r\n\r\n")[2].count(b"\n") == ROWS
    assert server.get("/export/users/jsonl")[2].count(b"\n") == 100


def test_text_that_is_not_utf_8_is_sent_with_replacement_characters(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "var/sample.db")) as database:
        database.execute("UPDATE users SET name = CAST(x'41FF42' AS TEXT) WHERE id = 5000")
        database.commit()
    server = serve()
    lines = server.get("/export/users/jsonl")[2].decode().split("\n")[:-1]
    assert [json.loads(line)["id"] for line in lines] == list(range(1, ROWS + 1))
    assert json.loads(lines[4999])["name"] == "A\ufffdB"
    end = json.loads(server.get("/export/users/jsonl?end=true")[2].splitlines()[-1])["@end"]
    assert (end["rows"], end["altered"]) == (ROWS, 1)
    assert server.get("/export/users/csv")[2].decode().count("A\ufffdB") == 1
    server.wait_for_log("the export users altered 1 values that its format cannot hold")
    status, _, body = server.get("/export/users/csv?strict=true&where.id=5000")
    assert (status, json.loads(body)["detail"]) == (
        422,
        "This format cannot hold the result: a text of column 'name' after row 0 is not valid UTF-8.",
    )
    curl = ["curl", "-sS", "-o", str(tmp_path / "out"), f"{server.url}/export/users/csv?strict=true"]
    assert subprocess.run(curl, capture_output=True, check=False).returncode == 18


def test_numbers_that_json_cannot_represent_are_counted_or_rejected(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    server = serve(
        configured(numbers="SELECT 1.5 AS a, NULL AS b UNION ALL SELECT 9e999, NULL UNION ALL SELECT -9e999, 'x'")
    )
    rows, end = server.get("/export/numbers/jsonl?end=true")[2].split(b'{"@end":')
    assert rows == b'{"a":1.5,"b":null}\n{"a":null,"b":null}\n{"a":null,"b":"x"}\n'
    assert json.loads(end[:-2])["altered"] == 2
    assert server.get("/export/numbers/csv?strict=true")[2] == b"a,b\r\n1.5,\r\nInfinity,\r\n-Infinity,x\r\n"
    for form in ("jsonl", "json"):
        status, _, body = server.get(f"/export/numbers/{form}?strict=true")
        assert (status, "row 2 of column 'a' holds inf, which JSON cannot represent" in body.decode()) == (422, True)


def test_a_cell_that_is_too_large_fails_the_export_and_needs_no_memory(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    late = "SELECT i, CASE WHEN i = 3000 THEN zeroblob(100000000) WHEN i > 2800 THEN zeroblob(200000) END AS b "
    late += f"FROM ({SLOW}) LIMIT 4000"
    server = serve(
        configured(early="SELECT 1 AS a, zeroblob(900000000) AS b", late=late, fits="SELECT zeroblob(1000000) AS b"),
        fresh=True,
    )
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("reads peak memory from /proc, which this system does not have")
    assert len(server.get("/export/fits/csv")[2]) > 1_333_333
    before = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
    code, _, body = server.get("/export/early/csv")
    assert (code, "max_cell_mb" in json.loads(body)["detail"]) == (422, True)
    curl = ["curl", "-sS", "-o", str(tmp_path / "out"), f"{server.url}/export/late/csv"]
    assert subprocess.run(curl, capture_output=True, check=False).returncode == 18
    assert (tmp_path / "out").stat().st_size > 50_000_000, "what fits came before"
    after = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
    assert after - before < 40 * 1024
    # The module sqlite3 is a row ahead of those that it returns.
    server.wait_for_log("the export late is rejected: a cell after row 2998 is larger than 16,000,000 bytes")


# -- limits


def test_a_client_that_disconnects_stops_its_query(serve: Callable[..., Running]) -> None:
    server = serve(configured(stuck=STUCK, endless=SLOW))
    before = cpu_seconds(server)
    with server.send("GET /export/stuck/csv HTTP/1.1\nHost: localhost"):
        busy = wait_for(lambda: cpu_seconds(server) > before + 0.3)
    assert busy
    assert wait_for(lambda: is_idle(server)), "the query runs on"
    with server.send("GET /export/endless/csv HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"\r\n\r\n")
    server.wait_for_log('outcome="client left"')
    assert wait_for(lambda: is_idle(server)), "the query runs on"


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


def cpu_seconds(server: Running) -> float:
    """Return the user and system time of the server so far."""
    return time.clock_gettime(~server.process.pid << 3 | 2)  # its number: clock_getcpuclockid(3)


def is_idle(server: Running) -> bool:
    """Return whether the server is idle for a while; a running query uses more even on a busy machine."""
    begun, before = time.monotonic(), cpu_seconds(server)
    threading.Event().wait(0.2)
    return (cpu_seconds(server) - before) / (time.monotonic() - begun) < 0.1


def test_an_export_that_takes_too_long_is_rejected_or_aborted(serve: Callable[..., Running]) -> None:
    server = serve(configured(stuck=STUCK, endless=SLOW).replace("sample_rows", "max_seconds = 0.5\n    sample_rows"))
    status, headers, _ = server.get("/export/stuck/csv")
    assert (status, headers["retry-after"]) == (503, "5")
    received = read_all(server.send("GET /export/endless/csv HTTP/1.1\nHost: localhost"))
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert not received.endswith(b"0\r\n\r\n")
    server.wait_for_log("the export endless was interrupted: it took longer than 0.5 s (max_seconds)")


def test_exports_beyond_the_limit_are_503(serve: Callable[..., Running]) -> None:
    server = serve(configured(endless=SLOW).replace("sample_rows", "max_exports = 2\n    sample_rows"))
    with ExitStack() as held:
        for _ in range(2):
            connection = held.enter_context(server.send("GET /export/endless/csv HTTP/1.1\nHost: localhost"))
            read_until(connection, b"\r\n\r\n")
        status, headers, _ = server.get("/export/users/csv")
        assert (status, headers["retry-after"]) == (503, "5")
    assert wait_for(lambda: server.get("/export/users/csv?limit=1")[0] == 200)


def test_a_stalled_client_is_disconnected_and_its_transaction_ended(serve: Callable[..., Running]) -> None:
    server = serve(configured(endless=SLOW) + "    [server]\n    stall_seconds = 1\n")
    with server.send("GET /export/endless/csv HTTP/1.1\nHost: localhost", receive_buffer=4096) as connection:
        assert connection.recv(5) == b"HTTP/"
        server.wait_for_log('outcome="client left"')
        assert wait_for(lambda: is_idle(server))


def test_a_hundred_clients_at_once_are_served_fairly(serve: Callable[..., Running]) -> None:
    server = serve()

    def export(_: int) -> tuple[float, float, bytes]:
        begun = time.monotonic()
        with server.send("GET /export/data/jsonl HTTP/1.0\nHost: localhost", timeout=50) as connection:
            first = read_until(connection, b"\n{")
            started = time.monotonic() - begun
            body = first + read_all(connection)
        return started, time.monotonic() - begun, hashlib.sha256(body.partition(b"\r\n\r\n")[2]).digest()

    with ThreadPoolExecutor(100) as threads:
        found = list(threads.map(export, range(100)))
    assert len({digest for _, _, digest in found}) == 1
    first_bytes = sorted(started for started, _, _ in found)
    ends = sorted(ended for _, ended, _ in found)
    assert first_bytes[-1] < ends[0], "one client had everything before another had its first byte"


def test_memory_does_not_grow_with_the_rows(serve: Callable[..., Running]) -> None:
    server = serve(configured(many=SLOW), fresh=True)
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("reads peak memory from /proc, which this system does not have")
    server.get("/export/many/jsonl?limit=20000")
    before = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
    read_all(server.send("GET /export/many/jsonl?limit=1000000 HTTP/1.1\nHost: localhost\nConnection: close"))
    after = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
    assert after - before < 8 * 1024


# -- events


def test_results_come_as_events_that_resume_by_row(serve: Callable[..., Running], sample: Path) -> None:
    server = serve()
    path = "/stream/database-results"
    events = parsed(server.get(path, {"Accept": "text/event-stream"})[2])
    rows = [row for event in events if event["event"] == "rows" for row in event["data"]["rows"]]
    names = ["id", "name", "country", "balance"]
    sql = f"SELECT {', '.join(names)} FROM users WHERE active ORDER BY id"
    assert rows == [dict(zip(names, row, strict=True)) for row in rows_of(sample, sql)]
    assert [event["event"] for event in events[-1:]] == ["end"]
    assert events[-1]["data"] == {"count": len(rows), "altered": 0}
    assert len({event["id"] for event in events}) == len(events)
    middle = events[3]
    headers = {"Accept": "text/event-stream", "Last-Event-ID": middle["id"]}
    assert parsed(server.get(path, headers)[2]) == events[4:]
    status, _, body = server.get(path, {"Accept": "text/event-stream", "Last-Event-ID": events[-1]["id"]})
    assert (status, body) == (204, b"")


def parsed(stream: bytes) -> list[dict[str, Any]]:
    events = []
    for block in stream.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append({**fields, "data": json.loads(fields["data"])})
    return events


def test_an_id_of_data_that_changed_is_a_gap_and_then_everything(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve()
    query = "/stream/database-results?limit=40"
    headers = {"Accept": "text/event-stream"}
    first = parsed(server.get(query, headers)[2])[0]
    with closing(sqlite3.connect(tmp_path / "var/sample.db")) as database:
        database.execute("DELETE FROM users WHERE id < 5")
        database.commit()
    for identity in (first["id"], "rubbish", "9-9", "-1", "é"):
        events = parsed(server.get(query, {**headers, "Last-Event-ID": identity.encode().decode("latin-1")})[2])
        assert events[0]["event"] == "gap"
        assert sum(len(event["data"].get("rows", ())) for event in events) == 40
        assert events[1]["data"]["rows"][0]["id"] == 5


def test_the_index_lists_every_export_with_columns_and_types(serve: Callable[..., Running]) -> None:
    server = serve(configured(twice="SELECT id, id, name AS id, 1 + 1 FROM users"))
    listed = {entry["name"]: entry for entry in json.loads(server.get("/export")[2])["exports"]}
    assert sorted(listed) == ["data", "results", "twice", "users"]
    assert listed["users"]["columns"][:3] == [
        {"name": "id", "type": "integer"},
        {"name": "name", "type": "text"},
        {"name": "email", "type": "text"},
    ]
    assert [column["name"] for column in listed["twice"]["columns"]] == ["id", "id_2", "id_3", "1 + 1"]
    assert listed["users"]["urls"]["csv"] == "/export/users/csv"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[scenarios.export.queries.a]\nsql = "SELECT 1"\ndatabase = "nowhere"\n', "a names the database 'nowhere'"),
        ('[scenarios.export.databases.a]\nurl = "mysql://x"\n', "must be sqlite:///"),
        ('[scenarios.export.queries.a]\nsql = ""\n', "scenarios.export.queries.a.sql"),
        (
            '[scenarios.export.queries.a]\nsql = "SELECT 1"\nparameters.limit = {}\n',
            "limit: reserved in every export; rename the parameter",
        ),
        ('[scenarios.export.queries.a]\nsql = "x"\nparameters.n = { type = "integer", default = "x" }\n', "integer"),
    ],
)
def test_an_invalid_configuration_is_rejected_at_the_start(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(table)
    status, _, output = run_streamlab("check", cwd=tmp_path)
    assert status == 2
    assert message in output


CHECKED = """
    [scenarios.export.databases.shop]
    url = "sqlite:///data/shop.db"
    [scenarios.export.databases.garbage]
    url = "sqlite:///config.toml"
    [scenarios.export.queries.orders]
    database = "shop"
    sql = "SELECT id FROM orders WHERE total > :least"
    parameters.least = { type = "real", default = 0 }
    [scenarios.export.queries.typo]
    database = "shop"
    sql = "SELECT no_column FROM orders"
    [scenarios.export.queries.purge]
    sql = "DELETE FROM users"
"""


def test_check_reports_databases_and_sql_that_cannot_work(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CHECKED)
    key, path = "config.toml: scenarios.export", tmp_path / "data" / "shop.db"
    writes = f"{key}.queries.purge.sql - DELETE writes, but an export only reads: its SQL must be a SELECT"
    garbage = f"{key}.databases.garbage.url - {tmp_path}/config.toml: The database cannot be read: "
    status, output, errors = run_streamlab("check", cwd=tmp_path)
    assert (status, "export: 3 faults" in output.splitlines()) == (2, True)
    assert errors.splitlines() == [
        writes,
        f"{key}.databases.shop.url - there is no file {path}",
        f"{garbage}file is not a database.",
        "streamlab: 3 faults; nothing was started",
    ]
    assert not path.parent.exists()
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE orders (id INTEGER, total REAL)")
    assert run_streamlab("check", cwd=tmp_path)[2].splitlines()[:2] == [
        writes,
        f"{key}.queries.typo.sql - {path} rejects it: no such column: no_column",
    ]


def test_sql_that_writes_is_rejected_with_words_that_say_so(serve: Callable[..., Running]) -> None:
    server = serve(configured(purge="DELETE FROM users", typo="SELEC 1"))
    reason = "DELETE writes, but an export only reads: its SQL must be a SELECT"
    server.wait_for_log(f"config.toml: scenarios.export.queries.purge.sql - {reason}\n")
    listed = {entry["name"]: entry for entry in json.loads(server.get("/export")[2])["exports"]}
    assert listed["purge"]["unavailable"] == reason
    assert "syntax error" in listed["typo"]["unavailable"]
    assert server.get("/export/purge/csv")[0] == 500
    server.wait_for_log(f"the SQL of the export purge is invalid: {reason}\n")


@pytest.mark.parametrize(
    ("sql", "word"),
    [
        ("delete from t", "DELETE"),
        ("  -- why\n (INSERT INTO t VALUES (1))", "INSERT"),
        ("/* ; */ REPLACE INTO t VALUES (1)", "REPLACE"),
        ("WITH a AS (SELECT 1) UPDATE t SET x = 1", "UPDATE"),
        ('WITH a AS (SELECT 1) UPDATE "t" SET x = 1', "UPDATE"),
        ("WITH a AS (DELETE FROM t RETURNING *) SELECT * FROM a", "DELETE"),
        ("WITH a AS (/* all */ DELETE FROM t RETURNING *) SELECT * FROM a", "DELETE"),
        ("WITH a AS (SELECT 1) INSERT OR IGNORE INTO t SELECT * FROM a", "INSERT"),
        ("CREATE TABLE u AS SELECT 1", "CREATE"),
        ("VACUUM INTO 'x'", "VACUUM"),
        ("SELECT replace(a, 'b', 'c') FROM t", ""),
        ("SELECT (1), replace (a, 'b', 'c'), (delete), (update) FROM t", ""),
        ("SELECT * FROM t WHERE a = '(DELETE FROM t)' -- (DELETE FROM t)", ""),
        ("SELECT $$ (DELETE FROM t) $$", ""),
        ("WITH updates AS (SELECT 1) SELECT * FROM updates", ""),
        ("VALUES (1)", ""),
        ("SELEC 1", ""),
    ],
)
def test_sql_that_writes_is_recognized(sql: str, word: str) -> None:
    reason = plugin_module("export", "writes").writes(sql)
    assert reason.partition(" ")[0] == word


# -- as tasks


@pytest.mark.parametrize(
    ("file", "url"), [({}, "/files/exports/a%20b.csv"), ({"enabled": False}, None), ({"root": "else"}, None)]
)
async def test_a_written_file_has_a_url_only_where_it_is_served(
    file: dict[str, Any], url: str | None, tmp_path: Path, aiohttp_client: Callable[..., Any]
) -> None:
    others = {name: {"enabled": False} for name in ("comparison", "llm", "logs", "progress", "ticker")}
    app = create_app(Config.of({"scenarios": {**others, "file": file}, "events": {"url": "sqlite://"}}, base=tmp_path))
    await aiohttp_client(app)
    (export,) = (each for plugin in app[REGISTRY].plugins for each in plugin.scenarios if each.name == "export")
    assert cast(Any, export).file_url("a b.csv") == url
