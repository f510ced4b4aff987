"""The sample database: a million fictitious users, with every kind of cell that breaks careless exports."""

import logging
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

BATCH = 10_000
"""Rows written between two checks whether to stop."""

FIRST_NAMES = (
    "Ada", "Ágnes", "Björn", "Chloé", "Dmitri", "Élodie", "Fatima", "Grace", "Hiroshi", "Ines", "José", "Kwame",
    "Lin", "Małgorzata", "Noor", "Olu", "Priya", "Quentin", "Renée", "Søren", "Thị", "Uma", "Václav", "Wei",
    "Xochitl", "Yūki", "Zoë", "Алексей", "Μαρία", "محمد", "小明", "さくら",
)  # fmt: skip
LAST_NAMES = (
    "Lovelace", "O'Neill", "Nagy", "Müller", "de la Cruz", "Smith, Jr.", 'García "Pepe" López', "Ngọc", "Østergård",
    "van der Berg", "Łukasiewicz", "Öztürk", "Иванова", "Παπαδόπουλος", "山田", "李", "Singh", "Okafor", "Haddad",
    "Hansen", "St. John", "Kowalski", "Ferrari", "Dvořák", "Andersson", "Costa", "Nakamura", "Kim", "Baker\nSmith",
)  # fmt: skip
COUNTRIES = (
    "AR", "AU", "BR", "CA", "CH", "CN", "CZ", "DE", "DK", "EG", "ES", "FR", "GB", "GH", "GR", "HU", "IN", "IT", "JP",
    "KR", "MX", "NG", "NL", "NO", "NZ", "PL", "PT", "SE", "TR", "US", "VN", "ZA",
)  # fmt: skip
NOTES = (
    None, "", "regular", "prefers e-mail", "=1+2", "+49 30 123456", "-5 % discount", "@home", "said: \"call me\"",
    "two\r\nlines", "tab\there", "Grüße, 你好 👋", "100,5", "NULL", " leading space",
)  # fmt: skip

_SCHEMA = """
    CREATE TABLE users (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, email TEXT NOT NULL, country TEXT NOT NULL, balance REAL,
        created TEXT NOT NULL, active INTEGER NOT NULL, note TEXT
    );
    CREATE TEMP TABLE firsts (i INTEGER PRIMARY KEY, name TEXT);
    CREATE TEMP TABLE lasts (i INTEGER PRIMARY KEY, name TEXT);
    CREATE TEMP TABLE countries (i INTEGER PRIMARY KEY, code TEXT);
    CREATE TEMP TABLE notes (i INTEGER PRIMARY KEY, note TEXT);
"""

# Every value is computed from the row's number and the seed (Knuth's multiplicative hash, in several strides) by SQLite
# itself: a loop in Python would take five times as long, and block the server meanwhile.
_FILL = """
    INSERT INTO users
    WITH RECURSIVE
        n (id) AS (VALUES (:first) UNION ALL SELECT id + 1 FROM n WHERE id < :last),
        h (id, a, b) AS (
            SELECT id, ((id + :seed) * 2654435761) & 4294967295, ((id + :seed * 31) * 2246822519) & 4294967295 FROM n
        )
    SELECT
        h.id,
        firsts.name || ' ' || lasts.name,
        'user' || h.id || '@' || lower(countries.code) || '.example',
        countries.code,
        CASE WHEN b % 50 = 0 THEN NULL ELSE ((a >> 8) % 2000000 - 500000) / 100.0 END,
        strftime('%Y-%m-%dT%H:%M:%SZ', 1577836800 + (a + b) % 189216000, 'unixepoch'),
        b % 7 <> 0,
        notes.note
    FROM h
    JOIN firsts ON firsts.i = (a >> 5) % :firsts
    JOIN lasts ON lasts.i = (b >> 7) % :lasts
    JOIN countries ON countries.i = (a >> 13) % :countries
    JOIN notes ON notes.i = CASE WHEN b % 3 = 0 THEN (b >> 11) % :notes ELSE 0 END
"""


def make(path: Path, rows: int, *, seed: int = 1, stop: threading.Event | None = None) -> None:
    """Create the sample with `rows` rows, completely or not at all; runs in a thread, some seconds for a million rows.

    The same seed gives the same rows. Shows a progress bar if stderr is a terminal. Returns without a sample once
    `stop` is set. Raises OSError or sqlite3.Error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sample-") as folder:
        unfinished = Path(folder) / path.name
        with Progress(*columns, console=console) if sys.stderr.isatty() else nullcontext() as progress:
            task = progress.add_task("sample database", total=rows) if progress else None

            def report(done: int) -> bool:
                if progress is not None and task is not None:
                    progress.update(task, completed=done)
                return stop is not None and stop.is_set()

            if not _write(unfinished, rows, seed, report):
                return
        unfinished.replace(path)
    log.info("created a sample database of %d users", rows)


def _write(path: Path, rows: int, seed: int, report: Callable[[int], bool]) -> bool:
    """Write the database, calling `report` with the rows so far; return False once that returned True."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.executescript(_SCHEMA)
        lists = {"firsts": FIRST_NAMES, "lasts": LAST_NAMES, "countries": COUNTRIES, "notes": NOTES}
        for table, values in lists.items():
            database.executemany(f"INSERT INTO {table} VALUES (?, ?)", enumerate(values))  # noqa: S608
        counts = {table: len(values) for table, values in lists.items()}
        database.execute("BEGIN")
        for first in range(1, rows + 1, BATCH):
            last = min(rows, first + BATCH - 1)
            database.execute(_FILL, {"first": first, "last": last, "seed": seed, **counts})
            if report(last):
                return False
        database.execute("COMMIT")
        # Readers need no lock file next to it then, nor write access to its folder.
        database.execute("PRAGMA journal_mode = DELETE")
    return True
