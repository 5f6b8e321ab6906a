"""Which code and which libraries a run used."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["code_fingerprint", "git_commit", "versions"]

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("glowflow", "torch", "ray", "mlflow", "numpy", "pydantic", "pyarrow", "tokenizers")


def code_fingerprint(package: Path = _PACKAGE) -> str:
    """SHA-256 over the names and contents of the package's Python files, equal wherever it is installed."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def git_commit(folder: Path = _PACKAGE) -> str | None:
    """The commit that the package lies in, with ``-dirty`` where files differ; None outside a repository."""
    try:
        # A virtual environment may lie in somebody else's repository: the package itself must be tracked.
        _git(folder, "ls-files", "--error-unmatch", "--", str(folder / "__init__.py"))
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", str(folder))
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def versions() -> dict[str, str]:
    """Library -> installed version, without importing them; also Python and, in a repository, the git commit."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = git_commit()
    return found | ({"git": commit} if commit else {})
