"""Import contracts: what a room may import, and what the cheap and the torch-only rooms must do without."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

import glowflow

PACKAGE = Path(glowflow.__file__).resolve().parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Rooms that work where there is only torch, numpy, pydantic, PyYAML and the standard library.
TORCH_ONLY = ("config", "metrics", "core", "training", "benchmark")
TORCH_ONLY_MODULES = ("glowflow.data.plan", "glowflow.data.manifest")
ALLOWED_DISTRIBUTIONS = ("torch", "numpy", "pydantic", "PyYAML")


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter at the root of the clone; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Full names of everything a file imports anywhere, functions included; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(*prefixes: str) -> set[str]:
    """The modules of ours that import one of the named packages or something below it."""
    return {
        module_name(path)
        for path in SOURCES
        for name in imported(path)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    }


def test_import_glowflow_loads_nothing_but_itself() -> None:
    code = (
        "import sys; before = set(sys.modules); import glowflow; assert glowflow.__version__\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    assert run_python(code).split() == ["glowflow"]


def test_the_config_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    code = "import sys, glowflow; glowflow.load_config(None); print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


@pytest.mark.parametrize("name", ["GlowFlowModel", "TrainingPipeline", "load_config"])
def test_public_names_are_there(name: str) -> None:
    module = importlib.import_module(glowflow._LAZY[name])
    assert getattr(glowflow, name) is getattr(module, name)
    assert name in dir(glowflow)


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        glowflow.NoSuchThing  # noqa: B018


_BLOCKED_IMPORTS = """
import importlib, sys

refused = set(sys.argv[1].split(","))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is made unimportable by this test", name=name)

sys.meta_path.insert(0, Refuse())
for name in sys.argv[2].split(","):
    importlib.import_module(name)
assert "torch" in sys.modules and not refused & set(sys.modules)
"""


def closure(distributions: tuple[str, ...]) -> set[str]:
    """The normalised names of distributions and of everything they themselves depend on."""
    seen: set[str] = set()
    waiting = list(distributions)
    while waiting:
        name = canonicalize_name(re.split(r"[^\w.-]", waiting.pop())[0])
        if name in seen:
            continue
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue
        seen.add(name)
        waiting += [requirement for requirement in needed if "extra ==" not in requirement]
    return seen


def test_torch_only_rooms_import_without_everything_else() -> None:
    rooms = [module_name(path) for path in SOURCES if path.relative_to(PACKAGE).parts[0] in TORCH_ONLY]
    modules = [name for name in rooms if not name.endswith("__main__")] + list(TORCH_ONLY_MODULES)
    kept = closure(ALLOWED_DISTRIBUTIONS)
    refused = {
        module
        for module, owners in packages_distributions().items()
        if module != "glowflow" and not {canonicalize_name(owner) for owner in owners} & kept
    }
    assert {"ray", "mlflow", "pyarrow", "tokenizers", "rich", "click"} <= refused
    run_python(_BLOCKED_IMPORTS, ",".join(sorted(refused)), ",".join(modules))


def test_imports_point_downwards() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ray_train_tune_and_jobs_stay_in_orchestration() -> None:
    users = importers("ray.train", "ray.tune", "ray.job_submission")
    assert users, "orchestration drives Ray Train"
    assert {name for name in users if not name.startswith("glowflow.orchestration")} == set()


def test_ray_in_data_only_where_a_ray_data_graph_is_built() -> None:
    outside = {name for name in importers("ray") if not name.startswith("glowflow.orchestration")}
    assert outside <= {"glowflow.data.ray_items", "glowflow.data.rayjob", "glowflow.data.stream"}


def test_mlflow_stays_in_tracking() -> None:
    users = importers("mlflow")
    assert users, "tracking writes to MLflow"
    assert {name for name in users if not name.startswith("glowflow.tracking")} == set()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_stay_readable(path: Path) -> None:
    limit = 400 if path == PACKAGE / "training" / "loop.py" else 500
    assert len(path.read_text(encoding="utf-8").splitlines()) < limit
