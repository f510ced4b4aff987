"""Which content coding a client likes, and bytes in it that never wait for more bytes."""

import asyncio
import zlib

IN_THREAD = 128 * 1024
"""A larger piece is compressed off the loop."""


class GzipEncoder:
    """Compresses a stream piece by piece; each piece can be decompressed whole as soon as it has arrived."""

    name = "gzip"

    def __init__(self) -> None:
        self._compressor = zlib.compressobj(6, wbits=31)

    async def encode(self, data: bytes | bytearray | memoryview) -> bytes:
        """Return the piece compressed and flushed (RFC 1951 section 3.2.4: an empty stored block ends it)."""
        return await asyncio.to_thread(self._encode, data) if len(data) > IN_THREAD else self._encode(data)

    def _encode(self, data: bytes | bytearray | memoryview) -> bytes:
        return self._compressor.compress(data) + self._compressor.flush(zlib.Z_SYNC_FLUSH)

    def finish(self) -> bytes:
        """Return what ends the body: without it, a decompressor sees that something is missing."""
        return self._compressor.flush()


def choose_encoder(accept_encoding: str) -> GzipEncoder | None:
    """Choose by the client's weights: gzip where it likes it no less than identity, None for identity.

    Source: RFC 9110 section 12.5.3; a weight that is no number counts as 0.
    """
    weights: dict[str, float] = {}
    for member in accept_encoding.lower().split(","):
        name, *parameters = (part.strip() for part in member.split(";"))
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        weights[name] = weight
    gzip = weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0)))
    return GzipEncoder() if gzip > 0 and gzip >= weights.get("identity", 0.0) else None
