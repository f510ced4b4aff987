"""The output of each export format: exact bytes, and the values that other readers find in them."""

import base64
import csv
import io
import json
import math
import re
import sys
import unicodedata
import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.servers import plugin_module

formats = plugin_module("export", "formats")
vocabulary = plugin_module("export", "encoder")
Column, MissingLibrary, unique = vocabulary.Column, vocabulary.MissingLibrary, vocabulary.unique
guard_module = plugin_module("export", "formula_guard")
IGNORED_RANGES = guard_module.IGNORED_RANGES
CsvLines = plugin_module("export", "postgres_csv").CsvLines

UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
NOON = datetime(2026, 11, 1, 12, 0, 0, 250, tzinfo=UTC)
MARKS = "=+-@\t\r＝＋－＠"  # noqa: RUF001


def columns(*declared: str) -> list[Any]:
    """Return columns for "a:integer" and so on; a name without a type has type any."""
    return [Column(name, kind or "any") for name, _, kind in (text.partition(":") for text in declared)]


def write(target: str, declared: Sequence[Any], *batches: Sequence[tuple[Any, ...]], **options: bool) -> bytes:
    encoder = formats.make(target, declared, **options)
    parts = [encoder.begin(), *(encoder.rows(batch) for batch in batches), encoder.end(sum(map(len, batches)), None)]
    return b"".join(parts)


def cell(value: Any, **options: bool) -> str:
    """Return the CSV of a value, next to another cell."""
    line = write("csv", columns("a", "b"), [(value, 0)], header=False, **options).decode()
    assert line.endswith(",0\r\n")
    return line[:-4]


def line(value: Any, kind: str = "any") -> str:
    """Return the JSON of a value in a column of a type."""
    text = write("jsonl", columns(f"a:{kind}"), [(value,)]).decode()
    assert text.startswith('{"a":')
    assert text.endswith("}\n")
    return text[5:-2]


# Names


@pytest.mark.parametrize(
    ("given_names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a_2", "a_3"]),
        (["a", "a", "a_2"], ["a", "a_3", "a_2"]),
        (["a_2", "a", "a", "a_2"], ["a_2", "a", "a_3", "a_2_2"]),
        (["", "", "column"], ["column", "column_2", "column_3"]),
        (["A", "a"], ["A", "a"]),
        ([], []),
    ],
)
def test_duplicate_names_are_numbered_and_given_names_are_not_renamed(
    given_names: list[str], expected: list[str]
) -> None:
    assert unique(given_names) == expected


@settings(deadline=None, database=None)
@given(st.lists(st.sampled_from(["", "a", "a_2", "a_3", "a_2_2", "column", "column_2"]), max_size=12))
def test_names_are_unique_for_any_input(given_names: list[str]) -> None:
    result = unique(given_names)
    assert len(set(result)) == len(result) == len(given_names)
    assert unique(result) == result
    firsts = {name: index for index, name in reversed(list(enumerate(given_names))) if name}
    assert all(result[index] == name for name, index in firsts.items() if name != "column")


def test_many_duplicates_take_no_quadratic_time() -> None:
    assert unique(["a"] * 100_000)[-1] == "a_100000"


@pytest.mark.parametrize("target", ["csv", "jsonl", "json", "arrow", "parquet"])
def test_a_result_with_equal_names_has_all_its_columns(target: str) -> None:
    if target in {"arrow", "parquet"}:
        pytest.importorskip("pyarrow")
    assert all(name in write(target, columns("n", "n"), [("x", "y")]) for name in (b"n_2", b"x", b"y"))


def test_an_unknown_format_and_an_unknown_type_are_rejected_by_name() -> None:
    with pytest.raises(ValueError, match="unknown format 'xls'; known: csv, jsonl, json, arrow, parquet"):
        formats.make("xls", columns("a"))
    with pytest.raises(ValueError, match="column 'a' has the unknown type 'varchar'"):
        Column("a", "varchar")


