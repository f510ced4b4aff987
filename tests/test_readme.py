"""README matches the code: its plugins, its configuration and all its commands are run."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streamlab.config import Config
from streamlab.server.app import create_app
from tests.support.connections import EventStream
from tests.support.readme import COUNTDOWN, README, THUMBNAILS, VOTES
from tests.support.servers import REPOSITORY, Running, write_plugins

TOMLS = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
CURLS = [line.strip("`") for line in re.findall(r"^curl .*$|`curl [^`]*`", README, re.MULTILINE)]


def test_countdown_serves_validates_and_is_listed(start: Callable[..., Running]) -> None:
    server = start("[scenarios.countdown]\ninterval = 0.01", countdown=COUNTDOWN)
    assert server.get("/stream/countdown?start=3")[2] == b"3\n2\n1\n0\n"
    assert server.get("/stream/countdown?start=-1")[0] == 422
    assert b"/stream/countdown" in server.get("/")[2]
    assert b"/stream/countdown" in server.get("/openapi.json")[2]
    assert b'streamlab_streams_total{outcome="finished",scenario="countdown"} 1.0' in server.get("/metrics")[2]


def test_disabled_countdown_is_not_served(start: Callable[..., Running]) -> None:
    server = start("[scenarios.countdown]\nenabled = false", countdown=COUNTDOWN)
    assert server.get("/stream/countdown")[0] == 404
    assert b'"countdown": {"state": "disabled"}' in server.get("/health")[2]


def test_votes_are_cast_and_watched_from_any_id(start: Callable[..., Running]) -> None:
    server = start(votes=VOTES)
    body = b'{"choice": "tea"}'
    status, _, document = server.get("/votes", {"Content-Type": "application/json"}, method="POST", body=body)
    first = json.loads(document)["id"]
    assert status == 201
    with EventStream(server, "/votes") as stream:
        assert [(event.id, event.json) for event in stream.take(1)] == [(first, {"choice": "tea"})]
        server.get("/votes", {"Content-Type": "application/json"}, method="POST", body=b'{"choice": "coffee"}')
        (second,) = stream.take(1)
    with EventStream(server, "/votes", after=first) as stream:
        assert stream.take(1) == [second]


def test_thumbnails_are_created_and_continue_after_a_crash(start: Callable[..., Running]) -> None:
    server = start(thumbnails=THUMBNAILS)
    with EventStream(server, "/process/long-task?kind=thumbnails&count=200") as stream:
        first = next(event for event in stream if event.event == "progress" and event.json["done"] > 20)
    server.terminate(signal.SIGKILL)
    server = start(thumbnails=THUMBNAILS)
    with EventStream(server, "/process/long-task", first.id) as stream:
        end = list(stream)[-1].json
    assert (end["state"], end["attempts"], end["result"]) == ("done", 2, {"made": 200})


@pytest.mark.parametrize("table", TOMLS)
def test_configuration_of_readme_is_valid(tmp_path: Path, table: str) -> None:
    write_plugins(tmp_path, {"countdown": COUNTDOWN})
    (tmp_path / "config.toml").write_text(table)
    app = create_app(Config.read(tmp_path / "config.toml", {"STREAMLAB_SERVER__LOG_FILE": ""}))
    assert app is not None


def test_every_picture_exists_and_is_small() -> None:
    pictures = re.findall(r"!\[.+\]\((.+)\)", README)
    assert pictures
    for picture in pictures:
        content = (REPOSITORY / picture).read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert len(content) < 150_000


def test_there_are_curl_lines() -> None:
    assert len(CURLS) >= 12


@pytest.mark.timeout(180)
def test_every_curl_line_works(start: Callable[..., Running], tmp_path: Path) -> None:
    server = start(
        "[scenarios.countdown]\ninterval = 0.01\n[scenarios.file]\nsample_mb = 3\n"
        "[scenarios.export]\nsample_rows = 2000\n[scenarios.llm]\n",
        countdown=COUNTDOWN,
    )
    server.wait_for_log("is ready", seconds=60)
    folder = tmp_path / "downloads"
    folder.mkdir()
    pushing = start('[scenarios.ticker]\nsource = "push"')
    for line in CURLS:
        if "-C -" in line:
            os.truncate(folder / "large-file", 1_234_567)
        url = pushing.url if "--json" in line and "ticker" in line else server.url
        command = line.replace("http://127.0.0.1:8000", url).replace("curl ", "curl -sS -f ", 1)
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b""), line
    assert (folder / "large-file").read_bytes() == (tmp_path / "var/files/large-file.bin").read_bytes()
    assert (folder / "first.bin").stat().st_size == 100


def test_follow_command_of_readme_works(start: Callable[..., Running]) -> None:
    (line,) = re.findall(r"^    \.venv/bin/streamlab (follow .*?)(?: +#.*)?$", README, re.MULTILINE)
    server = start()
    arguments = line.replace("http://127.0.0.1:8000", server.url).split()
    done = subprocess.run([sys.executable, "-m", "streamlab", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 20)


@pytest.mark.parametrize("command", ["check", "routes"])
def test_commands_of_readme_exist(tmp_path: Path, command: str) -> None:
    assert f".venv/bin/streamlab {command} " in README
    done = subprocess.run(
        [sys.executable, "-m", "streamlab", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_exported_name_and_metric_is_in_readme() -> None:
    import streamlab

    for name in streamlab.__all__:
        assert f"`{name}" in README, name
    sources = [*(REPOSITORY / "streamlab").rglob("*.py"), *(REPOSITORY / "plugins").rglob("*.py")]
    source = "".join(path.read_text() for path in sources)
    metrics = re.findall(r'(?:Counter|Gauge|Histogram|Family)\(\s*"(streamlab_\w+)"', source)
    assert len(metrics) == len(re.findall(r"^\| `streamlab_\w+` \|", README, re.MULTILINE))
    for metric in metrics:
        assert re.search(rf"`{metric}(_total)?`", README), metric
