"""The level and the time of log lines of many formats."""

import time

import pytest

from tests.support.servers import plugin_module

lines = plugin_module("logs", "lines")

NOON = 1_793_534_400.0
"""2026-11-01T12:00:00Z."""


def read(text: str) -> tuple[str, float | None]:
    found: tuple[str, float | None] = lines.Reader().read(text)
    return found


@pytest.mark.parametrize(
    ("text", "level", "seconds"),
    [
        ("2026-11-01T12:00:00Z INFO shop.orders GET /orders 200", "INFO", NOON),
        ("2026-11-01T12:00:00.250Z WARN shop", "WARNING", NOON + 0.25),
        ("2026-11-01 12:00:00,250 - shop.orders - ERROR - failed", "ERROR", NOON + 0.25),
        ("2026-11-01T13:00:00+01:00 DEBUG x", "DEBUG", NOON),
        ("2026-11-01 04:00:00 -0800 FATAL x", "CRITICAL", NOON),
        ("2026-11-01 12:00:00.000  INFO 1 --- [main] c.e.Shop : ERROR is only a word", "INFO", NOON),
        ("2026-11-01 12:00:00.000 [main] ERROR com.example.Shop - x", "ERROR", NOON),
        ("2026-11-01 12:00:00.000 UTC [17] LOG:  statement: SELECT 1", "INFO", NOON),
        ("2026-11-01 12:00:00.000 UTC [17] FATAL:  the end", "CRITICAL", NOON),
        ("2026/11/01 12:00:00 [error] 17#0: *1 open() failed", "ERROR", NOON),
        ("2026/11/01 12:00:00 started", "", NOON),
        ("2026-11-01T12:00:00Z info: started", "INFO", NOON),
        ("2026-11-01T12:00:00Z error no route", "ERROR", NOON),
        ("2026-11-01T12:00:00Z there was an error here", "", NOON),
        ("2026-11-01T12:00:00Z GET /ERROR HTTP/1.1", "", NOON),
        ("2026-11-01T12:00:00Z\tTRACE\tx", "DEBUG", NOON),
        ("[2026-11-01T12:00:00Z INFO  shop] x", "INFO", NOON),
        ("[2026-11-01 12:00:00] production.ERROR: x", "ERROR", NOON),
        ("[2026-11-01 12:00:00 +0000] [17] [INFO] Booting", "INFO", NOON),
        ('127.0.0.1 - frank [01/Nov/2026:04:00:00 -0800] "GET /ERROR HTTP/1.0" 200 1', "", NOON),
        ("2026-11-01T12:00:00.123456789Z stdout F plain", "", NOON + 0.123456789),
        ('2026-11-01T12:00:00Z stderr F {"level":"error","msg":"x"}', "ERROR", NOON),
        ("INFO:     127.0.0.1:1 - GET / 200", "INFO", None),
        ("WARNING:root:x", "WARNING", None),
        ("[NOTICE] x", "INFO", None),
        ("<3>disk on fire", "ERROR", None),
        ("<165>1 2026-11-01T12:00:00Z host app - - x", "INFO", NOON),
        ("<8>1 2026-11-01T12:00:00Z host app - - EMERG", "CRITICAL", NOON),
        ("EMERG the roof", "CRITICAL", None),
        ("error: no such thing", "ERROR", None),
        ("Error: no such thing", "", None),
        ("error handling is hard", "", None),
        ("just words", "", None),
        ("\x1b[32mINFO\x1b[0m coloured", "INFO", None),
        ("time=2026-11-01T12:00:00Z level=warn msg=x", "WARNING", NOON),
        ('level=info ts=1793534400.5 msg="ERROR inside"', "INFO", NOON + 0.5),
        ('t=1793534400000 lvl=dbg msg="x"', "DEBUG", NOON),
        ('{"level":"info","time":"2026-11-01T12:00:00Z","msg":"x"}', "INFO", NOON),
        ('{"severity": "ERROR", "timestamp": "2026-11-01T12:00:00.5+00:00"}', "ERROR", NOON + 0.5),
        ('{"lvl":"crit","ts":1793534400}', "CRITICAL", NOON),
        ('{"level":50,"time":1793534400250,"msg":"x"}', "ERROR", NOON + 0.25),
        ('{"level":4,"timestamp":1793534400.5}', "WARNING", NOON + 0.5),
        ('{"level":"warn","ts":1.7935344e+09}', "WARNING", NOON),
        ('{"@timestamp":"2026-11-01T12:00:00Z","log.level":"WARN"}', "WARNING", NOON),
        ('{"msg":"\\"level\\":\\"error\\"","level":"info"}', "INFO", None),
        ('{"msg":"' + "x" * 5000 + '","level":"error","ts":1793534400}', "ERROR", NOON),
        ('{"level":"loud","ts":"soon"}', "", None),
        ("2026-11-01T23:59:60Z INFO leap", "INFO", NOON + 43200),
        ("2026-13-01T12:00:00Z INFO no such month", "INFO", None),
        ("0000-00-00T00:00:00Z nothing", "", None),
        ("2026-11-01T12:00:00+99:99 INFO no such zone", "INFO", None),
        ('{"ts":' + "9" * 30 + "}", "", None),
    ],
)
def test_level_and_time_of(text: str, level: str, seconds: float | None) -> None:
    found, moment = read(text)
    assert (found, moment) == (level, seconds if seconds is None else pytest.approx(seconds, abs=1e-5))


