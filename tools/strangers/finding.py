"""What a tool has found."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """Something that a tool objects to, and the command that shows it."""

    what: str
    reproduce: str

    def __str__(self) -> str:
        return f"FAILED {self.what}\n       {self.reproduce}"


@dataclass(frozen=True)
class Outcome:
    """What came of a tool: what it has looked at, and what it has found."""

    looked_at: str
    findings: list[Finding] = field(default_factory=list)
