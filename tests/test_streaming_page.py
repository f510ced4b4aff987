"""docs/streaming.md matches the code: the plugin of each technique does what the page says, and so does its client."""

import ast
import json
import re
from collections.abc import AsyncIterator, Callable

import pytest

from tests.support.connections import EventStream
from tests.support.docs import PAGES, blocks, shown_plugin
from tests.support.servers import Running

PAGE = "docs/streaming.md"
LOADED_PLUGINS = ("progress", "comparison")

TECHNIQUES = ("Large files", "Server-sent events", "Exports", "Tokens of a language model", "Progress of long work")


def test_every_technique_has_its_use_its_benefit_its_bytes_its_code_and_its_test() -> None:
    for technique in TECHNIQUES:
        section = PAGES[PAGE].partition(f"\n## {technique}\n")[2].partition("\n## ")[0]
        for part in ("Use case", "Benefit", "On the wire", "Implementation", "Test"):
            assert section.count(f"**{part}.**") == 1, (technique, part)
        assert "```text\n" in section, technique
        assert "```sh\n" in section, technique


def test_scores_are_published_and_followed(start: Callable[..., Running]) -> None:
    server = start(scores=shown_plugin(PAGE, "class Scores"))
    json_type = {"Content-Type": "application/json"}
    status, _, body = server.get("/scores", json_type, method="POST", body=b'{"team": "home"}')
    assert status == 201
    with EventStream(server, "/scores") as stream:
        (event,) = stream.take(1)
    assert (event.id, event.json) == (json.loads(body)["id"], {"team": "home"})


def test_rows_words_and_tasks_are_streamed(start: Callable[..., Running]) -> None:
    server = start(
        squares=shown_plugin(PAGE, "class Squares"),
        poem=shown_plugin(PAGE, "class Poem"),
        rows=shown_plugin(PAGE, "def import_rows"),
    )
    lines = server.get("/squares?rows=2500")[2].splitlines()
    assert [json.loads(line) for line in lines] == [{"n": n, "square": n * n} for n in range(2500)]
    assert server.get("/poem")[2] == b"streams end well "
    with EventStream(server, "/process/long-task?kind=import_rows&rows=5") as stream:
        assert list(stream)[-1].json["result"] == {"imported": 5}


def test_the_two_responses_differ_in_their_framing_as_shown(start: Callable[..., Running]) -> None:
    buffered, streamed = (block for block in blocks(PAGE, "text") if "Ada Allen" in block)
    server = start()
    for path, block in (("buffered", buffered), ("streamed", streamed)):
        with server.send(f"GET /demo/comparison/{path}?rows=1 HTTP/1.1\nHost: localhost\nConnection: close") as sent:
            received = b"".join(iter(lambda: sent.recv(65536), b"")).decode().replace("\r\n", "\n")
        head, _, body = block.partition("\n\n")
        assert set(head.splitlines()) <= set(received.partition("\n\n")[0].splitlines())
        shown = body.rstrip("\n").replace(", ...}", ", \x00}")
        pattern = re.escape(shown).replace(re.escape(", \x00}"), ",.*}")
        assert re.fullmatch(pattern, received.partition("\n\n")[2].rstrip("\n")), received


async def test_the_client_prints_events(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in blocks(PAGE, "python") if "streamlab.client" in block)
    names: dict[str, object] = {"__name__": "shown"}
    exec(compile(ast.parse(block), PAGE, "exec"), names)

    class Received:
        id, data = "1-1", "{}"

    async def follow(url: str) -> AsyncIterator[Received]:
        assert url == "http://example.org/"
        yield Received()

    monkeypatch.setitem(names, "follow", follow)
    main = names["main"]
    assert callable(main)
    await main("http://example.org/")
    assert capsys.readouterr().out == "1-1 {}\n"
