"""A configured SQL, taken apart at its parameters as PostgreSQL reads it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .source import BadQuery

_TOKEN = re.compile(
    r"""
      (?P<comment> --[^\n\r]* )
    | (?P<block> /\* )
    | (?P<other>
        [eE]'(?:[^'\\]|\\.|'')*+'  # goes on after a line break, with the same rules
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
"""What must be known to find parameters. Source: PostgreSQL, src/backend/parser/scan.l."""

_BLOCK = re.compile(r"/\*|\*/")


@dataclass(frozen=True, slots=True)
class Statement:
    """A configured SQL, taken apart at its parameters: `texts` has one more than `names`."""

    texts: Sequence[str]
    names: Sequence[str]

    @classmethod
    def parse(cls, sql: str) -> "Statement":
        """Find `:name` outside of strings, quoted names, comments and casts; one semicolon at the end is dropped.

        The slice `a[x:y]` has to be written with a space, `a[x: y]`. What is no valid SQL stays what it is, so that
        PostgreSQL can say what is wrong. Raises BadQuery for `$1`.
        """
        texts, names = [""], []
        position, last = 0, ""  # last: a semicolon that nothing has followed yet
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
        """The SQL with something in the place of each parameter."""
        # The spaces keep it apart: a$1 would be a name.
        written = [f" {write(name)} {text}" for name, text in zip(self.names, self.texts[1:], strict=True)]
        return self.texts[0] + "".join(written)


def _block_end(sql: str, start: int) -> int:
    """Where a comment ends, in which comments may be."""
    depth = 0
    for match in _BLOCK.finditer(sql, start):
        depth += 1 if match[0] == "/*" else -1
        if depth == 0:
            return match.end()
    return len(sql)
