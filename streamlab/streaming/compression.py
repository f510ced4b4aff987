"""Which content coding a client likes, and bytes in it that never wait for more bytes."""

import importlib
from abc import ABC, abstractmethod
from typing import Any

from isal import isal_zlib

from streamlab.negotiation import weights
from streamlab.threads import Threads

IN_THREAD = 128 * 1024
"""Size in bytes above which a chunk is compressed in a thread."""


class Encoder(ABC):
    """Compresses a stream chunk by chunk; each can be decompressed completely as soon as it has arrived."""

    name: str

    async def encode(self, data: bytes | bytearray | memoryview, threads: Threads) -> bytes:
        """Return the chunk compressed and flushed; a large one is compressed in a thread."""
        return await threads.run(self._encode, data) if len(data) > IN_THREAD else self._encode(data)

    @abstractmethod
    def _encode(self, data: bytes | bytearray | memoryview) -> bytes: ...

    @abstractmethod
    def finish(self) -> bytes:
        """Return the end of the body, without which a decompressor reports truncation."""


class GzipEncoder(Encoder):
    """RFC 1952, by ISA-L: the size of zlib at its lowest level, at several times the speed."""

    name = "gzip"

    def __init__(self) -> None:
        self._compressor = isal_zlib.compressobj(1, wbits=31)

    def _encode(self, data: bytes | bytearray | memoryview) -> bytes:
        # RFC 1951 section 3.2.4: an empty stored block ends the chunk.
        return self._compressor.compress(data) + self._compressor.flush(isal_zlib.Z_SYNC_FLUSH)

    def finish(self) -> bytes:
        """Return the last block and the checksum."""
        return bytes(self._compressor.flush())


class ZstdEncoder(Encoder):
    """RFC 8878, with Python 3.14 or `backports.zstd`."""

    name = "zstd"

    def __init__(self) -> None:
        self._compressor = _ZSTD.ZstdCompressor(level=1)

    def _encode(self, data: bytes | bytearray | memoryview) -> bytes:
        return bytes(self._compressor.compress(data, mode=self._compressor.FLUSH_BLOCK))

    def finish(self) -> bytes:
        """Return the end of the frame."""
        return bytes(self._compressor.flush(mode=self._compressor.FLUSH_FRAME))


def _zstd() -> Any:
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    return None


_ZSTD = _zstd()


def choose_encoder(accept_encoding: str) -> Encoder | None:
    """Choose by the client's weights: zstd or gzip where it likes that no less than identity, None for identity.

    Of two that it likes equally well zstd is taken, if it names that; what it calls `*` is gzip.
    Source: RFC 9110 section 12.5.3.
    """
    liked = weights(accept_encoding)
    gzip = liked.get("gzip", liked.get("x-gzip", liked.get("*", 0.0)))
    zstd = liked.get("zstd", 0.0) if _ZSTD is not None else 0.0
    best = max(gzip, zstd)
    if best <= 0 or best < liked.get("identity", 0.0):
        return None
    return ZstdEncoder() if zstd == best else GzipEncoder()
