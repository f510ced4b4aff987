"""Content codings are chosen by weight, and each chunk can be decompressed when it has arrived."""

import zlib

import pytest

from streamlab.streaming.compression import IN_THREAD, GzipEncoder, ZstdEncoder, choose_encoder
from streamlab.threads import Threads


@pytest.mark.parametrize(
    ("field", "chosen"),
    [
        ("gzip", True),
        ("*", True),
        ("*;q=0, gzip", True),
        ("GZIP;Q=0.3", True),
        ("br;q=1, gzip;q=0.1", True),
        ("x-gzip", True),
        ("identity;q=0.5, gzip;q=0.5", True),
        ("", False),
        ("deflate, br", False),
        ("gzip;q=0", False),
        ("gzip;q=x", False),
        ("gzip;q=\u0661", False),
        ("gzip;q=1_0", False),
        ("gzip;q=inf", False),
        ("*;q=0", False),
        ("identity, gzip;q=0.5", False),
    ],
)
def test_coding_is_chosen_by_weight(field: str, chosen: bool) -> None:
    assert (choose_encoder(field) is not None) == chosen


async def test_each_chunk_can_be_read_when_it_has_arrived() -> None:
    encoder, decoder = GzipEncoder(), zlib.decompressobj(wbits=31)
    async with Threads("compress", 1) as threads:
        for chunk in (b"one", b"x" * (IN_THREAD + 1), b"two"):
            assert decoder.decompress(await encoder.encode(chunk, threads)) == chunk
    assert not decoder.eof
    decoder.decompress(encoder.finish())
    assert decoder.eof


async def test_each_chunk_of_zstd_can_be_read_when_it_has_arrived() -> None:
    zstd = pytest.importorskip("backports.zstd", reason="no zstd: Python 3.14 or backports.zstd has it")
    encoder, decoder = ZstdEncoder(), zstd.ZstdDecompressor()
    async with Threads("compress", 1) as threads:
        for chunk in (b"one", b"x" * (IN_THREAD + 1), b"two"):
            assert decoder.decompress(await encoder.encode(chunk, threads)) == chunk
    assert not decoder.eof
    decoder.decompress(encoder.finish())
    assert decoder.eof


@pytest.mark.parametrize(
    ("field", "name"),
    [("zstd", "zstd"), ("gzip, zstd", "zstd"), ("gzip, zstd;q=0.9", "gzip"), ("*", "gzip"), ("zstd;q=0, gzip", "gzip")],
)
def test_zstd_is_chosen_where_its_weight_is_equal(field: str, name: str) -> None:
    pytest.importorskip("backports.zstd", reason="no zstd: Python 3.14 or backports.zstd has it")
    chosen = choose_encoder(field)
    assert chosen is not None
    assert chosen.name == name
