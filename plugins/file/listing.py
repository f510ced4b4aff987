"""The listing of a folder, as JSON or as a page: every name that it has can be downloaded by its link."""

import heapq
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from streamlab import weights

JSON_NAMES, PAGE_NAMES = 1000, 10_000
"""Default maximum number of names in a listing as JSON, and as a page: tools that read pages expect all names."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a folder in a folder."""

    name: str
    is_folder: bool
    size: int
    """Size in bytes."""
    modified: datetime

    @property
    def link(self) -> str:
        """The link to it, relative to its folder: programs that copy folders expect these."""
        return quote(self.name, safe="", errors="surrogateescape") + ("/" if self.is_folder else "")


@dataclass(frozen=True, slots=True)
class Listing:
    """A page of the entries of a folder, in the order of their names."""

    parts: tuple[str, ...]
    """The path of the folder below the served one."""
    entries: list[Entry]
    after: str
    """The name that this page follows; empty for the first page."""
    limit: int
    """The maximum number of its names."""
    next_after: str | None
    """The last name of this page; None if it is the last page."""

    @property
    def url(self) -> str:
        """The path of its URL."""
        return quote("/".join(["/files", *self.parts, ""]), errors="surrogateescape")

    @property
    def next(self) -> str | None:
        """The path and query of the next page."""
        if self.next_after is None:
            return None
        return f"{self.url}?limit={self.limit}&after={quote(self.next_after, safe='', errors='surrogateescape')}"

    def document(self, public: Callable[[str], str]) -> dict[str, Any]:
        """Return it for JSON; `public` returns a path as clients have to send it."""
        entries = [
            {
                "name": shown(entry.name),
                "type": "folder" if entry.is_folder else "file",
                "modified": entry.modified.isoformat(),
                "url": public(self.url + entry.link),
                **({} if entry.is_folder else {"size": entry.size}),
            }
            for entry in self.entries
        ]
        next_after = None if self.next_after is None else shown(self.next_after)
        following = None if self.next is None else public(self.next)
        return {"path": shown("/".join(self.parts)), "entries": entries, "next_after": next_after, "next": following}

    def page(self, account: str = "") -> str:
        """Return it as HTML, with the HTML of the link to sign in; all other links are relative."""
        root = "../" * (len(self.parts) + 1)
        title = escape(shown("/".join(["/files", *self.parts, ""])))
        links = [f'<a href="../">{"Parent folder" if self.parts else "All routes"}</a>']
        if self.after:
            links.append('<a href="./">First names</a>')
        links += [account] if account else []
        rows = "".join(
            f'<tr><td><a href="{escape(entry.link)}">{escape(shown(entry.name))}{"/" * entry.is_folder}</a></td>'
            f"<td>{'folder' if entry.is_folder else f'{entry.size:,}'}</td>"
            f'<td><time datetime="{entry.modified.isoformat()}">{entry.modified:%Y-%m-%d %H:%M:%S}</time></td></tr>\n'
            for entry in self.entries
        )
        head = '<tr><th scope="col">Name</th><th scope="col">Bytes</th><th scope="col">Changed (UTC)</th></tr>'
        table = f"<table>\n<thead>{head}</thead>\n<tbody>\n{rows}</tbody></table>"
        if not rows:
            table = f"<p>{'There are no more names.' if self.after else 'This folder is empty.'}</p>"
        more = f'<p><a href="{escape(self.next.removeprefix(self.url))}">More names</a></p>' if self.next else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{title}</title>\n<link rel="stylesheet" href="{root}assets/site.css">\n</head>\n'
            f'<body class="listing">\n<main>\n<h1>{title}</h1>\n'
            f"<p>{' · '.join(links)}</p>\n{table}\n{more}</main>\n</body>\n</html>\n"
        )


def read(
    descriptor: int,
    root: Path,
    parts: tuple[str, ...],
    *,
    after: str,
    limit: int,
    hidden: bool,
    may_see: Callable[[str, bool], bool],
) -> Listing:
    """Read the folder that is open at `descriptor`, without what cannot be downloaded. Runs in a thread.

    `may_see` returns whether a client may see a name, and whether it is that of a folder. Other names do not count for
    the page either: its last name is also where the next one begins.
    """
    home = Path(os.path.realpath(root))
    listed = (name for name in os.listdir(descriptor) if name > after and (hidden or name[0] != "."))
    chosen = heapq.nsmallest(limit + 1, (name for name in listed if may_see(name, True)))
    found = [entry for name in chosen[:limit] if (entry := _entry(home, parts, name)) is not None]
    entries = [entry for entry in found if may_see(entry.name, entry.is_folder)]
    return Listing(parts, entries, after, limit, chosen[limit - 1] if len(chosen) > limit else None)


def _entry(home: Path, parts: tuple[str, ...], name: str) -> Entry | None:
    """Return the entry of a name; None for what is neither file nor folder, leads elsewhere, or cannot be read."""
    target = home.joinpath(*parts, name)
    try:
        status = target.stat()
    except OSError:
        return None
    is_folder = stat.S_ISDIR(status.st_mode)
    if not (is_folder or stat.S_ISREG(status.st_mode)) or not Path(os.path.realpath(target)).is_relative_to(home):
        return None
    if not os.access(target, os.R_OK | os.X_OK if is_folder else os.R_OK):
        return None
    return Entry(name, is_folder, status.st_size, datetime.fromtimestamp(int(status.st_mtime), UTC))


def prefers_json(accept: str) -> bool:
    """Return whether a client prefers JSON to HTML; HTML is for all that have no preference (RFC 9110, 12.5.1)."""
    accepted = weights(accept)

    def weight(media: str, group: str) -> float:
        return accepted.get(media, accepted.get(group, accepted.get("*/*", 0.0)))

    json, html = weight("application/json", "application/*"), weight("text/html", "text/*")
    return json > html or (json == html > 0 and "application/json" in accepted and "text/html" not in accepted)


def shown(name: str) -> str:
    """Return a name for people, with U+FFFD in place of bytes that are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")
