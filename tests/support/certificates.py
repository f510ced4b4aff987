"""Certificates for servers under test, each of an authority that signs nothing else."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import trustme


class Pair:
    """A certificate for localhost and its key."""

    def __init__(self) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("localhost")
        self.key = issued.private_key_pem.bytes()
        self.certificate = issued.cert_chain_pems[0].bytes()
        self._client = ssl.create_default_context()
        authority.configure_trust(self._client)

    def write(self, certificate: Path, key: Path) -> None:
        key.write_bytes(self.key)
        certificate.write_bytes(self.certificate)

    @contextlib.contextmanager
    def connected(self, port: int, *, sni: bool = True) -> Iterator[ssl.SSLSocket]:
        """Yield a connection to a server with this pair; raises SSLCertVerificationError where it has another."""
        self._client.check_hostname = sni
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            self._client.wrap_socket(plain, server_hostname="localhost" if sni else None) as connection,
        ):
            yield connection
