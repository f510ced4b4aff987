"""What every endpoint promises: declared answers, HEAD, HTTP/1.0, and refusals that say what was wrong."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Mapping
from typing import Any

from streamlab.problems import MEDIA_TYPE as PROBLEM

from . import wire
from .promise import NotKept, promise
from .samples import Asked, Bad
from .subject import Subject
from .wire import Answer

FORGED = "a\r\nX-Forged: 1\r\n\r\nid: forged\nevent: forged\rdata: forged\n\n<script>forged</script>\u2028"
"""A text that would forge a header, a field of an event, a log line, or an element of a page."""

_OF_THE_MOMENT = {"date", "connection", "transfer-encoding", "content-length", "server-timing", "location"}
"""Header fields that HEAD may leave out: what is known only when the content is made (RFC 9110, 9.3.2)."""


def takes_get(asked: Asked) -> bool:
    """Endpoints with GET, and so with HEAD."""
    return asked.method == "GET"


def takes_values(asked: Asked) -> bool:
    """Endpoints with parameters that some values do not fit."""
    return any(bad.where != "body" for bad in asked.bad_values())


def takes_body(asked: Asked) -> bool:
    """Endpoints that need a body."""
    return asked.has_body


def takes_numbers(asked: Asked) -> bool:
    """Endpoints with a number among their parameters."""
    return any(True for _ in asked.numbers())


def takes_texts(asked: Asked) -> bool:
    """Endpoints with a query parameter that takes any text."""
    return any(True for _ in asked.texts())


class Answers:
    """What is asked of every endpoint."""

    @promise("OpenAPI 3.1.1, Responses Object; RFC 9110, 8.3")
    async def test_answers_as_described(self, subject: Subject) -> str:
        """The example of the documentation is answered with a status and a media type that it names."""
        answer, asked = await subject.answered(), subject.asked
        body = bytes(answer.body[:200]).decode(errors="replace")
        if answer.status not in asked.statuses or answer.status >= 400:
            declared = ", ".join(str(status) for status in sorted(asked.statuses) if status < 400)
            raise NotKept(f"{answer.line} for {subject.line}, and {declared} is declared: {body.strip()}")
        wanted = (asked.media.partition(";")[0],) if asked.media else asked.sends
        if answer.status == 200 and answer.media not in wanted:
            raise NotKept(f"{answer.media or 'no media type'}, and {', '.join(wanted)} are declared")
        return f"{answer.line}, {answer.media or 'no body'}"

    @promise("RFC 9111, 5.2.2; nginx, ngx_http_proxy_module: X-Accel-Buffering")
    async def test_stream_is_neither_cached_nor_buffered_on_its_way(self, subject: Subject) -> str:
        """A stream says Cache-Control: no-cache or no-store, and X-Accel-Buffering: no."""
        answer = await subject.answered()
        if answer.get("content-length") is not None and answer.get("x-accel-buffering") is None:
            return f"no stream: {answer.get('content-length')} bytes in one piece"
        cache, buffering = answer.get("cache-control") or "", answer.get("x-accel-buffering")
        if not answer.has_body:
            return f"{answer.line}, without a body"
        if not {"no-cache", "no-store"} & {word.strip() for word in cache.split(",")} or buffering != "no":
            raise NotKept(f"Cache-Control: {cache or 'none'}, X-Accel-Buffering: {buffering or 'none'}")
        return f"Cache-Control: {cache}, X-Accel-Buffering: {buffering}"

    @promise("RFC 9110, 9.3.2", of=takes_get)
    async def test_head_has_the_headers_of_get(self, subject: Subject) -> str:
        """HEAD has the status and the header fields of GET, and no body; the connection can be used again."""
        get = await subject.answered()
        reader, writer = await asyncio.open_connection("127.0.0.1", subject.server.port)
        try:
            head = await wire.ask_on(reader, writer, subject.message(method="HEAD"))
            missing = {name for name, _ in get.fields} - {name for name, _ in head.fields} - _OF_THE_MOMENT
            if head.status != get.status:
                raise NotKept(f"{head.line} for HEAD, {get.line} for GET")
            if missing:
                raise NotKept(f"HEAD lacks {', '.join(sorted(missing))}")
            if head.media != get.media:
                raise NotKept(f"{head.media or 'no media type'} for HEAD, {get.media} for GET")
            length = head.get("content-length")
            if length is not None and await subject.steady() is not None and get.get("content-length") != length:
                raise NotKept(f"Content-Length {length} for HEAD, {get.get('content-length')} for GET")
            closes = "close" in (head.get("connection") or "").lower()
            if not closes:
                try:
                    after = await wire.ask_on(reader, writer, wire.request("GET", "/health", host=subject.host))
                except wire.NotHTTP as error:
                    raise NotKept(f"something after the headers of HEAD: {error}") from None
                await after.read(seconds=5)
            return f"{head.line}, {len(head.fields)} header fields, no body"
        finally:
            writer.close()

    @promise("RFC 9112, 6.1 and 9.3")
    async def test_http_1_0_has_no_chunks(self, subject: Subject) -> str:
        """A client of HTTP/1.0 gets the same status, no Transfer-Encoding, and the end of the connection."""
        usual = await subject.answered()
        async with subject.ask(version="1.0") as answer:
            if answer.status != usual.status and answer.status not in subject.asked.statuses:
                raise NotKept(f"{answer.line}, and {usual.status} for HTTP/1.1")
            if coding := answer.get("transfer-encoding"):
                raise NotKept(f"Transfer-Encoding: {coding}")
            if "keep-alive" in (answer.get("connection") or "").lower():
                raise NotKept("Connection: keep-alive, which was not asked for")
            if usual.ending is None:
                await answer.begin(seconds=2)
                return f"{answer.line}, no chunks, no end"
            await answer.read(seconds=5, most=1 << 22)
            if difference := await subject.differs(bytes(answer.body)):
                raise NotKept(f"another body than for HTTP/1.1: {difference}")
            if answer.ending is None and len(answer.body) < (1 << 22):
                raise NotKept("the connection stays open after the body")
            return f"{answer.line}, {len(answer.body)} bytes, closed"

    @promise("RFC 9110, 15.5.6; RFC 9457")
    async def test_other_methods_are_refused(self, subject: Subject) -> str:
        """A method that the path does not take is 405, with every one that it does in Allow."""
        methods = subject.asked.methods
        other = next(method for method in ("DELETE", "PUT", "PATCH", "POST", "GET") if method not in methods)
        headers = {} if other in ("GET", "DELETE") else {"Content-Length": "0"}
        message = wire.request(other, subject.asked.target(subject.values), host=subject.host, headers=headers)
        async with wire.asked(subject.server.port, message) as answer:
            await _refused(answer, {405}, f"for {other}")
            allowed = {method.strip() for method in (answer.get("allow") or "").split(",")}
            if missing := methods - allowed:
                raise NotKept(f"405 for {other}, but Allow lacks {', '.join(sorted(missing))}")
            return f"405 for {other}, Allow: {answer.get('allow')}"

    @promise("RFC 9457, 3; streamlab refuses what it does not know", of=takes_get)
    async def test_unknown_parameters_are_refused_by_name(self, subject: Subject) -> str:
        """A query parameter that nobody knows is refused with 400 or 422, and named."""
        target = subject.asked.target(subject.values)
        target += f"{'&' if '?' in target else '?'}no_such_parameter=1"
        headers = {"Accept": subject.asked.media} if subject.asked.media else {}
        message = wire.request(subject.asked.method, target, host=subject.host, headers=headers)
        async with wire.asked(subject.server.port, message) as answer:
            document = await _refused(answer, {400, 422}, "for ?no_such_parameter=1")
            _names(document, "no_such_parameter")
            return f"{answer.line}: {document['errors'][0]['detail']}"

    @promise("RFC 9457, 3; RFC 9110, 15.5.21", of=takes_values)
    async def test_values_that_do_not_fit_are_refused_by_name(self, subject: Subject) -> str:
        """Each value that a parameter's declaration excludes is refused with 400 or 422, and the parameter named."""
        tried = 0
        for bad in subject.asked.bad_values():
            if bad.where == "body":
                continue
            await _refuses(subject, bad)
            tried += 1
        return f"{tried} values, each refused with its parameter's name"

    @promise("RFC 9457, 3; RFC 8259", of=takes_body)
    async def test_bodies_that_do_not_fit_are_refused(self, subject: Subject) -> str:
        """A body that is not JSON, is of another type, or excluded by its schema, is refused with a status of 4xx."""
        tried = 0
        for body, why in ((b"{", "for half a JSON text"), (b"", "for an empty body"), (b"\xff\xfe", "for no UTF-8")):
            async with subject.ask(body=body) as answer:
                await _refused(answer, range(400, 500), why)
            tried += 1
        async with subject.ask(headers={"Content-Type": "image/png"}) as answer:
            await _refused(answer, {400, 415}, "for a body of the type image/png")
        for bad in subject.asked.bad_values():
            if bad.where == "body":
                await _refuses(subject, bad)
                tried += 1
        return f"{tried + 1} bodies, each refused"

    @promise("OpenAPI 3.1.1, Schema Object; JSON Schema, 6.2", of=takes_numbers)
    async def test_numbers_have_bounds(self, subject: Subject) -> str:
        """Every number that a client may give has a least and a greatest value in the documentation."""
        bounds = []
        for name, schema in subject.asked.numbers():
            least = schema.get("minimum", schema.get("exclusiveMinimum"))
            most = schema.get("maximum", schema.get("exclusiveMaximum"))
            if least is None or most is None:
                raise NotKept(f"{name} has no {'least' if least is None else 'greatest'} value: Field(ge=..., le=...)")
            bounds.append(f"{name} {least}..{most}")
        return ", ".join(bounds)

    @promise("RFC 9110, 5.5 and 17.2; WHATWG HTML 9.2.6", of=takes_texts)
    async def test_text_of_a_client_forges_nothing(self, subject: Subject) -> str:
        """Text with line breaks, or with HTML, forges no header, no field of an event, no element and no log line."""
        for name in subject.asked.texts():
            for value in (FORGED, "\0", "\ud7ff\U0010ffff"):
                async with subject.ask(values={name: value}) as answer:
                    await answer.read(seconds=0.5)
                    where = f"?{name}= a text with line breaks"
                    if answer.status >= 500:
                        raise NotKept(f"{answer.line} for {where}: {bytes(answer.body[:200])!r}")
                    if answer.get("x-forged") is not None:
                        raise NotKept(f"a header X-Forged for {where}")
                    if answer.media == "text/html" and b"<script>forged" in answer.body:
                        raise NotKept(f"an element of the client's for {where}")
                    if answer.media == "text/event-stream":
                        _look_for_forged(answer, where)
        if forged := [line for line in subject.server.log.splitlines() if line.startswith(("id: forged", "X-Forged"))]:
            raise NotKept(f"a log line of the client's: {forged[0]}")
        return f"nothing forged through {', '.join(subject.asked.texts())}"

    @promise("RFC 9110, 8.4, 12.5.3 and 12.5.5", of=takes_get)
    async def test_compression_is_negotiated(self, subject: Subject) -> str:
        """What is compressed was asked for, says Vary, and is the same when unpacked; event streams never are."""
        async with subject.ask(headers={"Accept-Encoding": "gzip;q=0, identity"}) as plain:
            if coding := plain.get("content-encoding"):
                raise NotKept(f"Content-Encoding: {coding} for Accept-Encoding: gzip;q=0")
        async with subject.ask(headers={"Accept-Encoding": "gzip"}) as answer:
            coding = answer.get("content-encoding")
            if coding is None:
                return "never compressed"
            if subject.asked.carries_events:
                raise NotKept(f"Content-Encoding: {coding} on an event stream, where it delays events")
            if "accept-encoding" not in (answer.get("vary") or "").lower():
                raise NotKept(f"Content-Encoding: {coding}, and no Vary: Accept-Encoding")
            await answer.read(seconds=5)
            if answer.ending is not None and (difference := await subject.differs(_unpacked(bytes(answer.body)))):
                raise NotKept(f"another body when unpacked: {difference}")
            return f"Content-Encoding: {coding}, Vary: {answer.get('vary')}"


