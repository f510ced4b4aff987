"""Parts of the configuration that cannot work on this machine: its address, files and folders, before a start."""

import os
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from streamlab.auth import Scope
from streamlab.config import Config, ConfigError, Fault

from .authorization import load_verifier
from .edge import is_local

MAX_SOCKET_PATH = 107
"""Maximum length of the path of a Unix socket, in bytes (`sun_path` of Linux, without the zero at its end)."""


def faults(config: Config) -> list[Fault]:
    """Return what the server itself cannot use on this machine; nothing is created. Blocks."""
    return [
        *host_faults(config),
        *_jwt_faults(config),
        *_tls(config)[1],
        *folder_faults(config),
        *event_log_faults(config),
        *worker_faults(config),
        *_log_file_faults(config),
    ]


def startable(config: Config) -> ssl.SSLContext | None:
    """Return the TLS context of the server, or None; raises ConfigError with all that prevents a start. Blocks."""
    context, found = _tls(config)
    found = [*host_faults(config), *found, *event_log_faults(config), *worker_faults(config)]
    if found:
        raise ConfigError(found)
    return context


def host_faults(config: Config) -> list[Fault]:
    """Return what is wrong with the address to listen on. Blocks."""
    return list(address_faults(config)) or list(exposure_faults(config))


def address_faults(config: Config) -> Iterator[Fault]:
    """Yield a fault if no socket can be bound to the host, whatever the port: that may belong to a running server."""
    host, reason = config.server.host, ""
    if (path := config.server.socket) is not None:
        if reason := _unusable(path):
            yield config.fault(("server", "host"), f"cannot listen on it: {reason}", host)
        return
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                with closing(socket.socket(family, kind, protocol)) as probe:
                    probe.bind(address)
                    return
            except OSError as error:
                reason = error.strerror or str(error)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "is not a valid host name"
    yield config.fault(("server", "host"), f"cannot listen on it: {reason}", host)