@pytest.mark.parametrize("target", ["arrow", "parquet"])
def test_a_missing_library_is_named_with_its_installation(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingLibrary, match=r"pip install 'streamlab\[arrow\]'"):
        formats.make(target, columns("a"))


# CSV


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        ("", ""),
        ("plain", "plain"),
        (" spaces ", " spaces "),
        ("a,b", '"a,b"'),
        ('say "hi"', '"say ""hi"""'),
        ("a\nb", '"a\nb"'),
        ("a\rb", '"a\rb"'),
        ("a;b'c", "a;b'c"),
        ("a\u2028b", "a\u2028b"),
        ("a\0b", "a\0b"),
        ("\ud800x", "?x"),
        (0, "0"),
        (-5, "-5"),
        (2**70, "1180591620717411303424"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (0.1, "0.1"),
        (1e15, "1000000000000000.0"),
        (1e16, "1e+16"),
        (0.0001, "0.0001"),
        (0.00001, "1e-05"),
        (10.00001, "10.00001"),
        (5e-324, "5e-324"),
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (True, "true"),
        (False, "false"),
        (b"\x00\xff", "AP8="),
        (b"", ""),
        (bytearray(b"ab"), "YWI="),
        (memoryview(b"ab"), "YWI="),
        (Decimal("-1.50"), "-1.50"),
        (Decimal("NaN"), "NaN"),
        (date(2026, 11, 1), "2026-11-01"),
        (NOON, "2026-11-01T12:00:00.000250+00:00"),
        (datetime(2026, 11, 1), "2026-11-01T00:00:00"),
        (time(12, 30), "12:30:00"),
        (timedelta(hours=1), "1:00:00"),
        (timedelta(days=-1), '"-1 day, 0:00:00"'),
        (UUID, "00112233-4455-6677-8899-aabbccddeeff"),
        ([1, None, "x"], '"[1,null,""x""]"'),
        ({"a": Decimal("NaN")}, '"{""a"":null}"'),
        (3j, "3j"),
    ],
)
def test_csv_cells(value: Any, expected: str) -> None:
    assert cell(value) == expected


@pytest.mark.parametrize("mark", MARKS)
def test_a_text_that_begins_like_a_formula_gets_an_apostrophe(mark: str) -> None:
    assert cell(mark + "x").strip('"') == "'" + mark + "x"
    assert cell(mark + "x", formula_guard=False).strip('"') == mark + "x"
    assert cell("x" + mark).strip('"') == "x" + mark


@pytest.mark.parametrize(
    "before", [*" \n\x0b\x00\x7f\xa0\xad\u200b\u2028\u202e\u3000\ufeff\ufe0f", "\U000e0001", '"', " \n\u200b"]
)
@pytest.mark.parametrize("mark", ["=", "+", "-", "@", "\uff1d", "\ufe66"])
def test_characters_that_a_spreadsheet_ignores_do_not_hide_a_formula(before: str, mark: str) -> None:
    def written(text: str) -> str:
        (row,) = csv.reader(io.StringIO(cell(text), newline=""))
        return row[0]

    assert written(f"{before}{mark}1") == f"'{before}{mark}1"
    assert written(f"a;{before}{mark}1") == f"a;'{before}{mark}1"
    assert written(f"{before}a{mark}1") == (f"'{before}a{mark}1" if before[0] == "\n" else f"{before}a{mark}1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (";=1+1", ";'=1+1"),
        ("=1;=2;x;-3", "'=1;'=2;x;'-3"),
        ("a\t=1", "a\t'=1"),
        ("\t=1", "'\t'=1"),
        ("\n=1+1", "'\n=1+1"),
        ("\nx", "'\nx"),
        ('x;"=1', "x;'\"=1"),
        ("a; b", "a; b"),
        ("a;b=1", "a;b=1"),
        ("a,=1", "a,=1"),
    ],
)
def test_each_cell_that_another_separator_creates_is_guarded(text: str, expected: str) -> None:
    assert list(csv.reader(io.StringIO(cell(text), newline=""))) == [[expected]]


