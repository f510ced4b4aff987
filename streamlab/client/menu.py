"""The command `streamlab client`: a menu of the terminal views that plugins provide.

Ctrl-C ends a view and leads back to the menu, where it exits.
"""

import asyncio
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import typer

from .http import ConnectionLost, RequestRejected, request_json
from .terminal import print_error
from .transfer import IntegrityError
from .views import EndOfInput, Terminal, ViewError, prompt

View = Callable[[Terminal], None]

FAILURES = (ViewError, IntegrityError, RequestRejected, ValueError, OSError)
"""The errors that end a view with one line."""


def run(url: str, views: Mapping[str, View], names: Sequence[str] = ()) -> int:
    """Open the views called `names`, or else the menu, for the server at `url`; return the exit status.

    0 after quit or the end of the input; 1 where the server is unreachable, or a named view failed; 2 for an invalid
    URL or an unknown view; 130 after Ctrl-C outside of a view.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show what servers send
    menu = _Menu(Terminal(url.rstrip("/")), views)
    if unknown := [name for name in names if name not in views]:
        print_error(f"streamlab: unknown view {unknown[0]!r}; the views are {', '.join(views)}")
        return 2
    try:
        menu.check_server()
        if names:
            succeeded = [menu.open(name) for name in names]
            return int(not all(succeeded))
        menu.choose()
    except EndOfInput:
        print()
    except KeyboardInterrupt:
        print()
        return 130
    except ValueError as error:
        print_error(f"streamlab: {error}")
        return 2
    except ConnectionLost as lost:
        print_error(f"streamlab: {lost}")
        return 1
    return 0


class _Menu:
    """The views of one server, and the choice between them."""

    def __init__(self, terminal: Terminal, views: Mapping[str, View]) -> None:
        self._terminal = terminal
        self._views = views

    def check_server(self) -> None:
        """Raise ConnectionLost where the server is unreachable, and ValueError for an invalid URL."""
        with suppress(RequestRejected):  # an unhealthy server, or one without this route, is reachable
            asyncio.run(request_json("GET", f"{self._terminal.url}/health"))

    def choose(self) -> None:
        """Prompt for a view and open it, until the choice is to quit."""
        names = [*self._views, "quit"]
        while True:
            self._terminal.print()
            for number, (name, view) in enumerate(self._views.items(), start=1):
                title = (view.__doc__ or "").partition("\n")[0]
                self._terminal.print(f"  {number}  {name:<11} {title}".rstrip())
            self._terminal.print(f"  {len(names)}  quit")
            if (chosen := self._prompt(names)) == "quit":
                return
            self.open(chosen)

    @staticmethod
    def _prompt(names: Sequence[str]) -> str:
        """Return the name that is chosen by its number, or by a prefix that is unique."""
        while True:
            reply = prompt("view").lower()
            if reply.isascii() and reply.isdigit() and 0 < int(reply) <= len(names):
                return names[int(reply) - 1]
            matching = [name for name in names if reply and name.startswith(reply)]
            if len(matching) == 1:
                return matching[0]
            if reply:
                print_error(f"{reply!r} is not in the menu")

    def open(self, name: str) -> bool:
        """Run a view; return whether it succeeded, or was stopped by Ctrl-C."""
        try:
            self.check_server()
            self._views[name](self._terminal)
        except KeyboardInterrupt:
            self._terminal.print("\n[stopped]")
        except typer.Exit as exit_:  # of a command that has printed its error
            return exit_.exit_code in (0, 130)
        except FAILURES as error:
            print_error(f"streamlab: {error}")
            return False
        return True
