"""The arguments of a plan: all that it depends on, what is wrong with them, and the fingerprint over all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glowflow.config.errors import DataError, Problem
from glowflow.data.manifest import Manifest
from glowflow.data.samples.view import MediaView

__all__ = ["Arguments", "check", "fingerprint"]

# Go into the fingerprint: raise one whenever the same arguments give other batches.
ALGORITHM = 2
SAMPLE_ALGORITHM = 1  # of layout bucketed
_LAYOUTS = ("packed", "lanes", "bucketed")


@dataclass(frozen=True)
class Arguments:
    """All that a plan depends on."""

    sources: tuple[tuple[Manifest, float], ...]
    seed: int
    context: int
    global_batch: int
    layout: str
    split: str
    window_tokens: int
    shuffle: bool = True
    epochs: int | None = None
    view: MediaView | None = None  # of layout bucketed alone

    def plain(self) -> dict[str, Any]:
        """All but the sources and the view."""
        return {name: value for name, value in vars(self).items() if name not in ("sources", "view")}

    def spec(self) -> dict[str, Any]:
        """A JSON-able description, with the paths of the manifests; ``from_spec`` undoes it."""
        sources = [[str(manifest.path), weight] for manifest, weight in self.sources]
        spec = {**self.plain(), "sources": sources, "fingerprint": fingerprint(self)}
        return spec if self.view is None else {**spec, "view": self.view.plain()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Arguments:
        """Rebuild them from ``spec``.

        Raises:
            DataError: a manifest is gone, or is no longer the one that the plan was made from.
        """
        plain = {name: value for name, value in spec.items() if name not in ("sources", "fingerprint", "view")}
        sources = tuple((Manifest.load(path), weight) for path, weight in spec["sources"])
        view = MediaView.from_plain(spec["view"]) if "view" in spec else None
        rebuilt = cls(sources, **plain, view=view)
        if fingerprint(rebuilt) != spec["fingerprint"]:
            paths = ", ".join(path for path, _ in spec["sources"])
            rule = "the data set changed after the plan was made"
            raise DataError(Problem(paths, rule, hint="start a new run, or bring the old data set back"))
        return rebuilt


def fingerprint(arguments: Arguments) -> str:
    """sha256 over everything that can change a batch."""
    content = {
        **arguments.plain(),
        "algorithm": ALGORITHM,
        "sources": [[manifest.fingerprint, float(weight)] for manifest, weight in arguments.sources],
    }
    if arguments.view is not None:
        content |= {"algorithm": SAMPLE_ALGORITHM, "view": arguments.view.identity()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check(arguments: Arguments) -> None:
    """Refuse arguments that no plan can be made from.

    Raises:
        DataError: with all problems.
    """
    problems = []
    for key, name, least in (
        ("training.seed", "seed", 0),
        ("data.context", "context", 1),
        ("training.batch_size", "global_batch", 1),
        ("data.window_tokens", "window_tokens", 1),
    ):
        if getattr(arguments, name) < least:
            problems.append(Problem(key, f"must be at least {least}", getattr(arguments, name)))
    if arguments.layout not in _LAYOUTS:
        problems.append(Problem("data.layout", f"must be one of {', '.join(_LAYOUTS)}", arguments.layout))
    if not arguments.sources:
        problems.append(Problem("data.sources", "must name at least one source"))
    for manifest, weight in arguments.sources:
        if not 0 < weight < float("inf"):
            problems.append(Problem("data.sources.weight", f"must be a positive number for {manifest.name}", weight))
        if arguments.split not in manifest.splits:
            hint = f"splits of {manifest.name}: {', '.join(sorted(manifest.splits)) or 'none'}"
            problems.append(Problem(str(manifest.path), "the data set has no such split", arguments.split, hint))
    tokenizers = {manifest.tokenizer_fingerprint: manifest.name for manifest, _ in arguments.sources}
    if len(tokenizers) > 1:
        rule = f"all sources must be built with one tokenizer, {' and '.join(tokenizers.values())} differ"
        problems.append(Problem("data.sources", rule, hint="build them again with the same --tokenizer"))
    if problems:
        raise DataError(problems, title="no plan can be made")
    if (arguments.layout == "bucketed") != (arguments.view is not None):
        raise ValueError("layout bucketed, and no other, needs a view")