def test_characters_allowed_before_a_formula_are_those_that_unicode_lists_as_invisible() -> None:
    listed = {code for first, last in IGNORED_RANGES for code in range(first, last + 1)} - {0x22}
    known = {code for code in range(1, 0x110000) if unicodedata.category(chr(code)) in ("Cc", "Zs", "Zl", "Zp")}
    assert known - listed == {0x09}, "a tab separates"
    visible = {"Cf", "Mn", "Lo", "Cn"}  # of these, those that Unicode lists as ignorable by default
    assert {unicodedata.category(chr(code)) for code in listed - known} <= visible


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('=HYPERLINK("http://x","y")', '"\'=HYPERLINK(""http://x"",""y"")"'),
        ("-5", "'-5"),
        (-5, "-5"),
        (-5.5, "-5.5"),
        (Decimal("-5"), "-5"),
        (-math.inf, "-Infinity"),
        (b"\xfb", "+w=="),
    ],
)
def test_only_texts_are_guarded(value: Any, expected: str) -> None:
    assert cell(value) == expected


def test_the_guard_reaches_every_text_of_a_column() -> None:
    texts = ["x", "=1", "a@b", "", "\0=1", "@", "a,b", "=a,b", None, 5, "\0", "+"]
    lines = write("csv", columns("a", "b"), [(text, -1) for text in texts], header=False).decode().split("\r\n")
    expected = ["x", "'=1", "a@b", "", "'\0=1", "'@", '"a,b"', '"\'=a,b"', "", "5", "\0", "'+"]
    assert lines == [f"{text},-1" for text in expected] + [""]


def test_the_header_is_quoted_and_guarded_like_text() -> None:
    assert write("csv", columns("a", "b,c", "=d", 'e"')) == b'a,"b,c",\'=d,"e"""\r\n'
    assert write("csv", columns("a", "=d"), formula_guard=False) == b"a,=d\r\n"
    assert write("csv", columns("a"), [(1,)], header=False) == b"1\r\n"


def test_an_empty_cell_alone_in_its_row_is_quoted() -> None:
    assert write("csv", columns("a"), [("",), (None,), ("x",)]) == b'a\r\n""\r\n""\r\nx\r\n'
    assert write("csv", columns("a"), [(None,)]) == b'a\r\n""\r\n'


def test_an_empty_batch_and_a_result_without_columns() -> None:
    assert write("csv", columns("a"), []) == b"a\r\n"
    assert write("csv", [], [(), ()], header=False) == b"\r\n\r\n"


def test_rows_of_another_length_are_rejected() -> None:
    with pytest.raises(ValueError, match="zip"):
        write("csv", columns("a", "b"), [(1, 2), (1,)])


TEXT = st.text(
    st.one_of(st.characters(codec=None), st.sampled_from(MARKS + ',"\r\n\0; \u2028\u200b\xa0\ud800aé')), max_size=8
)
VALUE = st.one_of(
    TEXT,
    st.none(),
    st.integers(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.booleans(),
    st.binary(max_size=8),
    st.decimals(),
    st.datetimes(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=-3))])),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.uuids(),
)
# A column usually has one type, but not always.
COLUMN = st.sampled_from([TEXT, st.floats(), st.integers(), st.booleans(), VALUE]).flatmap(
    lambda kind: st.sampled_from([kind, st.one_of(kind, st.none()), st.one_of(kind, kind, kind, VALUE)])
)


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    width, height = draw(st.integers(1, 4)), draw(st.integers(0, 12))
    drawn = [draw(st.lists(draw(COLUMN), min_size=height, max_size=height)) for _ in range(width)]
    return list(zip(*drawn, strict=True))


IGNORED = "\0" + "".join(chr(code) for first, last in IGNORED_RANGES for code in range(first, last + 1))


def guarded(text: str) -> str:
    """Guard a text cell by cell: slow, but obviously correct."""
    cells = re.split("([;\t])", text)
    marks = {*"=+-@\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b"}
    text = "".join("'" + cell if cell.lstrip(IGNORED)[:1] in marks else cell for cell in cells)
    return "'" + text if text[:1] in {*"\t\r\n"} else text


