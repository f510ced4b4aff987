"""The URLs of files on disk: published by the plugin that serves a folder, used by plugins that write into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from aiohttp import web


class ServedFiles:
    """The folders that this server serves, each with its URL."""

    def __init__(self) -> None:
        self._folders: dict[Path, str] = {}

    @contextmanager
    def serving(self, folder: Path, url: str) -> Iterator[None]:
        """Publish that files below `folder` are served below `url`, as `/files`, during the block."""
        self._folders[folder] = url
        try:
            yield
        finally:
            del self._folders[folder]

    def url(self, path: Path) -> str | None:
        """Return the URL of a file, None if no plugin serves it."""
        for folder, url in self._folders.items():
            if path.is_relative_to(folder):
                return f"{url}/{quote(path.relative_to(folder).as_posix(), errors='surrogateescape')}"
        return None


FILES = web.AppKey("files", ServedFiles)
"""Key of the application: the URLs of files on disk.

`serving(folder, url)` publishes a folder during its block, `url(path)` returns the URL of a file in one, or None.
"""
