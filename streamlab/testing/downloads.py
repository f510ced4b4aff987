"""Cases for downloads: ranges and conditions, where an endpoint supports them."""

from .promise import Broken, promise
from .responses import has_get
from .subject import Subject


class Downloads:
    """Cases for endpoints with `Accept-Ranges: bytes`."""

    @promise("RFC 9110, 14.1.2, 14.2, 14.4 and 15.5.17", of=has_get)
    async def test_ranges_return_exact_bytes(self, subject: Subject) -> str:
        """A range gets 206 with exactly its bytes, one past the end 416 with the size; a malformed one is ignored."""
        usual = await subject.response()
        if usual.get("accept-ranges") != "bytes":
            return "no ranges: no Accept-Ranges"
        size, body = int(usual.get("content-length") or 0), bytes(usual.body)
        if size < 20:
            raise Broken(f"Accept-Ranges: bytes, and a body of {size} bytes: choose a longer one in `values`")
        ranges = {"bytes=2-5": (2, 6), f"bytes={size - 3}-": (size - 3, size), "bytes=-3": (size - 3, size)}
        for field, (begin, end) in ranges.items():
            async with subject.request(headers={"Range": field}) as response:
                part = await response.read(seconds=5)
                if response.status != 206 or response.get("content-range") != f"bytes {begin}-{end - 1}/{size}":
                    raise Broken(f"{response.line}, Content-Range: {response.get('content-range')}, for Range: {field}")
                if len(part) != end - begin or (end <= len(body) and part != body[begin:end]):
                    raise Broken(f"{part[:80]!r} for Range: {field}, expected {body[begin:end]!r}")
        async with subject.request(headers={"Range": f"bytes={size}-"}) as response:
            if response.status != 416 or response.get("content-range") != f"bytes */{size}":
                raise Broken(f"{response.line}, {response.get('content-range')}, for a range after the end")
        for field in ("bytes=b-a", "lines=1-2"):
            async with subject.request(headers={"Range": field}) as response:
                if response.status != 200:
                    raise Broken(f"{response.line} for Range: {field}")
        return f"{len(ranges) + 3} ranges of {size} bytes"

    @promise("RFC 9110, 13.1, 13.1.5 and 13.2.2", of=has_get)
    async def test_conditions_are_evaluated(self, subject: Subject) -> str:
        """The current version gets 304, a wrong If-Match 412, and a range of another version the complete file."""
        usual = await subject.response()
        if usual.get("accept-ranges") != "bytes":
            return "no ranges: no Accept-Ranges"
        tag = usual.get("etag")
        if tag is None or tag.startswith("W/"):
            raise Broken(f"Accept-Ranges: bytes without a strong ETag: {tag}")
        for headers, status in (
            ({"If-None-Match": tag}, 304),
            ({"If-Match": '"another"'}, 412),
            ({"Range": "bytes=2-5", "If-Range": tag}, 206),
            ({"Range": "bytes=2-5", "If-Range": '"another"'}, 200),
        ):
            async with subject.request(headers=headers) as response:
                if response.status != status:
                    form = ", ".join(f"{name}: {value}" for name, value in headers.items())
                    raise Broken(f"{response.line} for {form}, expected {status}")
        return f"304, 412, 206 and 200 by the ETag {tag}"