def prepared(value: Any, guard: bool) -> Any:
    """Return a cell as input of csv.writer: slow, but obviously correct."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case bytes():
            return base64.b64encode(value).decode()
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case datetime() | date() | time():
            return value.isoformat()
        case str() if guard:
            return guarded(value)
    return value


def by_csv_writer(rows: Sequence[tuple[Any, ...]], guard: bool) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\r\n")
    for row in rows:
        writer.writerow([prepared(value, guard) for value in row])
    return file.getvalue().encode("utf-8", "replace")


@settings(max_examples=1000, deadline=None, database=None)
@given(tables(), st.booleans())
@example([("\0=",), ("=",)], True)
@example([("a;\u3000=",), ("b\t\ufeff\u200b@",)], True)
@example([("", ""), ("=", "a")], True)
@example([(None,), (math.nan,), (1.0,)], True)
@example([(True, 1e16), (False, 1e-5)], True)
def test_csv_equals_the_output_of_csv_writer(rows: list[tuple[Any, ...]], guard: bool) -> None:
    width = len(rows[0]) if rows else 1
    declared = columns(*(f"c{index}" for index in range(width)))
    written = write("csv", declared, rows, rows[::-1], formula_guard=guard, header=False)
    assert written == by_csv_writer(rows + rows[::-1], guard)


@pytest.mark.parametrize("distinct", [7, 900, 1_000_000])
def test_repeated_and_ever_new_texts_are_written_alike(distinct: int) -> None:
    def text(number: int) -> str | None:
        texts = (None, f"{number}", f"a,{number}", f"=é{number}", f'"{number}"\n', "x" * 80 + f";-{number}", "", "\0,")
        return texts[number % len(texts)]

    rows = [(number, text(number * 37 % distinct)) for number in range(6000)]
    batches = [rows[first : first + 500] for first in range(0, len(rows), 500)]
    others = [(1, 1), (2, 1.0), (3, True), (4, b"\xff"), (5, [6])]  # 1, 1.0 and True are equal, but not their cells
    written = write("csv", columns("a", "b"), *batches, others[:-1], others[-1:], header=False)
    assert written == by_csv_writer([*rows, *others[:-1], (5, "[6]")], guard=True)


def by_copy(rows: Sequence[Sequence[str | None]]) -> bytes:
    """Return rows as PostgreSQL's COPY writes them as CSV (CopyAttributeOutCSV)."""

    def cell(text: str | None, alone: bool) -> str:
        if text is None:
            return ""
        special = not text or (alone and text == "\\.") or any(mark in text for mark in ',"\r\n')
        return '"' + text.replace('"', '""') + '"' if special else text

    return "".join(",".join(cell(text, len(row) == 1) for text in row) + "\n" for row in rows).encode()


COPIED = st.text(st.sampled_from(MARKS + '",\n|\\.;aé5 \u200b\uff1d'), max_size=7) | st.sampled_from(
    ["\\.", "", "-5", '",']
)


@settings(max_examples=1000, deadline=None, database=None)
@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(COPIED | st.none(), min_size=width, max_size=width))))
@example([["\\."], ["x"], ["\\."]])
@example([["a", None, '"\n', "-1"], ["-1", "-1", "-1", "=1"]])
@example([["1", "-1"] * 60 + ["-2", '",', "=3", "-4"], ["-5"] * 124])
def test_lines_of_copy_become_those_of_csv(rows: list[list[str | None]]) -> None:
    width = len(rows[0]) if rows else 1
    if width == 1:
        rows = [[row[0] or ""] for row in rows]  # as its SQL does
    guards = [None] * (width - 4) + [guard_module.guarded, None, guard_module.guarded_json, guard_module.guarded]
    guards = guards[:width]
    expected = [[text and (guard or str)(text) for guard, text in zip(guards, row, strict=True)] for row in rows]
    for apply, wanted in ((guards, expected), ([None] * width, rows)):
        count, lines = CsvLines(apply).lines(by_copy(rows))
        # Only PostgreSQL quotes a lone backslash and dot.
        ends = by_copy([[*row, "x"] for row in wanted]).replace(b",x\n", b"\r\n")
        assert (count, lines) == (len(rows), ends)


