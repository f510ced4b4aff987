"""The measuring client: a separate process that downloads over raw sockets and prints the results as JSON."""

import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

BUFFER = 4 * 1024 * 1024


def fetch(port: int, hashed: bool, timeout: float, ready: threading.Barrier) -> tuple[float, float, int, str]:
    """Download once; return the times of the first and last byte (perf_counter), their number, and their SHA-256.

    Unless `hashed`, the kernel discards the body (MSG_TRUNC) and the digest is meaningless. `timeout`: seconds without
    a byte. Raises OSError or ValueError unless the response is exactly as long as its Content-Length.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER))
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        # A timeout of the kernel: Python's would cost a poll before every read.
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(timeout), 0))
        ready.wait(timeout)
        head = f"GET /download/large-file HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        response = b""
        while b"\r\n\r\n" not in response:
            if not (chunk := connection.recv(16 * 1024)):
                raise ValueError(f"the response ended within its headers: {response!r}")
            response += chunk
        fields, _, body = response.partition(b"\r\n\r\n")
        declared = re.search(rb"(?im)^content-length: *(\d+)\r?$", fields)
        if declared is None or not fields.startswith(b"HTTP/1.1 200 "):
            raise ValueError(f"not a 200 with a Content-Length: {fields!r}")
        length, received = int(declared[1]), len(body)
        digest.update(body)
        if not body:
            connection.recv(1, socket.MSG_PEEK)
        first = time.perf_counter()
        flags = 0 if hashed else socket.MSG_TRUNC
        while received < length and (count := connection.recv_into(buffer, 0, flags)):
            received += count
            if hashed:
                digest.update(buffer[:count])
        ended = time.perf_counter()
        received += len(connection.recv(1))  # empty, unless the server sends more than Content-Length
    if received != length:
        raise ValueError(f"Content-Length is {length}, but {received} bytes arrived")
    return first, ended, received, digest.hexdigest()


def measure(port: int, streams: int, hashed: bool, timeout: float) -> dict[str, object]:
    """Download in `streams` threads at once; seconds count from the first request to the first and last byte."""
    begun: list[float] = []
    # The clocks start when all connections are open: before that, only Python starts.
    ready = threading.Barrier(streams, lambda: begun.extend((time.perf_counter(), time.process_time())))
    with ThreadPoolExecutor(streams) as pool:
        downloads = list(pool.map(lambda _: fetch(port, hashed, timeout, ready), range(streams)))
    return {
        "first": min(first for first, _, _, _ in downloads) - begun[0],
        "seconds": max(ended for _, ended, _, _ in downloads) - begun[0],
        "cpu": time.process_time() - begun[1],
        "received": [count for _, _, count, _ in downloads],
        "sha256": downloads[0][3],
    }


def main(port: int, streams: int, hashed: bool, timeout: float, times: int) -> None:
    """Measure `times` times, one after the other, and print all results."""
    print(json.dumps([measure(port, streams, hashed, timeout) for _ in range(times)]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "hash", float(sys.argv[4]), int(sys.argv[5]))
