"""What a download promises: ranges and conditions, where an endpoint says that it takes them."""

from .answers import takes_get
from .promise import NotKept, promise
from .subject import Subject


class Downloads:
    """What is asked of endpoints that say `Accept-Ranges: bytes`."""

    @promise("RFC 9110, 14.1.2, 14.2, 14.4 and 15.5.17", of=takes_get)
    async def test_ranges_are_parts_of_the_whole(self, subject: Subject) -> str:
        """A range is 206 with just its bytes, one that lies outside is 416 with the length, a malformed one ignored."""
        usual = await subject.answered()
        if usual.get("accept-ranges") != "bytes":
            return "no ranges: no Accept-Ranges"
        size, body = int(usual.get("content-length") or 0), bytes(usual.body)
        if size < 20:
            raise NotKept(f"Accept-Ranges: bytes, and a body of {size} bytes: with `values`, choose a longer one")
        wanted = {"bytes=2-5": (2, 6), f"bytes={size - 3}-": (size - 3, size), "bytes=-3": (size - 3, size)}
        for field, (begin, end) in wanted.items():
            async with subject.ask(headers={"Range": field}) as answer:
                part = await answer.read(seconds=5)
                if answer.status != 206 or answer.get("content-range") != f"bytes {begin}-{end - 1}/{size}":
                    raise NotKept(f"{answer.line}, Content-Range: {answer.get('content-range')}, for Range: {field}")
                if len(part) != end - begin or (end <= len(body) and part != body[begin:end]):
                    raise NotKept(f"{part[:80]!r} for Range: {field}, and {body[begin:end]!r} stands there")
        async with subject.ask(headers={"Range": f"bytes={size}-"}) as answer:
            if answer.status != 416 or answer.get("content-range") != f"bytes */{size}":
                raise NotKept(f"{answer.line}, Content-Range: {answer.get('content-range')}, for a range after the end")
        for field in ("bytes=b-a", "lines=1-2"):
            async with subject.ask(headers={"Range": field}) as answer:
                if answer.status != 200:
                    raise NotKept(f"{answer.line} for Range: {field}")
        return f"{len(wanted) + 3} ranges of {size} bytes"

    @promise("RFC 9110, 13.1, 13.1.5 and 13.2.2", of=takes_get)
    async def test_conditions_are_heeded(self, subject: Subject) -> str:
        """What the client has is 304, a wrong If-Match is 412, and a range of another version gets the whole."""
        usual = await subject.answered()
        if usual.get("accept-ranges") != "bytes":
            return "no ranges: no Accept-Ranges"
        tag = usual.get("etag")
        if tag is None or tag.startswith("W/"):
            raise NotKept(f"Accept-Ranges: bytes, and no strong ETag to resume by: {tag}")
        for headers, status in (
            ({"If-None-Match": tag}, 304),
            ({"If-Match": '"another"'}, 412),
            ({"Range": "bytes=2-5", "If-Range": tag}, 206),
            ({"Range": "bytes=2-5", "If-Range": '"another"'}, 200),
        ):
            async with subject.ask(headers=headers) as answer:
                if answer.status != status:
                    asked = ", ".join(f"{name}: {value}" for name, value in headers.items())
                    raise NotKept(f"{answer.line}, and not {status}, for {asked}")
        return f"304, 412, 206 and 200 by the ETag {tag}"