@settings(max_examples=400, deadline=None, database=None)
@given(st.lists(st.one_of(st.floats(), st.floats(1e-6, 1e-3), st.floats(1e14, 1e18)), min_size=1, max_size=40))
def test_floats_are_written_as_repr_and_read_back_the_same(values: list[float]) -> None:
    lines = write("csv", columns("a:real"), [(value,) for value in values], header=False).decode().split()
    for text, value in zip(lines, values, strict=True):
        assert text == repr(value) if math.isfinite(value) else text in {"NaN", "Infinity", "-Infinity"}
        assert float(text) == value or (value != value and text == "NaN")


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=20))
def test_csv_reader_reads_back_the_texts(rows: list[tuple[str, str]]) -> None:
    text = write("csv", columns("a", "b"), rows, header=False, formula_guard=False).decode()
    read = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert read == [[value.encode("utf-8", "replace").decode() for value in row] for row in rows]


def test_pandas_reads_back_the_same_values() -> None:
    pandas = pytest.importorskip("pandas")
    rows = [
        (1, 'Ada, "Countess"\r\nLovelace', 0.1, True, 1.5),
        (2, "José", math.inf, False, None),
        (3, "x,y", -math.inf, True, math.nan),
        (2**62 + 1, "-", 1e-300, False, 1e300),
    ]
    declared = columns("id:integer", "name:text", "x:real", "ok:boolean", "y:real")
    frame = pandas.read_csv(io.BytesIO(write("csv", declared, rows, formula_guard=False)))
    assert list(map(str, frame[["id", "x", "ok", "y"]].dtypes)) == ["int64", "float64", "bool", "float64"]
    assert frame[["id", "name", "x", "ok"]].values.tolist() == [list(row[:4]) for row in rows]
    assert [None if math.isnan(value) else value for value in frame["y"]] == [1.5, None, None, 1e300]


# JSON


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        ("", '""'),
        ('a"\\\n\0', r'"a\"\\\n\u0000"'),
        ("é\u2028", '"é\u2028"'),
        ("\ud800x", '"?x"'),
        (2**70, "1180591620717411303424"),
        (1.5, "1.5"),
        (math.nan, "null"),
        (-math.inf, "null"),
        (True, "true"),
        (b"\x00\xff", '"AP8="'),
        (memoryview(b"ab"), '"YWI="'),
        (Decimal("1.50"), "1.50"),
        (Decimal("1E+5"), "1E+5"),
        (Decimal("NaN"), "null"),
        (Decimal("-sNaN7"), "null"),
        (Decimal("-Infinity"), "null"),
        ([Decimal("NaN"), {"a": (Decimal("Infinity"), "\ud800")}], '[null,{"a":[null,"?"]}]'),
        ("NaN", '"NaN"'),
        (date(2026, 11, 1), '"2026-11-01"'),
        (NOON, '"2026-11-01T12:00:00.000250Z"'),
        (datetime(2026, 11, 1), '"2026-11-01T00:00:00"'),
        (time(12, 30), '"12:30:00"'),
        (timedelta(days=1, seconds=1), '"P1DT1S"'),
        (UUID, '"00112233-4455-6677-8899-aabbccddeeff"'),
        ([1, None, "x"], '[1,null,"x"]'),
        ({"a": {"b": 1}}, '{"a":{"b":1}}'),
        ('{"a":1}', r'"{\"a\":1}"'),
        (3j, '"3j"'),
        ([3j, Decimal("NaN")], '["3j",null]'),
    ],
)
def test_json_values(value: Any, expected: str) -> None:
    assert line(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('{"b": [1, 2.50]}', '{"b": [1, 2.50]}'),
        (' {"b":\r\n\t1}\n', '{"b":  \t1}'),
        ("12345678901234567890.0", "12345678901234567890.0"),
        ("null", "null"),
        (None, "null"),
        (5, "5"),
        (Decimal("NaN"), "null"),
        ({"b": 1}, '{"b":1}'),
        ('"\ud800"', '"?"'),
        ("", '""'),
        ("no json", '"no json"'),
        ('1},{"a":2', r'"1},{\"a\":2"'),
        ('1}\n{"a":2', r'"1}\n{\"a\":2"'),
        ('"a\nb"', r'"\"a\nb\""'),
        ("NaN", '"NaN"'),
        ("[1,]", '"[1,]"'),
        ("01", '"01"'),
    ],
)
def test_only_valid_json_of_a_json_column_is_embedded(value: Any, expected: str) -> None:
    assert line(value, "json") == expected
    json.loads(expected)