def _unusable(path: Path) -> str:
    """Return why a Unix socket cannot be created at a path; empty if it can, or if there is one."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        return f"the path is longer than {MAX_SOCKET_PATH} bytes"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"this user may not write into {path.parent}"
    is_other = os.path.lexists(path) and not (path.is_socket() and not path.is_symlink())
    return "there is a file of this name that is not a socket" if is_other else ""


def exposure_faults(config: Config) -> Iterator[Fault]:
    """Yield a fault if others can connect and the configuration does not say who may do what."""
    host, auth = config.server.host, config.auth
    if auth.open is None and not auth.restricts and not is_local(config.server):
        reason = (
            "others can connect to this address, and nothing says what they may do: add a token to [auth.tokens] "
            "(`streamlab token NAME` prints one), or set open = true in [auth] to let everybody do everything"
        )
        yield config.fault(("server", "host"), reason, host)


def scope_warnings(config: Config) -> Iterator[Fault]:
    """Yield the tokens that may do something with every scenario, and never expire; and such scopes of everybody."""
    if everywhere := [text for text in config.auth.anonymous if Scope.parse(text).scenario == "*"]:
        reason = "is for every scenario, and for everybody: name the scenarios, or set open = true instead"
        yield config.fault(("auth", "anonymous"), reason, everywhere)
    for name, token in config.auth.tokens.items():
        wide = [text for text in token.allow if Scope.parse(text).scenario == "*"]
        if wide and token.expires is None:
            reason = "is for every scenario, and the token never expires: name the scenarios, or set expires"
            yield config.fault(("auth", "tokens", name, "allow"), reason, wide)


def _jwt_faults(config: Config) -> Sequence[Fault]:
    try:
        load_verifier(config)
    except ConfigError as error:
        return error.faults
    return ()


# -- TLS


class _Encrypted(Exception):
    """A key has a passphrase."""


def _no_passphrase() -> str:
    raise _Encrypted


def _tls(config: Config) -> tuple[ssl.SSLContext | None, list[Fault]]:
    certificate, key = config.server.tls_certificate, config.server.tls_key
    if certificate is None or key is None:
        return None, []

    def fault(name: str, path: Path, reason: str) -> Fault:
        return config.fault(("server", name), reason, path)

    files = {"tls_certificate": certificate, "tls_key": key}
    if found := [fault(name, path, reason) for name, path in files.items() if (reason := _unreadable(path))]:
        return None, found
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate)
    except ssl.SSLError:
        return None, [fault("tls_certificate", certificate, "contains no valid certificate in PEM format")]
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except _Encrypted:
        reason = "is encrypted, and the server cannot ask for its passphrase; `openssl pkey -in FILE` decrypts it"
        return None, [fault("tls_key", key, reason)]
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return None, [fault("tls_key", key, "is not the key of tls_certificate")]
        reason = f"cannot be used: {error.reason}" if error.reason else "contains no valid private key in PEM format"
        return None, [fault("tls_key", key, reason)]
    return context, []


def _unreadable(path: Path) -> str:
    """Return why a file cannot be read; empty if it can."""
    try:
        path.open("rb").close()
    except OSError as error:
        return error.strerror or "cannot be read"
    return ""


# -- folders, and files that are written


def folder_faults(config: Config) -> Iterator[Fault]:
    """Yield the configured plugin folders that do not exist. The default folder need not exist."""
    for folder in config.plugins.path if "path" in config.plugins.model_fields_set else ():
        if not folder.is_dir():
            reason = "is not a folder" if folder.exists() else "there is no such folder"
            yield config.fault(("plugins", "path"), f"{folder}: {reason}")


def written_paths(config: Config) -> list[Path]:
    """Return what the server writes: the folder `var` beside the configuration, and other files that it names."""
    folder, files = config.base / "var", (_event_file(config), config.server.log_file)
    return [folder, *(file for file in files if file is not None and not file.is_relative_to(folder))]


def _event_file(config: Config) -> Path | None:
    scheme, _, path = config.events.url.partition(":///")
    return Path(path) if scheme == "sqlite" and path else None


def event_log_faults(config: Config) -> Iterator[Fault]:
    """Yield a fault if the file of the event log can be neither written nor created, or memory is to survive."""
    if config.events.url == "sqlite://" and config.events.durability == "machine":
        reason = (
            "is impossible with url = sqlite://, which is memory: set a file, as sqlite:///var/streamlab.db, or a "
            "server, as redis://localhost:6379/0"
        )
        yield config.fault(("events", "durability"), reason, config.events.durability)
    file = _event_file(config)
    if file is not None and (reason := _unwritable(file, with_folder=True)):
        reason = f"cannot store events there: {file}: {reason}; sqlite:// stores them in memory"
        yield config.fault(("events", "url"), reason)


def worker_faults(config: Config) -> Iterator[Fault]:
    """Yield a fault if several workers would have an event log each."""
    if config.events.url == "sqlite://" and config.server.processes > 1:
        reason = (
            f"is the memory of one process, and there are {config.server.processes} workers: set a file, as "
            "sqlite:///var/streamlab.db, or a server, as redis://localhost:6379/0; or workers = 1 in [server]"
        )
        yield config.fault(("events", "url"), reason, config.events.url)


def _log_file_faults(config: Config) -> Iterator[Fault]:
    file = config.server.log_file
    if file is not None and (reason := _unwritable(file)):
        yield config.fault(("server", "log_file"), f"cannot be written: {file}: {reason}")


def _unwritable(path: Path, *, with_folder: bool = False) -> str:
    """Return why a file can be neither written nor created, empty if it can; `with_folder` if its folder must be, too.

    Functions of os.path never raise.
    """
    if os.path.isdir(path):  # noqa: PTH112
        return "it is a folder"
    exists = os.path.exists(path)  # noqa: PTH110
    if exists and not os.access(path, os.W_OK):
        return "this user may not write it"
    if exists and not with_folder:
        return ""
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))  # noqa: PTH110
    if not os.path.isdir(folder):  # noqa: PTH112
        return f"{folder} is not a folder"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"this user may not write into {folder}"
