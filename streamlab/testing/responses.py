"""Cases for every endpoint: declared responses, HEAD, HTTP/1.0, and error responses that name the invalid parameter."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Mapping
from typing import Any

from streamlab.problems import MEDIA_TYPE as PROBLEM

from . import wire
from .promise import Broken, promise
from .samples import MISSING, EndpointForm, InvalidValue
from .subject import Subject
from .wire import StreamedResponse

FORGED = "a\r\nX-Forged: 1\r\n\r\nid: forged\nevent: forged\rdata: forged\n\n<script>forged</script>\u2028"
"""A text that would forge a header, a field of an event, a log line, or an element of a page."""

_CONTENT_DEPENDENT = {"date", "connection", "transfer-encoding", "content-length", "server-timing", "location"}
"""Header fields that HEAD may omit, because they are known only once the content is generated (RFC 9110, 9.3.2)."""


def has_get(form: EndpointForm) -> bool:
    """Return whether the endpoint has GET, and so HEAD."""
    return form.method == "GET"


def has_invalid_values(form: EndpointForm) -> bool:
    """Return whether its parameters have invalid values to send."""
    return any(bad.where != "body" for bad in form.invalid_values())


def has_request_body(form: EndpointForm) -> bool:
    """Return whether a request needs a body."""
    return form.has_body


def has_numbers(form: EndpointForm) -> bool:
    """Return whether a parameter is a number."""
    return any(True for _ in form.numbers())


def has_texts(form: EndpointForm) -> bool:
    """Return whether a query parameter accepts any text."""
    return any(True for _ in form.texts())


class EndpointCases:
    """Cases for every endpoint."""

    @promise("OpenAPI 3.1.1, Responses Object; RFC 9110, 8.3")
    async def test_responds_as_described(self, subject: Subject) -> str:
        """The response to the documented example has a documented status and media type."""
        response, form = await subject.response(), subject.form
        body = bytes(response.body[:200]).decode(errors="replace")
        if response.status not in form.statuses or response.status >= 400:
            declared = ", ".join(str(status) for status in sorted(form.statuses) if status < 400)
            raise Broken(f"{response.line} for {subject.line}, declared: {declared}: {body.strip()}")
        declared_types = (form.media.partition(";")[0],) if form.media else form.sends
        if response.status == 200 and response.media not in declared_types:
            raise Broken(f"{response.media or 'no media type'}, declared: {', '.join(declared_types)}")
        return f"{response.line}, {response.media or 'no body'}"

    @promise("RFC 9111, 5.2.2; nginx, ngx_http_proxy_module: X-Accel-Buffering")
    async def test_stream_is_neither_cached_nor_buffered(self, subject: Subject) -> str:
        """A stream has no-cache or no-store, and X-Accel-Buffering: no; an event stream has no-transform, too."""
        response = await subject.response()
        if response.get("content-length") is not None and response.get("x-accel-buffering") is None:
            return f"no stream: {response.get('content-length')} bytes at once"
        cache, buffering = response.get("cache-control") or "", response.get("x-accel-buffering")
        if not response.has_body:
            return f"{response.line}, without a body"
        directives = {directive.strip() for directive in cache.split(",")}
        transformed = response.media == "text/event-stream" and "no-transform" not in directives
        if not {"no-cache", "no-store"} & directives or transformed or buffering != "no":
            raise Broken(f"Cache-Control: {cache or 'none'}, X-Accel-Buffering: {buffering or 'none'}")
        return f"Cache-Control: {cache}, X-Accel-Buffering: {buffering}"

    @promise("RFC 9110, 9.3.2", of=has_get)
    async def test_head_has_the_headers_of_get(self, subject: Subject) -> str:
        """HEAD has the status and the header fields of GET, and no body; the connection can be used again."""
        get = await subject.response()
        reader, writer = await asyncio.open_connection("127.0.0.1", subject.server.port)
        try:
            head = await wire.send_on(reader, writer, subject.message(method="HEAD"))
            missing = {name for name, _ in get.fields} - {name for name, _ in head.fields} - _CONTENT_DEPENDENT
            if head.status != get.status:
                raise Broken(f"{head.line} for HEAD, {get.line} for GET")
            if missing:
                raise Broken(f"HEAD lacks {', '.join(sorted(missing))}")
            if head.media != get.media:
                raise Broken(f"{head.media or 'no media type'} for HEAD, {get.media} for GET")
            length = head.get("content-length")
            if length is not None and await subject.stable_body() is not None and get.get("content-length") != length:
                raise Broken(f"Content-Length {length} for HEAD, {get.get('content-length')} for GET")
            closes = "close" in (head.get("connection") or "").lower()
            if not closes:
                try:
                    after = await wire.send_on(reader, writer, wire.request("GET", "/health", host=subject.host))
                except wire.NotHTTP as error:
                    raise Broken(f"bytes after the headers of HEAD: {error}") from None
                await after.read(seconds=5)
            return f"{head.line}, {len(head.fields)} header fields, no body"
        finally:
            writer.close()

    @promise("RFC 9112, 6.1 and 9.3")
    async def test_http_1_0_has_no_chunks(self, subject: Subject) -> str:
        """A client of HTTP/1.0 gets the same status, no Transfer-Encoding, and the end of the connection."""
        usual = await subject.response()
        async with subject.request(version="1.0") as response:
            if response.status != usual.status and response.status not in subject.form.statuses:
                raise Broken(f"{response.line}, but {usual.status} for HTTP/1.1")
            if coding := response.get("transfer-encoding"):
                raise Broken(f"Transfer-Encoding: {coding}")
            if "keep-alive" in (response.get("connection") or "").lower():
                raise Broken("Connection: keep-alive, which was not requested")
            if usual.ending is None:
                await response.wait_for_first_byte(seconds=2)
                return f"{response.line}, no chunks, no end"
            await response.read(seconds=5, max_bytes=1 << 22)
            if difference := await subject.differs(bytes(response.body)):
                raise Broken(f"a different body from HTTP/1.1: {difference}")
            if response.ending is None and len(response.body) < (1 << 22):
                raise Broken("the connection stays open after the body")
            return f"{response.line}, {len(response.body)} bytes, closed"

    @promise("RFC 9110, 15.5.6; RFC 9457")
    async def test_other_methods_are_rejected(self, subject: Subject) -> str:
        """Another method gets 405, and Allow lists every method of the path."""
        methods = subject.form.methods
        other = next(method for method in ("DELETE", "PUT", "PATCH", "POST", "GET") if method not in methods)
        headers = {} if other in ("GET", "DELETE") else {"Content-Length": "0"}
        message = wire.request(other, subject.form.target(subject.values), host=subject.host, headers=headers)
        async with wire.send(subject.server.port, message) as response:
            await _rejection(response, {405}, f"for {other}")
            allowed = {method.strip() for method in (response.get("allow") or "").split(",")}
            if missing := methods - allowed:
                raise Broken(f"405 for {other}, but Allow lacks {', '.join(sorted(missing))}")
            return f"405 for {other}, Allow: {response.get('allow')}"

    @promise("RFC 9457, 3; streamlab rejects unknown parameters", of=has_get)
    async def test_unknown_parameters_are_rejected_by_name(self, subject: Subject) -> str:
        """An unknown query parameter is rejected with 400 or 422, and named."""
        target = subject.form.target(subject.values)
        target += f"{'&' if '?' in target else '?'}no_such_parameter=1"
        headers = {"Accept": subject.form.media} if subject.form.media else {}
        message = wire.request(subject.form.method, target, host=subject.host, headers=headers)
        async with wire.send(subject.server.port, message) as response:
            document = await _rejection(response, {400, 422}, "for ?no_such_parameter=1")
            _names(document, "no_such_parameter")
            return f"{response.line}: {document['errors'][0]['detail']}"

    @promise("RFC 9457, 3; RFC 9110, 15.5.21", of=has_invalid_values)
    async def test_invalid_values_are_rejected_by_name(self, subject: Subject) -> str:
        """Each value that a parameter's declaration excludes, or its lack, gets 400 or 422 that names the parameter."""
        tried = 0
        for bad in subject.form.invalid_values():
            if bad.where == "body":
                continue
            await _check_rejected(subject, bad)
            tried += 1
        return f"{tried} values, each rejected with its parameter's name"

    @promise("RFC 9457, 3; RFC 8259", of=has_request_body)
    async def test_invalid_bodies_are_rejected(self, subject: Subject) -> str:
        """A body that is not JSON, has another type, or is excluded by its schema, is rejected with 4xx."""
        tried = 0
        for body, why in (
            (b"{", "for truncated JSON"),
            (b"", "for an empty body"),
            (b"\xff\xfe", "for a body that is not UTF-8"),
        ):
            async with subject.request(body=body) as response:
                await _rejection(response, range(400, 500), why)
            tried += 1
        async with subject.request(headers={"Content-Type": "image/png"}) as response:
            await _rejection(response, {400, 415}, "for a body of the type image/png")
        for bad in subject.form.invalid_values():
            if bad.where == "body":
                await _check_rejected(subject, bad)
                tried += 1
        return f"{tried + 1} bodies, each rejected"

    @promise("OpenAPI 3.1.1, Schema Object; JSON Schema, 6.2", of=has_numbers)
    async def test_numbers_have_bounds(self, subject: Subject) -> str:
        """Every number in a request has a documented minimum and maximum."""
        bounds = []
        for name, schema in subject.form.numbers():
            minimum = schema.get("minimum", schema.get("exclusiveMinimum"))
            maximum = schema.get("maximum", schema.get("exclusiveMaximum"))
            if minimum is None or maximum is None:
                raise Broken(f"{name} has no {'minimum' if minimum is None else 'maximum'}: Field(ge=..., le=...)")
            bounds.append(f"{name} {minimum}..{maximum}")
        return ", ".join(bounds)

    @promise("RFC 9110, 5.5 and 17.2; WHATWG HTML 9.2.6", of=has_texts)
    async def test_client_text_cannot_forge_output(self, subject: Subject) -> str:
        """Text with line breaks, or with HTML, forges no header, no field of an event, no element and no log line."""
        for name in subject.form.texts():
            for value in (FORGED, "\0", "\ud7ff\U0010ffff"):
                async with subject.request(values={name: value}) as response:
                    await response.read(seconds=0.5)
                    where = f"?{name}= with line breaks"
                    if response.status >= 500:
                        raise Broken(f"{response.line} for {where}: {bytes(response.body[:200])!r}")
                    if response.get("x-forged") is not None:
                        raise Broken(f"a header X-Forged for {where}")
                    if response.media == "text/html" and b"<script>forged" in response.body:
                        raise Broken(f"an element of the client's text for {where}")
                    if response.media == "text/event-stream":
                        _look_for_forged(response, where)
        if forged := [line for line in subject.server.log.splitlines() if line.startswith(("id: forged", "X-Forged"))]:
            raise Broken(f"a log line of the client's text: {forged[0]}")
        return f"nothing forged through {', '.join(subject.form.texts())}"

    @promise("RFC 9110, 8.4, 12.5.3 and 12.5.5", of=has_get)
    async def test_compression_is_negotiated(self, subject: Subject) -> str:
        """Only negotiated responses are compressed, with Vary and unchanged content; event streams never are."""
        async with subject.request(headers={"Accept-Encoding": "gzip;q=0, identity"}) as plain:
            if coding := plain.get("content-encoding"):
                raise Broken(f"Content-Encoding: {coding} for Accept-Encoding: gzip;q=0")
        async with subject.request(headers={"Accept-Encoding": "gzip"}) as response:
            coding = response.get("content-encoding")
            if coding is None:
                return "never compressed"
            if subject.form.carries_events:
                raise Broken(f"Content-Encoding: {coding} on an event stream, where it delays events")
            if "accept-encoding" not in (response.get("vary") or "").lower():
                raise Broken(f"Content-Encoding: {coding}, and no Vary: Accept-Encoding")
            await response.read(seconds=5)
            if response.ending is not None and (
                difference := await subject.differs(_decompressed(bytes(response.body)))
            ):
                raise Broken(f"a different body after decompression: {difference}")
            return f"Content-Encoding: {coding}, Vary: {response.get('vary')}"