def test_json_nested_too_deep_is_a_string() -> None:
    assert line("[" * 100_000, "json") == '"' + "[" * 100_000 + '"'


@pytest.mark.parametrize(
    "names",
    [["a", "b"], ['a"', "b\\"], ["a\n", "\x1f"], ["", "é\u2028"], ["\ud800", "?"], ["self", "__init__"], ["f1", "f0"]],
)
def test_any_column_name_is_a_member(names: list[str]) -> None:
    declared = [Column(name, "any") for name in names]
    text = write("jsonl", declared, [(1, 2)])
    clean = [name.encode("utf-8", "replace").decode() or "column" for name in names]
    clean = clean if clean[0] != clean[1] else [clean[0], clean[0] + "_2"]
    assert json.loads(text) == {clean[0]: 1, clean[1]: 2}
    assert list(json.loads(text)) == clean
    assert text.count(b"\n") == 1


def test_the_end_record_has_rows_and_digest_in_jsonl_only() -> None:
    ends = {name: formats.make(name, columns("a")).end(3, "ab12") for name in ("csv", "jsonl", "json")}
    assert ends == {"csv": b"", "jsonl": b'{"@end":{"rows":3,"sha256":"ab12","altered":0}}\n', "json": b"]\n"}
    assert formats.make("jsonl", columns("a")).end(3, None) == b""


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([], b"[\n]\n"),
        ([[]], b"[\n]\n"),
        ([[(1,)]], b'[\n{"a":1}\n]\n'),
        ([[], [(1,), ("\n",)], [], [(3,)], []], b'[\n{"a":1},\n{"a":"\\n"},\n{"a":3}\n]\n'),
    ],
)
def test_the_json_array_has_a_line_per_row(batches: list[list[tuple[Any, ...]]], expected: bytes) -> None:
    assert write("json", columns("a"), *batches) == expected


