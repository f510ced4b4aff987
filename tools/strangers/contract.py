"""schemathesis: whether the server conforms to its OpenAPI document, for valid, invalid and unusual requests.

All its checks, in its four phases: examples of the document, coverage of every keyword, fuzzing, and sequences of
requests in which ids of responses are used. `schemathesis_hooks.py` bounds streams, and has the accepted failures.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .finding import Finding, Outcome

CONFIG = Path(__file__).with_name("schemathesis.toml")

EXCLUDED = r"^/v1/(streams?(/|$)|completions$|embeddings$)"
"""Paths whose schemas cannot state what is valid: Durable Streams has its own suite, and it depends on the model."""

SECONDS = 1500
"""Maximum time of a run."""

WIDTH = 600
"""Maximum length of a line that is shown, in characters."""


def run(server: str, *, examples: int, only: Sequence[str] = ()) -> Outcome:
    """Test all operations, or those that `only` selects, with `examples` requests per operation and phase."""
    with tempfile.TemporaryDirectory(prefix="streamlab-strangers-") as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
        command += [f"{server}/openapi.json", "--checks", "all", "--max-examples", str(examples), *only]
        command += ["--exclude-path-regex", EXCLUDED]
        command += ["--report", "json", "--report-json-path", str(report)]
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
        if not report.exists():
            return Outcome("nothing", [Finding(f"it did not run:\n{ran.stdout}{ran.stderr}", " ".join(command))])
        facts = json.loads(report.read_text())
    tested = (
        f"{facts['test_cases']['generated']} requests of {facts['operations']['tested']} operations "
        f"in {facts['running_time']:.0f} s"
    )
    findings = list(_findings(ran.stdout))
    if ran.returncode and not findings:
        findings.append(Finding(f"it ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}", " ".join(command)))
    return Outcome(tested, findings)


def _findings(output: str) -> Iterator[Finding]:
    """Parse the failures in the output: title, explanation, response, and curl commands."""
    for section in re.split(r"^_{3,} ", output, flags=re.MULTILINE)[1:]:
        operation = section.partition(" _")[0]
        for case in re.split(r"^\d+\. Test Case ID.*$", section, flags=re.MULTILINE)[1:]:
            text, _, reproduce = case.partition("Reproduce with:")
            lines = [line.strip()[:WIDTH] for line in text.splitlines() if line.strip()]
            commands = [line.strip() for line in reproduce.splitlines() if line.strip().startswith("curl ")]
            yield Finding("\n       ".join([operation, *lines]), "\n       ".join(commands))
