"""Sphinx: the pages of this folder as a site, without a network; `make docs` turns every warning into an error."""

import ast
import importlib
import inspect
import re
import sys
from importlib.metadata import version as installed_version
from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

project = "streamlab"
version = release = installed_version("streamlab")
extensions = ["myst_parser", "sphinx.ext.autodoc"]

# The anchors of headings are those of code hosts, so that the same link works in both.
myst_heading_anchors = 4
# Indented blocks are commands and their output.
highlight_language = "text"
nitpicky = True

html_theme = "furo"
html_title = f"streamlab {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# The pages are in the repository.
html_copy_source = False
html_show_sphinx = False
html_theme_options: dict[str, Any] = {"top_of_page_buttons": []}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
# A parameter a line, which fits a phone.
maximum_signature_line_length = 60
toc_object_entries_show_parents = "hide"

IMPORTS = re.compile(r"^```python\n(from (streamlab[.\w]*) import .*?)```$", re.MULTILINE | re.DOTALL)
PUBLIC_MODULES = ("streamlab", "streamlab.client", "streamlab.testing")


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Make the contents of the site from the links of index.md: a list for each heading, in the same order."""
    if page != "index":
        return
    for heading, section in re.findall(r"^## (.+)\n((?:(?!## ).*\n)+)", source[0], re.MULTILINE):
        pages = [f"{title} <{name}>" for title, name in re.findall(r"\[(.+)\]\((\w+)\.md\)", section)]
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n" + "\n".join(pages) + "\n```\n"


def add_reference(app: Sphinx, page: str, source: list[str]) -> None:
    """Add the docstrings of the names that a section of api.md imports to the end of that section."""
    if page != "api":
        return
    sections = re.split(r"^(?=## )", source[0], flags=re.MULTILINE)
    source[0] = "\n".join(section + reference(section) for section in sections)


def reference(section: str) -> str:
    """Return the directives for the names that a section imports, with the members that it names."""
    words = {word for span in re.findall(r"`([^`\n]+)`", section) for word in re.findall(r"\w+", span)}
    lines: list[str] = []
    for block, module in IMPORTS.findall(section):
        (statement,) = ast.parse(block).body
        assert isinstance(statement, ast.ImportFrom)
        for name in (alias.name for alias in statement.names):
            value = getattr(importlib.import_module(module), name)
            if inspect.isclass(value):
                members = sorted(words & members_of(value))
                lines += [f".. autoclass:: {module}.{name}", *([f"   :members: {', '.join(members)}"] * bool(members))]
                lines += ["   :special-members: __call__"] * ("__call__" in vars(value))
            elif inspect.isfunction(value):
                lines.append(f".. autofunction:: {module}.{name}")
            else:
                lines += [f".. py:data:: {module}.{name}", "", *as_rst(constant(module, name), "   ")]
            lines.append("")
    return "\n```{eval-rst}\n" + "\n".join(lines) + "```\n" if lines else ""


def members_of(value: type) -> set[str]:
    """Return the names of the members of a class that have a docstring, inherited ones included."""
    found = {name for name in dir(value) if not name.startswith("_") and inspect.getdoc(getattr(value, name))}
    for base in value.__mro__:
        if base.__module__.partition(".")[0] == project:
            documented = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
            found |= {name for owner, name in documented if owner == base.__name__}
    return found


def constant(module: str, name: str) -> list[str]:
    """Return the docstring of a constant, which is in the module that defines it."""
    for node in ast.parse(inspect.getsource(importlib.import_module(module))).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            lines: list[str] = ModuleAnalyzer.for_module(f"{module}.{node.module}").find_attr_docs()["", name]
            return lines
    raise SphinxError(f"{module}.{name} has no docstring")


def as_rst(lines: list[str], indent: str = "") -> list[str]:
    """Return a docstring, which has single backticks around code, as reStructuredText."""
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    return [f"{indent}{line}".rstrip() for line in text.split("\n")]


def complete(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Add the values of the constants that a docstring names."""
    constants = vars(sys.modules.get(getattr(getattr(value, "fget", value), "__module__", None) or "", ast))

    def with_value(found: re.Match[str]) -> str:
        known = constants.get(found[1])
        return f"{found[0]} ({known:,})" if isinstance(known, int | float) else found[0]

    lines[:] = [re.sub(r"`?\b([A-Z]{3,}(?:_[A-Z]+)+)\b`?", with_value, line) for line in as_rst(lines)]


def find_type(app: Sphinx, env: Any, node: pending_xref, text: Element) -> Element | None:
    """Link the type in a signature to its entry; one of another package, or an internal one, remains text."""
    if node["refdomain"] != "py":
        return None
    for module in PUBLIC_MODULES:
        for name in importlib.import_module(module).__all__:
            value = getattr(importlib.import_module(module), name)
            if node["reftarget"] == f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}":
                anchor = f"{module}.{name}"
                return make_refnode(app.builder, node["refdoc"], "api", anchor, text, anchor)
    return text


def link_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Make links to files outside this folder downloads, of Markdown too; a link to a folder becomes plain text."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        return text if (app.srcdir / target).is_dir() else f"[{text}](path:{target})"

    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#\s]+)[^)\s]*\)", link, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions of this file."""
    app.connect("source-read", add_contents)
    app.connect("source-read", add_reference)
    app.connect("source-read", link_files)
    app.connect("autodoc-process-docstring", complete)
    app.connect("missing-reference", find_type)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