def plain_json(value: Any) -> Any:
    """Return the value that a JSON reader should find."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Decimal():
            return value if value.is_finite() else None
        case str():
            return value.encode("utf-8", "replace").decode()
        case bytes():
            return base64.b64encode(value).decode()
        case bool() | int() | float() | None:
            return value
    return Ellipsis


@settings(max_examples=400, deadline=None, database=None)
@given(tables(), st.sampled_from(["any", "decimal", "json"]))
def test_json_lines_and_arrays_are_valid_and_have_the_values(rows: list[tuple[Any, ...]], kind: str) -> None:
    width = len(rows[0]) if rows else 1
    declared = columns(*(f"c{index}:{kind}" for index in range(width)))
    half = len(rows) // 2
    lines = write("jsonl", declared, rows[:half], rows[half:])
    array = write("json", declared, rows[:half], rows[half:])
    assert array == b"[\n" + lines[:-1].replace(b"\n", b",\n") + (b"\n]\n" if rows else b"]\n")
    assert lines.count(b"\n") == len(rows)
    for text, row in zip(lines.split(b"\n"), rows, strict=False):
        read = json.loads(text, parse_constant=pytest.fail)
        exact = json.loads(text, parse_float=Decimal)
        for (name, member), value in zip(read.items(), row, strict=True):
            expected = plain_json(value)
            if kind == "json" and isinstance(value, str) and member != expected:
                assert member == json.loads(expected)
            elif isinstance(expected, Decimal):
                assert exact[name] == expected
            elif expected is not Ellipsis:
                assert member == expected
                assert isinstance(expected, float) or type(member) is type(expected)


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.lists(st.tuples(*[st.sampled_from([None, 1.5, math.inf, math.nan, ":null", '":null'])] * 3))))
def test_each_number_that_json_cannot_represent_is_counted(batches: list[list[tuple[Any, ...]]]) -> None:
    encoder = formats.make("jsonl", columns("a", "b", "c"))
    for batch in batches:
        encoder.rows(batch)
    values = [value for batch in batches for row in batch for value in row if isinstance(value, float)]
    assert encoder.altered == len(values) - values.count(1.5)


# Arrow and Parquet

WORLD = [
    ("i:integer", "int64", [1, None, -(2**63), 2**63 - 1]),
    ("r:real", "double", [1.5, None, 2, math.inf]),
    ("t:text", "string", ["x", None, "", "é\0"]),
    ("b:blob", "binary", [b"x", None, b"", bytes(range(256))]),
    ("o:boolean", "bool", [True, None, 0, 1]),
    ("n:decimal", "string", [Decimal("1.50"), None, 7, Decimal("NaN")]),
    ("d:date", "date32[day]", [date(2026, 11, 1), None, date.min, date.max]),
    ("m:time", "time64[us]", [time(12, 0, 0, 1), None, time.min, time.max]),
    ("s:timestamp", "timestamp[us]", [datetime(2026, 11, 1), None, datetime.min, datetime.max]),
    ("z:timestamptz", "timestamp[us, tz=UTC]", [NOON, None, NOON, NOON.astimezone(timezone(timedelta(hours=2)))]),
    ("v:interval", "duration[us]", [timedelta(1), None, timedelta(-1), timedelta(microseconds=1)]),
    ("u:uuid", "string", [UUID, None, UUID, UUID]),
    ("j:json", "string", ['{"a": 1}', None, {"a": [1]}, 5]),
    ("a:any", "string", ["x", None, 1.5, b"\xff"]),
]
TEXTS = {
    "n": ["1.50", None, "7", "NaN"],
    "u": [str(UUID), None, str(UUID), str(UUID)],
    "j": ['{"a": 1}', None, '{"a":[1]}', "5"],
    "a": ["x", None, "1.5", "/w=="],
}


def read_table(target: str, data: bytes) -> Any:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    if target == "arrow":
        return pyarrow.ipc.open_stream(data).read_all()
    return pyarrow.parquet.read_table(pyarrow.BufferReader(data))


@pytest.mark.parametrize("target", ["arrow", "parquet"])
def test_every_type_reads_back_unchanged(target: str) -> None:
    pytest.importorskip("pyarrow")
    rows = list(zip(*(values for _, _, values in WORLD), strict=True))
    table = read_table(target, write(target, columns(*(name for name, _, _ in WORLD)), rows[:1], [], rows[1:]))
    assert [str(kind) for kind in table.schema.types] == [kind for _, kind, _ in WORLD]
    for name, _, values in WORLD:
        assert table.column(name[0]).to_pylist() == TEXTS.get(name[0], values)


@pytest.mark.parametrize("target", ["arrow", "parquet"])
def test_a_result_without_rows_still_has_its_columns(target: str) -> None:
    pytest.importorskip("pyarrow")
    table = read_table(target, write(target, columns("a:integer", "b:text")))
    assert (table.num_rows, table.column_names) == (0, ["a", "b"])


MISFITS = [
    ("integer", 1.5, "float"),
    ("integer", 1.0, "float"),
    ("integer", "1", "str"),
    ("integer", True, "bool"),
    ("integer", 2**63, "int"),
    ("real", 2**53 + 1, "int"),
    ("real", "1.5", "str"),
    ("real", True, "bool"),
    ("text", 1, "int"),
    ("text", b"x", "bytes"),
    ("blob", "x", "str"),
    ("boolean", 2, "int"),
    ("boolean", "true", "str"),
    ("decimal", "1.5", "str"),
    ("date", datetime(2026, 11, 1), "datetime without a zone"),
    ("date", "2026-11-01", "str"),
    ("time", time(1, tzinfo=UTC), "time with a zone"),
    ("timestamp", NOON, "datetime with a zone"),
    ("timestamp", date(2026, 11, 1), "date"),
    ("timestamptz", datetime(2026, 11, 1), "datetime without a zone"),
    ("interval", timedelta.max, "timedelta"),
    ("uuid", str(UUID), "str"),
]


@pytest.mark.parametrize("target", ["arrow", "parquet"])
@pytest.mark.parametrize(("kind", "value", "named"), MISFITS)
def test_a_value_that_does_not_fit_is_rejected_with_its_row(target: str, kind: str, value: Any, named: str) -> None:
    pytest.importorskip("pyarrow")
    encoder = formats.make(target, columns("k:integer", f"x:{kind}"))
    encoder.begin()
    encoder.rows([(1, None), (2, None)])
    message = f"row 4 of column 'x' holds a value of type {named} that does not fit its type {kind};"
    with pytest.raises(ValueError, match=message):
        encoder.rows([(3, None), (4, value), (5, None)])


@pytest.mark.parametrize("target", ["arrow", "parquet"])
def test_a_lone_surrogate_becomes_a_question_mark(target: str) -> None:
    pytest.importorskip("pyarrow")
    table = read_table(target, write(target, columns("a:text"), [("\ud800x",), (None,), ("é",)]))
    assert table.column("a").to_pylist() == ["?x", None, "é"]


def test_arrow_returns_the_bytes_of_a_batch_immediately() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    encoder = formats.make("arrow", columns("a:integer"))
    data = encoder.begin()
    for number in range(3):
        data += encoder.rows([(number,)])
        reader = pyarrow.ipc.open_stream(data)
        assert [reader.read_next_batch().to_pylist() for _ in range(number + 1)][number] == [{"a": number}]
    data += encoder.end(3, None)
    assert [batch.to_pylist() for batch in pyarrow.ipc.open_stream(data)] == [[{"a": 0}], [{"a": 1}], [{"a": 2}]]


def groups(data: bytes) -> list[int]:
    import pyarrow
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).metadata
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def test_parquet_writes_a_row_group_every_65536_rows() -> None:
    pytest.importorskip("pyarrow")
    encoder = formats.make("parquet", columns("a:integer"))
    parts = [encoder.begin()] + [encoder.rows([(row,) for row in range(1000)]) for _ in range(140)]
    assert [index for index, part in enumerate(parts) if part] == [0, 66, 132]
    parts.append(encoder.end(140_000, None))
    assert groups(b"".join(parts)) == [66_000, 66_000, 8_000]
    assert read_table("parquet", b"".join(parts)).num_rows == 140_000


def test_parquet_writes_a_row_group_every_16_mib() -> None:
    pytest.importorskip("pyarrow")
    encoder = formats.make("parquet", columns("a:blob"))
    parts = [encoder.begin()] + [encoder.rows([(bytes(1 << 20),)] * 3) for _ in range(7)]
    assert [index for index, part in enumerate(parts) if part] == [0, 6]
    parts.append(encoder.end(21, None))
    assert groups(b"".join(parts)) == [18, 3]


@pytest.mark.parametrize(
    ("target", "media_type", "extension"),
    [
        ("csv", "text/csv; charset=utf-8", "csv"),
        ("jsonl", "application/jsonl", "jsonl"),
        ("json", "application/json", "json"),
        ("arrow", "application/vnd.apache.arrow.stream", "arrows"),
        ("parquet", "application/vnd.apache.parquet", "parquet"),
    ],
)
def test_media_types_and_extensions(target: str, media_type: str, extension: str) -> None:
    if target in {"arrow", "parquet"}:
        pytest.importorskip("pyarrow")
    encoder = formats.make(target, columns("a"))
    assert (encoder.media_type, encoder.extension) == (media_type, extension)
    assert list(formats.FORMATS) == ["csv", "jsonl", "json", "arrow", "parquet"]
