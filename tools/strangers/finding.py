"""The findings of a tool."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """A failure that a tool reports, and the command that reproduces it."""

    what: str
    reproduce: str

    def __str__(self) -> str:
        return f"FAILED {self.what}\n       {self.reproduce}"


@dataclass(frozen=True)
class Outcome:
    """The result of a tool: what it has tested, and its findings."""

    tested: str
    findings: list[Finding] = field(default_factory=list)