@pytest.mark.parametrize(
    "form", ["%b %e %H:%M:%S host app[1]: x", "<11>%b %e %H:%M:%S host x", "I%m%d %H:%M:%S.0 1 a]"]
)
def test_a_time_without_a_year_is_the_latest_in_the_past(form: str) -> None:
    past = int(time.time()) - 90 * 86400
    assert read(time.strftime(form, time.gmtime(past)))[1] == past


def test_prefixes_of_syslog_and_klog_have_a_level() -> None:
    assert read("<11>Nov  1 12:00:00 host app: x")[0] == "ERROR"
    assert [read(f"{letter}1101 12:00:00.000001 1 a.go:1] x")[0] for letter in "IWEF"] == [
        "INFO",
        "WARNING",
        "ERROR",
        "CRITICAL",
    ]


def test_lines_that_continue_a_record_have_its_level_and_time() -> None:
    reader = lines.Reader()
    record = ("ERROR", NOON)
    assert reader.read("2026-11-01T12:00:00Z ERROR shop failed") == record
    for text in (
        "Traceback (most recent call last):",
        '  File "shop/orders.py", line 3, in place',
        "    2026-11-01T13:00:00Z INFO quoted",
        "ValueError: nothing left",
        "",
        "Caused by: INFO 2026-11-01T13:00:00Z",
        "\tat com.example.Shop",
        "--- end",
    ):
        assert reader.read(text) == record, text
    assert reader.read("2026-11-01T12:00:01Z INFO shop") == ("INFO", NOON + 1)
    assert reader.read("just words") == ("INFO", NOON + 1)


def test_a_continuation_without_a_record_is_unknown() -> None:
    assert read("   indented ERROR") == ("", None)
    assert read("") == ("", None)


def test_levels_are_in_order() -> None:
    numbers = list(lines.LEVELS.values())
    assert list(lines.LEVELS) == ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1_000_000,
        "2026-" * 200_000,
        "[" * 1_000_000,
        "- " * 500_000,
        "ERRO " * 200_000,
        '{"level": ' * 100_000,
        '{"time":"' + "2" * 1_000_000,
        "level=" * 200_000,
        "ts=1" + "1." * 500_000,
        "\x1b[" * 500_000,
        "\x1b[1" + ";" * 1_000_000,
        "1.1.1.1 [" + "01/Nov/" * 100_000,
        "\0" * 1_000_000,
    ],
)
def test_the_cost_of_a_line_is_bounded(text: str) -> None:
    reader = lines.Reader()
    started = time.process_time()
    for _ in range(100):
        reader.read(text)
    assert (time.process_time() - started) / 100 < 0.001
