"""Programs on Node: the scripts and packages of tests/node, which `make node` installs."""

import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "node"


def node_command(script: str, *, package: str) -> list[str]:
    """Return the command that runs a script of tests/node; skip the test where Node or the package is missing.

    A script imports packages by their names: Node searches `node_modules` beside it.
    """
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    if not (FOLDER / "node_modules" / package).is_dir():
        pytest.skip(f"needs the npm package {package}: run `make node`")
    return [node, str(FOLDER / script)]
