"""Parse a configured SQL statement for its parameters, as PostgreSQL reads it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .source import BadQuery

_TOKEN = re.compile(
    r"""
      (?P<comment> --[^\n\r]* )
    | (?P<block> /\* )
    | (?P<other>
        [eE]'(?:[^'\\]|\\.|'')*+'  # continues after a line break, with the same rules
            (?:(?:[ \t\f\v]|--[^\n\r]*+)*+[\n\r](?:[ \t\f\v\n\r]|--[^\n\r]*+[\n\r])*+'(?:[^'\\]|\\.|'')*+')*+
      | '[^']*+(?:''[^']*+)*+'
      | "[^"]*+(?:""[^"]*+)*+"
      | \$(?P<tag>(?:[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*+)?)\$.*?\$(?P=tag)\$
      | [A-Za-z_\x80-\U0010ffff][A-Za-z0-9_$\x80-\U0010ffff]*+
      | :: | :=
      )
    | (?P<number> \$[0-9]+ )
    | : (?P<name> [A-Za-z_][A-Za-z0-9_]*+ )
    | (?P<semicolon> ; )
    | (?P<space> [ \t\n\r\f\v]+ )
    """,
    re.VERBOSE | re.DOTALL,
)
"""The tokens that matter for finding parameters. Source: PostgreSQL, src/backend/parser/scan.l."""

_BLOCK = re.compile(r"/\*|\*/")


@dataclass(frozen=True, slots=True)
class Statement:
    """A configured SQL statement, split at its parameters: `texts` has one more than `names`."""

    texts: Sequence[str]
    names: Sequence[str]

    @classmethod
    def parse(cls, sql: str) -> "Statement":
        """Find `:name` outside of strings, quoted names, comments and casts; one semicolon at the end is dropped.

        The slice `a[x:y]` has to be written with a space, `a[x: y]`. Invalid SQL is left unchanged, so that PostgreSQL
        reports the error. Raises BadQuery for `$1`.
        """
        texts, names = [""], []
        position, last = 0, ""  # last: a semicolon that nothing has followed so far
        while position < len(sql):
            match = _TOKEN.match(sql, position)
            kind = match.lastgroup if match else "other"
            text = match[0] if match else sql[position]
            if kind == "block":
                text = sql[position : _block_end(sql, position)]
            position += len(text)
            if kind not in ("comment", "block", "space"):
                texts[-1] += last
                last = ""
            if kind == "number":
                raise BadQuery(f"{text}: parameters are written by name, as :name")
            if kind == "semicolon":
                last = text
            elif kind == "name":
                names.append(text[1:])
                texts.append("")
            else:
                texts[-1] += text
        return cls(texts, names)

    def text(self, write: Callable[[str], str]) -> str:
        """Return the SQL with `write(name)` in place of each parameter."""
        # The spaces separate it: a$1 would be a name.
        written = [f" {write(name)} {text}" for name, text in zip(self.names, self.texts[1:], strict=True)]
        return self.texts[0] + "".join(written)


def _block_end(sql: str, start: int) -> int:
    """Return the end of a comment, which may contain comments."""
    depth = 0
    for match in _BLOCK.finditer(sql, start):
        depth += 1 if match[0] == "/*" else -1
        if depth == 0:
            return match.end()
    return len(sql)
