"""The lists of dependencies agree with each other, and the files that a stranger starts from are in order."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import glowflow
from glowflow.config.yaml12 import parse_yaml


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in the standard library since Python 3.11")
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def constraints(repository: Path) -> dict[str, str]:
    """Package -> the one version in constraints.txt."""
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pins}


def test_requirements_txt_repeats_pyproject(repository: Path, project: dict[str, Any]) -> None:
    lines = (repository / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = {str(Requirement(line)) for line in lines if line and not line.startswith(("#", "-"))}
    assert listed == {str(Requirement(item)) for item in project["dependencies"]}
    assert "-c constraints.txt" in lines


def test_constraints_pin_every_direct_dependency_inside_its_range(
    project: dict[str, Any], constraints: dict[str, str]
) -> None:
    for item in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(item)
        assert requirement.specifier.contains(constraints[canonicalize_name(requirement.name)]), item


def test_constraints_are_exact_and_portable(repository: Path) -> None:
    text = (repository / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []  # no +cpu, no paths
    names = [pin.partition("==")[0].lower() for pin in pins]
    assert names == sorted(set(names))


def test_extras_are_those_that_the_documents_name(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    assert {Requirement(item).name for item in extras["cuda"]} == {"xformers", "flash-attn"}
    assert {"pytest", "hypothesis", "ruff", "mypy", "import-linter"} <= {Requirement(i).name for i in extras["dev"]}


def test_citation_carries_the_version(repository: Path) -> None:
    citation = parse_yaml((repository / "CITATION.cff").read_text(encoding="utf-8"), "CITATION.cff")
    assert citation["version"] == glowflow.__version__
    assert f"## {glowflow.__version__}" in (repository / "CHANGELOG.md").read_text(encoding="utf-8")


def make(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # A `make test` above this one hands down its own flags.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-C", str(repository), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("target", ["demo", "test", "journeys", "benchmarks", "docs", "clean", "install", "lint"])
def test_make_knows_the_target(repository: Path, tmp_path: Path, target: str) -> None:
    done = make(repository, "-n", target, f"VENV={tmp_path}/venv")
    assert done.returncode == 0, done.stderr


def test_make_installs_only_when_something_changed(repository: Path, tmp_path: Path) -> None:
    fresh = make(repository, "-n", "test", f"VENV={tmp_path}/venv").stdout
    assert "pip install" in fresh and "-m venv" in fresh
    (stamp,) = re.findall(r"touch (\S+/venv/\S+)", fresh)
    Path(stamp).parent.mkdir(parents=True)
    Path(stamp).touch()
    assert "pip install" not in make(repository, "-n", "test", f"VENV={tmp_path}/venv").stdout
    os.utime(stamp, (0, 0))  # as if pyproject.toml were newer
    assert "pip install" in make(repository, "-n", "test", f"VENV={tmp_path}/venv").stdout


def test_make_refuses_an_old_python(repository: Path, tmp_path: Path) -> None:
    old = tmp_path / "oldpython"
    old.write_text('#!/bin/sh\necho "GlowFlow needs Python 3.10 or later, this is 3.8.1" >&2\nexit 1\n')
    old.chmod(0o755)
    done = make(repository, "install", f"VENV={tmp_path}/venv", f"PYTHON={old}")
    assert done.returncode != 0
    assert "needs Python 3.10" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_ci_script_is_valid_bash(repository: Path) -> None:
    assert subprocess.run(["bash", "-n", str(repository / ".ci" / "run")], timeout=20).returncode == 0
