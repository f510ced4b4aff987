"""The text of README and of the pages in docs/, and the plugins that they show."""

import re
import textwrap

from tests.support.servers import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))
}
"""The text of each page, by its path."""


def blocks(page: str, language: str) -> list[str]:
    """Return the blocks of code in one language (the words after the three backticks) of a page, also inside a list."""
    fences = re.finditer(rf"^( *)```{re.escape(language)}\n(.*?)^\1```", PAGES[page], re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(fence[2]) for fence in fences]


def shown_plugin(page: str, marker: str) -> str:
    """Return the plugin on a page that contains `marker`."""
    (found,) = (block for block in blocks(page, "python") if marker in block and "def register_" in block)
    return found


COUNTDOWN = shown_plugin("README.md", "class Countdown")
VOTES = shown_plugin("docs/events.md", "class Votes")
THUMBNAILS = shown_plugin("docs/tasks.md", "async def thumbnails")