async def _refuses(subject: Subject, bad: Bad) -> None:
    """Ask with a value that does not fit. Raises NotKept where it is not refused, or its parameter not named."""
    statuses = {400, 404, 422} if bad.where == "path" else {400, 422}
    async with subject.ask(values={bad.name: bad.value}) as answer:
        document = await _refused(answer, statuses, _said(bad))
        if answer.status == 422:
            _names(document, bad.name)


async def _refused(answer: Answer, statuses: Any, why: str) -> dict[str, Any]:
    """The problem document of a refusal. Raises NotKept where it is none."""
    await answer.read(seconds=5)
    text = bytes(answer.body[:300]).decode(errors="replace")
    if answer.status not in statuses:
        raise NotKept(f"{answer.line} {why}: {text}")
    if answer.media != PROBLEM:
        raise NotKept(f"{answer.line} {why}, as {answer.media or 'no media type'} and not as {PROBLEM}: {text}")
    try:
        document = json.loads(answer.body)
    except ValueError:
        raise NotKept(f"{answer.line} {why}, with a body that is not JSON: {text}") from None
    if not isinstance(document, dict) or document.get("status") != answer.status:
        raise NotKept(f"{answer.line} {why}, with a document whose status is another: {text}")
    return document


def _names(document: Mapping[str, Any], name: str) -> None:
    named = [str(error.get("name")) for error in document.get("errors", ())]
    if not any(one.split(".")[0] == name for one in named):
        raise NotKept(f"{document['status']}, whose errors name {', '.join(named) or 'nothing'} and not {name}")


def _said(bad: Bad) -> str:
    shown = repr(bad.value)
    return f"for {bad.name}={shown if len(shown) <= 60 else shown[:57] + '...'}, which {bad.why}"


def _look_for_forged(answer: Answer, where: str) -> None:
    for event in wire.events(bytes(answer.body)):
        if event.id == "forged" or event.event == "forged" or event.get("X-Forged") is not None:
            raise NotKept(f"an event with a field of the client's for {where}: {event}")


def _unpacked(body: bytes) -> bytes:
    try:
        return gzip.decompress(body)
    except (OSError, EOFError, zlib.error) as error:
        raise NotKept(f"a body that cannot be unpacked: {error}") from None