async def _check_rejected(subject: Subject, bad: InvalidValue) -> None:
    """Send an invalid value. Raises Broken where it is not rejected, or its parameter not named."""
    statuses = {400, 404, 422} if bad.where == "path" else {400, 422}
    options: dict[str, Any] = {"values": {bad.name: bad.value}}
    if bad.value is MISSING and bad.where == "query":
        options = {"without": (bad.name,)}
    elif bad.value is MISSING:
        members = subject.form.body(subject.values)
        options = {"body": json.dumps({name: value for name, value in members.items() if name != bad.name}).encode()}
    async with subject.request(**options) as response:
        document = await _rejection(response, statuses, _described(bad))
        if response.status == 422:
            _names(document, bad.name)


async def _rejection(response: StreamedResponse, statuses: Any, why: str) -> dict[str, Any]:
    """Return the problem document of an error response. Raises Broken where it is not one."""
    await response.read(seconds=5)
    text = bytes(response.body[:300]).decode(errors="replace")
    if response.status not in statuses:
        raise Broken(f"{response.line} {why}: {text}")
    if response.media != PROBLEM:
        raise Broken(f"{response.line} {why}, as {response.media or 'no media type'}, expected {PROBLEM}: {text}")
    try:
        document = json.loads(response.body)
    except ValueError:
        raise Broken(f"{response.line} {why}, with a body that is not JSON: {text}") from None
    if not isinstance(document, dict) or document.get("status") != response.status:
        raise Broken(f"{response.line} {why}, with a document of another status: {text}")
    return document


def _names(document: Mapping[str, Any], name: str) -> None:
    named = [str(error.get("name")) for error in document.get("errors", ())]
    if not any(one.split(".")[0] == name for one in named):
        raise Broken(f"{document['status']} with errors for {', '.join(named) or 'no parameter'}, expected {name}")


def _described(bad: InvalidValue) -> str:
    if bad.value is MISSING:
        return f"without {bad.name}, which {bad.why}"
    shown = repr(bad.value)
    return f"for {bad.name}={shown if len(shown) <= 60 else shown[:57] + '...'}, which {bad.why}"


def _look_for_forged(response: StreamedResponse, where: str) -> None:
    for event in wire.events(bytes(response.body)):
        if event.id == "forged" or event.event == "forged" or event.get("X-Forged") is not None:
            raise Broken(f"an event with a field of the client's text for {where}: {event}")


def _decompressed(body: bytes) -> bytes:
    try:
        return gzip.decompress(body)
    except (OSError, EOFError, zlib.error) as error:
        raise Broken(f"a body that cannot be decompressed: {error}") from None
