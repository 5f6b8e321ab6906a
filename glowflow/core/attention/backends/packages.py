"""Whether an optional kernel package can be used: by its distribution, then by importing it. In: names. Out: reasons.

A package is looked for by its *distribution* (``importlib.metadata``) and never by ``find_spec``: flash-attn-4 installs
the namespace ``flash_attn`` without flash-attn being there.
"""

from __future__ import annotations

import importlib
from importlib import metadata

from torch.torch_version import TorchVersion

__all__ = ["import_reasons", "package_reasons", "version_of"]


def version_of(distribution: str) -> TorchVersion | None:
    """The installed version, which compares as versions do; None: not installed."""
    try:
        return TorchVersion(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


def package_reasons(distribution: str, minimum: str) -> list[str]:
    """Why the package is not there, or too old. Imports nothing."""
    version = version_of(distribution)
    if version is None:
        return [f"the package {distribution} is not installed"]
    if version < minimum:
        return [f"needs {distribution} {minimum} or later, {version} is installed"]
    return []


def import_reasons(module: str) -> list[str]:
    """Why an installed package cannot be imported: a missing dependency, or a build for another torch or CUDA."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        return [f"{module} cannot be imported: {first_line}"]
    return []
